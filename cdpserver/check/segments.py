"""Verifies a timeline's segments: header pages, every record, every payload, and that nothing is missing in between.

Safe beside a running writer: what a segment's tail word counted when the segment was looked at is verified, no more. Records
that an unclean host boot may have lost, and that nobody has taken over yet, are no damage unless they were durable.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdpserver.check.damage import Effects, Extents, Finding
from cdpserver.check.depth import PAYLOAD, Depth, Everything
from cdpserver.check.records import last_whole, runs, whole_records, wrong_fields
from cdpserver.errors import CorruptError
from cdpserver.journal import control, recovery
from cdpserver.journal.control import State
from cdpserver.journal.log import Journal, disk_size, interval_path, intervals, segments
from cdpserver.journal.record import BODY, DIGEST_SIZE, DTYPE, RECORD_SIZE, Kind, payload_digest, salt
from cdpserver.journal.segment import (
    CLOSED,
    OPEN,
    PAGE,
    ROLLED,
    SEALED,
    SegmentReader,
    data_path,
    log_path,
)
from cdpserver.limits import MAX_CONTROL_BYTES, SECTOR, SEQ_JUMP
from cdpserver.nodes import nodes
from cdpserver.timeline import Timeline

CHUNK = 8192
"""Records verified at a time: half a MiB of header log."""

DIGEST_AT = BODY.size - DIGEST_SIZE

LOST = "open an instant before it, or one after the guest wrote there again"


@dataclass(slots=True)
class Totals:
    """What was verified. `bytes` counts headers and payload."""

    records: int = 0
    segments: int = 0
    bytes: int = 0


def size_bytes(directory: Path) -> int:
    """About how many bytes `SegmentCheck` will read."""
    total = 0
    for interval in intervals(directory):
        for path in interval_path(directory, interval).iterdir():
            if path.suffix in (".log", ".data"):
                with contextlib.suppress(FileNotFoundError):  # a segment that gets its name just now
                    total += path.stat().st_size
    return total


@dataclass(slots=True)
class SegmentCheck:
    """Goes through the segments once, oldest first. `timeline` is None if timeline.json cannot be read."""

    directory: Path
    timeline: Timeline | None
    boot_id: str
    effects: Effects
    progress: Callable[[int], None]
    depth: Depth = field(default_factory=Everything)
    totals: Totals = field(default_factory=Totals)
    cuts: dict[int, tuple[int, int]] = field(default_factory=dict)
    sizes: dict[int, int | None] = field(default_factory=dict)
    """Bytes of the disk at each cut; None when nobody knows."""

    unsure: set[int] = field(default_factory=set)
    _next_seq: int | None = 1
    _time_ns: int = 0
    _state: State | None = field(default_factory=State)
    _survey: recovery.Survey | None = None
    _dropped: dict[int, int] = field(default_factory=dict)
    """Interval that is gone to the seq that a base point holds of it."""

    _thinned: tuple[int, int] | None = None
    """Interval and number of the segment before, if it is a thinned one."""

    _interval: int = 0
    _where: Path = field(default_factory=Path)

    def run(self) -> None:
        """Verify everything; findings go to `effects`, base points to `cuts`.

        Intervals of which not all is known go to `unsure`: nobody can say what should be in their index.
        """
        places: list[tuple[int, int]] = []
        held = intervals(self.directory)
        for interval in held:
            found = segments(self.directory, interval)
            places += [(interval, number) for number in sorted({*found, *self._without_log(interval)})]
            # The newest interval may be one whose first segment is just being made.
            if not found and interval != held[-1] and (not places or places[-1][0] != interval):
                places.append((interval, 0))
        gone = (node for node in nodes(self.directory) if node.interval not in held)
        self._dropped = {node.interval: node.seq for node in gone}
        self._survey = self._survey_unclean()
        for self._interval, number in places:
            if number:
                self._segment(number)
            else:
                self._where = interval_path(self.directory, self._interval)
                self._say("the interval holds no segment")
                self._lose()

    def _without_log(self, interval: int) -> list[int]:
        """Numbers of segments whose data is there and whose header log is not."""
        data = (
            path for path in interval_path(self.directory, interval).glob("*.data") if path.stat().st_size
        )
        return [int(path.stem) for path in data if not _was_there(path.with_suffix(".log"))]

    def _survey_unclean(self) -> recovery.Survey | None:
        """What an unclean host boot left, if that is how things stand."""
        journal = Journal(self.directory)
        try:
            found = recovery.survey(journal, self.boot_id)
        except (CorruptError, FileNotFoundError):
            return None  # the segments are looked at one by one below, and say what is wrong
        finally:
            journal.close()
        return found if found.unclean else None

    def _say(
        self,
        what: str,
        *,
        seq: int | None = None,
        time_ns: int | None = None,
        extents: Extents | None = None,
        after_seq: int | None = None,
        known: bool = False,
    ) -> None:
        """Note a finding at `seq`, else at the record that should come next. With `known`, the headers are whole."""
        at = seq if seq is not None else (self._next_seq or self.effects.last_seq + 1)
        when = self._time_ns if time_ns is None else time_ns
        if not known:
            self.unsure.add(self._interval)
        self.effects.add(
            Finding(what, self._where, at, when, extents=extents, hint=LOST), after_seq=after_seq
        )

    def _lose(self) -> None:
        """Of what comes next nothing is known but what it says itself."""
        self._next_seq = self._state = None

    # -- one segment ---------------------------------------------------------------------------------------------

    def _segment(self, number: int) -> None:
        directory = interval_path(self.directory, self._interval)
        self._where = log_path(directory, number)
        if not self._where.exists():
            self._say("the header log is missing, its payload is there")
            self._lose()
            return
        try:
            reader = SegmentReader(directory, number)
        except CorruptError as error:
            if not self._is_yet_to_come(number):
                self._say(error.message.removeprefix(f"{self._where}").lstrip(": "))
                self._reach(number)
                self._lose()
            return
        with contextlib.closing(reader):
            if self._is_left_over(reader):
                return
            self.totals.segments += 1
            self.totals.bytes += PAGE
            self._header(reader)
            self._instants(reader)
            count = self._count(reader)
            for first in range(0, count, CHUNK):
                self._chunk(reader, first, min(first + CHUNK, count))

    def _reach(self, number: int) -> None:
        """What is damaged shows to the end of the segment at least."""
        if self.timeline is not None:
            mark = salt(self.timeline.uuid, self._interval, number)
            found = last_whole(self._where.read_bytes()[PAGE:], mark)
            if found is not None:
                self.effects.reach(*found)

    def _is_yet_to_come(self, number: int) -> bool:
        """Was this segment made, but never written before the host went down? Nothing that is kept comes after it."""
        if self._survey is None or not _is_blank(self._where):
            return False
        return not self._survey.valid or (self._interval, number) > self._survey.valid[-1][0]

    def _is_left_over(self, reader: SegmentReader) -> bool:
        """A segment after the place where an unclean host boot cut the journal: the writer puts it aside."""
        kept = self._kept(reader)
        return kept is not None and (self._interval, reader.segment) not in kept

    def _kept(self, reader: SegmentReader) -> dict[tuple[int, int], int] | None:
        """How many records survive, by segment, where the tail word is not to be trusted; else None."""
        if self._survey is None or reader.header.boot_id == self.boot_id:
            return None
        return dict(self._survey.valid) if reader.state in (OPEN, ROLLED) else None

    def _header(self, reader: SegmentReader) -> None:
        header = reader.header
        if self.timeline is not None and header.timeline != self.timeline.uuid:
            self._say("the segment is of another timeline")
        if header.interval != self._interval:
            self._say(f"the segment says that it is of interval {header.interval}")
        first_seq = header.first_seq
        if self._dropped.get(self._interval - 1) == first_seq - 1:
            # Older history was dropped: a base point stands in its place.
            self._next_seq, self._state = first_seq, header.carry
        # After an unclean host boot the seq jumps.
        goes_on = header.thinned and self._thinned == (self._interval, header.segment - 1)
        self._thinned = (self._interval, header.segment) if header.thinned else None
        jumped = self._next_seq is not None and first_seq >= self._next_seq + SEQ_JUMP - 1
        if goes_on and self._next_seq is not None and first_seq >= self._next_seq:
            self._next_seq = first_seq  # seqs of a thinned interval have holes
        if self._next_seq is not None and not jumped and first_seq != self._next_seq:
            if first_seq > self._next_seq:
                self._say(f"records {self._next_seq} to {first_seq - 1} are missing before this segment")
                self._state = None
            elif first_seq < self._next_seq:
                self._say(f"the segment begins with record {first_seq}, where {self._next_seq} belongs")
        if self._state is not None and header.carry != self._state:
            what = "the state that the segment starts with is not what the records before it say"
            self._say(what, seq=first_seq, extents=())
        if header.first_time_ns < self._time_ns:
            self._say("the segment begins before the record before it", seq=first_seq, extents=())
        self._state, self._next_seq = header.carry, first_seq
        self._time_ns = max(self._time_ns, header.first_time_ns)

    def _instants(self, reader: SegmentReader) -> None:
        """What a thinned interval says that it can give: as much of it as this segment should hold is there."""
        try:
            found = reader.instants
        except CorruptError as error:
            self._say(error.message, seq=reader.first_seq, extents=(), known=True)
            return
        if found is None:
            return
        wanted = found.rows["seq"]
        wanted = wanted[(wanted >= reader.first_seq) & (wanted <= reader.last_seq)]
        held = np.frombuffer(reader.raw(0, reader.count), DTYPE)["seq"]
        for seq in wanted[~np.isin(wanted, held)].tolist():
            self._say(f"record {seq} is missing, at which the interval says that it can be read", seq=seq)

    def _count(self, reader: SegmentReader) -> int:
        """How many records there are to be verified; what should come after them is noted."""
        claimed, state = reader.claimed, reader.state
        held = max(0, self._where.stat().st_size - PAGE) // RECORD_SIZE
        if state not in (OPEN, CLOSED, SEALED, ROLLED):
            self._say(f"the segment's state is {state}, which is none", extents=())
        kept = self._kept(reader)
        if kept is not None:
            return self._unclean_count(reader, kept)
        self._next_seq = reader.first_seq + claimed
        if reader.header.thinned and claimed <= held:
            self._next_seq = reader.last_seq + 1
        if claimed > held:
            what = f"the tail word counts {claimed} records, the file holds {held}"
            self._say(what, seq=reader.last_seq + 1)
            self._lose()
        elif self._more_follow(reader, claimed, held):
            self._say(f"the tail word counts {claimed} records, and whole ones follow")
            self._lose()
        return min(claimed, held)

    def _unclean_count(self, reader: SegmentReader, kept: dict[tuple[int, int], int]) -> int:
        assert self._survey is not None
        place = (self._interval, reader.segment)
        self._next_seq = reader.first_seq + kept[place]
        if self._survey.damaged and place == self._survey.valid[-1][0]:
            self._say(f"records from {self._next_seq} on were durable, and are damaged or missing")
            self._lose()
        return kept[place]

    def _more_follow(self, reader: SegmentReader, claimed: int, held: int) -> bool:
        """A writer has at most one whole record that it has not counted yet; more means a damaged tail word."""
        end = min(held, claimed + 2)
        if end - claimed < 2 or not whole_records(reader.raw(claimed, end), reader.header, claimed).all():
            return False
        return reader.claimed == claimed

    # -- records -------------------------------------------------------------------------------------------------

    def _chunk(self, reader: SegmentReader, first: int, end: int) -> None:
        raw = reader.raw(first, end)
        whole = whole_records(raw, reader.header, first)
        records = np.frombuffer(raw, DTYPE, count=len(whole))[whole]
        self._broken_headers(_seqs(reader, raw, first, whole), whole, records)
        self._times(records)
        for seq, time_ns, what in wrong_fields(records, disk_size=self._disk_size(reader)):
            self._say(f"record {seq} {what}", seq=seq, time_ns=time_ns)
        bad = self._payloads(reader, raw, np.flatnonzero(whole).tolist(), first)
        self._damaged_payloads(reader, np.frombuffer(raw, DTYPE)[bad])
        self.effects.feed(records)
        self.totals.records += len(records)
        self.totals.bytes += len(raw)
        self.progress(self.totals.bytes)

    def _disk_size(self, reader: SegmentReader) -> int | None:
        """Bytes that the disk has in a segment; None when timeline.json does not say how many it began with."""
        try:
            grown = disk_size(reader)
        except CorruptError:  # its first record is damaged, and reported as that
            grown = reader.header.carry.size
        return grown or (self.timeline.size if self.timeline is not None else None)

    def _broken_headers(
        self, seqs: list[int], whole: npt.NDArray[np.bool_], records: npt.NDArray[np.void]
    ) -> None:
        for low, high in runs(np.flatnonzero(~whole).tolist()):
            who = f"record {seqs[low]}" if low == high else f"records {seqs[low]} to {seqs[high]}"
            before = int(np.count_nonzero(whole[:low]))
            time_ns = int(records["time"][before - 1]) if before else None
            self._state = None
            self._say(f"the header of {who} fails its check", seq=seqs[low], time_ns=time_ns)

    def _times(self, records: npt.NDArray[np.void]) -> None:
        if not len(records):
            return
        times = np.concatenate((np.array([self._time_ns], dtype=np.uint64), records["time"]))
        for number in np.flatnonzero(times[1:] < times[:-1])[:1].tolist():
            seq = int(records["seq"][number])
            self._say(f"the time of record {seq} is before that of the one before it", seq=seq, extents=())
        self._time_ns = int(times.max())

    def _payloads(self, reader: SegmentReader, raw: bytes, numbers: list[int], first: int) -> list[int]:
        """Numbers, within the chunk, of the records whose payload is not what their digest says.

        That of control records is always looked at: the records after them mean nothing without it.
        """
        bad = []
        takes, interval, segment = self.depth.takes, self._interval, reader.segment
        records = np.frombuffer(raw, DTYPE)
        kinds, places = records["kind"].tolist(), records["place"].tolist()
        lengths, offsets = records["length"].tolist(), records["offset"].tolist()
        for number in numbers:
            if kinds[number] == Kind.DATA:
                if not takes((PAYLOAD, interval, segment, first + number)):
                    continue
                size = lengths[number] * SECTOR
            elif kinds[number] == Kind.CONTROL:
                size = min(offsets[number], MAX_CONTROL_BYTES + 1)
            else:
                continue
            at = number * RECORD_SIZE + DIGEST_AT
            try:
                payload = reader.payload(places[number], size)
            except (CorruptError, FileNotFoundError, OverflowError):
                payload = b""
            self.totals.bytes += len(payload)
            if len(payload) != size or payload_digest(payload) != raw[at : at + DIGEST_SIZE]:
                bad.append(number)
                self.depth.found((PAYLOAD, interval, segment, first + number))
            elif kinds[number] == Kind.CONTROL:
                self._control(reader, records[number], payload)
        return bad

    def _control(self, reader: SegmentReader, record: np.void, payload: bytes) -> None:
        seq, time_ns = int(record["seq"]), int(record["time"])
        try:
            message = control.decode(payload)
            if message["type"] == "mark":
                at, at_ns = control.marked(message, seq=seq, time_ns=time_ns)
                self.effects.name(at, at_ns, str(message["name"]))
            elif message["type"] == "cut":
                self.cuts[int(message["number"])] = seq, time_ns
                self.sizes[int(message["number"])] = self._disk_size(reader)
                self.effects.name(seq, time_ns, f"bp:{message['number']}")
            elif message["type"] == "grow":
                self._growth(reader, seq, message["size"])
            if self._state is not None:
                self._state = control.fold(self._state, message, seq=seq, time_ns=time_ns)
        except (CorruptError, KeyError, TypeError, ValueError) as error:
            self._state = None
            why = error.message if isinstance(error, CorruptError) else error
            self._say(f"control record {seq} cannot be read: {why}", seq=seq, extents=())

    def _growth(self, reader: SegmentReader, seq: int, size: int) -> None:
        before = reader.header.carry.size or (self.timeline.size if self.timeline is not None else 0)
        if size <= before:
            self._say(f"record {seq} lets the disk shrink from {before} to {size} bytes", seq=seq, extents=())
        if seq != reader.seq_of(0):
            self._say(f"record {seq} lets the disk grow in the middle of a segment", seq=seq, extents=())

    def _damaged_payloads(self, reader: SegmentReader, bad: npt.NDArray[np.void]) -> None:
        if not len(bad):
            return
        self._where = data_path(reader.directory, reader.segment)
        missing = "" if self._where.exists() else ": the data file is missing"
        for low, high in runs(np.unique(bad["seq"]).tolist()):
            some = bad[(bad["seq"] >= low) & (bad["seq"] <= high)]
            seq, last = int(some["seq"][0]), int(some["seq"][-1])
            who = (
                f"the payload of record {seq} does"
                if seq == last
                else f"the payloads of records {seq} to {last} do"
            )
            data = some[some["kind"] == Kind.DATA]
            starts = data["offset"].tolist()
            ends = (data["offset"] + data["length"].astype(np.uint64) * np.uint64(SECTOR)).tolist()
            said_all = len(data) == len(some)
            if not said_all:
                self._state = None  # a control record: what it said is lost
            self._say(
                f"{who} not match {'its digest' if seq == last else 'their digests'}{missing}",
                seq=seq,
                time_ns=int(some["time"][0]),
                extents=tuple(zip(starts, ends, strict=True)),
                after_seq=last,
                known=said_all,
            )
        self._where = reader.path


def _seqs(reader: SegmentReader, raw: bytes, first: int, whole: npt.NDArray[np.bool_]) -> list[int]:
    """The seqs of the records in `raw`; of a thinned segment's damaged ones that of the last whole one before."""
    if not reader.header.thinned:
        start = reader.first_seq + first
        return list(range(start, start + len(whole)))
    said = np.where(whole, np.frombuffer(raw, DTYPE, count=len(whole))["seq"], np.uint64(reader.first_seq))
    found: list[int] = np.maximum.accumulate(said).tolist()
    return found


def _was_there(log: Path) -> bool:
    """Is a segment's log there, or known to have been cut?"""
    return log.exists() or Path(f"{log}.cut").exists()


def _is_blank(path: Path) -> bool:
    """A segment that was made, but that the host did not get to write before it went down: zeros, if anything."""
    with open(path, "rb") as log:
        return not any(part.strip(b"\0") for part in iter(lambda: log.read(1 << 20), b""))
