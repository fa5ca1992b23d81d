"""Aligned pieces: how an extent is stored in the index, whatever its size.

    level   0       1        2       3        4
    span    4 KiB   64 KiB   1 MiB   32 MiB   1 GiB

A record is split into its few greatest aligned pieces. A piece's unit is `level << 40 | block number in units of the
level`; its value says where the content is: `kind << 61 | rest`.
"""

from cdpserver.journal.record import Kind

SHIFTS = (0, 4, 8, 13, 18)
"""Blocks (4 KiB) in a piece of each level, as a power of two: QEMU copies 1 MiB and zeroes 32 MiB at a time."""

DOWNWARDS = tuple(reversed(range(len(SHIFTS))))
"""Levels from the greatest pieces to the smallest."""

LEVEL_BITS = 40
KIND_BITS = 61
REST_MASK = (1 << KIND_BITS) - 1
SEGMENT_BITS = 32
BLOCK_MASK = (1 << SEGMENT_BITS) - 1


def split(first: int, end: int) -> list[tuple[int, int]]:
    """Pieces of the blocks [first, end): (unit, first block of the piece)."""
    pieces = []
    while first < end:
        for level in DOWNWARDS:
            span = 1 << SHIFTS[level]
            if first & (span - 1) == 0 and first + span <= end:
                break
        pieces.append((level << LEVEL_BITS | first >> SHIFTS[level], first))
        first += span
    return pieces


def data_value(segment: int, place_block: int) -> int:
    """Content at a 4 KiB block of a segment's data file."""
    return Kind.DATA << KIND_BITS | segment << SEGMENT_BITS | place_block


def same_value(ref: int) -> int:
    """Content as it was at seq `ref`."""
    return Kind.SAME << KIND_BITS | ref


def flat_value(kind: int) -> int:
    """Zero or trim."""
    return kind << KIND_BITS


def record_pieces(
    kind: int, offset_block: int, blocks: int, segment: int, place: int
) -> list[tuple[int, int]]:
    """(unit, value) of every piece of one record; `place` as in the record (bytes, or a seq for *same*)."""
    if kind == Kind.DATA:
        base = data_value(segment, place >> 12)
        if blocks == 1:
            return [(offset_block, base)]
        return [(unit, base + at - offset_block) for unit, at in split(offset_block, offset_block + blocks)]
    value = same_value(place) if kind == Kind.SAME else flat_value(kind)
    return [(unit, value) for unit, _ in split(offset_block, offset_block + blocks)]
