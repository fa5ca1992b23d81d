"""What an interval holds at its end, from its closed index: of every piece the newest, and none that a newer one hides.

Goes through the index a GiB of the disk at a time, all levels side by side: what can hide a piece lies in the same GiB. So
memory is bounded by the blocks of a GiB, however often they were written.
"""

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import TypeAlias

import lmdb
import numpy as np
import numpy.typing as npt

from cdpserver.index.merged import LEVEL_SHIFT, PLACE_SHIFT, REGION_SHIFT, Entries, Words
from cdpserver.index.pieces import LEVEL_BITS, SHIFTS
from cdpserver.index.store import IndexFile

CHUNK = 65_536
"""Rows read at a time."""

KEY_BYTES = 14

Level: TypeAlias = tuple[Words, Words, Words]
"""(number of the piece in units of its level, seq, value), ascending, one row a piece."""

NONE: Level = (np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint64))


def fold(index: IndexFile) -> Iterator[Entries]:
    """(places, values), ascending: the content at the end of the interval. See `merged` for places."""
    with index.env.begin() as txn:
        streams = [_regions(index, txn, level) for level in range(len(SHIFTS))]
        heads = [next(stream, None) for stream in streams]
        while any(head is not None for head in heads):
            region = min(head[0] for head in heads if head is not None)
            rows = [NONE] * len(SHIFTS)
            for level, head in enumerate(heads):
                if head is not None and head[0] == region:
                    rows[level] = head[1]
                    heads[level] = next(streams[level], None)
            yield _lay(region, rows)


def _lay(region: int, rows: list[Level]) -> Entries:
    places, values = [], []
    for level, (numbers, seqs, held) in enumerate(rows):
        shown = np.ones(len(numbers), np.bool_)
        for above in range(level + 1, len(SHIFTS)):
            greater = rows[above]
            if len(greater[0]) and len(numbers):
                shown &= ~_hidden(numbers >> np.uint64(SHIFTS[above] - SHIFTS[level]), seqs, greater)
        inside = numbers[shown] & np.uint64((1 << REGION_SHIFT - SHIFTS[level]) - 1)
        places.append(inside | np.uint64(region << PLACE_SHIFT | level << LEVEL_SHIFT))
        values.append(held[shown])
    return np.concatenate(places), np.concatenate(values)


def _hidden(parents: Words, seqs: Words, greater: Level) -> npt.NDArray[np.bool_]:
    """Which pieces lie in a newer one of `greater`."""
    numbers, newer, _ = greater
    at = np.minimum(np.searchsorted(numbers, parents), len(numbers) - 1)
    found: npt.NDArray[np.bool_] = (numbers[at] == parents) & (newer[at] > seqs)
    return found


def _regions(index: IndexFile, txn: lmdb.Transaction, level: int) -> Iterator[tuple[int, Level]]:
    """(number of the GiB, its pieces) of one level, ascending."""
    shift = np.uint64(REGION_SHIFT - SHIFTS[level])
    left = NONE
    for rows in _rows(index, txn, level):
        left = _newest(*(np.concatenate(pair) for pair in zip(left, rows, strict=True)))
        if not len(left[0]):
            continue
        regions = left[0] >> shift
        edges = [0, *(np.flatnonzero(regions[1:] != regions[:-1]) + 1).tolist()]
        # The last one may go on.
        for low, high in pairwise(edges):
            yield int(regions[low]), (left[0][low:high], left[1][low:high], left[2][low:high])
        left = (left[0][edges[-1] :], left[1][edges[-1] :], left[2][edges[-1] :])
    if len(left[0]):
        yield int(left[0][0] >> shift), left


def _newest(numbers: Words, seqs: Words, values: Words) -> Level:
    last = np.ones(len(numbers), np.bool_)
    last[:-1] = numbers[1:] != numbers[:-1]
    return numbers[last], seqs[last], values[last]


def _rows(index: IndexFile, txn: lmdb.Transaction, level: int) -> Iterator[Level]:
    cursor = txn.cursor(db=index.pieces)
    if not cursor.set_range(bytes([level])):
        return
    items = cursor.iternext()
    while chunk := list(islice(items, CHUNK)):
        raw = np.frombuffer(b"".join(key for key, _ in chunk), np.uint8).reshape(-1, KEY_BYTES)
        keys = np.zeros((len(chunk), 16), np.uint8)
        keys[:, 2:] = raw
        columns = keys.view(">u8").astype(np.uint64)
        values = np.frombuffer(b"".join(value for _, value in chunk), "<u8").astype(np.uint64)
        here = columns[:, 0] >> np.uint64(LEVEL_BITS) == level
        numbers = columns[:, 0] & np.uint64((1 << LEVEL_BITS) - 1)
        yield numbers[here], columns[:, 1][here], values[here]
        if not here[-1]:
            return
