"""The journal of ext3 and ext4 (JBD2): which blocks it holds, and the file system as after its replay.

    superblock | ... | descriptor tag tag tag | block | block | block | revoke | commit | descriptor ... | fast commits
                 ^ start                                                                  wraps to `first` ^ end

A transaction counts once its commit block is there. A block that is revoked in a transaction isn't replayed from it nor from
earlier ones: it was freed, and may hold content since. Whatever the kernel refuses to mount is refused here.

Layout: https://www.kernel.org/doc/html/latest/filesystems/ext4/globals.html#journal-jbd2; order of checks: fs/jbd2/recovery.c
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from cdpserver import limits
from cdpserver.errors import CorruptError
from cdpserver.files.replay.ext import JournalFile
from cdpserver.files.replay.overlay import MASK32, NotReplayedError, crc32c

MAGIC = 0xC03B3998
MAGIC_BYTES = MAGIC.to_bytes(4, "big")
HEADER = struct.Struct(">3I")
"""Magic, kind, sequence of the transaction."""
DESCRIPTOR, COMMIT, SUPER_V1, SUPER_V2, REVOKE = 1, 2, 3, 4, 5

COMPAT_CHECKSUM = 0x1
REVOKES, WIDE, ASYNC_COMMIT, CSUM_V2, CSUM_V3, FAST_COMMIT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
KNOWN = REVOKES | WIDE | ASYNC_COMMIT | CSUM_V2 | CSUM_V3 | FAST_COMMIT

TAG_ESCAPED, TAG_SAME_UUID, TAG_LAST = 0x1, 0x2, 0x8
SUPER_BYTES = 1024
FAST_BLOCKS = 256
"""Of the fast-commit area, where the superblock names no number."""
MIN_BLOCKS = 1024
"""Of a journal beside its fast-commit area."""
FC_TAIL, FC_HEAD = 8, 9

REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True, slots=True)
class Tag:
    """One block in the journal: `place` is where it belongs, `block` where it is now."""

    place: int
    block: int
    escaped: bool
    checksum: int


@dataclass(slots=True)
class Transaction:
    """What lies between two commits."""

    sequence: int
    tags: list[Tag] = field(default_factory=list)
    revoked: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class JournalSuper:
    """The journal's own superblock; `raw` is its 1024 bytes."""

    raw: bytes
    block_size: int
    blocks: int
    first: int
    end: int
    """Behind the last block of the log, which wraps there; fast commits follow."""
    sequence: int
    start: int
    compat: int
    incompat: int
    seed: int

    @classmethod
    def parse(cls, raw: bytes, journal: JournalFile) -> Self:
        """CorruptError for what cannot be, NotReplayedError for features of later versions."""
        magic, kind, _, block_size, blocks, first, sequence, start = struct.unpack_from(">8I", raw)
        if magic != MAGIC or kind not in (SUPER_V1, SUPER_V2):
            raise CorruptError("the journal has no superblock")
        compat, incompat = struct.unpack_from(">II", raw, 36) if kind == SUPER_V2 else (0, 0)
        if incompat & ~KNOWN:
            raise NotReplayedError(f"the journal has features of a later version ({incompat & ~KNOWN:#x})")
        checked = incompat & (CSUM_V2 | CSUM_V3)
        if checked and (raw[80] != 4 or crc32c(MASK32, _zeroed(raw, 252)) != _word(raw, 252)):
            raise CorruptError("the checksum of the journal's superblock is wrong")
        end = blocks
        if incompat & FAST_COMMIT:
            fast = _word(raw, 84) or FAST_BLOCKS
            end = blocks - fast if blocks - fast >= MIN_BLOCKS else blocks
        if (
            block_size != journal.block_size
            or not 0 < first < end <= blocks <= journal.blocks
            or start >= end
        ):
            raise CorruptError("the sizes in the journal's superblock cannot be")
        return cls(
            raw, block_size, blocks, first, end, sequence, start, compat, incompat, crc32c(MASK32, raw[48:64])
        )

    @property
    def checked(self) -> bool:
        """Blocks and tags have checksums of their own (version 2 or 3)."""
        return bool(self.incompat & (CSUM_V2 | CSUM_V3))

    def wrap(self, block: int) -> int:
        """The log is a ring."""
        return block if block < self.end else block - (self.end - self.first)

    def emptied(self, sequence: int) -> bytes:
        """The superblock of a journal that was replayed: it goes on with this transaction."""
        raw = bytearray(self.raw)
        struct.pack_into(">II", raw, 24, sequence & MASK32, 0)
        if self.checked:
            struct.pack_into(">I", raw, 252, crc32c(MASK32, _zeroed(raw, 252)))
        return bytes(raw)


