"""What the catalog holds, its plain copy `catalog.json`, and which names exclude each other; no LMDB here."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from blake3 import blake3

from cdpserver import durable
from cdpserver.catalog.rows import FORMAT, TABLES, TABLES_BY_FORMAT, Rows, Table, empty_rows, read_row
from cdpserver.durable import corrupt_json, take_int, take_keys, take_str
from cdpserver.errors import RefusedError, UsageError
from cdpserver.names import check_disk_name, show
from cdpserver.state import check_timeline_id

EntryState: TypeAlias = Literal["live", "removing"]


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
    rows: Rows = field(default_factory=empty_rows)

    def to_json(self) -> dict[str, Any]:
        """The object of catalog.json."""
        disks = {name: entry_value(entry) for name, entry in sorted(self.entries.items())}
        tables: dict[str, Any] = {
            table: {id: row.value() for id, row in sorted(self.rows[table].items())} for table in TABLES
        }
        return {"format": FORMAT, "next_id": self.next_id, "disks": disks, **tables}

    def digest(self) -> bytes:
        """Of all that it says, and of no table that is empty: so it stays the same when a format adds one."""
        value = self.to_json()
        told = {key: held for key, held in value.items() if held and key != "format"}
        return blake3(json.dumps(told, sort_keys=True).encode()).digest()


def entry_value(entry: Entry) -> dict[str, Any]:
    """What stands under an entry's name."""
    return {"id": entry.id, "state": entry.state, "created_ns": entry.created_ns}


def read_entry(name: str, value: Any, path: Path) -> Entry:
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
    """The plain copy, also of an older format: a catalog may be lost just before an upgrade.

    FileNotFoundError if there is none; CorruptError.
    """
    return read_content(durable.read_json(path), path)


def read_content(value: dict[str, Any], path: Path) -> Content:
    """Content from the object of a copy; `path` is for the message. CorruptError."""
    version = take_int(value, "format", path, least=1)
    if version > FORMAT:
        raise corrupt_json(path, f"its format is {version}, of a newer cdpserver")
    tables = TABLES_BY_FORMAT[version]
    take_keys(value, {"format", "next_id", "disks", *tables}, path)
    entries = {name: read_entry(name, disk, path) for name, disk in _objects(value, "disks", path)}
    rows = empty_rows()
    for table in tables:
        rows[table] = {id: read_row(id, row, path) for id, row in _objects(value, table, path)}
    return Content(entries, take_int(value, "next_id", path, least=1), rows)


def _objects(value: dict[str, Any], key: str, path: Path) -> Iterable[tuple[str, Any]]:
    found = value[key]
    if not isinstance(found, dict):
        raise corrupt_json(path, f"{key!r} is not an object")
    return found.items()


def check_free(entry: Entry, entries: dict[str, Entry]) -> None:
    """RefusedError if the name or the id is taken, or a disk would be called as a VM."""
    if entry.name in entries:
        raise RefusedError(f"there is a disk {entry.name} already", hint="choose another name")
    if any(other.id == entry.id for other in entries.values()):
        raise RefusedError(f"timeline {entry.id} has a name already", hint="one disk, one name")
    vm = entry.name.partition("/")[0]
    if vm != entry.name and vm in entries:
        raise RefusedError(f"{vm} is a disk, so no VM can be called so", hint="choose another name")
    if any(other.startswith(f"{entry.name}/") for other in entries):
        raise RefusedError(f"{entry.name} is a VM, so no disk can be called so", hint="choose another name")


def check_no_group(entry: Entry, content: Content) -> None:
    """RefusedError if a group has the name of a disk, or of its VM."""
    top = entry.name.partition("/")[0]
    if top in _of_rows(content, "groups", "group"):
        raise RefusedError(f"{top} is a group, so no disk or VM can be called so", hint="choose another name")


def check_group_free(name: str, content: Content) -> None:
    """RefusedError if a disk or VM has the name that a group is to have."""
    held = {other.partition("/")[0] for other in content.entries} | _of_rows(content, "vms", "vm")
    if name in held:
        raise RefusedError(f"there is a disk or VM {name} already", hint="choose another name for the group")


def _of_rows(content: Content, table: Table, key: str) -> set[object]:
    return {row.fields.get(key) for row in content.rows[table].values()}
