"""Thinning: what an interval still lists is bit-exact, anything else is refused; however it ends, and whoever reads meanwhile."""

import contextlib
import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cdpserver import durable
from cdpserver.catalog import Catalog
from cdpserver.chain.lock import intervals_alone
from cdpserver.check import check_timeline
from cdpserver.check.depth import Everything
from cdpserver.config import Config, parse_config
from cdpserver.errors import CdpError, CorruptError, RefusedError, UsageError
from cdpserver.index import indexer
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal import segment
from cdpserver.journal.instants import Instants
from cdpserver.journal.log import Journal, interval_path
from cdpserver.leases import GRACE_NS, Lease
from cdpserver.locks import Lock
from cdpserver.names import At, Seq, When
from cdpserver.retention import survivors, thin
from cdpserver.retention.newest import PARTS, newest
from cdpserver.retention.steps import format_steps, parse_steps
from cdpserver.retention.thinning import Thinning
from tests.core import INDEXER, SECOND_NS, World, scratch
from tests.dying import Step, dies_at
from tests.islands import publish
from tests.model import BLOCK
from tests.test_prune import Kept

SIZE = 64 * BLOCK
MINUTE_NS = 60 * SECOND_NS


def config(keep: str) -> Config:
    return parse_config(f"[policy]\nbp_every = '10m'\nkeep_rp = '{keep}'\nkeep_bp = 'none'\n")


MINUTES = config("15m 10h/1m")
TENS = config("15m 30m/1m 10h/10m")


class Busy(Kept):
    """A disk with some intervals of ten minutes, a write of some kind every few seconds, and a re-mirror in the second."""

    def __init__(self, path: Path, intervals: int = 4, writes: int = 100) -> None:
        self.world = World(path)
        self.catalog = Catalog.open(self.world.state, writable=True)
        self.line = self.world.add(SIZE, image=bytes(SIZE))
        self.entry = self.catalog.add(self.line.timeline.full_name, self.line.timeline.id)
        self.chance = random.Random(intervals)
        self.line.write(0, self.chance.randbytes(BLOCK))
        self.line.synced()
        for number in range(intervals):
            self.interval(number, writes, remirror=number == 1)
        self.line.write(0, self.chance.randbytes(BLOCK))

    def interval(self, number: int, writes: int, *, remirror: bool = False) -> None:
        line, chance = self.line, self.chance
        for count in range(writes):
            self.change()
            if count == writes // 4:
                earlier = line.last_seq, line.writer.last_time_ns
            if count == writes // 3:
                line.mark(f"m{number}")
                line.mark(f"e{number}", at=earlier)
            if remirror and count == writes // 2:
                line.disconnect()
                for block in range(0, 64, 8):
                    line.write(block * BLOCK, line.model.read(line.last_seq, block * BLOCK, 8 * BLOCK))
                line.synced()
            self.world.now_ns += 10 * MINUTE_NS // writes + chance.randrange(1000)
        line.cut()
        INDEXER.call("drain", line.directory, self.world.boot)
        publish(line, number)

    def change(self) -> None:
        line, chance = self.line, self.chance
        start = chance.randrange(64)
        length = min(chance.choice((1, 1, 1, 2, 7)), 64 - start) * BLOCK
        match chance.randrange(8):
            case 0:
                line.zero(start * BLOCK, length)
            case 1:
                line.zero(start * BLOCK, length, trim=True)
            case _:
                line.write(start * BLOCK, chance.randbytes(length))

    def instants(self, interval: int) -> Instants | None:
        journal = Journal(self.line.directory)
        try:
            return journal.first_reader(interval).instants
        finally:
            journal.close()

    def exact(self) -> list[int]:
        """Every seq that can be opened; each is as the model says."""
        good = []
        for seq in range(1, self.line.last_seq + 1):
            with contextlib.suppress(RefusedError):
                assert self.read(seq) == self.line.model.read(seq, 0, SIZE), seq
                good.append(seq)
        return good

    def whole(self) -> None:
        """Nothing is damaged, and nothing of a pass is left."""
        report = check_timeline(
            self.world.state.path,
            self.entry.id,
            boot_id=self.world.boot,
            depth=Everything(content=True),
            chain=True,
        )
        assert report.damage == ()
        assert all(path.name.isdigit() for path in (self.line.directory / "intervals").iterdir())


