"""fio on any number of disks of ours until it is killed, and the workers' own word on what arrives.

fio, a thread and a connection for each disk -> workers -- status: writes, lag --> us
"""

import signal
import socket
from typing import Any

from cdpserver import messages
from cdpserver.state import StateDir
from tools.kit.processes import FailedError, Process, until
from tools.measure.fio import LONGEST_S


class Worker:
    """The control socket of a worker, asked as the service asks it."""

    def __init__(self, state: StateDir, number: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(state.worker_control(number)))

    def ask(self, op: str, **fields: Any) -> Any:
        """One question, one answer."""
        self._socket.sendall(messages.pack({"op": op, **fields}))
        reply = messages.receive(self._socket)
        if reply is None:
            raise FailedError("a worker ended while it was measured")
        messages.raise_error(reply)
        return reply["ok"]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def written(workers: list[Worker]) -> int:
    """Writes to all disks, as the workers count them."""
    return sum(disk["counts"]["writes"] for worker in workers for disk in worker.ask("status").values())


def job(
    uris: list[str], *, size: int, depth: int, rate: int = 0, seconds: float = LONGEST_S, ramp_s: float = 0.0
) -> str:
    """fio's job file: a thread and a connection for each disk, until it is killed, or for a time after `ramp_s`."""
    lines = ["[global]", "ioengine=nbd", "thread", "rw=randwrite", "norandommap", "bs=4096", f"size={size}"]
    lines += ["time_based", f"runtime={seconds * 1000:.0f}ms", f"ramp_time={ramp_s * 1000:.0f}ms"]
    lines += [f"rate_iops={rate}"] if rate else [f"iodepth={depth}"]
    for number, uri in enumerate(uris):
        lines += [f"[disk{number}]", f"uri={uri}"]
    return "\n".join(lines) + "\n"


def all_synced(workers: list[Worker], disks: dict[str, int], process: Process) -> None:
    """The sessions that began with fio's first writes are in sync. fio rests meanwhile, since what comes before that is compared.

    Said to the workers: the service would write each disk's first base point now.
    """

    def wrote() -> bool:
        said = [status for worker in workers for status in worker.ask("status").values()]
        begun = sum(bool(status["clients"]) and not status["synced"] for status in said)
        return begun == len(disks) or process.poll() is not None

    until(wrote, f"first writes to {len(disks)} disks")
    process.send_signal(signal.SIGSTOP)
    for name, worker in disks.items():
        workers[worker].ask("synced", disk=name, session=None, write_blocking=True)
    process.send_signal(signal.SIGCONT)
