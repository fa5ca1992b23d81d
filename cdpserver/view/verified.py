"""Verifies what a view reads against the digests that are stored with it, so that what rotted is not served.

    extent in a segment's data file  -> the record whose payload it is part of -> the record's digest, and its place on the disk
    extent in a base or base point   -> its block in the file's sums (`sums.py`), where it has any

`Verifier`: a payload, or a block of a file, is verified when it is first read, and not again by the same view. `Anew` verifies it
each time, and keeps nothing in memory: for the few reads from which something is written that gets a digest of its own.
Threads: none, as the view's files.
"""

import contextlib
import os
from bisect import bisect_right
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cdpserver import sums
from cdpserver.errors import CorruptError
from cdpserver.journal.record import DATA, DIGEST_SIZE, DTYPE, RECORD_SIZE, payload_digest
from cdpserver.journal.segment import SegmentReader
from cdpserver.limits import BLOCK, SECTOR

HINT = "cdp check says what it touches"

CHUNK = 64
"""Records looked at together for the next one that has payload."""

BEYOND = 1 << 63
"""A place after any."""

KIND_AT, PLACE_AT = (DTYPE.fields[name][1] for name in ("kind", "place"))  # type: ignore[index]
"""Where they are in a record."""


class Verifies(Protocol):
    """What a view has what it reads verified by."""

    def check(self, fd: int, key: str, place: int, part: memoryview, offset: int) -> None:
        """CorruptError unless `part`, read at `place` of the open file `key`, is what was written to the disk at `offset`."""


class _Payloads:
    """The records of one segment that have payload for a disk, by their place."""

    def __init__(self, path: Path) -> None:
        with contextlib.closing(_segment(path)) as reader:
            held = _whole(reader)
        held = held[held["kind"] == DATA]
        held = held[np.argsort(held["place"], kind="stable")]
        # Memoryviews: a lookup in one costs a fraction of that in an array.
        starts = held["place"].astype(np.int64)
        self.starts = memoryview(starts)
        self.ends = memoryview(starts + held["length"].astype(np.int64) * SECTOR)
        self.offsets = memoryview(held["offset"].astype(np.int64))
        self.seqs = memoryview(held["seq"].astype(np.int64))
        self.digests = held["digest"].tobytes()
        self.done = bytearray(len(held))


def _segment(path: Path) -> SegmentReader:
    """The segment of a data file."""
    try:
        return SegmentReader(path.parent, int(path.stem))
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing", hint=HINT) from None


def _whole(reader: SegmentReader) -> npt.NDArray[np.void]:
    """The records of a segment whose headers are whole: one that is damaged vouches for nothing, and harms no other."""
    count = reader.count
    raw = reader.raw(0, count)
    kept, number = [], 0
    while number < count:
        good = reader.first_bad(raw[number * RECORD_SIZE :], number)
        kept.append(np.frombuffer(raw, DTYPE, count=good, offset=number * RECORD_SIZE))
        number += good + 1
    return np.concatenate(kept) if kept else np.empty(0, DTYPE)


