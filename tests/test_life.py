"""The life of points at random: a state machine of everything that makes, holds and takes away history, against the model.

Writes, growth, base points, locks, forks, exports, policies and caps that change, passes of retention, merges, restarts of the
service (clean, or killed), reboots of the host, a clock that is wrong. After each step what must be there reads bit-exact, and
everything else reads bit-exact or is refused, never wrong; after a pass nothing stays that policy says to drop. CDP_LIVES=N lives
N lives; --hypothesis-seed does a failing one again. None is made shorter: that takes longer than to read it.
"""

import contextlib
import os
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from cdpserver import offtime
from cdpserver.catalog import Catalog, Entry
from cdpserver.chain import merge as chain
from cdpserver.chain.plan import VERBS
from cdpserver.check import check_timeline
from cdpserver.check.depth import Everything
from cdpserver.config import parse_config
from cdpserver.errors import RefusedError, UsageError
from cdpserver.leases import GRACE_NS, Lease
from cdpserver.locks import Lock
from cdpserver.nodes import nodes
from cdpserver.retention import prune
from cdpserver.retention.facts import gather
from cdpserver.retention.plan import fixed_bytes
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.core import INDEXER, SECOND_NS, Line, World, scratch
from tests.islands import publish
from tests.model import BLOCK

pytestmark = [pytest.mark.real, pytest.mark.e2e]

SIZE = 64 * BLOCK
MINUTE_NS = 60 * SECOND_NS
HOUR_NS = 60 * MINUTE_NS
YEAR_NS = 365 * 24 * HOUR_NS
STEPS = 50
FIRST = "[policy]\nbp_every = '20m'\nkeep_rp = '1h'\nkeep_bp = '3h'\n"
"""The policy that a life begins with: every instant of the last hour, and a base point for each of three."""

POLICY = parse_config(FIRST)
POLICIES = (
    POLICY,
    parse_config(FIRST.replace("'1h'", "'3h'")),
    parse_config(FIRST.replace("'3h'", "'24h 3d'")),
    # Every instant of an hour, then one every ten minutes.
    parse_config(FIRST.replace("'1h'", "'1h 3h/10m'")),
    # Less than an operator may say, since the disk is less than an operator's.
    replace(POLICY, policy_size_cap=1 << 20),
    replace(POLICY, policy_size_cap=3 << 20),
)


@dataclass
class Held:
    """An instant that must stay: for ever, until a time, or as long as an export of it is open."""

    line: Line
    seq: int
    until_ns: int | None = None
    export: "Export | None" = None


class Export:
    """An instant that a client has open, as the export's plugin opens it: the lease first, then a look."""

    def __init__(self, line: Line, seq: int) -> None:
        self.lease = Lease.take(line.directory, seq)
        try:
            self.history = History(line.world.state.path, line.timeline, line.world.boot)
            self.view = View(self.history, seq)
        except BaseException:
            self.lease.close()
            raise

    def close(self) -> None:
        """The client is gone, or the process is dead: to the files it is the same."""
        self.view.close()
        self.history.close()
        self.lease.close()


WEIGHTS = {
    "churn": 12,
    "cut": 12,
    "prune": 6,
    "merge": 5,
    "synced": 3,
    "restart": 3,
    "lock": 2,
    "fork": 1,
    "open": 3,
    "close_one": 2,
    "policy": 2,
    "wrong_clock": 2,
    "reboot": 1,
    "grow": 1,
}
"""What can happen in a life, and how often."""

SEEDS = st.integers(0, (1 << 32) - 1)
"""What a step chooses by."""


