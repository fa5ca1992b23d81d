"""The core without NBD: timelines driven directly, each beside its model, with a clock and a host boot of the test's own.

The indexer is a process of its own, as in life: LMDB opens an environment once per process, and views are to find the
one that the indexer is writing.
"""

import atexit
import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from cdpserver.index import build, indexer, merging, store
from cdpserver.journal import control
from cdpserver.journal.begin import start_history
from cdpserver.journal.log import Journal
from cdpserver.journal.record import RECORD_SIZE
from cdpserver.journal.segment import SegmentWriter
from cdpserver.journal.writer import JournalWriter
from cdpserver.limits import INDEX_BATCH
from cdpserver.points import Timeline as Points
from cdpserver.state import StateDir
from cdpserver.target.connection import Connection
from cdpserver.target.disk import TargetDisk
from cdpserver.timeline import EmptyBase, ImageBase, PointBase, Timeline, create_timeline
from cdpserver.view.delta import Delta
from cdpserver.view.history import History
from cdpserver.view.layers import Layer
from cdpserver.view.view import View
from tests.model import BLOCK, Model, clip, read_log

ROOT = Path(__file__).resolve().parent.parent
SECOND_NS = 1_000_000_000
START_NS = 1_800_000_000 * SECOND_NS
PIECE = 1 << 20


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory where there is one: what these tests prove doesn't depend on a device."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="cdp-", dir=parent, ignore_cleanup_errors=True) as path:
        try:
            yield Path(path)
        except BaseException:
            store._open.clear()  # who failed may not have closed what it read
            raise
        forget_indexes()


def forget_indexes(under: Path = Path("/")) -> None:
    """Close the index environments that this process keeps open; nobody may be reading."""
    with store._open_lock:
        for path, file in list(store._open.items()):
            if path.is_relative_to(under):
                assert file.users == 0, f"{path} is still in use"
                file.env.close()
                del store._open[path]


# --- the indexer's process


class IndexerProcess:
    """Indexes what it is told to, when it is told to. Killed at any time, it starts anew at the next call."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.kill)

    def call(self, op: str, timeline: Path, boot: str, *, batch: int = 0) -> int:
        """How many records were indexed: `step` once, `drain` everything, `rebuild`. `close`: let go of the timeline.

        With `drain` indexes are merged, too, now more, now fewer of them. `merge` leaves at most `batch` side by side: how many
        files that took.
        """
        process = self._process
        if process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", "from tests.core import serve_indexer; serve_indexer()"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps([op, str(timeline), boot, batch]), file=process.stdin, flush=True)
        reply = json.loads(process.stdout.readline())
        assert "error" not in reply, reply["error"]
        return int(reply["done"])

    def kill(self) -> None:
        """SIGKILL it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


INDEXER = IndexerProcess()

MOSTS = itertools.cycle((1, 3, 2, 1, 4))
"""How many indexes side by side are left unmerged, in turn."""


def serve_indexer() -> None:
    """The loop of the indexer's process."""
    open_ones: dict[tuple[str, str], indexer.TimelineIndexer] = {}
    for line in sys.stdin:
        op, timeline, boot, batch = json.loads(line)
        cast(Any, indexer).INDEX_BATCH = batch or INDEX_BATCH
        cast(Any, build.catch_up).__kwdefaults__["batch"] = batch or INDEX_BATCH
        try:
            done = _serve(open_ones, op, timeline, boot, batch)
            print(json.dumps({"done": done}), flush=True)
        except Exception as error:  # noqa: BLE001 - the rim of a process: the test sees the error
            print(json.dumps({"error": repr(error)}), flush=True)


def _serve(
    open_ones: dict[tuple[str, str], indexer.TimelineIndexer], op: str, timeline: str, boot: str, batch: int
) -> int:
    key = (timeline, boot)
    if op == "close":
        if key in open_ones:
            open_ones.pop(key).close()
        return 0
    if op == "rebuild":
        return indexer.rebuild(Path(timeline), boot)
    if op == "merge":
        cast(Any, merging).MOST = batch or 1
        return merging.merge(Path(timeline))
    if key not in open_ones:
        open_ones[key] = indexer.TimelineIndexer(Path(timeline), boot)
    if op == "step":
        return open_ones[key].step(0.0)
    done = 0
    while True:
        before = open_ones[key]._interval
        added = open_ones[key].step(0.0)
        done += added
        if not added and open_ones[key]._interval == before:
            cast(Any, merging).MOST = next(MOSTS)
            merging.merge(Path(timeline))
            return done


# --- a state directory and its timelines


