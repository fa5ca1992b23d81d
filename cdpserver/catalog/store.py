"""The LMDB environment of the catalog: opened only if whole, built whole, read and changed.

Tables: `disks`, full name -> msgpack of id, state, created_ns; `counters`, `next_id` -> 8 bytes little-endian, `digest` -> BLAKE3
of all; one for each of `rows.TABLES`, id -> msgpack of schema, fields.

Durability: a change is synced when its transaction ends; a new environment appears by rename.
Threads: a write transaction begins and ends in one `with` block, so in one thread.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import lmdb
import msgpack

from cdpserver import durable, mapped
from cdpserver.catalog.content import Content, Entry, entry_value, read_entry
from cdpserver.catalog.rows import (
    FORMAT,
    MAX_ROWS,
    TABLES,
    TABLES_BY_FORMAT,
    Row,
    Table,
    check_row,
    empty_rows,
    is_row_id,
    read_row,
)
from cdpserver.errors import BrokenError, CorruptError, NoSpaceError, RefusedError
from cdpserver.names import show

CATALOG_MAP_BYTES = 64 << 20
"""Address space of the catalog: room for 100,000 disks."""

CATALOG_READERS = 256
"""LMDB reader slots: one or two per process that looks up names."""

CATALOG_TABLES = 16
"""Named databases: seven, and room for more."""

DEFAULT_READERS = 126
"""LMDB's own, for an environment that nobody else opens."""

DATA, LOCK = "data.mdb", "lock.mdb"
DISKS = b"disks"
COUNTERS = b"counters"
NEXT_ID = b"next_id"
DIGEST = b"digest"


def damaged(path: Path, why: str) -> CorruptError:
    """The error for a catalog that `recover` must rebuild."""
    return CorruptError(f"{path} is damaged: {why}", hint="restart cdpserver: it rebuilds the catalog")


@contextlib.contextmanager
def _lmdb_errors(path: Path) -> Iterator[None]:
    """LMDB's errors as the project's."""
    try:
        yield
    except lmdb.MapFullError:
        raise NoSpaceError("the catalog is full", hint="remove disks that are no longer needed") from None
    except mapped.DAMAGE as error:
        raise damaged(path, str(error)) from error
    except lmdb.Error as error:
        if os.strerror(errno.ENOSPC) in str(error):
            raise NoSpaceError("no space left to change the catalog", hint="free space on it") from error
        raise BrokenError(f"the catalog failed: {error}", hint="look at the kernel log") from error


def build(path: Path, content: Content) -> None:
    """Make an environment with `content` in the absent directory `path`."""
    building = path.with_name(durable.TEMPORARY + path.name)
    durable.remove_tree(building)
    durable.make_dir(building)
    with _lmdb_errors(building):
        mapped.allocate_lock(building / LOCK, DEFAULT_READERS)
        env = lmdb.open(str(building), map_size=CATALOG_MAP_BYTES, max_dbs=CATALOG_TABLES, mode=0o644)
        with contextlib.closing(env):
            disks, counters = env.open_db(DISKS), env.open_db(COUNTERS)
            with env.begin(write=True) as txn:
                for entry in content.entries.values():
                    txn.put(entry.name.encode(), msgpack.packb(entry_value(entry)), db=disks)
                txn.put(NEXT_ID, content.next_id.to_bytes(8, "little"), db=counters)
                txn.put(DIGEST, content.digest(), db=counters)
                for table in TABLES:
                    db = env.open_db(table.encode(), txn)
                    for row in content.rows[table].values():
                        txn.put(row.id.encode(), check_row(row), db=db)
            mapped.keep_length(env, building / DATA)
    durable.publish(building, path)


def add_row_tables(path: Path) -> None:
    """Give an environment of an older format the tables that it lacks; durable on return, and no harm if done."""
    with _lmdb_errors(path):
        _check_head(path / DATA)
        env = lmdb.open(str(path), map_size=CATALOG_MAP_BYTES, max_dbs=CATALOG_TABLES, create=False)
        with contextlib.closing(env):
            mapped.check_length(env, path / DATA)
            with env.begin(write=True) as txn:
                for table in TABLES:
                    env.open_db(table.encode(), txn)
            mapped.keep_length(env, path / DATA)


