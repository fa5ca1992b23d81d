"""Structured log lines on stderr, and the event file that keeps what an operator may ask about later.

An event has a dotted name (`target.unknown-export`) and fields. Several processes append to one file: each
line is one write with O_APPEND, so lines never mix; only one process rotates, under flock; and what was still
written to the rotated file is in `events.1.jsonl`. Times are those of the wall clock, so that they can be
matched with other logs.

Durability: none is promised. An event that cannot be written is logged and dropped: the work goes on.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cdpserver.names import format_time

EVENT_FILE_BYTES = 16 << 20
"""Size past which the event file is rotated: with its predecessor 32 MiB, months of a calm server's events.
"""

EVENT_LINE_BYTES = 64 << 10
"""Longest event line; a longer one keeps its name and says that its fields were left out."""

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

_EVENT_NAME = re.compile(r"[a-z0-9-]+(?:\.[a-z0-9-]+)+")
_process = "cdp"


def configure(process: str) -> None:
    """Name this process in its events."""
    global _process
    _process = process


class EventLog:
    """The event file at `path`; `events.jsonl` is followed by `events.1.jsonl` when it is full."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def emit(self, event: str, *, level: Level = "info", **fields: Any) -> None:
        """Log the event and append it to the file. Never raises because of what the system does."""
        line = _line(event, level, fields)
        _show(line)
        self._keep(line)

    def record(self, event: str, *, level: Level = "info", **fields: Any) -> None:
        """Append it to the file alone: what a command does at a terminal is no line of a log there."""
        self._keep(_line(event, level, fields))

    def _keep(self, line: bytes) -> None:
        try:
            self._append(line)
        except OSError as error:
            lost = {"path": str(self._path), "error": error.strerror}
            _show(_line("events.file-failed", "error", lost))

    def _append(self, line: bytes) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            # A line cut short by a full disk or a power loss must not swallow this one. (Another process may be
            # in the middle of its write: then there is an empty line, which readers pass over.)
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(fd, line)
            if written < len(line):
                os.write(fd, line[written:])  # says why: usually ENOSPC
            if size + len(line) > EVENT_FILE_BYTES:
                self._rotate(fd)
        finally:
            os.close(fd)

    def _rotate(self, fd: int) -> None:
        """Rename the file open as `fd`, unless another process does it or did it already."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                os.rename(self._path, previous_file(self._path))


def previous_file(path: Path) -> Path:
    """Where the event file before `path` is: events.1.jsonl."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def _line(event: str, level: Level, fields: dict[str, Any]) -> bytes:
    assert _EVENT_NAME.fullmatch(event), event
    head = {"time": format_time(time.time_ns()), "level": level, "process": _process, "event": event}
    # The head comes first, and no field replaces what it says.
    line = json.dumps(head | fields | head, default=repr).encode() + b"\n"
    if len(line) > EVENT_LINE_BYTES:
        line = json.dumps(head | {"left_out": sorted(fields)[:100]}).encode() + b"\n"
    return line


def _show(line: bytes) -> None:
    """Log a line: one write to whatever sys.stderr is at that moment, so that processes don't mix theirs."""
    # A closed or full stderr must not stop the server (ValueError: closed file).
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line.decode())
        sys.stderr.flush()


def _newest_first(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * EVENT_FILE_BYTES))
            lines = file.read(2 * EVENT_FILE_BYTES).split(b"\n")
    except FileNotFoundError:
        return
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def read_events(path: Path, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` events, oldest of them first. Damaged lines are passed over."""
    newest: list[dict[str, Any]] = []
    for file in (path, previous_file(path)):
        for event in _newest_first(file):
            if len(newest) >= limit:
                return newest[::-1]
            newest.append(event)
    return newest[::-1]
