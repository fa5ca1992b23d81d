"""What clients asked of a disk, counted where it is done: plain additions under locks that are held anyway.

Cost: 65 ns a write, less than a hundredth of what a write over NBD takes; timing every one would cost twice as much again.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

NOT_TIMED = 15
"""Writes whose number has one of these bits are not timed: every 16th tells as much of latency as all of them do."""


@dataclass(slots=True)
class Counts:
    """Requests by kind, and their bytes; `timed` of the writes took `timed_ns` together."""

    writes: int = 0
    data_bytes: int = 0
    zeros: int = 0
    zero_bytes: int = 0
    trims: int = 0
    trim_bytes: int = 0
    reads: int = 0
    read_bytes: int = 0
    flushes: int = 0
    timed: int = 0
    timed_ns: int = 0

    def add(self, other: "Counts") -> None:
        """Count what `other` counted."""
        for name in NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))


NAMES = tuple(field.name for field in fields(Counts))


def total(counts: Iterable[Counts]) -> dict[str, int]:
    """The sum, as plain values."""
    found = Counts()
    for one in counts:
        found.add(one)
    return asdict(found)
