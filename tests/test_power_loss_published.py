"""Loss of power while files are published, history is dropped, thinned and merged, and the catalog changes.

Each kind of work is done once under the simulator (`tests/powerloss.py`), and before its calls images are taken of what the disk
may hold. In every image each file is whole or not there, what was promised before is there, and every instant that is offered is
bit-exact. CDP_LONG=N takes N times as many images; CDP_SEED=S begins with another seed.
"""

import contextlib
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from cdpserver import basepoint, timeline
from cdpserver.catalog import Catalog, Row
from cdpserver.chain import merge as chain
from cdpserver.check import check_timeline
from cdpserver.check.depth import BASE_POINT, INDEX, Everything, Place
from cdpserver.config import parse_config
from cdpserver.errors import RefusedError
from cdpserver.index import indexer, merging
from cdpserver.journal import segment
from cdpserver.journal.links import Chain
from cdpserver.journal.log import interval_path
from cdpserver.nodes import base_point_path, note_path
from cdpserver.retention import thin
from cdpserver.service.prepare import sweep
from cdpserver.view.chain import map_path, write_map
from cdpserver.view.history import History
from recovery.opened import alone
from tests.core import INDEXER, Line, World, forget_indexes, scratch
from tests.figures import tally
from tests.interposed import Call
from tests.model import BLOCK, Model
from tests.powerloss import Storage, watched
from tests.test_prune import MINUTE_NS, SIZE, Kept

pytestmark = [pytest.mark.real]

LONG = int(os.environ.get("CDP_LONG", "1"))
SEED = int(os.environ.get("CDP_SEED", "1"))
IMAGES = 400 * LONG
"""Images of one kind of work, at most."""

THINS = parse_config("[policy]\nbp_every = '20m'\nkeep_rp = '20m 10h/5m'\nkeep_bp = '12h'\n")
DROPS = parse_config("[policy]\nbp_every = '20m'\nkeep_rp = '40m'\nkeep_bp = '1h'\n")


@pytest.fixture(scope="module")
def whole() -> Iterator[Kept]:
    """A disk with six intervals and base points, at rest."""
    with pytest.MonkeyPatch.context() as patch, scratch() as path:
        patch.setattr(segment, "WINDOW_BYTES", BLOCK)
        patch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
        made = Kept(path, hours=2)
        made.line.writer.commit()
        made.line.close(clean=True)
        INDEXER.call("drain", made.line.directory, made.world.boot)
        INDEXER.call("close", made.line.directory, made.world.boot)
        yield made
        made.catalog.close()
        forget_indexes(made.world.state.path)


@dataclass
class Work:
    """One kind of work on a copy of the disk, the images taken meanwhile, and what must hold in them."""

    kept: Kept
    room: Path
    dice: random.Random
    chance: float
    images: list[tuple[Path, list[Any]]] = field(default_factory=list)
    """Where each is, and which rows of the catalog it may have."""

    versions: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    catalogs: list[Any] = field(default_factory=list)
    linked: dict[int, bytes] = field(default_factory=dict)

    def note(self, path: Path) -> None:
        """What is there now under its name may be there after a loss of power."""
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and _appears_whole(file):
                self.versions[file.name].add(blake3(file.read_bytes()).digest())

    def digest(self, file: Path) -> bytes:
        """Of a file of an image; many images link the same one."""
        found = file.stat()
        if found.st_nlink == 1:
            return blake3(file.read_bytes()).digest()
        if found.st_ino not in self.linked:
            self.linked[found.st_ino] = blake3(file.read_bytes()).digest()
        return self.linked[found.st_ino]

    def moment(self, call: Call) -> None:
        """Before a call."""
        if call.kind in ("rename", "exchange") and call.other is not None:
            for file in [call.path] if call.path.is_file() else sorted(call.path.rglob("*")):
                name = call.other.name if file == call.path else file.name
                if file.is_file():
                    self.versions[name].add(blake3(file.read_bytes()).digest())
        often = 2.0 if call.kind in ("sync", "rename", "exchange", "unlink", "rmdir") else 1.0
        chance = self.chance * often * LONG
        for _ in range(int(chance) + (self.dice.random() < chance % 1)):
            if len(self.images) < IMAGES:
                path = self.room / f"i{len(self.images)}"
                self.storage.lose_power(self.dice, path / "s")
                self.images.append((path, list(self.catalogs)))

    def run(self, work: Callable[[Kept], None]) -> None:
        """Do it, under watch."""
        state = self.kept.world.state
        self.note(state.path)
        (self.room / "kept").mkdir()
        self.storage = Storage(state.path, self.moment, self.room / "kept")
        self.storage.unseen.add("events.jsonl")  # the export's, which is another process
        with watched(self.storage):
            work(self.kept)
        assert not self.storage.differences(), "something changes files in a way that is not seen"


