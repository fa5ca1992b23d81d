"""Format versions: a real directory of version 1 comes up to date whole, also when killed anywhere; a newer one is refused."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cdpserver import durable, upgrade
from cdpserver.catalog import Catalog, Row
from cdpserver.catalog.content import read_copy
from cdpserver.catalog.rows import FORMAT as CATALOG_FORMAT
from cdpserver.errors import RefusedError
from cdpserver.events import EventLog, read_events
from cdpserver.state import OLDEST_VERSION, VERSION, StateDir
from tests.core import ROOT
from tests.dying import Step, dies_at
from tests.whole import IDS, digests_of, read_all
from tools.kit.server import Server

FIXTURES = ROOT / "tests" / "fixtures"
DIGESTS: dict[str, dict[str, str]] = json.loads((FIXTURES / "state-v1.json").read_text())
NAMES = dict(sorted(IDS.items()))


@pytest.fixture
def old(short_path: Path) -> StateDir:
    """A directory that the last server of version 1 left."""
    with tarfile.open(FIXTURES / "state-v1.tar.xz") as tar:
        tar.extractall(short_path)
    state = StateDir(short_path / "s")
    assert state.version() == 1
    return state


def bring_up(state: StateDir) -> list[dict[str, Any]]:
    """Upgrade; the events."""
    before = len(read_events(state.events, 1000))
    with state.lock():
        upgrade.upgrade(state, EventLog(state.events))
    return read_events(state.events, 1000)[before:]


def check_whole(state: StateDir) -> None:
    """It is of this version, and every name and every instant is what it was."""
    opened = StateDir.open(state.path)
    assert Catalog.recover(opened) == []
    with Catalog.open(opened, writable=True) as catalog:
        assert {name: entry.id for name, entry in catalog.names().items()} == NAMES
        assert catalog.rows("locks") == catalog.rows("policies") == {}
        catalog.put_row("locks", Row("k1", 1, {}))
        assert catalog.next_id() == "t5"
    assert read_copy(state.catalog_copy).rows["locks"] == {"k1": Row("k1", 1, {})}
    assert digests_of(read_all(opened)) == DIGESTS


def test_the_fixture_says_something() -> None:
    assert [len(DIGESTS[id]) > 5 for id in IDS.values()] == [True, True, True, False]
    assert len(set(DIGESTS["t1"].values())) > 5


def test_version_1_is_upgraded(old: StateDir) -> None:
    said = [(event["event"], event["from_version"], event["to_version"]) for event in bring_up(old)]
    assert said == [("service.upgraded", version, version + 1) for version in range(1, VERSION)]
    check_whole(old)
    assert bring_up(old) == []


def test_the_steps_are_a_chain() -> None:
    assert [step.version for step in upgrade.STEPS] == list(range(OLDEST_VERSION, VERSION))


def every_step(dying: Callable[[Step], Step]) -> None:
    """Durable operations. LMDB's own syncs are in C: a death just before and just after its work."""
    for name in ("rename", "fsync", "fdatasync", "write"):
        setattr(os, name, dying(getattr(os, name)))
    upgrade_module = sys.modules["cdpserver.catalog.upgrade"]
    real_add = upgrade_module.__dict__["add_row_tables"]
    setattr(upgrade_module, "add_row_tables", dying(lambda path: (real_add(path), dying(int)())))  # noqa: B010


def test_an_upgrade_killed_anywhere_goes_on_at_the_next_start(old: StateDir, short_path: Path) -> None:
    names = durable.TEMPORARY
    for number in range(1, 100):
        copy = StateDir(short_path / f"c{number}")
        subprocess.run(["cp", "-a", old.path, copy.path], check=True)
        if not dies_at(number, partial(upgrade.upgrade, copy, _Silent(copy.events)), every_step):
            break
        state = StateDir.create_or_open(copy.path)
        assert state.version() in range(1, VERSION + 1)
        for left_over in state.path.glob(f"{names}*"):
            left_over.unlink()  # as the service's sweep does
        bring_up(state)
        assert Catalog.recover(state) == []
        with Catalog.open(StateDir.open(state.path), writable=True) as catalog:
            assert {name: entry.id for name, entry in catalog.names().items()} == NAMES
            assert catalog.rows("locks") == {}
    assert number > 8
    check_whole(StateDir(short_path / "c1"))
    check_whole(StateDir(short_path / f"c{number - 1}"))


class _Silent(EventLog):
    """Events that are no durable operations."""

    def emit(self, event: str, **fields: Any) -> None:
        assert event


@pytest.mark.parametrize("lost", ["catalog", "copy", "both"])
def test_an_upgrade_of_a_damaged_catalog_leaves_it_to_the_recovery(old: StateDir, lost: str) -> None:
    if lost != "copy":
        os.truncate(old.catalog / "data.mdb", 0)
    if lost != "catalog":
        old.catalog_copy.unlink()
    bring_up(old)
    state = StateDir.open(old.path)
    said = " ".join(Catalog.recover(state))
    assert ("unreadable" in said) == (lost != "copy")
    assert ("Locks and policies are lost" in said) == (lost == "both")
    with Catalog.open(state, writable=True) as catalog:
        assert {name: entry.id for name, entry in catalog.names().items()} == NAMES
        assert catalog.rows("policies") == {}
    assert digests_of(read_all(state)) == DIGESTS


