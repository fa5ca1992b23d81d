"""The instants that a thinned interval can still give: the file `instants` beside its segments.

    seq      4711        4760                  4799 (the interval's last record)
    time     .|--exact--|.....|--exact--|......|--exact to the end-->

A thinned interval lacks records, so content is known only as it was right after the records listed here. Each stays exact until
`until_ns`, when the first record that changed something after it was received, whether that record is still there or not.

Invariants: seqs ascend; the record of each is in the segments; the interval's last record is the last of them.
docs/format.md has the layout.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from cdpserver.errors import CorruptError

FILE = "instants"
MAGIC = b"cdpins1\n"
HEAD = struct.Struct("<8s16sQQQ")
ROW_BYTES = 32
DIGEST_BYTES = 32
FOR_EVER = (1 << 64) - 1
"""`until_ns` of the last one: nothing of its interval comes after it."""

DTYPE = np.dtype([("seq", "<u8"), ("time", "<u8"), ("until", "<u8"), ("held", "<u8")])

HINT = "cdp check says what it touches; base points are not touched"


@dataclass(frozen=True, slots=True)
class Instant:
    """An instant that can be given: that right after record `seq`, exact in the times [time_ns, until_ns)."""

    seq: int
    time_ns: int
    until_ns: int


class Instants:
    """The instants of one thinned interval; `rows` has the shape (n,) and the dtype DTYPE.

    `every_ns`: how far apart the policy kept them. `held` is 1 for one that is there only because somebody held it.
    """

    def __init__(self, every_ns: int, rows: npt.NDArray[np.void]) -> None:
        self.every_ns = every_ns
        self.rows = rows

    @classmethod
    def make(cls, every_ns: int, rows: Sequence[tuple[int, int, int, int]]) -> Self:
        """From (seq, time, until, held) by ascending seq."""
        return cls(every_ns, np.array(list(rows), dtype=DTYPE))

    @classmethod
    def load(cls, directory: Path, *, timeline: bytes, interval: int) -> Self:
        """Those of the interval in `directory`. CorruptError."""
        path = directory / FILE
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            if not directory.is_dir():
                raise  # dropped meanwhile
            raise CorruptError(f"{path} is missing", hint=HINT) from None
        if len(raw) < HEAD.size + DIGEST_BYTES or blake3(raw[:-DIGEST_BYTES]).digest() != raw[-DIGEST_BYTES:]:
            raise CorruptError(f"{path} fails its check", hint=HINT)
        magic, uuid, number, every_ns, count = HEAD.unpack_from(raw)
        fits = len(raw) == HEAD.size + count * ROW_BYTES + DIGEST_BYTES
        if magic != MAGIC or (uuid, number) != (timeline, interval) or not fits or not count:
            raise CorruptError(f"{path} is not what interval {interval} can give", hint=HINT)
        return cls(every_ns, np.frombuffer(raw, DTYPE, count, HEAD.size))

    def write(self, directory: Path, *, timeline: bytes, interval: int) -> None:
        """Into a directory that nobody sees yet; durable on return, but for its name."""
        body = HEAD.pack(MAGIC, timeline, interval, self.every_ns, len(self.rows)) + self.rows.tobytes()
        with open(directory / FILE, "wb") as file:
            file.write(body + blake3(body).digest())
            file.flush()
            os.fdatasync(file.fileno())

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, seq: int) -> bool:
        found = self.at_seq(seq)
        return found is not None and found.seq == seq

    def _row(self, number: int) -> Instant | None:
        if not 0 <= number < len(self.rows):
            return None
        row = self.rows[number]
        return Instant(int(row["seq"]), int(row["time"]), int(row["until"]))

    def _upto(self, column: str, value: int) -> int:
        return int(np.searchsorted(self.rows[column], np.uint64(value), side="right"))

    def at_seq(self, seq: int) -> Instant | None:
        """The newest one at or before `seq`."""
        return self._row(self._upto("seq", seq) - 1)

    def at_time(self, time_ns: int) -> Instant | None:
        """The newest one at or before a time; exact there if that is before its `until_ns`."""
        return self._row(self._upto("time", time_ns) - 1)

    def after_seq(self, seq: int) -> Instant | None:
        """The oldest one after `seq`."""
        return self._row(self._upto("seq", seq))

    def held(self) -> frozenset[int]:
        """The seqs that are there only because somebody held them."""
        return frozenset(self.rows["seq"][self.rows["held"] != 0].tolist())
