"""A timeline's directory as text: what it is, its first copy, its intervals, segments and control records, its base points.

Only header logs are read, a part at a time, and of their records only the control records: a year of history costs a pass over
64 bytes a write. A part that cannot be read is a line of its own, and what follows it is still shown.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdpserver import durable, timeline
from cdpserver.errors import CdpError
from cdpserver.index.merged import DIRECTORY as MERGED
from cdpserver.journal import control
from cdpserver.journal.instants import FILE as INSTANTS
from cdpserver.journal.log import interval_path, segments
from cdpserver.journal.segment import SegmentReader, log_path
from cdpserver.timeline import INTERVALS, ImageBase, Timeline
from recovery.item import Item
from recovery.segment_text import STATES, SegmentText, Shown

_BASE_POINT = re.compile(r"bp-(0|[1-9][0-9]{0,17})\.qcow2")
_INTERVAL = re.compile(r"[0-9]{6,18}")
_INDEX = re.compile(r"index\.mdb|open-.{1,8}\.mdb")


def items(directory: Path) -> Iterator[Item]:
    """Everything in the timeline's `directory`. NotFoundError if there is none, CorruptError if its first file is damaged."""
    found = timeline.load(directory)
    fields = found.to_json()
    base = fields.pop("base")
    yield Item("timeline", fields)
    yield _base(directory, found, base)
    yield from _first_copy(directory)
    for number in _numbers(directory / INTERVALS, _INTERVAL):
        yield from _interval(directory, number)
    for path in sorted((directory / MERGED).glob("*")):
        yield Item(
            "left-over" if path.name.startswith(".") else "merged-index", {"file": f"{MERGED}/{path.name}"}
        )
    for number in _numbers(directory, _BASE_POINT):
        yield Item("base-point", {"number": number, "file": f"bp-{number}.qcow2"})
    for path in sorted(directory.glob(f"{durable.TEMPORARY}*")):
        yield Item("left-over", {"file": path.name})


def _numbers(directory: Path, form: re.Pattern[str]) -> list[int]:
    """The numbers in the names in `directory` that have this form, ascending."""
    if not directory.is_dir():
        return []
    matches = (form.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[match.lastindex or 0]) for match in matches if match)


def _base(directory: Path, found: Timeline, base: dict[str, Any]) -> Item:
    """What the history stands on; for an image also what that was made from."""
    if not isinstance(found.base, ImageBase):
        return Item("base", base)
    noted = (directory.parent.parent / found.base.file).with_suffix(".json")
    try:
        return Item("base", base | {"made_from": durable.read_json(noted)})
    except FileNotFoundError:
        return Item("base", base)
    except CdpError as error:
        return Item("base", base, error.message)


def _first_copy(directory: Path) -> Iterator[Item]:
    # Without this file the switch to the journal is over, or there was none to make.
    with contextlib.suppress(FileNotFoundError):
        try:
            yield Item("first-copy", durable.read_json(directory / "first-copy.json"))
        except CdpError as error:
            yield Item("first-copy", damage=error.message)
    with contextlib.suppress(FileNotFoundError):
        size = (directory / "base.raw").stat().st_size
        yield Item(
            "base-file", {"file": "base.raw", "bytes": size, "synced": (directory / "base.synced").exists()}
        )


def _interval(directory: Path, number: int) -> Iterator[Item]:
    path = interval_path(directory, number)
    held = segments(directory, number)
    indexes = sorted(entry.name for entry in path.iterdir() if _INDEX.fullmatch(entry.name))
    yield Item("interval", {"number": number, "segments": len(held), "indexes": indexes})
    yield from _instants(path, held)
    for segment in held:
        yield from _segment(directory, log_path(path, segment), number, segment)


def _instants(path: Path, held: list[int]) -> Iterator[Item]:
    """What a thinned interval can still give; nothing of a whole one, or of one whose first segment cannot be read."""
    with contextlib.ExitStack() as stack:
        found = None
        with contextlib.suppress(CdpError, IndexError, FileNotFoundError):
            reader = SegmentReader(path, held[0])
            stack.callback(reader.close)
            if not reader.header.thinned:
                return
            found = reader.instants
        if found is None:
            if (path / INSTANTS).exists():
                yield Item("instants", damage=f"{path / INSTANTS} cannot be read")
            return
        yield Item("instants", {"every_ns": found.every_ns, "count": len(found)})
        for seq, time_ns, until_ns, held_too in found.rows.tolist():
            yield Item(
                "instant", {"seq": seq, "time_ns": time_ns, "until_ns": until_ns, "held": bool(held_too)}
            )


def _segment(directory: Path, path: Path, interval: int, number: int) -> Iterator[Item]:
    fields: dict[str, Any] = {"file": str(path.relative_to(directory))}
    try:
        segment = SegmentText(path)
    except CdpError as error:
        yield Item("segment", fields, error.message)
        return
    with contextlib.closing(segment):
        header = segment.header
        fields |= {
            "state": STATES.get(segment.state, str(segment.state)),
            "records": segment.count,
            "first_seq": header.first_seq,
            "first_time_ns": header.first_time_ns,
            "boot": header.boot_id,
            "carry": control.pack(header.carry),
        }
        damage = segment.damage
        if (header.interval, header.segment) != (interval, number):
            damage = f"it is segment {header.segment} of interval {header.interval}"
        yield Item("segment", fields, damage)
        for shown in segment.controls():
            yield _control(shown)


def _control(shown: Shown) -> Item:
    """A control record, called by its type: session, synced, mark, cut, gap."""
    fields: dict[str, Any] = {"seq": shown.seq}
    if shown.record is not None:
        fields["time_ns"] = shown.record.time_ns
    if shown.message is None:
        return Item("control", fields, shown.damage)
    message = dict(shown.message)
    what = message.pop("type")
    return Item(what, fields | message, shown.damage)
