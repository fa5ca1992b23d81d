"""`tools/soak`: its oracle and its bounds, and a run of seconds with faults, so that the one of an hour works."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tools.soaking.oracle import SECTOR, Oracle
from tools.soaking.trend import MEMORY, Series

ROOT = Path(__file__).resolve().parent.parent

MINUTES = float(os.environ.get("CDP_SOAK_MINUTES", "0.15"))
"""How long the run takes."""


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def test_the_oracle_knows_every_instant() -> None:
    """Beside a plain copy of the disk, for writes of every kind; more of them than lie between two states that are kept."""
    oracle, dice = Oracle(64 << 10, align=512, disk=3), random.Random(1)
    disk = bytearray(64 << 10)
    instants = []
    for number in range(3000):
        write = oracle.next(dice)
        oracle.sent(write)
        under_way_ns = now_ns()
        data = bytes(write.length) if write.is_zero else oracle.data(write)
        before = bytes(disk)
        disk[write.offset : write.offset + write.length] = data
        oracle.acknowledged()
        if number % 100 == 0:
            instants.append((under_way_ns, before, bytes(disk)))
    for at_ns, before, after in instants:
        held = oracle.at(at_ns)
        assert len(held) == 2, "a write that is under way is there, or is not"
        assert oracle.wrong(before, held) == oracle.wrong(after, held) == 0
    last = oracle.at(now_ns())
    assert list(last) == [oracle.count] == [3000]
    assert oracle.wrong(bytes(disk[8192:16384]), last, 8192) == 0


def test_the_oracle_sees_another_time_and_another_place() -> None:
    oracle, dice = Oracle(64 << 10, align=4096, disk=1), random.Random(2)
    for _ in range(200):
        oracle.sent(oracle.next(dice))
        oracle.acknowledged()
    held = oracle.at(now_ns())
    good = oracle.content(200)
    assert oracle.wrong(good, held) == 0
    assert oracle.wrong(oracle.content(190), held) > 0
    swapped = good[SECTOR : 2 * SECTOR] + good[:SECTOR] + good[2 * SECTOR :]
    assert 0 < oracle.wrong(swapped, held) <= 2 * SECTOR


def test_of_a_write_under_way_some_sectors_may_be_there_and_of_no_other() -> None:
    oracle, dice = Oracle(64 << 10, align=512, disk=1), random.Random(3)
    while True:
        write = oracle.next(dice)
        oracle.sent(write)
        under_way = oracle.at(now_ns())
        oracle.acknowledged()
        if write.end - write.first > 8 and oracle.count > 200:
            break
    before, after = oracle.content(oracle.count - 1), oracle.content(oracle.count)
    cut = write.offset + 3 * SECTOR
    torn = after[:cut] + before[cut:]
    assert oracle.wrong(torn, under_way) == 0
    assert oracle.wrong(torn, oracle.at(now_ns())) > 0
    elsewhere = SECTOR * next(at for at in range(128) if not write.first <= at < write.end)
    older = oracle.content(50)
    wrong = torn[:elsewhere] + older[elsewhere : elsewhere + SECTOR] + torn[elsewhere + SECTOR :]
    assert (oracle.wrong(wrong, under_way) > 0) == (wrong != torn)


def test_what_grows_is_said() -> None:
    series = Series()
    for at in range(100):
        series.add("service memory", at, 50e6 + (10e6 if at < 50 else 0))
        series.add("export memory", at, 50e6 + 1e6 * at)
    assert series.grown("service memory", 0, MEMORY) == ""
    assert "export memory grew" in series.grown("export memory", 0, MEMORY)
    assert series.grown("export memory", 90, MEMORY) == ""


@pytest.mark.e2e
def test_a_short_soak() -> None:
    """Nothing is wrong, whatever it got done on this machine; and nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        done = subprocess.run(
            [sys.executable, "-m", "tools.soak", f"--minutes={MINUTES}", "--json", "--directory", directory],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(Path(directory).iterdir()) == []
    summary = json.loads(done.stdout)
    assert summary["bytes_wrong"] == 0 and summary["failures"] == []
    assert summary["writes"] > 0 and summary["faults"]
    assert summary["compared"]["newest"] >= 3 and summary["compared"]["base point"] >= 3
