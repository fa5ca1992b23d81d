"""Loss of power: what was promised to be durable is there bit-exact, and what follows is a prefix or a gap.

The simulator is `tests/powerloss.py`. CDP_LONG=N makes N times as many images; CDP_SEED=S replays one.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cdpserver import limits
from cdpserver.cuts import find_cut
from cdpserver.index.store import open_name
from cdpserver.journal import segment
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.segment import data_path
from cdpserver.timeline import PointBase, Timeline
from cdpserver.view.layers import Layer
from tests.core import INDEXER, Line, World, check_view, remove, scratch
from tests.figures import tally
from tests.interposed import Call
from tests.model import BLOCK, LogRecord, Model, read_log, replay
from tests.powerloss import Storage, watched

LONG = int(os.environ.get("CDP_LONG", "1"))
SEEDS = [int(os.environ["CDP_SEED"])] if "CDP_SEED" in os.environ else range(24 * LONG)
IMAGES = 50
"""Losses of power in one history."""

DEEP = 15
"""One of so many images has a history of its own, with losses of power in its recovery and after it."""


# --- histories


@dataclass(frozen=True)
class Told:
    """What clients know of each timeline: what was promised to be durable, which seqs were given, what happened."""

    promised: dict[str, int]
    given: dict[str, int]
    records: dict[str, list[LogRecord]]
    models: list[tuple[Timeline, Model]]


@dataclass(frozen=True)
class Image:
    """What a loss of power left; `recovering`: it came while the loss before it was being recovered."""

    path: Path
    told: Told
    recovering: bool


class History:
    """A world under watch: random requests, and losses of power between and inside them."""

    def __init__(self, world: World, dice: random.Random, target: Path) -> None:
        self.world, self.dice, self.target = world, dice, target
        self.storage = Storage(world.state.path, self._moment)
        self._chance = 0.0
        self.promised = {line.timeline.id: 0 for line in world.lines}
        self.images: list[Image] = []
        self.recovering: Told | None = None
        self._losing = False

    @contextmanager
    def watching(self, chance: float) -> Iterator[None]:
        """The power may be lost before any call, twice as often before a sync or a change of names."""
        self._chance = chance
        with watched(self.storage):
            yield

    def _moment(self, call: Call) -> None:
        self._perhaps(self._chance / 2 if call.kind == "write" else self._chance)

    def run(self, requests: int) -> list[Image]:
        """The images of losses of power at random moments."""
        with self.watching(0.15):
            for _ in range(requests):
                self._request()
                self._perhaps(0.3)
        return self.images

    def recover(self, told: Told) -> None:
        """Open every timeline, which was left by another boot, and check it."""
        self.recovering = told
        with self.watching(0.1):
            open_and_check(self.world, told, recovering=True)
        # What was recovered is durable, but for a first copy.
        for line in self.world.lines:
            records = read_log(line.directory)
            self.promised[line.timeline.id] = records[-1].seq if records else 0
        self.recovering = None

    def _perhaps(self, chance: float) -> None:
        if self._losing or len(self.images) >= IMAGES or self.dice.random() >= chance:
            return
        self._losing = True
        path = self.target / f"{len(self.images)}"
        self.storage.lose_power(self.dice, path / "s")
        self.images.append(Image(path, self.recovering or self._told(), self.recovering is not None))
        self._losing = False

    def _told(self) -> Told:
        lines = self.world.lines
        records = {line.timeline.id: read_log(line.directory) for line in lines}
        given = {id: known[-1].seq if known else 0 for id, known in records.items()}
        models = [(line.timeline, copied(line.model)) for line in lines]
        return Told(dict(self.promised), given, records, models)

    def index(self, line: Line) -> None:
        """The indexer, which is a process of its own, indexes all that there is."""
        INDEXER.call("drain", line.directory, self.world.boot)
        self.storage.by_another()

    def _promise(self, line: Line) -> None:
        """A request that promises durability has returned."""
        self.promised[line.timeline.id] = line.writer.durable_seq
        assert line.writer.durable_seq > 0

    def _request(self) -> None:
        dice = self.dice
        line = dice.choice(self.world.lines)
        self.world.now_ns += dice.randrange(400_000_000)
        size = line.model.size
        offset = dice.randrange(size // 512) * 512
        what = dice.choices(
            ("write", "unaligned", "zero", "flush", "mark", "cut", "synced", "lost", "again", "index"),
            (40, 8, 6, 9, 3, 4, 3, 3, 3, 9),
        )[0]
        if what == "write":
            offset = offset // BLOCK * BLOCK
            line.write(offset, dice.randbytes(min(dice.choice((1, 2, 5)) * BLOCK, size - offset)))
        elif what == "unaligned":
            line.write(offset, dice.randbytes(min(700, size - offset)))
        elif what == "zero":
            line.zero(offset, min(dice.choice((512, 5 * BLOCK, size)), size - offset))
        elif what == "flush":
            line.connection().flush()
            if line.disk.journal is not None:
                self._promise(line)
        elif what == "lost":
            line.disconnect()
        elif what == "index":
            # An interval that was closed for its size is indexed for good, though it may not be durable yet.
            self.index(line)
        elif what == "again":
            held = line.model.read(line.last_seq, 0, size)
            line.disconnect()
            line.write(0, held)
        elif what == "synced" and not line.timeline.is_fork:
            line.synced()
            self._promise(line)
        elif line.disk.journal is not None and what in ("mark", "cut"):
            if what == "mark":
                line.mark(f"m{line.last_seq}")
            else:
                line.cut()
            self._promise(line)


# --- what must hold


def copied(model: Model) -> Model:
    return Model(model.size, None, model.parent_seq, list(model.changes))


def booted(world: World, image: Image) -> World:
    """The host is up again with what is left; nothing is open yet."""
    after = World(image.path)
    after.boots, after.now_ns = world.boots + 1, world.now_ns
    models: dict[str, Model] = {}
    for timeline, model in image.told.models:
        models[timeline.id] = copied(model)
        if isinstance(timeline.base, PointBase):
            models[timeline.id].parent = models[timeline.base.timeline]
        Line(after, timeline, models[timeline.id], opened=False)
    return after


def open_and_check(world: World, told: Told, *, recovering: bool) -> None:
    """Every timeline opens and holds what it must."""
    for line in world.lines:
        line.open()
        if line.disk.journal is None:
            first_copy_again(line, told, recovering=recovering)
        else:
            journal_again(line, told)


def first_copy_again(line: Line, told: Told, *, recovering: bool) -> None:
    """The history hadn't begun, for all that anybody was told; nothing of what was copied is believed."""
    assert told.promised[line.timeline.id] == 0
    assert line.disk.first_copy is not None
    assert line.disk.first_copy.restarted or not line.model.changes or recovering
    line.model.changes.clear()
    line.check_live(0, line.model.size)


