"""XFS (version 5) as after the recovery of its log."""

import struct

from cdpserver import limits
from cdpserver.errors import CorruptError
from cdpserver.files.replay.overlay import NotReplayedError, Pages, Replaced, exactly
from cdpserver.files.replay.remarks import MOUNT, Replayed, done
from cdpserver.files.replay.xfsitems import INTENTS, VISIBLE, Cancelled, Geometry, Replay
from cdpserver.files.replay.xfslog import BLOCK, Log, find_live, is_sound, records_between, transactions
from cdpserver.files.source import Reader

MAGIC = b"XFSB"
LOG_ATTRIBUTES = 0x1
"""The one feature of a log that is known."""


def replay_xfs(reader: Reader) -> Replayed:
    """CorruptError or NotReplayedError where the kernel would not recover it either, or this module doesn't know how."""
    raw = exactly(reader, 0, BLOCK)
    log = open_log(reader, raw)
    tail, head = find_live(log)
    if tail == head:
        return Replayed(reader)
    (version,) = struct.unpack_from(">H", raw, 100)
    (features,) = struct.unpack_from(">I", raw, 220)
    if version & 0xF != 5:
        raise NotReplayedError("it is of a version before 5")
    if features & ~LOG_ATTRIBUTES:
        raise NotReplayedError("its log has features of a later version")
    for record in records_between(log, tail, head):
        if not is_sound(log, record):
            raise CorruptError(f"the checksum of the log's record at block {record.block} is wrong")
    geometry = Geometry.parse(raw)
    cancelled = Cancelled(transactions(log, records_between(log, tail, head)))
    pages = Pages(reader, limit=limits.REPLAY_CHANGED_BYTES)
    replay = Replay(pages, geometry, cancelled)
    count = 0
    for transaction in transactions(log, records_between(log, tail, head)):
        replay.apply(transaction)
        count += 1
    replay.finish()
    return done(Replaced(reader, unit=Pages.SIZE, blocks=pages.pages), count, *_unfinished(cancelled))


def open_log(reader: Reader, raw: bytes) -> Log:
    """The internal log; `raw` is the superblock. NotReplayedError if it is elsewhere."""
    (size,), (start,) = struct.unpack_from(">I", raw, 4), struct.unpack_from(">Q", raw, 48)
    group_blocks, _, _, blocks = struct.unpack_from(">4I", raw, 84)
    bits = raw[124]
    if not start:
        raise NotReplayedError("its log is on another device")
    if size not in {512 << n for n in range(8)} or bits > 32:
        raise CorruptError("the sizes in the superblock cannot be")
    group, block = start >> bits, start & ((1 << bits) - 1)
    place = (group * group_blocks + block) * size
    return Log(reader, place=place, blocks=blocks * size // BLOCK, uuid=raw[32:48])


def _unfinished(cancelled: Cancelled) -> tuple[str, ...]:
    kinds = cancelled.unfinished()
    if not kinds:
        return ()
    what = ", ".join(f"{INTENTS[kind]}: {count}" for kind, count in sorted(kinds.items()))
    if kinds.keys() & VISIBLE:
        return (
            f"operations of several steps were not finished ({what}): their files may be as before: {MOUNT}",
        )
    return (f"operations of several steps were not finished ({what}), which no file shows",)
