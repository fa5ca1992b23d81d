"""What several workers cost: a client that another worker accepted, and a mirror whose service is replaced.

client -> worker of the disk                      own
client -> another worker -> worker of the disk    forwarded: over TCP the kernel chooses who accepts
"""

import threading
import time
from pathlib import Path

import nbd

from cdpserver.state import StateDir
from cdpserver.target.placement import worker_of
from tools.kit.processes import FailedError, start, until
from tools.kit.server import Server
from tools.kit.source import Source
from tools.measure import endless
from tools.measure.context import MIB, Context
from tools.measure.result import Goal, Measure

DEPTHS = (1, 16)
WORKERS = 2
SIZE = 64 * MIB
STALL = "longest write of the guest"


def forward(context: Context) -> list[Measure]:
    """4 KiB writes to the worker that serves the disk, and to the other one, over the same kind of socket."""
    measures = [
        Measure(f"forward-{depth}", f"4 KiB write, depth {depth}", "IOPS", "higher") for depth in DEPTHS
    ]
    with Server(context.directory / "forward", "--workers", str(WORKERS)) as server:
        for number in range(context.rounds):
            for depth, measure in zip(DEPTHS, measures, strict=True):
                for subject, away in (("its own worker", 0), ("forwarded by another", 1)):
                    name = f"d{number}-{depth}-{away}"
                    measure.add(subject, _speed(context, server, name, depth, away))
                context.say(
                    f"forward, depth {depth}: {measure.ratio('its own worker', 'forwarded by another'):.2f}"
                )
    return measures


def _speed(context: Context, server: Server, name: str, depth: int, away: int) -> float:
    client = server.client
    client.add_disk(name, size=SIZE, vm=None, base=None)
    worker = (worker_of(client.disk(name)["id"], WORKERS) + away) % WORKERS
    uri = f"nbd+unix:///{name}?socket={StateDir.open(server.path).worker_socket(worker)}"
    client.synced(name, session=None, write_blocking=True)
    owner = endless.Worker(StateDir.open(server.path), (worker + away) % WORKERS)
    job = context.directory / "forward.job"
    job.write_text(endless.job([uri], size=SIZE, depth=depth))
    process = start(["fio", "--eta=never", job], job.with_suffix(".log"))
    try:
        endless.all_synced([owner], {name: 0}, process)
        before, started = endless.written([owner]), time.monotonic()
        time.sleep(context.sizes.forward_seconds)
        return (endless.written([owner]) - before) / (time.monotonic() - started)
    finally:
        process.kill()
        process.wait()
        owner.close()
        until(lambda: client.disk(name)["clients"] == 0, "end of the clients")
        client.remove_disk(name)


class Guest:
    """Writes one block after the other, and knows the longest that one took."""

    def __init__(self, uri: str) -> None:
        self._handle = nbd.NBD()
        self._handle.connect_uri(uri)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.writes = 0
        self.longest_s = 0.0
        self.failed = ""
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                started = time.monotonic()
                self._handle.pwrite(self.writes.to_bytes(8, "little") * 512, self.writes * 4096 % SIZE)
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                self.writes += 1
        except nbd.Error as error:
            self.failed = str(error)

    def more(self) -> None:
        """Return after some more writes. FailedError if one failed."""
        goal = self.writes + 200
        until(lambda: self.writes >= goal or self.failed, "writes of the guest")
        if self.failed:
            raise FailedError(f"a write of the guest failed: {self.failed}")

    def close(self) -> None:
        """The guest stops. May be said twice."""
        self._ended.set()
        self._thread.join()


def takeover(context: Context) -> list[Measure]:
    """The longest write through a write-blocking mirror of QEMU while the service is killed and started anew."""
    measure = Measure(
        "takeover", "service killed under a mirror", "s", "lower", (Goal(STALL, "", 1.0, "under 1 s"),)
    )
    for number in range(context.rounds * context.sizes.takeovers):
        directory = context.directory / f"takeover{number}"
        directory.mkdir()
        measure.add(STALL, _stall(directory))
        context.say(f"takeover: {measure.samples[STALL][-1] * 1000:.0f} ms")
    return [measure]


def _stall(directory: Path) -> float:
    first = Server(directory / "s", "--workers", str(WORKERS))
    try:
        first.client.add_disk("d", size=SIZE, vm=None, base=None)
        with Source(directory, SIZE) as source:
            source.mirror(str(first.client.disk("d")["uri"]))
            first.client.synced("d", session=None, write_blocking=True)
            guest = Guest(source.uri)
            try:
                guest.more()
                guest.longest_s = 0.0
                first.process.kill()
                first.process.wait()
                guest.more()
                with Server(directory / "s", "--workers", str(WORKERS)):
                    guest.more()
                    guest.close()
                    source.end_mirror()
            finally:
                guest.close()
    finally:
        first.stop()
    return guest.longest_s
