"""Damage of one disk, or of one row of the catalog, takes nothing else down: it is said, and all others are served."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdpserver.catalog import Catalog, Row
from cdpserver.check import check_timeline
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.state import StateDir
from cdpserver.target.registry import Registry
from cdpserver.timeline import load
from cdpserver.view.history import History
from cdpserver.vm.recovery import record
from tests.core import forget_indexes
from tests.whole import SIZE, Writer
from tools.kit.server import Server
from tools.measure.seed import seed


def replace(path: Path) -> None:
    """A file where there was a directory, or the reverse."""
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no directory": shutil.rmtree,
    "a file for a directory": replace,
    "no timeline.json": lambda path: (path / "timeline.json").unlink(),
    "no JSON": lambda path: (path / "timeline.json").write_bytes(b"\xff{"),
    "no intervals": lambda path: shutil.rmtree(path / "intervals"),
    "a file for intervals": lambda path: replace(path / "intervals"),
    "a file for an interval": lambda path: replace(path / "intervals" / "000001"),
    "a directory for a log": lambda path: replace(path / "intervals" / "000001" / "00000001.log"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_worker_serves_the_others(damage: str, short_path: Path) -> None:
    seed(short_path / "s", 2, records=1)
    state = StateDir.open(short_path / "s")
    DAMAGES[damage](state.timeline("t1"))
    registry = Registry(state)
    registry.boot_id = "another-boot"  # then it looks at every disk at once
    registry.start()
    try:
        assert registry.disk("idle1").connect().size
        with pytest.raises((CorruptError, NotFoundError)):
            registry.disk("idle0")
        if state.timeline("t1").is_dir():
            report = check_timeline(state.path, "t1", boot_id="another-boot")
            assert any("t1" in str(found.finding.path) for found in report.damage)
    finally:
        registry._shut_all({})
        forget_indexes(short_path)
    events = [json.loads(line) for line in state.events.read_text().splitlines()]
    failed = [event["disk"] for event in events if event["event"] == "target.open-failed"]
    assert failed == ["idle0"]


def test_what_cannot_be_opened_is_not_held(short_path: Path) -> None:
    """Else a damaged disk could not be removed until the service ends."""
    seed(short_path / "s", 1, records=1)
    state = StateDir.open(short_path / "s")
    directory = state.timeline("t1")
    shutil.rmtree(directory / "intervals")
    with pytest.raises(CorruptError, match="intervals is damaged"):
        History(state.path, load(directory))
    lease = (directory / "lease").stat().st_ino
    assert not [line for line in Path("/proc/locks").read_text().splitlines() if f":{lease} " in line]


def test_a_damaged_row_keeps_the_forks_that_it_names(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    with state.lock(), Catalog.open(state, writable=True) as catalog:
        catalog.put_row("recoveries", Row("recovery-bad", 99, {"disks": [{"fork": "again/vda"}]}))
        assert record.all_of(catalog) == [] and len(record.unreadable(catalog)) == 1
        assert record.holding(catalog, "other/vda") is None
        for asked in (record.holding, record.find):
            with pytest.raises(CorruptError, match="recovery-bad"):
                asked(catalog, "again/vda" if asked is record.holding else "recovery-bad")


def cdp(server: Server, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "recovery.cli", "--state-dir", str(server.path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.real
def test_the_service_serves_the_others(short_path: Path) -> None:
    """A disk's directory is gone, and there is a row in each table that nobody can read."""
    path = short_path / "s"
    with Server(path) as server:
        for name in ("lost", "whole"):
            Writer(server.client.add_disk(name, size=SIZE, vm=None, base=None)["uri"], 1).blocks(0)
    state = StateDir.open(path)
    shutil.rmtree(state.timeline("t1"))
    with state.lock(), Catalog.open(state, writable=True) as catalog:
        for table in ("recoveries", "vms", "trials"):
            catalog.put_row(table, Row("broken", 99, {}))
    with Server(path) as server:
        seen: dict[str, Any] = {one["name"]: one for one in server.client.overview()["disks"]}
        assert seen["lost"]["state"] == "damaged" and seen["whole"]["state"] != "damaged"
        assert [one["state"] for one in server.client.disks()].count("damaged") == 1
        writer = Writer(server.client.disk("whole")["uri"], 2)
        writer.blocks(1)
        writer.close()
        assert server.child("target-0") is not None
        assert server.client.recoveries() == []
        checked = cdp(server, "check", "lost")
        assert checked.returncode == CorruptError.exit_code, checked.stderr
        assert "t1 is damaged: it is missing" in checked.stdout
        assert cdp(server, "check", "whole").returncode == 0
        assert "lost is damaged" in cdp(server, "status").stdout

        def events() -> list[dict[str, Any]]:
            return [json.loads(line) for line in state.events.read_text().splitlines()]

        said = {event["event"] for event in events()}
        assert {"recovery.unreadable", "vm.unreadable", "trial.unreadable", "target.open-failed"} <= said
        assert any(e["event"] == "service.file-missing" and e["file"] == "timelines/t1" for e in events())
        assert "drill.schedule-unreadable" not in said
        server.client.remove_disk("lost")
        assert [one["name"] for one in server.client.disks()] == ["whole"]