@pytest.fixture
def busy() -> Iterator[Busy]:
    with scratch() as path:
        found = Busy(path)
        try:
            yield found
        finally:
            found.close()


def test_a_thinned_interval_gives_what_it_lists_and_nothing_else(busy: Busy) -> None:
    every = busy.exact()
    announced = busy.look(MINUTES).dropped
    done = busy.prune(MINUTES)
    assert done.failed == {}
    assert [d.what for d in done.dropped] == [d.what for d in announced] == ["thin:1", "thin:2"]
    for decision, before in zip(done.dropped, announced, strict=True):
        assert decision.reason == "keep_rp 10h/1m: one instant of each 1m is kept" == before.reason
        assert abs(decision.bytes - before.bytes) < 64 << 10
    assert sum(d.bytes for d in done.dropped) > 200 << 10
    assert busy.look(MINUTES).dropped == [] == busy.prune(MINUTES).dropped
    good = set(busy.exact())
    listed = {seq for n in (1, 2) if (found := busy.instants(n)) for seq in found.rows["seq"].tolist()}
    with busy.line.points() as points:
        third = points.journal.first_reader(3).first_seq
    assert good == listed | {seq for seq in every if seq >= third}
    assert 2 * 10 <= len(listed) <= 2 * 18
    busy.whole()


def test_it_is_thinned_again_as_it_ages(busy: Busy) -> None:
    busy.prune(MINUTES)
    before = set(busy.exact())
    done = busy.prune(TENS)
    assert [d.what for d in done.dropped] == ["thin:1"], "the second is not thirty minutes old"
    found = busy.instants(1)
    assert found is not None and found.every_ns == 10 * MINUTE_NS and len(found) <= 5
    after = set(busy.exact())
    assert after < before
    assert busy.prune(TENS).dropped == []
    assert busy.prune(config("15m 10h/1s")).dropped == [], "what is gone does not come back"
    busy.whole()


def test_what_is_refused_names_the_nearest_on_both_sides(busy: Busy) -> None:
    busy.prune(MINUTES)
    found = busy.instants(2)
    assert found is not None
    rows = found.rows.tolist()
    with busy.line.points() as points:
        now_ns = busy.world.now_ns
        for (seq, time_ns, until_ns, _), (later, later_ns, _, _) in pairwise(rows):
            # Records of one nanosecond: the time means the last of them, which may be gone.
            last_ns = min(until_ns, later_ns) - 1
            whens: list[When] = [Seq(seq), *((At(time_ns), At(last_ns)) if time_ns <= last_ns else ())]
            for when in whens:
                assert points.resolve(when, now_ns=now_ns).seq == seq
            wrong: list[When] = [At(until_ns), At(later_ns - 1)] if until_ns < later_ns else []
            wrong += [Seq(seq + 1)] if seq + 1 < later else []
            for when in wrong:
                with pytest.raises(UsageError, match="not kept any more") as refused:
                    points.resolve(when, now_ns=now_ns)
                assert f"(seq:{seq})" in refused.value.hint and f"(seq:{later})" in refused.value.hint
        # Before the first one there is the end of the interval before.
        first = points.journal.first_reader(2).first_seq
        with pytest.raises(UsageError) as refused:
            points.resolve(Seq(first), now_ns=now_ns)
        assert f"(seq:{first - 1})" in refused.value.hint and f"(seq:{rows[0][0]})" in refused.value.hint


def test_points_bookmarks_and_deltas_of_thinned_history(busy: Busy) -> None:
    busy.prune(MINUTES)
    with busy.line.points() as points:
        listed = points.points(now_ns=busy.world.now_ns + MINUTE_NS)
        assert points.count(now_ns=busy.world.now_ns + MINUTE_NS) == sum(p.kind == "rp" for p in listed)
        names = {p.name for p in listed}
        assert {"m0", "m1", "e0", "e1", "bp:0", "bp:1"} <= names
        for point in listed:
            where = points.resolve(Seq(point.seq), now_ns=busy.world.now_ns)
            assert where.seq == point.seq
    thinned = [seq for n in (1, 2) if (found := busy.instants(n)) for seq in found.rows["seq"].tolist()]
    for old, new in zip(thinned[::4], thinned[3::4], strict=False):
        busy.line.check_delta(new, busy.line, old)
    busy.line.check_delta(busy.line.last_seq, busy.line, thinned[2])