class Scan:
    """Reads the log from its start to where it ends, as the kernel's first pass does; `transactions` then counts."""

    def __init__(self, journal: JournalFile, head: JournalSuper) -> None:
        self.journal = journal
        self.head = head
        self.transactions: list[Transaction] = []
        self._complete: int | None = None
        """How many transactions count, once one is there that doesn't."""
        self._open = Transaction(head.sequence)
        self._sum = MASK32
        self._suspect = False
        self._last_time = 0
        self._read_blocks = 0
        self._named = 0

    def run(self) -> None:
        """CorruptError where the kernel refuses to mount."""
        at = self.head.start
        while True:
            block = self._block(at)
            magic, kind, sequence = HEADER.unpack_from(block)
            at = self.head.wrap(at + 1)
            if magic != MAGIC or sequence != self._open.sequence:
                break
            if kind == DESCRIPTOR:
                at = self._descriptor(block, at)
            elif kind == REVOKE:
                self._revoke(block)
            elif kind != COMMIT or not self._commit(block):
                break
        if self._complete is not None:
            del self.transactions[self._complete :]

    @property
    def next_sequence(self) -> int:
        """Of the first transaction that isn't complete."""
        return (self.head.sequence + len(self.transactions)) & MASK32

    def _block(self, block: int) -> bytes:
        self._count(1)
        return self.journal.read(block)

    def _count(self, blocks: int) -> None:
        """A log that goes round in circles ends here."""
        self._read_blocks += blocks
        if self._read_blocks > self.head.end:
            raise CorruptError("the journal's log has no end")
        if self._read_blocks * self.head.block_size > limits.REPLAY_LOG_BYTES:
            raise NotReplayedError(
                f"the journal holds more than {limits.REPLAY_LOG_BYTES >> 20} MiB of changes"
            )

    def _remember(self, blocks: int) -> None:
        self._named += blocks
        if self._named > limits.REPLAY_BLOCKS:
            raise NotReplayedError(f"the journal names more than {limits.REPLAY_BLOCKS} blocks")

    def _descriptor(self, block: bytes, at: int) -> int:
        self._suspect |= not block_is_sound(block, self.head)
        tags = list(parse_tags(block, at, self.head))
        self._count(len(tags))
        self._remember(len(tags))
        if self.head.compat & COMPAT_CHECKSUM and self._complete is None:
            self._sum = crc32_be(self._sum, block)
            for tag in tags:
                self._sum = crc32_be(self._sum, self.journal.read(tag.block))
        self._open.tags += tags
        return self.head.wrap(at + len(tags))

    def _revoke(self, block: bytes) -> None:
        self._suspect |= not block_is_sound(block, self.head)
        used = _word(block, 12)
        if used > len(block) - (4 if self.head.checked else 0):
            if self._suspect:
                return
            raise CorruptError("a list of revoked blocks is longer than its block")
        width = 8 if self.head.incompat & WIDE else 4
        whole = max(used - 16, 0) // width
        self._remember(whole)
        self._open.revoked += struct.unpack_from(f">{whole}{'Q' if width == 8 else 'I'}", block, 16)

    def _commit(self, block: bytes) -> bool:
        """Whether the scan goes on."""
        (time,) = struct.unpack_from(">Q", block, 48)
        failed = not self._commit_is_sound(block)
        if (self._suspect or failed) and time < self._last_time:
            return False  # left from an earlier round of the log
        if self._suspect:
            raise CorruptError(f"the checksum of transaction {self._open.sequence} is wrong")
        if self.head.compat & COMPAT_CHECKSUM and self._complete is not None:
            raise CorruptError(f"transaction {self._open.sequence - 1} is damaged, and others follow")
        if failed:
            if not self.head.incompat & ASYNC_COMMIT:
                raise CorruptError(f"the commit of transaction {self._open.sequence} is damaged")
            # Blocks of an asynchronous commit may come after it: what was cut off there never was.
            if self._complete is None:
                self._complete = len(self.transactions)
        else:
            self._last_time = time
        self.transactions.append(self._open)
        self._open = Transaction((self._open.sequence + 1) & MASK32)
        return True

    def _commit_is_sound(self, block: bytes) -> bool:
        if self.head.checked:
            return crc32c(self.head.seed, _zeroed(block, 16)) == _word(block, 16)
        if not self.head.compat & COMPAT_CHECKSUM or self._complete is not None:
            return True
        total, self._sum = self._sum, MASK32
        kind, size, found = block[12], block[13], _word(block, 16)
        return (kind, size, found) in ((1, 4, total), (0, 0, 0))


def block_is_sound(block: bytes, head: JournalSuper) -> bool:
    """A descriptor's or revoke block's own checksum, at its end."""
    tail = len(block) - 4
    return not head.checked or crc32c(head.seed, _zeroed(block, tail)) == _word(block, tail)


