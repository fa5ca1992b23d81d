"""Loss of power: what was promised to be durable is there bit-exact, and what follows is a prefix or a gap.

A small simulator of a disk's cache: a page that was written after the last sync of its file may be on the disk, may be not, or
as it was at any moment between; a name likewise. CDP_LONG=N makes N times as many images; CDP_SEED=S replays one.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cdpserver import limits
from cdpserver.index.store import open_name
from cdpserver.journal import segment
from cdpserver.journal.log import interval_path
from tests.core import INDEXER, Line, World, check_view, remove, scratch
from tests.model import BLOCK, LogRecord, Model, read_log, replay

LONG = int(os.environ.get("CDP_LONG", "1"))
SEEDS = [int(os.environ["CDP_SEED"])] if "CDP_SEED" in os.environ else range(40 * LONG)
IMAGES = 8
"""Losses of power in one history."""

Hook = Callable[[], None]


@dataclass
class File:
    """One inode: what is on the disk for certain, and every version of a page that may be there instead."""

    durable: bytes = b""
    now: bytes = b""
    versions: dict[int, list[bytes]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def look(self, content: bytes) -> None:
        """The file as the page cache has it now."""
        if content == self.now:
            return
        if len(content) != len(self.now):
            self.sizes.append(len(content))
        for page in range(-(-max(len(content), len(self.now)) // BLOCK)):
            part = content[page * BLOCK : page * BLOCK + BLOCK]
            if part != self.now[page * BLOCK : page * BLOCK + BLOCK]:
                self.versions.setdefault(page, []).append(part)
        self.now = content

    def sync(self) -> None:
        """All of it is on the disk."""
        self.durable, self.versions, self.sizes = self.now, {}, []

    def after_loss(self, dice: random.Random) -> bytes:
        """What the disk may hold after a loss of power now."""
        size = dice.choice([len(self.durable), *self.sizes])
        held = bytearray(self.durable[:size].ljust(size, b"\0"))
        chance = dice.choice((0.0, 0.3, 0.7, 1.0))
        for page, versions in self.versions.items():
            if page * BLOCK < size and dice.random() < chance:
                part = dice.choice(versions[-3:]).ljust(BLOCK, b"\0")
                held[page * BLOCK : page * BLOCK + BLOCK] = part[: size - page * BLOCK]
        return bytes(held)


class Storage:
    """A directory tree whose syncs are watched from now on. What is there already is on the disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, File] = {}
        self.names: dict[Path, list[dict[str, int]]] = {}
        self.look()
        for file in self.files.values():
            file.sync()
        for states in self.names.values():
            del states[:-1]

    def look(self) -> None:
        """Notice what changed in the page cache and among the names."""
        for path, folders, files in os.walk(self.root):
            directory = Path(path)
            state = {name: (directory / name).lstat().st_ino for name in [*folders, *files]}
            states = self.names.setdefault(directory, [])
            if not states or states[-1] != state:
                states.append(state)
            for name in files:
                # An index has files of its own rules: it is thrown away, whatever is left of it.
                if ".mdb" not in name:
                    self.files.setdefault(state[name], File()).look((directory / name).read_bytes())

    def synced(self, fd: int) -> None:
        """fsync or fdatasync of an open file or directory."""
        self.look()
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path in self.names:
            del self.names[path][:-1]
        elif (inode := os.fstat(fd).st_ino) in self.files:
            self.files[inode].sync()

    def lose_power(self, dice: random.Random, target: Path) -> None:
        """Write to `target` what the disk may hold if the power were lost now."""
        self.look()
        self._restore(self.root, target, dice)

    def _restore(self, source: Path, target: Path, dice: random.Random) -> None:
        target.mkdir(parents=True)
        for name, inode in dice.choice(self.names[source]).items():
            if inode in self.files:
                (target / name).write_bytes(self.files[inode].after_loss(dice))
            elif ".mdb" in name:
                (target / name).write_bytes(dice.randbytes(dice.choice((0, 100, 20_000))))
            elif source / name in self.names:
                self._restore(source / name, target / name, dice)


