"""The indexer process: follows every journal and keeps the intervals' indexes up to date.

One process writes all indexes (LMDB has one writer per environment, and SIGKILL may hit it at any time: an unfinished
transaction is invisible). It finds work by looking at tail words: often while a timeline is busy, seldom while it rests.
Stopped or killed it costs reading speed, never truth. A flock per timeline keeps a rebuild and the indexer apart.
"""

import argparse
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from cdpserver import events
from cdpserver.clock import boot_id
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.index.build import catch_up, close_index
from cdpserver.index.store import CLOSED_NAME, IndexFile, open_name
from cdpserver.journal.log import Journal, interval_path
from cdpserver.limits import INDEX_BATCH
from cdpserver.state import StateDir

BUSY_S = 0.05
"""Pause between looks at timelines that had work lately."""

IDLE_S = 1.0
"""Longest pause for a timeline at rest; a view folds what was written meanwhile."""

LIST_S = 1.0
"""How often new timelines are looked for."""


@contextmanager
def index_lock(timeline: Path) -> Iterator[bool]:
    """Hold the timeline's index lock; False when somebody else does."""
    fd = os.open(timeline / "index.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        yield False
        return
    try:
        yield True
    finally:
        os.close(fd)


class TimelineIndexer:
    """The indexes of one timeline."""

    def __init__(self, timeline: Path, boot: str) -> None:
        self.timeline = timeline
        self.due = 0.0
        self.damage = ""
        self._boot = boot
        self._pause = BUSY_S
        self._journal: Journal | None = None
        self._open: IndexFile | None = None
        self._interval = 0

    def step(self, now: float) -> int:
        """Index at most one batch; how many records. Sets when to look again."""
        with index_lock(self.timeline) as mine:
            added = self._advance() if mine else 0
        self._pause = BUSY_S if added else min(IDLE_S, self._pause * 1.5)
        self.due = now if added >= INDEX_BATCH else now + self._pause
        return added

    def _advance(self) -> int:
        journal = self._journal
        if journal is None or journal.empty:
            journal = self._journal = Journal(self.timeline)
            if journal.empty:
                return 0
        journal.newest()
        if not self._interval or self._replaced():
            self._let_go()
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
            self._open = IndexFile(path, writable=True)
            self._open.env.reader_check()
        return self._open

    def _close_interval(self, index: IndexFile) -> None:
        directory = interval_path(self.timeline, self._interval)
        close_index(directory, index)
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
        self._let_go()
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def rebuild(timeline: Path, boot: str) -> int:
    """Throw every index of a timeline away and make it anew from the segments; records indexed.

    Raises CorruptError at damage, with everything before it indexed.
    """
    with index_lock(timeline) as mine:
        if not mine:
            raise RefusedError(f"the index of {timeline.name} is being written", hint="try again in a moment")
        for path in (timeline / "intervals").glob("*/*.mdb*"):
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
    listed = -LIST_S
    while True:
        now = time.monotonic()
        if now - listed >= LIST_S:
            listed = now
            present = {path.name for path in state.timelines.iterdir() if (path / "timeline.json").exists()}
            for name in present - timelines.keys():
                timelines[name] = TimelineIndexer(state.timelines / name, boot)
            for name in timelines.keys() - present:
                timelines.pop(name).close()
        for name, indexer in list(timelines.items()):
            if indexer.due <= now:
                _step(name, indexer, now, log)
        due = min((indexer.due for indexer in timelines.values()), default=now + LIST_S)
        time.sleep(max(0.0, min(due, listed + LIST_S) - time.monotonic()))


def _step(name: str, indexer: TimelineIndexer, now: float, log: events.EventLog) -> None:
    try:
        indexer.step(now)
        indexer.damage = ""
    except FileNotFoundError:
        indexer.due = now + IDLE_S  # being removed: the next listing drops it
    except CorruptError as error:
        indexer.due = now + 10 * IDLE_S
        if indexer.damage != str(error):
            log.emit("indexer.damage", level="error", timeline=name, reason=str(error))
        indexer.damage = str(error)
    except (OSError, lmdb.Error) as error:
        # A full disk or a broken environment: the index is disposable, so it is made again later.
        indexer.due = now + 5 * IDLE_S
        log.emit("indexer.failed", level="error", timeline=name, reason=repr(error))
        indexer.close()


def main() -> None:
    """Entry point of `python -m cdpserver.index.indexer`."""
    parser = argparse.ArgumentParser(description="index every journal of a state directory")
    parser.add_argument("--state-dir", type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    events.configure("indexer")
    run(StateDir.open(options.state_dir))


if __name__ == "__main__":
    main()
