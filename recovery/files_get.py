"""`cdp file get`: files of a point into a directory or a tar stream, with a bar, and a line in the event log."""

import contextlib
import getpass
import os
import resource
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from cdpserver.errors import CorruptError, ForbiddenError, UnreachableError
from cdpserver.events import EventLog
from cdpserver.files import DAMAGED
from cdpserver.files.fetch import Fetch, Progress, Taken
from cdpserver.files.tarball import write_tar
from cdpserver.names import format_bytes, split_volume
from cdpserver.state import StateDir, default_state_dir
from recovery.files import path_of
from recovery.files_asked import AskedFiles, may_read
from recovery.files_local import opened
from recovery.output import answer, answer_json, printable, say
from recovery.remote import client
from recovery.together import one_disk


def get(options: Namespace) -> None:
    """Fetch. CorruptError at the end if a file could not be had; the others are there."""
    if options.tar == "-" and options.json:
        options.json = False  # the stream has the standard output
    options.point = one_disk(options, options.point)
    if not may_read(default_state_dir(options.state_dir)) and options.key_file is None and _asked(options):
        return
    with opened(options) as local:
        browser, volume = local.browser, local.volume
        top = browser.stat(volume, path_of(options))
        name = top.name
        found = browser.walk(volume, b"/" + b"/".join(top.path), full=True)
        taken = Taken()
        with (
            _bar(top.size if top.type == "file" else None) as progress,
            _recorded(options, local.name, volume, taken),
        ):
            if options.tar is not None:
                with _out(options.tar) as out:
                    write_tar(browser, found, name or b"root", out, progress=progress, taken=taken)
            else:
                _many_files()
                fetch = Fetch(
                    browser,
                    Path(options.output),
                    point=f"{local.name}/{volume}",
                    force=options.force,
                    progress=progress,
                    taken=taken,
                )
                fetch.run(found, name)
    _answer(options, local.name, taken)
    if taken.failed:
        raise CorruptError(f"{taken.failed} of them could not be had", hint=DAMAGED)


def _asked(options: Namespace) -> bool:
    """Who may ask the service, but not read its directory, gets a tar stream of it. False if it does not run."""
    try:
        seq = client(options).place(split_volume(options.point)[0])["seq"]
    except UnreachableError:
        return False
    if options.tar is None:
        raise ForbiddenError(
            "files are fetched into a directory by whoever may read the state directory",
            hint=f"take the stream: cdp file get {options.point} ... --tar - | tar -x",
        )
    text, volume = split_volume(options.point)
    point = f"{text.partition('@')[0]}@seq:{seq}" + ("" if volume is None else f"/{volume}")
    with _bar(None) as progress, _out(options.tar) as out:
        for part in AskedFiles(client(options), point).tar(path_of(options)):
            out.write(part)
            if progress is not None:
                progress(0, len(part))
    return True


def _many_files() -> None:
    """A directory is open for each level of the tree."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096) if most > 0 else 4096, most))


@contextlib.contextmanager
def _out(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        sys.stdout.flush()
        yield sys.stdout.buffer
        return
    with open(path, "xb") as file:
        yield file


@contextlib.contextmanager
def _bar(size: int | None) -> Iterator[Progress | None]:
    """On a terminal: how far a file is, or how much of a tree there was."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("0 files", total=size)
        files = 0

        def tell(more: int, done: int) -> None:
            nonlocal files
            files += more
            bar.update(task, advance=done, description=f"{files} files")

        yield tell


@contextlib.contextmanager
def _recorded(options: Namespace, point: str, volume: str, taken: Taken) -> Iterator[None]:
    """An event at the end, also at one by an error, an interrupt or a signal that asks to end."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    whole = False
    try:
        yield
        whole = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _record(options, point, volume, taken, whole=whole)


def _record(options: Namespace, point: str, volume: str, taken: Taken, *, whole: bool) -> None:
    """Who took what from which point. Whoever may read the disk but not write the log leaves no line."""
    EventLog(StateDir(default_state_dir(options.state_dir)).events).record(
        "file.taken",
        user=getpass.getuser(),
        sudo_user=os.environ.get("SUDO_USER"),
        disk=point.partition("@")[0],
        point=point,
        volume=volume,
        path=printable(path_of(options).decode(errors="backslashreplace")),
        files=taken.files,
        bytes=taken.bytes,
        failed=taken.failed,
        whole=whole,
    )


def _answer(options: Namespace, point: str, taken: Taken) -> None:
    for problem in taken.problems:
        say(f"not fetched: {problem}")
    fields = {
        "point": point,
        "files": taken.files,
        "bytes": taken.bytes,
        "kept": taken.kept,
        "skipped": taken.skipped,
        "attributes_lost": taken.attributes_lost,
        "failed": taken.failed,
    }
    if options.json:
        answer_json(fields)
        return
    write = say if options.tar == "-" else answer
    kept = f", {taken.kept} were there already" if taken.kept else ""
    write(f"{point}: {taken.files} files, {format_bytes(taken.bytes)}{kept}")
    if taken.skipped:
        say(f"{taken.skipped} devices and sockets were left out")
    if taken.attributes_lost:
        say(f"{taken.attributes_lost} extended attributes could not be set here")
