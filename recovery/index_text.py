"""An interval's index as text: how far it has come, the state there, its points, control records and pieces, in key order.

Rows are read a batch at a time, each in a read transaction of its own, so that neither memory nor the pages that LMDB has to
keep grow with the index. That is sound because entries are never changed: what came after the first look is left out.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from cdpserver.errors import BrokenError, CdpError, CorruptError, NotFoundError, UsageError
from cdpserver.index.pieces import BLOCK_MASK, KIND_BITS, LEVEL_BITS, REST_MASK, SEGMENT_BITS, SHIFTS
from cdpserver.index.store import NAMED, OPEN_PREFIX, POINT, SEQ, IndexFile, PointRow
from cdpserver.journal import control
from cdpserver.journal.control import Grade
from cdpserver.journal.record import CHANGES, Kind
from cdpserver.limits import BLOCK
from recovery.item import Item

BATCH = 10_000
"""Rows read in one transaction: about 20 ms."""

HINT = "name an index: index.mdb or open-BOOT.mdb (cdp timeline show DISK lists them)"
REBUILD = "cdp index rebuild DISK makes it anew; nothing is lost"
KEY_BYTES, VALUE_BYTES = 14, 8
_BLOCK_MASK = (1 << LEVEL_BITS) - 1


def open_index(path: Path) -> IndexFile:
    """The index at `path`, read-only. NotFoundError, UsageError, CorruptError."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no file {path}", hint=HINT) from None
    except ValueError:
        raise UsageError(f"{str(path)!r} is no path", hint=HINT) from None
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path} is not a file", hint=HINT)
    try:
        # Only the index of an open interval is written to: beside that, LMDB notes who reads.
        return IndexFile(path, writable=False, lock=path.name.startswith(OPEN_PREFIX))
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.NotFoundError) as error:
        raise CorruptError(f"{path} is no index, or a damaged one: {error}", hint=REBUILD) from None
    except lmdb.Error as error:
        raise BrokenError(f"{path} cannot be opened: {error}", hint="run cdp as its owner") from None


def items(path: Path) -> Iterator[Item]:
    """Everything in the index at `path`. CorruptError if LMDB itself finds damage."""
    file = open_index(path)
    try:
        yield from _Index(file).items()
    except lmdb.Error as error:
        raise CorruptError(f"{path} cannot be read on: {error}", hint=REBUILD) from None
    finally:
        file.env.close()


class _Index:
    def __init__(self, file: IndexFile) -> None:
        self._file = file
        with file.env.begin() as txn:
            self._meta = {bytes(key): bytes(value) for key, value in txn.cursor(db=file.meta)}
            tables = {"points": file.points, "control": file.control, "pieces": file.pieces}
            self._rows_held = {name: int(txn.stat(db)["entries"]) for name, db in tables.items()}
        self._indexed = -1

    def items(self) -> Iterator[Item]:
        yield from self._head()
        for key, value in self._rows(self._file.points):
            yield _point(key, value)
        for key, value in self._rows(self._file.control):
            item = _control(key, value)
            if not self._is_new(item):
                yield item
        for key, value in self._rows(self._file.pieces):
            item = _piece(key, value)
            if not self._is_new(item):
                yield item

    def _is_new(self, item: Item) -> bool:
        seq: int = item.fields.get("seq", 0)
        return 0 <= self._indexed < seq

    def _rows(self, table: Any) -> Iterator[tuple[bytes, bytes]]:
        after = b""
        while True:
            with self._file.env.begin(db=table) as txn:
                cursor = txn.cursor()
                if not (cursor.set_range(after + b"\0") if after else cursor.first()):
                    return
                rows = list(islice(cursor, BATCH))
            yield from rows
            after = rows[-1][0]

    def _head(self) -> Iterator[Item]:
        meta = self._meta
        fields: dict[str, Any] = {"file": self._file.path.name}
        damage = []
        indexed = meta.pop(b"indexed", b"")
        if len(indexed) == SEQ.size:
            self._indexed = fields["indexed"] = SEQ.unpack(indexed)[0]
        elif indexed or self._rows_held["pieces"]:
            damage.append("how far it has come cannot be read")
        levels = meta.pop(b"levels", b"\0")
        fields["levels"] = [level for level in range(8) if levels[:1] and levels[0] >> level & 1]
        if len(levels) != 1:
            damage.append("its levels cannot be read")
        yield Item("index", fields | self._rows_held, "; ".join(damage))
        state = meta.pop(b"state", None)
        if state is not None:
            yield _state(state)
        for key, value in sorted(meta.items()):
            yield Item("meta", {"key": key.hex(), "value": value.hex()}, "it is not known")


def _state(value: bytes) -> Item:
    try:
        return Item("state", control.pack(control.unpack(msgpack.unpackb(value))))
    except (CorruptError, ValueError, msgpack.exceptions.UnpackException):
        return Item("state", {"value": value.hex()}, "it cannot be read")


def _point(key: bytes, value: bytes) -> Item:
    if len(key) != SEQ.size or len(value) != POINT.size:
        return _unreadable("point", key, value)
    fields = asdict(PointRow.unpack(key, value))
    try:
        fields["grade"] = Grade(fields["grade"]).label
    except ValueError:
        return Item("point", fields, "its grade is none")
    return Item("point", fields)


def _control(key: bytes, value: bytes) -> Item:
    """A control record by its seq, or under the name that it is looked up by."""
    fields: dict[str, Any] = {}
    if len(key) == SEQ.size and not key.startswith(NAMED):
        fields["seq"] = int.from_bytes(key, "big")
    else:
        if len(value) <= 2 * SEQ.size:
            return _unreadable("named", key, value)
        fields["name"] = key.decode(errors="backslashreplace")
        fields["seq"] = SEQ.unpack_from(value)[0]
        value = value[SEQ.size :]
    what = "named" if "name" in fields else "control"
    if len(value) <= SEQ.size:
        return _unreadable(what, key, value)
    fields["time_ns"] = SEQ.unpack_from(value)[0]
    try:
        return Item(what, fields | {"message": control.decode(value[SEQ.size :])})
    except CdpError as error:
        return Item(what, fields, error.message)


def _piece(key: bytes, value: bytes) -> Item:
    if len(key) != KEY_BYTES or len(value) != VALUE_BYTES:
        return _unreadable("piece", key, value)
    unit = int.from_bytes(key[:6], "big")
    content = int.from_bytes(value, "little")
    level, kind, rest = unit >> LEVEL_BITS, content >> KIND_BITS, content & REST_MASK
    if level >= len(SHIFTS) or kind not in CHANGES:
        return _unreadable("piece", key, value)
    length = BLOCK << SHIFTS[level]
    fields = {
        "level": level,
        "offset": (unit & _BLOCK_MASK) * length,
        "length": length,
        "seq": int.from_bytes(key[6:], "big"),
        "kind": Kind(kind).name.lower(),
    }
    if kind == Kind.DATA:
        fields |= {"segment": rest >> SEGMENT_BITS, "place": (rest & BLOCK_MASK) * BLOCK}
    elif kind == Kind.SAME:
        fields["ref"] = rest
    elif rest:
        return Item("piece", fields | {"rest": rest}, "its value says more than its kind has")
    return Item("piece", fields)


def _unreadable(what: str, key: bytes, value: bytes) -> Item:
    return Item(what, {"key": key.hex(), "value": value.hex()}, "it cannot be read")
