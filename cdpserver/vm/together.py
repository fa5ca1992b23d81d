"""Points that several disks have in common: instants at which every one of them is good. Pure.

All disks have one clock, so one time is one instant. At time T a disk shows its newest record up to T, and a write that was begun
after another was acknowledged has a later time: so no T shows the second without the first, on whichever disks they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdpserver.journal.control import Grade
from cdpserver.names import format_time
from cdpserver.point import Point
from cdpserver.stretches import Stretch, stretch_at


@dataclass(frozen=True, slots=True)
class Member:
    """One of the disks: its recovery points, one a second, and when it is good for what."""

    disk: str
    points: Sequence[Point]
    stretches: list[Stretch]


@dataclass(frozen=True, slots=True)
class CommonPoint:
    """An instant at which every disk is good. `records` and `bytes` are of all disks, in the slot up to it."""

    time_ns: int
    records: int
    bytes: int
    grades: dict[str, Grade]
    evidence: dict[str, dict[str, Any]]
    """What the grade of each disk rests on."""
    name: str | None = None
    """That of a bookmark."""

    def as_dict(self) -> dict[str, Any]:
        """The point as the CLI and the API show it; its grade is that of the worst disk."""
        return {
            "kind": "rp" if self.name is None else "bookmark",
            "time": format_time(self.time_ns),
            "time_ns": self.time_ns,
            "records": self.records,
            "bytes": self.bytes,
            "grade": min(self.grades.values()).label,
            "name": self.name,
            "disks": {disk: grade.label for disk, grade in self.grades.items()},
            "evidence": self.evidence,
        }


def common_points(members: Sequence[Member], *, slot_ns: int, now_ns: int) -> list[CommonPoint]:
    """One point for each slot that is over: the newest of its instants, among the disks' points, at which all are good."""
    slots: dict[int, list[Point]] = {}
    for member in members:
        for point in member.points:
            slots.setdefault(point.time_ns // slot_ns, []).append(point)
    found = []
    for slot, points in sorted(slots.items()):
        if (slot + 1) * slot_ns > now_ns:
            break
        for time_ns in sorted({point.time_ns for point in points}, reverse=True):
            good = _good_at(members, time_ns)
            if good is not None:
                held = [point for point in points if point.time_ns <= time_ns]
                records, size = sum(p.records for p in held), sum(p.bytes for p in held)
                grades = {disk: stretch.grade for disk, stretch in good.items()}
                evidence = {disk: stretch.evidence for disk, stretch in good.items()}
                found.append(CommonPoint(time_ns, records, size, grades, evidence))
                break
    return found


def _good_at(members: Sequence[Member], time_ns: int) -> dict[str, Stretch] | None:
    """The stretch that each disk is in at a time; None unless all are good."""
    found: dict[str, Stretch] = {}
    for member in members:
        stretch = stretch_at(member.stretches, time_ns)
        if stretch is None or stretch.grade == Grade.UNORDERED:
            return None
        found[member.disk] = stretch
    return found


def around(held: Sequence[list[Stretch]], time_ns: int) -> tuple[int | None, int | None]:
    """The nearest instants at which every disk is good: (at or before a time, after it)."""
    common = _good(held[0])
    for one in held[1:]:
        common = _both(common, _good(one))
    before = [min(end - 1, time_ns) for start, end in common if start <= time_ns]
    after = [start for start, _ in common if start > time_ns]
    return max(before, default=None), min(after, default=None)


def _good(found: list[Stretch]) -> list[tuple[int, int]]:
    return [(part.start_ns, part.end_ns) for part in found if part.grade != Grade.UNORDERED]


def _both(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What two lists of ranges, each ascending and without overlaps, have in common."""
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found
