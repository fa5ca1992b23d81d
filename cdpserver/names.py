"""Names, sizes, durations and instants (WHEN) as an operator or an NBD client writes them; pure.

Whatever the text, the only error is UsageError. Its message is one printable line: foreign text stands in it
escaped and shortened. Numbers are exact integers throughout; no float is ever made of a size or a time.

Invariants: parse_when(format_when(w)) == w, and likewise for sizes, durations, times and export names.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from cdpserver.errors import UsageError
from cdpserver.limits import EXPORT_NAME_LENGTH, MAX_DISK_SIZE, NAME_LENGTH, SECTOR

MAX_NUMBER = (1 << 61) - 1
"""Largest seq or base point number: an index value keeps a seq in 61 bits (docs/format.md, Index)."""

MAX_TIME_NS = (293 * 365 + 71) * 86_400 * 1_000_000_000 - 1
"""Last instant of the year 2262, in which signed 64-bit nanoseconds end."""

SHOWN_LENGTH = 80
"""Characters of foreign text that an error message repeats."""

NAME_FORM = (
    f"letters, digits, '.', '_' and '-', beginning with a letter or digit, at most {NAME_LENGTH} characters"
)
WHEN_FORMS = (
    "an instant is latest, 2026-11-22T20:18:05.25Z (or with an offset such as +01:00), "
    "-90s (ms, s, m, h or d), bp:12, seq:48213 or a bookmark's name"
)
SIZE_FORMS = "a size is bytes or a number with K, M, G or T, such as 64M, 1.5G or 10T"
DURATION_FORMS = "a duration is a number with ms, s, m, h or d, such as 500ms, 1s, 20m or 24h"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,18}))?(?:([KMGTP])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,18}))?(ns|us|ms|s|m|h|d)")
_NUMBER = re.compile(r"[0-9]{1,19}")
_VOLUME = re.compile(r"p[1-9][0-9]{0,3}|lv/[A-Za-z0-9+_.-]{1,127}/[A-Za-z0-9+_.-]{1,127}")
_MIRROR = re.compile(r"([^:]*):([0-9a-f]{32})(:wait)?(?::([0-9]{1,19}))?")
_RFC3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)
# What somebody meant as a number, a duration or a date. No bookmark may be called so, because a mistyped
# instant must never open another one that happens to have that name.
_LIKE_AN_INSTANT = re.compile(
    r"[0-9][0-9tz:.+_-]*|[0-9.]+(?:ns|us|ms|s|sec|m|min|h|d|w|y)|latest|now", re.IGNORECASE | re.ASCII
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = 1_000_000_000
_UNITS_NS = {
    "d": 86_400 * _SECOND,
    "h": 3_600 * _SECOND,
    "m": 60 * _SECOND,
    "s": _SECOND,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
_SIZE_UNITS = {"P": 1 << 50, "T": 1 << 40, "G": 1 << 30, "M": 1 << 20, "K": 1 << 10}


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest record."""


@dataclass(frozen=True, slots=True)
class At:
    """The instant `time_ns` on the server's clock."""

    time_ns: int


@dataclass(frozen=True, slots=True)
class Ago:
    """`delta_ns` before now on the server's clock."""

    delta_ns: int


