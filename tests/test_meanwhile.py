"""History is dropped between a listing and the opening of what was listed; and nobody keeps open what is gone.

Each drop is a real one, made right before a reader opens a file of the interval: the reader has listed it, and it is not there.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver import basepoint, durable, timeline
from cdpserver.clock import Clock
from cdpserver.config import Config
from cdpserver.errors import CorruptError, RefusedError, UsageError
from cdpserver.events import EventLog
from cdpserver.held import hold
from cdpserver.index import store
from cdpserver.index.store import LINGER_S, close_unused, find_index, open_index, release
from cdpserver.journal import links, log
from cdpserver.journal.log import interval_path
from cdpserver.journal.record import RECORD_SIZE
from cdpserver.journal.segment import PAGE, SegmentReader, log_path
from cdpserver.names import At, Latest, Seq
from cdpserver.nodes import nodes, read_header
from cdpserver.points import Timeline as Points
from cdpserver.retention.facts import gather
from cdpserver.retention.usage import read_spans
from cdpserver.service import facts, processes
from cdpserver.service.control import Targets
from cdpserver.service.core import Core
from cdpserver.service.instants import Instants
from cdpserver.stretches import stretches
from cdpserver.target.reads import LiveReads
from cdpserver.view.delta import touched
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.core import Line, scratch
from tests.islands import publish
from tests.model import BLOCK
from tests.test_prune import SIZE, Kept
from tests.test_service import until
from tools.soaking.trend import deleted, open_files

DOOMED = (1, 2, 3, 4)
"""Of seven intervals, the last of them open."""

LATE = (18, 25)
"""Seqs of what stays."""


@pytest.fixture(scope="module")
def template() -> Iterator[Kept]:
    with scratch() as path, contextlib.closing(Kept(path, hours=2)) as found:
        yield found


@pytest.fixture
def kept(template: Kept, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    monkeypatch.setenv("CDP_BOOT_ID", template.world.boot)
    with scratch() as path, contextlib.closing(template.clone(path / "copy")) as found:
        yield found


class Dropping:
    """Drops an interval right before a file of it is opened, for as long as there are some to be dropped."""

    def __init__(self, kept: Kept, monkeypatch: pytest.MonkeyPatch, doomed: tuple[int, ...] = DOOMED) -> None:
        self._directory = kept.line.directory
        self._doomed = set(doomed)
        self._busy = False
        self.dropped: list[int] = []
        opens = SegmentReader.__init__

        def opened(reader: SegmentReader, directory: Path, segment: int) -> None:
            if directory.parent == self._directory / "intervals" and not self._busy:
                self._drop(int(directory.name))
            opens(reader, directory, segment)

        monkeypatch.setattr(SegmentReader, "__init__", opened)

    def _drop(self, number: int) -> None:
        if number in self._doomed:
            self._busy = True
            drop(self._directory, number)
            self._busy = False
            self._doomed.remove(number)
            self.dropped.append(number)


def drop(directory: Path, number: int) -> None:
    """As a pass does."""
    with links.Chain.open(directory, timeline.load(directory).uuid) as chain:
        chain.drop(number, reason="a test")
    durable.remove_tree(interval_path(directory, number))


@contextlib.contextmanager
def history_of(kept: Kept) -> Iterator[History]:
    with contextlib.closing(History(kept.world.state.path, kept.line.timeline, kept.world.boot)) as history:
        yield history


def core_of(kept: Kept) -> Core:
    """What the service has of its own, without its processes; its time stands still."""
    state = kept.world.state
    clock = Clock(kept.world.boot, -(1 << 62), kept.world.now_ns)
    return Core(state, Config(), clock, kept.catalog, EventLog(state.events), Targets(state, 1))


def point(look: Callable[[Points, int], Any]) -> Callable[[Kept], Any]:
    """A look at the points, as who has only the files takes it."""

    def taken(kept: Kept) -> Any:
        with history_of(kept) as history:
            return look(Points(history), kept.world.now_ns)

    return taken


def history_look(look: Callable[[History], Any]) -> Callable[[Kept], Any]:
    def taken(kept: Kept) -> Any:
        with history_of(kept) as history:
            return look(history)

    return taken


LOOKS: dict[str, Callable[[Kept], Any]] = {
    "points": point(lambda points, now_ns: points.points(now_ns=now_ns)),
    "points by the minute": point(lambda points, now_ns: points.points(now_ns=now_ns, every_ns=60 * 10**9)),
    "count": point(lambda points, now_ns: points.count(now_ns=now_ns)),
    "a bookmark that there is not": point(lambda points, now_ns: points.bookmark("none")),
    "latest": point(lambda points, now_ns: points.resolve(Latest(), now_ns=now_ns)),
    "stretches": point(lambda points, now_ns: stretches(points, now_ns=now_ns)),
    "cuts": history_look(basepoint.all_cuts),
    "pending": history_look(basepoint.pending),
    "changed": history_look(basepoint.changed_since_cut),
    "touched": history_look(lambda history: [part.tolist() for part in touched(history, *LATE)]),
    "spans": lambda kept: read_spans(kept.line.directory),
    "facts": lambda kept: gather(
        kept.world.state, kept.catalog, Config(), kept.entry, now_ns=kept.world.now_ns
    ),
    "the service's points": lambda kept: Instants(core_of(kept))._points(kept.entry, None, None, None, None),
    "the service's pages": lambda kept: Instants(core_of(kept))._points_after(
        kept.entry, None, None, None, None, 1000
    ),
    "the service's latest": lambda kept: Instants(core_of(kept))._show(kept.entry, Latest()),
    "the service's disk": lambda kept: [
        value
        for key, value in facts.describe(core_of(kept), kept.entry, {}).items()
        if key in ("state", "points")
    ],
}


SEEN_WHOLE = ("points", "count", "stretches", "spans", "facts", "the service's points", "the service's disk")
"""Looks that open every interval."""


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_finds_what_is_there_in_the_end(
    name: str, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = LOOKS[name]
    before = look(kept)
    with monkeypatch.context() as patched:
        dropping = Dropping(kept, patched)
        found = look(kept)
    assert found == look(kept)
    if name in SEEN_WHOLE:
        assert sorted(dropping.dropped) == list(DOOMED) and found != before, "what the test is about"


@pytest.mark.parametrize("by", ["seq", "time"])
def test_an_instant_of_what_is_dropped_is_refused(
    by: str, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq, now_ns = kept.inside(2), kept.world.now_ns
    with history_of(kept) as history:
        time_ns = Points(history).resolve(Seq(seq), now_ns=now_ns).time_ns + 1
    Dropping(kept, monkeypatch)
    with (
        history_of(kept) as history,
        pytest.raises(UsageError, match=r"not kept any more.*nearest before.*nearest after"),
    ):
        hold(history, Seq(seq) if by == "seq" else At(time_ns), now_ns)


def test_a_view_stands_on_what_is_there(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies below it goes while it is opened, and while it is read."""
    seq = kept.inside(6)
    content = kept.line.model.read(seq, 0, SIZE)
    with monkeypatch.context() as patched, history_of(kept) as history:
        opening = Dropping(kept, patched, (1, 2, 5))
        with contextlib.closing(View(history, seq)) as view:
            reading = Dropping(kept, patched, (3, 4))
            assert view.read(0, SIZE) == content
    assert opening.dropped + reading.dropped and not [file for file in store._open.values() if file.users]
    assert kept.read(seq) == content


