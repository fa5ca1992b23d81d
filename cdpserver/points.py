"""Points: names for places in a journal. Recovery points, bookmarks and base points of a timeline, and WHEN to seq.

A recovery point is the last record of a second in which data changed. Nothing is stored for it beyond the index's row of
that second; what is not indexed yet is counted from the header log.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, wraps
from typing import Any, TypeVar, cast

from cdpserver.cuts import find_cut
from cdpserver.errors import NotFoundError, RefusedError, UsageError
from cdpserver.index.build import SECOND_NS, merge_rows, point_rows, split_at_controls
from cdpserver.index.store import PointRow, Snapshot, find_index, open_index, release
from cdpserver.journal import control
from cdpserver.journal.control import Grade, State
from cdpserver.journal.instants import Instant, Instants
from cdpserver.journal.log import FIRST_INTERVAL, Position, interval_path
from cdpserver.journal.observed import Observed
from cdpserver.journal.record import Kind
from cdpserver.names import Ago, At, BasePoint, Latest, Mark, Seq, When, format_time, format_when
from cdpserver.nodes import Node, nodes
from cdpserver.point import KINDS, Point, recovery_point, slot_seconds
from cdpserver.view.history import History

Method = TypeVar("Method", bound=Callable[..., Any])


def _settled(look: Method) -> Method:
    """A look at history that may be dropped or thinned meanwhile."""

    @wraps(look)
    def call(self: "Timeline", *args: Any, **named: Any) -> Any:
        return self.journal.settled(partial(look, self, *args, **named))

    return cast(Method, call)


def _place(node: Node) -> Position:
    return Position(node.interval, 0, node.seq, node.time_ns)


def _instant(near: Position, instant: Instant) -> Position:
    """An instant of the thinned interval that `near` is in."""
    return Position(near.interval, near.segment, instant.seq, instant.time_ns)


def _at(seen: list[tuple[int, Observed]], seq: int) -> Observed:
    """What counted at `seq`."""
    return seen[bisect_right(seen, seq, key=lambda pair: pair[0]) - 1][1]


class Timeline:
    """Points of one timeline, read from its history."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.journal = history.journal
        if self.journal.empty:
            self.journal.refresh()

    # -- rows and controls by interval -----------------------------------------------------------------------

    def _snapshots(self, interval: int) -> Iterator[Snapshot | None]:
        path = find_index(interval_path(self.history.directory, interval), self.history.boot_id)
        file = open_index(path) if path is not None else None
        if file is None:
            yield None
            return
        snapshot = file.snapshot()
        try:
            yield snapshot
        finally:
            snapshot.close()
            release(file)

    def _interval(
        self, interval: int, first_second: int, end_second: int
    ) -> tuple[list[PointRow], list[tuple[int, int, dict[str, Any]]]]:
        """(rows of the seconds, control records) of one interval, whether indexed or not."""
        rows: list[PointRow] = []
        controls: list[tuple[int, int, dict[str, Any]]] = []
        reader = self.journal.first_reader(interval)
        state, done = reader.header.carry, reader.first_seq - 1
        for snapshot in self._snapshots(interval):
            if snapshot is not None and snapshot.indexed:
                rows = list(snapshot.points(first_second, end_second))
                controls = list(snapshot.controls())
                state, done = snapshot.state() or state, snapshot.indexed
        for row, message in self._tail(interval, done, state):
            if row is not None and first_second <= row.second < end_second:
                if rows and rows[-1].second == row.second:
                    rows[-1] = merge_rows(rows[-1], row)
                else:
                    rows.append(row)
            if message is not None:
                controls.append(message)
        return rows, controls

    @_settled
    def controls(self, interval: int) -> list[tuple[int, int, dict[str, Any]]]:
        """(seq, time, message) of every control record of an interval, ascending."""
        return self._interval(interval, 0, 0)[1]

    def _tail(
        self, interval: int, done: int, state: State
    ) -> Iterator[tuple[PointRow | None, tuple[int, int, dict[str, Any]] | None]]:
        last = self.journal.last_reader(interval).last_seq
        for run in self.journal.runs(done, last):
            if run.interval != interval:
                continue
            for part in split_at_controls(run):
                for row in point_rows(part, state):
                    yield row, None
                record = part.records[-1]
                if record["kind"] == Kind.CONTROL:
                    seq, time_ns = int(record["seq"]), int(record["time"])
                    message = part.reader.control(record)
                    state = control.fold(state, message, seq=seq, time_ns=time_ns)
                    yield None, (seq, time_ns, message)

    def _first_time(self, interval: int) -> int:
        return self.journal.first_reader(interval).header.first_time_ns

    # -- listing ---------------------------------------------------------------------------------------------

    @_settled
    def points(
        self,
        *,
        now_ns: int,
        since_ns: int = 0,
        until_ns: int | None = None,
        kind: str | None = None,
        limit: int | None = None,
        every_ns: int = SECOND_NS,
    ) -> list[Point]:
        """Points in [since, until], oldest first; with `limit` the newest of them.

        Recovery points come one for each whole `every_ns` that is over, as many seconds as that is rounded up; none is in a
        gap, where what has a name or a file of its own is unordered.
        """
        if self.journal.empty:
            return []
        self.journal.newest()
        until = now_ns if until_ns is None else until_ns
        slot_s = slot_seconds(every_ns)
        first, last = since_ns // SECOND_NS // slot_s, until // SECOND_NS // slot_s
        span = (first * slot_s, min(last + 1, now_ns // SECOND_NS // slot_s) * slot_s)
        rows: dict[int, PointRow] = {}
        named: list[Point] = []
        seen: list[tuple[int, Observed]] = []
        base_points = [p for p in self._base_points() if since_ns <= p.time_ns <= until]
        missed: list[tuple[int, int]] = []
        wanted: list[Point] = []
        for interval in reversed(self.journal.intervals):
            started = self._first_time(interval) // SECOND_NS
            first_seq = self.journal.first_reader(interval).first_seq
            if started <= until // SECOND_NS:
                found, controls = self._interval(interval, *span)
                # Seconds, the newest first: those of one slot are one point, also from several intervals.
                for row in reversed(found):
                    slot = row.second // slot_s
                    rows[slot] = merge_rows(row, rows[slot]) if slot in rows else row
                missed += control.missed_spans(controls) + ([] if seen else self._missed(interval + 1))
                seen = self._observed(interval, controls) + seen
                named += [p for p in self._named(interval, controls) if since_ns <= p.time_ns <= until]
            held_rows = [row for row in rows.values() if since_ns <= row.last_time_ns <= until]
            if missed:
                held_rows = [row for row in held_rows if not control.is_inside(missed, row.last_time_ns)]
            points = named + [recovery_point(row, _at(seen, row.last_seq)) for row in held_rows]
            wanted = [p for p in points if kind is None or p.kind == kind]
            held = [p for p in base_points if p.seq >= first_seq] if kind in (None, "bp") else []
            enough = started < span[0] or (limit is not None and len(wanted) + len(held) >= limit)
            if enough and started // slot_s < min(rows, default=started // slot_s + 1):
                break
        wanted += base_points if kind in (None, "bp") else []
        for number, point in enumerate(wanted if missed else ()):
            if control.is_inside(missed, point.time_ns):
                wanted[number] = replace(point, grade=Grade.UNORDERED)
        wanted.sort(key=lambda p: (p.seq, KINDS.index(p.kind)))
        return wanted if limit is None else wanted[max(0, len(wanted) - limit) :]

    def _observed(
        self, interval: int, controls: list[tuple[int, int, dict[str, Any]]]
    ) -> list[tuple[int, Observed]]:
        """(seq, what *synced* rests on from there), ascending, the interval's first seq first."""
        header = self.journal.first_reader(interval).header
        state = header.carry
        found = [(header.first_seq, state.observed)]
        for seq, time_ns, message in controls:
            state = control.fold(state, message, seq=seq, time_ns=time_ns)
            if state.observed != found[-1][1]:
                found.append((seq, state.observed))
        return found

    def _named(self, interval: int, controls: list[tuple[int, int, dict[str, Any]]]) -> Iterator[Point]:
        """The bookmarks of an interval."""
        state = self.journal.first_reader(interval).header.carry
        for seq, time_ns, message in controls:
            state = control.fold(state, message, seq=seq, time_ns=time_ns)
            if message["type"] == "mark":
                at, at_ns = control.marked(message, seq=seq, time_ns=time_ns)
                grade = control.marked_grade(message, state)
                name = message["name"]
                rests_on = state.session, state.evidence, state.observed
                yield Point("bookmark", at_ns, at, 0, 0, grade, name, *rests_on)

    def _base_points(self) -> list[Point]:
        """Those whose files are there, whether the history around them is or not."""
        return [
            Point("bp", n.time_ns, n.seq, 0, 0, n.grade, f"bp:{n.number}", n.session, n.evidence, n.observed)
            for n in nodes(self.history.directory)
        ]

    @_settled
    def count(self, *, now_ns: int, every_ns: int = SECOND_NS) -> int:
        """Recovery points held, as `points` lists them."""
        if self.journal.empty:
            return 0
        self.journal.newest()
        total, before, slot_s = 0, -1, slot_seconds(every_ns)
        for interval in self.journal.intervals:
            held, first, last = self._count(interval, now_ns // SECOND_NS // slot_s, slot_s)
            if held:
                total += held - (first == before)
                before = last
        return total

    def _count(self, interval: int, end_slot: int, slot_s: int) -> tuple[int, int, int]:
        """(slots, the first, the last) of one interval; a whole closed one costs no look at its rows."""
        for snapshot in self._snapshots(interval):
            whole = snapshot is not None and snapshot.indexed >= self.journal.last_reader(interval).last_seq
            if whole and interval != self.journal.intervals[-1]:
                assert snapshot is not None
                return snapshot.point_count() if slot_s == 1 else snapshot.slot_count(slot_s, end_slot)
        rows = self._interval(interval, 0, end_slot * slot_s)[0]
        slots = {row.second // slot_s for row in rows}
        return (len(slots), min(slots), max(slots)) if slots else (0, 0, 0)

    # -- WHEN ------------------------------------------------------------------------------------------------

    @_settled
    def bookmark(self, name: str) -> Position | None:
        """Where a bookmark is; newest interval first."""
        for interval in reversed(self.journal.intervals):
            for snapshot in self._snapshots(interval):
                found = snapshot.named(f"mark/{name}") if snapshot is not None else None
                done = snapshot.indexed if snapshot is not None else 0
            if found is None:
                found = self._bookmark_in_tail(interval, done, name)
            if found is not None:
                seq, time_ns = control.marked(found[2], seq=found[0], time_ns=found[1])
                return Position(interval, 0, seq, time_ns)
        return None

    def _bookmark_in_tail(
        self, interval: int, done: int, name: str
    ) -> tuple[int, int, dict[str, Any]] | None:
        reader = self.journal.first_reader(interval)
        for _, placed in self._tail(interval, max(done, reader.first_seq - 1), reader.header.carry):
            if placed is not None and (placed[2]["type"], placed[2].get("name")) == ("mark", name):
                return placed
        return None

    @_settled
    def resolve(self, when: When, *, now_ns: int) -> Position:
        """The place that WHEN names. UsageError or RefusedError with the nearest points on both sides."""
        name = self.history.timeline.full_name
        if self.journal.empty:
            raise RefusedError(
                f"{name} has no history yet",
                hint=f"let the first copy end, then: cdp disk synced {name}",
            )
        match when:
            case Latest():
                return self.journal.last()
            case Ago(delta_ns):
                return self._at_time(now_ns - delta_ns, now_ns, when)
            case At(time_ns):
                return self._at_time(time_ns, now_ns, when)
            case Seq(seq):
                return self._at_exact_seq(seq)
            case BasePoint(number):
                cut = find_cut(self.journal, number) or self._node(number)
                if cut is None:
                    raise NotFoundError(f"{name} has no base point {number}", hint=f"cdp bp list {name}")
                return Position(cut.interval, 0, cut.seq, cut.time_ns)
            case Mark(mark):
                found = self.bookmark(mark)
                if found is None:
                    hint = f"cdp point list {name} --kind bookmark"
                    raise NotFoundError(f"{name} has no bookmark {mark!r}", hint=hint)
                return found

    def _at_exact_seq(self, seq: int) -> Position:
        last = self.journal.last()
        if seq > last.seq:
            raise self._nowhere(Seq(seq), "after the newest record", last, None)
        position = self.journal.at_seq(seq) if seq >= self.journal.first().seq else None
        thinned = self.journal.thinned_at_seq(seq) if position is not None else None
        if position is not None and position.seq == seq and (thinned is None or seq in thinned):
            return position
        kept = next((_place(n) for n in nodes(self.history.directory) if n.seq == seq), None)
        if kept is not None:
            return kept
        if position is None or self.journal.ends_with(position):
            raise self._dropped(Seq(seq), self._around(position), lambda place: place.seq <= seq)
        if thinned is not None and (following := thinned.after_seq(seq)) is not None:
            sides = [self._newest_at(seq), _instant(position, following)]
            raise self._dropped(Seq(seq), sides, lambda place: place.seq <= seq)
        raise self._nowhere(Seq(seq), "inside a gap", position, self._after(position))

    def _at_time(self, time_ns: int, now_ns: int, when: When) -> Position:
        if time_ns > now_ns:
            raise self._nowhere(when, "after now", self.journal.last(), None)
        position = self.journal.at_time(time_ns)
        thinned = self.journal.thinned_at_time(time_ns) if position is not None else None
        if position is not None and thinned is not None:
            position = self._at_thinned(thinned, position, time_ns, when)
        if position and self._is_missed(position, time_ns, self.journal.state_at(position.seq)):
            raise self._nowhere(when, "inside a gap", position, self._after(position))
        if position is not None and position.time_ns == time_ns:
            return position
        if position is None or self.journal.ends_with(position):
            kept = next((_place(n) for n in nodes(self.history.directory) if n.time_ns == time_ns), None)
            if kept is not None:
                return kept
            raise self._dropped(when, self._around(position), lambda place: place.time_ns <= time_ns)
        if self.ends_before_gap(position):
            raise self._nowhere(when, "inside a gap", position, self._after(position))
        return position

    def _at_thinned(self, thinned: Instants, newest: Position, time_ns: int, when: When) -> Position:
        """The instant of a thinned interval that is exact at a time; `newest` is the newest record that there is."""
        found = thinned.at_time(time_ns)
        if found is not None and time_ns < found.until_ns:
            return _instant(newest, found)
        before = _instant(newest, found) if found is not None else self._newest_at(newest.seq)
        following = thinned.after_seq(before.seq)
        sides = [before, *([_instant(newest, following)] if following is not None else [])]
        raise self._dropped(when, sides, lambda place: place.time_ns <= time_ns)

    def _newest_at(self, seq: int) -> Position:
        """The newest place at or before `seq`, which is in a thinned interval, that can be opened."""
        thinned = self.journal.thinned_at_seq(seq)
        found = thinned.at_seq(seq) if thinned is not None else None
        position = self.journal.at_seq(seq)
        # What comes before the first instant is the end of the interval before, which is always there.
        return _instant(position, found) if found is not None else position

    def _node(self, number: int) -> Node | None:
        return next((node for node in nodes(self.history.directory) if node.number == number), None)

    def _around(self, before: Position | None) -> list[Position]:
        """What there is around a stretch that was dropped; `before` is the last record ahead of it."""
        after = self._after(before) if before is not None else self.journal.first()
        if after is not None and (thinned := self.journal.thinned_at_seq(after.seq)) is not None:
            first = thinned.after_seq(after.seq - 1)
            after = _instant(after, first) if first is not None else None
        return [place for place in (before, after) if place is not None]

    def _dropped(
        self, when: When, around: list[Position], is_before: Callable[[Position], bool]
    ) -> UsageError:
        """The refusal of an instant that is gone; `around` are places of the journal that are not."""
        held = sorted([*around, *map(_place, nodes(self.history.directory))], key=lambda place: place.seq)
        older = [place for place in held if is_before(place)]
        newer = [place for place in held if not is_before(place)]
        why = (
            "not kept any more"
            if older or self.journal.intervals[0] > FIRST_INTERVAL
            else "before the history"
        )
        return self._nowhere(when, why, older[-1] if older else None, newer[0] if newer else None)

    def _after(self, position: Position) -> Position | None:
        for run in self.journal.runs(position.seq, 1 << 63, limit=1):
            record = run.records[0]
            return Position(run.interval, run.reader.segment, int(record["seq"]), int(record["time"]))
        return None

    @_settled
    def grade_at(self, position: Position) -> Grade:
        """What its content is worth. In a gap it is unordered: what came in late is of an instant before, and not whole."""
        state = self.journal.state_at(position.seq)
        return Grade.UNORDERED if self._is_missed(position, position.time_ns, state) else state.grade

    def _is_missed(self, position: Position, time_ns: int, state: State) -> bool:
        """Were writes of the guest missing then? `position` is the newest record at that time, `state` what held there."""
        near = (position.interval, position.interval + 1)  # it is said afterwards
        return state.gap_open or control.is_inside(self._missed(*near), time_ns)

    def _missed(self, *intervals: int) -> list[tuple[int, int]]:
        """When writes were missing, as those of these intervals say that are there."""
        held = [interval for interval in intervals if interval in self.journal.intervals]
        return [span for interval in held for span in control.missed_spans(self.controls(interval))]

    def ends_before_gap(self, position: Position) -> bool:
        """Did acknowledged writes that came right after this instant get lost?"""
        return (following := self._after(position)) is not None and self._is_gap(following)

    def _is_gap(self, position: Position) -> bool:
        reader = self.journal.reader(position.interval, position.segment)
        number = reader.count_to(position.seq) - 1
        record = reader.records(number, number + 1)[0]
        return bool(record["kind"] == Kind.CONTROL) and reader.control(record)["type"] == "gap"

    def _nowhere(self, when: When, why: str, before: Position | None, after: Position | None) -> UsageError:
        sides = []
        if before is not None:
            sides.append(f"the nearest before is {format_time(before.time_ns)} (seq:{before.seq})")
        if after is not None:
            sides.append(f"the nearest after is {format_time(after.time_ns)} (seq:{after.seq})")
        name = self.history.timeline.full_name
        return UsageError(f"{name}@{format_when(when)} is {why}", hint="; ".join(sides))
