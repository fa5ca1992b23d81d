"""The catalog: which timeline a disk's name means. LMDB in `catalog/`, and a plain copy in `catalog.json`.

Invariants: the copy is replaced inside the transaction of each change, before it commits, so a change that
fails is in neither, and after a crash the copy is at most one change ahead; opening for writing sets it
right. A name never comes before its timeline's directory, and an id is given once: `next_id` is durable
before it returns. Durability: each change is synced when the call returns. Threads: one writing process, the
service; a write transaction begins and ends in one call. Readers are other processes, with a transaction per
question. A reader that may not write LMDB's lock file reads the copy instead.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypeVar

import lmdb
import msgpack

from cdpserver import durable, timeline
from cdpserver.durable import corrupt_json, take_int, take_keys, take_str
from cdpserver.errors import BrokenError, CdpError, CorruptError, NoSpaceError, NotFoundError, RefusedError,
UsageError from cdpserver.limits import NAME_LENGTH from cdpserver.names import check_disk_name, show from
cdpserver.state import StateDir, check_timeline_id

CATALOG_MAP_BYTES = 64 << 20
"""Address space of the catalog: room for 100,000 disks."""

CATALOG_READERS = 256
"""LMDB reader slots: one or two per process that looks up names."""

CATALOG_TABLES = 8
"""Named databases: disks and counters, and room for locks and policies."""

ID_JUMP = 1000
"""Ids skipped when the counter is lost: what was removed since can no longer be seen."""

FORMAT = 1
DATA = "data.mdb"
_DISKS = b"disks"
_COUNTERS = b"counters"
_NEXT_ID = b"next_id"

EntryState: TypeAlias = Literal["live", "removing"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Entry:
    """A disk's full name and its timeline."""

    name: str
    id: str
    state: EntryState
    created_ns: int


@dataclass(frozen=True, slots=True)
class Content:
    """All that the catalog holds, as in catalog.json."""

    entries: dict[str, Entry]
    next_id: int

    def to_json(self) -> dict[str, Any]:
        """The object of catalog.json."""
        disks = {name: {**asdict(entry)} for name, entry in sorted(self.entries.items())}
        for disk in disks.values():
            del disk["name"]
        return {"format": FORMAT, "next_id": self.next_id, "disks": disks}


def _entry(name: str, value: Any, path: Path) -> Entry:
    """A checked entry, from msgpack or JSON; CorruptError."""
    if not isinstance(value, dict):
        raise corrupt_json(path, f"disk {show(name)} is not an object")
    take_keys(value, {"id", "state", "created_ns"}, path)
    try:
        check_disk_name(name)
        id = check_timeline_id(take_str(value, "id", path))
    except UsageError as error:
        raise corrupt_json(path, error.message) from None
    match value["state"]:
        case "live" | "removing" as state:
            return Entry(name, id, state, take_int(value, "created_ns", path))
    raise corrupt_json(path, f"the state of disk {name} is not known")


def read_copy(path: Path) -> Content:
    """The plain copy. FileNotFoundError if there is none; CorruptError."""
    value = durable.read_json(path)
    take_keys(value, {"format", "next_id", "disks"}, path)
    disks = value["disks"]
    if value["format"] != FORMAT or not isinstance(disks, dict):
        raise corrupt_json(path, "not a catalog of this version")
    return Content(
        {name: _entry(name, disk, path) for name, disk in disks.items()}, take_int(value, "next_id", path,
        least=1) )


@contextlib.contextmanager
def _lmdb_errors(path: Path) -> Iterator[None]:
    """LMDB's errors as the project's."""
    try:
        yield
    except lmdb.MapFullError:
        raise NoSpaceError("the catalog is full", hint="remove disks that are no longer needed") from None
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError) as
    error: raise _damaged(path, str(error)) from error except lmdb.Error as error: if "No space left" in
    str(error): raise NoSpaceError("no space left to change the catalog", hint="free space on the store") from
    error raise BrokenError(f"the catalog failed: {error}", hint="look at the kernel log") from error


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(f"{path} is damaged: {why}", hint="restart cdpserver: it rebuilds the catalog")


