"""`cdp file`: listing, printing and finding files of a point.

The point is opened here, from the state directory, and held by a lease; the service is asked first what instant is meant and
to make it durable, and is not needed. Names are bytes: in JSON one that is no UTF-8 has U+FFFD in its place and its bytes in
`name_hex`.
"""

import contextlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cdpserver import names
from cdpserver.errors import RefusedError, UnreachableError, UsageError
from cdpserver.files.browser import Browser, File
from cdpserver.files.fetch import DAMAGED
from cdpserver.held import HeldPoint
from cdpserver.names import Seq, format_bytes
from cdpserver.state import StateDir, default_state_dir
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

SORTED = 100_000
"""Entries of a directory that are sorted; what is beyond comes in the order in which it lies."""

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


@dataclass
class Place:
    """A point that is open: its absolute name, its browser, and the volume that is meant (None: not said)."""

    point: str
    browser: Browser
    volume: str | None


@contextlib.contextmanager
def opened(options: Namespace) -> Iterator[Place]:
    """The point of the options; with --lock it is locked first."""
    text, volume = names.split_volume(options.point)
    disk, when = names.parse_point(text)
    state = StateDir.open(default_state_dir(options.state_dir))
    with contextlib.suppress(UnreachableError):
        when = Seq(int(client(options).place(text)["seq"]))
    held = HeldPoint(state, disk, when)
    try:
        if getattr(options, "lock", False):
            client(options).add_lock(held.name, until=None, reason="locked while browsing", immutable=False)
            say(f"{held.name} is locked; to take it back: cdp point unlock {held.name}")
        with Browser(held.view) as browser:
            yield Place(held.name, browser, volume)
    finally:
        held.close()


def choose(place: Place) -> str:
    """The volume, its file system open; what is to be known of it is said."""
    volume = place.browser.choose(place.volume)
    for remark in place.browser.open(volume):
        say(f"{place.point}{'/' + volume if volume else ''}: {remark}")
    return volume


def path_of(options: Namespace) -> bytes:
    """The path as the file system holds it: any bytes that the shell gave."""
    return os.fsencode(options.path)


# --- commands


def ls(options: Namespace) -> None:
    """A directory; or the volumes."""
    with opened(options) as place:
        if place.volume is None and not path_of(options).strip(b"/"):
            volumes = place.browser.volumes()
            if sum(volume.holds not in ("", "lvm", "swap") for volume in volumes) > 1:
                _answer_volumes(options, place)
                return
        _answer_files(options, place.browser.entries(choose(place), path_of(options)))


def find(options: Namespace) -> None:
    """What matches, by path."""
    with opened(options) as place:
        found = place.browser.find(
            choose(place),
            path_of(options),
            name=None if options.name is None else os.fsencode(options.name),
            regex=None if options.regex is None else os.fsencode(options.regex),
            newer_ns=_newer_ns(options.newer),
            type=options.type,
        )
        if options.json:
            answer_json_items(map(row, _readable(found, [])))
            return
        problems: list[str] = []
        for file in _readable(found, problems):
            answer(_text(b"/".join(file.path)) or ".")
        _fail(problems)


def stat(options: Namespace) -> None:
    """One file."""
    with opened(options) as place:
        file = place.browser.stat(choose(place), path_of(options))
        if file.type == "unreadable":
            raise RefusedError(f"{_text(path_of(options))} cannot be read: {file.why}", hint=DAMAGED)
        attributes = {name: value.hex() for name, value in place.browser.xattrs(file).items()}
        path = f"/{row(file)['name'].lstrip('/')}"
        known = row(replace(file, path=file.path[-1:])) | {
            "path": path,
            "atime_ns": file.atime_ns,
            "links": file.links,
            "xattrs": attributes,
        }
        if options.json:
            answer_json(known | {"point": place.point})
        else:
            answer_fields(known | {"mode": _mode(file)})


def cat(options: Namespace) -> None:
    """Content to stdout."""
    with opened(options) as place:
        file = content_of(place, options)
        sys.stdout.flush()
        for start, end, data in place.browser.content(file):
            if data is not None:
                sys.stdout.buffer.write(data)
                continue
            for at in range(start, end, len(ZEROS)):
                sys.stdout.buffer.write(ZEROS[: min(len(ZEROS), end - at)])


def preview(options: Namespace) -> None:
    """The head of a file."""
    with opened(options) as place:
        file = content_of(place, options)
        head = place.browser.head(file, options.bytes)
        size = place.browser.image_size(head)
    text = _as_text(head, cut=file.size > len(head))
    found: dict[str, Any] = {"name": row(file)["name"], "size": file.size, "bytes": len(head)}
    if size is not None:
        found |= {"kind": "image", "width": size[0], "height": size[1]}
    else:
        found |= {"kind": "binary"} if text is None else {"kind": "text"}
    if options.json:
        answer_json(found | ({"hex": head.hex()} if text is None else {"text": text}))
        return
    if size is not None:
        answer(f"{found['name']}: an image, {size[0]} x {size[1]}, {format_bytes(file.size)}")
    elif text is not None:
        for line in text.split("\n"):
            answer(line.expandtabs())
    else:
        for at in range(0, len(head), 16):
            part = head[at : at + 16]
            shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            answer(f"{at:08x}  {part.hex(' '):<47}  {shown}")
    if file.size > len(head) and size is None:
        say(f"the first {len(head)} of {file.size} bytes; all of them: cdp file cat")


