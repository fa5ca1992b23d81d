"""Random histories against the model: every remembered instant of every timeline reads bit-exact, whatever happened around it.

CDP_LONG=N makes N times as many histories.
"""

import os
import random
from collections import Counter
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cdpserver import limits
from cdpserver.errors import CdpError
from cdpserver.journal import segment
from cdpserver.names import At, Latest, Mark, Seq
from cdpserver.view import delta, extent, history, live, tail, view
from tests.core import INDEXER, PIECE, SECOND_NS, Line, World, check_log, check_view, replay_at, scratch
from tests.model import BLOCK, LogRecord, read_log, seconds

LONG = int(os.environ.get("CDP_LONG", "1"))

SHRINK = os.environ.get("CDP_SHRINK", "1") == "1"

SIZES = (9 * 512, 64 << 10, (1 << 20) + 512, (9 << 20) + 1536, (3 << 30) + 512)
"""Below, at and above the levels of the index's pieces; most don't end at a block."""

UNITS = (1, 512, BLOCK, 16 * BLOCK)
LENGTHS = (1, 511, 512, 1536, 4096, 8192, 12_800, 65_536, 69_632, 300_000, 1 << 20)
MANY = 1 << 16

LONG_TAIL = 1000
"""Records after which a mirror is not sent again before they are indexed."""

SMALL_LIMITS = (
    (limits, "SEGMENT_BYTES", (2 << 20, 256 << 10)),
    (limits, "INTERVAL_SEGMENTS", (3, 4096)),
    (segment, "SEGMENT_RECORDS", (24, 96)),
    (live, "TAIL_REBUILD", (6, 40)),
    (view, "STATUS_WINDOW", (1 << 20,)),
    (view, "KEPT_REFS", (2,)),
    (extent, "OPEN_FILES", (3,)),
    (tail, "FEW", (4,)),
    (delta, "COMPARE_STEP", (128 << 10,)),
)
"""Limits so small that what happens once an hour happens every few requests."""

extents = st.tuples(st.integers(0, 4), st.integers(-8, 24), st.sampled_from(UNITS), st.sampled_from(LENGTHS))
which = st.integers(0, 7)
seeds = st.integers(0, MANY)
PATHS: Counter[str] = Counter()


