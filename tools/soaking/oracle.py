"""What a disk must hold at each instant: every write with the times between which it happened.

One write at a time, so at an instant T the disk holds the writes that were acknowledged by then, and perhaps the one that was
under way:

    sent 1   acknowledged 1        sent 2        acknowledged 2
    |--------------|                  |----------------|
          T: 0 or 1        T: 1                T: 1 or 2

Of the one under way it may hold some sectors and not yet the others: a request that neither begins nor ends with blocks is
several records, and an instant may lie between two of them, as a power loss may.
Each sector says by which write it came, and where it belongs: a sector of another time or place is seen.
"""

import threading
import time
from bisect import bisect_right
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

SECTOR = 512
WORDS = SECTOR // 8
KEPT_EVERY = 2048
"""Writes between two whole states that are kept: any other is made of one of them in milliseconds."""

Sectors = NDArray[np.uint32]
"""By which write each sector came; 0: it is zero."""


@dataclass(frozen=True, slots=True)
class Write:
    """Sectors `[first, end)`; data that says `number`, or zeros."""

    number: int
    first: int
    end: int
    is_zero: bool

    @property
    def offset(self) -> int:
        return self.first * SECTOR

    @property
    def length(self) -> int:
        return (self.end - self.first) * SECTOR


class Oracle:
    """All writes of one disk. Threads: one writes, any may ask."""

    def __init__(self, size: int, *, align: int, disk: int) -> None:
        self.sectors = size // SECTOR
        self._align, self._disk = align // SECTOR, disk
        self._lock = threading.Lock()
        self._writes: list[Write] = []
        self._sent_ns: list[int] = []
        self._acknowledged_ns: list[int] = []
        self._now = np.zeros(self.sectors, np.uint32)
        self._kept = [self._now.copy()]

    @property
    def count(self) -> int:
        """Writes that were acknowledged."""
        return len(self._acknowledged_ns)

    # -- writing ---------------------------------------------------------------------------------------------

    def next(self, dice: Random) -> Write:
        """What is to be written next. Mostly a block; sometimes a run, or zeros."""
        kind = dice.random()
        units = self.sectors // self._align
        most = 1 if kind < 0.7 else 16 * 8 // self._align
        first = dice.randrange(units)
        end = min(units, first + dice.randint(1, most))
        return Write(len(self._writes) + 1, first * self._align, end * self._align, kind > 0.93)

    def sent(self, write: Write) -> None:
        """It is on its way, for the first time."""
        with self._lock:
            self._writes.append(write)
            self._sent_ns.append(time.clock_gettime_ns(time.CLOCK_BOOTTIME))

    def acknowledged(self) -> None:
        """The newest is."""
        with self._lock:
            self._acknowledged_ns.append(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
            apply(self._now, self._writes[-1])
            if len(self._writes) % KEPT_EVERY == 0:
                self._kept.append(self._now.copy())

    def data(self, write: Write) -> bytes:
        """What is written."""
        return self._filled(np.full(write.end - write.first, write.number, np.uint32), write.first)

    # -- asking ----------------------------------------------------------------------------------------------

    def at(self, boottime_ns: int) -> range:
        """How many writes the disk held at an instant: one number, or two."""
        with self._lock:
            least = bisect_right(self._acknowledged_ns, boottime_ns)
            most = bisect_right(self._sent_ns, boottime_ns)
        return range(least, most + 1)

    def between(self, since_ns: int, until_ns: int) -> range:
        """How many it held at some instant between the two."""
        return range(self.at(since_ns).start, self.at(until_ns).stop)

    def wrong(self, found: bytes, held: range, offset: int = 0) -> int:
        """Bytes at `offset` that differ from what the disk held: from the best of the numbers of writes it may have held."""
        least, before = len(found), None
        for count in held:
            differs = self._differs(count, found, offset)
            if before is not None:
                # A sector of the one or of the other; both are the same but for what the write between them wrote.
                torn = np.minimum(differs, before)
                least = min(least, int(torn.sum()))
            least, before = min(least, int(differs.sum())), differs
            if not least:
                break
        return least

    def _differs(self, count: int, found: bytes, offset: int) -> NDArray[np.int64]:
        """Bytes of each sector of `found` that are not as after so many writes."""
        expected = np.frombuffer(self.content(count)[offset : offset + len(found)], np.uint8)
        differ = expected != np.frombuffer(found, np.uint8)
        return np.asarray(differ.reshape(-1, SECTOR).sum(axis=1))

    def content(self, count: int) -> bytes:
        """The whole disk after so many writes."""
        return self._filled(self._state(count))

    def _state(self, count: int) -> Sectors:
        with self._lock:
            kept = min(count // KEPT_EVERY, len(self._kept) - 1)
            state = self._kept[kept].copy()
            rest = self._writes[kept * KEPT_EVERY : count]
        for write in rest:
            apply(state, write)
        return state

    def _filled(self, numbers: Sectors, first: int = 0) -> bytes:
        places = np.arange(first, first + len(numbers), dtype=np.uint64)
        words = (
            (numbers.astype(np.uint64) << np.uint64(32)) | (places << np.uint64(8)) | np.uint64(self._disk)
        )
        return bytes(np.repeat(np.where(numbers == 0, np.uint64(0), words), WORDS).tobytes())


def apply(state: Sectors, write: Write) -> None:
    """The state after a write."""
    state[write.first : write.end] = 0 if write.is_zero else write.number