@dataclass(frozen=True, slots=True)
class BasePoint:
    """Base point `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class Seq:
    """Just after the record `seq`; 0 is before the first."""

    seq: int


@dataclass(frozen=True, slots=True)
class Mark:
    """The bookmark `name`."""

    name: str


When: TypeAlias = Latest | At | Ago | BasePoint | Seq | Mark


@dataclass(frozen=True, slots=True)
class DiskExport:
    """`NAME`: the disk itself, for its writer."""

    name: str


@dataclass(frozen=True, slots=True)
class MirrorExport:
    """`NAME:UUID`: the disk, for the one mirror of a running VM, and only if its timeline is this one.

    `:wait` after it: a write for which there is no room waits until there is.
    `:BORN` after it, from one worker to another, is when the client connected, in nanoseconds of the host's monotonic clock.
    """

    name: str
    uuid: str
    born_ns: int | None = None
    waits: bool = False


@dataclass(frozen=True, slots=True)
class PointExport:
    """`NAME@WHEN`: the disk as it was; with `/p3` or `/lv/VG/LV` after it, a partition or logical volume of it."""

    name: str
    when: When
    volume: str | None = None


@dataclass(frozen=True, slots=True)
class DeltaExport:
    """`NAME@delta:N`: what base point N changes against the one before it."""

    name: str
    number: int


Export: TypeAlias = DiskExport | MirrorExport | PointExport | DeltaExport


def show(text: str) -> str:
    """`text` quoted, escaped and shortened, so that it can stand in one line of a terminal or a log."""
    shown = repr(text[:SHOWN_LENGTH])
    return shown if len(text) <= SHOWN_LENGTH else f"{shown}... ({len(text)} characters)"


def check_name(text: str) -> str:
    """Return `text` if it is a name for a disk, VM, fork or bookmark."""
    if len(text) > NAME_LENGTH or not _NAME.fullmatch(text) or ".." in text:
        raise UsageError(f"not a name: {show(text)}", hint=f"a name is {NAME_FORM}, without '..'")
    return text


def check_disk_name(text: str) -> str:
    """Return `text` if it is `NAME` or `VM/NAME`."""
    parts = text.split("/")
    if len(parts) > 2 or len(text) > 2 * NAME_LENGTH + 1:
        raise UsageError(f"not a disk name: {show(text)}", hint=f"write NAME or VM/NAME; each is {NAME_FORM}")
    for part in parts:
        check_name(part)
    return text


def full_name(name: str, vm: str | None) -> str:
    """The one name of a disk: `NAME`, or `VM/NAME` for a disk of a VM."""
    return check_name(name) if vm is None else f"{check_name(vm)}/{check_name(name)}"


def split_name(text: str) -> tuple[str, str | None]:
    """The reverse of `full_name`: (name, vm)."""
    vm, slash, name = check_disk_name(text).rpartition("/")
    return (name, vm) if slash else (text, None)


def check_bookmark(text: str) -> str:
    """Return `text` if it can name a bookmark: a name that nobody could mean as another WHEN."""
    check_name(text)
    if _LIKE_AN_INSTANT.fullmatch(text):
        raise UsageError(
            f"not a bookmark name: {show(text)} reads as an instant",
            hint="choose a name such as before-upgrade",
        )
    return text


# --- sizes and durations


def _scaled(whole: str, fraction: str | None, unit: int) -> int | None:
    """`whole.fraction` units as an exact integer, or None when it is none."""
    digits = fraction or ""
    value, rest = divmod(int(whole + digits) * unit, 10 ** len(digits))
    return None if rest else value


def parse_size(text: str) -> int:
    """A disk size in bytes: positive, a multiple of 512, at most MAX_DISK_SIZE."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"not a size: {show(text)}", hint=SIZE_FORMS)
    whole, fraction, suffix = match.groups()
    size = _scaled(whole, fraction, _SIZE_UNITS[suffix.upper()] if suffix else 1)
    if size == 0:
        raise UsageError(f"a disk of {show(text)} would be empty", hint=SIZE_FORMS)
    if size is None or size % SECTOR:
        raise UsageError(f"size {show(text)} is not a multiple of {SECTOR} bytes", hint=SIZE_FORMS)
    if size > MAX_DISK_SIZE:
        raise UsageError(f"size {show(text)} is too large", hint=f"the limit is {format_size(MAX_DISK_SIZE)}")
    return size


def format_size(size: int) -> str:
    """`size` bytes exactly: `64M`, `1.5G`, `10T`, or plain bytes when no short form is exact."""
    for suffix, unit in _SIZE_UNITS.items():
        quarters, rest = divmod(size * 4, unit)
        if quarters >= 4 and not rest:
            return f"{quarters // 4}{('', '.25', '.5', '.75')[quarters % 4]}{suffix}"
    return str(size)


def format_bytes(count: int) -> str:
    """`count` bytes for people's eyes, rounded down to a tenth: `199.3M`."""
    for suffix, unit in _SIZE_UNITS.items():
        if count >= unit:
            tenths = count * 10 // unit
            return f"{tenths // 10}.{tenths % 10}{suffix}"
    return f"{count}B"


