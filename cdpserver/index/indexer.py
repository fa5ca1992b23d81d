"""The indexer process: follows every journal and keeps the intervals' indexes up to date.

One process writes all indexes (LMDB has one writer per environment, and SIGKILL may hit it at any time: an unfinished
transaction is invisible). It finds work by looking at tail words: often while a timeline is busy, seldom while it rests, and
then with all its files closed.
Stopped or killed it costs reading speed, never truth. A flock per timeline keeps a rebuild and the indexer apart.
"""

import argparse
import ctypes
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from cdpserver import events, mapped
from cdpserver.clock import boot_id
from cdpserver.errors import CdpError, CorruptError, RefusedError
from cdpserver.index.build import catch_up, close_index
from cdpserver.index.merged import DIRECTORY as MERGED
from cdpserver.index.merger import Merger
from cdpserver.index.rest import Newest, Rest
from cdpserver.index.store import CLOSED_NAME, IndexFile, open_name
from cdpserver.journal.links import Chain
from cdpserver.journal.log import Journal, interval_path
from cdpserver.limits import INDEX_BATCH
from cdpserver.priority import go_before_workers
from cdpserver.state import StateDir

BUSY_S = 0.05
"""Pause between looks at timelines that had work lately."""

CALM_S = 0.5
"""Longest pause for a timeline with few records at a time: a transaction costs as much as hundreds of them."""

FEW = 1000
"""Records of a look that are few."""

IDLE_S = 1.0
"""Pause from which on a timeline is at rest and its files are closed."""

REST_S = 2.0
"""Longest pause for a timeline at rest; a view folds what was written meanwhile, and it cannot be too much."""

OPEN_TIMELINES = 512
"""Timelines with open files, six each and 64 GiB of address space; beyond that those looked at longest ago are closed."""

M_MMAP_THRESHOLD = -3
"""mallopt(3)."""

LARGE_BLOCK = 256 << 10

LINKS = 4
"""Segments linked at a look: 10 ms each."""

NAP_S = 0.02
"""Shortest pause of the process: looks at many timelines come together."""

LIST_S = 1.0
"""How often new timelines are looked for."""


