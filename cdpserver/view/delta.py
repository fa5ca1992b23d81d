"""What changed between two instants of one line of history: what a base point holds over its backing file.

Taken from the header logs between the two, so it needs no index and costs what was written in between. Ranges that *same* records
touched are compared by where their content lies, so an unchanged re-mirror leaves nothing. So is all of the disk where a header
between the two is damaged.
"""

from bisect import bisect_right
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cdpserver.errors import CorruptError
from cdpserver.journal.record import CHANGES, Kind
from cdpserver.limits import SECTOR
from cdpserver.timeline import PointBase
from cdpserver.view.extent import Extent
from cdpserver.view.history import History
from cdpserver.view.view import View

Ranges: TypeAlias = npt.NDArray[np.int64]
"""Shape (n, 2): disjoint, ascending byte ranges [start, end)."""

HOLE, ZERO = 1, 2
"""Bits of NBD's base:allocation; a hole that is no zero means *unchanged* here."""

COMPARE_STEP = 256 << 20
"""Bytes of *same* ranges resolved at a time."""


def union(ranges: Ranges) -> Ranges:
    """Merge overlapping and adjoining ranges."""
    if len(ranges) < 2:
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])
    starts = np.flatnonzero(np.concatenate(([True], ranges[1:, 0] > reach[:-1])))
    ends = np.concatenate((starts[1:] - 1, [len(ranges) - 1]))
    return np.stack((ranges[starts, 0], reach[ends]), axis=1)


def touched(history: History, after: int, upto: int) -> tuple[Ranges, Ranges]:
    """(ranges of every change, ranges of *same* records) among the records with `after` < seq <= `upto`.

    Where one of them is damaged nobody knows what it changed: then it may be any part of the disk, as if all of it were *same*.
    """
    try:
        return history.journal.settled(partial(_touched, history, after, upto))
    except CorruptError:
        whole = np.array([[0, history.size_at(upto)]], dtype=np.int64)
        return whole, whole


def _touched(history: History, after: int, upto: int) -> tuple[Ranges, Ranges]:
    empty = np.empty((0, 2), dtype=np.int64)
    everything, same = [empty], [empty]
    for run in history.journal.runs(after, upto):
        records = run.records
        records = records[(records["kind"] >= CHANGES[0]) & (records["kind"] <= CHANGES[-1])]
        starts = records["offset"].astype(np.int64)
        ends = starts + records["length"].astype(np.int64) * SECTOR
        ranges = np.stack((starts, ends), axis=1)
        everything.append(union(ranges))
        same.append(union(ranges[records["kind"] == Kind.SAME]))
    return union(np.concatenate(everything)), union(np.concatenate(same))


def lineage_touched(history: History, upto: int, old_timeline: str, old_seq: int) -> tuple[Ranges, Ranges]:
    """As `touched`, from an instant of this timeline or of one that it was forked from."""
    if history.timeline.id == old_timeline:
        return touched(history, old_seq, upto)
    mine = touched(history, 0, upto)
    base = history.timeline.base
    if not isinstance(base, PointBase) or history.parent is None:
        raise ValueError(f"{old_timeline} is not in the lineage of {history.timeline.id}")
    theirs = lineage_touched(history.parent, base.seq, old_timeline, old_seq)
    return union(np.concatenate((mine[0], theirs[0]))), union(np.concatenate((mine[1], theirs[1])))


def changed(new: View, old: View) -> Ranges:
    """Ranges whose content may differ between `old` and `new`, an instant of the same line of history."""
    ranges, same = lineage_touched(new.history, new.seq, old.history.timeline.id, old.seq)
    same = same[same[:, 0] < min(old.size, new.size)]
    same[:, 1] = np.minimum(same[:, 1], min(old.size, new.size))
    if len(same):
        ranges = subtract(ranges, _unchanged(new, old, same))
    return ranges


def _unchanged(new: View, old: View, same: Ranges) -> Ranges:
    found: list[tuple[int, int]] = []
    for start, end in same.tolist():
        for at in range(start, end, COMPARE_STEP):
            stop = min(end, at + COMPARE_STEP)
            found.extend(_equal_places(new.resolve(at, stop, holes=True), old.resolve(at, stop, holes=True)))
    return union(np.array(found, dtype=np.int64).reshape(-1, 2))


def _equal_places(left: list[Extent], right: list[Extent]) -> list[tuple[int, int]]:
    """Ranges that both lists find in the same place. Both cover the same range."""
    equal: list[tuple[int, int]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        a_start, a_end, a_path, a_place = left[i]
        b_start, b_end, b_path, b_place = right[j]
        low, high = max(a_start, b_start), min(a_end, b_end)
        if low < high and a_path == b_path and (a_path is None or a_place - a_start == b_place - b_start):
            equal.append((low, high))
        i, j = (i + 1, j) if a_end <= b_end else (i, j + 1)
    return equal


def subtract(ranges: Ranges, gone: Ranges) -> Ranges:
    """`ranges` without `gone`; both disjoint and ascending."""
    result: list[tuple[int, int]] = []
    holes = gone.tolist()
    number = 0
    for start, end in ranges.tolist():
        at = start
        while number < len(holes) and holes[number][1] <= at:
            number += 1
        probe = number
        while probe < len(holes) and holes[probe][0] < end:
            if holes[probe][0] > at:
                result.append((at, holes[probe][0]))
            at = max(at, holes[probe][1])
            probe += 1
        if at < end:
            result.append((at, end))
    return np.array(result, dtype=np.int64).reshape(-1, 2)


class Delta:
    """What changed from `old` to `new`, as an export: unchanged ranges are holes, never zeros."""

    def __init__(self, new: View, old: View) -> None:
        self.new = new
        ranges = changed(new, old)
        # An extent that is padded to the block at an unaligned disk end stays inside the disk.
        ranges[:, 1] = np.minimum(ranges[:, 1], new.size)
        if old.size < new.size:
            # Without a record it reads as zeros, and whoever compares looks at it as well.
            ranges = union(np.concatenate((ranges, np.array([[old.size, new.size]], dtype=np.int64))))
        self.ranges = [(int(start), int(end)) for start, end in ranges.tolist()]
        self._starts = [start for start, _ in self.ranges]
        self.size = new.size

    @property
    def bytes(self) -> int:
        """Bytes that may have changed."""
        return sum(end - start for start, end in self.ranges)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Content of the newer instant."""
        self.new.read_into(buffer, offset)

    def status(self, offset: int, end: int, *, one: bool) -> list[tuple[int, int, int]]:
        """(start, end, base:allocation bits) runs from `offset` on."""
        runs: list[tuple[int, int, int]] = []
        at = offset
        number = max(0, bisect_right(self._starts, at) - 1)
        while at < end and not (one and runs):
            while number < len(self.ranges) and self.ranges[number][1] <= at:
                number += 1
            if number == len(self.ranges) or self.ranges[number][0] >= end:
                runs.append((at, end, HOLE))
                return runs
            start, stop = self.ranges[number]
            if start > at:
                runs.append((at, start, HOLE))
                at = start
                continue
            for low, high, zero in self.new.status(at, min(stop, end), one=one):
                runs.append((low, high, HOLE | ZERO if zero else 0))
                at = high
        return runs

    def close(self) -> None:
        """Close the newer view (the older one is the caller's)."""
        self.new.close()