def test_the_index_is_disposable(busy: Busy) -> None:
    busy.prune(MINUTES)
    with busy.line.points() as points:
        before = points.points(now_ns=busy.world.now_ns)
    good = busy.exact()
    for path in (busy.line.directory / "intervals").glob("*/*.mdb*"):
        path.unlink()
    assert busy.exact() == good, "from the header logs"
    INDEXER.call("rebuild", busy.line.directory, busy.world.boot)
    assert (interval_path(busy.line.directory, 1) / CLOSED_NAME).exists()
    assert busy.exact() == good
    with busy.line.points() as points:
        assert points.points(now_ns=busy.world.now_ns) == before
    busy.whole()


def test_locks_leases_and_forks_keep_their_instants(busy: Busy) -> None:
    with busy.line.points() as points:
        first = points.journal.first_reader(2).first_seq
    locked, leased, forked = first + 7, first + 20, first + 33
    lock = Lock("lock-1", busy.entry.id, locked, 1, busy.world.now_ns + SECOND_NS, False, "", 1)
    busy.catalog.put_row("locks", lock.row())
    lease = Lease.take(busy.line.directory, leased)
    fork = busy.world.fork(busy.line, forked)
    busy.catalog.add(fork.timeline.full_name, fork.timeline.id)
    fork.write(5 * BLOCK, b"f" * BLOCK)
    busy.prune(MINUTES)
    found = busy.instants(2)
    assert found is not None and {locked, leased, forked} <= set(found.rows["seq"].tolist())
    assert {locked, leased, forked} >= found.held()
    for seq in (locked, leased, forked):
        assert busy.read(seq) == busy.line.model.read(seq, 0, SIZE)
    fork.check(fork.last_seq)
    lease.close()
    busy.prune(MINUTES)
    busy.world.now_ns += GRACE_NS + 2 * SECOND_NS
    done = busy.prune(MINUTES)
    assert [(d.what, d.reason) for d in done.dropped] == [("thin:2", "instants in it are no longer held")]
    for seq in {locked, leased} & found.held():
        with pytest.raises(RefusedError):
            busy.read(seq)
    assert busy.read(forked) == busy.line.model.read(forked, 0, SIZE)
    assert busy.prune(MINUTES).dropped == []
    busy.whole()


def test_open_views_go_on_over_the_swap(busy: Busy) -> None:
    """At instants that stay, at the newest one, and where older intervals are opened only afterwards."""
    with busy.line.points() as points:
        end = points.journal.first_reader(3).first_seq - 1
    last = busy.line.last_seq
    with contextlib.ExitStack() as stack:
        fresh = [stack.enter_context(busy.view(seq)) for seq in (end, last)]
        used = [stack.enter_context(busy.view(seq)) for seq in (end, last)]
        for view in used:
            view.read(0, 8 * BLOCK)
        for keep in (MINUTES, TENS):
            busy.prune(keep)
            for view in fresh + used:
                assert view.read(0, SIZE) == busy.line.model.read(view.seq, 0, SIZE)
                assert view.refs(0, 64)
    busy.line.check_live(0, SIZE)


def test_a_mirror_is_sent_again_over_thinned_history(busy: Busy) -> None:
    """What did not change becomes *same* records; what they look at stays when it is thinned again."""
    busy.prune(MINUTES)
    busy.line.disconnect()
    for block in range(64):
        busy.line.write(block * BLOCK, busy.line.model.read(busy.line.last_seq, block * BLOCK, BLOCK))
    busy.line.synced()
    for number in (4, 5, 6):
        busy.interval(number, 20)
    for keep in (MINUTES, TENS):
        assert busy.prune(keep).failed == {}
        busy.exact()
    busy.whole()


