"""A write that does not begin and end with blocks: what surrounds it in its first and last block is read and written with it.

    payload           |.......|
    blocks      |-----+---|---+-----|      the first and the last are read, and verified; none between them is

What is kept gets a digest of its own, so none of it may have rotted: then the write is refused. One of the whole block is not,
and ends it.
"""

from cdpserver.journal.resync import Reads
from cdpserver.limits import BLOCK


def whole_blocks(reads: Reads, payload: memoryview, offset: int, size: int) -> tuple[int, bytearray]:
    """(where they begin, content) of the blocks that a payload touches, on a disk of `size` bytes. CorruptError."""
    stop = offset + len(payload)
    first, end = offset // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, size)
    whole = bytearray(end - first)
    for at in dict.fromkeys((first, (end - 1) // BLOCK * BLOCK)):
        high = min(at + BLOCK, end)
        if at < offset or high > stop:
            whole[at - first : high - first] = reads.verified(at, high - at)
    whole[offset - first : stop - first] = payload
    return first, whole
