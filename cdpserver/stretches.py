"""Stretches: when an instant of a timeline can be opened, and with which grade.

history:    |--- interval 1 ---|--- interval 2 ---|   (3 was dropped)   |--- interval 4 ---
stretches:  [unordered)[crash       )   gap   [unordered)[crash)        [crash ...
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any

from cdpserver.journal import control
from cdpserver.journal.control import Grade
from cdpserver.journal.log import Position
from cdpserver.journal.record import CHANGES
from cdpserver.nodes import nodes
from cdpserver.points import Timeline

FOLLOWING = 100
"""Records that are looked at after an instant: what changes nothing is written a few times before a gap, not more."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Every instant in [start_ns, end_ns) can be opened, and has this grade, which rests on `evidence`."""

    start_ns: int
    end_ns: int
    grade: Grade
    evidence: dict[str, Any] = field(default_factory=dict, compare=False)


def stretches(timeline: Timeline, *, now_ns: int) -> list[Stretch]:
    """The stretches of a timeline up to now, in order; they do not overlap."""
    return timeline.journal.settled(partial(_stretches, timeline, now_ns))


def _stretches(timeline: Timeline, now_ns: int) -> list[Stretch]:
    journal = timeline.journal
    if journal.empty:
        return []
    journal.newest()
    found: list[Stretch] = []
    gaps: list[tuple[int, int]] = []
    for interval, following in zip_longest(journal.intervals, journal.intervals[1:]):
        found += _of_interval(timeline, interval, following, now_ns, gaps)
    for start_ns, end_ns in gaps:
        found = [part for stretch in found for part in _without(stretch, start_ns, end_ns)]
    for node in nodes(timeline.history.directory):
        # Its file is there, whether the journal around it is or not; in a gap it holds what came in late.
        if grade_at(found, node.time_ns) is None:
            missed = any(start_ns <= node.time_ns < end_ns for start_ns, end_ns in gaps)
            grade = Grade.UNORDERED if missed else node.grade
            evidence = control.show_evidence(node.session, node.evidence, node.observed)
            found.append(Stretch(node.time_ns, node.time_ns + 1, grade, evidence))
            found.sort(key=lambda stretch: stretch.start_ns)
    return found


def grade_at(found: list[Stretch], time_ns: int) -> Grade | None:
    """The grade of an instant; None if it cannot be opened."""
    held = stretch_at(found, time_ns)
    return None if held is None else held.grade


def stretch_at(found: list[Stretch], time_ns: int) -> Stretch | None:
    """The stretch that an instant is in; None if it cannot be opened."""
    number = bisect_right(found, time_ns, key=lambda stretch: stretch.start_ns) - 1
    return found[number] if number >= 0 and time_ns < found[number].end_ns else None


def _of_interval(
    timeline: Timeline, interval: int, following: int | None, now_ns: int, gaps: list[tuple[int, int]]
) -> Iterator[Stretch]:
    journal = timeline.journal
    first = journal.first_reader(interval)
    # Before its first record it shows the end of the interval before, if that is there.
    begins_late = interval - 1 not in journal.intervals and first.count
    at = first.time_of(0) if begins_late else first.header.first_time_ns
    if following is None:
        end_ns = now_ns + 1
    elif following == interval + 1:
        end_ns = journal.first_reader(following).header.first_time_ns
    else:
        last = journal.last_reader(interval)
        end_ns = journal.at_seq(last.last_seq).time_ns + 1
    state = first.header.carry
    graded: list[Stretch] = []
    opened_ns = at if state.gap_open else 0
    for seq, time_ns, message in timeline.controls(interval):
        before, state = state, control.fold(state, message, seq=seq, time_ns=time_ns)
        if message["type"] == "gap":
            gaps.append((journal.at_seq(seq - 1).time_ns + 1, time_ns))
        elif message["type"] == "missed":
            gaps.append((message["from_time_ns"] + 1, message["until_time_ns"] or time_ns))
        if state.gap_open and not before.gap_open:
            opened_ns = time_ns
        elif before.gap_open and not state.gap_open:
            gaps.append((opened_ns, time_ns))
        if control.shown(before) != control.shown(state) or before.grade != state.grade:
            graded.append(Stretch(at, time_ns, before.grade, control.shown(before)))
            at = time_ns
    if state.gap_open:
        gaps.append((opened_ns, end_ns))
    graded.append(Stretch(at, end_ns, state.grade, control.shown(state)))
    graded = [part for part in graded if part.start_ns < part.end_ns]
    if first.instants is None:
        yield from graded
        return
    for row in first.instants.rows:
        part = stretch_at(graded, int(row["time"]))
        if part is not None:
            yield replace(part, start_ns=int(row["time"]), end_ns=min(int(row["until"]), end_ns))


def _without(stretch: Stretch, start_ns: int, end_ns: int) -> Iterator[Stretch]:
    """What a gap leaves of a stretch."""
    if stretch.end_ns <= start_ns or end_ns <= stretch.start_ns:
        yield stretch
        return
    if stretch.start_ns < start_ns:
        yield replace(stretch, end_ns=start_ns)
    if end_ns < stretch.end_ns:
        yield replace(stretch, start_ns=end_ns)


def leads_to_gap(points: Timeline, position: Position) -> bool:
    """Is this the disk's last content before a gap, at a boot or one that a controller knows of?"""
    return points.journal.settled(partial(_leads_to_gap, points, position))


def _leads_to_gap(points: Timeline, position: Position) -> bool:
    near = {position.interval, position.interval + 1}.intersection(points.journal.intervals)
    starts = [
        message["from_time_ns"] if message["type"] == "missed" else said_ns
        for interval in near
        for _, said_ns, message in points.controls(interval)
        if message["type"] in ("gap", "missed")
    ]
    until_ns = _changes_after(points, position)
    return any(position.time_ns <= start < until_ns for start in starts)


def _changes_after(points: Timeline, position: Position) -> int:
    """The time of the next change; far away if none comes soon."""
    for run in points.journal.runs(position.seq, 1 << 63, limit=FOLLOWING):
        for record in run.records:
            if record["kind"] in CHANGES:
                return int(record["time"])
    return 1 << 63