def test_a_disk_that_grew_inside_a_thinned_interval_has_both_sizes(busy: Busy) -> None:
    line = busy.line
    before = line.last_seq
    line.grow(2 * SIZE)
    line.write(SIZE + BLOCK, b"g" * BLOCK)
    grown = line.last_seq
    for number in (4, 5, 6):
        busy.interval(number, 20)
    assert busy.prune(MINUTES).failed == {}
    with busy.line.points() as points:
        thinned = points.journal.thinned_at_seq(grown)
        assert thinned is not None
        seqs = thinned.rows["seq"].tolist()
    for seq in seqs:
        line.check(seq)
    assert {line.model.size_at(seq) for seq in seqs} >= {2 * SIZE} and before < grown
    busy.whole()


def test_a_reboot_and_a_restart_change_nothing(busy: Busy) -> None:
    busy.prune(MINUTES)
    good = busy.exact()
    for clean in (True, False):
        busy.world.reboot(clean=clean)
        for seq in good:
            assert busy.read(seq) == busy.line.model.read(seq, 0, SIZE)
        with pytest.raises(RefusedError):
            busy.read(next(seq for seq in range(1, good[-1]) if seq not in good))
    busy.line.write(0, b"on" * (BLOCK // 2))
    busy.whole()


def steps_of(patched: Callable[[Step], Step]) -> None:
    """What a kill can come between: every write of a segment's files, every rename and removal."""
    for owner, name in (
        (segment.SegmentWriter, "create"),
        (segment.SegmentWriter, "seal"),
        (Instants, "write"),
        (durable, "publish"),
        (durable, "fsync_dir"),
        (thin, "exchange"),
        (os, "rename"),
        (os, "unlink"),
    ):
        setattr(owner, name, patched(getattr(owner, name)))


def test_killed_at_any_step_it_is_as_before_or_thinned() -> None:
    keep = config("5m 10h/1m")
    seen = set()
    with scratch() as path:
        small = Busy(path, intervals=2, writes=30)
        model, last = small.line.model, small.line.last_seq
        for number in range(1, 200):
            clone = small.clone(path / f"k{number}")
            died = dies_at(number, lambda: clone.prune(keep) and None, steps_of)  # noqa: B023
            found = clone.instants(1)
            seen.add(found is not None)
            listed = found.rows["seq"].tolist() if found is not None else range(1, 20)
            for seq in [*listed, last]:
                assert clone.read(seq) == model.read(seq, 0, SIZE)
            assert clone.prune(keep).failed == {}
            clone.whole()
            assert clone.instants(1) is not None
            clone.close()
            if not died:
                break
        small.close()
    assert not died and seen == {False, True}


def test_a_full_disk_in_the_middle_leaves_it_as_before(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    good = busy.exact()
    real = segment.SegmentWriter.append_payload
    for after in (0, 1, 20):
        left = after

        def full(self: segment.SegmentWriter, payload: bytes) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, payload)

        with monkeypatch.context() as patched:
            patched.setattr(segment.SegmentWriter, "append_payload", full)
            failed = busy.prune(MINUTES).failed
        assert "no space left" in failed[busy.entry.name]
        busy.whole()
    monkeypatch.setattr(thin, "SPARE", 1 << 60)
    assert "there is no room" in busy.prune(MINUTES).failed[busy.entry.name]
    assert busy.exact() == good


def test_a_damaged_payload_gets_no_new_digest(busy: Busy) -> None:
    data = next(iter(sorted(interval_path(busy.line.directory, 1).glob("*.data"))))
    raw = bytearray(data.read_bytes())
    for at in range(BLOCK - 1, len(raw), BLOCK):
        raw[at] ^= 1  # of payloads of whole blocks: control records are shorter
    data.write_bytes(raw)
    done = busy.prune(MINUTES)
    assert "does not match its digest" in done.failed[busy.entry.name]
    assert [d.what for d in done.dropped] == ["thin:2"]
    assert busy.instants(1) is None


def test_a_damaged_list_of_instants_is_damage_and_base_points_stay(busy: Busy) -> None:
    busy.prune(MINUTES)
    path = interval_path(busy.line.directory, 2) / "instants"
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-1]), path.unlink):
        damage()
        with pytest.raises(CorruptError):
            busy.instants(2)
        report = check_timeline(busy.world.state.path, busy.entry.id, boot_id=busy.world.boot)
        assert any("instants" in str(found.as_dict(busy.world.state.path)) for found in report.damage)
    assert busy.read(busy.line.last_seq) == busy.line.model.read(busy.line.last_seq, 0, SIZE)


