"""The clock: kept over restarts, never back over reboots, shared by all processes of a boot."""

import json
import time
from pathlib import Path

import pytest

from cdpserver import clock as clocks
from cdpserver.clock import Clock, boot_id, fix_clock, wall_difference_ns
from cdpserver.errors import CorruptError, RefusedError, UsageError

HOUR = 3_600_000_000_000


def never() -> int:
    pytest.fail("the store was scanned")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clock.json"


def reboot(patch: pytest.MonkeyPatch, name: str) -> None:
    patch.setenv("CDP_BOOT_ID", name)


def test_the_boot_id_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CDP_BOOT_ID", raising=False)
    assert boot_id() == Path(clocks.BOOT_ID_FILE).read_text().strip()
    monkeypatch.setenv("CDP_BOOT_ID", "")
    assert len(boot_id()) == 36
    monkeypatch.setenv("CDP_BOOT_ID", "boot-0001")
    assert boot_id() == "boot-0001"


@pytest.mark.parametrize("bad", ["short", "../../x/y", "a" * 65, "boot\n0001"])
def test_a_boot_id_can_stand_in_a_file_name(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("CDP_BOOT_ID", bad)
    with pytest.raises(UsageError):
        boot_id()


def test_a_new_clock_shows_the_wall_time(path: Path) -> None:
    clock, fixed = fix_clock(path, lambda: 0)
    assert fixed
    assert abs(wall_difference_ns(clock)) < 1_000_000_000
    assert Clock.load(path) == clock


def test_a_restart_keeps_the_clock(path: Path) -> None:
    clock, _ = fix_clock(path, lambda: 0)
    before = path.stat().st_mtime_ns
    assert fix_clock(path, never) == (clock, False)
    assert path.stat().st_mtime_ns == before


def test_a_reboot_takes_the_wall_clock_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reboot(monkeypatch, "boot-0001")
    first, _ = fix_clock(path, lambda: 0)
    reboot(monkeypatch, "boot-0002")
    stored = first.now_ns()
    monkeypatch.setattr(clocks, "time_ns", lambda: stored + HOUR)
    second, fixed = fix_clock(path, lambda: stored)
    assert fixed
    assert second.now_ns() >= stored + HOUR
    assert wall_difference_ns(second) <= 0


def test_a_wall_clock_behind_the_store_is_not_followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = time.time_ns() + HOUR
    clock, _ = fix_clock(path, lambda: stored)
    first = clock.now_ns()
    assert stored < first < stored + HOUR
    assert clock.now_ns() >= first
    assert -HOUR - 1_000_000_000 < wall_difference_ns(clock) < -HOUR + 1_000_000_000


def test_the_floor_holds_whatever_the_offset() -> None:
    assert Clock("boot", 0, 10**20).now_ns() == 10**20
    assert Clock("boot", -(10**20), 5).now_ns() == 5


def test_no_clock_or_another_boots_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="start cdpserver"):
        Clock.load(path)
    reboot(monkeypatch, "boot-0001")
    fix_clock(path, lambda: 0)
    reboot(monkeypatch, "boot-0002")
    with pytest.raises(RefusedError, match="start cdpserver"):
        Clock.load(path)


def test_a_store_without_a_clock_is_never_undercut(path: Path) -> None:
    stored = time.time_ns() + HOUR
    clock, fixed = fix_clock(path, lambda: stored)
    assert fixed
    assert clock.floor_ns == stored + 1


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"boot_id": 1, "offset_ns": 0, "floor_ns": 0},
        {"boot_id": "b", "offset_ns": 0.5, "floor_ns": 0},
        {"boot_id": "b", "offset_ns": 0, "floor_ns": -1},
        {"boot_id": "b", "offset_ns": 0, "floor_ns": True},
        {"boot_id": "b", "offset_ns": 0, "floor_ns": 0, "more": 1},
    ],
)
def test_a_damaged_clock_is_corrupt(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
    with pytest.raises(CorruptError):
        Clock.load(path)
    with pytest.raises(CorruptError):
        fix_clock(path, lambda: 0)