class World:
    """A state directory on one host, with its clock and its boots."""

    def __init__(self, path: Path) -> None:
        self.state = StateDir.create_or_open(path / "s")
        self.boots = 0
        self.now_ns = START_NS
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.lines: list[Line] = []
        self.paths: Counter[str] = Counter()

    @property
    def boot(self) -> str:
        """The host's boot id."""
        return f"{self.boots:08d}-boot"

    def emit(self, event: str, *, level: str = "info", **fields: Any) -> None:
        """What the server says goes here."""
        self.events.append((event, {"level": level, **fields}))

    def clock_ns(self) -> int:
        """The clock that every writer is given."""
        return self.now_ns

    def add(self, size: int, *, image: bytes | None = None) -> "Line":
        """A new disk: in its first copy, or on an image."""
        if image is None:
            return Line(self, self._timeline(size, EmptyBase()), Model(size))
        (self.state.bases / "b1.raw").write_bytes(image)
        model = Model(size)
        model.write(seq=0, time_ns=0, offset=0, data=image)
        return Line(self, self._timeline(size, ImageBase("bases/b1.raw"), "image"), model)

    def fork(self, parent: "Line", seq: int) -> "Line":
        """A new timeline on top of a point."""
        assert parent.disk.journal is not None
        parent.disk.journal.commit()
        # As the service resolves an instant: the last record at or before it, where seqs were jumped over.
        journal = Journal(parent.directory)
        seq = journal.at_seq(seq).seq
        journal.close()
        base = PointBase(parent.timeline.id, seq, self.now_ns)
        size = parent.model.size_at(seq)
        made = self._timeline(size, base, "point")
        return Line(self, made, Model(size, parent.model, seq))

    def _timeline(self, size: int, base: EmptyBase | ImageBase | PointBase, mode: str = "") -> Timeline:
        id = f"t{len(self.lines) + 1}"
        made = create_timeline(
            self.state,
            id=id,
            name=f"d{len(self.lines) + 1}",
            vm=None,
            size=size,
            base=base,
            now_ns=self.now_ns,
        )
        if mode:
            directory = self.state.timeline(id)
            start_history(directory, uuid=made.uuid, boot_id=self.boot, now_ns=self.now_ns, mode=mode)
        return made

    def reboot(self, *, clean: bool) -> None:
        """The host goes down, cleanly or by a loss of power that lost no page, and comes back."""
        for line in self.lines:
            line.close(clean=clean)
            INDEXER.call("close", line.directory, self.boot)
        forget_indexes(self.state.path)
        self.boots += 1
        for line in self.lines:
            line.open()

    def clone(self, path: Path) -> "World":
        """The same files in another place, and nothing open: what a dead host leaves, to be damaged."""
        shutil.copytree(self.state.path, path / "s")
        made = World(path)
        made.boots, made.now_ns = self.boots, self.now_ns
        models: dict[int, Model] = {}
        for line in self.lines:
            model = line.model
            copied = Model(model.size, None, model.parent_seq, list(model.changes), list(model.instants))
            copied.grown = list(model.grown)
            if model.parent is not None:
                copied.parent = models[id(model.parent)]
            models[id(model)] = copied
            copy = Line(made, line.timeline, copied, opened=False)
            copy.marks, copy.cuts = dict(line.marks), list(line.cuts)
        return made

    def close(self) -> None:
        """End of the test."""
        for line in self.lines:
            INDEXER.call("close", line.directory, self.boot)
            if line.is_open:
                line.close(clean=False)
        forget_indexes(self.state.path)


