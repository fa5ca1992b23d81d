"""How deep `cdp check` looks: quick, sampled, in parts that go on where one ended; what rots in files without digests."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cdpserver import sums
from cdpserver.catalog import Catalog
from cdpserver.catalog.rows import FORMAT, TABLES
from cdpserver.check import Report, basepoints, check_timeline
from cdpserver.check.depth import (
    BASE,
    BASE_POINT,
    CONTENT,
    END,
    INDEX,
    MERGED_INDEXES,
    PAYLOAD,
    Depth,
    Part,
    Quick,
    Sample,
)
from cdpserver.errors import CorruptError
from recovery import check as command
from recovery import cli
from tests.test_check import BLOCK, BOOT, SEQS, SIZE, Disk, disk, flip, make_base_point, template

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


def test_the_time_is_over_while_indexes_are_checked(disk: Disk) -> None:
    seen: list[str] = []
    part = Part(ends=lambda: "index" in seen)
    report = check_timeline(
        disk.state.path, "t1", boot_id=BOOT, depth=part, progress=lambda stage, *_: seen.append(stage)
    )
    assert not report.complete and part.at == (INDEX, 1, 0, 0) and seen.count("index") == 1


@pytest.mark.real
def test_base_points_are_verified_block_by_block_and_compared_piece_by_piece(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "BLOCK", 1 << 16)
    monkeypatch.setattr(basepoints, "PIECE", SIZE // 4)
    path = make_base_point(disk, 0, "base.raw", fill=9)  # which differs in its third quarter
    sums.write(path)
    mtime = path.stat().st_mtime_ns
    flip(path, path.stat().st_size - 1)
    os.utime(path, ns=(mtime, mtime))
    blocks = -(-path.stat().st_size // sums.BLOCK)
    part, ended = Part(at=(INDEX, MERGED_INDEXES, 0, 0), content=True), []
    for _ in range(blocks + 5):
        looks = iter([False])
        part = Part.from_json(part.as_json(), lambda looks=looks: next(looks, True))  # type: ignore[misc]
        report = look(disk, part)
        ended.append(part.at)
    assert ended[: blocks + 4] == [
        *((BASE_POINT, 0, block, 0) for block in range(blocks + 1)),
        *((CONTENT, 0, piece, 0) for piece in (1, 2, 3)),
    ]
    assert report.complete and part.damaged == {(BASE_POINT, 0, blocks, 0), (CONTENT, 0, 3, 0)}
    assert said(report) == said(disk.check(full=True)) and len(said(report)) == 2


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
    with pytest.raises(CorruptError, match="cannot be told"):
        sums.read(base)


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


KILLED = """
import os, signal, sys
from cdpserver.check.depth import Part
from recovery import check, cli

last, check.KEEP_S, check.boot_id, takes = tuple(map(int, sys.argv.pop().split())), 0.0, lambda: "boot-one-0", Part.takes

def takes_and_dies(part, place):
    took = takes(part, place)
    if place == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return took

Part.takes = takes_and_dies
cli.main()
"""


@pytest.mark.parametrize(
    ("last", "at"), [("1 1 1 4", [PAYLOAD, 1, 1, 3]), (f"2 {MERGED_INDEXES} 0 0", [INDEX, 2, 0, 0])]
)
def test_a_check_in_parts_that_is_killed_goes_on_where_it_was(
    named: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last: str,
    at: list[int],
) -> None:
    """The unit that it was killed in is done again, and what was damaged before it is not forgotten."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    flip(named.data(1), WROTE_A)
    words = ("check", "d", "--state-dir", str(named.state.path), "--within", "1h")
    ended = subprocess.run([sys.executable, "-c", KILLED, *words, last], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (note,) = (tmp_path / "home").rglob("*.json")
    kept = json.loads(note.read_bytes())
    assert kept["at"] == at and kept["again"] == [[PAYLOAD, 1, 1, 3]]
    code, out = cdp(monkeypatch, capsys, *words, "--resume", "--json")
    found = json.loads(out)
    assert code == 4 and found["complete"] and [row["from_seq"] for row in found["damage"]] == [SEQS["a"]]
    assert not note.exists()


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
    return with_name(disk)


def with_name(disk: Disk) -> Disk:
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
