"""Damage in an operator's terms: what is wrong, from when to when it shows, which points it touches, which are intact.

    damaged write          overwritten
    ----x--------------------x-----------   seq
        | shows from here ..|  and no longer

A damaged payload shows in every instant from its record on, until all of its extent was written again. So damage that
the guest has long overwritten costs the points in between, and no other.

Invariants: damage is never said to end earlier than it does. A *same* record that refers into the stretch brings it back.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cdpserver.journal.record import CHANGES, Kind
from cdpserver.limits import SECTOR
from cdpserver.names import format_time

Extents: TypeAlias = tuple[tuple[int, int], ...]

SECOND_NS = 1_000_000_000

MAX_FINDINGS = 1000
"""Findings followed to their end. Nobody reads more; what comes after them is counted."""

MAX_EXTENTS = 256
"""Extents followed for one finding; more are taken as the one range that holds them all."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong, that shows from `from_seq` on.

    to_seq   last seq that shows it, with its time; None: it follows from what was written later
    extents  the bytes of the disk that are wrong, or none of them; None: nobody knows, so it shows for good
    named    the points that are touched, where that is not to be computed from the seqs
    """

    what: str
    path: Path
    from_seq: int
    from_time_ns: int
    to_seq: int | None = None
    to_time_ns: int = 0
    extents: Extents | None = None
    named: tuple[str, ...] = ()
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """A recovery point, bookmark or base point; a recovery point has no name."""

    seq: int
    time_ns: int
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The point for programs."""
        return {"seq": self.seq, "time": format_time(self.time_ns), "name": self.name}


@dataclass(frozen=True, slots=True)
class Damage:
    """A finding with what it means for the points of the timeline. The range of seqs and times is inclusive."""

    finding: Finding
    to_seq: int
    to_time_ns: int
    affected: int
    named: tuple[str, ...]
    before: Place | None
    after: Place | None

    def as_dict(self, root: Path) -> dict[str, Any]:
        """The damage for programs; paths are relative to `root`."""
        found = self.finding
        return {
            "what": found.what,
            "path": str(found.path.relative_to(root) if found.path.is_relative_to(root) else found.path),
            "from_time": format_time(found.from_time_ns) if found.from_time_ns else None,
            "to_time": format_time(self.to_time_ns) if self.to_time_ns else None,
            "from_seq": found.from_seq,
            "to_seq": self.to_seq,
            "points": {
                "affected": self.affected,
                "named": list(self.named),
                "before": self.before.as_dict() if self.before else None,
                "after": self.after.as_dict() if self.after else None,
            },
            "hint": found.hint,
        }


class Harm:
    """A finding being followed: which of its bytes still show."""

    def __init__(self, finding: Finding, after_seq: int) -> None:
        self.finding = finding
        self._after_seq = after_seq
        extents = finding.extents or ()
        if len(extents) > MAX_EXTENTS:
            extents = ((min(low for low, _ in extents), max(high for _, high in extents)),)
        self._extents = list(extents)
        self.showing = list(extents)
        self.healed: tuple[int, int] | None = None

    def feed(self, changes: npt.NDArray[np.void]) -> None:
        """Follow the harm through records that change the disk, in order."""
        if not self._extents:
            return
        low, high = self._extents[0][0], max(end for _, end in self._extents)
        starts, ends = (
            changes["offset"],
            changes["offset"] + changes["length"].astype(np.uint64) * np.uint64(SECTOR),
        )
        near = (starts < high) & (ends > low) & (changes["seq"] > self._after_seq)
        for record in changes[near]:
            start, end = int(record["offset"]), int(record["offset"]) + int(record["length"]) * SECTOR
            if record["kind"] == Kind.SAME and int(record["place"]) >= self.finding.from_seq:
                back = [(max(start, a), min(end, b)) for a, b in self._extents if a < end and start < b]
                self.showing = _union([*self.showing, *back])
            else:
                self.showing = _without(self.showing, start, end)
            if self.showing:
                self.healed = None
            elif self.healed is None:
                self.healed = int(record["seq"]), int(record["time"])


