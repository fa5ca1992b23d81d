"""The items of an XFS log, put in their places: buffers, inodes, and chunks of new inodes.

What stands in a place may be newer than an item: both say when they were written (LSN), and the older one gives way. A buffer
that was freed later (a cancel item) isn't replayed at all, for it may hold content since.

Layout: "XFS Algorithms & Data Structures"; order and conditions: fs/xfs/xfs_buf_item_recover.c, xfs_inode_item_recover.c
"""

import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from cdpserver import limits
from cdpserver.errors import CorruptError
from cdpserver.files.replay.overlay import MASK32, NotReplayedError, Pages, crc32c
from cdpserver.files.replay.xfslog import BLOCK, Item, Transaction

EFI, INODE, BUFFER, DQUOT, QUOTAOFF, ICREATE = 0x1236, 0x123B, 0x123C, 0x123D, 0x123E, 0x123F
IUNLINK = 0x1238
INTENTS = {
    EFI: "space to be freed",
    0x1240: "owners of blocks to be noted",
    0x1242: "shared blocks to be counted",
    0x1244: "blocks of files to be remapped",
    0x1246: "attributes to be set",
    0x1248: "files to be exchanged",
    0x124A: "space to be freed",
    0x124C: "owners of blocks to be noted",
    0x124E: "shared blocks to be counted",
}
"""An operation over several transactions: what it is about. The item that says it is done has the next number."""
VISIBLE = {0x1244, 0x1246, 0x1248}
"""Those that a reader of files can see."""

INODE_BUFFER, CANCEL, QUOTA_BUFFERS = 0x1, 0x2, 0x1C
BUFFER_FORMAT = struct.Struct("<HHHHqI")
CHUNK = 128
"""Of a buffer that is logged, in bytes: a bit of its map."""

CORE = 176
"""Bytes of an inode before its forks."""
BIG_TIMES, BIG_EXTENTS = 0x8, 0x10
DATA_FORK, ATTR_FORK, DEVICE = 0xE, 0x1C0, 0x10
DATA_ROOT, ATTR_ROOT = 0x8, 0x100
ROOT_HEADER = 72
META_BTREE = 5
NO_LSN = (1 << 64) - 1

