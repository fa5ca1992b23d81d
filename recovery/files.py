"""`cdp file`: listing, printing and finding files of a point.

The service is asked, if it runs: it has the point open, and a process that parses loaded. Else the point is opened here, from the
state directory, and held by a lease. Names are bytes: in JSON one that is no UTF-8 has U+FFFD in its place and its bytes in
`name_hex`.
"""

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from cdpserver import names
from cdpserver.errors import RefusedError, UnreachableError
from cdpserver.files import DAMAGED
from cdpserver.names import format_bytes
from recovery.files_asked import AskedFiles
from recovery.output import (
    Column,
    answer,
    answer_fields,
    answer_json,
    answer_json_items,
    answer_table,
    format_field,
    say,
)
from recovery.remote import client
from recovery.together import one_disk

SORTED = 100_000
"""Rows of a table that are lined up; what is beyond comes as it is."""

COLUMNS = (
    Column("mode_text", "mode"),
    Column("uid", right=True),
    Column("gid", right=True),
    Column("size_text", "size", right=True),
    Column("time_ns", "modified"),
    Column("shown", "name"),
)
VOLUME_COLUMNS = (Column("name", "volume"), Column("size", right=True), Column("holds"), Column("note"))
LETTERS = {"dir": "d", "link": "l", "fifo": "p", "socket": "s", "char": "c", "block": "b"}


class Source(Protocol):
    """Where the answers are from: the service, or this process."""

    point: str
    """Absolute, with the volume that was named."""

    def listing(self, path: bytes) -> Iterator[dict[str, Any]]:
        """A directory, or the volumes."""

    def find(self, path: bytes, wanted: Mapping[str, str | None]) -> Iterator[dict[str, Any]]:
        """What is below and matches."""

    def stat(self, path: bytes) -> dict[str, Any]:
        """All that is known of a file."""

    def preview(self, path: bytes, most: int) -> dict[str, Any]:
        """The head of a file."""

    def content(self, path: bytes) -> Iterator[bytes]:
        """A file, in pieces."""


@contextlib.contextmanager
def opened(options: Namespace) -> Iterator[Source]:
    """The point of the options; with --lock it is locked first."""
    options.point = one_disk(options, options.point)
    text, volume = names.split_volume(options.point)
    service = client(options)
    seq: int | None = None
    with contextlib.suppress(UnreachableError):
        seq = int(service.place(text)["seq"])
    if seq is not None:
        point = f"{text.partition('@')[0]}@seq:{seq}"
        if getattr(options, "lock", False):
            service.add_lock(point, until=None, reason="locked while browsing", immutable=False)
            say(f"{point} is locked; to take it back: cdp point unlock {point}")
    else:
        _check_no_lock(options)
    if seq is None or options.key_file is not None:
        # A key stays with whoever has it.
        from recovery.files_local import opened as opened_here

        with opened_here(options) as local:
            yield local
        return
    yield AskedFiles(service, point + ("" if volume is None else f"/{volume}"))


def _check_no_lock(options: Namespace) -> None:
    """A lock is the service's: asking it says how to start it."""
    if getattr(options, "lock", False):
        client(options).status()


def path_of(options: Namespace) -> bytes:
    """The path as the file system holds it: any bytes that the shell gave."""
    return os.fsencode(options.path)


# --- commands


def ls(options: Namespace) -> None:
    """A directory; or the volumes."""
    with opened(options) as source:
        found = source.listing(path_of(options))
        if options.json:
            answer_json_items(found)
            return
        first = list(islice(found, SORTED))
        if first and first[0]["type"] == "volume":
            answer_table(VOLUME_COLUMNS, first, nothing="no volumes")
            point = names.split_volume(options.point)[0]
            say(f"the files of one: cdp file ls {point}/{first[0]['name']} /")
            return
        answer_table(COLUMNS, list(map(_line, first)), nothing="the directory is empty")
        for row in found:
            answer("  ".join(format_field(key, value) for key, value in _line(row).items()))


def find(options: Namespace) -> None:
    """What matches, by path."""
    wanted = {key: getattr(options, key) for key in ("name", "regex", "newer", "type")}
    problems = 0
    with opened(options) as source:
        found = source.find(path_of(options), wanted)
        if options.json:
            answer_json_items(found)
            return
        for row in found:
            if row["type"] == "unreadable":
                problems += 1
                say(f"{shown_name(row)} cannot be read: {row['why']}")
            else:
                name = shown_name(row)
                answer("." if name == "/" else name)
    if problems:
        raise RefusedError(f"{problems} places could not be looked at", hint=DAMAGED)


def stat(options: Namespace) -> None:
    """One file."""
    with opened(options) as source:
        known = source.stat(path_of(options))
    if options.json:
        answer_json(known)
    else:
        known.pop("point")
        answer_fields(known | {"mode": _mode(known)})


def cat(options: Namespace) -> None:
    """Content to stdout."""
    with opened(options) as source:
        sys.stdout.flush()
        for data in source.content(path_of(options)):
            sys.stdout.buffer.write(data)


def preview(options: Namespace) -> None:
    """The head of a file."""
    with opened(options) as source:
        found = source.preview(path_of(options), options.bytes)
    if options.json:
        answer_json({key: value for key, value in found.items() if key != "point"})
        return
    if found["kind"] == "image":
        size = f"{found['width']} x {found['height']}"
        answer(f"{found['name']}: an image, {size}, {format_bytes(found['size'])}")
    elif "text" in found:
        for line in found["text"].split("\n"):
            answer(line.expandtabs())
    else:
        head = bytes.fromhex(found["hex"])
        for at in range(0, len(head), 16):
            part = head[at : at + 16]
            shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            answer(f"{at:08x}  {part.hex(' '):<47}  {shown}")
    if found["size"] > found["bytes"] and found["kind"] != "image":
        say(f"the first {found['bytes']} of {found['size']} bytes; all of them: cdp file cat")


# --- rows for people


def shown_name(row: Mapping[str, Any], field: str = "name") -> str:
    """A name in a row; bytes that are no UTF-8 are escaped."""
    held = row.get(f"{field}_hex")
    return str(row[field]) if held is None else bytes.fromhex(held).decode(errors="backslashreplace")


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    known = {"mode_text": _mode(row), "uid": row["uid"], "gid": row["gid"], "size_text": str(row["size"])}
    shown = shown_name(row)
    if row["type"] == "unreadable":
        shown += f" (cannot be read: {row['why']})"
    elif row["target"] is not None:
        shown += f" -> {shown_name(row, 'target')}"
    return known | {"time_ns": max(row["mtime_ns"], 0), "shown": shown}


def _mode(row: Mapping[str, Any]) -> str:
    bits = "".join(
        letter if row["mode"] >> shift & 1 else "-"
        for letter, shift in zip("rwxrwxrwx", range(8, -1, -1), strict=True)
    )
    return f"{LETTERS.get(row['type'], '-')}{bits}"
