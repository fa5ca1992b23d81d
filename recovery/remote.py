"""The commands that ask the service: disks, points, base points, URIs, forks.

Each takes the parsed options, asks, and prints one answer. Names and instants were checked when they were parsed.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

from cdpserver.errors import UnreachableError, UsageError
from cdpserver.names import format_bytes, full_name
from cdpserver.state import StateDir, default_state_dir
from recovery.client import Client
from recovery.output import (
    Column,
    answer,
    answer_fields,
    answer_json,
    answer_table,
    printable,
    say,
    show_size,
)

DISK_COLUMNS = (
    Column("name"),
    Column("size", right=True),
    Column("state"),
    Column("points", right=True),
    Column("journal_bytes", "journal", right=True),
    Column("lag_ns", "lag", right=True),
    Column("uri"),
)
BASE_POINT_COLUMNS = (
    Column("number", right=True),
    Column("time_ns", "time"),
    Column("seq", right=True),
    Column("path"),
)
FORK_COLUMNS = (Column("name"), Column("base"), Column("uri"))


def client(options: Namespace) -> Client:
    """The service of the state directory that the operator means."""
    state = StateDir(default_state_dir(options.state_dir))
    watch = _watch if sys.stderr.isatty() else None
    return Client(state, watch=watch, without=partial(_from_files, state))


def _from_files(state: StateDir, error: UnreachableError, path: str, query: Mapping[str, Any]) -> Any:
    from recovery.offline import answer as from_files

    return from_files(state, error, path, query)


def _watch(service: Client, job: dict[str, Any]) -> dict[str, Any]:
    from recovery.bar import watch

    return watch(service, job)


def answer_one(options: Namespace, value: dict[str, Any]) -> None:
    if options.json:
        answer_json(value)
    else:
        answer_fields(value)


def answer_list(
    options: Namespace, columns: tuple[Column, ...], rows: list[dict[str, Any]], nothing: str
) -> None:
    if options.json:
        answer_json(rows)
        return
    known = [column for column in columns if any(column.key in row for row in rows)]
    answer_table(known, rows, nothing=nothing)


# --- disks


def disk_add(options: Namespace) -> None:
    """Protect a disk; the URI in the answer is what the mirror writes to."""
    full_name(options.name, options.vm)
    # The service has another working directory.
    base = None if options.base is None else os.path.abspath(options.base)
    answer_one(options, client(options).add_disk(options.name, size=options.size, vm=options.vm, base=base))


def disk_list(options: Namespace) -> None:
    """Every disk."""
    rows = client(options).disks()
    answer_list(options, DISK_COLUMNS, rows, "no disks; add one: cdp disk add NAME --size SIZE")


def disk_show(options: Namespace) -> None:
    """One disk."""
    answer_one(options, client(options).disk(options.name))


def disk_uri(options: Namespace) -> None:
    """Where a mirror writes to, with what opens it."""
    found = client(options).disk_uris(options.name)
    if options.json:
        answer_json(found)
    else:
        answer(found["uri"])


def disk_resize(options: Namespace) -> None:
    """Let a disk grow, as its source has."""
    answer_one(options, client(options).resize_disk(options.name, size=options.size))


def disk_remove(options: Namespace) -> None:
    """Remove a disk and its history, after asking."""
    service = client(options)
    if not options.yes:
        if not on_a_terminal():
            raise UsageError(
                f"removing {options.name} loses its whole history, and there is no terminal to ask at",
                hint="to remove it all the same, add --yes",
            )
        disk = service.disk(options.name)
        ask(f"Remove disk {options.name} ({_extent_of(disk)}) with its whole history?")
    _answer_removed(options, service.remove_disk(options.name))


def _extent_of(disk: dict[str, Any]) -> str:
    held = disk.get("journal_bytes")
    journal = f", {format_bytes(held)} of journal" if isinstance(held, int) else ""
    return f"{show_size(disk.get('size'))}{journal}, {disk.get('points', 'unknown')} points"


def disk_synced(options: Namespace) -> None:
    """Say that the first copy, or a resync, is complete."""
    service = client(options)
    value = service.synced(options.name, session=options.session, write_blocking=options.write_blocking)
    answer_one(options, value)


# --- points


def bp_cut(options: Namespace) -> None:
    """Cut a base point, and wait until it is published."""
    service = client(options)
    answer_one(options, service.cut(options.disk))


def bp_list(options: Namespace) -> None:
    """Published base points."""
    rows = client(options).base_points(options.disk)
    answer_list(options, BASE_POINT_COLUMNS, rows, f"{options.disk} has no base points yet")


# --- forks


def fork_add(options: Namespace) -> None:
    """A writable disk on top of a point; of a VM or group one for each of its disks."""
    made = client(options).add_fork(options.point, options.name)
    if options.json or "forks" not in made:
        answer_one(options, made)
    else:
        answer_table(FORK_COLUMNS, made["forks"], nothing="no disks")


def fork_list(options: Namespace) -> None:
    """Every fork."""
    rows = client(options).forks()
    answer_list(options, FORK_COLUMNS, rows, "no forks; add one: cdp fork add DISK@WHEN NAME")


def fork_remove(options: Namespace) -> None:
    """Remove a fork; at a terminal only after asking."""
    service = client(options)
    if not options.yes and on_a_terminal():
        ask(f"Remove fork {options.name} with all that was written to it?")
    _answer_removed(options, service.remove_fork(options.name))


# --- asking


def on_a_terminal() -> bool:
    """Is there somebody to ask?"""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str) -> None:
    """UsageError unless the operator says yes. Asked on stderr: stdout holds answers only."""
    sys.stderr.write(f"{printable(question)} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was removed", hint="answer y, or use --yes")


def _answer_removed(options: Namespace, value: dict[str, Any]) -> None:
    if options.json:
        answer_json(value or {"name": options.name, "state": "removed"})
    else:
        say(f"{options.name} is removed")