class Verifier:
    """What was verified of the files of one view."""

    def __init__(self) -> None:
        self._payloads: dict[str, _Payloads] = {}
        self._sums: dict[str, tuple[list[bytes] | None, set[int]]] = {}

    def check(self, fd: int, key: str, place: int, part: memoryview, offset: int) -> None:
        """CorruptError unless `part`, read at `place` of the open file `key`, is what was written to the disk at `offset`."""
        if key.endswith(".data"):
            self._check_payload(fd, key, place, part, offset)
        else:
            self._check_block(fd, key, place, place + len(part))

    def _check_payload(self, fd: int, key: str, place: int, part: memoryview, offset: int) -> None:
        end = place + len(part)
        held = self._payloads.get(key)
        if held is None or not held.ends or held.ends[-1] < end:
            held = self._payloads[key] = _Payloads(Path(key))
        first = last = bisect_right(held.ends, place)
        while last < len(held.done) and held.starts[last] < end:
            last += 1
        if first == last:
            raise _no_record(key, place)
        for at in range(first, last):
            low, high = held.starts[at], held.ends[at]
            _check_place(low - place, held.offsets[at] - offset, held.seqs[at], offset)
            if not held.done[at]:
                wanted = held.digests[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE]
                _check_digest(fd, place, part, low, high, held.seqs[at], wanted)
                held.done[at] = True

    def _check_block(self, fd: int, key: str, place: int, end: int) -> None:
        path = Path(key.partition("#")[0])
        if key not in self._sums:
            self._sums[key] = (_sums(path), set())
        digests, done = self._sums[key]
        if digests is None:
            return
        for number in range(place // sums.BLOCK, -(-end // sums.BLOCK)):
            if number not in done and number < len(digests):
                if _digest_of(fd, number) != digests[number]:
                    raise _not_written(path, number)
                done.add(number)


def _sums(path: Path) -> list[bytes] | None:
    """The sums of a file, if there are any. Damaged ones say nothing of what is read: the check says that they are."""
    with contextlib.suppress(CorruptError):
        return sums.read(path)
    return None


class Anew:
    """Verifies what is read whenever it is read. A few lookups for each block; meant for reads of one block."""

    def check(self, fd: int, key: str, place: int, part: memoryview, offset: int) -> None:
        """As `Verifier.check`."""
        if key.endswith(".data"):
            self._check_payload(fd, key, place, part, offset)
        else:
            self._check_blocks(fd, Path(key.partition("#")[0]), place, place + len(part))

    def _check_payload(self, fd: int, key: str, place: int, part: memoryview, offset: int) -> None:
        end = place + len(part)
        with contextlib.closing(_segment(Path(key))) as reader:
            at = place
            while at < end:
                record = _record_at(reader, at)
                if record is None:
                    raise _no_record(key, at)
                low, seq = int(record["place"]), int(record["seq"])
                high = _end(record)
                _check_place(low - place, int(record["offset"]) - offset, seq, offset)
                _check_digest(fd, place, part, low, high, seq, record["digest"].tobytes())
                # Payloads begin at blocks: the end of an unaligned disk is padded.
                at = -(-high // BLOCK) * BLOCK

    def _check_blocks(self, fd: int, path: Path, place: int, end: int) -> None:
        for number in range(place // sums.BLOCK, -(-end // sums.BLOCK)):
            wanted = sums.read_one(path, number)
            if wanted is None:
                continue
            found = _digest_of(fd, number)
            if found != wanted:
                digests = _sums(path)  # all of them: what rotted may be this one's digest
                if digests is not None and digests[number] != found:
                    raise _not_written(path, number)


def _record_at(reader: SegmentReader, place: int) -> np.void | None:
    """The record whose payload is at a place of the data file. Payloads lie in the order of their records."""
    count = reader.count
    if count:
        number = bisect_right(range(count), place, key=lambda number: _payload_from(reader, number, count)[1])
        number = _payload_from(reader, max(0, number - 1), count)[0]
        raw = reader.raw(number, number + 1)
        if reader.first_bad(raw, number):
            record: np.void = np.frombuffer(raw, DTYPE)[0]
            if record["kind"] == DATA and int(record["place"]) <= place < _end(record):
                return record
    # None there; or a damaged header led astray.
    records = _whole(reader)
    starts = records["place"].astype(np.int64)
    held = (records["kind"] == DATA) & (starts <= place)
    held &= starts + records["length"].astype(np.int64) * SECTOR > place
    found: list[np.void] = list(records[held])
    return found[0] if found else None


def _payload_from(reader: SegmentReader, number: int, count: int) -> tuple[int, int]:
    """(number, place) of the first record from `number` on that has payload for a disk; (count, beyond all) without any."""
    if number < count:
        raw = reader.raw(number, number + 1)  # most records have payload
        if raw[KIND_AT] == DATA:
            return number, int.from_bytes(raw[PLACE_AT : PLACE_AT + 8], "little")
    while number < count:
        stop = min(number + CHUNK, count)
        records = np.frombuffer(reader.raw(number, stop), DTYPE)
        found = np.flatnonzero(records["kind"] == DATA)
        if len(found):
            return number + int(found[0]), int(records["place"][found[0]])
        number = stop
    return count, BEYOND


def _end(record: np.void) -> int:
    """Where the payload of a record ends in its data file."""
    return int(record["place"]) + int(record["length"]) * SECTOR


def _check_place(in_file: int, on_disk: int, seq: int, offset: int) -> None:
    """From what is read to where its record begins it must be as far in the file as on the disk."""
    if in_file != on_disk:
        raise CorruptError(f"record {seq} is not of {offset}: the index is damaged", hint=HINT)


def _check_digest(
    fd: int, place: int, part: memoryview, low: int, high: int, seq: int, wanted: bytes
) -> None:
    """Is the payload [low, high) of a file what its record says? What was read of it, from `place` on, is not read again."""
    inside = place <= low and high <= place + len(part)
    payload = part[low - place : high - place] if inside else os.pread(fd, high - low, low)
    if len(payload) != high - low or payload_digest(payload) != wanted:
        raise CorruptError(f"the payload of record {seq} does not match its digest", hint=HINT)


def _digest_of(fd: int, number: int) -> bytes:
    return sums.digest(os.pread(fd, sums.BLOCK, number * sums.BLOCK))


def _no_record(key: str, place: int) -> CorruptError:
    return CorruptError(f"{key} has no record at {place}: the index is damaged", hint=HINT)


def _not_written(path: Path, number: int) -> CorruptError:
    return CorruptError(f"{path} is not what was written at {number * sums.BLOCK}", hint=HINT)
