"""Btrfs as dissect reads it, with the default subvolume on top and others where they are.

What a crash leaves in the log tree is not read: the file system is whole without it, and as old as its last commit.
"""

from collections.abc import Iterator
from typing import Any

from dissect.btrfs.btrfs import Btrfs as Parser
from dissect.btrfs.btrfs import Subvolume
from dissect.btrfs.c_btrfs import c_btrfs
from dissect.btrfs.stream import Extent, ExtentStream

from cdpserver.errors import CorruptError
from cdpserver.files.formats.base import HOLE, OPAQUE, FileSystem, Run, Stat, clip, stat_of
from cdpserver.files.source import Reader

MAX_COMPRESSED = 1 << 20
"""Bytes of a compressed extent; the kernel makes none above 128 KiB."""

_STRIPED = c_btrfs.BTRFS_BLOCK_GROUP.RAID0 | c_btrfs.BTRFS_BLOCK_GROUP.RAID10
_STRIPED |= c_btrfs.BTRFS_BLOCK_GROUP.RAID5 | c_btrfs.BTRFS_BLOCK_GROUP.RAID6
_TREES = 1 << 32
"""Times a subvolume's number, plus an inode's: one number for both."""


class Btrfs(FileSystem):
    """One; a node is dissect's inode."""

    kind = "btrfs"

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._fs = Parser(self.stream)
        self._top: Subvolume = self._fs.default_subvolume
        if self._top.objectid != c_btrfs.BTRFS_FS_TREE_OBJECTID:
            self.remarks.append("this is the default subvolume; those beside it are not shown")

    def root(self) -> Any:
        """Of the default subvolume."""
        return self._top.root

    def stat(self, node: Any) -> Stat:
        """Out of the inode."""
        return stat_of(
            node.mode,
            size=node.size,
            mtime_ns=node.mtime_ns,
            atime_ns=node.atime_ns,
            uid=node.uid,
            gid=node.gid,
            links=node.inode.nlink,
            id=node.subvolume.objectid * _TREES + node.inum,
        )

    def target(self, node: Any) -> bytes:
        """Inline content."""
        return bytes(node.link.encode(errors="surrogateescape"))

    def entries(self, node: Any) -> Iterator[tuple[bytes, Any]]:
        """As dissect lists them."""
        for name, child in node.iterdir():
            if name not in (".", ".."):
                yield name.encode(errors="surrogateescape"), child

    def begins(self, node: Any) -> bool:
        """A subvolume: snapshots of what it is in name it, too."""
        return bool(node.inum == c_btrfs.BTRFS_FIRST_FREE_OBJECTID)

    def runs(self, node: Any) -> Iterator[Run]:
        """Extents: compressed ones and inline content come through dissect."""
        extents = node.extents()
        if extents is None:
            return iter([(0, node.size, OPAQUE)] if node.size else [])
        return clip(self._map(extents), node.size)

    def _map(self, extents: list[Extent]) -> Iterator[Run]:
        at = 0
        for extent in extents:
            end = at + extent.length
            if extent.disk_offset == 0:
                yield at, end, HOLE
            elif extent.compression or extent.encryption:
                yield at, end, OPAQUE
            else:
                yield from self._chunks(at, end, extent.disk_offset + extent.offset)
            at = end

    def _chunks(self, at: int, end: int, logical: int) -> Iterator[Run]:
        """Where a stretch of the logical address space is on this device."""
        for chunk in self._fs._logical_fh.chunks:
            low, high = max(logical, chunk.offset), min(logical + end - at, chunk.offset + chunk.length)
            if low >= high:
                continue
            stripe = chunk.stripes[0]
            elsewhere = chunk.type & _STRIPED or stripe.fh is None
            place = OPAQUE if elsewhere else stripe.offset + low - chunk.offset
            yield at + low - logical, at + high - logical, place

    def read(self, node: Any, offset: int, length: int) -> bytes:
        """Extent by extent: what a compressed one lacks is zeros, and shifts nothing."""
        extents = node.extents()
        if extents is None:
            stream = node.open()
            stream.seek(offset)
            return bytes(stream.read(length)).ljust(length, b"\0")
        found = bytearray(length)
        at = 0
        for extent in extents:
            low, high = max(at, offset), min(at + extent.length, offset + length)
            if low < high and extent.disk_offset:
                if extent.compression and extent.disk_length > MAX_COMPRESSED:
                    raise CorruptError("a compressed extent is larger than there are any")
                stream = ExtentStream(self._fs._logical_fh, [extent], extent.length, self._fs.sector_size)
                stream.seek(low - at)
                data = stream.read(high - low)
                found[low - offset : low - offset + len(data)] = data
            at += extent.length
        return bytes(found)

    def xattrs(self, node: Any) -> dict[str, bytes]:
        """Items of the subvolume's tree."""
        found = {}
        cursor = node.subvolume.tree.cursor()
        for _, data in cursor.iter(node.inum, c_btrfs.BTRFS_XATTR_ITEM_KEY, 0, ignore_offset=True):
            rest = bytes(data)
            while len(rest) >= 30:
                value_length = int.from_bytes(rest[25:27], "little")
                name_length = int.from_bytes(rest[27:29], "little")
                name = rest[30 : 30 + name_length].decode(errors="surrogateescape")
                found[name] = rest[30 + name_length : 30 + name_length + value_length]
                rest = rest[30 + name_length + value_length :]
        return found