def _open_env(path: Path, *, writable: bool) -> lmdb.Environment:
    """The environment in directory `path`, which must hold a whole one.

    LMDB takes an empty file for a new environment, and a short one ends in SIGBUS: both are refused before.
    """
    data = path / DATA
    if not data.is_file() or data.stat().st_size < 2 * os.sysconf("SC_PAGESIZE"):
        raise _damaged(data, "it is missing or cut short")
    env = lmdb.open(
        str(path), map_size=CATALOG_MAP_BYTES, max_dbs=CATALOG_TABLES, max_readers=CATALOG_READERS,
        readonly=not writable, create=False, sync=True, mode=0o644,
    )
    if (env.info()["last_pgno"] + 1) * env.stat()["psize"] > data.stat().st_size:
        env.close()
        raise _damaged(data, "it is cut short")
    return env


class Catalog:
    """The catalog of a state directory. Use `Catalog.open`; a process opens it once and not across a fork."""

    def __init__(self, state: StateDir, env: lmdb.Environment | None) -> None:
        self._state = state
        self._env = env
        if env is not None:
            self._disks = env.open_db(_DISKS, create=False)
            self._counters = env.open_db(_COUNTERS, create=False)

    @classmethod
    def open(cls, state: StateDir, *, writable: bool) -> Self:
        """Open the catalog; with `writable` (the service alone) it is made if the state directory is new.

        CorruptError if it is missing or damaged: then `recover` rebuilds it.
        """
        path = state.catalog
        if writable and not path.exists() and _is_new(state):
            _build(state, Content({}, 1))
        try:
            with _lmdb_errors(path):
                env = _open_env(path, writable=writable)
                try:
                    if writable:
                        env.reader_check()
                    catalog = cls(state, env)
                    catalog._load()
                except BaseException:
                    env.close()
                    raise
        except (BrokenError, CorruptError, PermissionError):
            # A reader without the right to write LMDB's lock file, or before the service has rebuilt the
            catalog.
            if writable or not state.catalog_copy.exists():
                raise
            catalog = cls(state, None)
        if writable:
            catalog._set_copy_right()
        return catalog

    @staticmethod
    def recover(state: StateDir) -> list[str]:
        """Rebuild a missing or unreadable catalog from its copy and the timelines; what was done, in
        sentences.

        Called by the service before it opens the catalog. A readable catalog is left alone: []. The damaged
        one is kept beside it. Readers of the old one must open it anew.
        """
        if _is_readable(state.catalog) or (not state.catalog.exists() and _is_new(state)):
            return []
        said: list[str] = []
        content = _collect(state, said)
        if state.catalog.exists():
            aside = _free_name(state.catalog)
            os.rename(state.catalog, aside)
            said.insert(0, f"The catalog was unreadable; it is kept as {aside.name}.")
        else:
            said.insert(0, "The catalog was missing.")
        _build(state, content)
        durable.write_json(state.catalog_copy, content.to_json())
        said.append(f"The catalog was rebuilt with {len(content.entries)} disks.")
        return said

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading

    def get(self, name: str) -> Entry | None:
        """The entry of a disk's full name."""
        if self._env is None:
            return self._load().entries.get(name)
        try:
            key = check_disk_name(name).encode()
        except UsageError:
            return None
        with _lmdb_errors(self._state.catalog), self._env.begin(db=self._disks) as txn:
            value = txn.get(key)
        return None if value is None else self._decode(key, value)

    def names(self) -> dict[str, Entry]:
        """All entries by full name, in order of the names."""
        return dict(sorted(self._load().entries.items()))

    def by_id(self, id: str) -> Entry | None:
        """The entry of a timeline's id."""
        return next((entry for entry in self._load().entries.values() if entry.id == id), None)

    def _load(self) -> Content:
        if self._env is None:
            return read_copy(self._state.catalog_copy)
        with _lmdb_errors(self._state.catalog), self._env.begin() as txn:
            return self._content(txn)

    def _content(self, txn: lmdb.Transaction) -> Content:
        entries = [self._decode(bytes(key), bytes(value)) for key, value in txn.cursor(db=self._disks)]
        counter = txn.get(_NEXT_ID, db=self._counters)
        if counter is None or len(counter) != 8 or not 1 <= int.from_bytes(counter, "little") < 1 << 63:
            raise _damaged(self._state.catalog, "its counter of ids is missing")
        return Content({entry.name: entry for entry in entries}, int.from_bytes(counter, "little"))

    def _decode(self, key: bytes, value: bytes) -> Entry:
        try:
            return _entry(key.decode(), msgpack.unpackb(value), self._state.catalog)
        except (ValueError, msgpack.exceptions.UnpackException, CorruptError) as error:
            raise _damaged(self._state.catalog, f"disk {show(key.decode(errors='replace'))}: {error}") from None

    # --- changing

    def next_id(self) -> str:
        """A timeline id that was never given before and never will be again."""

        def take(txn: lmdb.Transaction) -> str:
            number = self._content(txn).next_id
            txn.put(_NEXT_ID, (number + 1).to_bytes(8, "little"), db=self._counters)
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
            created_ns = timeline.load(self._state.timeline(id)).created_ns
        entry = Entry(name, id, "live", created_ns)

        def put(txn: lmdb.Transaction) -> Entry:
            entries = self._content(txn).entries
            _check_free(entry, entries)
            self._put(txn, entry)
            return entry

        return self._change(put)

    def set_state(self, name: str, state: EntryState) -> Entry:
        """Mark a disk as live or as being removed; NotFoundError."""

        def put(txn: lmdb.Transaction) -> Entry:
            old = self._existing(txn, name)
            entry = Entry(name, old.id, state, old.created_ns)
            self._put(txn, entry)
            return entry

        return self._change(put)

    def remove(self, name: str) -> Entry:
        """Forget a name, last step of removing a disk; its id stays used. NotFoundError."""

        def delete(txn: lmdb.Transaction) -> Entry:
            old = self._existing(txn, name)
            txn.delete(name.encode(), db=self._disks)
            return old

        return self._change(delete)

    def _existing(self, txn: lmdb.Transaction, name: str) -> Entry:
        entry = self._content(txn).entries.get(name)
        if entry is None:
            raise NotFoundError(f"there is no disk {show(name)}", hint="list the disks: cdp disk list")
        return entry

    def _put(self, txn: lmdb.Transaction, entry: Entry) -> None:
        value = {"id": entry.id, "state": entry.state, "created_ns": entry.created_ns}
        txn.put(entry.name.encode(), msgpack.packb(value), db=self._disks)

    def _change(self, change: Callable[[lmdb.Transaction], Result]) -> Result:
        """Run `change` in a write transaction and replace the copy before it commits."""
        assert self._env is not None, "opened for reading"
        try:
            with _lmdb_errors(self._state.catalog), self._env.begin(write=True) as txn:
                result = change(txn)
                durable.write_json(self._state.catalog_copy, self._content(txn).to_json())
        except (CdpError, OSError):
            # The transaction is undone; so must be the copy, now or, if that fails as well, at the next
            change.
            with contextlib.suppress(CdpError, OSError):
                self._set_copy_right()
            raise
        return result

    def _set_copy_right(self) -> None:
        content = self._load()
        try:
            right = read_copy(self._state.catalog_copy) == content
        except (FileNotFoundError, CorruptError):
            right = False
        if not right:
            durable.write_json(self._state.catalog_copy, content.to_json())


