"""Many disks on one machine: what each costs while all are written to at once, and what they cost at rest.

    seeded state directory -> service -> fio, one connection a disk, all in one process
                                  ^-- the workers are asked for their lag all the while

What a disk costs may not grow with the number of disks, and what nobody writes to should cost nothing.
"""

import threading
import time
from dataclasses import dataclass
from statistics import quantiles
from typing import Self

from cdpserver.state import StateDir
from cdpserver.target.placement import worker_of
from tools.kit.processes import FailedError, start
from tools.kit.server import Server
from tools.measure import endless
from tools.measure.context import Context
from tools.measure.processes import Processes, Taken
from tools.measure.result import Goal, Measure
from tools.measure.seed import SIZE, seeded

LOOK_S = 0.1
LOOK_INDEX_S = 0.5
DEPTH = 100
"""Requests in flight over all disks, as fast as it goes."""
WORKERS = (1, 2)
MIB = 1 << 20


class Lags:
    """Looks at every open disk's durable lag again and again, in a thread of its own."""

    def __init__(self, workers: list[endless.Worker]) -> None:
        self._workers = workers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seconds: list[float] = []
        self.failed: Exception | None = None

    def _run(self) -> None:
        try:
            while not self._ended.wait(LOOK_S):
                for worker in self._workers:
                    said = worker.ask("status").values()
                    self.seconds += [each["lag_ns"] / 1e9 for each in said if each["clients"]]
        except Exception as error:  # noqa: BLE001 - raised where the lags are used
            self.failed = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.failed is not None:
            raise self.failed