def _parse_span(text: str) -> int | None:
    """Nanoseconds in `500ms`, `1.5s`, ...; None when it isn't one, or is finer than 1 ns, or beyond
    MAX_TIME_NS.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    whole, fraction, unit = match.groups()
    span = _scaled(whole, fraction, _UNITS_NS[unit])
    return span if span is not None and span <= MAX_TIME_NS else None


def parse_duration(text: str) -> int:
    """`1s`, `20m`, `500ms`, `24h`, `1.5d` in nanoseconds; 0 is a duration."""
    span = _parse_span(text)
    if span is None:
        raise UsageError(f"not a duration: {show(text)}", hint=DURATION_FORMS)
    return span


def format_duration(span_ns: int) -> str:
    """`span_ns` exactly, in the largest unit that divides it: `20m`, `90s`, `1500ms`."""
    for unit, unit_ns in _UNITS_NS.items():
        if span_ns and span_ns % unit_ns == 0:
            return f"{span_ns // unit_ns}{unit}"
    return "0s"


# --- instants


def format_time(time_ns: int) -> str:
    """RFC 3339 in UTC with nine fractional digits, for any u64 `time_ns` (a record may hold any)."""
    seconds, fraction = divmod(time_ns, _SECOND)
    return f"{_EPOCH + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def wall_time_of(text: str | None, *, now_ns: int) -> int | None:
    """The wall clock's time that a time, or how long ago, means: what is in files has that one. UsageError for other WHENs."""
    match parse_when(text) if text is not None else None:
        case None:
            return None
        case At(time_ns):
            return time_ns
        case Ago(delta_ns):
            return max(0, now_ns - delta_ns)
        case _:
            raise UsageError(f"not a time: {show(str(text))}", hint="write 2026-11-22T20:18:05Z or -90s")


def parse_time(text: str) -> int:
    """RFC 3339 (section 5.6) to nanoseconds since 1970; leap seconds and years past 2262 are refused."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise UsageError(f"not a time: {show(text)}", hint=WHEN_FORMS)
    *fields, fraction, sign, offset_hours, offset_minutes = match.groups()
    try:
        year, month, day, hour, minute, second = map(int, fields)
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
        seconds = (moment - _EPOCH) // timedelta(seconds=1)
        if sign:
            if int(offset_hours) > 23 or int(offset_minutes) > 59:
                raise ValueError("offset is out of range")
            shift = int(offset_hours) * 3600 + int(offset_minutes) * 60
            seconds += -shift if sign == "+" else shift
    except ValueError as error:
        raise UsageError(f"not a time: {show(text)}: {error}", hint=WHEN_FORMS) from None
    time_ns = seconds * _SECOND + int((fraction or "").ljust(9, "0"))
    if not 0 <= time_ns <= MAX_TIME_NS:
        raise UsageError(f"not a time: {show(text)} is outside 1970..2262", hint=WHEN_FORMS)
    return time_ns


def _parse_number(text: str, *, whole: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > MAX_NUMBER:
        raise UsageError(
            f"not an instant: {show(whole)}: {show(text)} is not a number from 0 to {MAX_NUMBER}",
            hint=WHEN_FORMS,
        )
    return int(text)


def parse_when(text: str) -> When:
    """An instant as the operator writes it."""
    if text == "latest":
        return Latest()
    if text.startswith("bp:"):
        return BasePoint(_parse_number(text[3:], whole=text))
    if text.startswith("seq:"):
        return Seq(_parse_number(text[4:], whole=text))
    if text.startswith("-") and (span := _parse_span(text[1:])) is not None:
        return Ago(span)
    if _RFC3339.fullmatch(text):
        return At(parse_time(text))
    if (
        len(text) > NAME_LENGTH
        or not _NAME.fullmatch(text)
        or ".." in text
        or _LIKE_AN_INSTANT.fullmatch(text)
    ):
        raise UsageError(f"not an instant: {show(text)}", hint=WHEN_FORMS)
    return Mark(text)


def format_when(when: When) -> str:
    """The text that `parse_when` reads as `when`."""
    match when:
        case Latest():
            return "latest"
        case At(time_ns):
            return format_time(time_ns)
        case Ago(delta_ns):
            return f"-{format_duration(delta_ns)}"
        case BasePoint(number):
            return f"bp:{number}"
        case Seq(seq):
            return f"seq:{seq}"
        case Mark(name):
            return name


# --- points and exports


def parse_point(text: str) -> tuple[str, When]:
    """`DISK@WHEN`: the disk's name and the instant."""
    disk, at, when = text.partition("@")
    if not at or "@" in when:
        raise UsageError(f"not a point: {show(text)}", hint=f"write DISK@WHEN; {WHEN_FORMS}")
    return check_disk_name(disk), parse_when(when)