def content_of(place: Place, options: Namespace) -> File:
    """The file whose content is meant, links followed. UsageError for what has none."""
    file = place.browser.stat(choose(place), path_of(options), follow=True)
    if file.type != "file":
        said = f": {file.why}" if file.why else f" is a {file.type}"
        raise UsageError(f"{_text(path_of(options))}{said}", hint="cdp file ls shows what is there")
    return file


# --- answers


def row(file: File) -> dict[str, Any]:
    """A file for programs. Names that are no UTF-8 come with their bytes."""
    name = b"/".join(file.path) or b"/"
    known: dict[str, Any] = {
        "name": name.decode(errors="replace"),
        "type": file.type,
        "size": file.size,
        "mtime_ns": file.mtime_ns,
        "mode": file.mode,
        "uid": file.uid,
        "gid": file.gid,
        "target": None if file.target is None else file.target.decode(errors="replace"),
    }
    if not _is_utf8(name):
        known["name_hex"] = name.hex()
    if file.target is not None and not _is_utf8(file.target):
        known["target_hex"] = file.target.hex()
    if file.why:
        known["why"] = file.why
    return known


def _answer_volumes(options: Namespace, place: Place) -> None:
    nothing = {"mtime_ns": None, "mode": None, "uid": None, "gid": None, "target": None}
    rows = [
        {"name": volume.name, "type": "volume", "size": volume.size}
        | nothing
        | {"holds": volume.holds, "note": volume.note}
        for volume in place.browser.volumes()
    ]
    if options.json:
        answer_json(rows)
        return
    answer_table(VOLUME_COLUMNS, rows, nothing="no volumes")
    say(f"the files of one: cdp file ls {names.split_volume(options.point)[0]}/{rows[0]['name']} /")


def _answer_files(options: Namespace, found: Iterator[File]) -> None:
    first = sorted((file for file, _ in zip(found, range(SORTED), strict=False)), key=_name)
    if options.json:
        answer_json_items(map(row, _and_then(first, found)))
        return
    answer_table(COLUMNS, list(map(_line, first)), nothing="the directory is empty")
    for file in found if len(first) == SORTED else ():
        answer("  ".join(format_field(key, value) for key, value in _line(file).items()))


def _line(file: File) -> dict[str, Any]:
    known = {"mode_text": _mode(file), "uid": file.uid, "gid": file.gid, "size_text": str(file.size)}
    return known | {"time_ns": max(file.mtime_ns, 0), "shown": _shown(file)}


def _and_then(first: list[File], rest: Iterator[File]) -> Iterator[File]:
    yield from first
    if len(first) == SORTED:
        yield from rest


def _readable(found: Iterator[File], problems: list[str]) -> Iterator[File]:
    for file in found:
        if file.type == "unreadable":
            problems.append(f"{_text(b'/'.join(file.path))}: {file.why}")
            say(f"{_text(b'/'.join(file.path))} cannot be read: {file.why}")
        else:
            yield file


def _fail(problems: list[str]) -> None:
    if problems:
        raise RefusedError(f"{len(problems)} places could not be looked at", hint=DAMAGED)


def _name(file: File) -> bytes:
    return file.name


def _shown(file: File) -> str:
    if file.type == "unreadable":
        return f"{_text(file.name)} (cannot be read: {file.why})"
    return _text(file.name) + (f" -> {_text(file.target)}" if file.target is not None else "")


def _mode(file: File) -> str:
    bits = "".join(
        letter if file.mode >> shift & 1 else "-"
        for letter, shift in zip("rwxrwxrwx", range(8, -1, -1), strict=True)
    )
    return f"{LETTERS.get(file.type, '-')}{bits}"


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def shown_path(path: tuple[bytes, ...]) -> str:
    """A path for a terminal; `.` for where one looked."""
    return _text(b"/".join(path)) or "."


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _as_text(head: bytes, *, cut: bool) -> str | None:
    """UTF-8 text, of which a last character may be cut off."""
    if b"\0" in head:
        return None
    for length in range(len(head), max(len(head) - (4 if cut else 1), -1), -1):
        with contextlib.suppress(UnicodeDecodeError):
            return head[:length].decode()
    return None


def _newer_ns(text: str | None) -> int | None:
    match names.parse_when(text) if text is not None else None:
        case names.At(time_ns):
            return time_ns
        case names.Ago(delta_ns):
            return time.time_ns() - delta_ns
    return None


ZEROS = bytes(1 << 20)
