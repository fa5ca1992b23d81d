"""Several closed intervals as a view sees them: one lookup in a merged index instead of one in the index of each."""

from pathlib import Path

from cdpserver.index.merged import (
    LEVEL_SHIFT,
    PLACE_SHIFT,
    REGION_BLOCKS,
    REGION_MASK,
    REGION_SHIFT,
    Merged,
    identity,
)
from cdpserver.index.pieces import SHIFTS
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal.log import interval_path
from cdpserver.journal.segment import data_path
from cdpserver.view.layers import NOTHING, Piece, advance, lay

FEW = 4
"""Up to this many blocks are looked up one by one."""


class Span:
    """Lookups in intervals [low, high], all of which a merged index holds. The interval stands for the seq of what is found."""

    __slots__ = ("_data", "_first", "_levels", "_merged", "_newest", "_oldest", "_timeline", "intervals")

    def __init__(self, timeline: Path, merged: Merged, low: int, high: int) -> None:
        self.intervals = range(low, high + 1)
        self._timeline = timeline
        self._merged = merged
        self._first = merged.first
        self._oldest, self._newest = low - merged.first, high - merged.first
        # Of one interval the smaller piece holds, so the smaller ones come first, and only a newer interval's is better.
        self._levels = [
            (level << LEVEL_SHIFT, SHIFTS[level], (1 << SHIFTS[level]) - 1) for level in merged.levels
        ]
        self._data: dict[tuple[int, int], str] = {}

    @property
    def stands(self) -> bool:
        """Are the intervals those that the merged index was made of?"""
        members = self._merged.members
        return all(
            identity(interval_path(self._timeline, number) / CLOSED_NAME) == members[number].index
            for number in self.intervals
        )

    def keeps_gone(self) -> bool:
        """The merged index is the view's."""
        return False

    def begin(self) -> None:
        """Nothing to look at anew: it never changes."""

    def end(self) -> None:
        """Nothing to let go of."""

    def data(self, segment: int, interval: int) -> str:
        """Path of a segment's data file."""
        path = self._data.get((interval, segment))
        if path is None:
            path = str(data_path(interval_path(self._timeline, interval), segment))
            self._data[interval, segment] = path
        return path

    def newest(self, block: int, seq: int) -> tuple[int, int] | None:
        """(interval, value) of one block, or None where these intervals did not write it; all of them are before `seq`."""
        best = -1
        value = 0
        region, inside = block >> REGION_SHIFT << PLACE_SHIFT, block & REGION_MASK
        for level, shift, within in self._levels:
            found = self._merged.newest(region | level | inside >> shift, self._oldest, self._newest)
            if found is not None and found[0] > best:
                best, value = found[0], advance(found[1], block & within)
        return (best + self._first, value) if best >= 0 else None

    def resolve(self, first: int, end: int, seq: int) -> list[Piece]:
        """What these intervals hold for blocks [first, end), in order and without holes; all of it is before `seq`."""
        if end - first <= FEW:
            return [
                (block, block + 1, *(self.newest(block, seq) or (NOTHING, 0))) for block in range(first, end)
            ]
        over: list[Piece] = [(first, end, NOTHING, 0)]
        for level, shift, _ in reversed(self._levels):
            pieces: list[Piece] = []
            for start in range(first >> REGION_SHIFT, (end - 1 >> REGION_SHIFT) + 1):
                base, low = start << REGION_SHIFT, start << PLACE_SHIFT | level
                from_, to = max(first - base, 0) >> shift, (min(end - base, REGION_BLOCKS) - 1 >> shift) + 1
                pieces += [
                    (at := base + (place - low << shift), at + (1 << shift), ordinal + self._first, value)
                    for place, ordinal, value in self._merged.pieces(
                        low + from_, low + to, self._oldest, self._newest
                    )
                ]
            if pieces:
                over = lay(over, pieces)
        return over

    def close(self) -> None:
        """The merged index is the view's, which may read other intervals through it."""
