"""A disk that remembers what was read of it, so that a look need not be repeated where none of that changed.

What a parser answers depends on the bytes that it read, and on nothing else.
Threads: none.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from cdpserver.journal.record import CHANGES
from cdpserver.limits import SECTOR
from cdpserver.view.delta import Ranges, union
from cdpserver.view.history import History
from cdpserver.view.view import View

Numbers = npt.NDArray[np.int64]


class Watched:
    """A view, and what was read of it. `beat` is called at every read: the work goes on."""

    def __init__(self, view: View, beat: Callable[[], None] = lambda: None) -> None:
        self.view = view
        self.size = view.size
        self._beat = beat
        self._read: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""
        self._beat()
        self._read.append((offset, offset + length))
        return self.view.read(offset, length)

    def ranges(self) -> Ranges:
        """What was read."""
        return as_ranges(self._read)


def as_ranges(pairs: list[tuple[int, int]]) -> Ranges:
    """Sorted, and merged where they meet."""
    return union(np.array(pairs, dtype=np.int64).reshape(-1, 2))


def touches(ranges: Ranges, starts: Numbers, ends: Numbers) -> npt.NDArray[np.bool_]:
    """Which of [starts, ends) meet any of `ranges`."""
    if not len(ranges):
        return np.zeros(len(starts), dtype=np.bool_)
    after = np.searchsorted(ranges[:, 1], starts, side="right")
    found = ranges[np.minimum(after, len(ranges) - 1), 0] < ends
    hit: npt.NDArray[np.bool_] = (after < len(ranges)) & found & (ends > starts)
    return hit


def meet(left: Ranges, right: Ranges) -> bool:
    """Have the two anything in common?"""
    return bool(touches(left, right[:, 0], right[:, 1]).any())


def is_unbroken(history: History, old: int, new: int) -> bool:
    """Does the journal have all that changed between two instants, and is the disk as large at both?"""
    first, last = history.standing(old)[0], history.standing(new)[0]
    return bool(first) and first[0] in last and history.size_at(old) == history.size_at(new)


def first_touch(history: History, after: int, upto: int, ranges: Ranges) -> int | None:
    """The seq of the first record that changes any of these, among those with `after` < seq <= `upto`."""
    return history.journal.settled(partial(_first_touch, history, after, upto, ranges))


def _first_touch(history: History, after: int, upto: int, ranges: Ranges) -> int | None:
    for run in history.journal.runs(after, upto):
        records = run.records[(run.records["kind"] >= CHANGES[0]) & (run.records["kind"] <= CHANGES[-1])]
        starts = records["offset"].astype(np.int64)
        hit = touches(ranges, starts, starts + records["length"].astype(np.int64) * SECTOR)
        if hit.any():
            return int(records["seq"][np.argmax(hit)])
    return None
