"""The catalog and the clock of a state directory as text."""

import time
from collections.abc import Iterator
from typing import Any

from cdpserver import durable
from cdpserver.catalog.content import Content, Entry, entry_value, read_copy
from cdpserver.catalog.rows import TABLES, Row, Table
from cdpserver.catalog.store import Store
from cdpserver.clock import boot_id
from cdpserver.errors import CdpError, CorruptError, NotFoundError
from cdpserver.state import StateDir
from cdpserver.timeline import FILE
from recovery.item import Item

LOOKS = 20
LOOK_S = 0.05
"""How often a difference is looked at again: the copy of a change under way is there before the change."""


# --- catalog


def catalog_items(state: StateDir) -> Iterator[Item]:
    """Every entry, where its plain copy differs, and the timelines that no entry names. Nothing is written."""
    yield Item("state", durable.read_json(state.format))
    content, copy, damage = _look(state)
    for what, held in (("catalog", content), ("copy", copy)):
        fields = {} if held is None else {"next_id": held.next_id, "disks": len(held.entries)}
        yield Item(what, fields, damage.get(what, ""))
    shown = content or copy
    if shown is None:
        return
    for name in sorted(shown.entries | (copy.entries if copy is not None else {})):
        yield _disk(state, name, shown.entries.get(name), copy)
    for table in TABLES:
        copied = copy.rows[table] if copy is not None else shown.rows[table]
        for id in sorted(shown.rows[table] | copied):
            yield _row(table, id, shown.rows[table].get(id), copied.get(id))
    named = {entry.id for entry in shown.entries.values()}
    for path in sorted(state.timelines.iterdir()):
        if path.name not in named:
            yield Item("unnamed", {"timeline": path.name, "whole": (path / FILE).exists()})


def _look(state: StateDir) -> tuple[Content | None, Content | None, dict[str, str]]:
    """(catalog, its copy, what is wrong with each)."""
    found: tuple[Content | None, Content | None, dict[str, str]] = (None, None, {})
    for number in range(LOOKS):
        if number:
            time.sleep(LOOK_S)
        damage: dict[str, str] = {}
        copy = content = None
        try:
            copy = read_copy(state.catalog_copy)
        except FileNotFoundError:
            damage["copy"] = "there is none"
        except CdpError as error:
            damage["copy"] = error.message
        try:
            content = _content(state)
        except CdpError as error:
            damage["catalog"] = error.message
        found = (content, copy, damage)
        if damage or content == copy:
            return found
    if content is not None and copy is not None and content.next_id != copy.next_id:
        damage["copy"] = "its next id is not the catalog's"
    return found


def _content(state: StateDir) -> Content:
    store = Store(state.catalog, writable=False)
    try:
        return store.content()
    finally:
        store.close()


def _disk(state: StateDir, name: str, entry: Entry | None, copy: Content | None) -> Item:
    copied = copy.entries.get(name) if copy is not None else None
    fields: dict[str, Any] = {"name": name}
    if entry is None:
        assert copied is not None
        return Item("disk", fields | _fields(copied), "only the copy has it")
    fields |= _fields(entry)
    if copy is not None and copied is None:
        return Item("disk", fields, "the copy lacks it")
    if copied is not None and copied != entry:
        return Item("disk", fields | {"copy": entry_value(copied)}, "the copy differs")
    if not (state.timeline(entry.id) / FILE).exists() and entry.state == "live":
        return Item("disk", fields, "there is no such timeline")
    return Item("disk", fields)


def _row(table: Table, id: str, row: Row | None, copied: Row | None) -> Item:
    damage = "" if row == copied else "the copy differs"
    if row is None or copied is None:
        damage = "only the copy has it" if row is None else "the copy lacks it"
    held = row or copied
    assert held is not None
    return Item("lock" if table == "locks" else "policy", {"id": id} | held.value(), damage)


def _fields(entry: Entry) -> dict[str, Any]:
    return {"timeline": entry.id, "state": entry.state, "created_ns": entry.created_ns}


# --- clock


def clock_items(state: StateDir) -> Iterator[Item]:
    """The clock that was fixed for a host boot. NotFoundError if none was."""
    try:
        value = durable.read_json(state.clock)
    except FileNotFoundError:
        raise NotFoundError(
            f"no clock was ever fixed in {state.path}", hint="start cdpserver once: it does"
        ) from None
    except CorruptError as error:
        yield Item("clock", damage=error.message)
        return
    yield Item("clock", value | {"this_boot": value.get("boot_id") == boot_id()}, _clock_damage(value))


def _clock_damage(value: dict[str, Any]) -> str:
    wanted = {"boot_id": str, "offset_ns": int, "floor_ns": int}
    if value.keys() != wanted.keys():
        return "it has not the fields of a clock"
    wrong = [key for key, kind in wanted.items() if type(value[key]) is not kind]
    return f"{wrong[0]} cannot be read" if wrong else ""
