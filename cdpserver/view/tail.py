"""The un-indexed tail: records after the indexed seq, folded so that a lookup costs what the index costs.

The same aligned pieces as in the index, newest only, in a dictionary. Bounded by `limits.TAIL_RECORDS` as long as
an indexer runs; without one it costs reading speed, never truth.
"""

from sortedcontainers import SortedKeyList

from cdpserver.index.pieces import KIND_BITS, LEVEL_BITS, SEGMENT_BITS, record_pieces
from cdpserver.journal.log import Run
from cdpserver.journal.record import CHANGES, Kind
from cdpserver.limits import BLOCK, SECTOR

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
        newest, segment = self.newest, run.reader.segment
        self._sorted = None
        base = Kind.DATA << KIND_BITS | segment << SEGMENT_BITS
        per_block = BLOCK // SECTOR
        for kind, length, seq, offset, place in zip(
            changes["kind"].tolist(),
            changes["length"].tolist(),
            changes["seq"].tolist(),
            changes["offset"].tolist(),
            changes["place"].tolist(),
            strict=True,
        ):
            if kind == Kind.DATA and length <= per_block:
                newest[offset >> 12] = (seq, base | place >> 12)
                self.levels |= 1
            else:
                blocks = -(-length // per_block)
                for unit, value in record_pieces(kind, offset >> 12, blocks, segment, place):
                    newest[unit] = (seq, value)
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