def _appears_whole(path: Path) -> bool:
    """Is it a file that is published by a rename and never changed?"""
    grows = path.suffix in (".log", ".data", ".mdb") and path.name != "index.mdb"
    temporary = any(part.startswith((".tmp-", ".removing-", ".thin-", "open-")) for part in path.parts)
    other = path.name in ("links", "events.jsonl") or path.suffix == ".sock" or "lock" in path.name
    return not (grows or temporary or other)


class Records(Everything):
    """Everything but what other processes are asked for."""

    def takes(self, place: Place) -> bool:
        return place[0] not in (INDEX, BASE_POINT)


def copied(whole: Kept, path: Path) -> Kept:
    """The same disk in another place, its files with their times and the maps of their base points."""
    made = object.__new__(Kept)
    made.world, made.entry = whole.world.clone(path), whole.entry
    made.line = made.world.lines[0]
    made.catalog = Catalog.open(made.world.state, writable=True)
    for image in made.line.directory.glob("bp-*.qcow2"):
        write_map(image)
    return made


def readable(kept: Kept, seqs: list[int]) -> set[int]:
    """Which instants are offered. Each of these is exact."""
    found = set()
    for seq in seqs:
        with contextlib.suppress(RefusedError):
            content = kept.read(seq)
            assert content == kept.line.model.read(seq, 0, SIZE), f"seq {seq} reads otherwise"
            found.add(seq)
    forget_indexes(kept.world.state.path)
    return found


def look_into(work: Work, image: Path, rows: list[Any], before: set[int], after: set[int]) -> None:
    """What the service finds when the host is back."""
    sane = work.kept
    world = World(image)
    world.boots, world.now_ns = sane.world.boots + 1, sane.world.now_ns + MINUTE_NS
    state = world.state
    sweep(state)
    assert not chain.finish_all(state)[1]
    for file in sorted(state.path.rglob("*")):
        if file.is_file() and _appears_whole(file) and file.parent.name != "sums":
            held = work.digest(file)
            assert held in work.versions[file.name], f"{file.relative_to(image)} is not whole"
    found = object.__new__(Kept)
    found.world, found.entry = world, sane.entry
    found.catalog = Catalog.open(state, writable=True)
    try:
        assert found.catalog.get(sane.entry.name) == sane.entry
        assert found.catalog.rows("locks") in rows
        model = sane.line.model
        copy = Model(model.size, None, model.parent_seq, list(model.changes))
        found.line = Line(world, sane.line.timeline, copy, opened=False)
        basepoint.note_base_points(state)
        sure, maybe = sorted(before & after), sorted(before)
        some = {sure[-1], *work.dice.sample(sure, min(2, len(sure))), *work.dice.sample(maybe, 2)}
        offered = readable(found, sorted(some))
        assert some & before & after <= offered, f"{some & before & after - offered} are not offered"
        if work.dice.random() < 0.15:
            check_further(found, work)
    finally:
        found.catalog.close()
        forget_indexes(state.path)


def check_further(found: Kept, work: Work) -> None:
    """It is whole by its own checks; the writer and the indexer go on, and what was interrupted is done by the next."""
    line, id = found.line, found.line.timeline.id
    report = check_timeline(found.world.state.path, id, boot_id=found.world.boot, depth=Records(), chain=True)
    assert report.whole, [damage.finding.what for damage in report.damage]
    line.open()
    last = line.last_seq
    assert last >= found.line.model.latest
    line.write(0, b"n" * BLOCK)
    line.close(clean=True)
    forget_indexes(found.world.state.path)
    index_all(line.directory, found.world.boot)
    merging.merge(line.directory)
    thin.tidy(line.directory)
    assert readable(found, [line.last_seq if line.is_open else last + 1]) == {last + 1}