def disks(context: Context) -> list[Measure]:
    """1, 10 and 100 disks written to at once, at a fixed rate in all and as fast as it goes."""
    sizes = context.sizes
    found = Figures(sizes.rate)
    with seeded(context, max(sizes.disks)) as directory:
        for _ in range(context.rounds):
            for workers in WORKERS:
                for count in sizes.disks:
                    # A service of its own for each, so that nothing is left over of the one before.
                    with Server(directory, "--workers", str(workers)) as server:
                        subject = f"{count} disk{'s' * (count > 1)}, {workers} worker{'s' * (workers > 1)}"
                        for rate in (sizes.rate, 0):
                            found.add(subject, count, _load(context, server, count, rate, workers))
                    context.say(f"disks: {found.last(subject)}")
    return found.all


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one load on some disks showed."""

    rate: int
    writes_s: float
    lags: list[float]
    index_lag_s: float
    seconds: float
    idle: dict[str, Taken]
    """Before the first connection."""
    began: dict[str, Taken]
    ended: dict[str, Taken]

    def cpu(self, kind: str) -> float:
        """Processors that a kind of process kept busy."""
        return (self.ended[kind].cpu_s - self.began[kind].cpu_s) / self.seconds


class Figures:
    """The measures of `disks`, filled point by point."""

    def __init__(self, rate: int) -> None:
        at = f"at {rate:,} writes/s in all"
        self.speed = Measure("disks-writes", "4 KiB writes to all disks at once", "IOPS", "higher")
        self.lag = Measure(
            "disks-lag",
            f"longest durable lag {at}",
            "s",
            "lower",
            tuple(Goal(f"100 disks, {w} worker{'s' * (w > 1)}", "", 1.0, "under 1 s") for w in WORKERS),
        )
        self.full_lag = Measure("disks-lag-full", "longest durable lag as fast as it goes", "s", "lower")
        self.index = Measure("disks-index-lag", f"longest index lag {at}", "s", "lower")
        self.memory = Measure("disks-memory", f"memory of the workers per disk, {at}", "MiB", "lower")
        self.whole = Measure("disks-memory-all", f"memory of all processes, {at}", "MiB", "lower")
        self.files = Measure("disks-files", "open files of the workers per disk", "files", "lower")
        self.cpu = Measure("disks-cpu", f"processors of all processes, {at}", "CPUs", "lower")

    @property
    def all(self) -> list[Measure]:
        """In the order of the table."""
        measures = [self.speed, self.lag, self.full_lag, self.index]
        measures += [self.memory, self.whole, self.files, self.cpu]
        for measure in measures:
            # A goal is for a size that was measured.
            measure.goals = tuple(goal for goal in measure.goals if goal.subject in measure.samples)
        return measures

    def add(self, subject: str, count: int, found: Loaded) -> None:
        """One load on `count` disks."""
        p99 = quantiles(found.lags, n=100)[-1]
        if not found.rate:
            self.speed.add(subject, found.writes_s)
            self.full_lag.add(subject, max(found.lags))
            _note(self.full_lag, "p99, s", subject, round(p99, 2))
            return
        self.lag.add(subject, max(found.lags))
        _note(self.lag, "p99, s", subject, round(p99, 2))
        self.index.add(subject, found.index_lag_s)
        idle, ended = found.idle, found.ended
        # Nothing can be less than nothing: a process may give back what its start took.
        self.memory.add(subject, max(1, ended["target"].memory - idle["target"].memory) / count / MIB)
        self.files.add(subject, (ended["target"].files - idle["target"].files) / count)
        self.whole.add(subject, sum(taken.memory for taken in ended.values()) / MIB)
        self.cpu.add(subject, sum(found.cpu(kind) for kind in ended))
        for kind, taken in ended.items():
            _note(self.cpu, f"of that {kind}", subject, round(found.cpu(kind), 3))
            _note(self.whole, f"of that {kind}, MiB", subject, taken.memory // MIB)

    def last(self, subject: str) -> str:
        """A line on what was just measured."""
        return (
            f"{subject}: {self.speed.samples[subject][-1]:,.0f} writes/s, "
            f"lag {self.lag.samples[subject][-1]:.2f} s (full speed {self.full_lag.samples[subject][-1]:.2f} s), "
            f"{self.memory.samples[subject][-1]:.2f} MiB per disk"
        )


def _note(measure: Measure, name: str, subject: str, value: float) -> None:
    measure.notes.setdefault(name, {})[subject] = value


def _load(context: Context, server: Server, count: int, rate: int, workers: int) -> Loaded:
    """fio on the first `count` disks: `rate` writes a second in all, 0 for as many as it can."""
    held = server.client.disks()[:count]
    asked = [endless.Worker(StateDir.open(server.path), number) for number in range(workers)]
    processes = Processes.of(server)
    job = context.directory / "disks.job"
    # Few disks keep as many requests in flight as many do.
    depth = max(1, DEPTH // count)
    uris = [disk["uri"] for disk in held]
    job.write_text(endless.job(uris, size=SIZE, depth=depth, rate=max(1, rate // count) if rate else 0))
    idle = processes.taken()
    process = start(["fio", "--eta=never", job], job.with_suffix(".log"))
    try:
        endless.all_synced(asked, {disk["name"]: worker_of(disk["id"], workers) for disk in held}, process)
        written, began, started = endless.written(asked), processes.taken(), time.monotonic()
        index_lag_s = 1e-9
        with Lags(asked) as lags:
            while time.monotonic() < started + context.sizes.load_seconds or len(lags.seconds) < 2:
                time.sleep(LOOK_INDEX_S)
                if process.poll() is not None:
                    said = job.with_suffix(".log").read_text(errors="replace")[-500:]
                    raise FailedError(f"fio ended with status {process.returncode}: {said}")
                shown = server.client.overview()["disks"]
                index_lag_s = max(index_lag_s, *(disk["index_lag_ns"] / 1e9 for disk in shown))
        ended, spent = processes.taken(), time.monotonic() - started
        writes_s = (endless.written(asked) - written) / spent
        return Loaded(rate, writes_s, lags.seconds, index_lag_s, spent, idle, began, ended)
    finally:
        process.kill()
        process.wait()
        for worker in asked:
            worker.close()
