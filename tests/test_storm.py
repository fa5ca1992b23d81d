"""Everything that can befall a protected guest, one after the other and in any order, while it writes.

It never waits for longer than the bound and never sees an error; and afterwards every `crash` point is what a power cut at that
instant would have left: its file systems replay and are clean, and holds all that was said to be durable before.
"""

import os
import random
import re
import sqlite3
from pathlib import Path

import nbd
import pytest

from tests.storm import BOUND_S, STRIKES, Lateness, Sea, longest_wait_s, measure_waits, sea
from tests.test_service import until
from tools.kit.mount import as_file, as_loop, mounted
from tools.kit.processes import run

pytestmark = pytest.mark.real

SAMPLED = 6
"""Points that are looked into; each takes a second."""


@pytest.mark.timeout(600)
def test_a_guest_in_a_storm(short_path: Path) -> None:
    seed = int(os.environ.get("CDP_SEED", random.randrange(1 << 32)))
    dice = random.Random(seed)
    strikes = list(STRIKES)
    dice.shuffle(strikes)
    print("seed", seed, [strike.__name__ for strike, _ in strikes])
    with sea(short_path) as waters:
        for strike, leaves_gap in strikes:
            gaps = len(waters.events("disk.gap"))
            with Lateness() as late:
                before = waters.guest.process
                measure_waits(waters.guest)
                strike(waters)
                waters.goes_on()
                waters.points_go_on()
                waters.in_sync()
                waited_s = longest_wait_s(waters.guest) if waters.guest.process is before else 0.0
            print(f"{strike.__name__}: a write waited up to {waited_s} s, the machine {late.worst_s:.2f} s")
            assert waited_s <= BOUND_S + late.worst_s, strike.__name__
            failed = [n for n, line in enumerate(waters.guest.console) if re.search("failed|rror", line)]
            assert not failed, waters.guest.console[max(0, failed[0] - 5) : failed[0] + 5]
            assert not leaves_gap or len(waters.events("disk.gap")) > gaps, strike.__name__
        check_points(waters, dice)


def check_points(waters: Sea, dice: random.Random) -> None:
    server = waters.server
    counted, paid = waters.said("ACK"), waters.said("PAID")
    last_ns = counted[-1][0]
    until(
        lambda: server.get("/v1/disks/web/root-device:points?kind=rp")[-1]["time_ns"] >= last_ns, "last point"
    )
    points = [
        point
        for point in server.get("/v1/disks/web/root-device:points?kind=rp")
        if point["grade"] == "crash" and point["time_ns"] > counted[0][0]
    ]
    assert len(points) > 5
    for number, point in enumerate(dice.sample(points, SAMPLED)):
        check_file_system(waters, f"look{number}", point, newest(counted, point), newest(paid, point))
    common = [p for p in server.get("/v1/vms/web:points") if p["time_ns"] > counted[0][0]]
    assert len(common) > 5
    for shared in common:
        left, right = (
            number_at(server.uri(f"web/{disk}-device@{shared['time']}")) for disk in ("left", "right")
        )
        assert left - right in (0, 1), (left, right, shared)


def newest(said: list[tuple[int, int]], point: dict[str, int]) -> int:
    """The newest number that was said to be durable by the time of a point."""
    return max((number for time_ns, number in said if time_ns <= point["time_ns"]), default=0)


def number_at(uri: str) -> int:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        return int(bytes(handle.pread(512, 0))[:16].replace(b"\0", b"").strip() or b"0")
    finally:
        handle.shutdown()


def check_file_system(waters: Sea, name: str, point: dict[str, int], counted: int, paid: int) -> None:
    """In a fork of the point its journal is replayed, by fsck alone and by the kernel, and what was durable is there."""
    server = waters.server
    work = waters.directory / name
    work.mkdir()
    fork = server.post("/v1/forks", name=name, point=f"web/root-device@seq:{point['seq']}")
    # Through a loop device: the file system's blocks are smaller than what an export reads at least.
    with as_file(str(fork["uri"]), work / "nf") as file, as_loop(file) as device:
        run("e2fsck", "-y", "-E", "journal_only", device, accept=(0, 1))
        run("e2fsck", "-fn", device)
        with mounted(device, work / "m", "-o", "ro") as root:
            lines = (root / "data/counter").read_text().split()
            database = work / "ledger.db"
            for suffix in ("", "-journal"):
                kept = root / f"data/ledger.db{suffix}"
                if kept.exists():
                    database.with_name(f"ledger.db{suffix}").write_bytes(kept.read_bytes())
    assert lines == [str(n + 1) for n in range(len(lines))] and len(lines) >= counted, (len(lines), counted)
    with sqlite3.connect(database) as ledger:
        assert ledger.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if paid:
            assert ledger.execute("SELECT max(number) FROM payment").fetchone()[0] >= paid
            assert ledger.execute("SELECT sum(units) FROM account").fetchone() == (1_000_000,)
    ledger.close()
