"""The commands that print what is stored, from the files alone: index, timeline, catalog, clock. They write nothing.

The index is read in a process of its own: LMDB may crash on damaged pages rather than fail.
"""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from cdpserver.catalog import Catalog
from cdpserver.errors import CorruptError, NotFoundError, UsageError
from cdpserver.names import check_disk_name, show
from cdpserver.state import StateDir, default_state_dir
from recovery.item import Item
from recovery.item import show as show_items
from recovery.output import answer, answer_json_items

ROOT = Path(__file__).resolve().parent.parent
REBUILD = "cdp index rebuild DISK makes it anew; nothing is lost"


def _state(options: Namespace) -> StateDir:
    return StateDir.open(default_state_dir(options.state_dir))


def _answer(options: Namespace, items: Iterable[Item], *, subject: str, hint: str) -> None:
    """Print them; CorruptError at the end if any of them is damaged."""
    damaged = show_items(items, as_json=options.json, answer=answer, answer_json=answer_json_items)
    if damaged:
        lines = "a line says" if damaged == 1 else f"{damaged} lines say"
        raise CorruptError(f"{subject} is damaged: {lines} where", hint=hint)


# --- index show


def index_show(options: Namespace) -> int:
    """An index as text; the exit code of the process that reads it. CorruptError if that crashes."""
    if options.here:
        from recovery import index_text, merged_text

        signal.signal(signal.SIGINT, signal.default_int_handler)
        path_here = Path(options.path)
        text = merged_text if merged_text.is_merged(path_here) else index_text
        _answer(options, text.items(path_here), subject=options.path, hint=REBUILD)
        return 0
    path = os.path.abspath(options.path)
    arguments = ["index", "show", "--here", *(["--json"] if options.json else []), path]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A Ctrl-C at a terminal reaches the other process too, which says so.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        reader = subprocess.run(
            [sys.executable, "-m", "recovery.cli", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    if reader.returncode >= 0:
        return reader.returncode
    name = signal.Signals(-reader.returncode).name
    raise CorruptError(f"{path} is damaged: reading it ends a process with {name}", hint=REBUILD)


# --- timeline show


def timeline_show(options: Namespace) -> None:
    """A timeline as text: that of a disk, or of a directory."""
    from recovery.timeline_text import items

    directory = _directory(options)
    _answer(options, items(directory), subject=str(directory), hint="cdp check DISK says what that touches")


def _directory(options: Namespace) -> Path:
    """The directory meant: no disk's name begins as a path does."""
    if options.timeline.startswith(("/", ".")):
        path = Path(os.path.abspath(options.timeline))
        if not path.is_dir():
            raise UsageError(f"{path} is not a directory", hint="name a disk, or a timeline's directory")
        return path
    disk = check_disk_name(options.timeline)
    state = _state(options)
    with Catalog.open(state, writable=False) as catalog:
        entry = catalog.get(disk)
    if entry is None:
        raise NotFoundError(f"there is no disk {show(disk)}", hint="list the disks: cdp catalog show")
    return state.timeline(entry.id)


# --- catalog show, clock show


def catalog_show(options: Namespace) -> None:
    """The catalog as text."""
    from recovery.state_text import catalog_items

    state = _state(options)
    _answer(
        options,
        catalog_items(state),
        subject=f"the catalog of {state.path}",
        hint="restart cdpserver: it sets the catalog right",
    )


def clock_show(options: Namespace) -> None:
    """The clock as text."""
    from recovery.state_text import clock_items

    state = _state(options)
    _answer(
        options,
        clock_items(state),
        subject=str(state.clock),
        hint=f"move {state.clock.name} away and start cdpserver: it fixes the clock anew",
    )
