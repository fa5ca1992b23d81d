"""One interval's index: an LMDB environment in one file, written by the indexer, read by everyone.

Invariants: the seq indexed so far is stored in the transaction of its entries, so a snapshot is a whole prefix of the journal;
entries of an interval are never changed or removed, so a newer snapshot answers older questions alike.
Durability: none while the interval is open (it is rebuilt after a boot, hence the boot id in its name); a closed interval's
index is synced and renamed into place.
LMDB lets a process open an environment once: `open_index` shares them. One that nobody uses is kept for a while, and then closed
by a thread that runs as long as there are some: what was dropped gives its room back, and a process at rest holds none.
"""

import contextlib
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import lmdb
import msgpack

from cdpserver import mapped
from cdpserver.index.pieces import LEVEL_BITS
from cdpserver.journal import control
from cdpserver.limits import INDEX_MAP_BYTES, INDEX_READERS

CLOSED_NAME = "index.mdb"
OPEN_PREFIX = "open-"
POINT = struct.Struct("<QQQQQBB")
SEQ = struct.Struct("<Q")
NAMED = (b"mark/", b"cut/")
"""How the keys begin under which control records are also filed; no seq is as great as these are as numbers."""

OPEN_ENVIRONMENTS = 512
"""Index environments kept open per process, beyond those in use; each costs two or three file descriptors and address space."""

LINGER_S = 10.0
"""How long one stays open that nobody uses: a client with several connections, or a look at many disks, finds it open."""


@dataclass(frozen=True, slots=True)
class PointRow:
    """What happened in one second of record time."""

    second: int
    last_seq: int
    last_time_ns: int
    records: int
    payload_bytes: int
    session: int
    grade: int
    evidence: int

    def pack(self) -> bytes:
        """The row's value."""
        return POINT.pack(
            self.last_seq,
            self.last_time_ns,
            self.records,
            self.payload_bytes,
            self.session,
            self.grade,
            self.evidence,
        )

    @classmethod
    def unpack(cls, key: bytes, value: bytes) -> Self:
        """The row from its key and value."""
        return cls(int.from_bytes(key, "big"), *POINT.unpack(value))


def open_name(boot_id: str) -> str:
    """File name of an open interval's index."""
    return f"{OPEN_PREFIX}{boot_id[:8]}.mdb"


def may_lock(path: Path) -> bool:
    """Does a reader note itself beside an index? Not where nobody writes it: a closed one, or one on read-only media."""
    if path.name == CLOSED_NAME:
        return False
    if os.access(path.parent, os.W_OK) or os.access(f"{path}-lock", os.W_OK):
        return True
    if path.name.startswith(OPEN_PREFIX) and not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise lmdb.Error(f"{path}: it may be written by another user")
    return False


class IndexFile:
    """An open environment. Use `open_index`."""

    def __init__(self, path: Path, *, writable: bool, lock: bool = True) -> None:
        """Without `lock` no reader is noted beside the file: only for one that nobody writes any more.

        Where nothing may be written there is no lock. lmdb.Error for an open interval's index that others may be writing, and for
        one that is damaged as far as can be seen at once.
        """
        self.path = path
        lock = lock and (writable or may_lock(path))
        if lock:
            mapped.allocate_lock(Path(f"{path}-lock"), INDEX_READERS)
        self.env = lmdb.open(
            str(path),
            subdir=False,
            map_size=INDEX_MAP_BYTES,
            max_dbs=4,
            max_readers=INDEX_READERS,
            readonly=not writable,
            lock=lock,
            sync=False,
            create=writable,
            mode=0o600,
            max_spare_txns=8,
        )
        try:
            mapped.check_length(self.env, path)
            # A writer killed right after making the file left it without its databases.
            self.pieces = self.env.open_db(b"pieces", create=writable)
            self.points = self.env.open_db(b"points", create=writable)
            self.control = self.env.open_db(b"control", create=writable)
            self.meta = self.env.open_db(b"meta", create=writable)
            self.inode = path.stat().st_ino
        except BaseException:
            self.env.close()
            raise
        self.users = 0
        self.unused_since_s = 0.0

    @contextlib.contextmanager
    def changing(self) -> Iterator[lmdb.Transaction]:
        """A write transaction that commits at the end of the block."""
        with self.env.begin(write=True) as txn:
            yield txn
        mapped.keep_length(self.env, self.path)

    def snapshot(self) -> "Snapshot":
        """A consistent view of the index as it is now. Close it soon: it keeps LMDB from reusing pages."""
        return Snapshot(self)

    def indexed(self) -> int:
        """Seq of the last record indexed; 0 for none."""
        with self.env.begin(buffers=False) as txn:
            value = txn.get(b"indexed", db=self.meta)
        return SEQ.unpack(value)[0] if value else 0


