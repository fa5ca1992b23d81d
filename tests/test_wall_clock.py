"""The host's wall clock is set, back and forth by hours, while a disk is written: points stay in order and mean what they meant.

All processes of the service, and the plugins in nbdkit, see a wall that the test sets; the clock that they share is their own.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cdpserver.names import format_time
from tests.test_service import Server, connected, read, until
from tools.soaking.oracle import Oracle
from tools.soaking.writer import send

pytestmark = pytest.mark.real

SIZE = 4 << 20
HOUR_NS = 3600 * 10**9
WRITES = 12

SITE = """
import os, time

def ahead_ns():
    with open({path!r}) as file:
        return int(file.read())

def shifted(ask, unit):
    return lambda *clock: ask(*clock) + (ahead_ns() // unit if clock in ((), (time.CLOCK_REALTIME,)) else 0)

for name, unit in (("time_ns", 1), ("time", 10**9), ("clock_gettime_ns", 1), ("clock_gettime", 10**9)):
    setattr(time, name, shifted(getattr(time, name), unit))
"""
"""What every Python on PYTHONPATH begins with."""


class Wall:
    """The wall clock as our processes see it, so far ahead of the real one."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ahead"
        self.set(0)

    def set(self, ahead_ns: int) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(str(ahead_ns))
        new.rename(self.path)


@pytest.fixture
def wall(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wall:
    site = short_path / "site"
    site.mkdir()
    made = Wall(site)
    (site / "sitecustomize.py").write_text(SITE.format(path=str(made.path)))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    monkeypatch.setenv("CDP_BOOT_ID", "boot-0001")
    return made


class Instants:
    """What the disk held, by the server's clock."""

    def __init__(self, size: int) -> None:
        self.oracle = Oracle(size, align=4096, disk=1)
        self.counts: dict[int, int] = {}
        self._dice = random.Random(5)

    def write(self, server: Server) -> None:
        """Some writes; before and after each the server says what time it is."""
        with connected(server.get("/v1/disks/d")["uri"]) as client:
            for _ in range(WRITES):
                write = self.oracle.next(self._dice)
                self.oracle.sent(write)
                send(client, self.oracle, write)
                self.oracle.acknowledged()
                self.counts[server.get("/v1/status")["time_ns"]] = self.oracle.count
        server.synced("d", write_blocking=True)

    def check(self, server: Server) -> None:
        """Every instant opens as what it was, by its time; times, points and seqs ascend."""
        assert list(self.counts) == sorted(self.counts)
        for time_ns, count in self.counts.items():
            found = read(server.uri(f"d@{format_time(time_ns)}"), SIZE)
            assert self.oracle.wrong(found, range(count, count + 1)) == 0, (time_ns, count)
        points = server.get("/v1/disks/d:points")
        for key in ("time_ns", "seq"):
            values = [point[key] for point in points if point["kind"] == "rp"]
            assert values == sorted(set(values))
        assert read(server.uri("d@latest"), SIZE) == self.oracle.content(self.oracle.count)


def jumps(server: Server) -> list[int]:
    return [event["jump_ns"] for event in server.events("service.wall-clock-jump")]


def test_a_wall_clock_that_is_set(short_path: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch) -> None:
    instants = Instants(SIZE)
    steps_ns = [3 * HOUR_NS, -5 * HOUR_NS, 0]

    def seen(server: Server, before: int) -> Callable[[], bool]:
        return lambda: len(jumps(server)) > before

    with Server(short_path / "s") as server:
        server.post("/v1/disks", name="d", size=SIZE)
        server.synced("d", write_blocking=True)
        instants.write(server)
        for ahead_ns in steps_ns:
            before = len(jumps(server))
            wall.set(ahead_ns)
            instants.write(server)
            until(seen(server, before), "event of the jump")
        assert [round(jump / HOUR_NS) for jump in jumps(server)] == [3, -8, 5]
        began_ns, last_ns = min(instants.counts), max(instants.counts)
        assert last_ns - began_ns < HOUR_NS, "the server's clock took no part in it"
        instants.check(server)
        wall.set(-5 * HOUR_NS)
        assert server.stop() == 0

    # Another process, and another boot with a wall far behind what is stored.
    for boot in ("boot-0001", "boot-0002"):
        monkeypatch.setenv("CDP_BOOT_ID", boot)
        with Server(short_path / "s") as server:
            instants.write(server)
            assert server.stop() == 0
    assert max(instants.counts) - last_ns < HOUR_NS, "it goes on from the last time stored"

    # And a boot whose wall is right again, or ahead: it is followed.
    wall.set(3 * HOUR_NS)
    monkeypatch.setenv("CDP_BOOT_ID", "boot-0003")
    with Server(short_path / "s") as server:
        instants.write(server)
        assert max(instants.counts) - last_ns > 2 * HOUR_NS
        instants.check(server)
        assert server.uri("d@-1h") != server.uri("d@latest"), "an hour ago by this clock"
