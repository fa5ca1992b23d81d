"""Holds an interval's index against its segments: every entry that should be there is, with the right value, and no other.

Each expected entry is looked up; then the number of entries says whether there are others. Memory is bounded by a chunk of
records. An index that is missing or behind is no damage: views read the header log instead.

Invariants: read transactions are short (they keep LMDB from reusing pages). That is sound because entries are never changed:
what a transaction counted up to its `indexed` is in every later one.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np

from cdpserver.check.damage import Finding
from cdpserver.errors import CorruptError
from cdpserver.index.build import merge_rows, piece_entries, point_rows, split_at_controls
from cdpserver.index.pieces import LEVEL_BITS, SHIFTS, record_pieces
from cdpserver.index.store import CLOSED_NAME, SEQ, IndexFile, PointRow, find_index, may_lock
from cdpserver.journal import control
from cdpserver.journal.log import Run, interval_path, segments
from cdpserver.journal.record import Kind
from cdpserver.journal.segment import SegmentReader
from cdpserver.limits import BLOCK, SECTOR

CHUNK = 16_384
"""Records whose entries are looked up in one read transaction: about 30 ms."""

OPEN_SECONDS = 2.0
"""How long an index that cannot be opened may be one that is just being made or replaced."""

KEY_BYTES = 14
REBUILD = "cdp index rebuild DISK makes it anew; nothing is lost"


@dataclass(frozen=True, slots=True)
class Held:
    """What one read transaction saw of an index, but for the pieces themselves."""

    indexed: int
    count: int
    levels: int
    points: dict[bytes, bytes]
    controls: dict[bytes, bytes]
    state: bytes | None


@dataclass(slots=True)
class Expected:
    """What the index should hold, from the records gone through so far."""

    count: int = 0
    levels: int = 0
    points: dict[bytes, bytes] = field(default_factory=dict)
    controls: dict[bytes, bytes] = field(default_factory=dict)
    state: control.State | None = None
    last_seq: int = 0
    times: dict[int, int] = field(default_factory=dict)


def start_of(path: Path, numbers: Sequence[int]) -> tuple[int, int]:
    """First seq and time of an interval, by the first header page that can be read."""
    for number in numbers:
        with contextlib.suppress(CorruptError), contextlib.closing(SegmentReader(path, number)) as reader:
            return reader.first_seq, reader.header.first_time_ns
    return 0, 0


def check_interval(directory: Path, interval: int, boot_id: str, *, whole: bool) -> list[Finding]:
    """What is wrong with the index of one interval, whose records are all `whole` or not."""
    path = interval_path(directory, interval)
    if not _may_read(path, boot_id):
        return []
    file = _open(path, boot_id)
    if file is None:
        return []
    if isinstance(file, Finding):
        return [file]
    try:
        return list(
            _IntervalCheck(path, interval, segments(directory, interval), file, whole=whole).findings()
        )
    except lmdb.Error as error:
        first_seq, first_time_ns = start_of(path, segments(directory, interval))
        what = f"the index of interval {interval} cannot be read: {error}"
        return [Finding(what, file.path, first_seq, first_time_ns, hint=REBUILD)]
    finally:
        file.env.close()


def _may_read(path: Path, boot_id: str) -> bool:
    """Not where another user may be writing: that index cannot be looked at, and no view of ours reads it."""
    found = find_index(path, boot_id)
    try:
        return found is None or isinstance(may_lock(found), bool)
    except lmdb.Error:
        return False


def _open(path: Path, boot_id: str) -> IndexFile | Finding | None:
    """The index; None where there is none; a finding where it cannot be opened, however often one looks."""
    deadline = time.monotonic() + OPEN_SECONDS
    while True:
        found = find_index(path, boot_id)
        if found is None:
            return None
        try:
            return IndexFile(found, writable=False)
        except (FileNotFoundError, lmdb.Error) as error:
            if isinstance(error, lmdb.Error) and time.monotonic() > deadline:
                numbers = segments(path.parent.parent, int(path.name))
                what = f"the index of interval {int(path.name)} cannot be opened: {error}"
                return Finding(what, found, *start_of(path, numbers), hint=REBUILD)
        time.sleep(0.05)


class _IntervalCheck:
    """One interval's index against its records."""

    def __init__(
        self, path: Path, interval: int, numbers: Sequence[int], file: IndexFile, *, whole: bool
    ) -> None:
        self._path = path
        self._interval = interval
        self._numbers = numbers
        self._file = file
        self._held = self._look()
        self._expected = Expected()
        self._whole = whole
        self._wrong: dict[str, list[tuple[int, int, int]]] = {}

    def _look(self) -> Held:
        file = self._file
        with file.env.begin() as txn:
            indexed, levels = txn.get(b"indexed", db=file.meta), txn.get(b"levels", db=file.meta)
            return Held(
                indexed=SEQ.unpack(indexed)[0] if indexed else 0,
                count=int(txn.stat(file.pieces)["entries"]),
                levels=levels[0] if levels else 0,
                points=dict(txn.cursor(db=file.points)),
                controls=dict(txn.cursor(db=file.control)),
                state=txn.get(b"state", db=file.meta),
            )

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong."""
        for run in self._runs():
            self._take(run)
        expected, held = self._expected, self._held
        if self._whole:
            yield from self._reach()
            if held.count > expected.count - self._missing():
                self._find_surplus(held.count - expected.count + self._missing())
            if held.levels != expected.levels:
                yield self._finding(
                    f"says that it has the levels {held.levels:04b}, not {expected.levels:04b}"
                )
            if held.state is not None and expected.state is not None and not self._same_state():
                yield self._finding("holds another state than the records give")
        yield from self._pieces()
        if self._whole:
            yield from self._rows("second", expected.points, held.points)
            yield from self._rows("control record", expected.controls, held.controls)

    def _finding(self, what: str, *, seq: int | None = None) -> Finding:
        first_seq, first_time_ns = start_of(self._path, self._numbers)
        expected = self._expected
        at = first_seq if seq is None else seq
        return Finding(
            f"the index of interval {self._interval} {what}",
            self._file.path,
            at,
            expected.times.get(at, first_time_ns),
            to_seq=max(expected.last_seq, at),
            to_time_ns=expected.times.get(expected.last_seq, 0),
            hint=REBUILD,
        )

    # -- what should be there ------------------------------------------------------------------------------------

    def _runs(self) -> Iterator[Run]:
        """The interval's records up to what is indexed, as far as they are whole."""
        for number in self._numbers:
            try:
                reader = SegmentReader(self._path, number)
            except CorruptError:
                self._whole = False
                return
            with contextlib.closing(reader):
                end = reader.count_to(self._held.indexed)
                for first in range(0, end, CHUNK):
                    stop = min(first + CHUNK, end)
                    good = reader.first_bad(reader.raw(first, stop), first)
                    if good:
                        yield Run(reader, self._interval, reader.records(first, first + good))
                    if good < stop - first:
                        self._whole = False
                        return

    def _take(self, run: Run) -> None:
        expected = self._expected
        if expected.state is None:
            expected.state = run.reader.header.carry
        expected.last_seq = int(run.records["seq"][-1])
        expected.times[expected.last_seq] = int(run.records["time"][-1])
        self._look_up(run)
        try:
            self._take_rows(run, expected)
        except CorruptError:
            self._whole = False  # a control record's payload: what follows from it is not known

    def _take_rows(self, run: Run, expected: Expected) -> None:
        assert expected.state is not None
        for part in split_at_controls(run):
            for row in point_rows(part, expected.state):
                key = row.second.to_bytes(8, "big")
                older = expected.points.get(key)
                merged = merge_rows(PointRow.unpack(key, older), row) if older else row
                expected.points[key] = merged.pack()
            last = part.records[-1]
            if last["kind"] != Kind.CONTROL:
                continue
            message = part.reader.control(last)
            seq, time_ns = int(last["seq"]), int(last["time"])
            body = SEQ.pack(time_ns) + msgpack.packb(message)
            expected.controls[seq.to_bytes(8, "big")] = body
            if message["type"] in ("mark", "cut"):
                name = message["name"] if message["type"] == "mark" else message["number"]
                expected.controls[f"{message['type']}/{name}".encode()] = SEQ.pack(seq) + body
            expected.state = control.fold(expected.state, message, seq=seq, time_ns=time_ns)

    def _look_up(self, run: Run) -> None:
        """Every piece of the run in the index."""
        units, seqs, values = piece_entries(run)
        if not len(units):
            return
        self._expected.count += len(units)
        for level in np.unique(units >> np.uint64(LEVEL_BITS)).tolist():
            self._expected.levels |= 1 << int(level)
        order = np.lexsort((seqs, units))
        keys = np.stack((units[order], seqs[order]), axis=1).astype(">u8").view(np.uint8).reshape(-1, 16)
        raw, raw_values = keys[:, 2:].tobytes(), values[order].astype("<u8").tobytes()
        items = [
            (raw[at * KEY_BYTES : (at + 1) * KEY_BYTES], raw_values[at * 8 : at * 8 + 8])
            for at in range(len(units))
        ]
        with self._file.env.begin() as txn:
            found = txn.cursor(db=self._file.pieces).getmulti([key for key, _ in items])
        if found != items:
            self._differences(run, items, dict(found))

    def _differences(self, run: Run, items: list[tuple[bytes, bytes]], found: dict[bytes, bytes]) -> None:
        for key, value in items:
            held = found.get(key)
            if held != value:
                self._note("misses a piece" if held is None else "has a wrong value", key, run)

    def _note(self, what: str, key: bytes, run: Run | None) -> None:
        unit, seq = int.from_bytes(key[:6], "big"), int.from_bytes(key[6:], "big")
        shift = SHIFTS[unit >> LEVEL_BITS] if unit >> LEVEL_BITS < len(SHIFTS) else 0
        start = (unit & ((1 << LEVEL_BITS) - 1)) << shift
        self._wrong.setdefault(what, []).append((seq, start * BLOCK, (start + (1 << shift)) * BLOCK))
        if run is not None:
            at = int(np.searchsorted(run.records["seq"], np.uint64(seq)))
            self._expected.times[seq] = int(run.records["time"][at])

    # -- what is wrong -------------------------------------------------------------------------------------------

    def _missing(self) -> int:
        return len(self._wrong.get("misses a piece", ()))

    def _reach(self) -> Iterator[Finding]:
        held, last = self._held.indexed, self._expected.last_seq
        if held > last and (last or held >= start_of(self._path, self._numbers)[0]):
            yield self._finding(f"reaches to record {held}, the interval to {last}")
        if self._numbers and self._file.path.name == CLOSED_NAME and held < self._end():
            yield self._finding(
                f"is closed at record {held}, the interval goes on to {self._end()}", seq=held + 1
            )

    def _end(self) -> int:
        with contextlib.closing(SegmentReader(self._path, self._numbers[-1])) as reader:
            return reader.last_seq

    def _same_state(self) -> bool:
        assert self._held.state is not None and self._expected.state is not None
        try:
            return bool(msgpack.unpackb(self._held.state) == control.pack(self._expected.state))
        except ValueError:
            return False

    def _find_surplus(self, count: int) -> None:
        """Look for `count` pieces that no record has. Goes through the whole index: this is not the usual case."""
        readers = [SegmentReader(self._path, number) for number in self._numbers]
        try:
            with self._file.env.begin() as txn:
                for key in txn.cursor(db=self._file.pieces).iternext(keys=True, values=False):
                    if count and not _belongs(key, readers, self._held.indexed):
                        self._note("has a piece that no record has", key, None)
                        count -= 1
        finally:
            for reader in readers:
                reader.close()

    def _pieces(self) -> Iterator[Finding]:
        for what, places in self._wrong.items():
            seq, start, end = min(places)
            more = f", and {len(places) - 1} more" if len(places) > 1 else ""
            yield self._finding(f"{what} for bytes {start} to {end} at record {seq}{more}", seq=seq)

    def _rows(self, what: str, expected: dict[bytes, bytes], held: dict[bytes, bytes]) -> Iterator[Finding]:
        # A second or a record that was indexed after the look is in neither.
        wrong = Counter[str]()
        first = ""
        for key in sorted(expected.keys() | held.keys()):
            if expected.get(key) != held.get(key):
                first = first or (
                    str(int.from_bytes(key, "big")) if len(key) == 8 else key.decode(errors="replace")
                )
                wrong[
                    "misses" if key not in held else "has a surplus" if key not in expected else "has a wrong"
                ] += 1
        for how, number in wrong.items():
            yield self._finding(
                f"{how} row for {number} {what}{'s' if number > 1 else ''}, the first {first}"
            )


def _belongs(key: bytes, readers: Sequence[SegmentReader], indexed: int) -> bool:
    """Does a record of the interval have this piece?"""
    unit, seq = int.from_bytes(key[:6], "big"), int.from_bytes(key[6:], "big")
    for reader in readers:
        if seq > indexed:
            continue
        for number in range(reader.count_to(seq - 1), reader.count_to(seq)):
            record: Any = reader.records(number, number + 1)[0]
            if not Kind.DATA <= record["kind"] <= Kind.SAME:
                return False
            first, blocks = int(record["offset"]) // BLOCK, -(-int(record["length"]) * SECTOR // BLOCK)
            pieces = record_pieces(int(record["kind"]), first, blocks, reader.segment, int(record["place"]))
            if any(unit == own for own, _ in pieces):
                return True
    return False
