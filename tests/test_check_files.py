"""`cdp check --files`: which files of the guest damaged bytes belong to; that there are more; and that nobody can tell."""

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cdpserver import sums
from cdpserver.files.browser import Browser
from cdpserver.journal import control
from cdpserver.journal.segment import PAGE
from tests import filesystems as make
from tests.test_check import BLOCK, Disk, empty_disk, flip
from tests.test_check_depth import cdp, with_name

pytestmark = pytest.mark.real

DISK = 8 << 20
CONTENT = Random(1).randbytes(2 * BLOCK)
MANY = 30


@pytest.fixture
def guest(tmp_path: Path) -> Disk:
    """A disk with ext4 and a directory of small files; the second block of one file was written again since the first copy."""
    tree = tmp_path / "tree"
    (tree / "docs").mkdir(parents=True)
    (tree / "docs" / "invoices").write_bytes(CONTENT)
    for number in range(MANY):
        (tree / f"small-{number}").write_bytes(bytes([number + 1]) * 100)
    image = make.make_ext(tmp_path / "ext4", tree, "-b", "4096", size="8M")
    disk = empty_disk(tmp_path, DISK)
    (disk.directory / "base.raw").write_bytes(image.read_bytes())
    sums.write(disk.directory / "base.raw")
    writer = disk.open()
    writer.synced(control.synced(1, write_blocking=True))
    writer.write(memoryview(CONTENT[BLOCK:]), place(image, b"/docs/invoices") + BLOCK)
    writer.commit()
    writer.close()
    return with_name(disk)


def place(image: Path, path: bytes) -> int:
    """Where a file begins on the disk."""
    with Browser(make.ImageDisk(image)) as browser:
        browser.open("")
        return next(iter(browser.extents(browser.stat("", path))))[2]


def look(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[list[dict[str, Any]], str]:
    """The damage as programs are told, and as people are."""
    words = ("check", "d", "--state-dir", str(disk.state.path), "--files")
    code, out = cdp(monkeypatch, capsys, *words, "--json")
    assert code == 4
    return json.loads(out)["damage"], cdp(monkeypatch, capsys, *words)[1]


def test_the_file_that_a_rotted_payload_belongs_to(
    guest: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = guest.data(1)
    flip(data, data.read_bytes().index(CONTENT[BLOCK:]) + 7)
    (damage,), text = look(guest, monkeypatch, capsys)
    assert "payload of record" in damage["what"]
    assert (damage["files"], damage["files_known"], damage["files_more"]) == (["/docs/invoices"], True, False)
    assert "\n  file     /docs/invoices\n" in text and "cannot be told" not in text


def test_a_place_with_more_files_than_are_named(
    guest: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = guest.directory / "base.raw"
    mtime = base.stat().st_mtime_ns
    flip(base, place(base, b"/small-3"))
    os.utime(base, ns=(mtime, mtime))
    (damage,), text = look(guest, monkeypatch, capsys)
    assert len(damage["files"]) == 20 and damage["files_more"] and damage["files_known"]
    assert text.count("\n  file     /") == 20 and "\n  file     ... and more\n" in text


def test_what_nobody_can_tell_is_not_called_no_file(
    guest: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record's header is damaged: which bytes it was, nobody knows. Then its payload, on a disk without a file system."""
    log, data = guest.log(1), guest.data(1)
    flip(log, PAGE + 2 * 64 + 20)
    (damage, *_), text = look(guest, monkeypatch, capsys)
    assert damage["what"].startswith("the header of record 3 ")
    assert (damage["files"], damage["files_known"]) == ([], False)
    assert "\n  file     which ones it is in cannot be told\n" in text
    flip(log, PAGE + 2 * 64 + 20)
    flip(data, data.read_bytes().index(CONTENT[BLOCK:]) + 7)
    with open(guest.directory / "base.raw", "r+b") as base:
        base.write(bytes(BLOCK))
    (damage, *_), _ = look(guest, monkeypatch, capsys)
    assert (damage["files"], damage["files_known"]) == ([], False)
