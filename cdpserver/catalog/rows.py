"""Rows of the catalog that are more than names: locks, policies, protected VMs, groups, recoveries, trials. Pure.

A row has an id that never changes, the number of its schema, and fields that only their owner understands: plain
values as JSON has them, without fractions. The catalog keeps and recovers them whatever they mean.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import msgpack

from cdpserver.durable import corrupt_json, take_int, take_keys
from cdpserver.errors import CorruptError, UsageError
from cdpserver.names import show

T = TypeVar("T")

Table: TypeAlias = Literal["locks", "policies", "vms", "groups", "recoveries", "trials"]

TABLES_BY_FORMAT: dict[int, tuple[Table, ...]] = {
    1: (),
    2: ("locks", "policies"),
    3: ("locks", "policies", "vms", "groups", "recoveries"),
    4: ("locks", "policies", "vms", "groups", "recoveries", "trials"),
}
"""By the catalog's format: that of its copy, `catalog.json`."""

FORMAT = max(TABLES_BY_FORMAT)

TABLES = TABLES_BY_FORMAT[FORMAT]

MAX_ROW_BYTES = 4096
"""As msgpack. The plain copy holds every row and is written anew with each change."""

MAX_ROWS = 10_000
"""Of one table, for the same reason."""

MAX_DEPTH = 8

MAX_SCHEMA = 1_000_000

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Rows: TypeAlias = dict[Table, dict[str, "Row"]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `fields` are not to be changed."""

    id: str
    schema: int
    fields: Mapping[str, Any]

    def value(self) -> dict[str, Any]:
        """What stands under the row's id."""
        return {"schema": self.schema, "fields": dict(self.fields)}


def read_each(rows: Iterable[Row], read: Callable[[Row], T]) -> tuple[list[T], list[CorruptError]]:
    """(what the rows say, as far as they can be read; why the others cannot): one that is damaged hides no other."""
    found: list[T] = []
    wrong: list[CorruptError] = []
    for row in rows:
        try:
            found.append(read(row))
        except CorruptError as error:
            wrong.append(error)
    return found, wrong


def empty_rows() -> Rows:
    """Every table without a row."""
    return {table: {} for table in TABLES}


def is_row_id(text: str) -> bool:
    """Can a row be called so?"""
    return _ID.fullmatch(text) is not None


def check_row(row: Row) -> bytes:
    """The row's value as msgpack; UsageError for what cannot be kept."""
    if not isinstance(row.id, str) or not is_row_id(row.id):
        raise _wrong(f"not the id of a row: {show(str(row.id))}")
    if type(row.schema) is not int or not 1 <= row.schema <= MAX_SCHEMA:
        raise _wrong(f"row {row.id} has no schema number")
    if not isinstance(row.fields, Mapping):
        raise _wrong(f"row {row.id} has no fields")
    _check_plain(row.id, dict(row.fields), MAX_DEPTH)
    packed: bytes = msgpack.packb(row.value())
    if len(packed) > MAX_ROW_BYTES:
        raise _wrong(f"row {row.id} has {len(packed)} bytes, more than {MAX_ROW_BYTES}")
    return packed


def _wrong(what: str) -> UsageError:
    return UsageError(what, hint="a row is an id, a schema number, and fields of plain values up to 4 KiB")


def _check_plain(id: str, value: object, depth: int) -> None:
    """`value` is the same after a way through msgpack, and through JSON."""
    if depth < 0:
        raise _wrong(f"row {id} is nested too deep")
    match value:
        case None | bool():
            return
        case int() if -(1 << 63) <= value < 1 << 64:
            return
        case str() if _is_utf8(value):
            return
        case list():
            for item in value:
                _check_plain(id, item, depth - 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str) or not _is_utf8(key):
                    raise _wrong(f"row {id} has a field whose name is no text")
                _check_plain(id, item, depth - 1)
        case _:
            raise _wrong(f"row {id} holds what is no plain value: {show(repr(value))}")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_row(id: str, value: Any, path: Path) -> Row:
    """A checked row, from msgpack or JSON; CorruptError."""
    if not isinstance(value, dict):
        raise corrupt_json(path, f"row {show(id)} is not an object")
    take_keys(value, {"schema", "fields"}, path)
    row = Row(id, take_int(value, "schema", path, least=1), value["fields"])
    try:
        check_row(row)
    except UsageError as error:
        raise corrupt_json(path, error.message) from None
    return row
