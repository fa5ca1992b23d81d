"""Nodes: published base points, each a QCOW2 file and a note beside it.

    bp-N.json    which instant the file holds: written first, never changed
    bp-N.qcow2   the content; its header names the file that it stands on

The journal says the same of a cut as long as it holds the interval; the note says it after that. So a base point can be named,
placed and graded when nothing is left of the history around it.
Invariants: a published file has a note; a note without a file means nothing. Any node may stand on any older one, by relative
name, so nodes between can go.
"""

import contextlib
import json
import os
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from cdpserver import durable
from cdpserver.errors import CorruptError
from cdpserver.journal.control import Grade
from cdpserver.journal.observed import NOT_WRITTEN, Observed, read_observed

NUMBERED = re.compile(r"bp-(0|[1-9][0-9]{0,17})\.qcow2")
"""The name of a published base point."""

HEADER = struct.Struct(">4sIQIIQ")
"""Start of a QCOW2 file: magic, version, backing file's offset, its length, cluster bits, size of the disk."""

MAGIC = b"QFI\xfb"
MANUAL = "manual.json"
"""In a timeline: which base points somebody asked for, from before they are published. Their notes say it too."""

LEFT_OUT = "left-out.json"
"""In a timeline: which cuts get no base point, since what they would hold rotted and somebody said so."""

ROTTED = "rotted"
"""In a timeline, empty: a base point waits for what rotted. A copy of the whole disk verifies what it compares with."""

MAX_BACKING_NAME = 1023
"""QEMU's own limit."""


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
    observed: Observed = NOT_WRITTEN
    manual: bool = False
    """Somebody asked for it; the clock cut the others."""


def base_point_path(timeline: Path, number: int) -> Path:
    """Where base point `number` is once it is published."""
    return timeline / f"bp-{number}.qcow2"


def note_path(timeline: Path, number: int) -> Path:
    """Where its note is."""
    return timeline / f"bp-{number}.json"


def listed_manual(timeline: Path) -> set[int]:
    """The base points of `manual.json`. CorruptError."""
    path = timeline / MANUAL
    try:
        value = durable.read_json(path)
    except FileNotFoundError:
        return set()
    durable.take_keys(value, {"numbers"}, path)
    numbers = value["numbers"]
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        raise durable.corrupt_json(path, "'numbers' are not base points")
    return set(numbers)


def write_note(timeline: Path, node: Node) -> None:
    """Durable on return. Before the file is published; says of itself whether somebody asked for it."""
    manual = node.manual
    with contextlib.suppress(CorruptError):  # said at the service's start
        manual = manual or node.number in listed_manual(timeline)
    value: dict[str, Any] = {
        "number": node.number,
        "seq": node.seq,
        "time_ns": node.time_ns,
        "interval": node.interval,
        "grade": int(node.grade),
        "session": node.session,
        "evidence": node.evidence,
        "manual": manual,
    }
    if node.observed.by:
        value["observed"] = asdict(node.observed)
    durable.write_json(note_path(timeline, node.number), {**value, "digest": _digest(value)})


def left_out(timeline: Path) -> set[int]:
    """The cuts that get no base point. A damaged list says nothing: those base points wait again, and a repair asks again."""
    try:
        value = durable.read_json(timeline / LEFT_OUT)
    except (FileNotFoundError, CorruptError):
        return set()
    digest, numbers = value.pop("digest", None), value.get("numbers")
    sound = digest == _digest(value) and isinstance(numbers, list)
    return {number for number in numbers if type(number) is int} if sound and numbers else set()


def leave_out(timeline: Path, number: int) -> None:
    """Cut `number` gets no base point: the next one stands on the one before it. Durable on return."""
    value = {"numbers": sorted(left_out(timeline) | {number})}
    durable.write_json(timeline / LEFT_OUT, {**value, "digest": _digest(value)})


def _digest(value: dict[str, Any]) -> str:
    """Of what a note says. The instant that a file holds is known by nothing else once the journal around it is gone."""
    return blake3(json.dumps(value, sort_keys=True).encode()).hexdigest(16)


def read_note(timeline: Path, number: int) -> Node:
    """The note of base point `number`. FileNotFoundError, CorruptError."""
    path = note_path(timeline, number)
    value = durable.read_json(path)
    digest = value.pop("digest", None)  # older notes have none
    if digest is not None and digest != _digest(value):
        raise CorruptError(f"{path} is damaged", hint="cdp check says what it touches")
    keys = {"number", "seq", "time_ns", "interval", "grade", "session", "evidence"}
    manual = value.pop("manual", False)
    seen = value.pop("observed", None)
    observed = NOT_WRITTEN if seen is None else read_observed(seen, str(path))
    durable.take_keys(value, keys, path)
    sound = all(type(value[key]) is int and value[key] >= 0 for key in keys) and type(manual) is bool
    if not sound or value["number"] != number:
        raise CorruptError(f"{path} is damaged", hint="cdp check says what it touches")
    try:
        grade = Grade(value["grade"])
    except ValueError:
        raise CorruptError(f"{path} is damaged", hint="cdp check says what it touches") from None
    return Node(**{**value, "grade": grade, "manual": manual, "observed": observed})


def published(timeline: Path) -> list[int]:
    """Numbers of the base points whose files are there."""
    names = (NUMBERED.fullmatch(name) for name in os.listdir(timeline))
    return sorted(int(match[1]) for match in names if match)


def nodes(timeline: Path) -> list[Node]:
    """Every published base point that has a note, oldest first.

    One whose note is lost or damaged is no node until the service's next start or `cdp check` finds it.
    """
    found = []
    for number in published(timeline):
        with contextlib.suppress(FileNotFoundError, CorruptError):
            found.append(read_note(timeline, number))
    return found


def without_note(timeline: Path) -> list[int]:
    """Numbers of the published base points that have no note, or a damaged one."""
    noted = {node.number for node in nodes(timeline)}
    return [number for number in published(timeline) if number not in noted]


def newest_at(timeline: Path, seq: int) -> Node | None:
    """The newest node at or before `seq`."""
    return next((node for node in reversed(nodes(timeline)) if node.seq <= seq), None)


def read_header(path: Path) -> tuple[str, int]:
    """(backing file's relative name, empty if there is none, size of the disk) of a QCOW2 file; CorruptError."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or head[:4] != MAGIC:
            raise CorruptError(f"{path.name} is no QCOW2 file")
        _, version, offset, length, _, size = HEADER.unpack(head)
        if version != 3 or length > MAX_BACKING_NAME or offset > 1 << 21:
            raise CorruptError(f"{path.name} has a header that no base point has")
        file.seek(offset)
        name = file.read(length) if offset else b""
    if offset and len(name) < length:
        raise CorruptError(f"{path.name} is cut short")
    return name.decode(errors="replace"), size