def _check_free(entry: Entry, entries: dict[str, Entry]) -> None:
    """RefusedError if the name or the id is taken, or a disk would be called as a VM."""
    if entry.name in entries:
        raise RefusedError(f"there is a disk {entry.name} already", hint="choose another name")
    if any(other.id == entry.id for other in entries.values()):
        raise RefusedError(f"timeline {entry.id} has a name already", hint="one disk, one name")
    vm = entry.name.partition("/")[0]
    if vm != entry.name and vm in entries:
        raise RefusedError(f"{vm} is a disk, so no VM can be called so", hint="choose another name for the VM")
    if any(other.startswith(f"{entry.name}/") for other in entries):
        raise RefusedError(f"{entry.name} is a VM, so no disk can be called so", hint="choose another name")


# --- making and rebuilding


def _is_new(state: StateDir) -> bool:
    """Whether there never was a disk here, so that an absent catalog is an empty one."""
    return not state.catalog_copy.exists() and not any(state.timelines.iterdir())


def _build(state: StateDir, content: Content) -> None:
    """Make the catalog with `content`; it appears whole."""
    building = state.catalog.with_name(durable.TEMPORARY + state.catalog.name)
    durable.remove_tree(building)
    durable.make_dir(building)
    with _lmdb_errors(building):
        env = lmdb.open(str(building), map_size=CATALOG_MAP_BYTES, max_dbs=CATALOG_TABLES, mode=0o644)
        try:
            disks, counters = env.open_db(_DISKS), env.open_db(_COUNTERS)
            with env.begin(write=True) as txn:
                for entry in content.entries.values():
                    value = {"id": entry.id, "state": entry.state, "created_ns": entry.created_ns}
                    txn.put(entry.name.encode(), msgpack.packb(value), db=disks)
                txn.put(_NEXT_ID, content.next_id.to_bytes(8, "little"), db=counters)
        finally:
            env.close()
    durable.publish(building, state.catalog)