class Life:
    """A disk and its forks, what holds their points, and what should therefore be there."""

    def __init__(self, world: World, dice: random.Random) -> None:
        self.world = world
        self.dice = dice
        self.catalog = Catalog.open(world.state, writable=True)
        self.lines: list[tuple[Line, Entry]] = []
        self.held: list[Held] = []
        self.config = POLICY
        self.locks = 0
        self.passed_ns = 0
        self._named(world.add(SIZE, image=bytes(SIZE)))
        self.churn()
        self.lines[0][0].synced()

    def _named(self, line: Line) -> None:
        self.lines.append((line, self.catalog.add(line.timeline.full_name, line.timeline.id)))

    # -- what happens

    def churn(self) -> None:
        line, _ = self.dice.choice(self.lines)
        for _ in range(self.dice.randrange(1, 8)):
            blocks = line.model.size // BLOCK
            block = self.dice.randrange(blocks)
            if self.dice.random() < 0.2:
                line.zero(block * BLOCK, BLOCK * self.dice.randrange(1, blocks + 1 - block))
            else:
                line.write(block * BLOCK, self.dice.randbytes(BLOCK))
            self.world.now_ns += self.dice.randrange(4 * MINUTE_NS)

    def cut(self) -> None:
        line, _ = self.dice.choice(self.lines)
        line.cut()
        self.world.now_ns += MINUTE_NS
        publish(line, len(line.cuts) - 1)
        INDEXER.call("drain", line.directory, self.world.boot)

    def an_instant(self) -> tuple[Line, Entry, int] | None:
        """One that can be read now."""
        line, entry = self.dice.choice(self.lines)
        for _ in range(10):
            seq = self.dice.choice(line.model.instants)
            with contextlib.suppress(RefusedError):
                read(line, seq)
                return line, entry, seq
        return None

    def lock(self) -> None:
        if found := self.an_instant():
            line, entry, seq = found
            self.locks += 1
            until_ns = self.dice.choice((None, self.world.now_ns + self.dice.randrange(1, 9 * HOUR_NS)))
            immutable = until_ns is not None and self.dice.random() < 0.5
            made = Lock(f"lock-{self.locks}", entry.id, seq, 1, until_ns, immutable, "", self.world.now_ns)
            self.catalog.put_row("locks", made.row())
            self.held.append(Held(line, seq, until_ns))

    def fork(self) -> None:
        if len(self.lines) < 4 and (found := self.an_instant()):
            line, _, seq = found
            made = self.world.fork(line, seq)
            self._named(made)
            base = made.model.parent_seq
            self.held.append(Held(line, base))

    def open(self) -> None:
        if found := self.an_instant():
            line, _, seq = found
            self.held.append(Held(line, seq, export=Export(line, seq)))

    def exports(self) -> list[Held]:
        return [held for held in self.held if held.export is not None]

    def close_one(self) -> None:
        if exports := self.exports():
            self._close(self.dice.choice(exports))

    def _close(self, held: Held) -> None:
        """It holds for a grace from the first look at it, during which the client may come back."""
        assert held.export is not None
        held.export.close()
        self.held.remove(held)
        if self.dice.random() < 0.5:
            self.prune()
            self.world.now_ns += self.dice.randrange(GRACE_NS)
            self.prune()
            self.held.append(Held(held.line, held.seq, export=Export(held.line, held.seq)))

    def grow(self) -> None:
        line, _ = self.dice.choice(self.lines)
        line.grow(line.model.size + BLOCK * self.dice.randrange(1, 20))

    def synced(self) -> None:
        line, _ = self.dice.choice(self.lines)
        if not line.timeline.is_fork:
            line.synced()

    def policy(self) -> None:
        self.config = self.dice.choice(POLICIES)

    def restart(self) -> None:
        """The service, its workers and the indexer: stopped, or killed. Exports may be left serving, or die as well."""
        clean = self.dice.random() < 0.5
        for line, _ in self.lines:
            line.close(clean=clean)
        if clean:
            for line, _ in self.lines:
                INDEXER.call("close", line.directory, self.world.boot)
        else:
            INDEXER.kill()
        if self.dice.random() < 0.3:
            self._all_exports_die()
        for line, _ in self.lines:
            line.open()
        chain.finish_all(self.world.state)
        self.check()

    def _all_exports_die(self) -> None:
        for held in self.exports():
            assert held.export is not None
            held.export.close()
            self.held.remove(held)

    def reboot(self) -> None:
        self._all_exports_die()
        before_ns = self.world.now_ns
        self.world.now_ns += self.dice.choice((SECOND_NS, 30 * 24 * HOUR_NS))
        self.world.reboot(clean=self.dice.random() < 0.5)
        if offtime.note(self.world.state, before_ns, self.world.now_ns):
            for held in self.held:
                if held.until_ns is not None and held.until_ns > before_ns:
                    held.until_ns += self.world.now_ns - before_ns

    def wrong_clock(self) -> None:
        """Hours behind, a pass would drop no more; years ahead, no more but what a lock held until then."""
        state, catalog, now_ns = self.world.state, self.catalog, self.world.now_ns
        if any(lock.until_ns is not None for lock in self.held) or self.config.policy_size_cap:
            return
        self.prune()
        behind = prune.look(state, catalog, self.config, now_ns=now_ns - 5 * HOUR_NS, disk=None)[0]
        assert not behind.dropped
        self.world.now_ns += GRACE_NS + SECOND_NS
        self.prune()
        ahead = prune.look(state, catalog, self.config, now_ns=now_ns + 10 * YEAR_NS, disk=None)[0]
        assert not ahead.dropped

    def merge(self) -> None:
        line, entry = self.dice.choice(self.lines)
        numbers = [node.number for node in nodes(line.directory)]
        if len(numbers) > 2:
            number, base = self.dice.choice(numbers), self.dice.choice([None, *numbers])
            verb = self.dice.choice(VERBS)
            with contextlib.suppress(RefusedError, UsageError):
                chain.merge(
                    self.world.state,
                    self.catalog,
                    entry.id,
                    verb,
                    number,
                    base=base if verb != "delete" else None,
                )

    def prune(self) -> None:
        """A pass. Of what the policy keeps in full, and no pass before may have dropped, all can be opened; some is read."""
        capped = self.config.policy_size_cap is not None
        span_ns = 0 if capped else self.config.policy_keep_rp[0].span_ns
        state, catalog, now_ns = self.world.state, self.catalog, self.world.now_ns
        done = prune.prune(state, catalog, self.config, now_ns=now_ns, disk=None)
        assert not done.failed, done.failed
        for line, _ in () if capped else self.lines:
            since_ns = max(line.writer.last_time_ns - span_ns, self.passed_ns)
            seqs = [c.seq for c in line.model.changes if c.seq and c.time_ns >= since_ns]
            for seq in seqs:
                opens(line, seq)
            for seq in self.dice.sample(seqs, min(4, len(seqs))):
                assert read(line, seq) == expected(line, seq)
        self.passed_ns = max(self.passed_ns, now_ns - span_ns)
        again = prune.look(state, catalog, self.config, now_ns=now_ns, disk=None)[0]
        assert not again.dropped, "one pass is enough"
        for facts in again.disks:
            cap = facts.policy.size_cap
            assert cap is None or facts.bytes <= cap or facts.bytes == fixed_bytes(facts)

    def close(self) -> None:
        """The end."""
        self._all_exports_die()
        self.catalog.close()

    # -- what must hold

    def check(self) -> None:
        self.held = [h for h in self.held if h.until_ns is None or self.world.now_ns < h.until_ns]
        for held in self.held:
            content = expected(held.line, held.seq)
            assert read(held.line, held.seq) == content, (held.line.timeline.id, held.seq)
            if held.export is not None:
                view = held.export.view
                assert view.read(0, view.size) == content, (held.line.timeline.id, held.seq)
        for line, _ in self.lines:
            some = self.dice.sample(line.model.instants, min(8, len(line.model.instants)))
            for seq in [*some, line.last_seq]:
                with contextlib.suppress(RefusedError):
                    assert read(line, seq) == expected(line, seq), (line.timeline.id, seq)
            assert read(line, line.last_seq) == expected(line, line.last_seq)
            line.check_live(0, line.model.size)

    def check_the_whole(self) -> None:
        self.check()
        for _, entry in self.lines:
            assert gather(
                self.world.state, self.catalog, self.config, entry, now_ns=self.world.now_ns
            ).intervals
            report = check_timeline(
                self.world.state.path,
                entry.id,
                boot_id=self.world.boot,
                depth=Everything(content=True),
                chain=True,
            )
            assert report.whole, report


