"""The catalog in `cdp check`: whole it is not mentioned; flips are found, and rows that name what is not there."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from cdpserver.catalog import Catalog, Row
from cdpserver.catalog.content import Entry, read_copy
from cdpserver.catalog.store import build
from cdpserver.locks import Lock
from recovery.check_catalog import SETTLED_S, CatalogCheck
from tests.test_check import SEQS, START_NS, Disk, disk, flip, template
from tests.test_check_depth import cdp, named

__all__ = ["disk", "named", "template"]  # fixtures

LOCK = Lock(
    "lock-1", "t1", SEQS["a2"], START_NS, None, immutable=False, reason="an audit", created_ns=START_NS
)


def put(disk: Disk, *rows: Row, **entries: str) -> None:
    """Locks, and names of disks with their timelines, whatever sense they make."""
    state = disk.state
    content = read_copy(state.catalog_copy)
    content.rows["locks"].update({row.id: row for row in rows})
    content.entries.update({name: Entry(name, id, "live", START_NS) for name, id in entries.items()})
    state.catalog_copy.write_text(json.dumps(content.to_json()))
    os.rename(state.catalog, state.path / "before")
    build(state.catalog, content)


def said(disk: Disk) -> list[str]:
    return [wrong.finding.what for wrong in CatalogCheck(disk.state).wrong]


def test_a_whole_catalog_has_nothing_wrong(named: Disk) -> None:
    put(named, LOCK.row())
    found = CatalogCheck(named.state)
    assert found.wrong == [] and found.readable and found.content is not None
    assert found.content.entries["d"].id == "t1"


def test_rows_that_name_what_is_not_there(named: Disk) -> None:
    locks = [LOCK, replace(LOCK, id="lock-2", timeline="t7"), replace(LOCK, id="lock-3", seq=4000)]
    strange = Row("lock-5", 1, {"timeline": 3})
    put(named, *[lock.row() for lock in locks], strange, e="t8", f="t1")
    found = said(named)
    assert [what for what in found if "lock-1" in what] == []
    for part in (
        "the disk e is of timeline t8, which is not there",
        "the id t8 of e would be given again",
        "the disk d and another one are both of timeline t1",
        "the lock lock-2 is on timeline t7, which no disk has",
        "the lock lock-3 holds seq:4000 of",
        "lock lock-5 in the catalog cannot be read",
    ):
        assert len([what for what in found if part in what]) == 1, (part, found)


def test_a_row_that_no_disk_depends_on_damages_none(
    named: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Catalog.open(named.state, writable=True) as catalog:
        catalog.put_row("vms", Row("broken", 99, {}))
        catalog.put_row("policies", Row("disk-t4", 99, {}))
    found = CatalogCheck(named.state)
    assert len(found.wrong) == 2 and found.of("t1") == ()
    code, out = cdp(monkeypatch, capsys, "check", "d", "--state-dir", str(named.state.path), "--json")
    assert (
        code == 0 and ["protected VM" in one["what"] for one in json.loads(out)["catalog"]].count(True) == 1
    )
    with Catalog.open(named.state, writable=True) as catalog:
        catalog.put_row("policies", Row("disk-t1", 99, {}))
    (damage,) = CatalogCheck(named.state).of("t1")
    assert "policy disk-t1 in the catalog cannot be read" in damage.finding.what


def test_a_timeline_without_a_name_is_said_once_it_has_been_there_for_a_while(
    named: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = named.state.timeline("t5")
    other.mkdir()
    (other / "timeline.json").write_text("{}")
    assert said(named) == []
    monkeypatch.setattr("recovery.check_catalog.SETTLED_S", -SETTLED_S)
    assert said(named) == ["the timeline t5 is there, but no disk has it"]


def test_the_copy_says_what_the_catalog_says(named: Disk) -> None:
    put(named, LOCK.row())
    value = json.loads(named.state.catalog_copy.read_text())
    value["locks"]["lock-1"]["fields"]["seq"] = 5
    named.state.catalog_copy.write_text(json.dumps(value))
    assert said(named) == ["the catalog's copy does not say what the catalog says: locks (lock-1)"]
    named.state.catalog_copy.write_text("{")
    assert len(said(named)) == 1 and "copy is of no use" in said(named)[0]
    named.state.catalog_copy.unlink()
    assert "the catalog's copy is of no use" in said(named)[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_flip_is_found_or_changes_nothing(named: Disk, seed: int) -> None:
    put(named, *[replace(LOCK, id=f"lock-{n}", reason="an audit " * n).row() for n in range(12)])
    before = CatalogCheck(named.state).content
    data, dice = named.state.catalog / "data.mdb", random.Random(seed)
    held = data.read_bytes()
    # A page that holds something, else nine flips of ten hit nothing.
    at = dice.choice([n for n in range(len(held)) if held[n]])
    flip(data, at)
    found = CatalogCheck(named.state)
    assert found.content == before, "of the copy, if not of the catalog"
    assert found.readable or any("cannot be read" in wrong.finding.what for wrong in found.wrong)


@pytest.mark.parametrize("depth", ["--quick", "--full"])
def test_the_command_says_it_for_the_disk_in_question(
    depth: str, named: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(named, replace(LOCK, id="lock-3", seq=4000).row())
    data = named.state.catalog / "data.mdb"
    words = ("check", "d", "--state-dir", str(named.state.path), depth)
    code, out = cdp(monkeypatch, capsys, *words, "--json")
    (damage,) = json.loads(out)["damage"]
    assert code == 4 and damage["path"] == "catalog" and damage["points"]["named"] == ["seq:4000"]
    data.write_bytes(data.read_bytes()[:8192])
    code, out = cdp(monkeypatch, capsys, *words)
    assert code == 4 and "the catalog cannot be read" in out and "lock-3" in out


def test_media_that_cannot_be_written(named: Disk) -> None:
    """The process that reads LMDB does without its lock file there."""
    with Catalog.open(named.state, writable=True) as catalog:
        catalog.put_row("locks", LOCK.row())
    (named.state.catalog / "lock.mdb").unlink()
    Path(named.state.catalog / "lock.mdb").mkdir()  # nobody can make it
    assert said(named) == []
