"""Which worker serves which disk: a function of the disk's id and the number of workers, so that nobody has to be asked.

A worker is one target process. Ids count up, so the disks spread evenly; with another number of workers most of them move.
A disk's URI names a socket of its own, a link that follows it.
"""


def worker_of(timeline_id: str, workers: int) -> int:
    """The number, from 0, of the worker that a timeline belongs to."""
    return int(timeline_id[1:]) % workers


def worker_name(timeline_id: str, workers: int) -> str:
    """The name of that worker's process."""
    return process_name(worker_of(timeline_id, workers))


def process_name(worker: int) -> str:
    """How a worker's process is called, in events and figures."""
    return f"target-{worker}"