def journal_again(line: Line, told: Told) -> None:
    """Everything promised is there, bit-exact; the rest is the start of what was written; no seq comes twice."""
    id = line.timeline.id
    known, given, promised = told.records[id], told.given[id], told.promised[id]
    records = read_log(line.directory)
    kept = [r for r in records if r.seq <= given]
    assert kept == known[: len(kept)], f"what is left is no prefix: {kept[-1]}"
    last = kept[-1].seq
    assert last >= promised, f"seq {promised} was promised, {last} is left"
    assert line.last_seq >= last + limits.SEQ_JUMP - 1
    assert line.writer.recovered is not None
    fresh = records[len(kept) :]
    # A second gap, if the power was lost just when the first one was on record.
    assert all(r.message.get("type") == "gap" and r.seq > given for r in fresh)
    assert bool(fresh) != line.timeline.is_fork
    line.model = replay(known, line.model, last)
    line.cuts = [r.seq for r in kept if r.message.get("type") == "cut"]
    dice, old = random.Random(last), open_name(f"{line.world.boots - 1:08d}-boot")
    for seq in sorted({last, promised or last, dice.choice(kept).seq, line.last_seq}):
        with line.view(seq) as view:
            files = [layer._file for layer in view._layers if isinstance(layer, Layer)]
            assert all(file is None or file.path.name != old for file in files)
            check_view(view, line.model, seq)


