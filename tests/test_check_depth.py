"""How deep `cdp check` looks: quick, sampled, in parts that go on where one ended; what rots in files without digests."""

import json
import os
from pathlib import Path

import pytest

from cdpserver import sums
from cdpserver.catalog import Catalog
from cdpserver.catalog.rows import FORMAT, TABLES
from cdpserver.check import Report, check_timeline
from cdpserver.check.depth import BASE, END, PAYLOAD, Depth, Part, Quick, Sample
from cdpserver.errors import CorruptError
from recovery import check as command
from recovery import cli
from tests.test_check import BLOCK, BOOT, SEQS, SIZE, Disk, disk, flip, template

__all__ = ["disk", "template"]  # fixtures

WROTE_A = 2 * BLOCK
"""Place of the first write's payload, after those of two control records."""


def look(disk: Disk, depth: Depth) -> Report:
    return check_timeline(disk.state.path, "t1", boot_id=BOOT, depth=depth)


def said(report: Report) -> list[str]:
    return [damage.finding.what for damage in report.damage]


def test_a_quick_check_reads_no_payload_and_finds_damaged_headers(disk: Disk) -> None:
    flip(disk.data(1), WROTE_A)
    assert look(disk, Quick()).whole and not disk.check().whole
    flip(disk.log(2), 4096 + 64 + 20)
    report = look(disk, Quick())
    assert report.depth == "quick" and report.complete
    assert said(report) == ["the header of record 12 fails its check"]


def test_a_sample_is_chosen_by_its_seed(disk: Disk) -> None:
    places = [(PAYLOAD, 1, 1, record) for record in range(2000)]
    chosen = {
        seed: [place for place in places if Sample(percent=20, seed=seed).takes(place)] for seed in (1, 2)
    }
    assert all(300 < len(some) < 500 for some in chosen.values()) and chosen[1] != chosen[2]
    flip(disk.data(1), WROTE_A)
    report = look(disk, Sample(percent=100, seed=1))
    assert report.depth == "sample" and not report.whole


def test_parts_together_find_what_one_check_finds(disk: Disk) -> None:
    """Each part is stopped after one more unit, and goes on from what the one before it kept."""
    flip(disk.data(1), WROTE_A)
    flip(disk.data(2), 0)
    whole = disk.check()
    assert len(whole.damage) == 2
    note = json.loads(json.dumps(Part().as_json()))
    for parts in range(1, 100):
        looks = iter([False, True])
        part = Part.from_json(note, lambda looks=looks: next(looks, True))  # type: ignore[misc]
        report = look(disk, part)
        assert set(said(report)) <= set(said(whole))
        note = json.loads(json.dumps(part.as_json()))
        if report.complete:
            break
        assert not report.whole or parts < 3
    assert parts > 5 and said(report) == said(whole)
    assert report.as_dict("d", disk.state.path)["damage"] == whole.as_dict("d", disk.state.path)["damage"]


def test_what_was_mended_between_two_parts_is_not_said_again(disk: Disk) -> None:
    flip(disk.data(1), WROTE_A)
    looks = iter([False] * 3)
    part = Part(ends=lambda: next(looks, True))
    assert not look(disk, part).whole
    flip(disk.data(1), WROTE_A)
    report = look(disk, Part.from_json(part.as_json(), lambda: False))
    assert report.whole and report.complete


@pytest.mark.parametrize(
    "value", [{}, {"at": [1], "again": [], "content": True}, {"at": [0] * 4, "again": 3, "content": False}]
)
def test_a_damaged_note_of_a_part_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(CorruptError, match="begin it anew"):
        Part.from_json(value, lambda: False)


# --- sums


def test_what_rots_in_a_base_is_found_and_shows_as_long_as_it_is_read(disk: Disk) -> None:
    base = disk.directory / "base.raw"
    assert sums.write(base) == SIZE
    assert disk.check().whole
    mtime = base.stat().st_mtime_ns
    flip(base, 5 * BLOCK)
    os.utime(base, ns=(mtime, mtime))
    found = disk.only()
    assert found["what"] == f"bytes 0 to {SIZE} of base.raw are not what they were"
    assert (found["from_seq"], found["to_seq"]) == (1, SEQS["b2"] + 1)


def test_sums_of_another_file_say_nothing(disk: Disk) -> None:
    base = disk.directory / "base.raw"
    sums.write(base)
    flip(base, 0)  # and its time of change with it: somebody meant it
    assert sums.read(base) is None and disk.check().whole
    sums.write(base)
    flip(sums.sums_path(base), 30)
    assert sums.read(base) is None and disk.check().whole


def test_a_part_remembers_which_block_of_a_base_is_wrong(disk: Disk) -> None:
    base = disk.directory / "base.raw"
    sums.write(base)
    mtime = base.stat().st_mtime_ns
    flip(base, 0)
    os.utime(base, ns=(mtime, mtime))
    part = Part()
    assert not look(disk, part).whole and part.damaged == {(BASE, 1, 0, 0)}
    assert not look(disk, Part(at=END, again=part.damaged)).whole
    assert look(disk, Part(at=END, again={(PAYLOAD, 1, 1, 3)})).whole


# --- the command


def cdp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["cdp", *words])
    monkeypatch.setattr(command, "boot_id", lambda: BOOT)
    code = cli.main()
    return code, capsys.readouterr().out


def test_check_in_parts_keeps_where_it_was(
    named: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    asked = ("check", "d", "--state-dir", str(named.state.path), "--json")
    code, out = cdp(monkeypatch, capsys, *asked, "--within", "0s")
    assert code == 0 and json.loads(out)["complete"] is False
    assert len(list((tmp_path / "home").rglob("*.json"))) == 1
    flip(named.data(1), WROTE_A)
    code, out = cdp(monkeypatch, capsys, *asked, "--within", "1h", "--resume")
    found = json.loads(out)
    assert code == 4 and found["complete"] is True and found["damage"][0]["from_seq"] == SEQS["a"]
    assert list((tmp_path / "home").rglob("*.json")) == []


@pytest.mark.parametrize(
    "words", [("--quick", "--full"), ("--seed", "1"), ("--sample", "5", "--within", "1m"), ("--sample", "0")]
)
def test_what_makes_no_sense_is_refused(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cdp(monkeypatch, capsys, "check", "d", *words)[0] == 2


@pytest.fixture
def named(disk: Disk) -> Disk:
    """The disk has a name in the catalog."""
    entry = {"id": "t1", "state": "live", "created_ns": 1}
    content: dict[str, object] = {
        "format": FORMAT,
        "next_id": 2,
        "disks": {"d": entry},
        **{key: {} for key in TABLES},
    }
    disk.state.catalog_copy.write_text(json.dumps(content))
    Catalog.recover(disk.state)
    return disk