@contextmanager
def index_lock(timeline: Path) -> Iterator[bool]:
    """Hold the timeline's index lock; False when somebody else does."""
    fd = os.open(timeline / "index.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


class TimelineIndexer:
    """The indexes of one timeline."""

    def __init__(self, timeline: Path, boot: str) -> None:
        self.timeline = timeline
        self.due = 0.0
        self.looked = 0.0
        """When its files were used last."""
        self.damage = ""
        self.unproven = ""
        """Why the hash chain does not go on."""

        self.remade = ""
        """Why the open index was made anew from the records."""

        self.closed = False
        """Has it closed an interval, whose index may be merged with others?"""
        self._boot = boot
        self._pause = BUSY_S
        self._journal: Journal | None = None
        self._open: IndexFile | None = None
        self._interval = 0
        self._rest: Rest | None = None
        self._linked: Path | None = None
        """The newest header log when all before it had their links."""

    def step(self, now: float) -> int:
        """Index at most one batch; how many records. Sets when to look again."""
        added = 0
        if self._rest is None or not self._rest.lasts():
            added = self._look(now)
        self._pause = self._next_pause(added)
        self.due = now if added >= INDEX_BATCH else now + self._pause
        if self._rest is not None and self._pause >= IDLE_S:
            self._close_files()
        return added

    def _look(self, now: float) -> int:
        if self._rest is not None and self._open is None and not self._rest.index_stands():
            self._interval = 0  # as when it is replaced while open: older ones may be missing too
        self.looked, self._rest = now, None
        newest = Newest.of(self._journal)
        with index_lock(self.timeline) as mine:
            added = self._advance() if mine else 0
            if mine:
                self._link()
        if mine and not added:
            self._rest = Rest.of(newest, self._journal, self._open)
        return added

    def _link(self) -> None:
        """Let the hash chain go on over what has been sealed. Where it cannot, indexing goes on all the same."""
        if self._journal is None or self._journal.empty:
            return
        newest = self._journal.newest()[1]
        if newest.path == self._linked:
            return
        try:
            with Chain.open(self.timeline, newest.header.timeline) as chain:
                all_linked = chain.catch_up(LINKS)
            self.unproven = ""
        except FileNotFoundError:
            return  # dropped or thinned meanwhile: the next look knows
        except (CdpError, OSError) as error:
            self.unproven, all_linked = str(error), True
        if all_linked:
            self._linked = newest.path

    def _next_pause(self, added: int) -> float:
        if added >= FEW:
            return BUSY_S
        if added:
            return min(CALM_S, self._pause * 1.5) if self._pause <= CALM_S else BUSY_S
        return min(REST_S, self._pause * 1.5)

    @property
    def is_open(self) -> bool:
        """Does it hold files?"""
        return self._journal is not None

    def _advance(self) -> int:
        journal = self._journal
        if journal is None or journal.empty:
            journal = self._journal = Journal(self.timeline)
            if journal.empty:
                return 0
        journal.newest()
        if not self._interval or self._replaced():
            self._let_go()
            journal.refresh()  # an interval that was thinned meanwhile has other segments
            self._interval = self._first_open(journal)
        index = self._environment(self._interval)
        added = catch_up(journal, self._interval, index)
        if added < INDEX_BATCH and journal.intervals[-1] > self._interval:
            # Nothing is appended to an interval once the next one exists; what came last is taken first.
            added += catch_up(journal, self._interval, index, batch=1 << 40)
            self._close_interval(index)
        return added

    def _first_open(self, journal: Journal) -> int:
        """The oldest interval without a finished index; left-overs of other boots go."""
        found = 0
        for interval in journal.intervals:
            directory = interval_path(self.timeline, interval)
            closed = (directory / CLOSED_NAME).exists()
            for path in directory.glob("open-*.mdb*"):
                if closed or not path.name.startswith(open_name(self._boot)):
                    path.unlink()
            if not closed and not found:
                found = interval
        return found or journal.intervals[-1]

    def _replaced(self) -> bool:
        """Was the open index rebuilt or removed behind our back? Then older ones may be missing too."""
        if self._open is None:
            return False
        path = self._open.path
        return not path.exists() or path.stat().st_ino != self._open.inode

    def _environment(self, interval: int) -> IndexFile:
        if self._open is None:
            path = interval_path(self.timeline, interval) / open_name(self._boot)
            try:
                self._open = IndexFile(path, writable=True)
            except mapped.DAMAGE as error:
                self.remade = str(error)
                for left in (path, Path(f"{path}-lock")):
                    left.unlink(missing_ok=True)
                self._open = IndexFile(path, writable=True)
            self._open.env.reader_check()
        return self._open

    def _close_interval(self, index: IndexFile) -> None:
        directory = interval_path(self.timeline, self._interval)
        close_index(directory, index)
        self.closed = True
        self._let_go()
        for path in directory.glob("open-*.mdb*"):
            path.unlink()
        assert self._journal is not None
        later = [number for number in self._journal.intervals if number > self._interval]
        self._interval = self._first_open_after(later)

    def _first_open_after(self, later: list[int]) -> int:
        for interval in later:
            if not (interval_path(self.timeline, interval) / CLOSED_NAME).exists():
                return interval
        return later[-1]

    def _let_go(self) -> None:
        if self._open is not None:
            self._open.env.close()
            self._open = None

    def close(self) -> None:
        """Close everything; nothing is made durable, since nothing needs to be."""
        self._rest = None
        self._close_files()

    def _close_files(self) -> None:
        self._let_go()
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def rebuild(timeline: Path, boot: str, *, only: int | None = None) -> int:
    """Throw every index of a timeline away, or that of one interval, and make it anew from the segments; records indexed.

    Raises CorruptError at damage, with everything before it indexed.
    """
    with index_lock(timeline) as mine:
        if not mine:
            raise RefusedError(f"the index of {timeline.name} is being written", hint="try again in a moment")
        which = "[0-9]*" if only is None else f"{only:06d}"
        for path in (*(timeline / "intervals").glob(f"{which}/*.mdb*"), *(timeline / MERGED).glob("[0-9]*")):
            path.unlink()
        indexer = TimelineIndexer(timeline, boot)
        total = 0
        try:
            while True:
                interval = indexer._interval
                added = indexer._advance()
                total += added
                if not added and interval == indexer._interval:
                    return total
        finally:
            indexer.close()


def run(state: StateDir) -> None:
    """Follow every timeline for ever."""
    log = events.EventLog(state.events)
    boot = boot_id()
    timelines: dict[str, TimelineIndexer] = {}
    merger = Merger(state.path)
    listed = -LIST_S
    while True:
        now = time.monotonic()
        if now - listed >= LIST_S:
            listed = now
            _list(state, timelines, boot)
        for name, indexer in list(timelines.items()):
            if indexer.due <= now:
                _step(name, indexer, now, log)
            if indexer.closed:
                indexer.closed = False
                merger.want(indexer.timeline)
        _close_some(timelines)
        merger.step(now, [indexer.timeline for indexer in timelines.values()])
        due = min((indexer.due for indexer in timelines.values()), default=now + LIST_S)
        pause = min(due, listed + LIST_S) - time.monotonic()
        if pause > 0:
            time.sleep(max(NAP_S, pause))


def _list(state: StateDir, timelines: dict[str, TimelineIndexer], boot: str) -> None:
    """Take up timelines that are new, and let go of those that are gone."""
    present = set(os.listdir(state.timelines))
    for name in present - timelines.keys():
        if (state.timelines / name / "timeline.json").exists():
            timelines[name] = TimelineIndexer(state.timelines / name, boot)
    for name in timelines.keys() - present:
        timelines.pop(name).close()


def _close_some(timelines: dict[str, TimelineIndexer]) -> None:
    """Keep to the limit: close what has been looked at longest ago."""
    held = [indexer for indexer in timelines.values() if indexer.is_open]
    if len(held) > OPEN_TIMELINES:
        held.sort(key=lambda indexer: indexer.looked)
        for indexer in held[: len(held) - OPEN_TIMELINES]:
            indexer.close()


def _step(name: str, indexer: TimelineIndexer, now: float, log: events.EventLog) -> None:
    unproven = indexer.unproven
    try:
        indexer.step(now)
        indexer.damage = ""
        if indexer.remade:
            log.emit("indexer.made-anew", level="warning", timeline=name, reason=indexer.remade)
            indexer.remade = ""
        if indexer.unproven not in ("", unproven):
            log.emit("chain.damaged", level="error", timeline=name, reason=indexer.unproven)
    except FileNotFoundError:
        indexer.due = now + IDLE_S  # being removed: a listing drops it when it is gone
        indexer.close()
    except CorruptError as error:
        indexer.due = now + 10 * IDLE_S
        if indexer.damage != str(error):
            log.emit("indexer.damage", level="error", timeline=name, reason=str(error))
        indexer.damage = str(error)
    except (OSError, lmdb.Error) as error:
        # A full disk or a broken environment: the index is disposable, so it is made again later.
        indexer.due = now + 5 * IDLE_S
        if indexer.damage != repr(error):
            log.emit("indexer.failed", level="error", timeline=name, reason=repr(error))
        indexer.damage = repr(error)
        indexer.close()


def _return_memory() -> None:
    """Let glibc keep large blocks off its heap for good.

    LMDB allocates 3 MiB for a writable environment and touches little of it. Once one of those was freed, glibc would take
    later ones from its heap, where all of it is touched and little is returned: 2 MiB for each timeline.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none, and no such habit
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def main() -> None:
    """Entry point of `python -m cdpserver.index.indexer`."""
    parser = argparse.ArgumentParser(description="index every journal of a state directory")
    parser.add_argument("--state-dir", type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _return_memory()
    go_before_workers()
    events.configure("indexer")
    run(StateDir.open(options.state_dir))


if __name__ == "__main__":
    main()
