"""Reading an image back, as stock QEMU serves it, and comparing it with the journal.

Requests are in flight while others are compared: a base point of many small pieces would else wait for a server's answer with
each, which takes longer than all the rest.
"""

from collections import deque
from typing import Any

import nbd
import numpy as np

from cdpserver.errors import BrokenError, CorruptError
from cdpserver.progress import Progress, nobody
from cdpserver.view.delta import Delta

STEP = 1 << 20
"""Longest read."""

IN_FLIGHT = 16
"""Reads under way at once; each has a buffer of STEP bytes."""

WORD = np.dtype(np.uint64)
"""What is compared at a time: disks end with a sector."""

STATUS_BYTES = 1 << 30
"""Zeros checked by block status at a time, so that a zeroed terabyte is not read."""


def compare(uri: str, delta: Delta, progress: Progress = nobody, *, apart: bool = False) -> None:
    """CorruptError unless the image served at `uri` holds what the newer instant of `delta` holds where they differ.

    With `apart` each of its ranges has been compared before the next is asked for.
    """
    image = nbd.NBD()
    try:
        image.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        image.connect_uri(uri)
        if image.get_size() != delta.size:
            raise CorruptError(f"the new base point has {image.get_size()} bytes, the disk {delta.size}")
        reads = _Reads(image, delta)
        for start, end in delta.ranges:
            _compare_range(image, reads, start, end)
            if apart:
                reads.finish()
            progress(end / delta.size)
        reads.finish()
        image.shutdown()
    except nbd.Error as error:
        raise BrokenError(
            f"reading the new base point back failed: {error}", hint="it is written anew"
        ) from None


class _Reads:
    """Reads of the image, compared in their order when they are there.

    All go into the same buffers: fresh ones would be faulted in page by page, which takes longer than to compare them.
    """

    def __init__(self, image: Any, delta: Delta) -> None:
        self._image = image
        self.delta = delta
        self._free = [memoryview(bytearray(STEP)) for _ in range(IN_FLIGHT)]
        self._wanted = memoryview(bytearray(STEP))
        self._under_way: deque[tuple[int, int, int, memoryview]] = deque()

    def want(self, start: int, end: int) -> None:
        """[start, end) is to be compared. CorruptError for something that was wanted before."""
        for at in range(start, end, STEP):
            if not self._free:
                self._settle()
            buffer, length = self._free.pop(), min(STEP, end - at)
            cookie = self._image.aio_pread(nbd.Buffer.from_buffer(buffer[:length]), at)
            self._under_way.append((cookie, at, length, buffer))

    def finish(self) -> None:
        """Everything that was wanted has been compared on return."""
        while self._under_way:
            self._settle()

    def _settle(self) -> None:
        cookie, at, length, buffer = self._under_way.popleft()
        while not self._image.aio_command_completed(cookie):
            self._image.poll(-1)
        wanted = self._wanted[:length]
        self.delta.new.read_into(wanted, at)
        if not np.array_equal(np.frombuffer(buffer[:length], WORD), np.frombuffer(wanted, WORD)):
            raise _differs(at, at + length)
        self._free.append(buffer)


def _compare_range(image: Any, reads: _Reads, start: int, end: int) -> None:
    at = start
    while at < end:
        low, high, zero = reads.delta.new.status(at, end, one=True)[0]
        assert low == at
        if zero:
            _compare_zeros(image, at, min(high, end))
        else:
            reads.want(at, min(high, end))
        at = high


def _compare_zeros(image: Any, start: int, end: int) -> None:
    at = start
    while at < end:
        entries: list[int] = []

        def keep(
            _context: str, _offset: int, found: list[int], _error: int, into: list[int] = entries
        ) -> int:
            into.extend(found)
            return 0

        image.block_status(min(end - at, STATUS_BYTES), at, keep)
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            stop = min(at + length, end)
            while at < stop and not flags & nbd.STATE_ZERO:
                step = min(STEP, stop - at)
                if image.pread(step, at).strip(b"\0"):
                    raise _differs(at, at + step)
                at += step
            at = stop


def _differs(start: int, end: int) -> CorruptError:
    return CorruptError(
        f"the new base point differs from the journal in bytes {start} to {end}",
        hint="it is thrown away and written anew; if this goes on, run: cdp check DISK",
    )