def test_an_instant_that_comes_to_be_held_meanwhile_is_not_lost(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with busy.line.points() as points:
        held = points.journal.first_reader(1).first_seq + 11
    real = thin._write
    taken: list[Lease] = []

    def late(timeline: Path, thinning: Thinning, new: Path) -> None:
        real(timeline, thinning, new)
        if not taken:
            taken.append(Lease.take(timeline, held))

    monkeypatch.setattr(thin, "_write", late)
    done = busy.prune(MINUTES)
    assert "came to be held meanwhile" in done.failed[busy.entry.name]
    assert busy.read(held) == busy.line.model.read(held, 0, SIZE)
    assert [d.what for d in busy.prune(MINUTES).dropped] == ["thin:1"]
    assert busy.read(held) == busy.line.model.read(held, 0, SIZE)
    taken[0].close()


def test_nobody_thins_beside_another_pass_or_a_rebuild(busy: Busy) -> None:
    with intervals_alone(busy.line.directory) as mine:
        assert mine
        assert busy.prune(MINUTES).dropped == []
    with indexer.index_lock(busy.line.directory):
        assert "index" in busy.prune(MINUTES).failed[busy.entry.name]
    busy.whole()


def test_a_file_system_that_cannot_swap_is_said(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "RENAME_EXCHANGE", 1 << 20)  # EINVAL, as such a file system answers
    assert "cannot swap" in busy.prune(MINUTES).failed[busy.entry.name]
    busy.whole()


def test_the_newest_parts_are_those_of_painting_one_after_the_other() -> None:
    chance = random.Random(1)
    for _ in range(200):
        parts = np.zeros(chance.randrange(1, 30), dtype=PARTS)
        painted: dict[int, int] = {}
        for at in range(len(parts)):
            start = chance.randrange(20)
            end = start + chance.choice((1, 1, 2, 9))
            parts[at] = (at // 2 * 2 + at % 2, start * BLOCK, end * BLOCK, 0, at, 1)
            painted |= dict.fromkeys(range(start, end), at)
        left = newest(parts)
        found = {
            block: int(part["number"])
            for part in left
            for block in range(int(part["start"]) // BLOCK, int(part["end"]) // BLOCK)
        }
        assert found == painted
        assert sum(int(part["end"] - part["start"]) for part in left) == len(painted) * BLOCK


def test_many_records_take_time_about_in_proportion() -> None:
    """Parts of random lengths that lie over each other."""
    chance = np.random.default_rng(3)

    def cost(count: int) -> float:
        parts = np.zeros(count, dtype=PARTS)
        parts["seq"] = np.arange(count)
        parts["start"] = chance.integers(0, count, count) * BLOCK
        parts["end"] = parts["start"] + chance.integers(1, 9, count) * BLOCK
        began = time.process_time()
        newest(parts)
        return time.process_time() - began

    few, many = (min(cost(count) for _ in range(3)) for count in (10_000, 40_000))
    assert many < 12 * few, "quadratic would be 16 times"


def test_parts_that_are_folded_early_are_the_same(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survivors, "FOLD", 10)
    assert busy.prune(TENS).failed == {}
    busy.exact()
    busy.whole()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("24h 1h/1m", "does not reach further back"),
        ("1h/1m 24h", "keeps no fewer"),
        ("1h/1m 24h/1m", "keeps no fewer"),
        ("1h 24h/500ms", "from 1s to the SPAN"),
        ("1h/2h", "from 1s to the SPAN"),
        ("1h/", "not a duration"),
        ("", "not how long"),
    ],
)
def test_steps_that_contradict_themselves_are_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(CdpError, match=why):
        parse_steps(text)


@pytest.mark.parametrize("text", ["1d", "1h 1d/1m", "1h/1s 1d/1m 7d/1h"])
def test_steps_are_written_as_they_are_read(text: str) -> None:
    assert format_steps(parse_steps(text)) == text
