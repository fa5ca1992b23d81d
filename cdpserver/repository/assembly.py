"""Chunks that arrive in pieces, in any order: gathered until they are whole.

    pieces  | 3 |   | 1 | 2 |      one chunk, whose second quarter is missing yet

QEMU's backup job sends a disk in ascending order, and between that what the guest is about to overwrite, wherever it is. So a few
chunks are begun at the front, and as many behind it as the guest writes to. What of these does not fit in memory waits in a
temporary file: it is what a guest overwrites during a backup, never the disk.

Threads: one at a time; the caller has a lock.
"""

import os
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import BinaryIO

from cdpserver.errors import UsageError
from cdpserver.journal.firstcopy import punch_hole

UNIT = 512
"""Pieces begin and end at multiples of it."""

MEMORY_BYTES = 64 << 20
"""Of chunks that are not whole; others wait in the file."""


@dataclass(slots=True)
class _Begun:
    """A chunk that is not whole: which units have come, and their bytes, or None if these are in the file."""

    length: int
    content: bytearray | None
    come: int = 0
    held: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)
    """Where in the chunk there is data; the rest is zeros."""


class Assembly:
    """The chunks of one disk. `close` at the end."""

    def __init__(self, size: int, step: int, *, memory: int = MEMORY_BYTES) -> None:
        """UsageError for a size that is no multiple of UNIT."""
        if size % UNIT:
            raise UsageError(
                f"a disk of {size} bytes cannot be sent: that is no multiple of {UNIT}",
                hint="QEMU rounds sizes up",
            )
        self._size, self._step, self._memory = size, step, memory
        self._begun: OrderedDict[int, _Begun] = OrderedDict()
        self._file: BinaryIO | None = None
        self.held = 0
        """Bytes in memory."""

    @property
    def unfinished(self) -> int:
        """How many chunks are begun and not whole."""
        return len(self._begun)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> list[tuple[int, bytearray]]:
        """Take a piece; (number, content) of the chunks that are whole by it. OSError if the file cannot take one."""
        whole = []
        view = memoryview(data)
        for chunk, low, high in self._parts(offset, len(view)):
            at = chunk * self._step + low - offset
            one = self._of(chunk)
            self._put(chunk, one, low, view[at : at + high - low])
            if (content := self._whole(chunk, one, low, high)) is not None:
                whole.append((chunk, content))
        self._spill()
        return whole

    def zero(self, offset: int, length: int) -> list[tuple[int, bytearray | None]]:
        """The same for zeros; None stands for a chunk of nothing else."""
        whole: list[tuple[int, bytearray | None]] = []
        for chunk, low, high in self._parts(offset, length):
            if high - low == self._length(chunk) and chunk not in self._begun:
                whole.append((chunk, None))
                continue
            one = self._of(chunk)
            if one.come & _units(low, high):  # what came before is overwritten
                self._put(chunk, one, low, memoryview(bytes(high - low)))
            if (content := self._whole(chunk, one, low, high)) is not None:
                whole.append((chunk, content if one.pieces else None))
        return whole

    def _parts(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """(chunk, start and end in it) of a range of the disk."""
        assert offset % UNIT == 0 and length % UNIT == 0 and offset + length <= self._size
        found = []
        while length:
            chunk, low = divmod(offset, self._step)
            high = min(low + length, self._step)
            found.append((chunk, low, high))
            offset, length = offset + high - low, length - (high - low)
        return found

    def _length(self, chunk: int) -> int:
        return min(self._step, self._size - chunk * self._step)

    def _of(self, chunk: int) -> _Begun:
        if chunk not in self._begun:
            length = self._length(chunk)
            self._begun[chunk] = _Begun(length, bytearray(length))
        self._begun.move_to_end(chunk)
        return self._begun[chunk]

    def _put(self, chunk: int, one: _Begun, low: int, data: memoryview) -> None:
        one.pieces.append((low, low + len(data)))
        if one.content is None:
            self._store(chunk, low, data)
            return
        one.content[low : low + len(data)] = data
        one.held += len(data)
        self.held += len(data)

    def _whole(self, chunk: int, one: _Begun, low: int, high: int) -> bytearray | None:
        one.come |= _units(low, high)
        if one.come != _units(0, one.length):
            return None
        del self._begun[chunk]
        self.held -= one.held
        return one.content if one.content is not None else self._load(chunk, one)

    # -- the file

    def _spill(self) -> None:
        """What was touched longest ago goes to the file."""
        for chunk, one in list(self._begun.items()):
            if self.held <= self._memory:
                return
            if one.content is not None:
                for low, high in one.pieces:
                    self._store(chunk, low, memoryview(one.content)[low:high])
                self.held -= one.held
                one.content, one.held = None, 0

    def _store(self, chunk: int, low: int, data: memoryview) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by `close`
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], chunk * self._step + low + done)

    def _load(self, chunk: int, one: _Begun) -> bytearray:
        assert self._file is not None
        content = bytearray(one.length)
        fd, start = self._file.fileno(), chunk * self._step
        for low, high in one.pieces:
            part = memoryview(content)[low:high]
            while part:
                count = os.preadv(fd, [part], start + high - len(part))
                if not count:
                    raise OSError("the temporary file is shorter than what was written to it")
                part = part[count:]
        punch_hole(fd, start, one.length)
        return content

    def close(self) -> None:
        """Forget everything."""
        self._begun.clear()
        self.held = 0
        if self._file is not None:
            self._file.close()


def _units(low: int, high: int) -> int:
    """The units of a range, a bit each."""
    return ((1 << (high - low) // UNIT) - 1) << low // UNIT
