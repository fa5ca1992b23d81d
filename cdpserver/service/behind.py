"""How far behind a disk's parts are: its content, its index, its base points. From its files, by what the target wrote there.

    guest ─ lag ─► journal ─ durable lag ─► stable storage
                      └───── index lag ───► index               the tail is what the index lacks

Lag is the age of the newest instant whose content is complete: 0 while the mirror is in sync; during a resync it counts from
the last record before that began, during a first copy from the disk's creation.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cdpserver.cuts import find_cut
from cdpserver.index.store import find_index, open_index, release
from cdpserver.journal.log import Journal, interval_path

_BASE_POINT = re.compile(r"bp-([0-9]{1,18})\.qcow2")


@dataclass(frozen=True, slots=True)
class Tail:
    """Records that the index lacks, and the time of the oldest of them."""

    records: int = 0
    oldest_ns: int | None = None


def tail_of(journal: Journal, boot_id: str) -> Tail:
    """What views find in the header log alone. Counts header pages, so seqs that a boot jumped over are none."""
    journal.newest()
    indexed = _indexed(journal, boot_id)
    records = 0
    for place in journal.newest_places():
        reader = journal.reader(*place)
        records += reader.count - reader.count_to(indexed)
        if reader.first_seq <= indexed:
            break
    if not records:
        return Tail()
    for run in journal.runs(indexed, 1 << 62, limit=1):
        return Tail(records, int(run.records[0]["time"]))
    return Tail()


def _indexed(journal: Journal, boot_id: str) -> int:
    """Seq of the last record in the newest index that holds any; 0 without one."""
    for interval in reversed(journal.intervals):
        path = find_index(interval_path(journal.timeline, interval), boot_id)
        file = open_index(path) if path is not None else None
        if file is None:
            continue
        try:
            indexed = file.indexed()
        finally:
            release(file)
        if indexed:
            return indexed
    return 0


def complete_ns(journal: Journal) -> int | None:
    """Time of the newest record at which the content was complete, None when the newest one is.

    `journal` has records. Time 0: there was no such instant yet.
    """
    last = journal.last()
    state = journal.state_at(last.seq)
    if state.synced or state.fork:
        return None
    if state.resync_ref < 0:
        return last.time_ns  # a gap that nobody has begun to fill
    if state.resync_ref == 0:
        return 0
    return journal.at_seq(state.resync_ref).time_ns


def newest_base_point(directory: Path) -> int | None:
    """Number of the newest published base point."""
    with os.scandir(directory) as files:
        found = (_BASE_POINT.fullmatch(file.name) for file in files)
        return max((int(match[1]) for match in found if match), default=None)


def cut_ns(journal: Journal, number: int) -> int | None:
    """When base point `number` was cut; None if the journal does not say."""
    cut = find_cut(journal, number)
    return cut.time_ns if cut is not None else None
