"""A point opened for reading by a command: through the service, or from the state directory when there is none.

Either way an export serves it, which holds a lease on the point as long as somebody is connected.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cdpserver.errors import BrokenError, CdpError, UnreachableError
from cdpserver.names import parse_point
from cdpserver.state import StateDir, default_state_dir
from recovery.output import say
from recovery.remote import client

if TYPE_CHECKING:
    from cdpserver.journal.log import Position

START_S = 10.0
"""nbdkit is up in well under a tenth of that."""

PATIENCE_S = 60
"""How long an export without a service waits for its first client."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An instant and where it is read; the URI is valid as long as the context."""

    disk: str
    timeline: str
    seq: int
    time_ns: int
    uri: str


@contextlib.contextmanager
def opened(options: Namespace, point: str) -> Iterator[Opened]:
    """`DISK@WHEN`. NotFoundError or RefusedError if it is not there (any more)."""
    disk = parse_point(point)[0]
    try:
        found = client(options).place(point)
    except UnreachableError as error:
        state = StateDir.open(default_state_dir(options.state_dir))
        if not os.access(state.path / "timelines", os.R_OK | os.X_OK):
            raise
        say(f"{error.message}: reading {state.path} without it")
        with _alone(state, point) as found_alone:
            yield found_alone
        return
    uri = str(found.get("uri_unix") or found["uri"])
    yield Opened(disk, str(found["timeline"]), int(found["seq"]), int(found["time_ns"]), uri)


@contextlib.contextmanager
def _alone(state: StateDir, point: str) -> Iterator[Opened]:
    """An export of our own, which ends with this process."""
    disk, id, position = _place(state, point)
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        socket = Path(directory) / "nbd"
        with alone("export", [f"state_dir={state.path}", "alone=1"], socket):
            uri = f"nbd+unix:///{disk}@seq:{position.seq}?socket={socket}"
            yield Opened(disk, id, position.seq, position.time_ns, uri)


def serve_once(state: StateDir, point: str, volume: str | None) -> Opened:
    """An export that outlives this process: it ends with its last client, or when none has come for a minute."""
    disk, id, position = _place(state, point)
    directory = Path(tempfile.mkdtemp(prefix="cdp-"))
    socket, ready = directory / "nbd", directory / "nbd.pid"
    parameters = [f"state_dir={state.path}", "alone=1", f"patience={PATIENCE_S}"]
    command = [*_command("export", socket, ready), *parameters]
    command.remove("--exit-with-parent")
    command[1:1] = ["--filter=exitlast"]
    # The shell takes the socket's directory away when it is over.
    shell = ["/bin/sh", "-c", 'd=$1; shift; "$@"; rm -r "$d"', "sh", str(directory), *command]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            shell,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=_environment(),
            start_new_session=True,
        )
        _until_ready(process, ready, log)
    export = f"{disk}@seq:{position.seq}" + (f"/{volume}" if volume else "")
    uri = f"nbd+unix:///{export}?socket={socket}"
    return Opened(disk, id, position.seq, position.time_ns, uri)


def _place(state: StateDir, point: str) -> "tuple[str, str, Position]":
    """(disk, id of its timeline, place) of `DISK@WHEN`. NotFoundError, RefusedError."""
    from cdpserver import timeline as timeline_file
    from cdpserver.catalog import Catalog
    from cdpserver.clock import Clock
    from cdpserver.errors import NotFoundError
    from cdpserver.points import Timeline
    from cdpserver.view.history import History

    disk, when = parse_point(point)
    with Catalog.open(state, writable=False) as catalog:
        entry = catalog.get(disk)
    if entry is None:
        raise NotFoundError(f"there is no disk {disk}", hint="list the disks: cdp catalog show")
    with contextlib.closing(History(state.path, timeline_file.load(state.timeline(entry.id)))) as history:
        position = Timeline(history).resolve(when, now_ns=Clock.for_reading(state.clock).now_ns())
    return disk, entry.id, position


@contextlib.contextmanager
def alone(name: str, parameters: list[str], socket: Path) -> Iterator[None]:
    """The plugin nbdplugin/NAME.py served read-only on `socket`, by a process that ends with this one."""
    ready = socket.with_suffix(".pid")  # there is a moment when there is a socket that refuses
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*_command(name, socket, ready), *parameters],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=_environment(),
            start_new_session=True,  # it is not to hear the terminal's Ctrl-C before we have ended
        )
        try:
            _until_ready(process, ready, log)
            yield
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _environment() -> dict[str, str]:
    """nbdkit finds its Python by PATH."""
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path}


def _command(name: str, socket: Path, ready: Path) -> list[str]:
    found = importlib.util.find_spec("nbdplugin")
    assert found is not None and found.submodule_search_locations
    plugin = Path(found.submodule_search_locations[0]) / f"{name}.py"
    return [
        "nbdkit",
        "-f",
        "-t",
        "1",
        "-r",
        "-U",
        str(socket),
        "-P",
        str(ready),
        "--exit-with-parent",
        "python",
        str(plugin),
    ]


def _until_ready(process: "subprocess.Popen[bytes]", ready: Path, log: object) -> None:
    deadline = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise _did_not_start(log)
        time.sleep(0.005)


def _did_not_start(log: object) -> CdpError:
    log.seek(0)  # type: ignore[attr-defined]
    said = log.read().decode(errors="replace").strip().splitlines()  # type: ignore[attr-defined]
    last = said[-1] if said else "it said nothing"
    return BrokenError(
        f"the export did not start: {last[:300]}", hint="run tools/setup: a package is missing"
    )
