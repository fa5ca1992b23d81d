"""A busy disk lives through days on an accelerated clock: chain, files, bytes and passes stay bounded.

Real journal, real QCOW2 files, real passes and merges; only the clock and the mirror are the test's own. Each hour ends
with a pass, each day with a look at what is left, through our views and through stock qemu-img.

    CDP_DAYS=30 python -m pytest -s tests/test_month.py    30 days at the default policy, with the curve
"""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
from blake3 import blake3

from cdpserver import basepoint, qemu
from cdpserver.catalog import Catalog
from cdpserver.chain.room import chain
from cdpserver.config import Config, parse_config
from cdpserver.cuts import find_cut
from cdpserver.journal.log import intervals
from cdpserver.names import format_bytes
from cdpserver.nodes import base_point_path, nodes, write_note
from cdpserver.retention import prune
from cdpserver.retention.policy import Policy
from cdpserver.view.chain import write_map
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.chains import raw
from tests.core import INDEXER, SECOND_NS, World, scratch
from tests.islands import writable
from tests.model import BLOCK

pytestmark = [pytest.mark.real, pytest.mark.e2e]

DAYS = int(os.environ.get("CDP_DAYS", "0"))
CONFIG = parse_config("" if DAYS else "[policy]\nbp_every = '4h'\n")
"""Without CDP_DAYS base points are rarer, so that a week takes seconds."""

SIZE = 256 * BLOCK
WRITES = 40
"""Between two base points; half of them to a sixteenth of the disk."""

DAY_NS = 24 * 3600 * SECOND_NS
SETTLED = 3
"""Days after which hours of the policy are full; only the slots of days, weeks and months grow from then on."""


@dataclass(frozen=True, slots=True)
class Day:
    """What there was at the end of a day, and the middle of what its passes took."""

    number: int
    chain: int
    intervals: int
    files: int
    bytes: int
    dropped: int
    pass_s: float