@contextmanager
def watched(storage: Storage, before: Hook) -> Iterator[None]:
    """Every sync is seen by the simulator, and `before` it the power may be lost."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, _watch(getattr(os, name), storage, before))
        for name in ("rename", "mkdir", "unlink"):
            patch.setattr(os, name, _watch(getattr(os, name), None, before))
        yield


def _watch(real: Callable[..., Any], storage: Storage | None, before: Hook) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        before()
        if storage is not None:
            storage.synced(args[0])
        return real(*args, **named)

    return call


# --- histories


@dataclass
class Image:
    """What a loss of power left, and what had been promised and given by then."""

    path: Path
    promised: dict[str, int]
    given: dict[str, int]
    records: dict[str, list[LogRecord]]
    wrote: bool
    models: "list[tuple[Line, Model]]"


class History:
    """A world under watch: random requests, and losses of power between and inside them."""

    def __init__(self, world: World, dice: random.Random, target: Path) -> None:
        self.world, self.dice, self.target = world, dice, target
        self.storage = Storage(world.state.path)
        self.promised = {line.timeline.id: 0 for line in world.lines}
        self.images: list[Image] = []

    def run(self, requests: int) -> list[Image]:
        """The images of losses of power at random moments."""
        with watched(self.storage, lambda: self._perhaps(0.03)):
            for _ in range(requests):
                self._request()
                self.storage.look()
                self._perhaps(0.08)
        return self.images

    def _perhaps(self, chance: float) -> None:
        if len(self.images) >= IMAGES or self.dice.random() >= chance:
            return
        path = self.target / f"{len(self.images)}"
        self.storage.lose_power(self.dice, path / "s")
        lines = self.world.lines
        ids = [line.timeline.id for line in lines]
        self.images.append(
            Image(
                path,
                dict(self.promised),
                dict(zip(ids, [line.last_seq for line in lines], strict=True)),
                {line.timeline.id: read_log(line.directory) for line in lines},
                any(line.disk.first_copy is not None and line.disk.first_copy.wrote for line in lines),
                [
                    (line, Model(line.model.size, None, line.model.parent_seq, list(line.model.changes)))
                    for line in lines
                ],
            )
        )

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
            ("write", "unaligned", "zero", "flush", "mark", "cut", "synced", "lost", "again"),
            (40, 8, 6, 12, 3, 4, 3, 3, 3),
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


def reopened(world: World, image: Image) -> World:
    """The image, opened by another boot, with every timeline checked."""
    after = World(image.path)
    after.boots, after.now_ns = world.boots + 1, world.now_ns
    models: dict[str, Model] = {}
    for line, model in image.models:
        if line.model.parent is not None:
            parent = next(other for other in world.lines if other.model is line.model.parent)
            model.parent = models[parent.timeline.id]
        models[line.timeline.id] = model
        copy = Line(after, line.timeline, model, opened=False)
        copy.open()
        if copy.disk.journal is None:
            first_copy_again(copy, image)
        else:
            journal_again(copy, image, after)
    return after


def first_copy_again(line: Line, image: Image) -> None:
    """The history hadn't begun, for all that anybody was told; nothing of what was copied is believed."""
    assert image.promised[line.timeline.id] == 0
    assert line.disk.first_copy is not None
    assert line.disk.first_copy.restarted or not line.model.changes
    line.model.changes.clear()
    line.check_live(0, line.model.size)
    assert not line.disk.first_copy.read_whole() if hasattr(line.disk.first_copy, "read_whole") else True


def journal_again(line: Line, image: Image, world: World) -> None:
    """Everything promised is there, bit-exact; the rest is the start of what was written; no seq comes twice."""
    id = line.timeline.id
    told = image.records[id]
    records = read_log(line.directory)
    kept = [r for r in records if r.seq <= image.given[id]]
    assert kept == told[: len(kept)], f"what is left is no prefix: {kept[-1]}"
    last = kept[-1].seq if kept else 0
    assert last >= image.promised[id], f"seq {image.promised[id]} was promised, {last} is left"
    assert line.last_seq >= last + limits.SEQ_JUMP - 1
    assert line.writer.recovered is not None
    fresh = records[len(kept) :]
    assert [r.message.get("type") for r in fresh] == ([] if line.timeline.is_fork else ["gap"])
    assert all(r.seq > image.given[id] for r in fresh)
    dice = random.Random(last)
    line.model = replay(told, line.model, last)
    for seq in sorted({last, image.promised[id], dice.choice(kept).seq, line.last_seq}):
        if seq:
            with line.view(seq) as view:
                assert not any(open_name("") in str(layer.directory) for layer in view._layers)
                check_view(view, line.model, seq)


def go_on(world: World, dice: random.Random) -> None:
    """The writer writes on, and the index is made anew, though the old boot's is still lying there."""
    for line in world.lines:
        line.model.remember(line.last_seq)
        line.write(0, dice.randbytes(3 * BLOCK))
        if line.disk.journal is None:
            line.synced()
        line.check(line.last_seq)
        INDEXER.call("drain", line.directory, world.boot)
        line.check(line.last_seq)
        for path in interval_path(line.directory, 1).parent.glob("*/open-*.mdb"):
            assert path.name == open_name(world.boot)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 24)
    monkeypatch.setattr(limits, "INTERVAL_SEGMENTS", 4)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_of_power(seed: int) -> None:
    """And a second one, in what the first one left."""
    dice = random.Random(seed)
    with scratch() as path:
        world = World(path / "first")
        line = world.add(16 * BLOCK + 512 * dice.randrange(8))
        if dice.random() < 0.7:
            line.synced()
            line.write(0, dice.randbytes(9 * BLOCK))
            if dice.random() < 0.5:
                world.fork(line, line.last_seq)
        INDEXER.call("drain", line.directory, world.boot)
        images = History(world, dice, path / "first-loss").run(60)
        for number, image in enumerate(images):
            after = reopened(world, image)
            go_on(after, dice)
            if number % 3 == 0:
                second = History(after, dice, path / f"second-loss-{number}")
                second.promised = {each.timeline.id: each.writer.durable_seq for each in after.lines}
                for again in second.run(25)[:3]:
                    last = reopened(after, again)
                    go_on(last, dice)
                    last.close()
            after.close()
            remove(image.path)
        world.close()
