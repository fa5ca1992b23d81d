"""A target behind nbdkit's error and delay filters: QEMU's mirror is refused at random and answered late, its guest never.

guest -> qemu-storage-daemon -> mirror -> [error -> delay -> target] of a whole service

What the guest wrote is known with its times, so every `crash` point is compared with the disk of that instant.
"""

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from cdpserver.names import format_time
from tests.test_protect import all_arrives, guest, in_sync, protect, world
from tests.test_service import ApiError, Server, read, until
from tools.kit.source import Source
from tools.soaking.oracle import Oracle
from tools.soaking.writer import send

pytestmark = pytest.mark.real

SIZE = 8 << 20
LONG = int(os.environ.get("CDP_LONG", "1"))
WRITES = 40
"""In each stretch, with and without errors."""

WRAPPER = """#!/bin/sh
case "$*" in
*/target.py*) exec {nbdkit} --filter=error --filter=delay "$@" \\
    error=EIO error-zero=ENOSPC error-rate=40% error-file={gate} \\
    delay-write={delay} delay-zero={delay} delay-read={delay} delay-extents={delay} ;;
*) exec {nbdkit} "$@" ;;
esac
"""
"""Put in front of nbdkit on PATH. Errors come while a file is there; the filters know no other switch."""


@pytest.fixture
def gate(short_path: Path) -> Path:
    return short_path / "errors"


@pytest.fixture
def filtered(
    short_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Server, Source]]:
    """A service whose workers run behind filters, and a QEMU."""
    first = short_path / "bin"
    first.mkdir()
    wrapper = first / "nbdkit"
    nbdkit = shutil.which("nbdkit")
    wrapper.write_text(WRAPPER.format(nbdkit=nbdkit, gate=gate, delay="5ms"))
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{first}{os.pathsep}{os.environ['PATH']}")
    with world(short_path) as made:
        yield made


class Written:
    """The guest: one write after the other, each known with its times. An error of the disk ends the test."""

    def __init__(self, handle: nbd.NBD, seed: int) -> None:
        self.oracle = Oracle(SIZE, align=4096, disk=1)
        self.instants_ns: list[int] = []
        """Some, by CLOCK_BOOTTIME, each between two writes."""
        self._handle, self._dice = handle, random.Random(seed)

    def write(self, count: int) -> None:
        for number in range(count):
            if number % 10 == 0:
                self.instants_ns.append(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
            write = self.oracle.next(self._dice)
            self.oracle.sent(write)
            send(self._handle, self.oracle, write)
            self.oracle.acknowledged()


def test_a_mirror_behind_errors_and_delays(filtered: tuple[Server, Source], gate: Path) -> None:
    server, source = filtered
    with guest(source) as handle:
        written = Written(handle, seed=int(os.environ.get("CDP_SEED", "7")))
        written.write(WRITES)
        protect(server, source)
        in_sync(server)
        written.instants_ns.clear()
        for _ in range(LONG):
            written.write(WRITES)
            gaps = len(server.events("disk.gap"))
            gate.touch()

            def lost(gaps: int = gaps) -> bool:
                """The guest goes on, and the service has noticed what did not arrive."""
                written.write(1)
                return len(server.events("disk.gap")) > gaps

            until(lost, "gap")
            written.write(WRITES)
            gate.unlink()
            in_sync(server)
            all_arrives(server, source)
        written.write(WRITES)
        all_arrives(server, source)
        latest = read(server.uri("web/disk0@latest"))
        assert latest == written.oracle.content(written.oracle.count), "nothing is missing in the end"
        print("grades", Counter(grades(server, written, written.instants_ns)))

        def offered() -> bool:
            written.write(1)
            return "crash" in grades(server, written, written.instants_ns[-1:])

        until(offered, "crash point")


def grades(server: Server, written: Written, instants_ns: list[int]) -> Iterator[str]:
    """The grade of each instant; that in a gap has none. A `crash` point is the disk as it was."""
    offset_ns = json.loads((server.state_dir / "clock.json").read_text())["offset_ns"]
    for at_ns in instants_ns:
        time_ns = at_ns + offset_ns
        try:
            point = server.get(f"/v1/points/web/disk0@{format_time(time_ns)}")
        except ApiError:
            continue
        if point["grade"] == "crash":
            found = read(server.uri(f"web/disk0@seq:{point['seq']}"))
            wrong = written.oracle.wrong(found, written.oracle.at(at_ns))
            assert wrong == 0, (wrong, point, server.events("disk.gap"))
        yield str(point["grade"])
