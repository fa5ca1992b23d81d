"""The log of an XFS: where it begins and ends, its records, and the transactions in them.

    block      0                tail                    head                     N
    cycle      7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 | 6 6 6 6 6 6 6 6 6 6 6 6 6
                                [header data data][header data]

The log is a ring of blocks of 512 bytes. Each begins with the number of the round (cycle) in which it was written, or with the
magic of a record's header, behind which the cycle stands; what stood in its place is kept in the header. So the head is where the
cycle falls, and is found by halves; the last record names the tail. Records have checksums; the last ones may be torn.

Layout: "XFS Algorithms & Data Structures", Journaling Log; order of checks: fs/xfs/xfs_log_recover.c
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cdpserver import limits
from cdpserver.errors import CorruptError
from cdpserver.files.replay.overlay import MASK32, NotReplayedError, crc32c, exactly
from cdpserver.files.source import Reader

BLOCK = 512
HEADER_MAGIC = 0xFEEDBABE
HEADER_BYTES = (328, 324)
"""Of a header that the checksum covers: as 64-bit kernels have it, and 32-bit ones."""
EXTENDED_BYTES = 260
CYCLES = 64
"""Blocks whose first words a header holds; larger records have further headers."""
CYCLE_BYTES = CYCLES * BLOCK
MAX_RECORD = 256 << 10
IN_FLIGHT = 8
"""Records that may be written at once, and so be torn or missing behind one that is there."""
LITTLE_ENDIAN = 1

START, COMMIT, CONTINUE, WAS_CONTINUED, END, UNMOUNT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
CLIENTS = (0x69, 0xAA)
OPERATION = struct.Struct(">IIBBH")
TRANSACTION_MAGIC = b"NART"
TRANSACTION_BYTES = 16
REGION_COST = 256
"""Bytes that remembering a region takes beside its own."""


@dataclass(frozen=True, slots=True)
class Record:
    """A header: `length` bytes of data follow the `headers` blocks at `block`; `tail` is a block."""

    block: int
    lsn: int
    length: int
    headers: int
    operations: int
    tail: int
    raw: bytes
    """The first header."""

    @property
    def blocks(self) -> int:
        """On the disk, headers included."""
        return self.headers + -(-self.length // BLOCK)


@dataclass(slots=True)
class Item:
    """One logged thing: its regions, of which the first describes it."""

    regions: list[bytes | bytearray]
    total: int


@dataclass(slots=True)
class Transaction:
    """Items of one checkpoint; `lsn` is that of the record in which it began."""

    lsn: int
    header: bytes = b""
    items: list[Item] = field(default_factory=list)
    cost: int = 0


class Log:
    """A ring of `blocks` blocks at byte `place`."""

    def __init__(self, reader: Reader, *, place: int, blocks: int, uuid: bytes) -> None:
        if blocks < 2 * IN_FLIGHT or place + blocks * BLOCK > reader.size:
            raise CorruptError("the log's size cannot be")
        self._reader = reader
        self._place = place
        self._uuid = uuid
        self.blocks = blocks

    def read(self, block: int, count: int) -> bytes:
        """Blocks, round the end too."""
        block %= self.blocks
        here = min(count, self.blocks - block)
        data = exactly(self._reader, self._place + block * BLOCK, here * BLOCK)
        return data if here == count else data + self.read(0, count - here)

    def cycle(self, block: int) -> int:
        """In which round a block was written."""
        return cycle_of(self.read(block, 1))

    def record(self, block: int) -> Record | None:
        """The record whose header is there, if one is."""
        raw = self.read(block, 1)
        magic, cycle, version, length = struct.unpack_from(">4I", raw)
        if magic != HEADER_MAGIC:
            return None
        lsn, tail = struct.unpack_from(">QQ", raw, 16)
        (size,) = struct.unpack_from(">I", raw, 320)
        kind = int.from_bytes(raw[300:304], "big")
        if raw[304:320] != self._uuid:
            raise CorruptError("the log is another file system's")
        if kind != LITTLE_ENDIAN:
            raise NotReplayedError("the log was written by a machine of the other byte order")
        headers = max(1, -(-size // CYCLE_BYTES)) if version & 2 else 1
        if not version & 2 or version & ~3 or size > MAX_RECORD or length > MAX_RECORD:
            raise CorruptError(f"the log's record at block {block} has sizes that cannot be")
        if lsn != cycle << 32 | block or (tail & MASK32) >= self.blocks:
            raise CorruptError(f"the log's record at block {block} says that it is elsewhere")
        (operations,) = struct.unpack_from(">I", raw, 40)
        return Record(block, lsn, length, headers, operations, tail & MASK32, raw)


def cycle_of(block: bytes) -> int:
    """The word at its beginning, or behind the magic of a header."""
    first, second = struct.unpack_from(">II", block)
    return int(second if first == HEADER_MAGIC else first)


# -- head and tail


def find_head(log: Log) -> int:
    """The block behind the last one that was written in order; it may be inside the records that were in flight."""
    first, last = log.cycle(0), log.cycle(log.blocks - 1)
    if first == last:
        # The last write filled the log to its end, or all but some late records of the next round are missing.
        head, older = log.blocks, last - 1
    else:
        low, head, older = 0, log.blocks - 1, last
        while head - low > 1:
            middle = (low + head) // 2
            if log.cycle(middle) == last:
                head = middle
            else:
                low = middle
    return _first_hole(log, head, older) % log.blocks


def _first_hole(log: Log, head: int, older: int) -> int:
    """The first block of the round before among those that were in flight with the head's: what follows came out of order."""
    window = min(log.blocks, IN_FLIGHT * MAX_RECORD // BLOCK)
    start = head - window
    if start < 0:
        hole = _find_cycle(log, log.blocks + start, -start, older - 1)
        if hole is not None:
            return hole
        start = 0
    hole = _find_cycle(log, start, head - start, older)
    return head if hole is None else hole


def _find_cycle(log: Log, start: int, count: int, cycle: int) -> int | None:
    data = log.read(start, count)
    for number in range(count):
        if cycle_of(data[number * BLOCK : number * BLOCK + 8]) == cycle:
            return start + number
    return None


def last_records(log: Log, head: int, most: int, *, back: int) -> list[Record]:
    """Up to `most` records before `head`, the last one first; looked for `back` blocks far."""
    found: list[Record] = []
    step = MAX_RECORD // BLOCK
    end = head
    while len(found) < most and head - end < back:
        count = min(step, back - (head - end))
        data = log.read(end - count, count)
        for number in reversed(range(count)):
            if data[number * BLOCK : number * BLOCK + 4] != HEADER_MAGIC.to_bytes(4, "big"):
                continue
            record = log.record((end - count + number) % log.blocks)
            if record is not None and len(found) < most:
                found.append(record)
        end -= count
    return found


def find_live(log: Log) -> tuple[int, int]:
    """(tail, head): the blocks between which records are to be replayed; equal if there are none.

    CorruptError where the log is damaged other than at its head.
    """
    head = find_head(log)
    if log.cycle(head - 1) == 0:
        return head, head  # never written
    last = _last_record(log, head)
    if _ring(log, head - last.block) != last.blocks:
        # The head is inside a record, whose end never came.
        head = last.block
        last = _last_record(log, head)
    if is_unmount(log, last, head):
        return head, head
    end = _sound_end(log, head, last)
    if end != head:
        head = end
        last = _last_record(log, head)
        if is_unmount(log, last, head):
            return head, head
    return last.tail, head


def _last_record(log: Log, head: int) -> Record:
    found = last_records(log, head, 1, back=log.blocks)
    if not found:
        raise CorruptError("the log has no record before its head")
    return found[0]


def _sound_end(log: Log, head: int, last: Record) -> int:
    """`head`, or the first record of those that may have been in flight that isn't what its checksum says."""
    for record in reversed(last_records(log, head, IN_FLIGHT, back=_ring(log, head - last.tail))):
        if not is_sound(log, record):
            return record.block
    return head


def records_between(log: Log, tail: int, head: int) -> Iterator[Record]:
    """The records from `tail` to `head`, each where the one before ends. NotReplayedError if that is too much."""
    left = _ring(log, head - tail)
    if left * BLOCK > limits.REPLAY_LOG_BYTES:
        raise NotReplayedError(f"the log holds more than {limits.REPLAY_LOG_BYTES >> 20} MiB of changes")
    block = tail
    while left > 0:
        record = log.record(block)
        if record is None:
            raise CorruptError(f"the log has no record at block {block}")
        yield record
        left -= record.blocks
        block = _ring(log, block + record.blocks)
    if left:
        raise CorruptError("the log's records overlap")


def _ring(log: Log, distance: int) -> int:
    return distance % log.blocks


def is_unmount(log: Log, record: Record, head: int) -> bool:
    """The last record says that the file system was unmounted."""
    if record.operations != 1 or _ring(log, record.block + record.blocks - head):
        return False
    return bool(log.read(record.block + record.headers, 1)[9] & UNMOUNT)


def is_sound(log: Log, record: Record) -> bool:
    """Its checksum is right: over the headers, and the data as it lies on the disk."""
    (wanted,) = struct.unpack_from("<I", record.raw, 32)
    headers = log.read(record.block, record.headers)
    data = log.read(record.block + record.headers, -(-record.length // BLOCK))[: record.length]
    further = -(-record.length // CYCLE_BYTES)
    for size in HEADER_BYTES:
        found = crc32c(MASK32, headers[:32] + bytes(4) + headers[36:size])
        for number in range(1, min(further, record.headers)):
            found = crc32c(found, headers[number * BLOCK : number * BLOCK + EXTENDED_BYTES])
        if ~crc32c(found, data) & MASK32 == wanted:
            return True
    return False


# -- transactions


def unpacked(log: Log, record: Record) -> bytes:
    """The data of a record, with the first words of its blocks as they were."""
    headers = log.read(record.block, record.headers)
    count = -(-record.length // BLOCK)
    data = bytearray(log.read(record.block + record.headers, count))
    for number in range(count):
        header, slot = divmod(number, CYCLES)
        at = 44 + 4 * slot if not header else header * BLOCK + 4 + 4 * slot
        data[number * BLOCK : number * BLOCK + 4] = headers[at : at + 4]
    return bytes(data[: record.length])


def transactions(log: Log, records: Iterable[Record]) -> Iterator[Transaction]:
    """Those that are complete, in the order of their commits. NotReplayedError where one is too large to hold."""
    begun: dict[int, Transaction] = {}
    cost = seen = 0
    for record in records:
        seen += record.operations
        if seen > limits.REPLAY_OPERATIONS:
            raise NotReplayedError(f"the log holds more than {limits.REPLAY_OPERATIONS} operations")
        for number, flags, data in operations(unpacked(log, record), record.operations):
            transaction = begun.get(number)
            if transaction is None:
                if flags & START:
                    begun[number] = Transaction(record.lsn)
                continue
            act = flags & ~(END | CONTINUE)
            if act in (COMMIT, UNMOUNT):
                del begun[number]
                cost -= transaction.cost
                if act == COMMIT:
                    yield transaction
                continue
            if not act:
                _add(transaction, data)
            elif act == WAS_CONTINUED:
                _add_more(transaction, data)
            else:
                raise CorruptError(f"the log has an operation with flags {flags:#x}")
            transaction.cost += len(data) + REGION_COST
            cost += len(data) + REGION_COST
            if cost > limits.REPLAY_OPEN_BYTES:
                raise NotReplayedError(
                    f"transactions in the log take more than {limits.REPLAY_OPEN_BYTES >> 20} MiB"
                )


def operations(data: bytes, count: int) -> Iterator[tuple[int, int, bytes]]:
    """(transaction, flags, bytes) of what a record holds."""
    at = 0
    while at < len(data) and count:
        count -= 1
        number, length, client, flags, _ = OPERATION.unpack_from(data, at)
        at += OPERATION.size
        if client not in CLIENTS or at + length > len(data):
            raise CorruptError("the log has an operation that cannot be")
        yield number, flags, data[at : at + length]
        at += length


def _add(transaction: Transaction, data: bytes) -> None:
    """A region; the first one of all is the transaction's header, whole or in part."""
    if not data:
        return
    if len(transaction.header) < TRANSACTION_BYTES:
        if transaction.header or not data.startswith(TRANSACTION_MAGIC) or len(data) > TRANSACTION_BYTES:
            raise CorruptError("the log has a transaction without a header")
        transaction.header = data
        return
    last = transaction.items[-1] if transaction.items else None
    if last is not None and len(last.regions) < last.total:
        last.regions.append(data)
        return
    if len(data) < 4:
        raise CorruptError("the log has an item without a size")
    total = int.from_bytes(data[2:4], "little")
    if not total:
        raise CorruptError("the log has an item without regions")
    transaction.items.append(Item([data], total))


def _add_more(transaction: Transaction, data: bytes) -> None:
    """The rest of what the operation before began."""
    if not transaction.items:
        transaction.header += data
        if len(transaction.header) > TRANSACTION_BYTES:
            raise CorruptError("the log has a transaction with too long a header")
        return
    regions = transaction.items[-1].regions
    region = regions[-1]
    if not isinstance(region, bytearray):
        regions[-1] = region = bytearray(region)
    region += data