class Histories(RuleBasedStateMachine):
    """One state directory, a few timelines, and everything that can befall them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        self.world = World(self.stack.enter_context(scratch()))
        self.opened: list[tuple[Line, view.View, int]] = []

    @initialize(size=st.sampled_from(SIZES), small=seeds, image=st.booleans())
    def begin(self, size: int, small: int, image: bool) -> None:
        dice = random.Random(small)
        for module, name, values in SMALL_LIMITS:
            self.patch.setattr(module, name, dice.choice(values))
        if dice.random() < 0.5:
            self.patch.setattr(segment, "WINDOW_BYTES", BLOCK)
            self.patch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
        if image and size < 16 << 20:
            self.world.add(size, image=dice.randbytes(min(size, 70_000) // 512 * 512))
        else:
            self.world.add(size)

    def teardown(self) -> None:
        try:
            if self.world.lines:
                self._at_the_end()
        finally:
            self._close_views()
            self.world.close()
            PATHS.update(self.world.paths)
            self.stack.close()

    def _at_the_end(self) -> None:
        """Parents, forks, old instants: all as they were, by index and by tail."""
        for line in self.world.lines:
            if line.disk.journal is None:
                continue
            dice = random.Random(len(line.model.instants))
            for _ in range(2):
                for seq in dice.sample(line.model.instants, min(6, len(line.model.instants))):
                    line.check(seq)
                INDEXER.call("drain", line.directory, self.world.boot)
            check_log(line)

    # -- what clients do

    def _line(self, number: int) -> Line:
        return self.world.lines[number % len(self.world.lines)]

    def _extent(self, line: Line, where: tuple[int, int, int, int]) -> tuple[int, int]:
        area, at, unit, length = where
        size = line.model.size
        anchors = [anchor for anchor in (0, 64 << 10, 4 << 20, 1 << 30) if anchor < size] + [size]
        offset = min(max(0, anchors[area % len(anchors)] // unit * unit + at * unit), size - 1)
        return offset, min(length, size - offset)

    @rule(number=which, client=st.integers(0, 1), where=extents, fill=st.integers(0, 3), seed=seeds)
    def write(self, number: int, client: int, where: tuple[int, int, int, int], fill: int, seed: int) -> None:
        line = self._line(number)
        offset, length = self._extent(line, where)
        data = random.Random(seed).randbytes(length) if fill > 1 else bytes([fill]) * length
        line.write(offset, data, client)

    @rule(number=which, where=extents, seed=seeds)
    def write_again(self, number: int, where: tuple[int, int, int, int], seed: int) -> None:
        """What is there already, or was at some other instant."""
        line = self._line(number)
        offset, length = self._extent(line, where)
        instants = line.model.instants or [0]
        line.write(offset, line.model.read(instants[seed % len(instants)], offset, length))

    @rule(number=which, where=extents, far=st.booleans(), trim=st.booleans(), client=st.integers(0, 1))
    def zero(self, number: int, where: tuple[int, int, int, int], far: bool, trim: bool, client: int) -> None:
        line = self._line(number)
        offset, length = self._extent(line, where)
        line.zero(offset, line.model.size - offset if far else length, client, trim=trim)

    @rule(
        number=which,
        pre_zero=st.booleans(),
        step=st.sampled_from((PIECE, 64 << 10)),
        seed=seeds,
        end=st.integers(0, 2),
    )
    def mirror_again(self, number: int, pre_zero: bool, step: int, seed: int, end: int) -> None:
        """A new connection sends the whole disk once more, hardly changed; perhaps it doesn't get to the end."""
        line, dice = self._line(number), random.Random(seed)
        line.disconnect()
        if line.last_seq > LONG_TAIL:
            # A resync of a long tail folds it for every old instant that it meets: true, and slow beyond use here.
            INDEXER.call("drain", line.directory, self.world.boot)
        now = line.model.latest if line.model.instants else 0
        ranges = [
            (at // step * step, min(at // step * step + step, line.model.size))
            for start, stop in line.model.touched()
            for at in range(start // step * step, stop, step)
        ]
        chunks = [(at, bytearray(line.model.read(now, at, stop - at))) for at, stop in dict.fromkeys(ranges)]
        if pre_zero:
            for at in range(0, line.model.size, 1 << 30):
                line.zero(at, min(1 << 30, line.model.size - at))
        for at, data in chunks[: len(chunks) if end else len(chunks) // 2]:
            if dice.random() < 0.2:
                data[dice.randrange(len(data))] ^= 0xFF
            line.write(at, bytes(data))
        if end == 2 and not line.timeline.is_fork:
            line.synced(write_blocking=dice.random() < 0.8)

    @rule(number=which, more=st.sampled_from((512, BLOCK - 512, BLOCK, 70_144, 1 << 30)))
    def grow(self, number: int, more: int) -> None:
        line = self._line(number)
        line.grow(line.model.size + more)

    @rule(number=which)
    def flush(self, number: int) -> None:
        line = self._line(number)
        line.connection().flush()
        if line.disk.journal is not None:
            assert line.disk.journal.durable_seq >= line.disk.journal.change_seq
            line._note()

    @rule(number=which, client=st.integers(0, 1))
    def disconnect(self, number: int, client: int) -> None:
        self._line(number).disconnect(client)

    # -- what operators and time do

    @rule(number=which, write_blocking=st.booleans())
    def synced(self, number: int, write_blocking: bool) -> None:
        line = self._line(number)
        if not line.timeline.is_fork:
            line.synced(write_blocking=write_blocking)

    @rule(number=which)
    def cut(self, number: int) -> None:
        line = self._line(number)
        if line.disk.journal is not None:
            line.cut()

    @rule(number=which)
    def mark(self, number: int) -> None:
        line = self._line(number)
        if line.disk.journal is not None:
            line.mark(f"m{len(line.marks)}")

    @precondition(lambda self: len(self.world.lines) < 4)
    @rule(number=which, back=which)
    def fork(self, number: int, back: int) -> None:
        line = self._line(number)
        if line.disk.journal is not None:
            instants = line.model.instants
            self.world.fork(line, instants[max(0, len(instants) - 1 - back)])

    @rule(ns=st.sampled_from((0, 1, 1000, SECOND_NS // 3, SECOND_NS, 5 * SECOND_NS, -SECOND_NS)))
    def time_passes(self, ns: int) -> None:
        """Also back: a clock that does that is not believed."""
        self.world.now_ns += ns

    # -- what happens to processes

    @rule(
        number=which,
        op=st.sampled_from(("step", "step", "step", "drain", "rebuild")),
        batch=st.sampled_from((0, 3, 20)),
    )
    def index(self, number: int, op: str, batch: int) -> None:
        INDEXER.call(op, self._line(number).directory, self.world.boot, batch=batch)

    @rule(dice=st.integers(0, 9))
    def kill_the_indexer(self, dice: int) -> None:
        """Seldom: it takes a while to start."""
        if dice == 9:
            INDEXER.kill()

    @rule(number=which, clean=st.booleans(), seed=seeds)
    def restart_the_target(self, number: int, clean: bool, seed: int) -> None:
        line = self._line(number)
        line.close(clean=clean, junk=random.Random(seed))
        line.open()
        if line.disk.journal is not None:
            assert line.disk.journal.recovered is None

    @rule(clean=st.booleans())
    def reboot(self, clean: bool) -> None:
        self._close_views()
        before = [line.last_seq for line in self.world.lines]
        self.world.reboot(clean=clean)
        for line, last in zip(self.world.lines, before, strict=True):
            if line.disk.journal is not None and not clean:
                assert line.last_seq >= last + limits.SEQ_JUMP - 1
                assert line.disk.journal.recovered is not None
            if line.disk.first_copy is not None:
                # Nothing of a first copy is believed after another boot.
                assert line.disk.first_copy.restarted == bool(line.model.changes)
                line.model.changes.clear()

    # -- what must hold at any time

    @precondition(lambda self: any(line.model.instants for line in self.world.lines))
    @rule(number=which, back=seeds)
    def open_a_point(self, number: int, back: int) -> None:
        line = self._line(number)
        instants = line.model.instants
        if instants:
            line.check(instants[-1 - back % len(instants)])

    @rule(number=which, back=seeds)
    def keep_a_point_open(self, number: int, back: int) -> None:
        """It stays exact while the journal goes on, is indexed, closed, indexed again."""
        line = self._line(number)
        instants = line.model.instants
        if instants and len(self.opened) < 4:
            seq = instants[-1 - back % len(instants)]
            opened = history.History(self.world.state.path, line.timeline, self.world.boot)
            self.opened.append((line, view.View(opened, seq), seq))
        for held_line, held, seq in self.opened:
            check_view(held, held_line.model, seq)

    def _close_views(self) -> None:
        for _, held, _ in self.opened:
            held.close()
            held.history.close()
        self.opened.clear()

    @rule(number=which, seed=seeds)
    def open_between(self, number: int, seed: int) -> None:
        """An instant inside a request: only the files know what it held."""
        line = self._line(number)
        if line.disk.journal is None:
            return
        seq = random.Random(seed).choice(read_log(line.directory)).seq
        with line.view(seq) as held:
            check_view(held, replay_at(line, seq), seq)

    @rule(number=which, where=extents, client=st.integers(0, 1))
    def read(self, number: int, where: tuple[int, int, int, int], client: int) -> None:
        line = self._line(number)
        line.check_live(*self._extent(line, where), client)

    @rule(number=which, seed=seeds)
    def compare_two_instants(self, number: int, seed: int) -> None:
        line, dice = self._line(number), random.Random(seed)
        if not line.model.instants:
            return
        seq = dice.choice(line.model.instants)
        old, old_seq = line, dice.choice([i for i in line.model.instants if i <= seq])
        while old.model.parent is not None and dice.random() < 0.5:
            parent = next(p for p in self.world.lines if p.model is old.model.parent)
            old_seq = dice.choice([i for i in parent.model.instants if i <= old.model.parent_seq])
            old = parent
        line.check_delta(seq, old, old_seq)

    @rule(number=which, seed=seeds)
    def list_points(self, number: int, seed: int) -> None:
        line, dice = self._line(number), random.Random(seed)
        if line.disk.journal is None:
            return
        records = read_log(line.directory)
        expected = [
            (s.last_seq, s.last_time_ns, s.records, s.payload_bytes, s.session, s.grade)
            for s in seconds(records)
        ]
        later = records[-1].time_ns + 2 * SECOND_NS
        with line.points() as points:
            found = points.points(now_ns=later, kind="rp")
            rows = [(p.seq, p.time_ns, p.records, p.bytes, p.session, p.grade.label) for p in found]
            assert rows == expected
            assert points.count(now_ns=later) == len(expected)
            few = dice.randrange(1, 5)
            assert points.points(now_ns=later, kind="rp", limit=few) == found[-few:]
            since, until = sorted(dice.choice(records).time_ns + dice.randrange(-2, 3) for _ in range(2))
            some = points.points(now_ns=later, since_ns=since, until_ns=until, kind="rp")
            assert some == [p for p in found if since <= p.time_ns <= until]
            marks = points.points(now_ns=later, kind="bookmark")
            assert [(p.name, p.seq) for p in marks] == list(line.marks.items())

    @rule(number=which, seed=seeds)
    def name_an_instant(self, number: int, seed: int) -> None:
        line, dice = self._line(number), random.Random(seed)
        if line.disk.journal is None:
            return
        records = read_log(line.directory)
        later = records[-1].time_ns + 2 * SECOND_NS
        with line.points() as points:
            assert points.resolve(Latest(), now_ns=later).seq == records[-1].seq
            seq = dice.choice(records).seq
            assert points.resolve(Seq(seq), now_ns=later).seq == seq
            for name, marked in line.marks.items():
                assert points.resolve(Mark(name), now_ns=later).seq == marked
            time_ns = dice.choice(records).time_ns + dice.choice((-1, 0, 1))
            wanted = instant(records, time_ns)
            try:
                found = points.resolve(At(time_ns), now_ns=later).seq
            except CdpError:
                found = None
            assert found == wanted

    @invariant()
    def nothing_is_broken(self) -> None:
        assert not any(line.disk.broken for line in self.world.lines)


def instant(records: list[LogRecord], time_ns: int) -> int | None:
    """Seq of the newest record at or before a time; None before the first one and inside a gap."""
    older = [r for r in records if r.time_ns <= time_ns]
    if not older:
        return None
    following = records[len(older)] if len(older) < len(records) else None
    in_gap = following is not None and following.message.get("type") == "gap" and older[-1].time_ns < time_ns
    return None if in_gap else older[-1].seq


@pytest.mark.timeout(900)  # a minute on a machine of its own
def test_histories_against_the_model() -> None:
    PATHS.clear()
    chosen = settings(
        max_examples=350 * LONG,
        stateful_step_count=50,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if SHRINK else [])],
        suppress_health_check=list(HealthCheck),
        derandomize="CDP_LONG" not in os.environ,
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(Histories, settings=chosen)
    # Every way to find a block must have been gone.
    for path in ("tail", "open", "open+tail", "closed", "tail, more intervals unindexed"):
        assert PATHS[path], f"no view was read by {path}: {dict(PATHS)}"
