"""Extents of a view and the files that they point into.

An extent is `(start, end, path, place)`: bytes [start, end) of the disk are at `place` in the file `path`, or of the reader
that is known by that name, or read as zeros when `path` is None.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol, TypeAlias

from cdpserver.errors import CorruptError
from cdpserver.limits import BLOCK
from cdpserver.view.verified import Verifier, Verifies

Extent: TypeAlias = tuple[int, int, str | None, int]

OPEN_FILES = 256
"""Data files kept open per view: a day's intervals, and some more. Fewer where the process may not open more."""


def coalesce(extents: Iterable[Extent]) -> list[Extent]:
    """Merge neighbours that go on in the same file, and neighbouring zeros."""
    merged: list[Extent] = []
    for extent in extents:
        start, end, path, place = extent
        if merged:
            before = merged[-1]
            goes_on = path is None or before[3] + before[1] - before[0] == place
            if before[1] == start and before[2] == path and goes_on:
                merged[-1] = (before[0], end, path, before[3])
                continue
        merged.append(extent)
    return merged


class Reader(Protocol):
    """Content that is in no file of its own, such as a disk of a backup."""

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on."""


class Files:
    """A few open files, least recently used closed first. Not thread-safe: one per view."""

    def __init__(self, *, verify: bool = False) -> None:
        """With `verify` what is read of them is verified."""
        self.verifier: Verifies | None = Verifier() if verify else None
        self._fds: OrderedDict[str, int] = OrderedDict()
        self._kept: dict[str, int] = {}
        self.readers: dict[str, Reader] = {}
        """By the name that extents have for a path."""

    def fd(self, path: str) -> int:
        """The open file."""
        fd = self._fds.get(path)
        if fd is None:
            if path in self._kept:
                return self._kept[path]
            fd = self._open(path)
            if len(self._fds) >= OPEN_FILES:
                self._close_oldest()
            self._fds[path] = fd
        else:
            self._fds.move_to_end(path)
        return fd

    def _open(self, path: str) -> int:
        while True:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise CorruptError(f"{path} is missing", hint="cdp check says what it touches") from None
            except OSError as error:
                if error.errno != errno.EMFILE or not self._fds:
                    raise
                self._close_oldest()

    def _close_oldest(self) -> None:
        os.close(self._fds.popitem(last=False)[1])

    def keep(self, key: str, fd: int) -> None:
        """Take over an open file that may have lost its name: it stays open, and is found as `key`."""
        if key in self._kept:
            os.close(fd)
        else:
            self._kept[key] = fd

    def keeps_gone(self) -> bool:
        """Is one of them in no directory any more?"""
        return any(os.fstat(fd).st_nlink == 0 for fd in (*self._fds.values(), *self._kept.values()))

    def close(self) -> None:
        """Close all."""
        while self._kept:
            os.close(self._kept.popitem()[1])
        while self._fds:
            os.close(self._fds.popitem()[1])


def fill(fd: int, part: memoryview, place: int, path: str) -> None:
    """Read exactly len(part) bytes; a payload that ends at the end of its file is padded with zeros."""
    done = os.preadv(fd, [part], place)
    while 0 < done < len(part):
        more = os.preadv(fd, [part[done:]], place + done)
        if more == 0:
            break
        done += more
    if done < len(part):
        if -(-os.fstat(fd).st_size // BLOCK) * BLOCK < place + len(part):
            raise CorruptError(
                f"{path.partition('#')[0]} ends before {place + len(part)}",
                hint="cdp check says what is missing",
            )
        part[done:] = bytes(len(part) - done)


def raw_extents(fd: int, path: str, offset: int, end: int, *, least: int, holes: bool) -> list[Extent]:
    """Where bytes [offset, end) of a disk are in its raw file, which has `least` bytes; beyond its end are zeros.

    With `holes`, its holes come out as zeros.
    """
    held = os.fstat(fd).st_size
    if held < least:
        # Never zeros where data was.
        raise CorruptError(f"{path} is cut short to {held} bytes", hint="cdp check says what it touches")
    stop = min(end, held)
    extents: list[Extent] = []
    at = offset
    while at < stop:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA) if holes else at
        except OSError:  # ENXIO: no data from here to the end of the file
            data = stop
        data = min(data, stop)
        if data > at:
            extents.append((at, data, None, 0))
        if data < stop:
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), stop) if holes else stop
            extents.append((data, hole, path, data))
            at = hole
        else:
            at = stop
    if at < end:
        extents.append((at, end, None, 0))
    return extents
