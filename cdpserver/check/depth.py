"""How deep a check goes: which payload, indexes and base points are verified; headers always are. Pure.

A unit of work has a place, and places are in order, so that one of them says how far a check has come:

    (BASE, block, 0, 0)   (PAYLOAD, interval, segment, record)   (INDEX, interval, 0, 0)
    (BASE_POINT, number, block, 0)   (CONTENT, number, piece, 0)

Blocks are those of `sums.py`, pieces those of PIECE bytes of the disk, both counted from 1. Block 0 of a base point is what QEMU
says of its tables.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from cdpserver.errors import CorruptError

Place: TypeAlias = tuple[int, int, int, int]

BASE, PAYLOAD, INDEX, BASE_POINT, CONTENT = range(5)

NOWHERE: Place = (0, 0, 0, 0)
END: Place = (5, 0, 0, 0)
PIECE = 64 << 20
"""Bytes of the disk that a base point's content is compared in."""

MERGED_INDEXES = 1 << 62
"""In the place of an interval: the merged indexes, after all others."""

MAX_AGAIN = 100_000
"""Places that a check remembers as damaged; what comes after them is found again by another one."""


class Depth(Protocol):
    """Which units are verified."""

    @property
    def name(self) -> str:
        """What an operator calls it."""

    @property
    def content(self) -> bool:
        """Are base points compared with the journal?"""

    def takes(self, place: Place) -> bool:
        """Is this unit verified? Asked once for each, in order, when the one before it is done."""

    def found(self, place: Place) -> None:
        """This unit is damaged."""


class Everything:
    """All units; with `content` also the content of base points against the journal."""

    def __init__(self, *, content: bool = False) -> None:
        self.name = "full" if content else "normal"
        self.content = content

    def takes(self, place: Place) -> bool:
        """Yes."""
        return True

    def found(self, place: Place) -> None:
        """Nothing is remembered."""


class Quick(Everything):
    """Header pages, records' headers, and what stands on what: nothing that takes long."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "quick"

    def takes(self, place: Place) -> bool:
        """Nothing."""
        return False


class Sample(Everything):
    """Everything but payload, of which it verifies `percent` of the records, spread evenly from a random start by `seed`."""

    def __init__(self, *, percent: int, seed: int) -> None:
        assert 1 <= percent <= 100
        super().__init__()
        self.name = "sample"
        self.percent = percent
        self.seed = seed

    def takes(self, place: Place) -> bool:
        """Is it one of those chosen? The same seed chooses the same ones."""
        if place[0] != PAYLOAD:
            return True
        mixed = hash((self.seed, *place)) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        return (mixed >> 32) % 100 < self.percent


@dataclass
class Part:
    """What comes after a place, until `ends` says so, and once more what was found damaged before that place.

    `at` is then where to go on. `keep` is called before each unit that is new, when all before it is in `as_json`.
    """

    at: Place = NOWHERE
    again: set[Place] = field(default_factory=set)
    content: bool = False
    ends: Callable[[], bool] = lambda: False
    ended: bool = False
    damaged: set[Place] = field(default_factory=set)
    keep: Callable[["Part"], None] = lambda _: None

    @property
    def name(self) -> str:
        """As a check without an end is called."""
        return "full" if self.content else "normal"

    def takes(self, place: Place) -> bool:
        """Is it still to be done, and is there time? What was damaged is looked at whether there is or not."""
        if place <= self.at:
            return place in self.again or (place[0] >= BASE_POINT and (*place[:2], 0, 0) in self.again)
        if not self.ended and self.ends():
            self.ended = True
        if self.ended:
            return False
        self.keep(self)
        self.at = place
        return True

    def found(self, place: Place) -> None:
        """Remembered for the next part."""
        if len(self.damaged) < MAX_AGAIN:
            self.damaged.add(place)

    def as_json(self) -> dict[str, Any]:
        """Where to go on, for a file. What was damaged before has been looked at again by the time that `keep` is called."""
        return {
            "at": list(self.at),
            "again": [list(place) for place in sorted(self.damaged)],
            "content": self.content,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], ends: Callable[[], bool]) -> "Part":
        """What `as_json` gave. CorruptError for anything else."""
        try:
            at, again = _place(value["at"]), {_place(place) for place in value["again"]}
            content = value["content"]
        except (KeyError, TypeError, ValueError):
            at, again, content = NOWHERE, set(), None
        if type(content) is not bool:
            raise CorruptError("the record of a check under way is damaged", hint="begin it anew")
        return cls(at, again, content, ends)


def _place(value: object) -> Place:
    if not isinstance(value, list) or any(type(number) is not int or number < 0 for number in value):
        raise ValueError(value)
    stage, first, second, third = value
    return stage, first, second, third
