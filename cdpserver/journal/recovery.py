"""What is left of a journal when its writer is gone: taken over, or cut after an unclean host boot.

Same boot (a killed process): the page cache is whole and the tail word exact; nothing is lost.
Another boot: pages may be missing. Records count up to the first one that is not whole, not next in seq, or, past the
last durable record, whose payload does not have its digest. What follows is cut. A bad record *before* the durable seq is damage:
it is kept and reported, never cut.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdpserver import durable
from cdpserver.errors import CorruptError
from cdpserver.journal.control import State
from cdpserver.journal.log import Journal, fold_controls, interval_path
from cdpserver.journal.record import DTYPE, Kind, payload_digest
from cdpserver.journal.segment import CLOSED, OPEN, PAGE, ROLLED, SEALED, SegmentReader, data_path, log_path
from cdpserver.limits import SECTOR

USED = (".log", ".log.cut", ".data.cut")


def free_number(directory: Path, number: int) -> int:
    """From `number` on: a segment that was cut, found damaged or lost its log keeps its number for good."""
    while any(log_path(directory, number).with_suffix(end).exists() for end in USED):
        number += 1
    return number


@dataclass(frozen=True, slots=True)
class Survey:
    """What the unsealed segments at the end of a journal hold.

    valid        records that may be kept, by (interval, segment), oldest first; None where a segment is unreadable
    durable_seq  the highest durable seq on record
    unclean      another boot wrote them and did not close: what follows `valid` may have been acknowledged
    damaged      a record at or before the durable seq is bad
    """

    valid: tuple[tuple[tuple[int, int], int], ...]
    durable_seq: int
    unclean: bool
    damaged: bool


def lost_logs(journal: Journal) -> list[Path]:
    """Data files that hold something though their header log is gone, at or after the newest segment.

    No crash does that: somebody or something removed the log. Older ones are for `cdp check` to find.
    """
    newest = journal.intervals[-1] if journal.intervals else 0
    found = []
    for directory in sorted((journal.timeline / "intervals").iterdir()):
        if directory.name.isdigit() and int(directory.name) >= newest:
            for data in sorted(directory.glob("*.data")):
                log = data.with_suffix(".log")
                if not log.exists() and not Path(f"{log}.cut").exists() and data.stat().st_size:
                    found.append(data)
    return found


def survey(journal: Journal, boot_id: str) -> Survey:
    """Look at every segment that was not sealed. Reads only."""
    unsealed: list[tuple[int, int]] = []
    vanished = bool(lost_logs(journal))
    for place in journal.newest_places():
        if never_written(journal, place):
            vanished = True
            continue
        reader = journal.reader(*place)
        if reader.state == SEALED:
            break
        unsealed.append(place)
    unsealed.reverse()
    readers = [journal.reader(*place) for place in unsealed]
    unclean = vanished or any(
        reader.state in (OPEN, ROLLED) and reader.header.boot_id != boot_id for reader in readers
    )
    if not readers:
        return Survey((), _sealed_seq(journal), unclean=unclean, damaged=False)
    if not unclean:
        valid = tuple((place, reader.count) for place, reader in zip(unsealed, readers, strict=True))
        durable = max(_durable(reader, reader.count) for reader in readers)
        return Survey(valid, max(durable, _before(readers)), unclean=False, damaged=False)
    durable = max([_before(readers)] + [_claimed_durable(reader) for reader in readers])
    kept: list[tuple[tuple[int, int], int]] = []
    for place, reader in zip(unsealed, readers, strict=True):
        held = _held(reader)
        whole = _valid_records(reader, held, durable)
        kept.append((place, whole))
        following = readers[len(kept)] if len(kept) < len(readers) else None
        if following is None or following.first_seq != reader.first_seq + whole:
            break
    last_place, last_count = kept[-1]
    end_seq = journal.reader(*last_place).first_seq + last_count - 1
    return Survey(tuple(kept), durable, unclean=True, damaged=end_seq < durable)


def newest_sealed(journal: Journal) -> tuple[tuple[int, int], int]:
    """The newest segment that is sealed, and how many records it holds."""
    for place in journal.newest_places():
        if not never_written(journal, place):
            return place, journal.reader(*place).count
    raise CorruptError(f"{journal.timeline.name} has no readable segment", hint="cdp check says what is left")


def never_written(journal: Journal, place: tuple[int, int]) -> bool:
    """A log whose header page is zeros or missing: created, but its first commit never ended."""
    path = log_path(interval_path(journal.timeline, place[0]), place[1])
    with open(path, "rb") as log:
        return not log.read(PAGE).strip(b"\0")


def cut_short(reader: SegmentReader) -> bool:
    """Do the files end before what the tail word says was written? No kill does that: somebody or something cut them."""
    count = reader.count
    if reader.claimed > count:
        return True
    records = np.frombuffer(reader.raw(0, count), DTYPE)
    data, control = records[records["kind"] == Kind.DATA], records[records["kind"] == Kind.CONTROL]
    ends = [
        data["place"] + data["length"].astype(np.uint64) * np.uint64(SECTOR),
        control["place"] + control["offset"],
    ]
    needed = max((int(end.max()) for end in ends if len(end)), default=0)
    return os.fstat(reader.data_fd()).st_size < needed


def _sealed_seq(journal: Journal) -> int:
    place, count = newest_sealed(journal)
    return journal.reader(*place).first_seq + count - 1


def _before(readers: list[SegmentReader]) -> int:
    # A segment is sealed only when it is durable, so everything before the first unsealed one is.
    return readers[0].first_seq - 1


def _held(reader: SegmentReader) -> int:
    return max(0, reader.path.stat().st_size - PAGE) // DTYPE.itemsize


def _durable(reader: SegmentReader, count: int) -> int:
    if reader.state == CLOSED:
        return reader.last_seq
    records = np.frombuffer(reader.raw(0, count), DTYPE)
    places = records["place"][records["kind"] == Kind.DURABLE]
    return int(places.max()) if len(places) else 0


def _claimed_durable(reader: SegmentReader) -> int:
    """The highest durable seq of any whole durable record, also of one behind a damaged place."""
    raw = reader.raw(0, _held(reader))
    records = np.frombuffer(raw, DTYPE)
    highest = 0
    for number in np.flatnonzero(records["kind"] == Kind.DURABLE).tolist():
        at = number * DTYPE.itemsize
        if reader.first_bad(raw[at : at + DTYPE.itemsize], number) == 1:
            highest = max(highest, int(records["place"][number]))
    return highest


def _valid_records(reader: SegmentReader, held: int, durable_seq: int) -> int:
    raw = reader.raw(0, held)
    whole = reader.first_bad(raw, 0)
    records = np.frombuffer(raw, DTYPE, count=whole)
    first = max(0, durable_seq - reader.first_seq + 1)
    has_data = data_path(reader.directory, reader.segment).exists()
    for number in range(first, whole):
        if not (has_data or _has_no_payload(records[number])) or not payload_whole(reader, records[number]):
            return number
    return whole


def _has_no_payload(record: np.void) -> bool:
    return int(record["kind"]) not in (Kind.DATA, Kind.CONTROL)


def payload_whole(reader: SegmentReader, record: np.void) -> bool:
    """Does the payload of this record (if it has one) still have its digest?"""
    kind = int(record["kind"])
    if kind == Kind.DATA:
        length = int(record["length"]) * SECTOR
    elif kind == Kind.CONTROL:
        length = int(record["offset"])
    else:
        return True
    payload = reader.payload(int(record["place"]), length)
    return len(payload) == length and payload_digest(payload) == record["digest"].tobytes()


def cut_after(journal: Journal, found: Survey) -> tuple[int, list[str]]:
    """Remove what an unclean boot left after the valid records; how many records' room was cut, and which logs were empty
    or gone.

    The bytes go to `*.cut` files beside the segments first, so that an operator can look at them.
    """
    kept = dict(found.valid)
    for interval, number in kept:
        # The log's name came to the disk before the loss of power and that of its data file did not: no record of it that
        # is kept has payload.
        data_path(interval_path(journal.timeline, interval), number).touch(0o600)
    _forget_indexes(journal, found)
    cut = 0
    missing = []
    for data in lost_logs(journal):
        data.rename(f"{data}.cut")
        missing.append(str(data.with_suffix(".log").relative_to(journal.timeline)))
    for place in journal.newest_places():
        if never_written(journal, place):
            log = log_path(interval_path(journal.timeline, place[0]), place[1])
            log.rename(f"{log}.cut")
            missing.append(str(log.relative_to(journal.timeline)))
            continue
        reader = journal.reader(*place)
        if reader.state == SEALED:
            break
        log = reader.path
        if place in kept:
            rest = reader.raw(kept[place], _held(reader))
            if rest.strip(b"\0"):
                Path(f"{log}.cut").write_bytes(rest)
                cut += len(rest.rstrip(b"\0")) // DTYPE.itemsize + 1
        else:
            cut += max(1, reader.count)
            log.rename(f"{log}.cut")
    return cut, missing


def _forget_indexes(journal: Journal, found: Survey) -> None:
    """An interval may have been indexed for good before its records were durable: those that are cut must not be found."""
    first, _ = found.valid[0][0] if found.valid else newest_sealed(journal)[0]
    for directory in sorted((journal.timeline / "intervals").iterdir()):
        if directory.name.isdigit() and int(directory.name) >= first:
            for path in directory.glob("*.mdb*"):
                path.unlink()
            durable.fsync_dir(directory)


def ends_with_cut(journal: Journal, place: tuple[int, int], count: int) -> bool:
    """Is the last of `count` records of a segment a base point's cut? Then the next record begins an interval."""
    if count == 0:
        return False
    reader = journal.reader(*place)
    record = reader.records(count - 1, count)[0]
    return bool(record["kind"] == Kind.CONTROL) and reader.control(record)["type"] == "cut"


def last_state(journal: Journal, place: tuple[int, int], count: int) -> tuple[int, int, State]:
    """(last seq, last time, state) after `count` records of a segment."""
    reader = journal.reader(*place)
    state = fold_controls(reader, reader.header.carry, 0, count)
    if count == 0:
        return reader.first_seq - 1, reader.header.first_time_ns, state
    return reader.first_seq + count - 1, reader.time_of(count - 1), state