# --- a lost format


@pytest.mark.parametrize("content", [None, b"", b"\0" * 40], ids=["missing", "empty", "zeros"])
@pytest.mark.parametrize("copy", [True, False])
def test_a_lost_format_is_written_anew(old: StateDir, content: bytes | None, copy: bool) -> None:
    if content is None:
        old.format.unlink()
    else:
        old.format.write_bytes(content)
    if not copy:
        old.catalog_copy.unlink()
    with pytest.raises(RefusedError, match="start cdpserver once"):
        StateDir.open(old.path)
    state = StateDir.create_or_open(old.path)
    remade, *upgraded = bring_up(state)
    assert (remade["event"], remade["version"]) == ("service.format-remade", 1)
    assert "format" in remade["said"] and len(upgraded) == VERSION - 1
    check_whole(state)
    state.format.unlink()
    remade, *again = bring_up(state)
    assert remade["version"] == CATALOG_FORMAT, "the copy says no more; steps may be repeated"
    assert [event["event"] for event in again] == ["service.upgraded"] * (VERSION - CATALOG_FORMAT)
    assert read_copy(state.catalog_copy).rows["locks"]


def test_a_lost_format_of_a_newer_version_is_refused(old: StateDir) -> None:
    old.format.unlink()
    copy = json.loads(old.catalog_copy.read_text())
    old.catalog_copy.write_text(json.dumps(copy | {"format": VERSION + 1}))
    with pytest.raises(RefusedError, match=f"version {VERSION + 1}.*upgrade cdpserver"):
        bring_up(StateDir.create_or_open(old.path))
    assert not old.format.exists()


# --- who refuses what


def programs(state: Path) -> dict[str, list[str]]:
    """Everything that opens a state directory."""
    nbdkit = ["nbdkit", "-U", "-", "--run", "true", "python"]
    cdp = [sys.executable, "-m", "recovery.cli"]
    return {
        "cdpserver": [sys.executable, "-m", "cdpserver.service.main", "--state-dir", str(state)],
        "cdp check": [*cdp, "--state-dir", str(state), "check", "web/root"],
        "cdp index rebuild": [*cdp, "--state-dir", str(state), "index", "rebuild", "web/root"],
        "indexer": [sys.executable, "-m", "cdpserver.index.indexer", "--state-dir", str(state)],
        "target": [*nbdkit, str(ROOT / "nbdplugin/target.py"), f"state_dir={state}"],
        "export": [*nbdkit, str(ROOT / "nbdplugin/export.py"), f"state_dir={state}"],
    }


def said_by(command: list[str], *more: str) -> tuple[int, str]:
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("program", programs(Path()))
def test_a_newer_version_is_refused_by_everyone(old: StateDir, program: str) -> None:
    old.set_version(VERSION + 1)
    before = sorted((path, path.lstat().st_mtime_ns) for path in old.path.rglob("*"))
    status, said = said_by(programs(old.path)[program])
    assert status != 0
    assert f"has format version {VERSION + 1}, this cdpserver knows {VERSION}" in said
    assert "upgrade cdpserver" in said
    assert sorted((path, path.lstat().st_mtime_ns) for path in old.path.rglob("*")) == before


@pytest.mark.parametrize("program", [name for name in programs(Path()) if name != "cdpserver"])
def test_an_older_version_is_refused_by_readers(old: StateDir, program: str) -> None:
    status, said = said_by(programs(old.path)[program])
    assert status != 0
    assert "has format version 1" in said and "start cdpserver once to upgrade it" in said
    assert old.version() == 1


def test_a_start_may_be_told_not_to_upgrade(old: StateDir) -> None:
    command = programs(old.path)["cdpserver"]
    status, said = said_by(command, "--no-upgrade")
    assert (status, old.version()) == (3, 1)
    assert "start it without --no-upgrade" in said
    assert said_by(command, "--upgrade-only")[0] == 0
    check_whole(old)
    status, said = said_by(command, "--upgrade-only", "--no-upgrade")
    assert status == 2 and "not allowed with" in said


@pytest.mark.real
def test_the_service_upgrades_and_serves(old: StateDir) -> None:
    with Server(old.path) as server:
        assert {disk["name"]: disk["state"] for disk in server.client.disks()} == {
            "copying": "empty",  # a first copy of another boot begins anew
            "image": "unordered",
            "trial": "fork",
            "web/root": "unordered",
        }
    assert [e["event"] for e in read_events(old.events, 1000)].count("service.upgraded") == VERSION - 1
    found = read_all(StateDir.open(old.path))
    for id, digests in DIGESTS.items():
        assert not found[id].errors
        assert digests.items() <= found[id].digests.items()