def read(line: Line, seq: int) -> bytes:
    """The whole disk at an instant. RefusedError where it is not kept."""
    history = History(line.world.state.path, line.timeline, line.world.boot)
    try:
        view = View(history, seq)
        try:
            return view.read(0, view.size)
        finally:
            view.close()
    finally:
        history.close()


def opens(line: Line, seq: int) -> None:
    """An instant can be opened. RefusedError where it is not kept."""
    with contextlib.closing(History(line.world.state.path, line.timeline, line.world.boot)) as history:
        View(history, seq).close()


def expected(line: Line, seq: int) -> bytes:
    """The same, as the model tells it."""
    return line.model.read(seq, 0, line.model.size_at(seq))


class Points(RuleBasedStateMachine):
    """A life, each step as Hypothesis chooses; of what fails it says how to do it again."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        world = World(self.stack.enter_context(scratch()))
        self.stack.callback(world.close)
        self.life = Life(world, random.Random(0))
        self.stack.callback(self.life.close)
        self.failed = False

    @rule(step=st.sampled_from([name for name, weight in WEIGHTS.items() for _ in range(weight)]), seed=SEEDS)
    def live(self, step: str, seed: int) -> None:
        self.failed = True
        self.life.dice.seed(seed)
        getattr(self.life, step)()
        self.life.check()
        self.failed = False

    def teardown(self) -> None:
        with self.stack:
            if not self.failed:
                self.life.prune()
                self.life.check_the_whole()


TestPoints = Points.TestCase
TestPoints.settings = settings(
    max_examples=int(os.environ.get("CDP_LIVES", "4")),
    stateful_step_count=STEPS,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
