"""The scrub: within its budget, turn by turn, over a restart; what it finds is said once, and forgotten when it was mended."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cdpserver import sums
from cdpserver.check import check_timeline
from cdpserver.check.depth import END, INDEX, Everything, Part, Place
from cdpserver.check.scrub import FILE, Budget, Progress, turn
from cdpserver.errors import CorruptError
from cdpserver.index.indexer import rebuild
from cdpserver.journal import links
from cdpserver.journal.links import Chain
from cdpserver.journal.record import RECORD_SIZE
from cdpserver.journal.segment import PAGE
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.figures import tally
from tests.test_check import (
    BLOCK,
    BOOT,
    SECOND_NS,
    SEQS,
    SIZE,
    START_NS,
    Disk,
    disk,
    flip,
    make_base_point,
    template,
)
from tests.test_check_depth import WROTE_A
from tests.test_service import connected
from tools.kit.processes import until
from tools.kit.server import Server

__all__ = ["disk", "template"]  # fixtures


@dataclass
class Time:
    """A clock that only sleeping moves."""

    now: float = 0.0
    naps: int = 0

    def clock(self) -> float:
        return self.now

    def nap(self, seconds: float) -> None:
        self.now += seconds
        self.naps += 1


def one_turn(disk: Disk, *, rate: int = 1 << 30, seconds: float = 60.0) -> dict[str, Any]:
    time = Time()
    return turn(
        disk.state.path,
        "t1",
        budget=Budget(rate, time.clock, time.nap),
        seconds=seconds,
        now_ns=lambda: START_NS + 500 * SECOND_NS,
        boot=BOOT,
    )


def test_a_round_of_what_is_whole(disk: Disk) -> None:
    done = one_turn(disk)
    assert done["ended"] and not done["new"] and done["damaged"] == 0 and done["bytes"]
    assert sums.read(disk.directory / "base.raw") is not None
    found = Progress.load(disk.directory)
    assert (found.rounds, found.ended_ns, found.under_way) == (1, START_NS + 500 * SECOND_NS, False)
    assert one_turn(disk)["ended"] and Progress.load(disk.directory).rounds == 2


def test_it_reads_no_faster_than_its_budget() -> None:
    time = Time()
    budget = Budget(1000, time.clock, time.nap)
    for _ in range(1000):
        budget.spend(40)
        assert time.now >= budget.spent / 1000 - 0.05 - 1e-9
    assert time.naps < 1000  # a small budget is not spent on waking up


def test_what_is_read_in_one_go_is_paid_for_before_more_is_read() -> None:
    time = Time()
    budget = Budget(1000, time.clock, time.nap)
    budget.spend(1000 * 3600)
    assert time.naps == 0 and budget.behind and budget.owed == 1000 * 3600
    after = Budget(1000, time.clock, time.nap)
    after.pay(budget.owed)
    assert time.now == 3600 and after.owed == 0 and not after.behind
    assert Progress.load(Path("/nonexistent")).owed == 0


def test_all_that_is_read_counts(disk: Disk) -> None:
    """Of two rounds the second has more to read: by so much more it is within its budget, whatever Python reads for itself."""
    rounds = []
    for blocks in (0, 0, 2000):
        writer = disk.open()
        for number in range(blocks):
            disk.write(number % 200, number % 251, after_s=0.01)
        flip(
            disk.data(1), WROTE_A
        )  # damaged in the second one and in the third, which is looked at once more
        writer.cut()
        writer.commit()
        writer.close()
        rebuild(disk.directory, BOOT)
        before, budget = read_by_us(), Budget(1 << 30, Time().clock, lambda _: None)
        turn(disk.state.path, "t1", budget=budget, seconds=60.0, now_ns=lambda: START_NS, boot=BOOT)
        rounds.append((read_by_us() - before, budget.spent))
        if not blocks:
            flip(disk.data(1), WROTE_A)
    (_, _), (fewer, _), (more, spent) = rounds
    fewer_spent = rounds[1][1]
    assert more - fewer > 2000 * BLOCK and spent - fewer_spent >= more - fewer - (64 << 10), rounds


def read_by_us() -> int:
    """Bytes that this process has read, and those that have ended before it."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["rchar"])


