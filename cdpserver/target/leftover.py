"""What another host boot may have left of a timeline, found before it is opened."""

import contextlib
import shutil
from pathlib import Path

from cdpserver import durable, timeline
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.journal import firstcopy, recovery
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.segment import OPEN, ROLLED
from cdpserver.timeline import EmptyBase, Timeline


def needs_recovery(directory: Path, boot_id: str) -> bool:
    """Was this timeline left open by another host boot, or has it lost its end? Then it is opened, and so cut, before
    anything reads it. So is one that is damaged: what is wrong with it is said by opening it.
    """
    try:
        timeline.load(directory)
        with durable.unreadable(directory), contextlib.closing(Journal(directory)) as journal:
            if journal.empty:
                note = directory / "first-copy.json"
                return note.exists() and durable.read_json(note)["boot_id"] != boot_id
            reader = journal.reader(*next(iter(journal.newest_places())))
            left_open = reader.state in (OPEN, ROLLED) and reader.header.boot_id != boot_id
            return left_open or bool(recovery.lost_logs(journal))
    except (CorruptError, NotFoundError):
        return True


def restart_lost_first_copy(directory: Path, disk: Timeline, boot_id: str) -> None:
    """Power was lost after the switch but before the base was durable: the first copy starts again."""
    journal = Journal(directory)
    own_base = isinstance(disk.base, EmptyBase)
    if journal.empty or not own_base:
        return
    if not firstcopy.base_lost(directory):
        firstcopy.sync_base(directory)  # makes a lost `base.synced` anew
        return
    began = journal.first_reader(journal.intervals[0]).header.boot_id
    newest = journal.reader(*recovery.newest_sealed(journal)[0]).header.boot_id
    journal.close()
    if newest != began:
        return  # it outlived a boot, so it was durable: not for us to throw away
    if began == boot_id:
        firstcopy.sync_base(directory)
        return
    # Reverse of the order of making: what decides the mode goes first.
    for interval in reversed(journal.intervals):
        shutil.rmtree(interval_path(directory, interval))
    (directory / "base.raw").unlink(missing_ok=True)
