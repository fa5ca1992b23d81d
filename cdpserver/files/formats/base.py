"""What a file system is to its reader: nodes, their entries, what is known of them, and where their content lies.

Every name, target and value is bytes, as the file system holds it. What a parser raises on damaged structures may be any
exception; who calls turns it into CorruptError. Iterators yield as they go: a directory may have a billion entries.
"""

import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from cdpserver.files.source import Reader, Stream

FILE_SYSTEMS = ("ext", "xfs", "btrfs", "ntfs", "fat", "exfat")
"""The kinds that are read."""

HOLE = -1
"""Instead of a place: zeros."""

OPAQUE = -2
"""Instead of a place: content that only the parser can give (compressed, or inside metadata)."""

MAX_TARGET = 64 << 10
"""Longest symlink target; Linux has 4096."""

Node: TypeAlias = Any
"""What a parser knows a file by."""

Run: TypeAlias = tuple[int, int, int]
"""(start, end, place in the volume, HOLE or OPAQUE)."""

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


@dataclass(frozen=True, slots=True)
class Stat:
    """What is known of a file. `mode` is of 12 bits; `id` tells hard links from each other."""

    type: str
    size: int
    mtime_ns: int
    atime_ns: int
    mode: int
    uid: int
    gid: int
    links: int
    id: int


def stat_of(
    mode: int, *, size: int, mtime_ns: int, atime_ns: int, uid: int, gid: int, links: int, id: int
) -> Stat:
    """With the type out of a Unix mode."""
    kind = TYPES.get(stat.S_IFMT(mode), "unknown")
    return Stat(kind, size, mtime_ns, atime_ns, stat.S_IMODE(mode), uid, gid, links, id)


class FileSystem(ABC):
    """A file system, opened."""

    kind: str
    ignores_case = False

    def __init__(self, reader: Reader) -> None:
        """Any exception if it is none of this kind, or damaged."""
        self.reader = reader
        self.stream = Stream(reader)
        self.remarks: list[str] = []

    @abstractmethod
    def root(self) -> Node:
        """The topmost directory."""

    @abstractmethod
    def entries(self, node: Node) -> Iterator[tuple[bytes, Node]]:
        """Name and node of everything in a directory, but for `.` and `..`."""

    @abstractmethod
    def stat(self, node: Node) -> Stat:
        """What is known of it."""

    @abstractmethod
    def target(self, node: Node) -> bytes:
        """What a symlink says."""

    @abstractmethod
    def runs(self, node: Node) -> Iterator[Run]:
        """Where a file's content lies: in order, without gaps, from 0 to its size."""

    def begins(self, node: Node) -> bool:
        """Is this directory the top of a tree that may well have several names?"""
        return False

    def read(self, node: Node, offset: int, length: int) -> bytes:
        """Content of an OPAQUE run, at most up to its end."""
        raise NotImplementedError(f"{self.kind} has no content of its own")

    def xattrs(self, node: Node) -> dict[str, bytes]:
        """Extended attributes as Linux names them."""
        return {}

    def content(self, node: Node, most: int) -> bytes:
        """The first `most` bytes of a file, or of whatever has runs."""
        found = bytearray()
        for start, end, place in self.runs(node):
            if start >= most:
                break
            length = min(end, most) - start
            if place == HOLE:
                found += bytes(length)
            elif place == OPAQUE:
                found += self.read(node, start, length)
            else:
                found += self.reader.read(place, length)
        return bytes(found)


def clip(runs: Iterator[Run], size: int) -> Iterator[Run]:
    """The same runs up to `size`, without gaps and overlaps, neighbours joined: what lies between is a hole."""
    last: Run | None = None
    for start, end, place in _filled(runs, size):
        if last is not None:
            joined = place == last[2] == HOLE or (
                place >= 0 <= last[2] and place == last[2] + start - last[0]
            )
            if joined:
                last = (last[0], end, last[2])
                continue
            yield last
        last = (start, end, place)
    if last is not None:
        yield last


def _filled(runs: Iterator[Run], size: int) -> Iterator[Run]:
    at = 0
    for start, end, place in runs:
        if at >= size:
            return
        low, high = max(start, at), min(end, size)
        if high <= low:
            continue
        if low > at:
            yield at, low, HOLE
        yield low, high, place if place < 0 else place + low - start
        at = high
    if at < size:
        yield at, size, HOLE
