"""The life of points at random: writes, growth, base points, locks, forks, leases, passes of retention, merges, reboots.

After each pass and merge: what anything holds reads bit-exact; everything else reads bit-exact or is refused, never wrong.
"""

import contextlib
import os
import random

import pytest

from cdpserver.catalog import Catalog, Entry
from cdpserver.chain import merge as chain
from cdpserver.check import check_timeline
from cdpserver.config import parse_config
from cdpserver.errors import RefusedError
from cdpserver.leases import Lease
from cdpserver.locks import Lock
from cdpserver.nodes import nodes
from cdpserver.retention import offtime, prune
from cdpserver.retention.facts import gather
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.core import INDEXER, SECOND_NS, Line, World
from tests.islands import publish
from tests.model import BLOCK

pytestmark = [pytest.mark.real, pytest.mark.e2e]

SIZE = 64 * BLOCK
MINUTE_NS = 60 * SECOND_NS
KEEP_NS = 60 * MINUTE_NS
CONFIG = parse_config("[policy]\nbp_every = '20m'\nkeep_rp = '1h'\nkeep_bp = '3h'\n")
STEPS = 50


class Life:
    """A disk and its forks, what holds their points, and what should therefore be there."""

    def __init__(self, world: World, dice: random.Random) -> None:
        self.world = world
        self.dice = dice
        self.catalog = Catalog.open(world.state, writable=True)
        self.lines: list[tuple[Line, Entry]] = []
        self.held: list[tuple[Line, int]] = []
        self.leases: list[Lease] = []
        self.locks = 0
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
            made = Lock(f"lock-{self.locks}", entry.id, seq, 1, None, False, "", 1)
            self.catalog.put_row("locks", made.row())
            self.held.append((line, seq))

    def fork(self) -> None:
        if len(self.lines) < 4 and (found := self.an_instant()):
            line, _, seq = found
            made = self.world.fork(line, seq)
            self._named(made)
            assert made.timeline.base is not None

    def lease(self) -> None:
        if found := self.an_instant():
            line, _, seq = found
            self.leases.append(Lease.take(line.directory, seq))
            self.held.append((line, seq))

    def grow(self) -> None:
        line, _ = self.dice.choice(self.lines)
        line.grow(line.model.size + BLOCK * self.dice.randrange(1, 20))

    def reboot(self) -> None:
        before_ns = self.world.now_ns
        self.world.now_ns += self.dice.choice((SECOND_NS, 30 * 24 * 3600 * SECOND_NS))
        self.world.reboot(clean=self.dice.random() < 0.5)
        offtime.note(self.world.state, before_ns, self.world.now_ns)

    def merge(self) -> None:
        line, entry = self.dice.choice(self.lines)
        numbers = [node.number for node in nodes(line.directory)]
        if len(numbers) > 2:
            with contextlib.suppress(RefusedError):
                chain.merge(self.world.state, self.catalog, entry.id, "delete", self.dice.choice(numbers))
            self.check()

    def prune(self) -> None:
        recent = [
            (
                line,
                [
                    c.seq
                    for c in line.model.changes
                    if c.time_ns >= line.writer.last_time_ns - KEEP_NS and c.seq
                ],
            )
            for line, _ in self.lines
        ]
        done = prune.prune(self.world.state, self.catalog, CONFIG, now_ns=self.world.now_ns, disk=None)
        assert not done.failed, done.failed
        for line, seqs in recent:
            for seq in self.dice.sample(seqs, min(4, len(seqs))):
                assert read(line, seq) == held(line, seq)
        self.check()
        again = prune.look(self.world.state, self.catalog, CONFIG, now_ns=self.world.now_ns, disk=None)[0]
        assert not again.dropped, "one pass is enough"

    # -- what must hold

    def check(self) -> None:
        for line, seq in self.held:
            assert read(line, seq) == held(line, seq), (line.timeline.id, seq)
        for line, _ in self.lines:
            some = self.dice.sample(line.model.instants, min(8, len(line.model.instants)))
            for seq in [*some, line.last_seq]:
                with contextlib.suppress(RefusedError):
                    assert read(line, seq) == held(line, seq), (line.timeline.id, seq)
            assert read(line, line.last_seq) == held(line, line.last_seq)
            line.check_live(0, line.model.size)

    def check_the_whole(self) -> None:
        self.check()
        for _, entry in self.lines:
            assert gather(self.world.state, self.catalog, CONFIG, entry, now_ns=self.world.now_ns).intervals
            report = check_timeline(self.world.state.path, entry.id, boot_id=self.world.boot, full=True)
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


def held(line: Line, seq: int) -> bytes:
    """The same, as the model tells it."""
    return line.model.read(seq, 0, line.model.size_at(seq))


@pytest.mark.parametrize("turn", range(int(os.environ.get("CDP_LIVES", "3"))))
def test_points_live_and_end_by_rule(world: World, turn: int) -> None:
    seed = int(os.environ.get("CDP_SEED", "0")) or random.randrange(1 << 32)
    print(f"CDP_SEED={seed}")
    dice = random.Random(seed)
    life = Life(world, dice)
    steps = [
        life.churn,
        life.cut,
        life.prune,
        life.merge,
        life.lock,
        life.fork,
        life.lease,
        life.reboot,
        life.grow,
    ]
    for step in dice.choices(steps, weights=(10, 10, 5, 3, 1, 1, 1, 1, 1), k=STEPS):
        print(step.__name__)
        step()
    life.prune()
    life.check_the_whole()
    for lease in life.leases:
        lease.close()
    life.catalog.close()
