"""Reading a timeline's journal: which segments there are, where a seq or a time is, runs of records.

A reader never writes and needs no lock: segments only grow until they are sealed, and the tail word says how far. Intervals may
be dropped or thinned between a listing and the opening of a file: who looks at others than the newest one does so in `settled`.
Cost: finding a seq or a time bisects header pages, so it does not depend on how long the journal is.
"""

import contextlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.journal import control
from cdpserver.journal.instants import Instants
from cdpserver.journal.record import DTYPE, Kind
from cdpserver.journal.segment import SegmentReader

FIRST_INTERVAL = 1
"""A history begins with it; when it is not there, older history was dropped."""

CACHED_READERS = 64
"""Segments that a journal reader keeps open for later: bounds file descriptors."""

LOOKS = 100
"""How often history is looked at anew, each time since some of it went meanwhile: more than a pass takes away during a look."""

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive records of one segment."""

    reader: SegmentReader
    interval: int
    records: npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the journal: the newest record at or before some seq or time."""

    interval: int
    segment: int
    seq: int
    time_ns: int


def interval_path(timeline: Path, interval: int) -> Path:
    """Directory of an interval."""
    return timeline / "intervals" / f"{interval:06d}"


def intervals(timeline: Path) -> list[int]:
    """Numbers of the timeline's intervals that hold a segment's directory, ascending."""
    names = (path.name for path in (timeline / "intervals").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def inodes(timeline: Path) -> dict[int, int]:
    """The same with the inode of each directory: another one means that the interval was thinned."""
    with os.scandir(timeline / "intervals") as entries:
        return {int(entry.name): entry.inode() for entry in entries if entry.name.isdigit()}


def segments(timeline: Path, interval: int) -> list[int]:
    """Numbers of an interval's segments, ascending."""
    names = (path.name for path in interval_path(timeline, interval).iterdir())
    return sorted(int(name[:-4]) for name in names if name.endswith(".log") and name[:-4].isdigit())


class Journal:
    """The journal of one timeline, for reading. Not thread-safe."""

    def __init__(self, timeline: Path) -> None:
        self.timeline = timeline
        self._readers: dict[tuple[int, int], SegmentReader] = {}
        self._intervals: list[int] = []
        self._inodes: dict[int, int] = {}
        self._segments: dict[int, list[int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Notice intervals and segments made, replaced or dropped since the last look. Costs one directory listing, or two."""
        last = self._intervals[-1] if self._intervals else 0
        before, self._inodes = self._inodes, inodes(self.timeline)
        gone = {n for n, inode in before.items() if self._inodes.get(n) != inode}
        # What was the newest interval then may have grown before the next one began.
        self._segments = {n: held for n, held in self._segments.items() if n < last and n not in gone}
        for place in [place for place in self._readers if place[0] in gone]:
            del self._readers[place]
        self._intervals = sorted(self._inodes)
        while self._intervals:
            newest = self._intervals[-1]
            self._segments[newest] = segments(self.timeline, newest)
            if self._segments[newest]:
                break
            self._intervals.pop()  # just made: its first segment is still to come

    @property
    def listed(self) -> Mapping[int, int]:
        """The intervals as they were listed last, each with the inode of its directory."""
        return self._inodes

    def has_lost(self, listed: Mapping[int, int]) -> bool:
        """Looks anew: was any of what was listed dropped or thinned since?"""
        self.refresh()
        return any(self._inodes.get(number) != inode for number, inode in listed.items())

    def settled(self, look: Callable[[], Found]) -> Found:
        """What `look` finds in this journal, beside whoever drops and thins.

        What goes between a listing and the opening of a file is history no more: all is looked at anew then. What is missing
        though nothing went is raised as it is. RefusedError where history goes faster than it can be looked at.
        """
        for _ in range(LOOKS):
            listed = self._inodes
            try:
                return look()
            except (FileNotFoundError, CorruptError):
                if not self.has_lost(listed):
                    raise
        raise RefusedError(
            f"history of timeline {self.timeline.name} is being dropped faster than it can be read",
            hint="try again when that is over: cdp job list",
        )

    @property
    def intervals(self) -> list[int]:
        """Numbers of the intervals, ascending."""
        return self._intervals

    def segments(self, interval: int) -> list[int]:
        """Numbers of an interval's segments, ascending."""
        found = self._segments.get(interval)
        if found is None:
            found = self._segments[interval] = segments(self.timeline, interval)
        return found

    def places(self, after: tuple[int, int] = (0, 0)) -> Iterator[tuple[int, int]]:
        """(interval, segment) of every segment from `after` on, oldest first."""
        for interval in self._intervals[bisect_left(self._intervals, after[0]) :]:
            for segment in self.segments(interval):
                if (interval, segment) >= after:
                    yield interval, segment

    def newest_places(self) -> Iterator[tuple[int, int]]:
        """(interval, segment) of every segment, newest first."""
        for interval in reversed(self._intervals):
            for segment in reversed(self.segments(interval)):
                yield interval, segment

    @property
    def empty(self) -> bool:
        """No segment yet: the timeline is before its first copy's end."""
        return not self._intervals

    def reader(self, interval: int, segment: int) -> SegmentReader:
        """The open segment; kept open for later, within a limit, and as long as anybody uses it."""
        key = (interval, segment)
        found = self._readers.pop(key, None)
        if found is None:
            found = SegmentReader(interval_path(self.timeline, interval), segment)
            if len(self._readers) >= CACHED_READERS:
                del self._readers[next(iter(self._readers))]
        self._readers[key] = found
        return found

    def first_reader(self, interval: int) -> SegmentReader:
        """The first segment of an interval. CorruptError if there is none: it is gone, or was never written."""
        return self.reader(interval, self._some(interval)[0])

    def last_reader(self, interval: int) -> SegmentReader:
        """The last segment of an interval; CorruptError as above."""
        return self.reader(interval, self._some(interval)[-1])

    def _some(self, interval: int) -> list[int]:
        held = self.segments(interval)
        if not held:
            path = interval_path(self.timeline, interval)
            raise CorruptError(f"{path} holds no segment", hint="cdp check DISK says what that touches")
        return held

    def newest(self) -> tuple[int, SegmentReader]:
        """Interval and reader of the newest segment. Costs a look at a mapped word while the writer has not rolled on."""
        if self.empty:
            self.refresh()
            if self.empty:
                raise CorruptError(f"{self.timeline.name} has no segment")
        place = (0, 0)
        while True:
            interval = self._intervals[-1]
            segment = self.segments(interval)[-1]
            reader = self.reader(interval, segment)
            if not reader.rolled or place == (interval, segment):
                return interval, reader
            place = (interval, segment)
            self.refresh()

    def last_seq(self) -> int:
        """Seq of the newest record. Includes every write acknowledged before the call."""
        return self.newest()[1].last_seq

    def last(self) -> Position:
        """The newest record. Includes every write acknowledged before the call."""
        interval, reader = self.newest()
        count = reader.count
        if count:
            return Position(interval, reader.segment, reader.seq_of(count - 1), reader.time_of(count - 1))
        before = self._before((interval, reader.segment))
        while before is not None:
            older = self.reader(*before)
            if older.count:
                return Position(*before, older.last_seq, older.time_of(older.count - 1))
            before = self._before(before)
        return Position(interval, reader.segment, reader.first_seq - 1, reader.header.first_time_ns)

    def first(self) -> Position:
        """The oldest record."""
        reader = self.first_reader(self._intervals[0])
        seq = reader.seq_of(0) if reader.header.thinned else reader.first_seq
        return Position(self._intervals[0], reader.segment, seq, reader.header.first_time_ns)

    def _bisect(self, target: int, key: Callable[[SegmentReader], int]) -> tuple[int, int] | None:
        """The last segment whose key is at or below `target`. CorruptError if that may be one that cannot be read."""
        try:
            return self._bisect_whole(target, key)
        except CorruptError as error:
            damage = error
        # Rare, so it may cost a look at every segment: what is damaged must not hide what is not.
        found: tuple[int, int] | None = None
        unsure = False
        for interval in self._intervals:
            for segment in self.segments(interval) or [0]:
                try:
                    if not segment:
                        raise damage
                    above = key(self.reader(interval, segment)) > target
                except CorruptError:
                    unsure = True
                    continue
                if above:
                    return self._sure(found, target, key, unsure, damage)
                found, unsure = (interval, segment), False
        return self._sure(found, target, key, unsure, damage)

    def _sure(
        self,
        found: tuple[int, int] | None,
        target: int,
        key: Callable[[SegmentReader], int],
        unsure: bool,
        damage: CorruptError,
    ) -> tuple[int, int] | None:
        """`found`, unless what cannot be read comes right behind it and may be what was looked for."""
        if unsure:
            reader = self.reader(*found) if found is not None else None
            if reader is None or not key(reader) == reader.first_seq <= target <= reader.last_seq:
                raise damage
        return found

    def _bisect_whole(self, target: int, key: Callable[[SegmentReader], int]) -> tuple[int, int] | None:
        numbers = self._intervals
        index = bisect_right(numbers, target, key=lambda number: key(self.first_reader(number))) - 1
        if index < 0:
            return None
        interval = numbers[index]
        held = self.segments(interval)
        return interval, held[bisect_right(held, target, key=lambda n: key(self.reader(interval, n))) - 1]

    def at_seq(self, seq: int) -> Position:
        """The newest record with a seq at or below `seq`; its own seq differs where seqs were jumped over."""
        with contextlib.suppress(CorruptError):  # a newest segment that is damaged must not hide what is not
            last = self.last()
            if seq >= last.seq:
                return last
        place = self._bisect(seq, lambda reader: reader.first_seq)
        if place is None:
            raise CorruptError(f"{self.timeline.name}: no record at or before seq {seq}")
        interval, segment = place
        reader = self.reader(interval, segment)
        number = reader.count_to(seq) - 1
        if number < 0:  # a segment without records, or thinned
            return self.at_seq(reader.first_seq - 1)
        return Position(interval, segment, reader.seq_of(number), reader.time_of(number))

    def thinned_at_seq(self, seq: int) -> Instants | None:
        """What the interval that `seq` is in can give, if it is a thinned one. CorruptError."""
        place = self._bisect(seq, lambda reader: reader.first_seq)
        return self.first_reader(place[0]).instants if place is not None else None

    def thinned_at_time(self, time_ns: int) -> Instants | None:
        """The same for the interval that a time is in."""
        place = self._bisect(time_ns, lambda reader: reader.header.first_time_ns)
        return self.first_reader(place[0]).instants if place is not None else None

    def gives(self, seq: int) -> bool:
        """Is the content right after `seq` known? In a whole interval it always is."""
        instants = self.thinned_at_seq(seq)
        return instants is None or seq in instants or instants.after_seq(seq) is None

    def ends_with(self, position: Position) -> bool:
        """Is this the last record before a stretch of history that was dropped?"""
        following = position.interval + 1
        if position.interval == self._intervals[-1] or following in self._intervals:
            return False
        return position.seq >= self.last_reader(position.interval).last_seq

    def at_time(self, time_ns: int) -> Position | None:
        """The newest record at or before a time; None before the first one."""
        self.newest()
        place = self._bisect(time_ns, lambda reader: reader.header.first_time_ns)
        while place is not None:
            reader = self.reader(*place)
            number = bisect_right(range(reader.count), time_ns, key=reader.time_of) - 1
            if number >= 0:
                return Position(*place, reader.seq_of(number), reader.time_of(number))
            # A segment without records, or whose first record came later than its header.
            place = self._before(place)
        return None

    def _before(self, place: tuple[int, int]) -> tuple[int, int] | None:
        interval, segment = place
        older = [number for number in self.segments(interval) if number < segment]
        if older:
            return interval, older[-1]
        index = bisect_left(self._intervals, interval) - 1
        return (self._intervals[index], self._some(self._intervals[index])[-1]) if index >= 0 else None

    def runs(self, after: int, upto: int, *, limit: int | None = None) -> Iterator[Run]:
        """Records with `after` < seq <= `upto`, by segment, oldest first; at most `limit` records in all."""
        left = limit if limit is not None else 1 << 62
        if after >= upto:
            return
        with contextlib.suppress(CorruptError):  # met below, if it is among those that are asked for
            self.newest()
        start = self._bisect(after + 1, lambda reader: reader.first_seq) or (0, 0)
        for interval, segment in self.places(start):
            reader = self.reader(interval, segment)
            first = reader.count_to(after)
            end = min(reader.count_to(upto), first + left)
            if end > first:
                if reader.header.thinned:
                    end = reader.count_to(reader.seq_of(end - 1))  # parts of one record stay together
                yield Run(reader, interval, reader.records(first, end))
                left -= end - first
            # What comes behind is not looked at, so that damage there harms nothing that is asked for.
            if max(reader.first_seq, reader.last_seq + 1) > upto or left <= 0:
                return

    def state_at(self, seq: int) -> control.State:
        """The state after the record `seq`: the carry of its segment and the control records since."""
        position = self.at_seq(seq)
        reader = self.reader(position.interval, position.segment)
        return fold_controls(reader, reader.header.carry, 0, reader.count_to(seq))

    def grown_to(self, seq: int | None = None) -> int:
        """Bytes of the disk just after the record `seq`, by default the newest; 0 if it had not grown until then."""
        if self.empty:
            return 0
        if seq is None:
            return disk_size(self.newest()[1])
        position = self.at_seq(seq)
        return disk_size(self.reader(position.interval, position.segment))

    def keeps_gone(self) -> bool:
        """Is a segment open here that has lost its name?"""
        # What takes its place has another number.
        return not all(os.path.exists(reader.path) for reader in self._readers.values())

    def close(self) -> None:
        """Close every segment."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def disk_size(reader: SegmentReader) -> int:
    """Bytes of the disk after any record of a segment; 0 if it had not grown. A disk grows with the first record of a segment."""
    if reader.first_seq == 1:
        return 0  # that record begins the history; a payload that nobody needs is not read
    return fold_controls(reader, reader.header.carry, 0, min(1, reader.count)).size


def fold_controls(reader: SegmentReader, state: control.State, first: int, end: int) -> control.State:
    """The state after records number [first, end) of a segment, from the state before them.

    Only control records are checked; the others are looked at for their kind alone.
    """
    if end <= first:
        return state
    kinds = np.frombuffer(reader.raw(first, end), DTYPE)["kind"]
    for number in np.flatnonzero(kinds == Kind.CONTROL).tolist():
        record = reader.records(first + number, first + number + 1)[0]
        message = reader.control(record)
        state = control.fold(state, message, seq=int(record["seq"]), time_ns=int(record["time"]))
    return state
