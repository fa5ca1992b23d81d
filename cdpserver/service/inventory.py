"""What the service looks for at its start, before anything is opened: files that should be there and are not.

What can be made anew without a loss is made anew; either way an event names the file and what its loss means. What only
`cdp check` can tell (segments, base points, base images) is left to it.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from cdpserver import basepoint, durable, images, sealed
from cdpserver.chain import room
from cdpserver.errors import CdpError, CorruptError
from cdpserver.events import EventLog, previous_file
from cdpserver.nodes import MANUAL
from cdpserver.state import StateDir
from cdpserver.timeline import FILE, LOCKS

CLOSED = "its disk and the forks of it cannot be opened until it is restored from a backup"


def had_events(state: StateDir) -> bool:
    """Is an event file there, or is the directory so new that there need not be one? Ask before the first event."""
    held = (path for path in (state.events, previous_file(state.events)) if path.exists())
    return any(path.stat().st_size for path in held) or not state.catalog_copy.exists()


def say_events_lost(log: EventLog) -> None:
    """The event file was gone."""
    _say(log, "events.jsonl", "the events before this start are lost, and nothing else")


def look(state: StateDir, log: EventLog, ids: Iterable[str]) -> None:
    """Make locks anew and say what is missing; `ids` are the timelines that the catalog's disks have."""
    for directory in sorted({*state.timelines.glob("t*"), *(state.timeline(id) for id in ids)}):
        if not directory.is_dir():
            _say(log, f"timelines/{directory.name}", CLOSED)
            continue
        if not (directory / FILE).exists():
            _say(log, f"timelines/{directory.name}/{FILE}", CLOSED)
        for lock in LOCKS:
            if not (directory / lock).exists():
                (directory / lock).touch(0o644)
                _say(log, f"timelines/{directory.name}/{lock}", "nothing is lost: it is made anew")
        with contextlib.suppress(CdpError, FileNotFoundError):
            _look_at_notes(state, directory, log)
            _look_at_manual(directory, log)
    for raw in sorted(state.bases.glob("b*.raw")):
        if not images.is_noted(raw):
            meaning = "nothing is lost: the image is imported once more for the next disk on it"
            _say(log, f"bases/{raw.stem}.json", meaning)


def _look_at_manual(directory: Path, log: EventLog) -> None:
    try:
        room.manual(directory)
    except CorruptError:
        aside = _free_name(directory / MANUAL)
        os.rename(directory / MANUAL, aside)
        meaning = "nothing is lost: the notes of base points say which somebody asked for"
        _say(
            log,
            f"timelines/{directory.name}/{MANUAL}",
            f"{meaning}; the damaged file is kept as {aside.name}",
        )


def _look_at_notes(state: StateDir, directory: Path, log: EventLog) -> None:
    written, lost = basepoint.note_what_is_missing(state, directory)
    for number in written:
        meaning = "nothing is lost: it is written anew from the journal"
        _say(log, f"timelines/{directory.name}/bp-{number}.json", meaning)
    for number in lost:
        meaning = f"bp:{number} cannot be named any more; bp-{number}.qcow2 still reads with QEMU's tools"
        _say(log, f"timelines/{directory.name}/bp-{number}.json", meaning)


def look_at_clock(state: StateDir, log: EventLog) -> None:
    """A clock that cannot be read is fixed anew: no process of ours uses the old one any more."""
    meaning = "nothing is lost: the clock is fixed anew, after the newest time in any journal"
    try:
        durable.read_json(state.clock)
    except FileNotFoundError:
        if state.catalog_copy.exists():
            _say(log, "clock.json", meaning)
    except CorruptError:
        aside = _free_name(state.clock)
        os.rename(state.clock, aside)
        _say(log, "clock.json", f"{meaning}; the damaged file is kept as {aside.name}")


def look_at_key(state: StateDir, log: EventLog) -> None:
    """A key that cannot be read is made anew, and with it the secrets of all disks."""
    meaning = (
        "every disk has a new secret: agents connect their mirrors anew, and URIs are to be asked for again"
    )
    try:
        sealed.load_key(state)
        return
    except CorruptError:
        if state.nbd_key.exists():
            aside = _free_name(state.nbd_key)
            os.rename(state.nbd_key, aside)
            _say(log, state.nbd_key.name, f"{meaning}; the damaged file is kept as {aside.name}")
        elif state.catalog_copy.exists():
            _say(log, state.nbd_key.name, meaning)
    sealed.make_key(state)


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return name


def _say(log: EventLog, file: str, meaning: str) -> None:
    log.emit("service.file-missing", level="warning", file=file, meaning=meaning)