class Line:
    """A timeline, open for writing, and its model. Every write goes to both."""

    disk: TargetDisk

    def __init__(self, world: World, timeline: Timeline, model: Model, *, opened: bool = True) -> None:
        self.world = world
        self.timeline = timeline
        self.model = model
        self.directory = world.state.timeline(timeline.id)
        self.marks: dict[str, int] = {}
        self.cuts: list[int] = []
        self.is_open = False
        world.lines.append(self)
        if opened:
            self.open()

    def open(self) -> None:
        """The target takes the timeline over. A reader's instants begin with what is there."""
        world = self.world
        self.disk = TargetDisk(
            world.state.path, self.timeline, clock_ns=world.clock_ns, boot_id=world.boot, emit=world.emit
        )
        self.is_open = True
        self.connections: dict[int, Connection] = {}
        self._note()

    @property
    def writer(self) -> JournalWriter:
        """The open journal."""
        assert self.disk.journal is not None
        return self.disk.journal

    @property
    def last_seq(self) -> int:
        """Seq of the newest record; 0 in a first copy."""
        return self.disk.journal.last_seq if self.disk.journal is not None else 0

    def connection(self, number: int = 0) -> Connection:
        """One of the connections; made when first asked for."""
        if number not in self.connections:
            self.connections[number] = self.disk.connect()
        return self.connections[number]

    def disconnect(self, number: int = 0) -> None:
        """The client is gone."""
        if number in self.connections:
            self.connections.pop(number).close()
            self._note()

    def forget_after(self, seq: int) -> None:
        """What came after `seq` is lost."""
        self.model.changes = [change for change in self.model.changes if change.seq <= seq]
        self.model.instants = [instant for instant in self.model.instants if instant <= seq]
        while self.model.grown and self.model.grown[-1][0] > seq:
            self.model.size = self.model.grown.pop()[1]
        self.marks = {name: mark for name, mark in self.marks.items() if mark <= seq}
        self.cuts = [cut for cut in self.cuts if cut <= seq]

    def _note(self) -> None:
        if self.disk.journal is not None:
            self.model.remember(self.last_seq)

    def write(self, offset: int, data: bytes, number: int = 0) -> None:
        """A client's write."""
        self.connection(number).write(memoryview(data), offset)
        time_ns = self.disk.journal.last_time_ns if self.disk.journal else 0
        self.model.write(seq=self.last_seq, time_ns=time_ns, offset=offset, data=data)
        self._note()

    def zero(self, offset: int, length: int, number: int = 0, *, trim: bool = False) -> None:
        """A client's zero or trim."""
        self.connection(number).zero(offset, length, trim=trim)
        time_ns = self.disk.journal.last_time_ns if self.disk.journal else 0
        self.model.zero(seq=self.last_seq, time_ns=time_ns, offset=offset, length=length)
        self._note()

    def grow(self, size: int) -> None:
        """Its source has grown; clients connect anew to see it."""
        self.disk.grow(size)
        self.timeline = self.disk.timeline
        self.model.grow(seq=self.last_seq, size=size)
        self._note()
        for number in list(self.connections):
            self.disconnect(number)

    def synced(self, *, write_blocking: bool = True, observed: dict[str, Any] | None = None) -> None:
        """A controller's word."""
        self.disk.synced(None, write_blocking=write_blocking, observed=observed)
        self._note()

    def mark(self, name: str, at: tuple[int, int] | None = None) -> None:
        """A bookmark; of an earlier record `at` (seq, time) if that is given."""
        seq = self.writer.mark(control.mark(name, at=at))[0]
        self.marks[name] = seq if at is None else at[0]
        self._note()

    def cut(self) -> None:
        """A base point's cut."""
        number, seq, _ = self.writer.cut()
        assert number == len(self.cuts)
        self.cuts.append(seq)
        self._note()

    def close(self, *, clean: bool, junk: random.Random | None = None) -> None:
        """The target ends: cleanly, or killed (perhaps in the middle of a record)."""
        self.is_open = False
        if clean:
            for number in list(self.connections):
                self.disconnect(number)
            self.disk.shut(removing=False)
        else:
            abandon(self.disk, junk)

    # -- what must hold

    @contextlib.contextmanager
    def view(self, seq: int) -> Iterator[View]:
        """The disk at `seq`, as an export opens it."""
        with (
            contextlib.closing(History(self.world.state.path, self.timeline, self.world.boot)) as history,
            contextlib.closing(View(history, seq)) as view,
        ):
            self.world.paths[path_of(view)] += 1
            yield view

    @contextlib.contextmanager
    def points(self) -> Iterator[Points]:
        """The timeline's points."""
        history = History(self.world.state.path, self.timeline, self.world.boot)
        try:
            yield Points(history)
        finally:
            history.close()

    def check(self, seq: int) -> None:
        """The view at `seq` is the model's."""
        with self.view(seq) as view:
            check_view(view, self.model, seq)

    def check_live(self, offset: int, length: int, number: int = 0) -> None:
        """What a client of the target reads is what was written last."""
        buffer = bytearray(length)
        seq = self.model.latest if self.disk.journal is not None else 0
        self.connection(number).read_into(memoryview(buffer), offset)
        assert bytes(buffer) == self.model.read(seq, offset, length)
        runs = self.connection(number).status(offset, length, one=False) if length else []
        check_runs(runs, self.model, seq, offset, offset + length, whole=self.disk.journal is not None)

    def check_delta(self, seq: int, old: "Line", old_seq: int) -> None:
        """What changed since an older instant of the same line of history."""
        with self.view(seq) as new_view, old.view(old_seq) as old_view:
            check_delta(Delta(new_view, old_view), self.model, seq, old.model, old_seq)


