"""Rebuilding a lost catalog from its copy and from the timelines' own files."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from cdpserver import durable, timeline
from cdpserver.catalog.content import Content, Entry, check_free, read_content, read_copy
from cdpserver.catalog.rows import FORMAT, TABLES, empty_rows
from cdpserver.catalog.store import DATA, build
from cdpserver.errors import CdpError, CorruptError, RefusedError
from cdpserver.limits import NAME_LENGTH
from cdpserver.state import StateDir

LOST = (
    "Names come from the timelines' own files. Locks and policies are lost if there were any, and which VMs are protected: "
    "set them again before anything is pruned."
)

ID_JUMP = 1000
"""Ids skipped when the counter is lost: what was removed since can no longer be seen."""

# A timeline's directory, finished or left over by a crash.
_DIRECTORY = re.compile(r"(\.tmp-|\.removing-)*t([1-9][0-9]{0,17})")


def is_new(state: StateDir) -> bool:
    """Whether there never was a disk here, so that an absent catalog is an empty one."""
    return not state.catalog_copy.exists() and not any(state.timelines.iterdir())


def recover(state: StateDir) -> list[str]:
    """Make the catalog readable again if it is not; what was done, in sentences. See Catalog.recover."""
    if not state.catalog.exists() and is_new(state):
        return []
    if state.catalog_copy.is_dir():
        os.rename(state.catalog_copy, _free_name(state.catalog_copy))
    if is_readable(state.catalog):
        return _look_at_copy(state)
    said: list[str] = []
    if state.catalog.exists():
        aside = _free_name(state.catalog)
        os.rename(state.catalog, aside)
        said.append(f"The catalog was unreadable; it is kept as {aside.name}.")
    else:
        said.append("The catalog was missing.")
    content = _collect(state, said)
    # The copy comes first: should we be killed in between, the next run starts from all that is known now.
    durable.write_json(state.catalog_copy, content.to_json())
    build(state.catalog, content)
    said.append(f"The catalog was rebuilt with {len(content.entries)} disks.")
    return said


def is_readable(path: Path, format: int = FORMAT) -> bool:
    """Whether a process of its own can read the whole catalog in directory `path`, of this format or later."""
    try:
        read_apart(path, format)
    except CorruptError:
        return False
    return True


def read_apart(path: Path, format: int = FORMAT) -> Content:
    """All that the catalog in directory `path` holds, read by a process of its own. CorruptError."""
    if not (path / DATA).exists():
        raise CorruptError(f"{path} is missing")
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "cdpserver.catalog.probe", str(path), str(format)]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False, text=True)
    if ended.returncode < 0:
        raise CorruptError(
            f"{path} is damaged: reading it ends a process with {signal.Signals(-ended.returncode).name}"
        )
    if ended.returncode:
        raise CorruptError(
            ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else f"{path} is damaged"
        )
    return read_content(json.loads(ended.stdout), path)


def _look_at_copy(state: StateDir) -> list[str]:
    """What is wrong with the copy of a readable catalog. Opening the catalog for writing sets it right."""
    try:
        read_copy(state.catalog_copy)
    except FileNotFoundError:
        return ["The catalog's copy, catalog.json, was missing. Nothing is lost: it is written anew."]
    except CorruptError as error:
        return [f"The catalog's copy is of no use: {error.message}. Nothing is lost: it is written anew."]
    return []


def _free_name(path: Path) -> Path:
    """`catalog.damaged-1`, or the next that is free."""
    number = 1
    while (name := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return name


def _collect(state: StateDir, said: list[str]) -> Content:
    """The best knowledge of the catalog's content without the catalog."""
    entries: dict[str, Entry] = {}
    rows = empty_rows()
    next_id, jump = 1, ID_JUMP
    try:
        copy = read_copy(state.catalog_copy)
        entries, next_id, jump, rows = dict(copy.entries), copy.next_id, 0, copy.rows
        held = ", ".join(f"{len(rows[table])} {table}" for table in TABLES)
        said.append(f"Its copy, catalog.json, has {len(entries)} disks, {held}.")
    except FileNotFoundError:
        said += ["Its copy, catalog.json, is missing.", LOST]
    except CorruptError as error:
        said += [f"Its copy is of no use: {error.message}.", LOST]
    directories = [match for name in os.listdir(state.timelines) if (match := _DIRECTORY.fullmatch(name))]
    numbers = {int(match[2]) for match in directories} | {int(entry.id[1:]) for entry in entries.values()}
    named = {entry.id for entry in entries.values()}
    for number in sorted(int(match[2]) for match in directories if not match[1]):
        if f"t{number}" not in named:
            _collect_timeline(state, f"t{number}", entries, said)
    for entry in entries.values():
        if not state.timeline(entry.id).exists():
            said.append(f"Disk {entry.name} has no timeline directory {entry.id}.")
    return Content(entries, max(next_id, *(number + 1 for number in numbers), 1) + jump, rows)


def _collect_timeline(state: StateDir, id: str, entries: dict[str, Entry], said: list[str]) -> None:
    """Add timeline `id`, which the copy doesn't name."""
    try:
        found = timeline.load(state.timeline(id))
    except CdpError as error:
        said.append(f"Timeline {id} was left out: {error.message}.")
        return
    entry = Entry(found.full_name, id, "live", found.created_ns)
    try:
        check_free(entry, entries)
    except RefusedError:
        # Nothing may be hidden because its name is taken: with the id it has one of its own.
        entry = Entry(f"{found.name[: NAME_LENGTH - len(id) - 1]}-{id}", id, "live", found.created_ns)
        said.append(f"The name {found.full_name} is taken, so timeline {id} is now called {entry.name}.")
    entries[entry.name] = entry
    said.append(f"Disk {entry.name} was added from timeline {id}.")
