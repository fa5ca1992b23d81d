"""Which pack holds a chunk, in LMDB: disposable, made anew from the packs.

It is kept on this machine, not in the repository, since LMDB must not be on a network file system. What another machine stored or
deleted is seen by comparing the list of packs.
Durability: changes are synced when the last user of this process closes it; after a power loss before that it is made anew.
Threads: as LMDB; a write transaction begins and ends in one call. A process may open an index as often as it likes: LMDB may be
opened once, and is shared.
"""

import contextlib
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

import lmdb

from cdpserver import mapped
from cdpserver.repository.format import Entry, Kind
from cdpserver.repository.unsynced import Unsynced, remove_torn

MAP_BYTES = 64 << 30
"""Address space: a thousand million chunks."""

READERS = 512
"""LMDB reader slots: one for each thread that reads."""

PLACE = struct.Struct("<IQIIBB")
"""Pack number, place, stored bytes, raw bytes, kind, codec."""

NUMBER = struct.Struct(">I")
TIME = struct.Struct("<Q")


_shared: dict[str, tuple[lmdb.Environment, Unsynced, int]] = {}
"""Environments by path, their changes, and how often each is open."""
_sharing = threading.Lock()


class Index:
    """Chunk id -> entry and pack."""

    def __init__(self, path: Path) -> None:
        """Makes it where there is none, and makes one that is damaged anew, empty."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = str(path.absolute())
        with _sharing:
            if self._path in _shared:
                env, self._unsynced, users = _shared[self._path]
            else:
                env, self._unsynced, users = _environment(path), Unsynced(path), 0
            self._open(env)
            _shared[self._path] = env, self._unsynced, users + 1

    def _open(self, env: lmdb.Environment) -> None:
        self._env = env
        self._chunks = self._env.open_db(b"chunks", dupsort=True, dupfixed=True)
        """Two backups at once may store the same chunk, and `gc` moves some: a chunk can be in several packs."""
        self._packs = self._env.open_db(b"packs")
        """Pack name -> its number."""
        self._names = self._env.open_db(b"names")
        """Pack number -> its name."""
        self._retained = self._env.open_db(b"retained")
        """Object -> until when the place keeps it from being deleted, at least."""
        self._briefs = self._env.open_db(b"briefs")
        """Backup -> what `Brief.pack` made of it; of an encrypted repository too."""

    @contextlib.contextmanager
    def _changing(self) -> Iterator[lmdb.Transaction]:
        self._unsynced.begin()
        with self._env.begin(write=True) as txn:
            yield txn
        mapped.keep_length(self._env, Path(self._path))

    def packs(self) -> set[str]:
        """The packs that it knows."""
        with self._env.begin(db=self._packs) as txn:
            return {bytes(key).decode() for key, _ in txn.cursor()}

    def add(self, pack: str, entries: Iterable[Entry]) -> None:
        """All chunks of a pack."""
        with self._changing() as txn:
            value = txn.get(pack.encode(), db=self._packs)
            if value is None:
                cursor = txn.cursor(db=self._names)
                number = NUMBER.unpack(cursor.key())[0] + 1 if cursor.last() else 1
                txn.put(pack.encode(), NUMBER.pack(number), db=self._packs)
                txn.put(NUMBER.pack(number), pack.encode(), db=self._names)
            else:
                number = NUMBER.unpack(value)[0]
            for e in entries:
                row = PLACE.pack(number, e.place, e.stored, e.raw, e.kind, e.codec)
                txn.put(e.id, row, db=self._chunks, dupdata=True)

    def forget(self, packs: set[str]) -> None:
        """Packs that are gone, with their chunks."""
        with self._changing() as txn:
            numbers = set()
            for pack in packs:
                value = txn.pop(pack.encode(), db=self._packs)
                if value is not None:
                    numbers.add(NUMBER.unpack(value)[0])
                    txn.delete(value, db=self._names)
                txn.delete(pack.encode(), db=self._retained)
            cursor = txn.cursor(db=self._chunks)
            lost = [(key, value) for key, value in cursor if PLACE.unpack(value)[0] in numbers]
            for key, value in lost:
                txn.delete(key, value, db=self._chunks)

    def find(self, id_: bytes) -> list[tuple[str, Entry]]:
        """(pack, entry) of each place where the chunk is, always in the same order."""
        found = []
        with self._env.begin() as txn:
            cursor = txn.cursor(db=self._chunks)
            if not cursor.set_key(id_):
                return []
            for value in list(cursor.iternext_dup()):
                number, place, stored, raw, kind, codec = PLACE.unpack(value)
                name = txn.get(NUMBER.pack(number), db=self._names)
                if name is not None:
                    found.append((bytes(name).decode(), Entry(id_, place, stored, raw, Kind(kind), codec)))
        return found

    def lacks(self, ids: Iterable[bytes]) -> bool:
        """Is any of these chunks in no pack? A microsecond for each."""
        with self._env.begin() as txn:
            cursor = txn.cursor(db=self._chunks)
            return not all(cursor.set_key(id_) for id_ in ids)

    def note_retained(self, name: str, until_ns: int) -> None:
        """The place keeps an object from being deleted until then."""
        with self._changing() as txn:
            txn.put(name.encode(), TIME.pack(until_ns), db=self._retained)

    def retained_until_ns(self, name: str) -> int:
        """As far as is known here; 0 if nothing is."""
        with self._env.begin(db=self._retained) as txn:
            value = txn.get(name.encode())
        return int(TIME.unpack(value)[0]) if value is not None else 0

    def briefs(self) -> dict[str, bytes]:
        """Those of backups that are known, and may be gone."""
        with self._env.begin(db=self._briefs) as txn:
            return {bytes(key).decode(): bytes(value) for key, value in txn.cursor()}

    def note_briefs(self, new: Mapping[str, bytes], gone: Iterable[str]) -> None:
        """What is known of more backups; of some that are gone nothing is."""
        with self._changing() as txn:
            for id_ in gone:
                txn.delete(id_.encode(), db=self._briefs)
            for id_, value in new.items():
                txn.put(id_.encode(), value, db=self._briefs)

    def close(self) -> None:
        """Nothing may be under way."""
        with _sharing:
            env, unsynced, users = _shared.pop(self._path)
            if users > 1:
                _shared[self._path] = env, unsynced, users - 1
                return
            try:
                unsynced.end(lambda: env.sync(True))
            finally:
                env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _environment(path: Path) -> lmdb.Environment:
    remove_torn(path, [Path(f"{path}-lock")])
    try:
        return _opened(path)
    except lmdb.DiskError:
        raise
    except lmdb.Error:
        for name in (path, Path(f"{path}-lock")):
            name.unlink(missing_ok=True)
        return _opened(path)


def _opened(path: Path) -> lmdb.Environment:
    mapped.allocate_lock(Path(f"{path}-lock"), READERS)
    env = lmdb.open(
        str(path), subdir=False, map_size=MAP_BYTES, max_dbs=5, sync=False, mode=0o600, max_readers=READERS
    )
    try:
        mapped.check_length(env, path)
        env.open_db(b"chunks", dupsort=True, dupfixed=True)
    except BaseException:
        env.close()
        raise
    return env