class Busy:
    """The disk, its clock, and what each base point must hold."""

    def __init__(self, path: Path, config: Config) -> None:
        self.world = World(path)
        self.config = config
        self.every_ns = config.policy_bp_every_ns
        self.dice = random.Random(30)
        self.catalog = Catalog.open(self.world.state, writable=True)
        self.line = self.world.add(SIZE)
        self.entry = self.catalog.add(self.line.timeline.full_name, self.line.timeline.id)
        self.content = bytearray(SIZE)
        self.below = bytes(SIZE)
        self.digests: dict[int, str] = {}
        self.line.write(0, bytes(BLOCK))
        self.line.synced()

    def until_the_next_base_point(self) -> None:
        """Writes, then the cut and its file."""
        for _ in range(WRITES):
            block = self.dice.randrange(SIZE // BLOCK // self.dice.choice((1, 16)))
            data = self.dice.randbytes(BLOCK)
            self.line.write(block * BLOCK, data)
            self.content[block * BLOCK : (block + 1) * BLOCK] = data
            self.world.now_ns += self.every_ns // WRITES
        self.line.cut()
        INDEXER.call("drain", self.line.directory, self.world.boot)
        self._publish(len(self.line.cuts) - 1)
        # A month of it does not fit in memory; the digests are what is compared with.
        self.line.model.changes.clear()
        self.line.model.instants.clear()

    def _publish(self, number: int) -> None:
        history = History(self.world.state.path, self.line.timeline, self.world.boot)
        try:
            cut = find_cut(history.journal, number)
            assert cut is not None
            under = basepoint.backing(history, cut)
            path = base_point_path(self.line.directory, number)
            qemu.create_overlay(path, backing=under.path, format=under.format, size=SIZE)
            with writable(path) as image:
                for at in range(0, SIZE, BLOCK):
                    if self.content[at : at + BLOCK] != self.below[at : at + BLOCK]:
                        image.pwrite(self.content[at : at + BLOCK], at)
            path.chmod(0o444)
            write_note(self.line.directory, basepoint.note(history, cut))
            write_map(path)
        finally:
            history.close()
        self.below = bytes(self.content)
        self.digests[number] = blake3(self.content).hexdigest()

    def a_pass(self) -> tuple[float, int]:
        """(seconds, what was dropped)."""
        started = time.monotonic()
        done = prune.prune(self.world.state, self.catalog, self.config, now_ns=self.world.now_ns, disk=None)
        assert not done.failed, done.failed
        return time.monotonic() - started, len(done.dropped)

    def day(self, number: int) -> Day:
        """Live it."""
        ends = self.world.now_ns + DAY_NS
        hour_ns = max(self.every_ns, 3600 * SECOND_NS)
        next_pass, passes = self.world.now_ns + hour_ns, []
        while self.world.now_ns < ends:
            self.until_the_next_base_point()
            if self.world.now_ns >= next_pass:
                passes.append(self.a_pass())
                next_pass += hour_ns
        self.check()
        files = [path for path in self.line.directory.rglob("*") if path.is_file()]
        return Day(
            number,
            len(chain(self.world.state, self.line.timeline.id)),
            len(intervals(self.line.directory)),
            len(files),
            sum(path.stat().st_blocks * 512 for path in files),
            sum(dropped for _, dropped in passes),
            median(seconds for seconds, _ in passes),
        )

    def check(self) -> None:
        """What is left is what was written: the newest and the oldest base point, three others, and the disk now."""
        there = [node.number for node in nodes(self.line.directory)]
        some = {there[0], there[-1], *self.dice.sample(there, min(3, len(there)))}
        for number in some:
            path = base_point_path(self.line.directory, number)
            qemu.check(path)
            assert blake3(raw(path)).hexdigest() == self.digests[number]
            assert blake3(self.read(self.line.cuts[number])).hexdigest() == self.digests[number]
        assert self.read(self.line.last_seq) == self.content

    def read(self, seq: int) -> bytes:
        """The disk at an instant."""
        history = History(self.world.state.path, self.line.timeline, self.world.boot)
        view = View(history, seq)
        try:
            return view.read(0, SIZE)
        finally:
            view.close()
            history.close()


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Busy]:
    with scratch() as path:
        made = Busy(path, CONFIG)
        yield made
        made.catalog.close()
        made.world.close()


@pytest.mark.timeout(DAYS * 120 or 120)
def test_a_busy_disk_stays_bounded(busy: Busy) -> None:
    print("\n  day  chain  intervals  files     bytes  dropped  pass")
    days: list[Day] = []
    for number in range(1, (DAYS or 6) + 1):
        day = busy.day(number)
        days.append(day)
        print(
            f"  {day.number:3}  {day.chain:5}  {day.intervals:9}  {day.files:5}  {format_bytes(day.bytes):>8}"
            f"  {day.dropped:7}  {day.pass_s:.2f} s",
            flush=True,
        )
    policy = Policy()
    recent = busy.config.policy_keep_rp[-1].span_ns // busy.every_ns
    # An hour passes until the next pass; the interval and base point at the edge of what is kept stay with it.
    slack = 2 + max(1, 3600 * SECOND_NS // busy.every_ns)
    slots = sum(rule.count for rule in busy.config.policy_keep_bp)
    for day in days:
        assert day.chain <= min(policy.max_chain, recent + slots + slack)
        assert day.intervals <= recent + slack
        # A log, its data and an index of an interval; a base point's file, note and map; the timeline's own.
        assert day.files <= 4 * day.intervals + 3 * day.chain + 20
    settled = days[SETTLED - 1]
    for day in days[SETTLED:]:
        # Slots of days, weeks and months: a base point a day for a week at most, one a week, one a month.
        assert day.chain <= settled.chain + 7 + 4 + 12
        assert day.bytes <= settled.bytes * 1.5
        assert day.pass_s <= settled.pass_s * 5 + 5
    assert sum(day.dropped for day in days) > len(days) * 86_400 * SECOND_NS // busy.every_ns
