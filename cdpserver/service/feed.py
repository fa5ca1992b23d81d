"""The event file as a feed: every event has a place, and what follows a place can be read, across a rotation.

    place = FILE-OFFSET     FILE: CRC-32 of the file's first line, which begins with the time; not its inode, which the
                            next file but one may get. OFFSET: the end of an event's line, where the next one begins.

Nothing stays open between two readings, so that any number of followers costs no file descriptor and no memory.
"""

import contextlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdpserver import names
from cdpserver.errors import UsageError
from cdpserver.events import EVENT_LINE_BYTES, previous_file

BLOCK = 4 * EVENT_LINE_BYTES
"""Read at a time; a line is never longer than a part of it."""

MOST_BLOCKS = 32
"""Read in one call, so that a filter that takes nothing holds no thread for long."""

SETTLED_S = 1.0
"""What opened the file before it was rotated has written to it by then."""

LEVELS = ("debug", "info", "warning", "error")

_PLACE = re.compile(r"([0-9a-f]{8})-([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Place:
    """Between two lines of a file."""

    file: int
    offset: int

    def __str__(self) -> str:
        return f"{self.file:08x}-{self.offset}"

    @classmethod
    def parse(cls, text: str) -> "Place":
        """UsageError for what is none."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"not a place in the events: {names.show(text)}",
                hint="take it from an event's place, or leave it out",
            )
        return cls(int(match[1], 16), int(match[2]))


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events are wanted. `level` is the least; `event` a name or the noun that it begins with."""

    level: str | None = None
    event: str | None = None
    disk: str | None = None
    since: str = ""
    """As the events write their time."""

    def __post_init__(self) -> None:
        if self.level is not None and self.level not in LEVELS:
            raise UsageError(f"not a level: {names.show(self.level)}", hint=f"levels are {', '.join(LEVELS)}")

    def takes(self, event: dict[str, Any]) -> bool:
        """Is this one wanted?"""
        name, level = str(event.get("event")), event.get("level")
        if self.level is not None and (
            level not in LEVELS or LEVELS.index(str(level)) < LEVELS.index(self.level)
        ):
            return False
        if self.event is not None and name != self.event and not name.startswith(f"{self.event}."):
            return False
        if self.disk is not None and self.disk not in (event.get("disk"), event.get("fork")):
            return False
        return str(event.get("time")) >= self.since


def since_text(since: str | None) -> str:
    """WHEN as the events write it. They have the wall clock's time. UsageError for what is no time."""
    if since is None:
        return ""
    match names.parse_when(since):
        case names.At(time_ns):
            return names.format_time(time_ns)
        case names.Ago(delta_ns):
            return names.format_time(max(0, time.time_ns() - delta_ns))
        case _:
            raise UsageError(f"not a time: {names.show(since)}", hint="such as -1h or 2027-01-15T08:00Z")


@dataclass(slots=True)
class Batch:
    """Events, oldest first, each with its `place`; where reading ended; whether events before them are lost."""

    events: list[dict[str, Any]] = field(default_factory=list)
    place: Place | None = None
    at_end: bool = False
    lost: bool = False


class Feed:
    """The events of a state directory. For threads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def newest(self, wanted: Filter, count: int) -> Batch:
        """The newest `count` events, and the place behind everything that was looked at."""
        batch = Batch(at_end=True)
        with self._opened() as files:
            for fd, file in reversed(files):
                size = os.fstat(fd).st_size
                whole = os.pread(fd, size, 0)
                end = whole.rfind(b"\n") + 1
                batch.place = batch.place or Place(file, end)
                while end and len(batch.events) < count:
                    start = whole.rfind(b"\n", 0, end - 1) + 1
                    _take(batch.events, whole[start:end], Place(file, end), wanted)
                    end = start
        batch.events.reverse()
        return batch

    def after(self, place: Place | None, wanted: Filter, count: int, *, settled: bool = False) -> Batch:
        """At most `count` events behind a place, or from the oldest on.

        With `settled` a rotated file is left only when nobody can still write to it: for who reads on for ever.
        """
        batch = Batch(place=place)
        with self._opened() as files:
            known = [number for number, (_, file) in enumerate(files) if place and file == place.file]
            first = known[0] if known else 0
            offset = place.offset if known and place else 0
            if place is not None and not (known and _is_between_lines(files[first][0], offset)):
                batch.lost, offset = True, 0
            blocks = MOST_BLOCKS
            for number, (fd, file) in enumerate(files[first:], first):
                blocks = _read(fd, Place(file, offset), batch, wanted, count, blocks)
                if not blocks or len(batch.events) >= count:
                    return batch
                last = number == len(files) - 1
                if settled and not last and abs(time.time() - os.fstat(fd).st_mtime) < SETTLED_S:
                    break
                offset = 0
        batch.at_end = True
        return batch

    @contextlib.contextmanager
    def _opened(self) -> Iterator[list[tuple[int, int]]]:
        """(fd, file) of the files that hold a line, oldest first."""
        found: dict[int, int] = {}
        with contextlib.ExitStack() as opened:
            # The newer one first: when it is rotated meanwhile it is seen twice, and not the older one in its place.
            for path in (self._path, previous_file(self._path)):
                with contextlib.suppress(FileNotFoundError):
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    opened.callback(os.close, fd)
                    if (line := _first_line(fd)) is not None:
                        found.setdefault(zlib.crc32(line), fd)
            yield [(fd, file) for file, fd in reversed(found.items())]


def _first_line(fd: int) -> bytes | None:
    """None as long as it is not whole."""
    for length in (1024, BLOCK):
        begin = os.pread(fd, length, 0)
        end = begin.find(b"\n") + 1
        if end or len(begin) == BLOCK:
            return begin[: end or BLOCK]
    return None


def _is_between_lines(fd: int, offset: int) -> bool:
    """Can a line begin here? A place may come from anywhere."""
    return offset == 0 or os.pread(fd, 1, offset - 1) == b"\n"


def _read(fd: int, place: Place, batch: Batch, wanted: Filter, count: int, blocks: int) -> int:
    """Read one file on into the batch until that is full; how many blocks may still be read."""
    offset = place.offset
    while blocks:
        batch.place = Place(place.file, offset)
        block = os.pread(fd, BLOCK, offset)
        blocks -= 1
        end = block.rfind(b"\n") + 1
        if not end:
            if len(block) < BLOCK:
                break
            end = len(block)  # no line of ours is as long
        start = 0
        while start < end:
            stop = block.find(b"\n", start) + 1 or end
            batch.place = Place(place.file, offset + stop)
            _take(batch.events, block[start:stop], batch.place, wanted)
            if len(batch.events) >= count:
                return blocks
            start = stop
        offset += end
    return blocks


def _take(events: list[dict[str, Any]], line: bytes, place: Place, wanted: Filter) -> None:
    """Keep the event of a line, if it is wanted. Damaged lines are passed over."""
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(line)
        if isinstance(event, dict) and wanted.takes(event):
            events.append(event | {"place": str(place)})
