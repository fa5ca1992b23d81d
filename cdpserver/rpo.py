"""The record of what could have been lost: of each disk a sample a second for an hour, and the worst of each minute for a week.

    timelines/ID/rpo:   header, 64 bytes | 3600 samples, by second | 10080 samples, by minute        (docs/format.md)

A sample's place follows from its time, so the file never grows, and what is older is written over. Each has its own check: one
that was torn by a crash, or that is of an earlier round, is none. Durability: none; a power loss may take the last seconds.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cdpserver.journal.control import Grade
from cdpserver.names import format_time

SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS

SECONDS = 3600
MINUTES = 7 * 24 * 60

NAME = "rpo"

HEADER = struct.Struct("<8sII48x")
MAGIC = b"CDPRPO\0\0"
VERSION = 1

SAMPLE = struct.Struct("<QQQQQQIBBHI4x")
"""time, RPO, lag, durable lag, received seq, durable seq; mean write latency, grade, resync, unused, check."""

UNKNOWN = (1 << 64) - 1
"""A lag while the target does not say it."""

MAX_WRITE_NS = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Sample:
    """What was so in one second, or at worst in one minute. None: the target did not say."""

    time_ns: int
    lag_ns: int
    durable_lag_ns: int | None
    received_seq: int
    durable_seq: int
    write_ns: int
    grade: Grade
    resync: bool
    span_ns: int = SECOND_NS

    @property
    def rpo_ns(self) -> int | None:
        """What a loss of source and host would have cost: how old the newest write was that was whole, in order and durable."""
        return None if self.durable_lag_ns is None else max(self.lag_ns, self.durable_lag_ns)

    def as_dict(self) -> dict[str, Any]:
        """As the CLI and the API show it."""
        return {
            "time": format_time(self.time_ns),
            "time_ns": self.time_ns,
            "span_ns": self.span_ns,
            "rpo_ns": self.rpo_ns,
            "lag_ns": self.lag_ns,
            "durable_lag_ns": self.durable_lag_ns,
            "received_seq": self.received_seq,
            "durable_seq": self.durable_seq,
            "write_ns": self.write_ns,
            "grade": self.grade.label,
            "resync": self.resync,
        }


def worst(one: Sample, other: Sample) -> Sample:
    """The two as one of a minute: the worst of each value, and the later place."""
    unknown = one.durable_lag_ns is None or other.durable_lag_ns is None
    return replace(
        max(one, other, key=lambda sample: sample.time_ns),
        lag_ns=max(one.lag_ns, other.lag_ns),
        durable_lag_ns=None if unknown else max(one.durable_lag_ns or 0, other.durable_lag_ns or 0),
        write_ns=max(one.write_ns, other.write_ns),
        grade=min(one.grade, other.grade),
        resync=one.resync or other.resync,
        span_ns=MINUTE_NS,
    )


def pack(sample: Sample) -> bytes:
    """The bytes of one sample."""
    rpo, durable = sample.rpo_ns, sample.durable_lag_ns
    fields = (
        sample.time_ns,
        UNKNOWN if rpo is None else rpo,
        sample.lag_ns,
        UNKNOWN if durable is None else durable,
        sample.received_seq,
        sample.durable_seq,
        min(sample.write_ns, MAX_WRITE_NS),
        int(sample.grade),
        int(sample.resync),
        0,
    )
    return SAMPLE.pack(*fields, zlib.crc32(SAMPLE.pack(*fields, 0)))


def unpack(raw: bytes, *, span_ns: int) -> Sample | None:
    """The sample in these bytes; None if there is none, or not a whole one."""
    if len(raw) < SAMPLE.size:
        return None
    *fields, check = SAMPLE.unpack(raw)
    if check != zlib.crc32(SAMPLE.pack(*fields, 0)) or fields[7] > max(Grade):
        return None
    time_ns, _, lag_ns, durable, received, durable_seq, write_ns, grade, resync, _ = fields
    known = None if durable == UNKNOWN else durable
    return Sample(
        time_ns, lag_ns, known, received, durable_seq, write_ns, Grade(grade), bool(resync), span_ns
    )


def _place(time_ns: int, span_ns: int) -> int:
    if span_ns == SECOND_NS:
        return HEADER.size + time_ns // SECOND_NS % SECONDS * SAMPLE.size
    return HEADER.size + (SECONDS + time_ns // MINUTE_NS % MINUTES) * SAMPLE.size


class Record:
    """The record of one disk, in its timeline's directory. Opened for each use: disks at rest cost nothing."""

    def __init__(self, timeline: Path) -> None:
        self._path = timeline / NAME

    def add(self, sample: Sample) -> None:
        """Put a sample of one second; it counts in its minute as well. OSError."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.fstat(fd).st_size == 0:
                os.pwrite(fd, HEADER.pack(MAGIC, VERSION, SAMPLE.size), 0)
            os.pwrite(fd, pack(sample), _place(sample.time_ns, SECOND_NS))
            place = _place(sample.time_ns, MINUTE_NS)
            before = unpack(os.pread(fd, SAMPLE.size, place), span_ns=MINUTE_NS)
            whole = replace(sample, span_ns=MINUTE_NS)
            if before is not None and before.time_ns // MINUTE_NS == sample.time_ns // MINUTE_NS:
                whole = worst(before, sample)
            os.pwrite(fd, pack(whole), place)
        finally:
            os.close(fd)

    def samples(self, *, since_ns: int, until_ns: int) -> list[Sample]:
        """Those of [since, until], oldest first: by second where there are some, by minute before."""
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return []
        seconds = sorted(_read(raw, 0, SECONDS, SECOND_NS), key=lambda sample: sample.time_ns)
        minutes = sorted(_read(raw, SECONDS, MINUTES, MINUTE_NS), key=lambda sample: sample.time_ns)
        if seconds:
            # An hour back from the newest: older ones are left from an earlier round.
            first_ns = seconds[-1].time_ns - SECONDS * SECOND_NS
            seconds = [sample for sample in seconds if sample.time_ns > first_ns]
            minutes = [m for m in minutes if m.time_ns // MINUTE_NS < seconds[0].time_ns // MINUTE_NS]
        return [sample for sample in [*minutes, *seconds] if since_ns <= sample.time_ns <= until_ns]

    def at(self, time_ns: int) -> Sample | None:
        """What was so at a time; None if that is not on record."""
        near = self.samples(since_ns=time_ns - MINUTE_NS, until_ns=time_ns + MINUTE_NS)
        for sample in near:
            if sample.time_ns // sample.span_ns == time_ns // sample.span_ns:
                return sample
        return None


def _read(raw: bytes, first: int, count: int, span_ns: int) -> Iterator[Sample]:
    if HEADER.size > len(raw) or HEADER.unpack_from(raw)[:3] != (MAGIC, VERSION, SAMPLE.size):
        return
    for number in range(first, first + count):
        start = HEADER.size + number * SAMPLE.size
        found = unpack(raw[start : start + SAMPLE.size], span_ns=span_ns)
        if found is not None and _place(found.time_ns, span_ns) == start:
            yield found
