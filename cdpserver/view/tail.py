"""The un-indexed tail: records after the indexed seq, folded so that a lookup costs what the index costs.

The same aligned pieces as in the index, newest only, in a dictionary. Bounded by `limits.TAIL_RECORDS` as long as
an indexer runs; without one it costs reading speed, never truth.
"""

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedKeyList

from cdpserver.index.pieces import KIND_BITS, LEVEL_BITS, SEGMENT_BITS, record_pieces
from cdpserver.journal.log import Run
from cdpserver.journal.record import CHANGES, Kind
from cdpserver.limits import BLOCK, SECTOR

PER_BLOCK = BLOCK // SECTOR

FEW = 1024
"""Up to this many blocks a range is looked up one by one; above, through the sorted units."""


class Tail:
    """Newest pieces of the records of one interval after some seq."""

    __slots__ = ("_sorted", "levels", "newest", "upto")

    def __init__(self, upto: int) -> None:
        self.upto = upto
        self.newest: dict[int, tuple[int, int]] = {}
        self.levels = 0
        self._sorted: SortedKeyList[int] | None = None

    def __len__(self) -> int:
        return len(self.newest)

    def add(self, run: Run) -> None:
        """Fold in the records that follow."""
        records = run.records
        self.upto = int(records["seq"][-1])
        changes = records[(records["kind"] >= CHANGES[0]) & (records["kind"] <= CHANGES[-1])]
        self._sorted = None
        segment = run.reader.segment
        single = (changes["kind"] == Kind.DATA) & (changes["length"] <= PER_BLOCK)
        # Runs of one-block writes, the usual tail, go in at C's speed; what lies between keeps its place in the order.
        edges = np.flatnonzero(single[1:] != single[:-1]) + 1
        for part in np.split(changes, edges) if len(changes) else ():
            if part["kind"][0] == Kind.DATA and part["length"][0] <= PER_BLOCK:
                self._add_blocks(part, segment)
            else:
                self._add_extents(part, segment)

    def _add_blocks(self, part: npt.NDArray[np.void], segment: int) -> None:
        units = part["offset"] >> np.uint64(12)
        base = np.uint64(Kind.DATA << KIND_BITS | segment << SEGMENT_BITS)
        values = (part["place"] >> np.uint64(12)) | base
        pairs = zip(part["seq"].tolist(), values.tolist(), strict=True)
        self.newest.update(zip(units.tolist(), pairs, strict=True))
        self.levels |= 1

    def _add_extents(self, part: npt.NDArray[np.void], segment: int) -> None:
        for record in part:
            kind, seq, place = int(record["kind"]), int(record["seq"]), int(record["place"])
            first, blocks = int(record["offset"]) >> 12, -(-int(record["length"]) // PER_BLOCK)
            for unit, value in record_pieces(kind, first, blocks, segment, place):
                self.newest[unit] = (seq, value)
                self.levels |= 1 << (unit >> LEVEL_BITS)

    def pieces(self, level: int, first: int, end: int) -> list[tuple[int, int, int]]:
        """(block number at the level, seq, value) of blocks [first, end), ascending."""
        if not self.levels >> level & 1:
            return []
        top = level << LEVEL_BITS
        newest = self.newest
        if end - first <= FEW:
            units = [unit for unit in range(top | first, top + end) if unit in newest]
        else:
            if self._sorted is None:
                self._sorted = SortedKeyList(newest, key=int)
            units = list(self._sorted.irange_key(top | first, top + end - 1))
        return [(unit - top, *newest[unit]) for unit in units]
