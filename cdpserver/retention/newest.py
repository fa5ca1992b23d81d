"""Of records that came between two instants: which parts of which are what the later instant shows. Pure.

    seq   9           [------]
          8     [-----------]          newest:  8 8 8 9 9 9 9 7
          7     [--]            [-]

Cost: O(n log n) for n records; records of one block, the usual ones, at numpy's speed.
"""

from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from cdpserver.limits import BLOCK

PARTS = np.dtype(
    [("seq", "<u8"), ("start", "<i8"), ("end", "<i8"), ("segment", "<u4"), ("number", "<u4"), ("kind", "u1")]
)
"""A part [start, end) of record number `number` of a segment; bytes of the disk."""


def newest(parts: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """What is left of `parts` (dtype PARTS) when each lies over those of lower seq; by ascending (seq, start)."""
    single = parts["end"] - parts["start"] <= BLOCK
    small = parts[single]
    small = small[np.lexsort((small["seq"], small["start"]))]
    if len(small):
        small = small[np.append(small["start"][1:] != small["start"][:-1], True)]
    left = small if bool(single.all()) else _sweep(np.concatenate((small, parts[~single])))
    return left[np.lexsort((left["start"], left["seq"]))]


def _sweep(parts: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    order = np.argsort(parts["start"], kind="stable")
    starts, ends, seqs = (parts[order][name].tolist() for name in ("start", "end", "seq"))
    covering: list[tuple[int, int]] = []
    found: list[tuple[int, int, int]] = []
    number = at = 0
    while number < len(starts) or covering:
        if not covering:
            at = starts[number]
        while number < len(starts) and starts[number] <= at:
            heappush(covering, (-seqs[number], number))
            number += 1
        while covering and ends[covering[0][1]] <= at:
            heappop(covering)
        if not covering:
            continue
        top = covering[0][1]
        stop = min(ends[top], starts[number]) if number < len(starts) else ends[top]
        if found and found[-1][0] == top and found[-1][2] == at:
            found[-1] = (top, found[-1][1], stop)
        else:
            found.append((top, at, stop))
        at = stop
    numbers = np.array([top for top, _, _ in found], dtype=np.int64)
    left = parts[order][numbers]
    left["start"] = [start for _, start, _ in found]
    left["end"] = [end for _, _, end in found]
    return left
