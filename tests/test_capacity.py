"""What history takes and would take: the pure parts against brute force, what is measured against small random histories."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import timeline
from cdpserver.catalog import Catalog
from cdpserver.clock import boot_id
from cdpserver.config import Config
from cdpserver.journal.log import Journal
from cdpserver.retention import distinct, facts, forecast, policies, usage
from cdpserver.retention.distinct import Curve, Sample
from cdpserver.retention.growth import HOUR_NS, Part, Span, hours_until, made_per_hour, per_hour, unbroken
from cdpserver.retention.policy import Policy
from cdpserver.retention.slots import parse_slots
from cdpserver.retention.steps import Step, parse_steps
from cdpserver.timeline import EmptyBase
from tests.core import ROOT, SECOND_NS, Line, World, scratch
from tests.test_service import ApiError, Server

BLOCK = 4096
SIZE = 8 << 20
MINUTE_NS = 60 * SECOND_NS
BOOT = "00000000-boot"


# --- pure


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50), st.integers(0, 2000)), max_size=4),
    st.integers(0, 6000),
)
def test_the_cap_is_reached_in_the_hour_that_counting_finds(
    given_parts: list[tuple[int, int, int]], cap: int
) -> None:
    parts = [Part(size, float(rate), float(limit)) for size, rate, limit in given_parts]
    found = hours_until(parts, cap)
    counted = next((h for h in range(2002) if sum(part.after(h) for part in parts) > cap), None)
    if found is None:
        assert counted is None
        return
    assert sum(part.after(found) for part in parts) >= cap - 1e-6
    assert counted is not None and counted - 1 <= found + 1e-9 and found <= counted


def test_growth_is_that_of_the_last_day_in_proportion() -> None:
    hour = HOUR_NS
    spans = [
        Span(1, 0, 8 * hour, 10**9),
        Span(3, 10 * hour, 20 * hour, 4000),  # 2 was dropped: 1 says nothing of the rate
        Span(4, 30 * hour, 39 * hour, 1000),
    ]
    assert [span.number for span in unbroken(spans)] == [3, 4]
    # The last 24 of 40 hours: 14 of the 20 hours of interval 3, all of 4.
    assert per_hour(spans, 40 * hour) == pytest.approx((4000 * 14 / 20 + 1000) / 24)
    assert per_hour(spans, 40 * hour, window_ns=100 * hour) == pytest.approx(5000 / 30)
    assert made_per_hour([(15 * hour, 1), (17 * hour, 240)], spans, 40 * hour) == 10
    assert per_hour([Span(1, 0, 0, 500)], 59 * SECOND_NS) is None
    assert per_hour([], 40 * hour) is None


def test_every_instant_is_whole_intervals_then_the_write_rate() -> None:
    spans = [Span(n, n * HOUR_NS, (n + 1) * HOUR_NS - 1, 100 * n) for n in range(1, 5)]
    now = 5 * HOUR_NS
    assert forecast.every_instant(spans, now, HOUR_NS).measured == 400
    assert forecast.every_instant(spans, now, HOUR_NS + 1).measured == 700
    longer = forecast.every_instant(spans, now, 24 * HOUR_NS)
    assert (longer.measured, longer.extrapolated, longer.bytes) == (1000, 20 * 250, 6000)


def test_thinned_history_says_nothing_of_the_rate() -> None:
    spans = [Span(n, n * HOUR_NS, (n + 1) * HOUR_NS - 1, 100 * n, 60 if n < 3 else 0) for n in range(1, 5)]
    found = forecast.every_instant(spans, 5 * HOUR_NS, 24 * HOUR_NS)
    assert (found.measured, found.per_hour, found.extrapolated) == (700, 350, 22 * 350)


def test_steps_are_counted_each_by_its_own_windows() -> None:
    curve = Curve([Sample(w, 4096 * w // MINUTE_NS, 0, 0, 1, 1) for w in (MINUTE_NS, HOUR_NS)], 1 << 40)
    policy = Policy(keep_rp=parse_steps("1h 24h/1m 7d/1h"), bp_every_ns=20 * MINUTE_NS)
    minutes, hours = forecast.thinned(policy, curve, per_hour=1e9)
    assert (minutes.count, minutes.bytes) == (23 * 60, 23 * 60 * 4096)
    # Every interval gives its end: no further apart than base points.
    assert (hours.count, hours.bytes) == (6 * 24 * 3, 6 * 24 * 3 * 20 * 4096)
    assert forecast.all_instants_ns(policy) == HOUR_NS
    assert {MINUTE_NS, 20 * MINUTE_NS} <= forecast.windows(policy)
    # No more than there is.
    assert forecast.thinned(policy, curve, per_hour=10)[0].bytes == 230
    assert forecast.thinned(Policy(), curve, per_hour=10) == ()


@given(
    st.integers(1, 30),
    st.integers(1, 90),
    st.lists(st.sampled_from(["3h", "48h", "2d", "7d", "4w", "5m"]), unique_by=lambda rule: rule[-1]),
)
def test_gaps_are_those_between_the_ages_of_what_is_kept(minutes: int, times: int, rules: list[str]) -> None:
    every = minutes * MINUTE_NS
    policy = Policy(
        bp_every_ns=every, keep_rp=(Step(every * times),), keep_bp=parse_slots(" ".join(rules) or "none")
    )
    units = {"h": 1, "d": 24, "w": 168, "m": 672}
    ages = {every * k for k in range(times + 1)}
    ages |= {
        k * units[r[-1]] * HOUR_NS
        for r in rules
        for k in range(1, int(r[:-1]) + 1)
        if k * units[r[-1]] * HOUR_NS > every * times
    }
    found = forecast.gaps(policy)
    assert sum(found.values()) == len(ages) - 1
    assert sum(gap * count for gap, count in found.items()) == max(ages)
    counted = sorted(ages)
    assert found == {gap: sum(b - a == gap for a, b in pairwise(counted)) for gap in found}


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 10**9)), max_size=8, unique_by=lambda p: p[0]),
    st.lists(st.integers(1, 10**8), min_size=2, max_size=6),
)
def test_the_curve_never_falls_and_never_passes_the_disk(
    points: list[tuple[int, int]], asked: list[int]
) -> None:
    size = 5 * 10**8
    samples = [Sample(window, held, held, held, 1, 1) for window, held in sorted(points)]
    curve = Curve(samples, size)
    values = [curve.at(window) for window in sorted(asked)]
    assert values == sorted(values) and all(0 <= value <= size for value in values)
    for found in samples:
        assert curve.at(found.window_ns) >= min(found.bytes, size)


def test_the_curve_goes_on_as_it_was_going() -> None:
    flat = Curve([Sample(w, 4096, 4096, 4096, 1, 1) for w in (10, 100, 1000)], 1 << 40)
    assert flat.at(10**9) == 4096
    steep = Curve([Sample(w, 7 * w, 0, 0, 1, 1) for w in (10, 100, 1000)], 1 << 40)
    assert steep.at(10**6) == 7 * 10**6 and steep.at(50) == 350 and steep.at(5) == 35
    assert Curve([], 1 << 40).at(100) == 0


@pytest.mark.parametrize("seed", range(4))
def test_what_is_extrapolated_is_a_little_more_than_what_comes(seed: int) -> None:
    """Many writes to few places: ever fewer of them are new, so the slope so far errs on the safe side."""
    dice = random.Random(seed)
    blocks = [int(dice.expovariate(1 / 300)) for _ in range(16_000)]

    def distinct_in(window: int) -> Sample:
        parts = [len(set(blocks[at : at + window])) * BLOCK for at in range(0, len(blocks), window)]
        return Sample(window, sum(parts) // len(parts), min(parts), max(parts), len(parts), len(blocks))

    curve = Curve([distinct_in(window) for window in (500, 1000, 2000, 4000)], 1 << 40)
    for window in (8000, 16_000):
        comes = distinct_in(window).bytes
        assert comes * 0.97 <= curve.at(window) <= comes * 1.5


# --- measured


@pytest.fixture(scope="module")
def busy() -> Iterator[tuple[World, Line, list[tuple[int, int]]]]:
    """Ten hours in six intervals with a loss of power; (time, block) of every block that was written."""
    dice = random.Random(7)
    wrote: list[tuple[int, int]] = []
    with scratch() as path:
        world = World(path)
        with Catalog.open(world.state, writable=True) as catalog:
            id = catalog.next_id()
            line = world.add(SIZE)
            catalog.add("d1", id)
        line.write(0, b"f" * BLOCK)
        line.synced()
        for number in range(300):
            world.now_ns += 2 * MINUTE_NS
            if number % 60 == 59:
                line.cut()
            if number == 150:
                world.reboot(clean=False)
            block, count = dice.randrange(SIZE // BLOCK // 4), dice.randrange(1, 4)
            unaligned = dice.choice((0, 512))
            line.write(block * BLOCK + unaligned, dice.randbytes(count * BLOCK - unaligned))
            wrote += [(world.now_ns, block + k) for k in range(count)]
            if number % 20 == 0:
                line.zero(dice.randrange(SIZE // BLOCK) * BLOCK, BLOCK, trim=True)
        line.writer.commit()
        yield world, line, wrote
        world.close()


def test_samples_are_exact_where_all_is_looked_at(busy: tuple[World, Line, list[tuple[int, int]]]) -> None:
    world, line, wrote = busy
    spans = usage.read_spans(line.directory)
    assert [span.number for span in spans] == [1, 2, 3, 4, 5, 6]
    start, now = spans[0].first_ns, world.now_ns
    journal = Journal(line.directory)
    try:
        found = distinct.sample(journal, start_ns=start, now_ns=now, wanted=[20 * MINUTE_NS])
    finally:
        journal.close()
    by_length = {sample.window_ns: sample for sample in found}
    assert {20 * MINUTE_NS, HOUR_NS, now - start} <= set(by_length)
    for length, sample in by_length.items():
        places = min(distinct.MAX_PLACES, (now - start) // length)
        sizes = []
        for k in range(places):
            room = now - start - length
            begin = start + (room * k // (places - 1) if places > 1 else room)
            sizes.append(BLOCK * len({block for at, block in wrote if begin <= at < begin + length}))
        assert (sample.places, sample.least, sample.most) == (places, min(sizes), max(sizes))
        assert sample.bytes == round(sum(sizes) / places)
    # Numbers that were jumped over are no records.
    assert by_length[now - start].records < 1000


def test_what_is_read_is_bounded_and_said(
    busy: tuple[World, Line, list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, line, _ = busy
    monkeypatch.setattr(distinct, "MAX_RECORDS", 20)
    monkeypatch.setattr(distinct, "MAX_ONE", 80)
    start = usage.read_spans(line.directory)[0].first_ns
    journal = Journal(line.directory)
    try:
        found = distinct.sample(journal, start_ns=start, now_ns=world.now_ns, wanted=[20 * MINUTE_NS])
    finally:
        journal.close()
    assert found and all(sample.records <= 80 for sample in found)
    assert found[-1].window_ns < (world.now_ns - start) // 2
    assert Curve(found, SIZE).measured_ns == found[-1].window_ns


def test_bytes_by_kind_are_all_that_the_files_take(busy: tuple[World, Line, list[tuple[int, int]]]) -> None:
    _, line, _ = busy
    for name in ("bp-0.qcow2", "bp-0.map", "bp-0.json", "odd.tmp"):
        (line.directory / name).write_bytes(b"x" * 10_000)
    try:
        kinds = usage.by_kind(line.directory)
        used = {path: path.stat().st_blocks * 512 for path in line.directory.rglob("*") if path.is_file()}
        assert sum(kinds.values()) == sum(used.values())
        for kind, suffix in (("data", ".data"), ("headers", ".log"), ("base_points", ".qcow2")):
            assert kinds[kind] == sum(size for path, size in used.items() if path.suffix == suffix) > 0
        assert kinds["maps"] == 2 * kinds["base_points"]
        assert kinds["base"] == used[line.directory / "base.raw"]
        spans = usage.read_spans(line.directory)
        assert sum(span.bytes for span in spans) == kinds["data"] + kinds["headers"] + kinds["index"]
    finally:
        for name in ("bp-0.qcow2", "bp-0.map", "bp-0.json", "odd.tmp"):
            (line.directory / name).unlink()


def test_a_cap_counts_what_pruning_counts(busy: tuple[World, Line, list[tuple[int, int]]]) -> None:
    state = busy[0].state
    (disk,) = usage.survey(state, Config()).disks
    with Catalog.open(state, writable=False) as catalog:
        entry = catalog.names()["d1"]
        found = facts.gather(state, catalog, Config(), entry, now_ns=busy[0].now_ns)
    assert disk.capped_bytes == found.bytes > 0
    kept = forecast.every_instant(disk.spans, busy[0].now_ns, 24 * HOUR_NS)
    assert kept.measured == sum(interval.bytes for interval in found.intervals)


def test_a_cap_in_reach_says_when(busy: tuple[World, Line, list[tuple[int, int]]]) -> None:
    world, _, _ = busy
    free = usage.survey(world.state, Config())
    disk = free.disks[0]
    assert [cap.of for cap in free.caps] == ["file system"] and disk.problem is None
    assert disk.journal_per_hour is not None
    hours = 2.0
    cap = disk.capped_bytes + round(hours * disk.journal_per_hour)
    near = usage.survey(world.state, Config(store_size_cap=cap, policy_size_cap=disk.capped_bytes - 1))
    assert [(c.of, c.then) for c in near.caps] == [
        ("disk d1", "shorten"),
        ("store", "shorten"),
        ("file system", "full"),
    ]
    assert near.caps[0].hours == 0 and near.caps[1].hours == pytest.approx(hours, rel=0.01)
    all_refuse = usage.survey(world.state, Config(store_size_cap=cap, policy_at_cap="refuse"))
    assert [(c.of, c.then) for c in all_refuse.caps] == [("store", "refuse"), ("file system", "full")]
    # What is dropped by then makes room for what comes.
    kept = replace(disk, policy=Policy(keep_rp=(Step(HOUR_NS),), keep_bp=()))
    assert hours_until(kept.parts(), cap) is None


def test_a_policy_that_contradicts_itself_is_said_and_another_can_be_asked_for(
    busy: tuple[World, Line, list[tuple[int, int]]],
) -> None:
    state = busy[0].state
    with Catalog.open(state, writable=True) as catalog:
        entry = catalog.names()["d1"]
        policies.put(catalog, policies.row(policies.disk_row(entry.id), {}, {"keep_rp": "5m"}))
    try:
        (disk,) = usage.survey(state, Config()).disks
        assert disk.journal_per_hour and "bp_every" in str(disk.problem)
        assert (done := cdp(state.path, "forecast", "d1")).returncode == 2 and "bp_every" in done.stderr
        assert cdp(state.path, "forecast", "d1", "--keep", "1h").returncode == 0
    finally:
        with Catalog.open(state, writable=True) as catalog:
            policies.forget(catalog, entry)


def cdp(state: Path, *arguments: str, boot: str = BOOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "recovery.cli", "--state-dir", str(state), *arguments],
        cwd=ROOT,
        env={**os.environ, "CDP_BOOT_ID": boot},
        text=True,
        capture_output=True,
        check=False,
    )


def listing(state: Path) -> dict[str, tuple[int, int]]:
    """Every file with its length and time of change."""
    stats = {str(path): path.stat() for path in state.rglob("*") if path.is_file()}
    return {path: (s.st_size, s.st_mtime_ns) for path, s in stats.items() if "catalog" not in path}


def test_the_commands_answer_offline_and_change_nothing(
    busy: tuple[World, Line, list[tuple[int, int]]],
) -> None:
    world, _, wrote = busy
    state = world.state.path
    before = listing(state)
    done = cdp(state, "usage", "d1", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    (disk,) = shown["disks"]
    assert disk["bytes"] == sum(disk[kind] for kind in usage.KINDS) and disk["per_hour"] > 0
    assert disk["held_ns"] == pytest.approx(600 * MINUTE_NS, abs=3 * MINUTE_NS)

    done = cdp(state, "forecast", "d1", "--keep", "24h", "--keep-bp", "48h 7d 4w", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    rp, bp = value["rp"], value["bp"]
    assert rp["bytes"] == rp["measured"] + rp["extrapolated"] and rp["extrapolated"] > rp["measured"]
    assert bp["bytes"] == bp["oldest_bytes"] + sum(g["count"] * g["bytes_each"] for g in bp["gaps"])
    assert bp["oldest_bytes"] <= SIZE and value["bytes"] == rp["bytes"] + bp["bytes"] + value["base"]
    longest = value["samples"][-1]
    assert longest["bytes"] == pytest.approx(BLOCK * len({block for _, block in wrote}), rel=0.01)

    done = cdp(state, "forecast", "d1", "--keep", "1h 9h/20m", "--bp-every", "1h", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    (step,) = value["rp"]["thinned"]
    assert value["keep"] == "1h 9h/20m" and step["count"] == 8 * 3
    assert value["rp"]["every_instant_ns"] == HOUR_NS and value["rp"]["extrapolated"] == 0
    # What thinning would keep: of each 20 minutes the blocks that were written.
    windows = Counter((at // (20 * MINUTE_NS), block) for at, block in wrote)
    per_window = BLOCK * len(windows) / len({window for window, _ in windows})
    assert step["bytes"] == pytest.approx(24 * per_window, rel=0.2)
    shown = cdp(state, "forecast", "d1", "--keep", "1h 9h/20m", "--bp-every", "1h").stdout
    assert "every instant of 1h:" in shown and "one each 20m until 9h" in shown

    for arguments in (["usage"], ["forecast", "d1"]):
        done = cdp(state, *arguments)
        assert done.returncode == 0 and "d1" in done.stdout + arguments[-1], done.stderr
        assert "Traceback" not in done.stderr
    assert listing(state) == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["forecast", "none"], 2, "cdp disk list"),
        (["usage", "none"], 2, "cdp disk list"),
        (["forecast", "d1", "--keep", "soon"], 2, "--keep"),
        (["forecast", "d1", "--keep", "5m"], 2, "bp_every"),
        (["forecast", "d1", "--keep-bp", "7x"], 2, "--keep-bp"),
        (["usage", "--config", "/nowhere.toml"], 2, "--config"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    busy: tuple[World, Line, list[tuple[int, int]]], arguments: list[str], code: int, said: str
) -> None:
    done = cdp(busy[0].state.path, *arguments)
    assert (done.returncode, done.stdout) == (code, "") and said in done.stderr


def test_a_disk_without_history_or_with_a_damaged_one_is_said() -> None:
    with scratch() as path:
        world = World(path)
        state = world.state
        with Catalog.open(state, writable=True) as catalog:
            for id, name in (("t1", "new"), ("t2", "torn"), ("t3", "lost")):
                timeline.create_timeline(
                    state, id=id, name=name, vm=None, size=SIZE, base=EmptyBase(), now_ns=world.now_ns
                )
                catalog.add(name, id)
        shutil.rmtree(state.timeline("t3"))
        interval = state.timeline("t2") / "intervals" / "000001"
        interval.mkdir()
        (interval / "00000001.log").write_bytes(b"torn" * 2048)
        done = cdp(state.path, "usage", "--json")
        shown = {disk["disk"]: disk for disk in json.loads(done.stdout)["disks"]}
        assert done.returncode == 0
        assert shown["new"]["error"] is None and shown["new"]["per_hour"] is None
        assert shown["torn"]["error"] and shown["torn"]["headers"] == 8192
        assert shown["lost"]["error"] and shown["lost"]["bytes"] == 0
        assert (no := cdp(state.path, "forecast", "new")).returncode == 3 and "first copy" in no.stderr
        assert (no := cdp(state.path, "forecast", "torn")).returncode == 4 and "cdp check" in no.stderr


@pytest.mark.real
def test_the_service_answers_the_same(busy: tuple[World, Line, list[tuple[int, int]]]) -> None:
    with scratch() as path:
        state = busy[0].clone(path).state
        Catalog.recover(state)
        with Server(state.path) as server:
            shown = json.loads(cdp(state.path, "usage", "d1", "--json", boot=boot_id()).stdout)
            told = server.get("/v1/usage?disk=d1")
            kinds = ("disk", "id", "state", "base", "data")  # the others grow: base points are written
            assert [told["disks"][0][kind] for kind in kinds] == [shown["disks"][0][kind] for kind in kinds]
            assert [cap["of"] for cap in told["caps"]] == [cap["of"] for cap in shown["caps"]]
            asked = "disk=d1&keep=1h%209h/20m&bp_every=1h"
            value = server.get(f"/v1/forecast?{asked}")
            arguments = ("--keep", "1h 9h/20m", "--bp-every", "1h")
            same = json.loads(cdp(state.path, "forecast", "d1", *arguments, "--json", boot=boot_id()).stdout)
            assert value.keys() == same.keys() and value["rp"]["thinned"] == same["rp"]["thinned"]
            assert value["bytes"] == pytest.approx(same["bytes"], rel=0.01)
            for query, status, says in (
                ("disk=d1&keep=soon", 400, "--keep"),
                ("disk=none", 404, "no disk none"),
                ("disk=d1&keep=5m", 400, "bp_every"),
            ):
                with pytest.raises(ApiError, match=f"{status}: .*{says}"):
                    server.get(f"/v1/forecast?{query}")
            paths = server.get("/v1/openapi.json")["paths"]
            for route in ("/v1/usage", "/v1/forecast"):
                assert paths[route]["get"]["x-least-role"] == "viewer"