BTREE = {"AB3B", "AB3C", "RMB3", "IAB3", "FIB3", "R3FC"}
STAMPS = {
    **{name.encode(): (24, 32, 52) for name in BTREE},
    b"BMA3": (32, 40, 64),
    b"XAGF": (208, 64, 216),
    b"XAFL": (24, 8, 32),
    b"XAGI": (320, 296, 312),
    b"XSLM": (48, 16, 12),
    **dict.fromkeys((b"XDB3", b"XDD3", b"XDF3"), (16, 24, 4)),
}
"""By a block's first four bytes: where its LSN, its UUID and its checksum are."""
NODE_MAGICS = {0x3DF1, 0x3DFF, 0x3BEE, 0x3EBE}
NODE_STAMP = (24, 32, 12)
"""Of directory leaves and attribute blocks, whose magic is at byte 8."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the superblock says of where things are."""

    block_size: int
    inode_size: int
    groups: int
    group_blocks: int
    group_bits: int
    inode_bits: int
    cluster_blocks: int
    uuid: bytes
    """In the headers of blocks."""

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """From the superblock; CorruptError for what cannot be."""
        (block,) = struct.unpack_from(">I", raw, 4)
        group_blocks, groups = struct.unpack_from(">II", raw, 84)
        (inode,) = struct.unpack_from(">H", raw, 104)
        inode_bits, group_bits = raw[123], raw[124]
        (alignment,) = struct.unpack_from(">I", raw, 180)
        sound = block in {512 << n for n in range(8)} and inode in (512, 1024, 2048) and inode <= block
        if not sound or not group_blocks or group_bits > 32 or block != inode << inode_bits:
            raise CorruptError("the sizes in the superblock cannot be")
        cluster = 8192
        if alignment >= (larger := cluster * inode // 256) // block:
            cluster = larger
        (features,) = struct.unpack_from(">I", raw, 216)
        return cls(
            block,
            inode,
            groups,
            group_blocks,
            group_bits,
            inode_bits,
            max(1, cluster // block),
            raw[248:264] if features & 4 else raw[32:48],
        )


class Cancelled:
    """Buffers that were freed in the log, with how often; and operations that it leaves unfinished."""

    def __init__(self, transactions: Iterable[Transaction]) -> None:
        self.counts: Counter[tuple[int, int]] = Counter()
        self.intents: dict[tuple[int, int], None] = {}
        for transaction in transactions:
            for item in transaction.items:
                self._note(item)
            if len(self.counts) + len(self.intents) > limits.REPLAY_BLOCKS:
                raise NotReplayedError(f"the log frees more than {limits.REPLAY_BLOCKS} blocks")

    def _note(self, item: Item) -> None:
        kind = kind_of(item)
        if kind == BUFFER:
            _, _, flags, length, block, _ = BUFFER_FORMAT.unpack_from(item.regions[0])
            if flags & CANCEL:
                self.counts[block, length] += 1
        elif kind in INTENTS:
            self.intents[kind, _identity(item)] = None
        elif kind - 1 in INTENTS:
            self.intents.pop((kind - 1, _identity(item)), None)

    def unfinished(self) -> Counter[int]:
        """How many of each kind."""
        return Counter(kind for kind, _ in self.intents)


def kind_of(item: Item) -> int:
    """Its type."""
    return int.from_bytes(item.regions[0][:2], "little")


def _identity(item: Item) -> int:
    return int(struct.unpack_from("<Q", item.regions[0], 8)[0])


class Replay:
    """Puts transactions, in order, into pages. CorruptError for what cannot be put anywhere."""

    def __init__(self, pages: Pages, geometry: Geometry, cancelled: Cancelled) -> None:
        self._pages = pages
        self._geometry = geometry
        self._cancelled = cancelled.counts
        self._stamped: dict[tuple[int, int], int] = {}

    def apply(self, transaction: Transaction) -> None:
        """Buffers and new inodes first, then inodes, then what was freed, whatever order they were logged in."""
        first, rest, last = list[Item](), list[Item](), list[Item]()
        for item in transaction.items:
            if len(item.regions) != item.total:
                raise CorruptError("the log has an item with regions missing")
            kind = kind_of(item)
            if kind == BUFFER:
                flags = BUFFER_FORMAT.unpack_from(item.regions[0])[2]
                (last if flags & CANCEL else first).append(item)
            elif kind == ICREATE:
                first.append(item)
            elif kind == INODE:
                rest.append(item)
            elif kind not in (DQUOT, QUOTAOFF, IUNLINK) and not {kind, kind - 1} & INTENTS.keys():
                raise NotReplayedError(f"the log has items of a kind that is not known ({kind:#x})")
        for item in (*first, *rest, *last):
            kind = kind_of(item)
            if kind == BUFFER:
                self._buffer(item, transaction.lsn)
            elif kind == ICREATE:
                self._new_inodes(item)
            else:
                self._inode(item, transaction.lsn)

    def finish(self) -> None:
        """Stamps what was changed, as the kernel does when it writes: the LSN of the change, and the checksum."""
        for (block, length), lsn in self._stamped.items():
            place, size = block * BLOCK, length * BLOCK
            stamp = self._stamp(place, size)
            if stamp is None:
                continue
            self._pages.write(place + stamp[0], lsn.to_bytes(8, "big"))
            self._pages.write(place + stamp[2], bytes(4))
            total = ~crc32c(MASK32, self._pages.read(place, size)) & MASK32
            self._pages.write(place + stamp[2], total.to_bytes(4, "little"))

    # -- buffers

    def _buffer(self, item: Item, lsn: int) -> None:
        head = item.regions[0]
        _, _, flags, length, block, words = BUFFER_FORMAT.unpack_from(head)
        key = block, length
        if key in self._cancelled:
            if flags & CANCEL:
                self._cancelled[key] -= 1
                if not self._cancelled[key]:
                    del self._cancelled[key]
            return
        # A buffer of inodes changes the lists of unlinked ones alone; quotas are no business of a reader's.
        if flags & (CANCEL | INODE_BUFFER | QUOTA_BUFFERS):
            return
        place = block * BLOCK
        there = self._lsn(place, length * BLOCK)
        if there is not None and there >= lsn:
            return
        bits = int.from_bytes(head[BUFFER_FORMAT.size : BUFFER_FORMAT.size + 4 * words], "little")
        for region, (start, count) in zip(item.regions[1:], _runs(bits, item.regions[1:]), strict=False):
            if (start + count) * CHUNK > length * BLOCK:
                raise CorruptError("the log changes more than a whole buffer")
            self._pages.write(place + start * CHUNK, bytes(region[: count * CHUNK]))
        self._stamped[key] = lsn

    def _lsn(self, place: int, size: int) -> int | None:
        """When what is there was written; None if that isn't known, and it gives way."""
        stamp = self._stamp(place, size)
        if stamp is None:
            return None
        lsn = int.from_bytes(self._pages.read(place + stamp[0], 8), "big")
        return lsn if lsn not in (0, NO_LSN) else None

    def _stamp(self, place: int, size: int) -> tuple[int, int, int] | None:
        """Where a block has its LSN, UUID and checksum, if it is one of this file system that has."""
        if size < BLOCK:
            return None
        head = self._pages.read(place, BLOCK)
        stamp = STAMPS.get(head[:4])
        if head[:4] == b"XFSB":
            # The superblock's own UUID can be another than that of the blocks.
            return 240, 32, 224
        if stamp is None and int.from_bytes(head[8:10], "big") in NODE_MAGICS:
            stamp = NODE_STAMP
        if stamp is None or head[stamp[1] : stamp[1] + 16] != self._geometry.uuid:
            return None
        return stamp

    # -- inodes

    def _new_inodes(self, item: Item) -> None:
        group, first, count, size, blocks, generation = struct.unpack_from(">6I", item.regions[0], 4)
        g = self._geometry
        if group >= g.groups or first + blocks > g.group_blocks or size != g.inode_size:
            raise CorruptError("the log makes inodes where none can be")
        if count != blocks << g.inode_bits:
            raise CorruptError("the log makes another number of inodes than there is room for")
        start = (group * g.group_blocks + first) * g.block_size
        length = g.cluster_blocks * g.block_size // BLOCK
        for cluster in range(0, blocks, g.cluster_blocks):
            if ((start + cluster * g.block_size) // BLOCK, length) in self._cancelled:
                return
        number = (group << (g.group_bits + g.inode_bits)) | (first << g.inode_bits)
        for index in range(count):
            inode = bytearray(size)
            inode[:2] = b"IN"
            inode[4] = 3
            struct.pack_into(">II", inode, 92, generation, MASK32)
            struct.pack_into(">Q", inode, 152, number + index)
            inode[160:176] = g.uuid
            self._pages.write(start + index * size, _summed(inode))

    def _inode(self, item: Item, lsn: int) -> None:
        head, core = item.regions[0], item.regions[1] if item.total > 1 else b""
        _, _, fields, _, _ = struct.unpack_from("<HHIHH", head)
        block, length, offset = struct.unpack_from("<qii", head, len(head) - 16)
        if (block, length) in self._cancelled:
            return
        size = self._geometry.inode_size
        place = block * BLOCK + offset
        old = self._pages.read(place, size)
        if old[:2] != b"IN" or core[:2] != b"NI" or len(core) < CORE or core[4] != 3:
            raise CorruptError(f"the log has an inode for byte {place}, where none is")
        there = int.from_bytes(old[112:120], "big")
        if there != NO_LSN and there > lsn:
            return
        inode = bytearray(old)
        inode[:CORE] = _core(bytes(core[:CORE]), old, lsn)
        room = inode[82] * 8
        if room > size - CORE:
            raise CorruptError(f"the log has an inode for byte {place} with a fork outside it")
        if inode[5] == META_BTREE:
            raise NotReplayedError("the file system has inodes of a later version")
        regions = list(item.regions[2:])
        if fields & DEVICE:
            inode[CORE : CORE + 4] = bytes(head[len(head) - 32 : len(head) - 28])[::-1]
        if fields & DATA_FORK and regions:
            _fork(inode, CORE, room or size - CORE, bytes(regions.pop(0)), is_root=bool(fields & DATA_ROOT))
        if fields & ATTR_FORK and regions:
            start = CORE + room
            _fork(inode, start, size - start, bytes(regions.pop(0)), is_root=bool(fields & ATTR_ROOT))
        self._pages.write(place, _summed(inode))


def _runs(bits: int, regions: list[bytes | bytearray]) -> list[tuple[int, int]]:
    """(first bit, bits) for each region: a run of ones, or its part where a run is spread over several regions."""
    found = []
    at = 0
    for region in regions:
        rest = bits >> at
        if not rest:
            break
        at += (rest & -rest).bit_length() - 1
        ones = ~(bits >> at)
        count = min((ones & -ones).bit_length() - 1, len(region) // CHUNK)
        if not count:
            raise CorruptError("the log has a region shorter than what it says was changed")
        found.append((at, count))
        at += count
    return found


def _core(core: bytes, old: bytes, lsn: int) -> bytes:
    """An inode as it is logged, in the machine's byte order, as it is on the disk."""
    (flags,) = struct.unpack_from("<Q", core, 120)
    time = "Q" if flags & BIG_TIMES else "II"
    extents = "Q" if flags & BIG_EXTENTS else "6sH"
    form = f"HHbb2sIIIHH{extents}{time * 3}QQIIHBbIHHI4s4sQQQI12s{time}Q16s"
    made = bytearray(struct.pack(f">{form}", *struct.unpack(f"<{form}", core)))
    made[96:104] = old[96:104]  # the list of unlinked inodes, and the checksum, which is set later
    made[112:120] = lsn.to_bytes(8, "big")
    return bytes(made)


def _fork(inode: bytearray, start: int, room: int, data: bytes, *, is_root: bool) -> None:
    """A fork as it was logged: padded bytes, or the root of an extent tree in the form that memory has it in."""
    if not is_root:
        data = data[:room]
        inode[start : start + len(data)] = data
        return
    level, count = struct.unpack_from(">HH", data, 4)
    logged, fits = (len(data) - ROOT_HEADER) // 16, (room - 4) // 16
    if count > min(logged, fits):
        raise CorruptError("the log has the root of an extent tree that does not fit its inode")
    keys = data[ROOT_HEADER : ROOT_HEADER + 8 * count]
    pointers = data[ROOT_HEADER + 8 * logged :][: 8 * count]
    struct.pack_into(">HH", inode, start, level, count)
    inode[start + 4 : start + 4 + len(keys)] = keys
    at = start + 4 + 8 * fits
    inode[at : at + len(pointers)] = pointers


def _summed(inode: bytearray) -> bytes:
    """With its checksum."""
    inode[100:104] = bytes(4)
    inode[100:104] = (~crc32c(MASK32, inode) & MASK32).to_bytes(4, "little")
    return bytes(inode)