def path_of(view: View) -> str:
    """How a view finds its newest content: what a test of many histories must have seen all of."""
    if not view._layers:
        return "base"
    layer = view._layers[0]
    assert isinstance(layer, Layer)
    tail = layer.tail is not None and len(layer.tail) > 0
    index = layer._file is not None and layer._file.indexed() > 0
    kind = "closed" if layer._file is not None and layer._keep else "open"
    name = "+".join([kind] * index + ["tail"] * tail) or "nothing"
    more = sum(isinstance(layer, Layer) for layer in view._layers) > 1
    return f"{name}, more intervals unindexed" if more else name


def check_view(view: View, model: Model, seq: int) -> None:
    """Size, content and block status of a whole view."""
    assert view.size == model.size_at(seq)
    touched = clip(model.touched(), 0, view.size)
    for start, end in touched:
        for at in range(start, end, PIECE):
            length = min(PIECE, end - at)
            held, expected = view.read(at, length), model.read(seq, at, length)
            if held != expected:
                first = next(i for i in range(length) if held[i] != expected[i])
                raise AssertionError(f"seq {seq}: byte {at + first} is {held[first]}, not {expected[first]}")
    dice = random.Random(seq)
    for start, end in dice.choices(touched or [(0, view.size)], k=6):
        # Single blocks are looked up in another way than ranges.
        offset = dice.randrange(start, end)
        if dice.random() < 0.5:
            offset = offset // BLOCK * BLOCK
        length = min(dice.choice((1, 512, BLOCK, 3 * BLOCK, 70_000)), view.size - offset)
        assert view.read(offset, length) == model.read(seq, offset, length)
    at = 0
    while at < view.size:
        runs = view.status(at, view.size, one=True)
        check_runs(runs, model, seq, at, view.size, whole=False)
        at = runs[-1][1]
    check_runs(view.status(0, view.size, one=False), model, seq, 0, view.size, whole=True)


def check_runs(
    runs: list[tuple[int, int, bool]], model: Model, seq: int, start: int, end: int, *, whole: bool
) -> None:
    """Block status follows on without holes, and never claims that data is zero."""
    at = start
    for low, high, zero in runs:
        assert low == at < high <= end, (runs, start, end)
        assert not zero or model.is_zero(seq, low, high), f"seq {seq}: [{low}, {high}) is no zero"
        at = high
    assert at == end or not whole
    assert runs or start == end


def check_delta(delta: Delta, new: Model, new_seq: int, old: Model, old_seq: int) -> None:
    """Unchanged ranges are unchanged, the others read as the newer content; they cover the disk."""
    ranges = new.touched()
    at = 0
    for low, high, bits in delta.status(0, delta.size, one=False):
        assert low == at < high
        at = high
        for start, end in clip(ranges, low, high):
            expected = new.read(new_seq, start, end - start)
            if bits == 1:
                assert expected == old.read(old_seq, start, end - start), f"[{start}, {end}) is no hole"
                continue
            assert bits == 0 or not expected.strip(b"\0")
            buffer = bytearray(end - start)
            delta.read_into(buffer, start)
            assert buffer == expected
    assert at == delta.size


def check_log(line: Line) -> None:
    """The files alone tell the same history as the model; instants between two requests come from them."""
    records = read_log(line.directory)
    for seq in line.model.instants[-3:]:
        told = replay_at(line, seq)
        for start, end in line.model.touched():
            assert told.read(seq, start, end - start) == line.model.read(seq, start, end - start)
    # After a loss of power seqs go on far behind the last record that is left.
    assert records[-1].seq <= line.last_seq


def replay_at(line: Line, seq: int) -> Model:
    """The disk at any seq, as the files tell it."""
    from tests.model import replay

    return replay(read_log(line.directory), line.model, seq)


# --- kills


def abandon(disk: TargetDisk, junk: random.Random | None = None) -> None:
    """What a SIGKILL leaves: files as they are, locks and leases free. `junk`: it struck in the middle of a record."""
    if disk.journal is not None:
        writer = disk.journal
        if junk is not None:
            _half_a_record(writer._segment, junk)
        for segment in [*writer._retired, writer._segment]:
            segment.close()
        writer._broken = "killed"
    if disk.reads is not None:
        disk.reads.close()
    if disk.first_copy is not None:
        disk.first_copy.close()
    os.close(disk._lock_fd)


def _half_a_record(segment: SegmentWriter, junk: random.Random) -> None:
    os.pwrite(segment.data_fd, junk.randbytes(junk.randrange(1, 9000)), segment.place)
    if junk.random() < 0.5 and segment.window is not None:
        at = (segment.count - segment.window_start) * RECORD_SIZE
        length = junk.randrange(1, RECORD_SIZE)
        if at + length <= len(segment.window):
            segment.window[at : at + length] = junk.randbytes(length)


def remove(path: Path) -> None:
    """A whole tree."""
    shutil.rmtree(path, ignore_errors=True)