def index_all(directory: Path, boot: str) -> None:
    """The indexer's work, in this process, to its end."""
    one = indexer.TimelineIndexer(directory, boot)
    try:
        while True:
            at = one._interval
            if not one.step(0.0) and one._interval == at:
                return
    finally:
        one.close()


# --- the kinds of work


def changes_of_the_catalog(kept: Kept, work: Work) -> None:
    """Rows come and go; each is there or not."""
    work.catalogs.append(kept.catalog.rows("locks"))
    for number in range(6):
        row = Row(f"lock-{number}", 1, {"n": number, "text": "x" * 700 * number})
        # Until it returns the change may have come to the disk or not.
        work.catalogs.append({**kept.catalog.rows("locks"), row.id: row})
        kept.catalog.put_row("locks", row)
        del work.catalogs[0]
    work.catalogs.append({k: v for k, v in kept.catalog.rows("locks").items() if k != "lock-3"})
    kept.catalog.delete_row("locks", "lock-3")


def publishing(kept: Kept, work: Work, *, again: bool) -> None:
    """A base point appears, or takes the place of a damaged one."""
    state = kept.world.state
    with contextlib.closing(History(state.path, timeline.load(kept.line.directory))) as history:
        do = basepoint.rebuild if again else basepoint.publish
        do(state, history, 5, export=kept.entry.name, socket=work.room / "nbd")


def merges_of_base_points(kept: Kept, _: Work) -> None:
    chain.merge(kept.world.state, kept.catalog, kept.entry.id, "pull", 4, base=1)


def thinning(kept: Kept, _: Work) -> None:
    done = kept.prune(THINS)
    assert not done.failed and any(d.what.startswith("thin:") for d in done.dropped)


def dropping(kept: Kept, _: Work) -> None:
    done = kept.prune(DROPS)
    assert not done.failed and any(d.is_interval for d in done.dropped)


def indexing(kept: Kept, _: Work) -> None:
    """All indexes are made anew, merged, and what was sealed is linked."""
    indexer.rebuild(kept.line.directory, kept.world.boot)
    merging.merge(kept.line.directory)
    with Chain.open(kept.line.directory, kept.line.timeline.uuid) as links:
        links.catch_up(1 << 62)


KINDS: dict[str, tuple[Callable[[Kept, Work], None], float]] = {
    "catalog": (changes_of_the_catalog, 1.5),
    "publish": (lambda kept, work: publishing(kept, work, again=False), 2.0),
    "rebuild": (lambda kept, work: publishing(kept, work, again=True), 2.0),
    "merge": (merges_of_base_points, 3.0),
    "thin": (thinning, 0.3),
    "drop": (dropping, 1.0),
    "index": (indexing, 0.3),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_loss_of_power_in(whole: Kept, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    monkeypatch.setattr(merging, "MOST", 2)
    do, chance = KINDS[kind]
    with scratch() as room, contextlib.ExitStack() as stack:
        kept = copied(whole, room / "live")
        stack.callback(kept.catalog.close)
        work = Work(kept, room, random.Random(f"{kind} {SEED}"), chance)
        if kind == "publish":
            image = base_point_path(kept.line.directory, 5)
            for path in (image, note_path(kept.line.directory, 5), map_path(image)):
                path.unlink()
        if kind in ("publish", "rebuild"):
            serving = alone("export", [f"state_dir={kept.world.state.path}", "alone=1"], room / "nbd")
            stack.enter_context(serving)
        seqs = list(range(1, kept.line.model.latest + 1))
        before = readable(kept, seqs)
        work.catalogs.append(kept.catalog.rows("locks"))
        work.run(lambda one: do(one, work))
        after = readable(kept, seqs)
        assert len(work.images) > 20
        for image, rows in work.images:
            try:
                look_into(work, image, rows, before, after)
            except BaseException:
                print(f"replay: CDP_SEED={SEED} CDP_LONG={LONG}, {kind}, image {image.name}")
                raise
            shutil.rmtree(image)
        tally(f"power loss: {kind}", images=len(work.images), syncs=work.storage.syncs)
        assert interval_path(kept.line.directory, 6).exists()