def test_turns_go_on_where_the_one_before_ended_also_in_another_process(disk: Disk) -> None:
    """So little time that each turn gets one unit further."""
    flip(disk.data(1), WROTE_A)
    said: list[dict[str, Any]] = []
    turns = 0
    while True:
        done = one_turn(disk, rate=1, seconds=1e-9)
        turns += 1
        said += done["new"]
        assert turns < 50 and (disk.directory / FILE).exists()
        if done["ended"]:
            break
    assert turns > 3 and len(said) == 1
    assert said[0]["from_seq"] == SEQS["a"] and said[0]["points"]["after"]["seq"] == SEQS["a2"]


def test_sums_are_made_block_by_block_in_as_many_turns_as_it_takes(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a base, and of a base point that has none; in between they say what they can."""
    monkeypatch.setattr(sums, "BLOCK", SIZE // 8)
    base, point = disk.directory / "base.raw", disk.directory / "bp-0.qcow2"
    shutil.copyfile(base, point)
    had: list[tuple[int, int]] = []
    for _ in range(50):
        done = one_turn(disk, rate=1, seconds=1e-9)
        had.append((len(sums.read(base) or ()), len(sums.read(point) or ())))
        if done["ended"]:
            break
    assert done["ended"]
    assert [first for first, _ in had[:9]] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert sorted({second for _, second in had}) == list(range(9))
    mtime = base.stat().st_mtime_ns
    flip(base, SIZE // 2)
    os.utime(base, ns=(mtime, mtime))
    assert list(sums.wrong(base, takes=lambda _: True)) == [4]


@pytest.mark.parametrize("name", ["base.raw", "bp-0.qcow2"])
def test_sums_that_rotted_are_said_and_not_made_anew_of_whatever_is_there(disk: Disk, name: str) -> None:
    path = disk.directory / name
    if name != "base.raw":
        make_base_point(disk, 0, "base.raw")
    one_turn(disk)
    held = sums.sums_path(path).read_bytes()
    dice = random.Random(name)
    for _ in range(10):
        at, bit = dice.randrange(len(held)), 1 << dice.randrange(8)
        flip(sums.sums_path(path), at, bit)
        with pytest.raises(CorruptError):
            sums.read(path)
        (found,) = check_timeline(disk.state.path, "t1", boot_id=BOOT, depth=Part(at=END)).damage
        assert found.finding.what.startswith(f"the sums of {name} are damaged") and found.affected == 0
        flip(sums.sums_path(path), at, bit)
    flip(sums.sums_path(path), 40)
    (new,) = one_turn(disk)["new"]
    assert new["path"] == f"timelines/t1/sums/{name}" and "remove " in new["hint"]
    assert one_turn(disk)["damaged"] == 1
    flip(sums.sums_path(path), 40)
    assert sums.sums_path(path).read_bytes() == held
    assert one_turn(disk)["damaged"] == 0


def test_damage_is_said_once_and_forgotten_when_it_was_mended(disk: Disk) -> None:
    one_turn(disk)
    flip(disk.data(1), WROTE_A)
    base = disk.directory / "base.raw"
    mtime = base.stat().st_mtime_ns
    flip(base, 0)
    os.utime(base, ns=(mtime, mtime))
    assert len(one_turn(disk)["new"]) == 2
    again = one_turn(disk)
    assert again["new"] == [] and again["damaged"] == 2
    flip(disk.data(1), WROTE_A)
    assert one_turn(disk)["damaged"] == 1
    flip(base, 0)
    os.utime(base, ns=(mtime, mtime))
    assert one_turn(disk)["damaged"] == 0 and Progress.load(disk.directory).again == set()


def test_what_is_dropped_under_it_is_no_damage(disk: Disk) -> None:
    flip(disk.data(2), 0)
    one_turn(disk, rate=1, seconds=1e-9)
    shutil.rmtree(disk.directory / "intervals" / "000002")
    assert not one_turn(disk)["new"]


@pytest.mark.parametrize("text", ["", "{}", '{"part": 3}', json.dumps({"part": {"at": [9]}})])
def test_a_note_that_is_damaged_begins_the_round_anew(disk: Disk, text: str) -> None:
    one_turn(disk)
    (disk.directory / FILE).write_text(text)
    assert one_turn(disk)["ended"] and Progress.load(disk.directory).rounds == 1


# --- bits flip at random


class Records(Everything):
    """Everything but indexes, which a process of its own looks at."""

    def takes(self, place: Place) -> bool:
        return place[0] != INDEX


def contents(disk: Disk, seqs: list[int]) -> Iterator[bytes | None]:
    """Every instant, as it is read; None where reading fails."""
    for seq in seqs:
        try:
            history = History(disk.state.path, disk.timeline, BOOT)
            try:
                view = View(history, seq)
                try:
                    yield view.read(0, SIZE)
                finally:
                    view.close()
            finally:
                history.close()
        except Exception:  # noqa: BLE001 - whatever it is, it was not served
            yield None


FLIPS = 25 * int(os.environ.get("CDP_LONG", "1"))
SEEDS = [int(os.environ["CDP_SEED"])] if "CDP_SEED" in os.environ else range(FLIPS)


@pytest.mark.parametrize("kind", [".log", ".data", "base.raw", links.FILE])
def test_a_bit_that_flips_is_found_and_harms_only_what_is_said(disk: Disk, kind: str) -> None:
    """CDP_LONG=N flips N times as many, CDP_SEED=S replays one."""
    for path in disk.directory.glob("intervals/*/*.mdb*"):
        path.unlink()  # views fold the header logs
    sums.write(disk.directory / "base.raw")
    with Chain.open(disk.directory, disk.timeline.uuid) as chain:
        chain.catch_up(10)
    seqs = list(range(1, 15))
    before = list(contents(disk, seqs))
    assert None not in before
    files = [
        path
        for path in sorted(disk.directory.rglob("*"))
        if path.name.endswith(kind) and path.parent.name != sums.DIRECTORY
    ]
    for seed in SEEDS if kind != ".log" else [96, *SEEDS]:  # 96: the header page of the newest segment
        dice = random.Random(f"{kind} {seed}")
        path = dice.choice(files)
        stat = path.stat()
        at, bit = dice.randrange(min(stat.st_size, 1 << 14)), 1 << dice.randrange(8)
        flip(path, at, bit)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        report = check_timeline(disk.state.path, "t1", boot_id=BOOT, depth=Records(), chain=True)
        after = list(contents(disk, seqs))
        harmed = {seq for seq, old, new in zip(seqs, before, after, strict=True) if old != new}
        said = {seq for d in report.damage for seq in seqs if d.finding.from_seq <= seq <= d.to_seq}
        assert harmed <= said, (seed, path.name, at, bit, harmed - said)
        assert not report.whole or not _matters(path, at), (seed, path.name, at, bit)
        flip(path, at, bit)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert list(contents(disk, seqs)) == before
    tally(f"flips: {kind}", flips=len(SEEDS))


def _matters(path: Path, at: int) -> bool:
    """Is this byte one that says something? Not the slack of a header page, of a payload, of a window or of the chain's room."""
    if path.suffix == ".log":
        records = {"000001": 10, "000002": 4}[path.parent.name]
        return at < 32 or PAGE <= at < PAGE + records * RECORD_SIZE
    if path.name == links.FILE:  # with one link; the head's last bytes mean nothing
        return at < links.HEAD.size - 32 or links.HEAD.size <= at < links.HEAD.size + links.LINK.size
    return path.name == "base.raw"


@pytest.mark.real
def test_the_service_scrubs_and_says_what_it_found(short_path: Path) -> None:
    config = short_path / "c.toml"
    config.write_text('[scrub]\nevery = "1s"\n')
    with Server(short_path / "s", "--config", str(config)) as server:
        client = server.client
        disk = client.add_disk("root", size=SIZE, vm=None, base=None)
        with connected(disk["uri"]) as writer:
            writer.pwrite(bytes(4096), 0)
            client.synced("root", session=None, write_blocking=True)
            writer.pwrite(bytes([7]) * 4096, 8192)
        timeline = server.path / "timelines" / "t1"
        until(lambda: bool(client.events({"event": "scrub.ended"})), "end of a round")
        assert client.events({"event": "scrub.ended"})[0]["damaged"] == 0
        (data,) = timeline.glob("intervals/000002/*.data")
        flip(data, data.read_bytes().rindex(bytes([7]) * 4096))
        until(lambda: bool(client.events({"event": "scrub.damage"})), "damage that the scrub finds")
        (said,) = client.events({"event": "scrub.damage"})
        assert said["disk"] == "root" and "payload of record" in said["reason"]
        until(lambda: client.overview()["disks"][0]["scrub"]["damaged"] == 1, "a look that knows")
        assert any("root is damaged in 1 place" in text for text in client.overview()["warnings"])
        assert 'cdp_disk_damaged_places{disk="root"} 1.0' in client.metrics()
