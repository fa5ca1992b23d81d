"""A partition or logical volume of a view: parts of the disk, one after the other.

Invariants: the parts lie inside the disk and leave nothing out; whoever makes one has checked that.
Threads: none, as the view below.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from cdpserver.view.view import View

Part: TypeAlias = tuple[int, int, int]
"""(start, end, place): bytes [start, end) of the volume are on the disk from `place` on."""


class VolumeView:
    """What a view has, of a volume in it. Closing it closes the view."""

    def __init__(self, view: View, parts: Sequence[Part]) -> None:
        self.view = view
        self.size = parts[-1][1] if parts else 0
        self._parts = parts
        self._starts = [start for start, _, _ in parts]

    def split(self, offset: int, end: int) -> Iterator[Part]:
        """The parts of [offset, end), which is inside the volume."""
        number = bisect_right(self._starts, offset) - 1
        while offset < end:
            start, stop, place = self._parts[number]
            low, offset = offset, min(stop, end)
            yield low, offset, place + low - start
            number += 1

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on."""
        target = memoryview(buffer)
        for start, end, place in self.split(offset, offset + len(target)):
            self.view.read_into(target[start - offset : end - offset], place)

    def status(self, offset: int, end: int, *, one: bool) -> list[tuple[int, int, bool]]:
        """(start, end, zero) runs from `offset` on, as the disk has them: some, or the first `one`."""
        start, stop, place = next(self.split(offset, end))
        runs = self.view.status(place, place + stop - start, one=one)
        return [(low - place + start, high - place + start, zero) for low, high, zero in runs]

    def close(self) -> None:
        """Close the view."""
        self.view.close()
