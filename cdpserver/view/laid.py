"""The maps of a chain's files laid over each other: which file has each part of the disk, whatever the number of files.

    top      ····AAAA·····AA··      own maps, sorted by place on the disk
    below    BB····BBBB·······
    root     rrrrrrrrrrrrrrrrr
    laid     BBrrAAAABBrrrAArr      parts with one owner each, found by one bisection

A disk may be in millions of parts, and a reader of one file wants few of them: the disk is cut into windows of some thousand
parts, and each is laid when it is asked for first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

ZERO = -1
"""Place of a part that reads as zeros."""

WINDOW_PARTS = 4096
"""Parts of all files in a window, on average: laying it takes milliseconds."""

KEPT_WINDOWS = 1024
"""Laid windows that are kept: some 100 MiB. The disk of a million parts has 250."""

LEAST_SPAN = 1 << 20


@dataclass(frozen=True, slots=True)
class OwnMap:
    """Parts [start, end) of the disk that a file holds itself, ascending and disjoint; `place` in the file, or ZERO."""

    start: Numbers
    end: Numbers
    place: Numbers


@dataclass(frozen=True, slots=True)
class Window:
    """Parts of the disk up to `end`; `owner` is the number of a map from 1 on, and 0 where there is none.

    `place` is in that file, or ZERO; without an owner it is that on the disk.
    """

    end: int
    starts: Numbers
    owner: Numbers
    place: Numbers


def lay(maps: Sequence[OwnMap], low: int, high: int) -> Window:
    """Lay the maps, lowest first, over [low, high); the highest one that holds a part has it."""
    parts = []
    for number, held in enumerate(maps, 1):
        first, last = np.searchsorted(held.end, low, side="right"), np.searchsorted(held.start, high)
        if first < last:
            parts.append(
                (number, OwnMap(held.start[first:last], held.end[first:last], held.place[first:last]))
            )
    edges = [np.array([low, high], dtype=np.int64), *(p.start for _, p in parts), *(p.end for _, p in parts)]
    bounds = np.unique(np.clip(np.concatenate(edges), low, high))
    owner = np.zeros(len(bounds) - 1, dtype=np.int64)
    place = bounds[:-1].copy()
    for number, held in parts:
        begins = np.searchsorted(bounds, np.maximum(held.start, low))
        counts = np.searchsorted(bounds, np.minimum(held.end, high)) - begins
        at = np.repeat(begins - np.concatenate(([0], np.cumsum(counts)[:-1])), counts) + np.arange(
            counts.sum()
        )
        from_start = bounds[at] - np.repeat(held.start, counts)
        places = np.repeat(held.place, counts)
        owner[at] = number
        place[at] = np.where(places == ZERO, ZERO, places + from_start)
    return Window(high, bounds[:-1], owner, place)


class Laid:
    """The maps of a disk of `size` bytes, in windows."""

    def __init__(self, maps: Sequence[OwnMap], size: int) -> None:
        self._maps = maps
        self._size = size
        count = max(1, sum(len(held.start) for held in maps) // WINDOW_PARTS)
        self._span = max(LEAST_SPAN, -(-size // count))
        self._windows: dict[int, Window] = {}

    def parts(self, offset: int, end: int) -> list[tuple[int, int, int, int]]:
        """(start, end, owner, place) of [offset, end) of the disk, split where owners or windows change."""
        found = []
        while offset < end:
            window = self._window(offset // self._span)
            starts = window.starts
            number = int(np.searchsorted(starts, offset, side="right")) - 1
            count = len(starts)
            until = min(end, window.end)
            while offset < until:
                stop = min(until, int(starts[number + 1]) if number + 1 < count else window.end)
                owner, place = int(window.owner[number]), int(window.place[number])
                found.append(
                    (offset, stop, owner, place if place == ZERO else place + offset - int(starts[number]))
                )
                offset, number = stop, number + 1
        return found

    def _window(self, number: int) -> Window:
        window = self._windows.get(number)
        if window is None:
            if len(self._windows) >= KEPT_WINDOWS:
                del self._windows[next(iter(self._windows))]
            low = number * self._span
            window = self._windows[number] = lay(self._maps, low, min(low + self._span, self._size))
        return window
