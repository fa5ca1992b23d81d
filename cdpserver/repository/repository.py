"""A repository: made, opened, and its chunks and backups read and written.

Invariants: a pack is durable before a chunk in it is known; a backup's name appears after all of its chunks are durable. A name
that is there is a whole backup, and one that was killed leaves at most chunks that `gc` takes away.
A chunk in a doomed pack counts as not there: who finds it so stores it anew (gc.py says why that is safe). So does one that was
found damaged (damaged.py).
"""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from blake3 import blake3

from cdpserver.errors import CdpError, CorruptError, NotFoundError, RefusedError
from cdpserver.names import show
from cdpserver.repository import clock, format, sessions
from cdpserver.repository.configuration import (
    AES,
    CONFIG,
    PLAIN,
    Config,
    check_chunk_size,
    config_bytes,
    config_from,
)
from cdpserver.repository.damaged import Damaged
from cdpserver.repository.format import Entry, Kind
from cdpserver.repository.index import Index
from cdpserver.repository.place import Place
from cdpserver.repository.record import Backup, Brief
from cdpserver.repository.seal import Keys, Sealer, derive_keys

CHECK = "cdp repo check says what that touches"

LISTED = "listed"
"""Where every backup that was made has a name, until it is removed."""

DEFAULT_CHUNK = 256 << 10
"""By measurement: docs/backup.md has the table."""

BACKUP_MAGIC, PATCHED_MAGIC = b"cdpback1", b"cdpback2"
"""The second where places are patched: a program that does not know of patches refuses it, and so does its `gc`."""

BACKUP_ID = b"backup".ljust(32, b"\0")


def create(
    place: Place, *, chunk_size: int = DEFAULT_CHUNK, secret: bytes | None = None, immutable_ns: int = 0
) -> Config:
    """Make a repository in an empty place. RefusedError where there is something already, or where nothing can be immutable."""
    check_chunk_size(chunk_size)
    _check_empty(place)
    salt = secrets.token_bytes(16)
    proof = derive_keys(secret, salt).proof if secret is not None else b""
    cipher = PLAIN if secret is None else AES
    config = Config(secrets.token_bytes(16), chunk_size, cipher, salt, proof, time.time_ns(), immutable_ns)
    _put_config(place, config)
    return config


def _check_empty(place: Place) -> None:
    if find_config(place) is not None:
        raise RefusedError(f"{place.where} is a repository already", hint=f"cdp repo show {place.where}")
    if any(True for _ in place.names("packs")) or any(True for _ in place.names("backups")):
        raise RefusedError(
            f"{place.where} has packs or backups, but no {CONFIG}",
            hint=f"put {CONFIG} back, or choose an empty place",
        )


def _put_config(place: Place, config: Config) -> None:
    now_ns = place.now_ns()
    if now_ns is not None and config.immutable_ns and not place.locks:
        raise RefusedError(
            f"{place.where} is in a bucket without object lock, so nothing in it can be immutable",
            hint="make a bucket with object lock (it cannot be added to every one later), or leave --immutable out",
        )
    until_ns = _retain_until_ns(now_ns or 0, config.immutable_ns) if place.locks else 0
    place.put(CONFIG, config_bytes(config), until_ns)
    if now_ns is None:
        clock.visit(place, lambda: 0)


def _retain_until_ns(now_ns: int, immutable_ns: int) -> int:
    """How long what backups share is retained: longer than any one that is made now, for those to come."""
    return now_ns + immutable_ns + immutable_ns // 4 if immutable_ns else 0


def adopt(place: Place, config: Config) -> None:
    """Make an empty place the repository that `config` is of, as an import does. RefusedError as for `create`."""
    _check_empty(place)
    _put_config(place, config)


def load_config(place: Place) -> Config:
    """NotFoundError where there is no repository; CorruptError, RefusedError for one of a newer version."""
    found = find_config(place)
    if found is None:
        raise NotFoundError(
            f"there is no repository in {place.where}", hint=f"cdp repo init {place.where} makes one"
        )
    return found


def find_config(place: Place) -> Config | None:
    """None where there is no repository."""
    try:
        return config_from(place.get(CONFIG), place.where)
    except (FileNotFoundError, NotADirectoryError):
        return None


