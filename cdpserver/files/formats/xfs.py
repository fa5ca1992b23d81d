"""XFS: superblock, inodes and extent trees as dissect reads them; directories, attributes and what extents mean read here.

dissect.xfs takes extents that were allocated and never written for content, which shows what was deleted there before; it
does not know directory blocks larger than the file system's; and it leaves attributes to others.
"""

import stat
import struct
from collections.abc import Iterator
from typing import Any

from dissect.xfs.xfs import XFS, fsb_to_bb, parse_fsblock

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.files.formats.base import HOLE, OPAQUE, FileSystem, Run, Stat, clip, stat_of
from cdpserver.files.source import Reader

LOCAL, EXTENTS, BTREE = 1, 2, 3
REALTIME = 1
MAX_ATTRIBUTES = 1 << 20
"""Bytes of an attribute fork that are read."""

_PREFIXES = {0: "user.", 2: "trusted.", 4: "security."}
_BLOCK_FORM = (b"XDB3", b"XD2B")
_DATA_FORM = (b"XDD3", b"XD2D")


class Xfs(FileSystem):
    """One; a node is dissect's inode."""

    kind = "xfs"

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._fs = XFS(self.stream)
        self._block = self._fs.block_size
        self._directory_block = self._block << self._fs.sb.sb_dirblklog
        if self._directory_block > 1 << 16:
            raise CorruptError("directories are said to have blocks of more than 64 KiB")
        self._v5 = self._fs.version == 5
        self._typed = 1 if self._fs._has_ftype else 0

    def root(self) -> Any:
        """As the superblock says."""
        return self._fs.get_inode(self._fs.sb.sb_rootino)

    def stat(self, node: Any) -> Stat:
        """Out of the inode."""
        inode = node.inode
        return stat_of(
            inode.di_mode,
            size=inode.di_size,
            mtime_ns=node.mtime_ns,
            atime_ns=node.atime_ns,
            uid=inode.di_uid,
            gid=inode.di_gid,
            links=inode.di_nlink if inode.di_version > 1 else inode.di_onlink,
            id=node.inum,
        )

    def target(self, node: Any) -> bytes:
        """In the inode, or a block of its own."""
        return bytes(node.link.encode(errors="surrogateescape"))

    # -- content

    def runs(self, node: Any) -> Iterator[Run]:
        """Extents; those never written are holes."""
        inode = node.inode
        if inode.di_format == LOCAL:
            return iter([(0, inode.di_size, OPAQUE)] if inode.di_size else [])
        if inode.di_flags & REALTIME and stat.S_IFMT(inode.di_mode) == stat.S_IFREG:
            raise RefusedError(
                "the file's content is on a realtime device", hint="mount it where that device is"
            )
        return clip(self._map(node._iter_blocks()), inode.di_size)

    def _map(self, records: Iterator[tuple[int, int, int, int]]) -> Iterator[Run]:
        for offset, block, count, unwritten in records:
            start = offset * self._block
            yield start, start + count * self._block, HOLE if unwritten else self._place(block)

    def _place(self, block: int) -> int:
        group, number = fsb_to_bb(block, self._fs.sb.sb_agblklog)
        if group >= self._fs.sb.sb_agcount:
            raise CorruptError(f"a file refers to allocation group {group} of {self._fs.sb.sb_agcount}")
        return int((group * self._fs.sb.sb_agblocks + number) * self._block)

    def read(self, node: Any, offset: int, length: int) -> bytes:
        """Content inside the inode."""
        return self._fork(node)[offset : offset + length].ljust(length, b"\0")

    def _fork(self, node: Any) -> bytes:
        assert node.inode is not None  # dissect reads the fork's bytes along with the inode
        return bytes(node.datafork().read())

    # -- directories

    def entries(self, node: Any) -> Iterator[tuple[bytes, Any]]:
        """In the inode, or in blocks."""
        inode = node.inode
        if stat.S_IFMT(inode.di_mode) != stat.S_IFDIR:
            raise CorruptError("what is named as a directory is none")
        found = self._short(self._fork(node)) if inode.di_format == LOCAL else self._blocks(node)
        for name, number in found:
            if name not in (b".", b".."):
                yield name, self._fs.get_inode(number)

    def _short(self, fork: bytes) -> Iterator[tuple[bytes, int]]:
        count, wide = fork[0], 8 if fork[1] else 4
        count = max(count, fork[1])
        at = 2 + wide
        for _ in range(count):
            length = fork[at]
            start = at + 3
            at = start + length + self._typed + wide
            if at > len(fork):
                raise CorruptError("the directory is damaged")
            yield fork[start : start + length], int.from_bytes(fork[at - wide : at], "big")

    def _blocks(self, node: Any) -> Iterator[tuple[bytes, int]]:
        damaged = 0
        for block in self._directory_blocks(node):
            try:
                yield from self._block_entries(block)
            except (CorruptError, struct.error):
                damaged += 1
        if damaged:
            raise CorruptError(f"{damaged} blocks of the directory are damaged; there may be more in it")

    def _directory_blocks(self, node: Any) -> Iterator[bytes]:
        """The blocks that hold entries: those below the size; indexes lie at 32 GiB."""
        held = b""
        for start, end, place in self.runs(node):
            if place == HOLE:
                held = b""
                continue
            for at in range(place, place + end - start, self._block):
                held += self.reader.read(at, self._block)
                if len(held) >= self._directory_block:
                    yield held
                    held = b""

    def _block_entries(self, block: bytes) -> Iterator[tuple[bytes, int]]:
        magic = block[:4]
        if magic not in _BLOCK_FORM + _DATA_FORM:
            raise CorruptError("a block of the directory is damaged")
        at, end = 64 if self._v5 else 16, len(block)
        if magic in _BLOCK_FORM:
            end -= 8 + 8 * struct.unpack_from(">I", block, len(block) - 8)[0]
        while at + 11 <= end:
            if block[at : at + 2] == b"\xff\xff":
                length = struct.unpack_from(">H", block, at + 2)[0]
                if length < 8:
                    raise CorruptError("a block of the directory is damaged")
                at += length
                continue
            number, length = struct.unpack_from(">QB", block, at)
            yield block[at + 9 : at + 9 + length], number
            at += (8 + 1 + length + self._typed + 2 + 7) & ~7

    # -- attributes

    def xattrs(self, node: Any) -> dict[str, bytes]:
        """In the inode, or in blocks of their own; lists of control are left to who can mount."""
        inode = node.inode
        if not inode.di_forkoff:
            return {}
        fork = bytes(node.attrfork().read())
        if inode.di_aformat == LOCAL:
            return dict(_named(_short_attributes(fork)))
        if inode.di_aformat != EXTENTS:
            return {}
        count = min(node.attr_extents, len(fork) // 16)
        records = (parse_fsblock(fork[16 * number : 16 * number + 16]) for number in range(count))
        held = bytearray()
        for start, end, place in self._map(records):
            if end > MAX_ATTRIBUTES:
                raise CorruptError("the file's attributes are too many")
            held += bytes(max(start - len(held), 0)) + self.reader.read(place, end - start)
        return dict(_named(self._leaf_attributes(bytes(held))))

    def _leaf_attributes(self, held: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        head = 80 if self._v5 else 32
        for start in range(0, len(held), self._block):
            block = held[start : start + self._block]
            if block[8:10] != (b"\x3b\xee" if self._v5 else b"\xfb\xee"):
                continue
            (count,) = struct.unpack_from(">H", block, 56 if self._v5 else 12)
            for number in range(min(count, (len(block) - head) // 8)):
                at, flags = struct.unpack_from(">HB", block, head + 8 * number + 4)
                if flags & 1:
                    length, name_length = struct.unpack_from(">HB", block, at)
                    name = block[at + 3 : at + 3 + name_length]
                    yield flags, name, block[at + 3 + name_length : at + 3 + name_length + length]
                else:
                    first, length, name_length = struct.unpack_from(">IIB", block, at)
                    name = block[at + 9 : at + 9 + name_length]
                    yield flags, name, self._remote(held, first * self._block, length)

    def _remote(self, held: bytes, start: int, length: int) -> bytes:
        head = 56 if self._v5 else 0
        found = bytearray()
        while len(found) < length and start < len(held):
            found += held[start + head : start + self._block]
            start += self._block
        return bytes(found[:length])


def _short_attributes(fork: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    at = 4
    for _ in range(fork[2]):
        name_length, length, flags = fork[at], fork[at + 1], fork[at + 2]
        start = at + 3
        at = start + name_length + length
        yield flags, fork[start : start + name_length], fork[start + name_length : at]


def _named(found: Iterator[tuple[int, bytes, bytes]]) -> Iterator[tuple[str, bytes]]:
    for flags, name, value in found:
        prefix = _PREFIXES.get(flags & 6)
        if prefix is not None and not flags & 0x80 and not name.startswith(b"SGI_ACL_"):
            yield prefix + name.decode(errors="surrogateescape"), value