def reads_of(kept: Kept) -> LiveReads:
    return LiveReads(History(kept.world.state.path, kept.line.timeline, kept.world.boot))


def test_the_newest_content_is_read_on(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    dropping, content = Dropping(kept, monkeypatch), newest(kept)
    with contextlib.closing(reads_of(kept)) as reads:
        for block in range(SIZE // BLOCK):
            assert latest(reads, block * BLOCK, BLOCK) == content[block * BLOCK :][:BLOCK]
        for number in set(DOOMED) - set(dropping.dropped):
            drop(kept.line.directory, number)
        reads.tidy()
        assert latest(reads, 0, SIZE) == content


def latest(reads: LiveReads, offset: int, length: int) -> bytes:
    """What a client reads of the disk."""
    buffer = bytearray(length)
    reads.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def newest(kept: Kept) -> bytes:
    return kept.line.model.read(kept.line.model.instants[-1], 0, SIZE)


def test_what_is_missing_though_nothing_was_dropped_is_said(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that somebody takes away is damage, and no reason to look for ever."""
    opens, looks = SegmentReader.__init__, 0

    def opened(reader: SegmentReader, directory: Path, segment: int) -> None:
        nonlocal looks
        looks += 1
        if int(directory.name) == 3:
            log_path(directory, segment).unlink(missing_ok=True)
        opens(reader, directory, segment)

    monkeypatch.setattr(SegmentReader, "__init__", opened)
    with history_of(kept) as history:
        with pytest.raises(FileNotFoundError):
            Points(history).points(now_ns=kept.world.now_ns)
        with pytest.raises(FileNotFoundError):
            Points(history).count(now_ns=kept.world.now_ns)
    assert looks < 20
    with history_of(kept) as history, pytest.raises(CorruptError, match="holds no segment"):
        Points(history).points(now_ns=kept.world.now_ns)


def test_what_goes_faster_than_it_is_read_is_refused(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LOOKS", len(DOOMED))
    dropping = Dropping(kept, monkeypatch)
    with history_of(kept) as history:
        with pytest.raises(RefusedError, match=r"faster than it can be read.*cdp job list"):
            Points(history).points(now_ns=kept.world.now_ns)
        assert sorted(dropping.dropped) == list(DOOMED)
        assert Points(history).points(now_ns=kept.world.now_ns)


def test_a_merged_base_point_is_refused_or_found_elsewhere(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file goes between the look at the notes and the opening."""
    node = next(node for node in nodes(kept.line.directory) if node.interval == 2)
    for number in DOOMED:
        drop(kept.line.directory, number)

    def goes(path: Path) -> tuple[str, int]:
        path.unlink(missing_ok=True)
        return read_header(path)

    with history_of(kept) as history:
        assert history.size_at(node.seq) == SIZE
        monkeypatch.setattr("cdpserver.view.history.read_header", goes)
        with pytest.raises(RefusedError, match="not kept any more"):
            history.size_at(node.seq)


# --- what stays open


def mine(line: Line) -> list[str]:
    """What this process has open of a timeline."""
    return [path for path in open_files(os.getpid()) if path.startswith(f"{line.directory}/intervals/")]


def test_an_index_that_nobody_uses_is_closed_after_a_while(kept: Kept) -> None:
    paths = [find_index(interval_path(kept.line.directory, number), kept.world.boot) for number in (1, 2)]
    assert paths[0] is not None and paths[1] is not None
    one, other = open_index(paths[0]), open_index(paths[1])
    assert one is not None and other is not None
    release(other)
    now_s = time.monotonic()
    assert close_unused(now_s) and len(store._open) == 2
    assert open_index(paths[1]) is other, "who asks again finds it open"
    release(other)
    assert not close_unused(time.monotonic() + LINGER_S) and list(store._open) == [paths[0]]
    drop(kept.line.directory, 1)
    assert deleted(mine(kept.line), kept.line.directory), "it is in use"
    assert open_index(paths[0]) is None
    release(one)
    close_unused(time.monotonic() + LINGER_S)
    assert mine(kept.line) == []


def test_a_disk_at_rest_keeps_nothing_open_to_read_from(kept: Kept) -> None:
    content = newest(kept)
    with contextlib.closing(reads_of(kept)) as reads:
        assert latest(reads, 0, SIZE) == content
        reads.tidy()
        assert len(mine(kept.line)) > 5, "it was read a moment ago"
        reads.tidy()
        close_unused(time.monotonic() + LINGER_S)
        assert mine(kept.line) == []
        assert latest(reads, 0, SIZE) == content
        for number in DOOMED:
            drop(kept.line.directory, number)
        assert deleted(mine(kept.line), kept.line.directory), "what the test is about"
        reads.tidy()
        close_unused(time.monotonic() + LINGER_S)
        assert mine(kept.line) == [], "something was gone: nothing is kept"
        assert latest(reads, 0, SIZE) == content
        reads.tidy()
        assert mine(kept.line), "nothing is gone"
    reads.tidy()
    close_unused(time.monotonic() + LINGER_S)
    assert mine(kept.line) == []


def test_a_disk_that_rested_while_all_it_had_listed_went_is_read(kept: Kept) -> None:
    """It was written and cut, and its history dropped, while nobody read it."""
    line = kept.line
    line.open()
    line.write(0, b"a" * BLOCK)
    line.synced()
    reads = line.disk.reads
    assert reads is not None
    reads.tidy()
    reads.tidy()
    for number in (6, 7):
        line.write(number * BLOCK, b"b" * BLOCK)
        line.cut()
        line.write(0, b"c" * BLOCK)
        publish(line, number)
    for number in range(1, 8):
        drop(line.directory, number)
    line.check_live(0, SIZE)


def test_a_view_that_cannot_be_opened_leaves_nothing_open(kept: Kept) -> None:
    """It has opened the newest index when it finds the record that comes after what is indexed damaged."""
    with history_of(kept) as history:
        reader = history.journal.newest()[1]
        with open(reader.path, "r+b") as log_file:
            log_file.seek(PAGE + (reader.count - 1) * RECORD_SIZE + 30)
            log_file.write(b"\xff")
        with pytest.raises(CorruptError, match="is damaged"):
            View(history, reader.last_seq)
        assert store._open and not [path for path, file in store._open.items() if file.users]


def test_what_is_started_gets_no_index(kept: Kept, tmp_path: Path) -> None:
    """LMDB leaves its files to children, and one that runs as long as the service would keep the room of what is dropped."""
    path = find_index(interval_path(kept.line.directory, 1), kept.world.boot)
    assert path is not None
    file = open_index(path)
    assert file is not None
    pid = processes.spawn(tmp_path / "sleeps.pid", ["sleep", "600"])
    try:
        until(lambda: processes.start_time(pid) and (tmp_path / "sleeps.pid").exists(), "child")
        assert not [name for name in open_files(pid) if str(kept.world.state.path) in name]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        release(file)


def test_a_child_that_could_not_note_itself_is_noted_later(tmp_path: Path) -> None:
    """As where the store was full when it began: the next service would not know of it, nor end it."""
    note = tmp_path / "run" / "sleeps.pid"
    pid = processes.spawn(note, ["sleep", "600"])
    try:
        until(lambda: "sleep" in Path(f"/proc/{pid}/comm").read_text(), "child")
        assert not processes.note(note, pid) and not note.exists(), "there is no room yet"
        note.parent.mkdir()
        assert not processes.note(note, pid) and processes.note(note, pid)
        assert processes.kill_orphans([note]) == ["sleeps"]
    finally:
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