def default_cache() -> Path:
    """Where indexes are kept on this machine."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cdpserver"


class Repository:
    """An open repository. Threads: `load` any; the rest one."""

    def __init__(self, place: Place, *, secret: bytes | None = None, cache: Path | None = None) -> None:
        """RefusedError for a wrong key, or none where one is needed."""
        self.place = place
        self.config = load_config(place)
        self._sealer = Sealer(self._keys(secret))
        folder = cache if cache is not None else default_cache()
        self.index = Index(folder / f"repo-{self.config.id.hex()}.mdb")
        self.doomed: frozenset[str] = frozenset()
        self.damaged = Damaged(place)
        self._zeros: dict[int, bytes] = {}
        try:
            self.refresh()
        except BaseException:
            self.index.close()
            raise

    def _keys(self, secret: bytes | None) -> Keys | None:
        if self.config.cipher == PLAIN:
            return None
        if secret is None:
            raise RefusedError(f"{self.place.where} is encrypted", hint="give --key-file or --key-command")
        keys = derive_keys(secret, self.config.salt)
        if keys.proof != self.config.proof:
            raise RefusedError(f"this is not the key of {self.place.where}", hint="give the right --key-file")
        return keys

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk; the last one of a disk may be shorter."""
        return self.config.chunk_size

    def now_ns(self) -> int:
        """How late it is: by the place's own clock, else by what was lived through (clock.py)."""
        there = self.place.now_ns()
        if there is not None:
            return there
        return clock.visit(self.place, lambda: max((b.since_ns for b in self.backups()), default=0))

    def retain_until_ns(self) -> int:
        """For what is put now; 0 where nothing is immutable, or the place has no means to see to it."""
        if not self.config.immutable_ns or not self.place.locks:
            return 0
        return _retain_until_ns(self.now_ns(), self.config.immutable_ns)

    # -- packs

    def refresh(self) -> list[str]:
        """Take in what others stored and deleted; the packs that cannot be read."""
        # In this order: what another process stores meanwhile is not known yet, so it is not taken for gone.
        known = self.index.packs()
        there = dict(self.place.names("packs"))
        if gone := known - there.keys():
            self.index.forget(gone)
        unreadable = []
        for pack in sorted(there.keys() - known):
            try:
                self.index.add(pack, self.entries(pack, there[pack]))
            except FileNotFoundError:
                continue
            except CorruptError:
                unreadable.append(pack)
        self.doomed = frozenset(sessions.doomed(self.place))
        self.damaged.refresh()
        return unreadable

    def entries(self, pack: str, length: int) -> list[Entry]:
        """What a pack holds, from the rows at its end, else from the entries in it."""
        try:
            tail_at = length - format.TAIL_SIZE
            if tail_at < format.HEAD.size:
                raise CorruptError(f"{pack} is cut short")
            place, count, crc = format.parse_tail(self.place.read(pack, tail_at, format.TAIL_SIZE), length)
            return format.parse_rows(self.place.read(pack, place, count * format.ROW.size), place, crc)
        except CorruptError:
            return list(format.scan(self.place.get(pack), self.config.id))

    def is_ours(self, pack: str) -> bool:
        """Does its head say that it is a pack of this repository?"""
        try:
            return self.place.read(pack, 0, format.HEAD.size) == format.pack_head(self.config.id)
        except FileNotFoundError:
            return True  # deleted meanwhile
        except CorruptError:
            return False

    def has(self, id_: bytes) -> bool:
        """Is the chunk stored, and will it stay?"""
        if id_ == format.ZERO_ID:
            return True
        return any(pack not in self.doomed for pack in self.whole(id_))

    def places(self, id_: bytes) -> list[tuple[str, Entry]]:
        """(pack, entry) of each place where the chunk is, always in the same order; last where it was found damaged."""
        found = self.index.find(id_)
        if id_ not in self.damaged.ids:
            return found
        return sorted(found, key=lambda place: (place[0], id_) in self.damaged.places)

    def whole(self, id_: bytes) -> list[str]:
        """The packs that hold it, without those in which it was found damaged."""
        return [pack for pack, _ in self.index.find(id_) if (pack, id_) not in self.damaged.places]

    def check_stored(self, ids: set[bytes]) -> None:
        """CorruptError if any of these chunks is in no pack, or was found damaged. A microsecond for each; nothing is read."""
        if self.index.lacks(ids):
            raise CorruptError("some of its chunks are gone", hint=CHECK)
        if not all(self.whole(id_) for id_ in self.damaged.ids & ids):
            raise CorruptError("some of its chunks were found damaged", hint=CHECK)

    def look_again(self) -> None:
        """At the places that were found damaged: an operator may have put a pack back."""
        for pack, id_ in self.damaged.places:
            for entry in (entry for there, entry in self.index.find(id_) if there == pack):
                with contextlib.suppress(CorruptError, FileNotFoundError):
                    self._read(pack, entry)
                    self.damaged.forget(pack, id_)

    def id(self, content: bytes | bytearray | memoryview) -> bytes:
        """What the content is called here."""
        return self._sealer.id(content)

    def id_of_zeros(self, length: int) -> bytes:
        """What zeros would be called, if they had a name. Threads: any."""
        found = self._zeros.get(length)
        if found is None:
            found = self._zeros[length] = self.id(bytes(length))
        return found

    def seal(self, id_: bytes, kind: Kind, content: bytes | bytearray | memoryview) -> tuple[bytes, int]:
        """(stored bytes, codec), for a PackWriter."""
        return self._sealer.seal(id_, kind, content)

    def load(self, id_: bytes, length: int | None) -> bytes:
        """A chunk's content, verified. CorruptError if it is missing, damaged, or not of `length` bytes, where that is known."""
        if id_ == format.ZERO_ID:
            return bytes(length or 0)
        try:
            return self._load(id_, length)
        except CorruptError:
            self.refresh()  # `gc` may have moved it since
            return self._load(id_, length)

    def load_stored(self, id_: bytes, length: int | None) -> tuple[Entry, bytes]:
        """The same as it is stored, with its entry."""
        try:
            return self._find(id_, length)[:2]
        except CorruptError:
            self.refresh()
            return self._find(id_, length)[:2]

    def opened(self, id_: bytes, kind: Kind, codec: int, raw: int, stored: bytes) -> bytes:
        """The content of a chunk that was stored so. CorruptError if it is not what its id says."""
        return self._sealer.open(id_, kind, codec, raw, stored)

    def _load(self, id_: bytes, length: int | None) -> bytes:
        return self._find(id_, length)[2]

    def _find(self, id_: bytes, length: int | None) -> tuple[Entry, bytes, bytes]:
        """Entry, stored bytes, content; from the first pack that has it whole."""
        failed = CorruptError(f"chunk {id_.hex()[:16]} is missing from {self.place.where}", hint=CHECK)
        for pack, entry in self.places(id_):
            try:
                stored, content = self._read_twice(pack, entry)
            except FileNotFoundError:
                failed = CorruptError(f"{pack} is missing from {self.place.where}", hint=CHECK)
            except CorruptError as error:
                self.damaged.note(pack, id_)
                failed = CorruptError(f"{error.message} (in {pack})", hint=CHECK)
            else:
                if length is not None and len(content) != length:
                    raise CorruptError(
                        f"chunk {id_.hex()[:16]} has {entry.raw} bytes, not {length}", hint=CHECK
                    )
                return entry, stored, content
        raise failed

    def _read(self, pack: str, entry: Entry) -> tuple[bytes, bytes]:
        """(stored bytes, content). FileNotFoundError, CorruptError."""
        stored = self.place.read(pack, entry.place, entry.stored)
        return stored, self.opened(entry.id, entry.kind, entry.codec, entry.raw, stored)

    def _read_twice(self, pack: str, entry: Entry) -> tuple[bytes, bytes]:
        """The same; what was damaged on its way to us is not damaged."""
        with contextlib.suppress(CorruptError):
            return self._read(pack, entry)
        return self._read(pack, entry)

    # -- backups

    def backup_ids(self) -> list[str]:
        """Of all backups, by what the clock said when each was made."""
        return sorted(name.split("/", 1)[1] for name, _ in self.place.names("backups"))

    def backup(self, id_: str) -> Backup:
        """NotFoundError, CorruptError."""
        try:
            data = self.place.get(f"backups/{id_}")
        except FileNotFoundError:
            raise NotFoundError(
                f"there is no backup {show(id_)} in {self.place.where}",
                hint=f"cdp backup list --repo {self.place.where}",
            ) from None
        return self.unpack_backup(id_, data)

    def unpack_backup(self, id_: str, data: bytes) -> Backup:
        """From what its object holds. CorruptError."""
        magic, codec, digest, body = data[:8], data[8:9], data[9:41], data[41:]
        if magic[:7] != BACKUP_MAGIC[:7] or _digest(magic, codec, body) != digest:
            raise CorruptError(f"backup {id_} is damaged", hint=CHECK)
        if magic not in (BACKUP_MAGIC, PATCHED_MAGIC):
            raise CorruptError(
                f"backup {id_} is of a form that this program does not know", hint="use a newer program"
            )
        content = self._sealer.open_named(BACKUP_ID, id_, codec[0], body)
        found = Backup.unpack(content)
        if found.has_patches != (magic == PATCHED_MAGIC):
            raise CorruptError(f"backup {id_} is not of the form that it says", hint=CHECK)
        if found.id != id_:
            raise CorruptError(f"backup {id_} says that it is {show(found.id)}", hint=CHECK)
        return found

    def backups(self) -> Iterator[Backup]:
        """All that can be read, oldest first; `cdp repo check` names the others."""
        for brief in self.briefs():
            try:
                yield self.backup(brief.id)
            except (CorruptError, NotFoundError):
                continue

    def briefs(self) -> list[Brief]:
        """Of all backups, oldest first, with those that cannot be read. Read is what the index does not know."""
        known, ids = self.index.briefs(), self.backup_ids()
        found, new = [], {}
        for id_ in ids:
            if id_ in known:
                found.append(Brief.unpack(id_, known[id_]))
                continue
            try:
                brief = Brief.of(self.backup(id_))
            except NotFoundError:
                continue  # removed meanwhile
            except CorruptError:
                found.append(Brief(id_, "", sessions.time_of(id_), {}))
                continue
            found.append(brief)
            new[id_] = brief.pack()
        gone = known.keys() - set(ids)
        if new or gone:
            self.index.note_briefs(new, gone)
        return sorted(found, key=lambda brief: brief.order)

    def write_backup(self, backup: Backup) -> None:
        """Now it is one. All of its chunks are durable."""
        number, body = self._sealer.seal_named(BACKUP_ID, backup.id, backup.pack())
        codec = bytes([number])
        until_ns = self.retain_until_ns() and backup.since_ns + self.config.immutable_ns
        magic = PATCHED_MAGIC if backup.has_patches else BACKUP_MAGIC
        data = magic + codec + _digest(magic, codec, body) + body
        self.place.put(f"backups/{backup.id}", data, until_ns)

    def note_made(self, id_: str) -> None:
        """From now on the backup is missed if it is gone and nobody removed it. One that is not noted is no worse for it."""
        with contextlib.suppress(CdpError, OSError):
            self.place.put(f"{LISTED}/{id_}", b"{}\n")

    def remove(self, id_: str) -> None:
        """It is a backup no more, and nobody misses it. RefusedError where the place does not let it go."""
        self.place.delete(f"{LISTED}/{id_}")  # first: killed here, it is a backup still
        try:
            self.place.delete(f"backups/{id_}")
        except RefusedError:
            self.note_made(id_)
            raise

    def missed(self) -> list[str]:
        """Ids of backups that were here, are not, and that nobody removed."""
        gone = self._listed() - set(self.backup_ids())
        return sorted(gone & self._listed()) if gone else []  # one may be removed meanwhile

    def _listed(self) -> set[str]:
        return {name.split("/", 1)[1] for name, _ in self.place.names(LISTED)}

    def close(self) -> None:
        """Nothing may be under way."""
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _digest(magic: bytes, codec: bytes, body: bytes) -> bytes:
    """Of a backup's object. Of the first form it does not cover the magic."""
    return blake3((b"" if magic == BACKUP_MAGIC else magic) + codec + body).digest()