BACKUP = "backup:"
BACKUP_ID = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[0-9a-f]{8}")
_BACKUP_TEXT = re.compile(r"[0-9TZ.a-f-]{1,32}|latest")


def parse_backup(text: str) -> tuple[str, str]:
    """`backup:ID` or `backup:ID/DISK`, with a volume of it or without: the id, its beginning or `latest`; and what follows."""
    id_, _, inner = text.removeprefix(BACKUP).partition("/")
    if not text.startswith(BACKUP) or not _BACKUP_TEXT.fullmatch(id_):
        raise UsageError(
            f"not a backup: {show(text)}", hint="write backup:ID; cdp backup list shows their ids"
        )
    return id_, inner


def attached_name(backup_id: str) -> str:
    """The VM as which a backup is attached: its disks are forks that stand on the backup."""
    return f"backup-{backup_id}"


def is_attached(name: str) -> bool:
    """Is this such a VM, or a disk of one?"""
    vm = name.partition("/")[0]
    return vm.startswith("backup-") and BACKUP_ID.fullmatch(vm.removeprefix("backup-")) is not None


def split_volume(text: str) -> tuple[str, str | None]:
    """`DISK@WHEN/p3` or `DISK@WHEN/lv/VG/LV`: the point, and the volume in it; None where none is named."""
    disk, at, rest = text.partition("@")
    when, slash, volume = rest.partition("/")
    if not slash:
        return text, None
    if not _VOLUME.fullmatch(volume):
        raise UsageError(f"not a volume: {show(volume)}", hint="write DISK@WHEN/p2 or DISK@WHEN/lv/VG/LV")
    return f"{disk}{at}{when}", volume


def parse_export(text: str) -> Export:
    """An NBD export name. `text` comes from the wire and may hold anything, lone surrogates included."""
    if len(text) > EXPORT_NAME_LENGTH:
        raise UsageError(f"not an export: {show(text)}", hint=f"NBD allows {EXPORT_NAME_LENGTH} bytes")
    if not text:
        raise UsageError(
            "the export name is empty", hint="name a disk: NAME, VM/NAME, or NAME@WHEN for a point of it"
        )
    if "@" not in text:
        return _parse_mirror(text) if ":" in text else DiskExport(check_disk_name(text))
    disk, _, when = text.partition("@")
    if when.startswith("delta:"):
        return DeltaExport(check_disk_name(disk), _parse_number(when[6:], whole=text))
    point, volume = split_volume(text)
    return PointExport(*parse_point(point), volume)


def _parse_mirror(text: str) -> MirrorExport:
    match = _MIRROR.fullmatch(text)
    if match is None:
        raise UsageError(f"not an export: {show(text)}", hint="a mirror's name is NAME:UUID")
    born_ns = int(match[4]) if match[4] else None
    return MirrorExport(check_disk_name(match[1]), match[2], born_ns, bool(match[3]))


def format_export(export: Export) -> str:
    """The export name that `parse_export` reads as `export`."""
    match export:
        case DiskExport(name):
            return name
        case MirrorExport(name, uuid, born_ns, waits):
            return f"{name}:{uuid}" + (":wait" if waits else "") + ("" if born_ns is None else f":{born_ns}")
        case PointExport(name, when, volume):
            return f"{name}@{format_when(when)}" + ("" if volume is None else f"/{volume}")
        case DeltaExport(name, number):
            return f"{name}@delta:{number}"
