"""A segment as text: its header page, then a line for each record. Reads the header log, and the data file if it is there.

The text is stable, so that tests can compare it: a change of it is a change of the format.
A damaged record is a line of its own and what follows it is still shown: each record's check stands for itself.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdpserver.errors import CorruptError, NotFoundError, UsageError
from cdpserver.journal import control
from cdpserver.journal.instants import FILE as INSTANTS
from cdpserver.journal.record import DTYPE, RECORD_SIZE, Kind, Record, decode, payload_digest
from cdpserver.journal.segment import CLOSED, FIXED, OPEN, PAGE, ROLLED, SEALED, Header, decode_page
from cdpserver.limits import MAX_CONTROL_BYTES
from cdpserver.names import format_duration, format_time

READ_RECORDS = 4096
"""Records read at a time."""

STATES = {OPEN: "open", CLOSED: "closed", SEALED: "sealed", ROLLED: "rolled"}
PLACES = {Kind.SAME: "ref", Kind.DURABLE: "durable_seq"}
"""What the place of a record is called, where it is not a place in the data file."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One record, as far as it can be read. `damage` says what is wrong with it or with its payload."""

    seq: int
    record: Record | None
    message: dict[str, Any] | None = None
    verified: bool = False
    damage: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The record for programs."""
        fields: dict[str, Any] = {"seq": self.seq}
        if self.record is not None:
            fields |= _fields(self.record)
        if self.message is not None:
            fields["message"] = self.message
        if self.verified:
            fields["payload"] = "ok"
        if self.damage:
            fields["damage"] = self.damage
        return fields

    def as_line(self) -> str:
        """The record for people."""
        parts = [str(self.seq)]
        if self.record is not None:
            fields = _fields(self.record)
            parts += [fields.pop("time"), fields.pop("kind")]
            del fields["time_ns"]
            parts += [f"{key}={value}" for key, value in fields.items()]
        if self.message is not None:
            parts.append(json.dumps(self.message, default=repr))
        if self.verified:
            parts.append("payload ok")
        if self.damage:
            parts.append(f"DAMAGED: {self.damage}")
        return " ".join(parts)


def _fields(record: Record) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "time": format_time(record.time_ns),
        "time_ns": record.time_ns,
        "kind": record.kind.name.lower(),
    }
    if record.kind not in (Kind.CONTROL, Kind.DURABLE):
        fields["offset"] = record.offset
    if record.kind is not Kind.DURABLE:
        fields["length"] = record.length
    if record.kind not in (Kind.ZERO, Kind.TRIM):
        fields[PLACES.get(record.kind, "place")] = record.place
    if record.kind in (Kind.DATA, Kind.CONTROL):
        fields["digest"] = record.digest.hex()
    return fields


class SegmentText:
    """The segment at `path`. NotFoundError if there is none, CorruptError if its header page cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._log = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            page = os.pread(self._log, PAGE, 0)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"there is no file {path}", hint="name a header log: NNNNNNNN.log") from None
        except (IsADirectoryError, ValueError):
            raise UsageError(f"{path} is not a file", hint="name a header log: NNNNNNNN.log") from None
        if page and not page.strip(b"\0"):
            raise CorruptError(
                f"{path}: the header page is zeros: created, and never written before the host went down",
                hint="cdpserver puts it aside when it starts",
            )
        self.header: Header = decode_page(page, str(path))
        _, self._version, _, self._tail, self._state, _ = FIXED.unpack_from(page)
        self._data = self._open_data()

    def _open_data(self) -> int | None:
        try:
            return os.open(self.data_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    @property
    def data_path(self) -> Path:
        """The data file beside the header log."""
        return self.path.with_suffix(".data")

    @property
    def held(self) -> int:
        """Records that the file has room for."""
        return max(0, os.fstat(self._log).st_size - PAGE) // RECORD_SIZE

    @property
    def state(self) -> int:
        """OPEN, CLOSED, SEALED or ROLLED; anything else is damage."""
        state: int = self._state
        return state

    @property
    def count(self) -> int:
        """Records published, as far as the file holds them."""
        tail: int = self._tail
        return min(tail, self.held)

    @property
    def damage(self) -> str:
        """What is wrong with the segment as a whole."""
        if self._state not in STATES:
            return f"its state is {self._state}, which is none"
        if self._tail > self.held:
            return f"the tail word counts {self._tail} records, the file holds {self.held}"
        return ""

    def head(self) -> Iterator[str]:
        """The header page."""
        header = self.header
        state = STATES.get(self._state, str(self._state))
        carry = " ".join(f"{key}={json.dumps(value)}" for key, value in control.pack(header.carry).items())
        yield f"segment {header.segment} of interval {header.interval}, timeline {header.timeline.hex()}"
        yield f"version {self._version}, {state}, {self._tail} records"
        yield f"first seq {header.first_seq}, first time {format_time(header.first_time_ns)}, boot {header.boot_id}"
        if header.thinned:
            yield f"thinned: instants {format_duration(header.every_ns)} apart, in {INSTANTS} beside it"
        yield f"carry {carry}"

    def records(self, *, verify: bool) -> Iterator[Shown]:
        """The published records; with `verify` the payload of each is held against its digest.

        NotFoundError if that needs a data file and there is none.
        """
        if verify and self._data is None:
            raise NotFoundError(
                f"there is no data file {self.data_path}", hint="put it beside the log, or leave out --verify"
            )
        for first, raw in self._raw():
            for number in range(len(raw) // RECORD_SIZE):
                yield self._numbered(raw, first, number, verify=verify)

    def controls(self) -> Iterator[Shown]:
        """The published control records; the others are looked at for their kind alone."""
        for first, raw in self._raw():
            for number in np.flatnonzero(np.frombuffer(raw, DTYPE)["kind"] == Kind.CONTROL).tolist():
                yield self._numbered(raw, first, number, verify=False)

    def _raw(self) -> Iterator[tuple[int, bytes]]:
        """(number of its first record, bytes) of a part of the published records at a time."""
        count = self.count
        for first in range(0, count, READ_RECORDS):
            length = (min(first + READ_RECORDS, count) - first) * RECORD_SIZE
            yield first, os.pread(self._log, length, PAGE + first * RECORD_SIZE)

    def _numbered(self, raw: bytes, first: int, number: int, *, verify: bool) -> Shown:
        part = raw[number * RECORD_SIZE : (number + 1) * RECORD_SIZE]
        seq = self.header.first_seq + first + number
        if self.header.thinned:
            # Its own: those between are gone. What is damaged is named by what its bytes say.
            seq = int(np.frombuffer(part, DTYPE)["seq"][0])
        return self._shown(part, seq, verify=verify)

    def _shown(self, raw: bytes, seq: int, *, verify: bool) -> Shown:
        try:
            record = decode(raw, self.header.salt)
        except CorruptError as error:
            return Shown(seq, None, damage=error.message)
        if record.seq != seq:
            return Shown(seq, None, damage=f"this is record {record.seq}, where {seq} belongs")
        if self._data is None or record.kind not in (Kind.DATA, Kind.CONTROL):
            return Shown(seq, record)
        if record.kind is Kind.DATA and not verify:
            return Shown(seq, record)
        try:
            payload = self._payload(self._data, record)
            message = control.decode(payload) if record.kind is Kind.CONTROL else None
        except CorruptError as error:
            return Shown(seq, record, damage=error.message)
        return Shown(seq, record, message, verified=verify)

    def _payload(self, data: int, record: Record) -> bytes:
        if record.kind is Kind.CONTROL and record.length > MAX_CONTROL_BYTES:
            raise CorruptError(f"a control record does not have {record.length} bytes")
        payload = os.pread(data, record.length, record.place)
        if len(payload) < record.length:
            raise CorruptError(f"{record.length - len(payload)} bytes of its payload are missing")
        if payload_digest(payload) != record.digest:
            raise CorruptError("its payload does not match its digest")
        return payload

    def close(self) -> None:
        """Close both files."""
        os.close(self._log)
        if self._data is not None:
            os.close(self._data)


def show(segment: SegmentText, *, verify: bool, as_json: bool, write: Callable[[Iterator[Any]], None]) -> int:
    """Hand the segment to `write`, as lines or as values for JSON; how many records are damaged."""
    damaged = 0

    def counted() -> Iterator[Shown]:
        nonlocal damaged
        for shown in segment.records(verify=verify):
            damaged += bool(shown.damage)
            yield shown

    if as_json:
        write(shown.as_dict() for shown in counted())
        return damaged

    def lines() -> Iterator[str]:
        yield from segment.head()
        yield from (shown.as_line() for shown in counted())

    write(lines())
    return damaged
