"""Policies: what can be said, what contradicts itself, which layer wins, and that it holds at once."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver.catalog import Catalog, Row
from cdpserver.config import Config, parse_config
from cdpserver.errors import CorruptError, UsageError
from cdpserver.retention import policies
from cdpserver.retention.policy import (
    DAY_NS,
    FIELDS,
    HOUR_NS,
    SECOND_NS,
    Layer,
    Policy,
    check_cap,
    combine,
    contradiction,
    parse_values,
)
from cdpserver.retention.slots import Rule, format_slots, parse_slots, slot_of, span_ns
from cdpserver.state import StateDir
from cdpserver.timeline import EmptyBase, create_timeline
from recovery.retention_tree import POLICY_OPTIONS
from tests.test_service import ApiError, Server, pattern, until, write

TIMES = st.integers(0, 4_000_000_000).map(lambda seconds: seconds * SECOND_NS)
RULES = st.dictionaries(st.sampled_from("hdwmy"), st.integers(1, 9999)).map(
    lambda found: tuple(Rule(found[unit], unit) for unit in "hdwmy" if unit in found)
)


# --- slots


@given(RULES)
def test_slots_are_read_as_they_are_written(rules: tuple[Rule, ...]) -> None:
    assert parse_slots(format_slots(rules)) == rules


@pytest.mark.parametrize(
    "text", ["", "x", "0h", "48", "48h 7", "3h 4h", "none 3h", "-1d", "1q", "10000h", "3H"]
)
def test_what_are_no_slots(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_slots(text)
    assert "none" in caught.value.hint


@given(st.text())
def test_any_text_is_slots_or_refused(text: str) -> None:
    try:
        rules = parse_slots(text)
    except UsageError:
        return
    assert parse_slots(format_slots(rules)) == rules


@given(TIMES)
def test_slots_are_those_of_the_calendar(time_ns: int) -> None:
    day = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=time_ns // SECOND_NS)
    same: dict[str, Callable[[datetime], object]] = {
        "h": lambda d: (d.date(), d.hour),
        "d": lambda d: d.date(),
        "w": lambda d: d.isocalendar()[:2],
        "m": lambda d: (d.year, d.month),
        "y": lambda d: d.year,
    }
    for unit, key in same.items():
        for step in (
            timedelta(hours=1),
            timedelta(days=1),
            timedelta(days=7),
            timedelta(days=31),
            timedelta(days=366),
        ):
            other = day + step
            other_ns = time_ns + int(step.total_seconds()) * SECOND_NS
            assert (slot_of(unit, time_ns) == slot_of(unit, other_ns)) == (key(day) == key(other))


@given(st.integers(1, 100), st.sampled_from("hdwmy"), TIMES)
def test_a_rule_covers_what_it_promises_and_ends(count: int, unit: str, now_ns: int) -> None:
    rule = Rule(count, unit)
    now_ns += 110 * 366 * DAY_NS
    assert rule.covers(now_ns - rule.span_ns, now_ns)
    assert rule.covers(now_ns + 1000 * DAY_NS, now_ns)
    longest = {"h": HOUR_NS, "d": DAY_NS, "w": 7 * DAY_NS, "m": 31 * DAY_NS, "y": 366 * DAY_NS}[unit]
    assert not rule.covers(now_ns - (count + 2) * longest, now_ns)


# --- values


def test_the_defaults_are_the_written_ones_and_sound() -> None:
    shown = {field.name: field.write(Policy()) for field in FIELDS}
    assert shown == {
        "rp_every": "1s",
        "bp_every": "20m",
        "keep_rp": "1d",
        "keep_bp": "48h 7d 4w 12m",
        "max_chain": "128",
        "size_cap": "none",
        "at_cap": "shorten",
        "mark_every": "none",
        "freeze": "no",
        "drill": "none",
        "drill_command": "none",
        "drill_marker": "none",
        "drill_check": "none",
        "backup": "none",
        "backup_to": "none",
        "backup_copy": "none",
    }
    assert contradiction(Policy()) is None
    assert combine([Layer("x", parse_values(shown))]).policy == Policy()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rp_every", "10ms"),
        ("rp_every", "2h"),
        ("bp_every", "9s"),
        ("bp_every", "8d"),
        ("keep_rp", "-1s"),
        ("keep_rp", "11y"),
        ("keep_bp", "often"),
        ("max_chain", "1"),
        ("max_chain", "129"),
        ("max_chain", "many"),
        ("size_cap", "63M"),
        ("size_cap", "1000000T"),
        ("at_cap", "explode"),
        ("drill", "25:00"),
        ("drill_command", "web.qemu"),
        ("drill_marker", "("),
        ("colour", "red"),
    ],
)
def test_a_value_that_cannot_be_meant_names_its_option(name: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_values({name: text})
    assert name.replace("_", "-") in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({"rp_every": "1m", "bp_every": "30s"}, "rp_every 1m is longer than bp_every 30s"),
        ({"keep_rp": "10m"}, "bp_every 20m is longer than keep_rp 10m"),
        ({"keep_rp": "60d", "keep_bp": "48h 7d 4w"}, "keep_bp 48h 7d 4w ends before keep_rp 60d"),
        ({"keep_rp": "60d", "keep_bp": "2m"}, "ends before"),
    ],
)
def test_a_policy_that_contradicts_itself(texts: dict[str, str], says: str) -> None:
    found = contradiction(combine([Layer("x", parse_values(texts))]).policy)
    assert found is not None and says in found.message and found.hint


def test_no_base_points_beyond_the_recovery_points_can_be_meant() -> None:
    assert contradiction(replace(Policy(), keep_bp=())) is None
    assert span_ns(()) == 0


def test_a_cap_must_hold_what_always_stays() -> None:
    check_cap(Policy(), fixed_bytes=1 << 60)
    check_cap(replace(Policy(), size_cap=1 << 30), fixed_bytes=1 << 30)
    with pytest.raises(UsageError, match="always stay"):
        check_cap(replace(Policy(), size_cap=1 << 30), fixed_bytes=(1 << 30) + 1)


def test_every_value_has_an_option_of_the_command_line() -> None:
    assert [name for name, _, _ in POLICY_OPTIONS] == [field.name for field in FIELDS]


# --- layers


@pytest.fixture
def catalog(tmp_path: Path) -> Any:
    state = StateDir.create_or_open(tmp_path / "s")
    with Catalog.open(state, writable=True) as found:
        for name, vm in (("a", "web"), ("b", "web"), ("c", None)):
            id = found.next_id()
            create_timeline(state, id=id, name=name, vm=vm, size=1 << 20, base=EmptyBase(), now_ns=5)
            found.add(f"{vm}/{name}" if vm else name, id)
        yield found


def test_each_layer_goes_before_the_one_below(catalog: Catalog) -> None:
    config = parse_config("[policy]\nkeep_rp = '2d'\nbp_every = '1h'\n")
    vm = {"keep_rp": "3d", "size_cap": "1G"}
    policies.put(catalog, policies.row(policies.vm_row("web"), {"vm": "web"}, vm))
    policies.put(catalog, policies.row(policies.disk_row("t1"), {"disk": "t1"}, {"size_cap": "none"}))
    found = {name: policies.effective(catalog, config, entry) for name, entry in catalog.names().items()}
    assert [found[n].policy.keep_rp_ns // DAY_NS for n in ("web/a", "web/b", "c")] == [3, 3, 2]
    assert [found[n].policy.size_cap for n in ("web/a", "web/b", "c")] == [None, 1 << 30, None]
    assert {f.policy.bp_every_ns for f in found.values()} == {HOUR_NS}
    assert found["web/a"].sources == {"keep_rp": "VM web", "bp_every": "configuration", "size_cap": "disk"}
    assert found["c"].sources == {"keep_rp": "configuration", "bp_every": "configuration"}


def test_policies_go_with_their_disks(catalog: Catalog) -> None:
    policies.put(catalog, policies.row(policies.vm_row("web"), {"vm": "web"}, {"keep_rp": "3d"}))
    policies.put(catalog, policies.row(policies.disk_row("t1"), {"disk": "t1"}, {"keep_rp": "4d"}))
    kept = []
    for name in ("web/a", "web/b", "c"):
        policies.forget(catalog, catalog.remove(name))
        kept.append(sorted(catalog.rows("policies")))
    assert kept == [[policies.vm_row("web")], [], []]


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (2, {"values": {}}),
        (1, {}),
        (1, {"values": 5}),
        (1, {"values": {"keep_rp": 5}}),
        (1, {"values": {"keep_rp": "soon"}}),
        (1, {"values": {"colour": "red"}}),
    ],
)
def test_a_row_that_cannot_be_read_is_damage(catalog: Catalog, schema: int, fields: dict[str, Any]) -> None:
    catalog.put_row("policies", Row(policies.disk_row("t1"), schema, fields))
    names = catalog.names()
    with pytest.raises(CorruptError, match="disk-t1"):
        policies.effective(catalog, Config(), names["web/a"])
    assert policies.effective(catalog, Config(), names["web/b"]).policy == Policy()


# --- the service and the command


def cdp(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recovery.cli", "--state-dir", str(server.state_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.real
def test_policies_of_disks_and_vms(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        uri = server.add("vda", vm="web")
        server.add("lone")
        done = cdp(server, "policy", "set", "web", "--keep-rp", "3d", "--size-cap", "500G", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sources"]["keep_rp"] == "VM web"
        shown = cdp(server, "policy", "set", "web/vda", "--keep-rp", "36h", "--keep-bp", "48h 7d 4w").stdout
        assert [line.split() for line in shown.splitlines()][3:5] == [
            ["keep_rp", "36h", "disk"],
            ["keep_bp", "48h", "7d", "4w", "disk"],
        ]
        assert ["size_cap", "500G", "VM", "web"] in [line.split() for line in shown.splitlines()]
        assert json.loads(cdp(server, "policy", "show", "lone", "--json").stdout)["keep_rp"] == "1d"

        for arguments, code, says in (
            (["set", "web/vda", "--keep-rp", "10m"], 2, "bp_every 20m is longer than keep_rp 10m"),
            (["set", "web", "--bp-every", "2d"], 2, "web/vda: bp_every 2d is longer than keep_rp 36h"),
            (["set", "web/vda"], 2, "nothing to set"),
            (["set", "nobody", "--keep-rp", "2d"], 2, "no disk or VM nobody"),
            (["set", "web/vda", "--at-cap", "burn"], 2, "it takes shorten or refuse"),
            (["show", "nobody"], 2, "no disk or VM nobody"),
        ):
            done = cdp(server, "policy", *arguments)
            assert (done.returncode, says in done.stderr) == (code, True), done.stderr
        with pytest.raises(ApiError, match="400"):
            server.request("PATCH", "/v1/policies/lone", {"colour": "red"})
        assert server.get("/v1/policies/web/vda")["keep_rp"] == "36h"

        assert cdp(server, "policy", "clear", "web/vda").returncode == 0
        assert server.get("/v1/policies/web/vda")["keep_rp"] == "3d"
        server.delete("/v1/disks/web/vda")
        assert not json.loads((server.state_dir / "catalog.json").read_text())["policies"]
        assert uri and [e["event"] for e in server.events("policy.cleared")] == ["policy.cleared"]


@pytest.mark.real
def test_how_often_base_points_come_changes_without_a_restart(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        uri = server.add()
        write(uri, pattern(1))
        server.synced("d")
        write(uri, pattern(2))
        until(lambda: server.get("/v1/disks/d:points?kind=rp"), "point")
        # The scheduler has looked, and put the disk off for the rest of its 20 minutes.
        assert len(server.events("basepoint.cut")) == 1
        server.request("PATCH", "/v1/policies/d", {"bp_every": "10s"})
        until(lambda: len(server.get("/v1/disks/d:basepoints")) == 2, "second base point")
