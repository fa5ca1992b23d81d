"""A place in a disk's history, by which whoever saw it there knows the disk again.

SEQ:TIME of its newest record, or base:INODE:BOOT during the first copy. An older copy of the disk has not that record, nor has
one that lost it and went on; a first copy that began anew has another base.
"""

from contextlib import closing
from functools import partial
from pathlib import Path

from cdpserver.errors import CorruptError
from cdpserver.journal.firstcopy import FirstCopy
from cdpserver.journal.log import Journal
from cdpserver.journal.writer import JournalWriter

_BASE = "base"


def place(where: FirstCopy | JournalWriter) -> str:
    """The newest place of a disk that is open."""
    if isinstance(where, JournalWriter):
        with where._lock:
            return f"{where.last_seq}:{where.last_time_ns}"
    return f"{_BASE}:{where.path.stat().st_ino}:{where.boot_id}"


def holds(directory: Path, said: str) -> bool:
    """Is a place in the history of the disk in this directory, which is open here?"""
    try:
        with closing(Journal(directory)) as journal:
            kind, first, rest = f":{said}".rpartition(f":{_BASE}:")
            if not kind and first:
                return _stands_on(directory, journal, rest)
            seq, time_ns = map(int, said.split(":"))
            return journal.settled(partial(_has, journal, seq, time_ns))
    except (ValueError, OSError, CorruptError):
        return False


def _has(journal: Journal, seq: int, time_ns: int) -> bool:
    if journal.empty or seq < journal.first().seq:
        return False
    found = journal.at_seq(seq)
    return (found.seq, found.time_ns) == (seq, time_ns)


def _stands_on(directory: Path, journal: Journal, rest: str) -> bool:
    """Is the base still the one of that first copy, and was it switched to a history in the same boot, if it was?"""
    inode, _, boot = rest.partition(":")
    same = str((directory / "base.raw").stat().st_ino) == inode
    return same and (journal.empty or journal.first_reader(journal.intervals[0]).header.boot_id == boot)
