"""One interval as a view sees it: its index and, before the index has caught up, its tail.

Pieces are nested: a piece of a lower level lies wholly inside one of a higher level. So the newest content of a range
is found by laying the levels over each other from the greatest pieces to the smallest; the higher seq wins.
"""

import os
from pathlib import Path
from typing import TypeAlias

from cdpserver.index.pieces import DOWNWARDS, KIND_BITS, LEVEL_BITS, SHIFTS
from cdpserver.index.store import IndexFile, Snapshot, find_index, open_index, release
from cdpserver.journal.log import Journal
from cdpserver.journal.record import Kind
from cdpserver.journal.segment import data_path
from cdpserver.view.tail import Tail

Piece: TypeAlias = tuple[int, int, int, int]
"""(first block, end block, seq, value at the first block); seq -1 where nothing was written. Of several intervals that are
looked up together the interval stands for the seq: either way what is newer has the greater."""

NOTHING = -1

LEVELS_OF = [
    [(level, shift) for level, shift in enumerate(SHIFTS) if mask >> level & 1]
    for mask in range(1 << len(SHIFTS))
]
"""Levels whose bits are set, with their shifts."""


def advance(value: int, blocks: int) -> int:
    """The value of a piece some blocks further on."""
    return value + blocks if value >> KIND_BITS == Kind.DATA else value


class Layer:
    """Lookups in one interval. `begin` before, `end` after each request."""

    __slots__ = (
        "_data",
        "_file",
        "_inode",
        "_keep",
        "_snapshot",
        "directory",
        "interval",
        "intervals",
        "tail",
    )

    def __init__(self, directory: Path, interval: int, boot_id: str) -> None:
        self.directory = directory
        self.interval = interval
        self.intervals = range(interval, interval + 1)
        self.tail: Tail | None = None
        self._data: dict[int, str] = {}
        # Before the index: thinning swaps the directory, and numbers its segments on, so that none is mistaken.
        self._inode = _inode(directory)
        path = find_index(directory, boot_id)
        self._file: IndexFile | None = open_index(path) if path else None
        # A closed interval's index never changes: its snapshot pins no page, so it may stay.
        self._keep = path is not None and not path.name.startswith("open-")
        self._snapshot: Snapshot | None = None

    @property
    def stands(self) -> bool:
        """Is the interval still the one that was opened, not dropped or thinned since?"""
        return self._inode != 0 and _inode(self.directory) == self._inode

    def keeps_gone(self) -> bool:
        """Is the index that is open here another one than its name leads to?"""
        return self._file is not None and _inode(self._file.path) != self._file.inode

    def begin(self) -> None:
        """Look at the index as it is now."""
        if self._snapshot is None and self._file is not None:
            self._snapshot = self._file.snapshot()

    def end(self) -> None:
        """Let go of the index until the next request."""
        if self._snapshot is not None and not self._keep:
            self._snapshot.close()
            self._snapshot = None

    def data(self, segment: int, seq: int) -> str:
        """Path of a segment's data file; the interval is known, whatever the seq."""
        path = self._data.get(segment)
        if path is None:
            path = self._data[segment] = str(data_path(self.directory, segment))
        return path

    def catch_up(self, journal: Journal, seq: int) -> bool:
        """Fold what the index lacks of the records up to `seq`. Is any of the interval indexed? CorruptError."""
        self.begin()
        indexed = self.indexed
        self.end()
        first_seq = journal.first_reader(self.interval).first_seq
        upto = min(seq, journal.last_reader(self.interval).last_seq)
        if indexed < upto:
            after = max(indexed, first_seq - 1)
            self.tail = Tail(after)
            for run in journal.runs(after, upto):
                if run.interval == self.interval:
                    self.tail.add(run)
            self.tail.upto = upto
        return indexed >= first_seq

    @property
    def indexed(self) -> int:
        """Seq up to which the index reaches. Between `begin` and `end`."""
        return self._snapshot.indexed if self._snapshot is not None else 0

    def newest(self, block: int, seq: int) -> tuple[int, int] | None:
        """(seq, value) of one block, or None where this interval did not write it."""
        best: tuple[int, int] | None = None
        tail, snapshot = self.tail, self._snapshot
        tail_levels = tail.levels if tail is not None else 0
        index_levels = snapshot.levels if snapshot is not None else 0
        for level, shift in LEVELS_OF[(tail_levels | index_levels) % len(LEVELS_OF)]:
            unit = level << LEVEL_BITS | block >> shift
            found = None
            if tail_levels >> level & 1:
                found = tail.newest.get(unit)  # type: ignore[union-attr]
            if found is None and index_levels >> level & 1:
                found = snapshot.newest(unit, seq)  # type: ignore[union-attr]
            if found is not None and (best is None or found[0] > best[0]):
                best = (found[0], advance(found[1], block & (1 << shift) - 1))
        return best

    def resolve(self, first: int, end: int, seq: int) -> list[Piece]:
        """What this interval holds for blocks [first, end) at `seq`, in order and without holes."""
        if end - first == 1:
            found = self.newest(first, seq)
            return [(first, end, *found)] if found else [(first, end, NOTHING, 0)]
        over: list[Piece] = [(first, end, NOTHING, 0)]
        for level in DOWNWARDS:
            shift = SHIFTS[level]
            pieces = self._level(level, first >> shift, (end - 1 >> shift) + 1, seq)
            if pieces:
                over = lay(over, [(at << shift, at + 1 << shift, s, value) for at, s, value in pieces])
        return over

    def _level(self, level: int, first: int, end: int, seq: int) -> list[tuple[int, int, int]]:
        snapshot, tail = self._snapshot, self.tail
        indexed = []
        if snapshot is not None and snapshot.levels >> level & 1:
            indexed = snapshot.pieces(level, first, end, seq)
        newer = tail.pieces(level, first, end) if tail is not None else []
        if not newer:
            return indexed
        if not indexed:
            return newer
        merged = {piece[0]: piece for piece in indexed}
        merged.update((piece[0], piece) for piece in newer)
        return sorted(merged.values())

    def close(self) -> None:
        """Give the environment back."""
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None
        if self._file is not None:
            release(self._file)
            self._file = None


def _inode(path: Path) -> int:
    """0 if there is none."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def lay(under: list[Piece], pieces: list[Piece]) -> list[Piece]:
    """Lay ascending, disjoint `pieces` over `under`, which covers one range without holes; what is as new or newer wins."""
    result: list[Piece] = []
    number = 0
    for start, end, seq, value in under:
        at = start
        while number < len(pieces) and pieces[number][0] < end:
            p_start, p_end, p_seq, p_value = pieces[number]
            low, high = max(p_start, at), min(p_end, end)
            if p_seq >= seq and low < high:
                if at < low:
                    result.append((at, low, seq, advance(value, at - start)))
                result.append((low, high, p_seq, advance(p_value, low - p_start)))
                at = high
            if p_end > end:
                break
            number += 1
        if at < end:
            result.append((at, end, seq, advance(value, at - start)))
    return result
