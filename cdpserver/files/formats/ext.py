"""ext2, ext3 and ext4: superblock, inodes and attributes as dissect reads them; directories and block maps read here.

dissect.extfs takes block 0 for a list of blocks where a sparse file of ext2 has no map, leaves out what inline data has
behind its first 60 bytes, and the last inode of all. What is written here has bounds of its own besides.
"""

import stat
import struct
from collections.abc import Iterator
from typing import Any

from dissect.extfs.extfs import ExtFS

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.files.formats.base import HOLE, MAX_TARGET, OPAQUE, FileSystem, Run, Stat, clip, stat_of
from cdpserver.files.source import Reader

INLINE = 0x10000000
EXTENTS = 0x80000
ENCRYPTED = 0x800
META_BG = 0x10
BIGALLOC = 0x200
JOURNAL_DEVICE = 0x8

MAX_DEPTH = 5
"""Levels of an extent tree; the kernel has no more."""

INITIALISED = 0x8000
"""Blocks of the longest written extent; a longer length means one that was never written, and reads as zeros."""

_ENTRY = struct.Struct("<IHBB")
_HEADER = struct.Struct("<HHHHI")
_EXTENT = struct.Struct("<IHHI")
_INDEX = struct.Struct("<IIHH")


class Ext(FileSystem):
    """One of them; a node is dissect's inode."""

    kind = "ext"

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        superblock = reader.read(1024, 1024)
        if struct.unpack_from("<I", superblock, 100)[0] & BIGALLOC:
            raise RefusedError("ext4 with bigalloc is not supported", hint="mount it: cdp uri DISK@WHEN")
        if struct.unpack_from("<I", superblock, 96)[0] & META_BG:
            raise RefusedError("ext4 with meta_bg is not supported", hint="mount it: cdp uri DISK@WHEN")
        self._fs = ExtFS(self.stream)
        self._block = self._fs.block_size
        self._blocks = self._fs.block_count
        self.kind = {2: "ext2", 3: "ext3", 4: "ext4"}.get(self._fs.type, "ext4")

    def root(self) -> Any:
        """Inode 2."""
        return self._fs.get_inode(2)

    def stat(self, node: Any) -> Stat:
        """Out of the inode."""
        inode = node.inode
        wide = self._fs.sb.s_inode_size > 128
        return stat_of(
            inode.i_mode,
            size=inode.i_size_lo | (inode.i_size_high << 32),
            mtime_ns=_time_ns(inode.i_mtime, inode.i_mtime_extra if wide else 0),
            atime_ns=_time_ns(inode.i_atime, inode.i_atime_extra if wide else 0),
            uid=inode.i_uid | inode.i_uid_high << 16,
            gid=inode.i_gid | inode.i_gid_high << 16,
            links=inode.i_links_count,
            id=node.inum,
        )

    def target(self, node: Any) -> bytes:
        """In the inode, or a block of its own."""
        inode = node.inode
        size = inode.i_size_lo
        if inode.i_flags & ENCRYPTED:
            raise RefusedError("the link is encrypted", hint="mount the file system with its key")
        if size < 60 and not inode.i_flags & INLINE:
            return bytes(inode.i_block[:size])
        return self.content(node, min(size, MAX_TARGET))

    def xattrs(self, node: Any) -> dict[str, bytes]:
        """Of the inode and its block."""
        return {found.name: bytes(found.value) for found in node.xattr if found.name != "system.data"}

    # -- directories

    def entries(self, node: Any) -> Iterator[tuple[bytes, Any]]:
        """Block by block, hash trees too: their inner blocks look like empty ones."""
        if stat.S_IFMT(node.inode.i_mode) != stat.S_IFDIR:
            raise CorruptError("what is named as a directory is none")
        if node.inode.i_flags & INLINE:
            held = self._inline(node)
            yield from self._block_entries(held[4:60])
            yield from self._block_entries(held[60:])
            return
        damaged = 0
        for start, end, place in self.runs(node):
            if place == HOLE:
                continue
            for at in range(place, place + end - start, self._block):
                try:
                    yield from self._block_entries(self.reader.read(at, self._block))
                except CorruptError:
                    damaged += 1
        if damaged:
            raise CorruptError(f"{damaged} blocks of the directory are damaged; there may be more in it")

    def _block_entries(self, block: bytes) -> Iterator[tuple[bytes, Any]]:
        at = 0
        while at + _ENTRY.size <= len(block):
            inum, length, name_length, _ = _ENTRY.unpack_from(block, at)
            if length < _ENTRY.size or at + length > len(block) or name_length > length - _ENTRY.size:
                if length in (0, 0xFFFF) and len(block) == 65536:
                    length = 65536  # as blocks of 64 KiB write it
                else:
                    raise CorruptError("a block of the directory is damaged")
            name = block[at + _ENTRY.size : at + _ENTRY.size + name_length]
            if 0 < inum <= self._fs.sb.s_inodes_count and name not in (b".", b"..") and name:
                yield name, self._fs.get_inode(inum)
            at += length

    # -- content

    def runs(self, node: Any) -> Iterator[Run]:
        """Extents, or the older lists of blocks."""
        inode = node.inode
        size = inode.i_size_lo | (inode.i_size_high << 32)
        if inode.i_flags & ENCRYPTED and stat.S_IFMT(inode.i_mode) == stat.S_IFREG:
            raise RefusedError("the file is encrypted", hint="mount the file system with its key")
        if inode.i_flags & INLINE:
            return iter([(0, size, OPAQUE)] if size else [])
        root = bytes(inode.i_block)
        found = self._extents(root, MAX_DEPTH) if inode.i_flags & EXTENTS else self._lists(root, size)
        return clip(found, size)

    def read(self, node: Any, offset: int, length: int) -> bytes:
        """Inline data."""
        return self._inline(node)[offset : offset + length].ljust(length, b"\0")

    def _inline(self, node: Any) -> bytes:
        rest = next((found.value for found in node.xattr if found.name == "system.data"), b"")
        size = node.inode.i_size_lo
        return (bytes(node.inode.i_block[:60]) + bytes(rest))[:size]

    def _place(self, block: int) -> int:
        if block >= self._blocks:
            raise CorruptError(f"a file refers to block {block} of {self._blocks}")
        return block * int(self._block)

    def _extents(self, node: bytes, depth_left: int) -> Iterator[Run]:
        magic, count, _, depth, _ = _HEADER.unpack_from(node)
        if magic != 0xF30A or depth > depth_left or _HEADER.size + count * 12 > len(node):
            raise CorruptError("the map of a file's blocks is damaged")
        for number in range(count):
            at = _HEADER.size + number * 12
            if depth:
                _, low, high, _ = _INDEX.unpack_from(node, at)
                child = self.reader.read(self._place(high << 32 | low), self._block)
                yield from self._extents(child, depth - 1)
                continue
            logical, length, high, low = _EXTENT.unpack_from(node, at)
            start = logical * self._block
            if length > INITIALISED:
                yield start, start + (length - INITIALISED) * self._block, HOLE
            else:
                place = self._place(high << 32 | low)
                yield start, start + length * self._block, place

    def _lists(self, root: bytes, size: int) -> Iterator[Run]:
        slots = struct.unpack("<15I", root)
        at = 0
        for block in slots[:12]:
            yield at, at + self._block, self._place(block) if block else HOLE
            at += self._block
        for level, block in enumerate(slots[12:], 1):
            span = self._block * (self._block // 4) ** level
            if at < size:
                yield from self._list(block, level, at, size)
            at += span

    def _list(self, block: int, level: int, at: int, size: int) -> Iterator[Run]:
        count = self._block // 4
        span = self._block * count ** (level - 1)
        if not block:
            yield at, at + span * count, HOLE
            return
        for child in struct.unpack(f"<{count}I", self.reader.read(self._place(block), self._block)):
            if at >= size:
                return
            if level == 1:
                yield at, at + span, self._place(child) if child else HOLE
            else:
                yield from self._list(child, level - 1, at, size)
            at += span


def _time_ns(seconds: int, extra: int) -> int:
    # Seconds are signed; the two lowest bits of the rest extend them, 30 bits are nanoseconds.
    signed = seconds - (1 << 32) if seconds >= 1 << 31 else seconds
    return (signed + ((extra & 3) << 32)) * 1_000_000_000 + (extra >> 2)
