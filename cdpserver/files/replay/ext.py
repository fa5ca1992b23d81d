"""ext3 and ext4 as far as their journal: the superblock, and where the journal's blocks lie.

Layout: https://www.kernel.org/doc/html/latest/filesystems/ext4/globals.html
"""

import struct
from bisect import bisect_right
from dataclasses import dataclass
from typing import Self

from cdpserver.errors import CorruptError
from cdpserver.files.replay.overlay import MASK32, NotReplayedError, crc32c, exactly
from cdpserver.files.source import Reader

SUPERBLOCK_AT = 1024
SUPERBLOCK_BYTES = 1024
MAGIC_AT = SUPERBLOCK_AT + 56
EXT_MAGIC = bytes.fromhex("53ef")

COMPAT_JOURNAL = 0x4
INCOMPAT_RECOVER = 0x4
INCOMPAT_64BIT = 0x80
RO_COMPAT_METADATA_CSUM = 0x400
STATE_VALID = 1

INODE_EXTENTS = 0x80000
EXTENT_MAGIC = 0xF30A
MAX_DEPTH = 5
"""Of an extent tree, by its specification."""
MAX_NODES = 4096
"""Of a journal's extent tree or block map: enough for a journal of gigabytes in single blocks."""


@dataclass(frozen=True, slots=True)
class Run:
    """`count` journal blocks from `first` on, which lie together at block `place` of the file system."""

    first: int
    place: int
    count: int


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the superblock says; `raw` is all of it, 1024 bytes."""

    raw: bytes
    block_size: int
    blocks: int

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """CorruptError for sizes that cannot be."""
        log_size = _field(raw, 24)
        if log_size > 6:
            raise CorruptError(f"the superblock's block size is 2^{10 + log_size} bytes")
        high = _field(raw, 336) if _field(raw, 96) & INCOMPAT_64BIT else 0
        return cls(raw, 1024 << log_size, _field(raw, 4) | high << 32)

    @property
    def has_journal(self) -> bool:
        """Else it is ext2, or ext4 without one."""
        return bool(_field(self.raw, 92) & COMPAT_JOURNAL)

    @property
    def needs_recovery(self) -> bool:
        """It was in use: the journal may hold what is not in its place yet."""
        return bool(_field(self.raw, 96) & INCOMPAT_RECOVER)

    @property
    def clean(self) -> bool:
        """It was unmounted; meaningful without a journal."""
        return bool(struct.unpack_from("<H", self.raw, 58)[0] & STATE_VALID)

    def recovered(self) -> bytes:
        """The superblock as recovery leaves it: the flag is gone, the checksum right."""
        raw = bytearray(self.raw)
        struct.pack_into("<I", raw, 96, _field(raw, 96) & ~INCOMPAT_RECOVER)
        if _field(raw, 100) & RO_COMPAT_METADATA_CSUM:
            struct.pack_into("<I", raw, 1020, crc32c(MASK32, raw[:1020]))
        return bytes(raw)


class JournalFile:
    """The journal as a run of blocks, wherever they lie; blocks are counted from 0."""

    def __init__(self, reader: Reader, block_size: int, runs: list[Run]) -> None:
        self.reader = reader
        self.block_size = block_size
        self.runs = runs
        self.firsts = [run.first for run in runs]
        self.blocks = runs[-1].first + runs[-1].count if runs else 0

    def read(self, block: int, count: int = 1) -> bytes:
        """`count` blocks; CorruptError where the journal has a hole or ends."""
        pieces = []
        while count:
            run = self._run(block)
            here = min(count, run.first + run.count - block)
            place = run.place + block - run.first
            pieces.append(exactly(self.reader, place * self.block_size, here * self.block_size))
            block += here
            count -= here
        return b"".join(pieces)

    def place(self, block: int) -> int:
        """Which block of the file system this one of the journal is."""
        run = self._run(block)
        return run.place + block - run.first

    def _run(self, block: int) -> Run:
        index = bisect_right(self.firsts, block) - 1
        if index < 0 or block >= self.runs[index].first + self.runs[index].count:
            raise CorruptError(f"the journal has no block {block}")
        return self.runs[index]


def open_journal(reader: Reader, superblock: Superblock) -> JournalFile:
    """The internal journal; NotReplayedError if it is on another device, CorruptError if it cannot be found."""
    inode, device = _field(superblock.raw, 224), _field(superblock.raw, 228)
    if not inode:
        raise NotReplayedError(f"the journal is on another device ({device >> 8 & 0xFFF}:{device & 0xFF})")
    raw = _read_inode(reader, superblock, inode)
    size_bytes = _field(raw, 4) | _field(raw, 108) << 32
    if _field(raw, 32) & INODE_EXTENTS:
        runs = _extent_runs(reader, superblock.block_size, raw[40:100])
    else:
        runs = _mapped_runs(reader, superblock.block_size, raw[40:100], size_bytes // superblock.block_size)
    return JournalFile(reader, superblock.block_size, runs)


def _read_inode(reader: Reader, superblock: Superblock, number: int) -> bytes:
    """The first 128 bytes of an inode."""
    raw, size = superblock.raw, superblock.block_size
    per_group, wide = _field(raw, 40), _field(raw, 96) & INCOMPAT_64BIT
    inode_size = struct.unpack_from("<H", raw, 88)[0] if _field(raw, 76) else 128
    entry_size = struct.unpack_from("<H", raw, 254)[0] if wide else 32
    if not per_group or inode_size < 128 or entry_size < 32 or (wide and entry_size < 64):
        raise CorruptError("the superblock's sizes of inodes and groups cannot be")
    group, index = divmod(number - 1, per_group)
    if group:
        # Descriptors of later groups may lie elsewhere (meta_bg); a journal's inode is in the first one always.
        raise CorruptError(f"the journal is inode {number}")
    entry = exactly(reader, (_field(raw, 20) + 1) * size, entry_size)
    table = _field(entry, 8) | (_field(entry, 40) << 32 if wide else 0)
    return exactly(reader, table * size + index * inode_size, 128)


def _extent_runs(reader: Reader, block_size: int, root: bytes) -> list[Run]:
    """The leaves of an extent tree, in order."""
    runs: list[Run] = []
    waiting: list[tuple[bytes, int]] = [(root, MAX_DEPTH)]
    nodes = 0
    while waiting:
        node, deepest = waiting.pop()
        nodes += 1
        magic, entries, _, depth = struct.unpack_from("<4H", node)
        if magic != EXTENT_MAGIC or depth > deepest or 12 + 12 * entries > len(node) or nodes > MAX_NODES:
            raise CorruptError("the journal's extent tree is damaged")
        if depth:
            for index in reversed(range(entries)):
                _, low, high = struct.unpack_from("<IIH", node, 12 + 12 * index)
                waiting.append(
                    (exactly(reader, (low | high << 32) * block_size, block_size), depth - 1),
                )
            continue
        for index in range(entries):
            first, length, high, low = struct.unpack_from("<IHHI", node, 12 + 12 * index)
            if runs and first < runs[-1].first + runs[-1].count:
                raise CorruptError("the journal's extents overlap")
            # A length past 32768 marks an unwritten extent, which a journal never has.
            if length > 32768:
                raise CorruptError("the journal has an unwritten extent")
            runs.append(Run(first, low | high << 32, length))
    return runs


def _mapped_runs(reader: Reader, block_size: int, root: bytes, blocks: int) -> list[Run]:
    """The runs of an inode with direct and indirect blocks (ext3)."""
    runs: list[Run] = []
    pointers = struct.unpack("<15I", root)
    nodes = 0
    logical = 0

    def add(pointer: int, level: int) -> None:
        nonlocal logical, nodes
        if logical >= blocks:
            return
        if not pointer:
            raise CorruptError(f"the journal has a hole at block {logical}")
        if level:
            nodes += 1
            if nodes > MAX_NODES:
                raise CorruptError("the journal's block map is damaged")
            for below in struct.unpack(
                f"<{block_size // 4}I", exactly(reader, pointer * block_size, block_size)
            ):
                add(below, level - 1)
            return
        last = runs[-1] if runs else None
        if last and last.place + last.count == pointer:
            runs[-1] = Run(last.first, last.place, last.count + 1)
        else:
            runs.append(Run(logical, pointer, 1))
        logical += 1

    for level, pointer in zip((*[0] * 12, 1, 2, 3), pointers, strict=True):
        add(pointer, level)
    return runs


def _field(raw: bytes | bytearray, offset: int) -> int:
    """A little-endian word of 32 bits."""
    value: int = struct.unpack_from("<I", raw, offset)[0]
    return value