def _without(extents: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    left = []
    for low, high in extents:
        left += [part for part in ((low, min(high, start)), (max(low, end), high)) if part[0] < part[1]]
    return left


def _union(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(extents):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


@dataclass(slots=True)
class Effects:
    """Follows findings through a history, record by record, and knows the history's points.

    Call `add` for a finding before the records after it are fed; `damage` at the end.
    """

    harms: list[Harm] = field(default_factory=list)
    untold: int = 0
    last_seq: int = 0
    last_time_ns: int = 0
    _seqs: "array[int]" = field(default_factory=lambda: array("Q"))
    _times: "array[int]" = field(default_factory=lambda: array("Q"))
    _named: list[Place] = field(default_factory=list)

    def add(self, finding: Finding, *, after_seq: int | None = None) -> None:
        """A finding; what is written after `after_seq` (else its own seq) may end it."""
        if len(self.harms) >= MAX_FINDINGS:
            self.untold += 1
            return
        self.harms.append(Harm(finding, finding.from_seq if after_seq is None else after_seq))

    def name(self, seq: int, time_ns: int, name: str) -> None:
        """A bookmark or base point."""
        self._named.append(Place(seq, time_ns, name))

    def reach(self, seq: int, time_ns: int) -> None:
        """History goes on to here at least, though its records cannot be followed."""
        self.last_seq, self.last_time_ns = max(self.last_seq, seq), max(self.last_time_ns, time_ns)

    def feed(self, records: npt.NDArray[np.void]) -> None:
        """Whole records that follow, of any kind."""
        if not len(records):
            return
        self.last_seq, self.last_time_ns = int(records["seq"][-1]), int(records["time"][-1])
        changes = records[(records["kind"] >= CHANGES[0]) & (records["kind"] <= CHANGES[-1])]
        if not len(changes):
            return
        self._feed_points(changes)
        for harm in self.harms:
            harm.feed(changes)

    def _feed_points(self, changes: npt.NDArray[np.void]) -> None:
        seconds = changes["time"] // np.uint64(SECOND_NS)
        ends = np.append(np.flatnonzero(np.diff(seconds)), len(changes) - 1)
        seqs, times = changes["seq"][ends].tolist(), changes["time"][ends].tolist()
        if self._times and self._times[-1] // SECOND_NS == int(seconds[0]):
            # The second goes on: its point is its last record.
            self._seqs.pop()
            self._times.pop()
        self._seqs.extend(seqs)
        self._times.extend(times)

    def damage(self) -> list[Damage]:
        """Every finding with its effect, in order of time."""
        ends = [self._end(harm) for harm in self.harms]
        hurt = _union([(h.finding.from_seq, to + 1) for h, (to, _) in zip(self.harms, ends, strict=True)])
        found = [self._damage(harm.finding, *end, hurt) for harm, end in zip(self.harms, ends, strict=True)]
        return sorted(found, key=lambda damage: (damage.finding.from_seq, damage.to_seq))

    def _end(self, harm: Harm) -> tuple[int, int]:
        """The last (seq, time) that shows the harm."""
        found = harm.finding
        if found.to_seq is not None:
            return found.to_seq, found.to_time_ns
        if found.extents == ():
            return found.from_seq, found.from_time_ns
        if found.extents is not None and harm.healed is not None:
            return harm.healed[0] - 1, harm.healed[1]
        return max(self.last_seq, found.from_seq), max(self.last_time_ns, found.from_time_ns)

    def _damage(self, found: Finding, to_seq: int, to_time_ns: int, hurt: list[tuple[int, int]]) -> Damage:
        named = found.named or tuple(
            place.name or "" for place in self._named if found.from_seq <= place.seq <= to_seq
        )
        low, high = bisect_left(self._seqs, found.from_seq), bisect_right(self._seqs, to_seq)
        return Damage(
            finding=found,
            to_seq=to_seq,
            to_time_ns=to_time_ns,
            affected=len(named) + (0 if found.named else high - low),
            named=named,
            before=self._intact(found.from_seq, hurt, -1),
            after=self._intact(to_seq, hurt, 1),
        )

    def _intact(self, seq: int, hurt: list[tuple[int, int]], step: int) -> Place | None:
        """The nearest point before (step -1) or after (1) `seq` that no damage touches."""
        index = bisect_left(self._seqs, seq) - 1 if step < 0 else bisect_right(self._seqs, seq)
        while 0 <= index < len(self._seqs) and _inside(self._seqs[index], hurt):
            index += step
        places = [Place(self._seqs[index], self._times[index])] if 0 <= index < len(self._seqs) else []
        places += [
            place for place in self._named if (place.seq - seq) * step > 0 and not _inside(place.seq, hurt)
        ]
        return min(places, key=lambda place: abs(place.seq - seq), default=None)


def _inside(seq: int, ranges: list[tuple[int, int]]) -> bool:
    number = bisect_right(ranges, seq, key=lambda pair: pair[0]) - 1
    return number >= 0 and seq < ranges[number][1]