class Snapshot:
    """A read transaction with the questions that views ask of an interval's index."""

    __slots__ = ("cursor", "file", "indexed", "levels", "txn")

    def __init__(self, file: IndexFile) -> None:
        self.file = file
        self.txn = file.env.begin()
        self.cursor = self.txn.cursor(db=file.pieces)
        value = self.txn.get(b"indexed", db=file.meta)
        self.indexed: int = SEQ.unpack(value)[0] if value else 0
        levels = self.txn.get(b"levels", db=file.meta)
        self.levels: int = levels[0] if levels else 0

    def newest(self, unit: int, seq: int) -> tuple[int, int] | None:
        """(seq, value) of the newest piece of `unit` at or before `seq`."""
        prefix = unit.to_bytes(6, "big")
        cursor = self.cursor
        if cursor.set_range(prefix + (seq + 1).to_bytes(8, "big")):
            if not cursor.prev():
                return None
        elif not cursor.last():
            return None
        key = cursor.key()
        if key[:6] != prefix:
            return None
        return int.from_bytes(key[6:], "big"), int.from_bytes(cursor.value(), "little")

    def pieces(self, level: int, first: int, end: int, seq: int) -> list[tuple[int, int, int]]:
        """(block number at the level, seq, value) of the newest pieces of blocks [first, end), ascending."""
        found = []
        cursor = self.cursor
        top = level << LEVEL_BITS
        after = (seq + 1).to_bytes(8, "big")
        block = first
        while block < end:
            prefix = (top | block).to_bytes(6, "big")
            following = cursor.key() if cursor.set_range(prefix + after) else b""
            if (following and cursor.prev()) or (not following and cursor.last()):
                key = cursor.key()
                if key[:6] == prefix:
                    found.append(
                        (block, int.from_bytes(key[6:], "big"), int.from_bytes(cursor.value(), "little"))
                    )
            if not following:
                return found
            unit = int.from_bytes(following[:6], "big")
            # Newer pieces of this very block may follow it; else the next block that has any piece.
            block = max(block + 1, unit - top) if unit >> LEVEL_BITS == level else end
        return found

    def points(self, first_second: int, end_second: int) -> Iterator[PointRow]:
        """Rows of the seconds [first, end), ascending."""
        cursor = self.txn.cursor(db=self.file.points)
        going = cursor.set_range(first_second.to_bytes(8, "big"))
        while going:
            key, value = cursor.item()
            if int.from_bytes(key, "big") >= end_second:
                return
            yield PointRow.unpack(key, value)
            going = cursor.next()

    def point_count(self) -> tuple[int, int, int]:
        """(rows, first second, last second); zeros without any."""
        cursor = self.txn.cursor(db=self.file.points)
        if not cursor.first():
            return 0, 0, 0
        first = int.from_bytes(cursor.key(), "big")
        cursor.last()
        rows = int(self.txn.stat(self.file.points)["entries"])
        return rows, first, int.from_bytes(cursor.key(), "big")

    def slot_count(self, slot_s: int, end_slot: int) -> tuple[int, int, int]:
        """(slots of so many seconds before `end_slot` that have rows, the first, the last); zeros without any."""
        keys = self.txn.cursor(db=self.file.points).iternext(keys=True, values=False)
        slots = {slot for key in keys if (slot := int.from_bytes(key, "big") // slot_s) < end_slot}
        return (len(slots), min(slots), max(slots)) if slots else (0, 0, 0)

    def controls(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(seq, time, message) of every control record, ascending."""
        cursor = self.txn.cursor(db=self.file.control)
        for key, value in cursor:
            # `mark/now` has eight bytes too.
            if len(key) == SEQ.size and not key.startswith(NAMED):
                yield int.from_bytes(key, "big"), SEQ.unpack_from(value)[0], msgpack.unpackb(value[8:])

    def named(self, key: str) -> tuple[int, int, dict[str, Any]] | None:
        """(seq, time, message) of the control record filed as `mark/NAME` or `cut/N`."""
        value = self.txn.get(key.encode(), db=self.file.control)
        if value is None:
            return None
        return SEQ.unpack_from(value)[0], SEQ.unpack_from(value, 8)[0], msgpack.unpackb(value[16:])

    def state(self) -> control.State | None:
        """The timeline's state after the last record indexed."""
        value = self.txn.get(b"state", db=self.file.meta)
        return control.unpack(msgpack.unpackb(value)) if value else None

    def close(self) -> None:
        """End the transaction."""
        self.txn.abort()


_open: "OrderedDict[Path, IndexFile]" = OrderedDict()
_open_lock = threading.Lock()
_closes = False
"""Is there a thread that closes what nobody uses?"""


def find_index(interval: Path, boot_id: str) -> Path | None:
    """The usable index of an interval: that of the closed interval, or the open one made since this boot."""
    for name in (CLOSED_NAME, open_name(boot_id)):
        path = interval / name
        if path.exists():
            return path
    return None


def open_index(path: Path) -> IndexFile | None:
    """The environment at `path` for reading, shared within the process; None when it is gone, or not whole yet.

    Give it back with `release`. An environment whose file was replaced since is not given out again.
    """
    with _open_lock:
        try:
            inode = path.stat().st_ino
            found = _open.get(path)
            if found is not None and found.inode != inode:
                del _open[path]
                if found.users == 0:
                    found.env.close()
                found = None
            if found is None:
                found = IndexFile(path, writable=False)
                if found.inode != inode:  # replaced while it was opened: nobody knows which of the two it is
                    found.env.close()
                    return None
        except (FileNotFoundError, lmdb.Error):
            return None
        _open[path] = found
        _open.move_to_end(path)
        found.users += 1
        for old_path, old in list(_open.items()):
            if len(_open) <= OPEN_ENVIRONMENTS:
                break
            if old.users == 0:
                old.env.close()
                del _open[old_path]
        return found


def release(file: IndexFile) -> None:
    """A user of `open_index` is done with it."""
    global _closes
    with _open_lock:
        file.users -= 1
        if file.users:
            return
        if _open.get(file.path) is not file:
            file.env.close()
            return
        file.unused_since_s = time.monotonic()
        if not _closes:
            try:
                threading.Thread(target=_keep_closing, daemon=True, name="indexes").start()
                _closes = True
            except RuntimeError:  # no thread is to be had
                file.env.close()
                del _open[file.path]


def _keep_closing() -> None:
    """Until there is nothing left that nobody uses."""
    while close_unused(time.monotonic()):
        time.sleep(LINGER_S / 2)


@contextlib.contextmanager
def none_opened() -> Iterator[None]:
    """No thread opens an environment inside."""
    with _open_lock:
        yield


def _forked() -> None:
    """In a child, which has none of its parent's threads."""
    global _closes
    _closes = False
    _open_lock.release()


os.register_at_fork(before=_open_lock.acquire, after_in_parent=_open_lock.release, after_in_child=_forked)


def close_unused(now_s: float) -> bool:
    """Close what nobody has used for a while, at a time of the monotonic clock. Is there more that nobody uses?"""
    global _closes
    with _open_lock:
        unused = [file for file in _open.values() if file.users == 0]
        late = [file for file in unused if now_s >= file.unused_since_s + LINGER_S]
        for file in late:
            file.env.close()
            del _open[file.path]
        _closes = len(unused) > len(late)
        return _closes