def _is_readable(path: Path) -> bool:
    """Whether a process of its own can read the whole catalog: LMDB may crash on damaged pages, not only
    fail.
    """
    if not (path / DATA).exists():
        return False
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "cdpserver.catalog", str(path.parent)]
    probe = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
    check=False) return probe.returncode == 0


def _free_name(path: Path) -> Path:
    """`catalog.damaged-1`, or the next that is free."""
    number = 1
    while (name := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return name


def _id_number(name: str) -> int:
    """The number in the directory name of a timeline, finished or left over by a crash; 0 if it is none."""
    for prefix in (durable.TEMPORARY, durable.REMOVING):
        name = name.removeprefix(prefix)
    return int(name[1:]) if name.startswith("t") and name[1:].isdecimal() and len(name) < 19 else 0


def _collect(state: StateDir, said: list[str]) -> Content:
    """The best knowledge of the catalog's content without the catalog."""
    entries: dict[str, Entry] = {}
    next_id = 1
    jump = ID_JUMP
    try:
        copy = read_copy(state.catalog_copy)
        entries, next_id, jump = dict(copy.entries), copy.next_id, 0
        said.append(f"catalog.json named {len(entries)} disks.")
    except FileNotFoundError:
        said.append("catalog.json was missing.")
    except CorruptError as error:
        said.append(f"catalog.json was of no use: {error.message}.")
    names = sorted(os.listdir(state.timelines), key=_id_number)
    for id in names:
        if id.startswith("t") and _id_number(id) and all(entry.id != id for entry in entries.values()):
            _collect_timeline(state, id, entries, said)
    for entry in entries.values():
        if not state.timeline(entry.id).exists():
            said.append(f"Disk {entry.name} has no timeline directory {entry.id}.")
    used = [_id_number(name) for name in [*names, *(entry.id for entry in entries.values())]]
    return Content(entries, max([next_id, *(number + 1 for number in used)]) + jump)


def _collect_timeline(state: StateDir, id: str, entries: dict[str, Entry], said: list[str]) -> None:
    """Add the timeline `id`, which the copy doesn't name."""
    try:
        found = timeline.load(state.timeline(id))
    except CdpError as error:
        said.append(f"Timeline {id} was left out: {error.message}.")
        return
    entry = Entry(found.full_name, id, "live", found.created_ns)
    try:
        _check_free(entry, entries)
    except RefusedError:
        # Nothing may be hidden by a name that is taken: the id makes it a free one.
        short = found.name[: NAME_LENGTH - len(id) - 1]
        entry = Entry(f"{short}-{id}", id, "live", found.created_ns)
        said.append(f"The name {found.full_name} is taken, so timeline {id} is now called {entry.name}.")
    entries[entry.name] = entry
    said.append(f"Disk {entry.name} was added from timeline {id}.")


def _probe(path: str) -> int:
    """Exit status 0 if the catalog of the state directory can be read; see `_is_readable`."""
    state = StateDir(Path(path))
    try:
        with _lmdb_errors(state.catalog), contextlib.closing(_open_env(state.catalog, writable=True)) as env:
            Catalog(state, env)._load()
    except CdpError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_probe(sys.argv[1]))
