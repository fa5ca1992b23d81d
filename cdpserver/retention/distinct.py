"""How many distinct bytes are written within a time: what a base point must hold that long after the one below it.

    bytes
      |            . - - - extrapolated: the slope of the last two, never past the size of the disk
      |       .-'
      |   .-'
      | /
      +---|---|----|------ length of the window

Measured from header logs: the exact union of what was written in windows that the history holds. A window length is looked at
in several places, evenly spread, as long as they hold few enough records; what was looked at is part of the answer.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import log
from typing import Any

import numpy as np

from cdpserver.journal.log import Journal
from cdpserver.journal.record import Kind
from cdpserver.limits import BLOCK, SECTOR
from cdpserver.view.delta import Ranges, union

SECOND_NS = 1_000_000_000
HOUR_NS = 3600 * SECOND_NS
DAY_NS = 24 * HOUR_NS
NAMED_NS = (HOUR_NS, DAY_NS, 7 * DAY_NS, 28 * DAY_NS)

MAX_PLACES = 16
"""Windows of one length: enough that one busy hour does not speak for all."""

MAX_RECORDS = 1_000_000
"""Records read for one length, in several places; 0.3 us each."""

MAX_ONE = 4 * MAX_RECORDS
"""Records of one window: about a second. A longer history is looked at in shorter windows, and the rest is extrapolated."""

LEAST_NS = SECOND_NS
HALVINGS = 4
"""Lengths that come from halving the history: the slope at its end."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Distinct bytes written within `window_ns`: on average, in the quietest and in the busiest of the places looked at."""

    window_ns: int
    bytes: int
    least: int
    most: int
    places: int
    records: int

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def written(journal: Journal, after: int, upto: int) -> Ranges:
    """The blocks that the data records with `after` < seq <= `upto` touch.

    Zeros, and what a resync found unchanged, take no room in a base point.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    for run in journal.runs(after, upto):
        records = run.records[run.records["kind"] == Kind.DATA]
        starts = records["offset"].astype(np.int64)
        ends = starts + records["length"].astype(np.int64) * SECTOR
        found.append(union(np.stack((starts // BLOCK * BLOCK, -(-ends // BLOCK) * BLOCK), axis=1)))
    return union(np.concatenate(found))


def lengths(held_ns: int, wanted: Iterable[int]) -> list[int]:
    """Window lengths worth a look, ascending: those wanted, those with a name, and halves of the whole history."""
    halves = [held_ns >> k for k in range(held_ns.bit_length())]
    found = {length for length in (*wanted, *NAMED_NS, *halves) if LEAST_NS <= length <= held_ns}
    return sorted(found)


def _seq_at(journal: Journal, time_ns: int) -> int:
    position = journal.at_time(time_ns)
    return position.seq if position is not None else 0


class _Counts:
    """How many records there are between two seqs: numbers are jumped over where a host lost power."""

    def __init__(self, journal: Journal, start_ns: int) -> None:
        start = journal.at_time(start_ns)
        self._firsts: list[int] = []
        self._before: list[int] = []
        self._places: list[tuple[int, int]] = []
        self._journal = journal
        total = 0
        for interval, segment in journal.places((start.interval, 0) if start is not None else (0, 0)):
            reader = journal.reader(interval, segment)
            self._places.append((interval, segment))
            self._firsts.append(reader.first_seq)
            self._before.append(total)
            total += reader.count

    def _upto(self, seq: int) -> int:
        place = bisect_right(self._firsts, seq) - 1
        if place < 0:
            return 0
        return self._before[place] + self._journal.reader(*self._places[place]).count_to(seq)

    def between(self, after: int, upto: int) -> int:
        """Records with `after` < seq <= `upto`."""
        return self._upto(upto) - self._upto(after)


@dataclass(frozen=True, slots=True)
class _Window:
    after: int
    upto: int
    records: int


def _windows(journal: Journal, counts: _Counts, start_ns: int, now_ns: int, length: int) -> list[_Window]:
    """The places where a length is looked at; none if even one holds too many records."""

    def placed(number: int) -> list[_Window]:
        room = now_ns - start_ns - length
        # From the first to the newest; a single one is the newest.
        steps = range(number) if number > 1 else [1]
        begins = [start_ns + room * k // max(1, number - 1) for k in steps]
        found = [(_seq_at(journal, begin - 1), _seq_at(journal, begin + length - 1)) for begin in begins]
        return [_Window(after, upto, counts.between(after, upto)) for after, upto in found]

    windows = placed(min(MAX_PLACES, max(1, (now_ns - start_ns) // length)))
    records = sum(window.records for window in windows)
    if records > MAX_RECORDS and len(windows) > 1:
        windows = placed(max(1, len(windows) * MAX_RECORDS // records))
    return windows if all(window.records <= MAX_ONE for window in windows) else []


def sample(journal: Journal, *, start_ns: int, now_ns: int, wanted: Iterable[int]) -> list[Sample]:
    """Distinct bytes by window length, ascending, in the unbroken history since `start_ns`. CorruptError for a damaged log."""
    found: list[Sample] = []
    counts = _Counts(journal, start_ns)
    asked = set(wanted)
    halves = 0
    for length in reversed(lengths(now_ns - start_ns, asked)):
        named = length in asked or length in NAMED_NS
        if not named and halves == HALVINGS:
            continue
        windows = _windows(journal, counts, start_ns, now_ns, length)
        if not windows:
            continue
        halves += not named
        sizes = []
        for window in windows:
            ranges = written(journal, window.after, window.upto)
            sizes.append(int((ranges[:, 1] - ranges[:, 0]).sum()))
        mean = round(sum(sizes) / len(sizes))
        records = sum(window.records for window in windows)
        found.append(Sample(length, mean, min(sizes), max(sizes), len(sizes), records))
    return found[::-1]


class Curve:
    """Distinct bytes against window length: measured where it was, between and beyond by the slope. Never falls."""

    def __init__(self, samples: Sequence[Sample], size: int) -> None:
        self.size = size
        self._windows = [found.window_ns for found in samples]
        most = np.maximum.accumulate([min(found.bytes, size) for found in samples] or [0])
        self._bytes = [int(value) for value in most]

    @property
    def measured_ns(self) -> int:
        """The longest window that was measured; 0 if none was."""
        return self._windows[-1] if self._windows else 0

    def at(self, window_ns: int) -> int:
        """Bytes for one length."""
        if not self._windows or not self._bytes[-1]:
            return 0
        place = bisect_left(self._windows, window_ns)
        if place == len(self._windows):
            return self._beyond(window_ns)
        high, top = self._windows[place], self._bytes[place]
        if place == 0 or high == window_ns or not self._bytes[place - 1]:
            # Below what was measured: twice the time never writes more than twice as much.
            return round(top * window_ns / high)
        low, bottom = self._windows[place - 1], self._bytes[place - 1]
        grown: float = bottom * (window_ns / low) ** _slope(low, bottom, high, top)
        return round(grown)

    def _beyond(self, window_ns: int) -> int:
        last, top = self._windows[-1], self._bytes[-1]
        # From well below the end: two lengths that differ little would make a slope of noise.
        before = [(w, b) for w, b in zip(self._windows, self._bytes, strict=True) if b and w <= last // 2]
        slope = _slope(*before[-1], last, top) if before else 1.0
        grown: float = top * (window_ns / last) ** slope
        return min(self.size, round(grown))


def _slope(low: int, bottom: int, high: int, top: int) -> float:
    """The exponent of the power law through two points: from 0, nothing new is written, to 1, all is new."""
    return max(0.0, min(1.0, log(top / bottom) / log(high / low)))
