"""Verifies what a view reads against the digests that are stored with it, so that what rotted is not served.

    extent in a segment's data file  -> the record whose payload it is part of -> the record's digest, and its place on the disk
    extent in a base or base point   -> its block in the file's sums (`sums.py`), where it has any

A payload, or a block of a file, is verified when it is first read, and not again by the same view.
Threads: none, as the view's files.
"""

import contextlib
import os
from bisect import bisect_right
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdpserver import sums
from cdpserver.errors import CorruptError
from cdpserver.journal.record import DIGEST_SIZE, DTYPE, RECORD_SIZE, Kind, payload_digest
from cdpserver.journal.segment import SegmentReader
from cdpserver.limits import SECTOR

HINT = "cdp check says what it touches"


class _Payloads:
    """The records of one segment that have payload for a disk, by their place."""

    def __init__(self, path: Path) -> None:
        try:
            reader = SegmentReader(path.parent, int(path.stem))
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing", hint=HINT) from None
        with contextlib.closing(reader):
            records = _whole(reader)
        held = records[records["kind"] == Kind.DATA]
        held = held[np.argsort(held["place"], kind="stable")]
        # Memoryviews: a lookup in one costs a fraction of that in an array.
        starts = held["place"].astype(np.int64)
        self.starts = memoryview(starts)
        self.ends = memoryview(starts + held["length"].astype(np.int64) * SECTOR)
        self.offsets = memoryview(held["offset"].astype(np.int64))
        self.seqs = memoryview(held["seq"].astype(np.int64))
        self.digests = held["digest"].tobytes()
        self.done = bytearray(len(held))


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
            raise CorruptError(f"{key} has no record at {place}: the index is damaged", hint=HINT)
        for at in range(first, last):
            low, high = held.starts[at], held.ends[at]
            if low - place != held.offsets[at] - offset:
                raise CorruptError(
                    f"record {held.seqs[at]} is not of {offset}: the index is damaged", hint=HINT
                )
            if not held.done[at]:
                inside = place <= low and high <= end
                payload = part[low - place : high - place] if inside else os.pread(fd, high - low, low)
                wanted = held.digests[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE]
                if len(payload) != high - low or payload_digest(payload) != wanted:
                    raise CorruptError(
                        f"the payload of record {held.seqs[at]} does not match its digest", hint=HINT
                    )
                held.done[at] = True

    def _check_block(self, fd: int, key: str, place: int, end: int) -> None:
        path = Path(key.partition("#")[0])
        if key not in self._sums:
            self._sums[key] = (sums.read(path), set())
        digests, done = self._sums[key]
        if digests is None:
            return
        for number in range(place // sums.BLOCK, -(-end // sums.BLOCK)):
            if number not in done and number < len(digests):
                if sums.digest(os.pread(fd, sums.BLOCK, number * sums.BLOCK)) != digests[number]:
                    raise CorruptError(f"{path} is not what was written at {number * sums.BLOCK}", hint=HINT)
                done.add(number)
