"""What can be said of a run of records by itself: which are whole, and whether their fields can be meant; pure."""

import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cdpserver.journal.record import BODY, CHANGES, DTYPE, KNOWN_KINDS, MAGIC, RECORD_SIZE, VERSION, Kind
from cdpserver.journal.segment import Header, in_order
from cdpserver.limits import BLOCK, SECTOR


def whole_records(raw: bytes, header: Header, first: int) -> npt.NDArray[np.bool_]:
    """Which records of `raw`, whose first is number `first` of its segment, are whole and where they belong."""
    records = np.frombuffer(raw, DTYPE, count=len(raw) // RECORD_SIZE)
    whole: npt.NDArray[np.bool_] = (records["magic"] == MAGIC) & (records["version"] == VERSION)
    whole &= in_order(records["seq"], header, first)
    checks, salt = records["crc"].tolist(), header.salt
    for number in np.flatnonzero(whole).tolist():
        at = number * RECORD_SIZE
        if zlib.crc32(raw[at : at + BODY.size], salt) != checks[number]:
            whole[number] = False
    return whole


def last_whole(raw: bytes, salt: int) -> tuple[int, int] | None:
    """(seq, time) of the last whole record of a segment, whatever became of its header page; None without one."""
    records = np.frombuffer(raw, DTYPE, count=len(raw) // RECORD_SIZE)
    for number in np.flatnonzero(records["magic"] == MAGIC)[::-1].tolist():
        at = number * RECORD_SIZE
        if zlib.crc32(raw[at : at + BODY.size], salt) == int(records["crc"][number]):
            return int(records["seq"][number]), int(records["time"][number])
    return None


def wrong_fields(records: npt.NDArray[np.void], *, disk_size: int | None) -> Iterator[tuple[int, int, str]]:
    """(seq, time, what is wrong) of whole records that no writer of ours would write."""
    kinds, seqs, places = records["kind"], records["seq"], records["place"]
    change = (kinds >= CHANGES[0]) & (kinds <= CHANGES[-1])
    size = np.uint64(disk_size if disk_size is not None else 1 << 62)
    ends = records["offset"] + records["length"].astype(np.uint64) * np.uint64(SECTOR)
    for wrong, what in (
        (~np.isin(kinds, tuple(KNOWN_KINDS)), "is of no known kind"),
        (change & (records["length"] == 0), "has an empty extent"),
        (change & (records["offset"] % np.uint64(BLOCK) != 0), "has an extent that is not aligned"),
        (change & (ends > size), "has an extent beyond the end of the disk"),
        ((kinds == Kind.DATA) & (places % np.uint64(BLOCK) != 0), "has a payload that is not aligned"),
        ((kinds == Kind.SAME) & (places >= seqs), "refers to a record that is not before it"),
        ((kinds == Kind.DURABLE) & (places >= seqs), "says that a later record is durable"),
    ):
        for seq, time_ns in zip(seqs[wrong].tolist(), records["time"][wrong].tolist(), strict=True):
            yield seq, time_ns, what


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] + 1 == number:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
