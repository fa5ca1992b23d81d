"""Nodes: published base points, each a QCOW2 file and a note beside it.

    bp-N.json    which instant the file holds: written first, never changed
    bp-N.qcow2   the content; its header names the file that it stands on

The journal says the same of a cut as long as it holds the interval; the note says it after that. So a base point can be named, placed
and graded when nothing is left of the history around it.
Invariants: a published file has a note; a note without a file means nothing. Any node may stand on any older one, by relative name, so
nodes between can go.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from cdpserver import durable
from cdpserver.errors import CorruptError
from cdpserver.journal.control import Grade
from cdpserver.timeline import take_keys

_NOTE = re.compile(r"bp-(0|[1-9][0-9]{0,17})\.json")

HEADER = struct.Struct(">4sIQI")
"""QCOW2: magic, version, offset and length of the backing file's name (docs/interop/qcow2.txt of QEMU)."""

MAGIC = b"QFI\xfb"
MAX_NAME = 1023


@dataclass(frozen=True, slots=True)
class Node:
    """A published base point: the content at the end of `interval`, whose last record is `seq`."""

    number: int
    seq: int
    time_ns: int
    interval: int
    grade: Grade
    session: int
    evidence: int


def base_point_path(timeline: Path, number: int) -> Path:
    """Where base point `number` is once it is published."""
    return timeline / f"bp-{number}.qcow2"


def note_path(timeline: Path, number: int) -> Path:
    """Where its note is."""
    return timeline / f"bp-{number}.json"


def write_note(timeline: Path, node: Node) -> None:
    """Durable on return. Before the file is published."""
    value = {
        "number": node.number,
        "seq": node.seq,
        "time_ns": node.time_ns,
        "interval": node.interval,
        "grade": int(node.grade),
        "session": node.session,
        "evidence": node.evidence,
    }
    durable.write_json(note_path(timeline, node.number), value)


def read_note(timeline: Path, number: int) -> Node:
    """The note of base point `number`. FileNotFoundError, CorruptError."""
    path = note_path(timeline, number)
    value = durable.read_json(path)
    keys = {"number", "seq", "time_ns", "interval", "grade", "session", "evidence"}
    take_keys(value, keys, path)
    if any(type(value[key]) is not int or value[key] < 0 for key in keys) or value["number"] != number:
        raise CorruptError(f"{path} is damaged", hint="cdp check says what it touches")
    try:
        grade = Grade(value["grade"])
    except ValueError:
        raise CorruptError(f"{path} is damaged", hint="cdp check says what it touches") from None
    return Node(**{**value, "grade": grade})


def nodes(timeline: Path) -> list[Node]:
    """Every published base point with its note, oldest first. CorruptError for a damaged note."""
    names = (_NOTE.fullmatch(path.name) for path in timeline.iterdir())
    numbers = sorted(int(match[1]) for match in names if match)
    return [read_note(timeline, n) for n in numbers if base_point_path(timeline, n).exists()]


def newest_at(timeline: Path, seq: int) -> Node | None:
    """The newest node at or before `seq`."""
    return next((node for node in reversed(nodes(timeline)) if node.seq <= seq), None)


def backing_name(path: Path) -> str | None:
    """The relative name of the file that a QCOW2 file stands on, as its header says; None if it stands alone. CorruptError."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
        magic, _, offset, length = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0, 0)
        if magic != MAGIC or length > MAX_NAME:
            raise CorruptError(f"{path} is not a QCOW2 file", hint="cdp check says what it touches")
        if not offset:
            return None
        file.seek(offset)
        return file.read(length).decode(errors="surrogateescape")
