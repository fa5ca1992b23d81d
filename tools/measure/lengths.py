"""What may not depend on the length of a journal, or only as it must: a write, a seal, an index made anew, a restart.

The journals are written by the target's own code without a service: 4 KiB writes into one open interval.

    write     on and on: the last thousand writes before each length
    seal      the end of an interval: its last segment is made durable and cut to its length
    rebuild   every index thrown away and made anew
    restart   `cdpserver` and its children killed; from its start to a write's answer, which a client waits for all the while
"""

import contextlib
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbd

from cdpserver import timeline as timeline_file
from cdpserver.clock import Clock, boot_id
from cdpserver.index.indexer import rebuild
from cdpserver.state import StateDir
from cdpserver.target.connection import Connection
from cdpserver.target.disk import TargetDisk
from tools.kit.server import Server
from tools.measure.context import GIB, Context
from tools.measure.result import Goal, Measure
from tools.measure.seed import seed

BLOCK = 4096
TIMED = 1000
"""Writes that are timed."""


class Lengths:
    """The measures of one run."""

    def __init__(self) -> None:
        self.write = Measure("length-write", "processor time of a 4 KiB write, without NBD", "us", "lower")
        self.seal = Measure("length-seal", "end of an interval, durable and sealed", "ms", "lower")
        self.rebuild = Measure(
            "rebuild", "index made anew, in a second of one processor", "records", "higher"
        )
        self.restart = Measure("restart", "kill -9 of all processes, start to a write's answer", "s", "lower")

    @property
    def all(self) -> list[Measure]:
        """In the order of the table, with goals for what was measured."""
        self.restart.goals = tuple(Goal(name, "", 1.0, "under 1 s") for name in self.restart.samples)
        return [self.write, self.seal, self.rebuild, self.restart]


def lengths(context: Context) -> list[Measure]:
    """A journal of each length, anew in every round."""
    found = Lengths()
    for _ in range(context.rounds):
        for records in context.sizes.lengths:
            directory = context.directory / "lengths"
            try:
                _of_length(context, found, directory, records)
            finally:
                shutil.rmtree(directory)
        context.say(f"lengths: {found.rebuild.samples[f'{records:,} records'][-1]:,.0f} records/s indexed")
    return found.all


def _of_length(context: Context, found: Lengths, directory: Path, records: int) -> None:
    subject = f"{records:,} records"
    seed(directory, 1, records=0, size=GIB)
    state = StateDir.open(directory)
    (path,) = state.timelines.glob("t*")
    with _opened(state, path) as (disk, client):
        client.write(memoryview(bytes(BLOCK)), 0)
        disk.synced(None, write_blocking=True)
        found.write.add(subject, _fill(client, records))
        context.settle()
        assert disk.journal is not None
        disk.journal.commit()
        client.write(memoryview(bytes(BLOCK)), 0)
        started = time.perf_counter()
        disk.journal.cut()
        found.seal.add(subject, (time.perf_counter() - started) * 1e3)
        # The same again into the interval that is open from now on.
        _fill(client, records)
    for file in path.glob("intervals/*/*.mdb*"):
        file.unlink()
    # Of this process, which does nothing else: a busy machine shows the same.
    started = time.process_time()
    indexed = rebuild(path, boot_id())
    found.rebuild.add(subject, indexed / (time.process_time() - started))
    found.restart.add(subject, _restart(directory))


@contextlib.contextmanager
def _opened(state: StateDir, path: Path) -> Iterator[tuple[TargetDisk, Connection]]:
    clock = Clock.load(state.clock)
    disk = TargetDisk(
        state.path,
        timeline_file.load(path),
        clock_ns=clock.now_ns,
        boot_id=clock.boot_id,
        emit=lambda *_, **__: None,
    )
    try:
        yield disk, disk.connect()
    finally:
        disk.shut(removing=False)


def _fill(client: Connection, records: int) -> float:
    """So many writes at random places; us of processor time of each of the last ones."""
    chance, data = random.Random(records), memoryview(os.urandom(BLOCK))
    offsets = [chance.randrange(GIB // BLOCK) * BLOCK for _ in range(records)]
    last = min(TIMED, records)
    for offset in offsets[:-last]:
        client.write(data, offset)
    started = time.thread_time()
    for offset in offsets[-last:]:
        client.write(data, offset)
    return (time.thread_time() - started) / last * 1e6


def _restart(directory: Path) -> float:
    """Seconds; the disk was written to when everything was killed."""
    first = Server(directory)
    try:
        name = first.client.disks()[0]["name"]
        uri = first.client.disk(name)["uri"]
        _write(uri)
        pids = [each["pid"] for each in first.client.status()["children"].values()]
    finally:
        first.process.kill()
        first.process.wait()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    started, answered = time.monotonic(), 0.0

    def write() -> None:
        nonlocal answered
        _write(uri)
        answered = time.monotonic()

    # The socket is kept while nobody serves it: a client waits for its answer, as QEMU does.
    client = threading.Thread(target=write)
    client.start()
    with Server(directory):
        client.join()
    return answered - started


def _write(uri: str) -> None:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    handle.pwrite(bytes(BLOCK), 0)
    handle.shutdown()
