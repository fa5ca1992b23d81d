"""Cuts: where base points were cut, as the journal says it. A cut is the last record of an interval."""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

from cdpserver.errors import CorruptError
from cdpserver.journal.log import Journal
from cdpserver.journal.record import Kind
from cdpserver.journal.segment import SegmentReader


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a base point was cut: its number and place, the last of an interval."""

    number: int
    seq: int
    time_ns: int
    interval: int


def cuts(journal: Journal) -> list[Cut]:
    """Every cut that the journal holds, oldest first."""
    found = []
    for interval, after in pairwise(journal.intervals):
        # Most intervals end with a cut; a count that did not move saves a look.
        if after != interval + 1 or _cuts_at(journal, after) != _cuts_at(journal, interval):
            cut = _cut_at_end(journal, interval)
            if cut is not None:
                found.append(cut)
    return found


def find_cut(journal: Journal, number: int) -> Cut | None:
    """Cut `number`, if the journal holds it; costs a bisection over the intervals."""
    held = journal.intervals
    index = bisect_left(held, number + 1, key=lambda interval: _cuts_at(journal, interval))
    if index == 0 or index == len(held):
        return None
    cut = _cut_at_end(journal, held[index - 1])
    return cut if cut is not None and cut.number == number else None


def _cuts_at(journal: Journal, interval: int) -> int:
    """Cuts before an interval began."""
    return journal.first_reader(interval).header.carry.cuts


def _cut_at_end(journal: Journal, interval: int) -> Cut | None:
    """The cut that ended an interval; None if the writer closed it for its size."""
    reader = journal.last_reader(interval)
    for number in range(reader.count - 1, -1, -1):
        try:
            record = reader.records(number, number + 1)[0]
        except CorruptError:
            return _as_carried(journal, interval, reader)
        if record["kind"] == Kind.CONTROL:
            message = reader.control(record)
            if message["type"] == "cut":
                return Cut(int(message["number"]), int(record["seq"]), int(record["time"]), interval)
    return None


def _as_carried(journal: Journal, interval: int, reader: SegmentReader) -> Cut | None:
    """The same from what the next interval carries on from it, where records at the end are damaged; a cut is the last one."""
    if interval + 1 not in journal.intervals:
        return None
    after = journal.first_reader(interval + 1).header
    if after.carry.cuts == _cuts_at(journal, interval):
        return None
    return Cut(after.carry.cuts - 1, reader.last_seq, after.first_time_ns, interval)
