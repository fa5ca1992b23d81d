"""The catalog: which timeline a disk's name means, and the rows of locks and policies. LMDB in `catalog/`, and a
plain copy in `catalog.json`.

Invariants: the copy is replaced inside the transaction of each change, before it commits, so a change that
fails is in neither, and after a crash the copy is at most one change ahead; opening for writing sets it
right. A name never comes before its timeline's directory, and an id is given once: `next_id` is durable
before it returns. Durability: each change is synced when the call returns. Threads: one writing process, the
service. Readers are other processes, with a transaction per question; one that may not write LMDB's lock file
reads the copy instead.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Self, TypeAlias, TypeVar

import lmdb

from cdpserver import durable, timeline
from cdpserver.catalog import recovery
from cdpserver.catalog.content import (
    Content,
    Entry,
    EntryState,
    check_free,
    check_group_free,
    check_no_group,
    read_copy,
)
from cdpserver.catalog.rows import Row, Table
from cdpserver.catalog.store import Store, build
from cdpserver.errors import BrokenError, CdpError, CorruptError, NotFoundError, UsageError
from cdpserver.names import check_disk_name, show
from cdpserver.state import StateDir, check_timeline_id

__all__ = ["Catalog", "Entry", "EntryState", "Row", "Table"]

Result = TypeVar("Result")

Before: TypeAlias = Callable[[], Content]
"""Everything as it is: to be asked before anything is changed, and only if it is needed."""


class Catalog:
    """The catalog of a state directory. Use `Catalog.open`; a process opens it once and not across a fork."""

    def __init__(self, state: StateDir, store: Store | None) -> None:
        self.state = state
        self._store = store

    @classmethod
    def open(cls, state: StateDir, *, writable: bool) -> Self:
        """Open the catalog; with `writable` (the service alone) it is made if the state directory is new.

        CorruptError if it is missing or damaged: then `recover` rebuilds it. A reader is content with the
        copy.
        """
        if writable and not state.catalog.exists() and recovery.is_new(state):
            build(state.catalog, Content({}, 1))
        try:
            store = Store(state.catalog, writable=writable)
        except (BrokenError, CorruptError, PermissionError):
            if writable or not state.catalog_copy.exists():
                raise
            return cls(state, None)
        catalog = cls(state, store)
        if writable:
            try:
                catalog._set_copy_right()
            except BaseException:
                catalog.close()
                raise
        return catalog

    @staticmethod
    def recover(state: StateDir) -> list[str]:
        """Rebuild a missing or unreadable catalog from its copy and the timelines; what was done, in
        sentences.

        Called by the service before it opens the catalog. A readable catalog is left alone: []. A damaged one
        is kept beside the new one. Processes that read the old one must open the catalog anew.
        """
        return recovery.recover(state)

    def close(self) -> None:
        """Close the environment."""
        if self._store is not None:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading

    def get(self, name: str) -> Entry | None:
        """The entry of a disk's full name; None for any other text."""
        try:
            check_disk_name(name)
        except UsageError:
            return None
        return self._content().entries.get(name) if self._store is None else self._store.get(name)

    def names(self) -> dict[str, Entry]:
        """All entries by full name, in order of the names."""
        return dict(sorted(self._entries().items()))

    def by_id(self, id: str) -> Entry | None:
        """The entry of a timeline's id."""
        return next((entry for entry in self._entries().values() if entry.id == id), None)

    def rows(self, table: Table) -> dict[str, Row]:
        """All rows of a table by id, in order of the ids."""
        if self._store is None:
            return dict(sorted(self._content().rows[table].items()))
        with self._store.reading() as txn:
            return dict(sorted(self._store.rows_in(txn, table).items()))

    def row(self, table: Table, id: str) -> Row | None:
        """The row of this id; None if there is none."""
        if self._store is None:
            return self._content().rows[table].get(id)
        with self._store.reading() as txn:
            return self._store.row_in(txn, table, id)

    def stamp(self) -> int | tuple[int, int]:
        """Another value after every change, whichever process makes it: what was read before it is still so while it stays."""
        if self._store is not None:
            return self._store.stamp()
        copy = self.state.catalog_copy.stat()
        return copy.st_ino, copy.st_mtime_ns

    def _entries(self) -> dict[str, Entry]:
        return self._content().entries if self._store is None else self._store.entries()

    def _content(self) -> Content:
        return read_copy(self.state.catalog_copy) if self._store is None else self._store.content()

    # --- changing

    def next_id(self) -> str:
        """A timeline id that was never given before and never will be again."""

        def take(store: Store, txn: lmdb.Transaction, content: Before) -> str:
            number = content().next_id
            store.put_next_id(txn, number + 1)
            return f"t{number}"

        return self._change(take)

    def add(self, name: str, id: str, *, created_ns: int | None = None) -> Entry:
        """Name timeline `id`; its directory exists already, and says when it was created unless told.

        RefusedError if the name is taken. Disks and VMs share one namespace: `web` and `web/vda` exclude each
        other.
        """
        check_disk_name(name)
        check_timeline_id(id)
        if created_ns is None:
            created_ns = timeline.load(self.state.timeline(id)).created_ns
        entry = Entry(name, id, "live", created_ns)

        def put(store: Store, txn: lmdb.Transaction, content: Before) -> Entry:
            before = content()
            check_free(entry, before.entries)
            check_no_group(entry, before)
            store.put(txn, entry)
            # An id that did not come from next_id must not come from it later.
            store.put_next_id(txn, max(before.next_id, int(id[1:]) + 1))
            return entry

        return self._change(put)

    def set_state(self, name: str, state: EntryState) -> Entry:
        """Mark a disk as live or as being removed; NotFoundError."""

        def put(store: Store, txn: lmdb.Transaction, content: Before) -> Entry:
            old = _existing(content(), name)
            entry = Entry(name, old.id, state, old.created_ns)
            store.put(txn, entry)
            return entry

        return self._change(put)

    def remove(self, name: str) -> Entry:
        """Forget a name, the last step of removing a disk; its id stays used. NotFoundError."""

        def delete(store: Store, txn: lmdb.Transaction, content: Before) -> Entry:
            old = _existing(content(), name)
            store.delete(txn, name)
            return old

        return self._change(delete)

    def put_row(self, table: Table, row: Row) -> None:
        """Add a row, or replace the one of its id. UsageError for what cannot be kept, RefusedError when full,
        or for a group that would be called as a disk or VM.
        """

        def put(store: Store, txn: lmdb.Transaction, content: Before) -> None:
            if table == "groups":
                check_group_free(str(row.fields.get("group")), content())
            store.put_row(txn, table, row)

        self._change(put)

    def delete_row(self, table: Table, id: str) -> Row:
        """Delete a row; what it was. NotFoundError."""

        def delete(store: Store, txn: lmdb.Transaction, content: Before) -> Row:
            old = store.row_in(txn, table, id)
            if old is None:
                raise NotFoundError(f"there is no {show(id)} in {table}", hint="list them first")
            store.delete_row(txn, table, id)
            return old

        return self._change(delete)

    def _change(self, change: Callable[[Store, lmdb.Transaction, Before], Result]) -> Result:
        """Run `change` in a write transaction and replace the copy before it commits."""
        assert self._store is not None, "opened for reading"
        try:
            with self._store.changing() as txn:
                result = change(self._store, txn, partial(self._store.content_in, txn))
                content = self._store.content_in(txn)
                self._store.put_digest(txn, content)
                durable.write_json(self.state.catalog_copy, content.to_json())
        except (CdpError, OSError):
            # The transaction is undone; so must be the copy, if not now then at the next change.
            with contextlib.suppress(CdpError, OSError):
                self._set_copy_right()
            raise
        return result

    def _set_copy_right(self) -> None:
        content = self._content()
        try:
            right = read_copy(self.state.catalog_copy) == content
        except (FileNotFoundError, CorruptError):
            right = False
        if not right:
            durable.write_json(self.state.catalog_copy, content.to_json())


def _existing(content: Content, name: str) -> Entry:
    entry = content.entries.get(name)
    if entry is None:
        raise NotFoundError(f"there is no disk {show(name)}", hint="list the disks: cdp disk list")
    return entry