def check_cuts(line: Line) -> None:
    """Every base point's cut is found: it is the last record of its interval."""
    journal = Journal(line.directory)
    for number, seq in enumerate(line.cuts):
        found = find_cut(journal, number)
        assert found is not None and found.seq == seq
    journal.close()


def go_on(world: World, dice: random.Random, watching: History | None = None) -> None:
    """The writer writes on, and the index is made anew, though the old boot's is still lying there."""
    for line in world.lines:
        line.model.remember(line.last_seq)
        line.write(0, dice.randbytes(3 * BLOCK))
        if line.disk.journal is None:
            line.synced()
        line.check(line.last_seq)
        if watching is not None:
            watching.index(line)
        else:
            INDEXER.call("drain", line.directory, world.boot)
        line.check(line.last_seq)
        for path in interval_path(line.directory, 1).parent.glob("*/open-*.mdb"):
            assert path.name == open_name(world.boot)
        check_cuts(line)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_of_power(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second one, in what the first one left."""
    dice = random.Random(seed)
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", dice.choice((5, 24)))
    monkeypatch.setattr(limits, "INTERVAL_SEGMENTS", dice.choice((1, 3)))
    with scratch() as path:
        world = World(path / "host")
        line = world.add(16 * BLOCK + 512 * dice.randrange(8))
        if dice.random() < 0.6:
            line.synced()
            line.write(0, dice.randbytes(9 * BLOCK))
            if dice.random() < 0.5:
                world.fork(line, line.last_seq)
        INDEXER.call("drain", line.directory, world.boot)
        history = History(world, dice, path / "first")
        images = history.run(60)
        assert not history.storage.differences(), "something changes files in a way that is not seen"
        tried = len(images)
        for number, image in enumerate(images):
            after = booted(world, image)
            if number % DEEP:
                open_and_check(after, image.told, recovering=False)
                after.close()
                remove(image.path)
                continue
            again = History(after, dice, path / f"second-{number}")
            again.recover(image.told)
            with again.watching(0.02):
                go_on(after, dice, again)
            if number % (2 * DEEP) == 0:
                again.run(20)
            tried += (seconds := min(3, len(again.images)))
            for second in dice.sample(again.images, seconds):
                last = booted(after, second)
                open_and_check(last, second.told, recovering=second.recovering)
                go_on(last, dice)
                last.close()
            after.close()
            remove(image.path)
        world.close()
        tally("power loss: journal", images=tried, syncs=history.storage.syncs)


@pytest.mark.parametrize("zeros", [0, 2])
def test_a_log_whose_data_file_never_came_to_the_disk(zeros: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names of one directory are two changes: what is kept are the records that have no payload there."""
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 5)
    with scratch() as path:
        world = World(path)
        line = world.add(16 * BLOCK)
        line.synced()
        line.write(0, b"a" * BLOCK)
        line.writer.commit()
        promised, number = line.writer.durable_seq, line.writer._segment.header.segment
        while line.writer._segment.header.segment == number:
            line.write(BLOCK, b"b" * BLOCK)
        # The new segment's first record is that write; another one begins with zeros.
        number += 1
        if zeros:
            while line.writer._segment.header.segment == number:
                line.zero(3 * BLOCK, BLOCK)
            line.zero(4 * BLOCK, BLOCK)
            number += 1
            line.write(5 * BLOCK, b"c" * BLOCK)
        expected = line.last_seq - 1
        told = Told({"t1": promised}, {"t1": line.last_seq}, {"t1": read_log(line.directory)}, [])
        line.close(clean=False)
        data_path(interval_path(line.directory, 1), number).unlink()
        world.boots += 1
        line.open()
        journal_again(line, told)
        assert [r.seq for r in read_log(line.directory) if r.seq <= told.given["t1"]][-1] == expected
        line.write(0, b"d" * BLOCK)
        line.check(line.last_seq)
        world.close()