def parse_tags(block: bytes, at: int, head: JournalSuper) -> Iterator[Tag]:
    """The tags of a descriptor; the blocks that they speak of lie from `at` on."""
    wide = bool(head.incompat & WIDE)
    narrow = 8 + (2 if head.incompat & CSUM_V2 else 0) + (4 if wide else 0)
    width = 16 if head.incompat & CSUM_V3 else narrow
    end = len(block) - (4 if head.checked else 0)
    offset = HEADER.size
    while offset + width <= end:
        low, checksum, flags = struct.unpack_from(">IHH", block, offset)
        high = _word(block, offset + 8) if wide else 0
        if head.incompat & CSUM_V3:
            checksum = _word(block, offset + 12)
        yield Tag(low | high << 32, at, bool(flags & TAG_ESCAPED), checksum)
        at = head.wrap(at + 1)
        offset += width + (0 if flags & TAG_SAME_UUID else 16)
        if flags & TAG_LAST:
            return


class Blocks(Mapping[int, bytes]):
    """Blocks of the file system as the journal has them, read when they are asked for."""

    def __init__(self, journal: JournalFile, tags: dict[int, Tag], made: dict[int, bytes]) -> None:
        self._journal = journal
        self._tags = tags
        self._made = made

    def __getitem__(self, number: int) -> bytes:
        made = self._made.get(number)
        return content(self._journal, self._tags[number]) if made is None else made

    def __contains__(self, number: object) -> bool:
        return number in self._made or number in self._tags

    def __iter__(self) -> Iterator[int]:
        return iter(self._tags.keys() | self._made.keys())

    def __len__(self) -> int:
        return len(self._tags.keys() | self._made.keys())


def content(journal: JournalFile, tag: Tag) -> bytes:
    """A block in the journal that begins like one of its own had its first word taken out."""
    data = journal.read(tag.block)
    return MAGIC_BYTES + data[4:] if tag.escaped else data


def newest_tags(journal: JournalFile, head: JournalSuper, transactions: list[Transaction]) -> dict[int, Tag]:
    """By block of the file system, what replay leaves there; CorruptError if a block isn't what was logged."""
    revoked: dict[int, int] = {}
    for number, transaction in enumerate(transactions):
        revoked.update(dict.fromkeys(transaction.revoked, number))
    newest: dict[int, Tag] = {}
    for number, transaction in enumerate(transactions):
        for tag in transaction.tags:
            if revoked.get(tag.place, -1) >= number:
                continue
            if head.checked and not _tag_is_sound(journal, head, transaction.sequence, tag):
                raise CorruptError(f"block {tag.place} in transaction {transaction.sequence} is damaged")
            newest[tag.place] = tag
    return newest


def _tag_is_sound(journal: JournalFile, head: JournalSuper, sequence: int, tag: Tag) -> bool:
    found = crc32c(crc32c(head.seed, sequence.to_bytes(4, "big")), journal.read(tag.block))
    return tag.checksum == (found if head.incompat & CSUM_V3 else found & 0xFFFF)


def fast_commits(journal: JournalFile, head: JournalSuper, sequence: int) -> int:
    """How many fast commits follow the last transaction, in the area of their own behind the log.

    They are tags (kind, length, value; little-endian), each commit ended by a tail that names the transaction it precedes.
    """
    if not head.incompat & FAST_COMMIT or head.end == head.blocks:
        return 0
    found = 0
    for block in range(head.end + 1, head.blocks):
        data = journal.read(block)
        offset = 0
        while offset + 4 <= len(data):
            kind, length = struct.unpack_from("<HH", data, offset)
            if not 1 <= kind <= FC_HEAD or offset + 4 + length > len(data):
                return found
            value = data[offset + 4 : offset + 4 + length]
            if kind == FC_HEAD and (length < 8 or int.from_bytes(value[4:8], "little") != sequence):
                return found
            if kind == FC_TAIL:
                if length < 8 or int.from_bytes(value[:4], "little") != sequence:
                    return found
                found += 1
                break
            offset += 4 + length
    return found


def crc32_be(seed: int, data: bytes) -> int:
    """The kernel's `crc32_be()`: zlib's sum with every bit in the other direction, without its inversions."""
    start = int(f"{seed:032b}"[::-1], 2)
    result = ~zlib.crc32(data.translate(REVERSED_BITS), ~start & MASK32) & MASK32
    return int(f"{result:032b}"[::-1], 2)


def _zeroed(data: bytes | bytearray, offset: int) -> bytes:
    """With the four bytes of a checksum taken for zeros."""
    return bytes(data[:offset]) + bytes(4) + bytes(data[offset + 4 :])


def _word(data: bytes | bytearray, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")