class Store:
    """The open environment in directory `path`. A process opens it once, and not across a fork."""

    def __init__(self, path: Path, *, writable: bool, format: int = FORMAT, lock: bool = True) -> None:
        """Open it; CorruptError if it is missing or visibly damaged, BrokenError if it may not be opened.

        With an older `format` it may lack the tables that came later. Without `lock` a reader needs to write nothing, and who
        changes it meanwhile may change what is read.
        """
        self.path = path
        self._decoded: tuple[int, dict[str, Entry]] | None = None
        with _lmdb_errors(path):
            _check_head(path / DATA)
            if lock:
                mapped.allocate_lock(path / LOCK, CATALOG_READERS)
            self._env = lmdb.open(
                str(path),
                map_size=CATALOG_MAP_BYTES,
                max_dbs=CATALOG_TABLES,
                max_readers=CATALOG_READERS,
                readonly=not writable,
                create=False,
                mode=0o644,
                lock=lock,
            )
            try:
                mapped.check_length(self._env, path / DATA)
                self._disks = self._env.open_db(DISKS, create=False)
                self._counters = self._env.open_db(COUNTERS, create=False)
                self._rows = {
                    table: self._env.open_db(table.encode(), create=False)
                    for table in TABLES_BY_FORMAT[format]
                }
                if writable:
                    self._env.reader_check()
            except BaseException:
                self._env.close()
                raise

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def get(self, name: str) -> Entry | None:
        """One entry; `name` is a checked disk name."""
        key = name.encode()
        with _lmdb_errors(self.path), self._env.begin(db=self._disks) as txn:
            value = txn.get(key)
        return None if value is None else self._decode(key, value)

    def content(self) -> Content:
        """Everything, of one instant. CorruptError where it is not what was written."""
        with self.reading() as txn:
            content, digest = self.content_in(txn), txn.get(DIGEST, db=self._counters)
        if digest is not None and bytes(digest) != content.digest():
            raise damaged(self.path, "it does not say what was written")
        return content

    @contextlib.contextmanager
    def reading(self) -> Iterator[lmdb.Transaction]:
        """A read transaction; keep it short."""
        with _lmdb_errors(self.path), self._env.begin() as txn:
            yield txn

    @contextlib.contextmanager
    def changing(self) -> Iterator[lmdb.Transaction]:
        """A write transaction that commits at the end of the block, or never was if that raises."""
        with _lmdb_errors(self.path):
            with self._env.begin(write=True) as txn:
                yield txn
            mapped.keep_length(self._env, self.path / DATA)

    def content_in(self, txn: lmdb.Transaction) -> Content:
        """Everything as `txn` sees it. It is decoded: ask for less where less will do."""
        counter = txn.get(NEXT_ID, db=self._counters)
        next_id = int.from_bytes(counter, "little") if counter is not None and len(counter) == 8 else 0
        if not 1 <= next_id < 1 << 59:
            raise damaged(self.path, "its counter of ids is lost")
        tables = empty_rows() | {table: self.rows_in(txn, table) for table in self._rows}
        return Content(self.entries_in(txn), next_id, tables)

    def stamp(self) -> int:
        """Another number after every change, whichever process makes it."""
        return int(self._env.info()["last_txnid"])

    def entries(self) -> dict[str, Entry]:
        """The disks, by name; decoded once for each change of the catalog. For reading alone."""
        with self.reading() as txn:
            decoded = self._decoded
            if decoded is None or decoded[0] != txn.id():
                self._decoded = decoded = txn.id(), self.entries_in(txn)
            return decoded[1]

    def entries_in(self, txn: lmdb.Transaction) -> dict[str, Entry]:
        """The disks, by name."""
        rows = txn.cursor(db=self._disks)
        found = [self._decode(bytes(key), bytes(value)) for key, value in rows]
        return {entry.name: entry for entry in found}

    def rows_in(self, txn: lmdb.Transaction, table: Table) -> dict[str, Row]:
        """The rows of a table, by id."""
        rows = txn.cursor(db=self._rows[table])
        found = [self._decode_row(table, bytes(key), bytes(value)) for key, value in rows]
        return {row.id: row for row in found}

    def row_in(self, txn: lmdb.Transaction, table: Table, id: str) -> Row | None:
        """The row of this id; None also for what is no id."""
        value = txn.get(id.encode(), db=self._rows[table]) if is_row_id(id) else None
        return None if value is None else self._decode_row(table, id.encode(), bytes(value))

    def put(self, txn: lmdb.Transaction, entry: Entry) -> None:
        """Add or replace an entry."""
        txn.put(entry.name.encode(), msgpack.packb(entry_value(entry)), db=self._disks)

    def delete(self, txn: lmdb.Transaction, name: str) -> None:
        """Delete the entry of a checked disk name."""
        txn.delete(name.encode(), db=self._disks)

    def put_next_id(self, txn: lmdb.Transaction, number: int) -> None:
        """Set the counter of ids."""
        txn.put(NEXT_ID, number.to_bytes(8, "little"), db=self._counters)

    def put_digest(self, txn: lmdb.Transaction, content: Content) -> None:
        """Note what all of it comes to: the last thing that a change does."""
        txn.put(DIGEST, content.digest(), db=self._counters)

    def put_row(self, txn: lmdb.Transaction, table: Table, row: Row) -> None:
        """Add or replace a row. UsageError for one that cannot be kept, RefusedError if the table is full."""
        packed, key, db = check_row(row), row.id.encode(), self._rows[table]
        if txn.get(key, db=db) is None and txn.stat(db)["entries"] >= MAX_ROWS:
            raise RefusedError(f"there are {MAX_ROWS} {table} already", hint="remove those no longer needed")
        txn.put(key, packed, db=db)

    def delete_row(self, txn: lmdb.Transaction, table: Table, id: str) -> None:
        """Delete the row of an id that a row has had."""
        txn.delete(id.encode(), db=self._rows[table])

    def _decode_row(self, table: Table, key: bytes, value: bytes) -> Row:
        try:
            return read_row(key.decode(), msgpack.unpackb(value), self.path)
        except (ValueError, msgpack.exceptions.UnpackException, CorruptError) as error:
            raise damaged(
                self.path, f"row {show(key.decode(errors='replace'))} of {table}: {error}"
            ) from None

    def _decode(self, key: bytes, value: bytes) -> Entry:
        try:
            return read_entry(key.decode(), msgpack.unpackb(value), self.path)
        except (ValueError, msgpack.exceptions.UnpackException, CorruptError) as error:
            raise damaged(self.path, f"disk {show(key.decode(errors='replace'))}: {error}") from None


def _check_head(data: Path) -> None:
    # LMDB takes an empty file for a new environment and would make it one.
    if not data.is_file() or data.stat().st_size < 2 * os.sysconf("SC_PAGESIZE"):
        raise damaged(data, "it is missing or cut short")
