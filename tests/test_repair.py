"""`cdp repair`: a plan first, then what it says; nothing that can be read is taken away, and an interruption is gone on from."""

import json
from pathlib import Path

import pytest

from cdpserver.catalog import Catalog
from cdpserver.check import repair
from cdpserver.check.repair import Plan, Step
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.journal import links
from cdpserver.journal.links import HEAD, Chain
from cdpserver.journal.log import interval_path
from recovery import repair as command
from tests.test_check import BOOT, Disk, disk, flip, record_at, template
from tests.test_check_depth import WROTE_A, cdp, named

__all__ = ["disk", "named", "template"]  # fixtures


def plan(disk: Disk) -> Plan:
    with Catalog.open(disk.state, writable=False) as catalog:
        return repair.look(disk.state, catalog, "d", "t1", boot_id=BOOT)


def no_export() -> None:
    raise AssertionError("nothing is to be exported")


def carry_out(disk: Disk, found: Plan) -> None:
    repair.apply(disk.state, found, "t1", boot_id=BOOT, serve=no_export)  # type: ignore[arg-type]


def damage_index(disk: Disk, interval: int) -> Path:
    """So that it cannot be opened."""
    path = interval_path(disk.directory, interval) / "index.mdb"
    path.write_bytes(bytes(path.stat().st_size))
    return path


def test_nothing_is_planned_for_what_is_whole(named: Disk) -> None:
    assert (plan(named).steps, plan(named).left) == ((), ())


def test_the_index_of_one_interval_is_made_anew_and_no_other(named: Disk) -> None:
    path = damage_index(named, 1)
    others = {other: other.stat().st_ino for other in named.directory.rglob("*.mdb") if other != path}
    found = plan(named)
    assert found.steps == (Step("index", 1),) and found.left == ()
    carry_out(named, found)
    assert named.check().whole and path.exists()
    assert {other: other.stat().st_ino for other in others if other.exists()}.items() >= {
        (other, inode) for other, inode in others.items() if "000001" in str(other)
    }
    assert plan(named).steps == ()


def test_an_index_stays_where_its_records_are_damaged_too(named: Disk) -> None:
    """It may lead to what the records no longer do."""
    path = damage_index(named, 1)
    flip(named.log(1), record_at(1, 4) + 20)
    before = path.read_bytes()
    found = plan(named)
    assert found.steps == () and any("it stays as it is" in what for what in found.left)
    carry_out(named, found)
    assert path.read_bytes() == before


def test_what_no_step_mends_is_said(named: Disk) -> None:
    flip(named.data(1), WROTE_A)
    found = plan(named)
    assert found.steps == () and len(found.left) == 1 and "the payload of record 4" in found.left[0]


def test_a_broken_chain_is_set_aside_and_another_one_begins(named: Disk) -> None:
    with Chain.open(named.directory, named.timeline.uuid) as chain:
        chain.catch_up(10)
    named.open()
    flip(named.directory / links.FILE, HEAD.size + 50)
    kept = (named.directory / links.FILE).read_bytes()
    with Chain.open(named.directory, named.timeline.uuid) as chain:
        torn = len(chain.links)
    assert torn == 0  # a single link: as if it was torn
    flip(named.directory / links.FILE, 20)  # of another timeline
    found = plan(named)
    assert found.steps == (Step("chain", 0),)
    carry_out(named, found)
    assert plan(named).steps == ()
    aside = named.directory / f"{links.FILE}.damaged-1"
    assert aside.stat().st_size == len(kept)


def test_interrupted_after_any_step_it_goes_on_from_the_same_plan(
    named: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_index(named, 1)
    found = Plan("d", (Step("index", 0), Step("index", 1), Step("index", 1)), ("a block",))
    for stop in range(3):

        def tell(step: Step, at: list[int] = [], stop: int = stop) -> None:  # noqa: B006
            at.append(1)
            if len(at) > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            repair.apply(named.state, found, "t1", boot_id=BOOT, serve=no_export, tell=tell)  # type: ignore[arg-type]
        assert plan(named) == found and plan(named).digest == found.digest
    carry_out(named, plan(named))
    assert named.check().whole and plan(named).steps == ()
    (named.directory / repair.FILE).write_text('{"steps": 3}')
    with pytest.raises(CorruptError):
        plan(named)


def test_the_command_does_nothing_before_its_plan_was_said(
    named: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "boot_id", lambda: BOOT)
    words = ("repair", "d", "--state-dir", str(named.state.path))
    assert cdp(monkeypatch, capsys, *words) == (0, "d is whole: nothing to repair\n")
    before = damage_index(named, 1).read_bytes()
    code, out = cdp(monkeypatch, capsys, *words, "--json")
    shown = json.loads(out)
    assert code == 4 and [step["kind"] for step in shown["steps"]] == ["index"]
    assert cdp(monkeypatch, capsys, *words, "--apply", "000000000000")[0] == RefusedError.exit_code
    assert (interval_path(named.directory, 1) / "index.mdb").read_bytes() == before
    code, out = cdp(monkeypatch, capsys, *words, "--apply", shown["plan"])
    assert (code, out) == (0, "d is whole: nothing to repair\n")
    assert named.check().whole
