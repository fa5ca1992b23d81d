"""Journals that are not replayed are said: the log tree of Btrfs, $LogFile of NTFS."""

import os
import re
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver.files.replay import journal_replayed
from cdpserver.files.replay.ntfs import NO_CLIENT, restart_pages
from tests.filesystems import run
from tests.recorded import Image, browsed_tree, disks, record, writes

pytestmark = pytest.mark.real


def test_a_log_tree_of_btrfs_is_said_with_the_last_commit(tmp_path: Path) -> None:
    base, used = tmp_path / "base.img", tmp_path / "used.img"
    base.touch()
    os.truncate(base, 120 << 20)
    run("mkfs.btrfs", "-q", base)
    shutil.copyfile(base, used)

    def append(point: Path) -> None:
        (point / "committed").write_text("here")
        run("sync", "-f", point)
        with open(point / "fsynced", "wb") as file:
            file.write(b"fsynced")
            os.fsync(file.fileno())
            (point / "mark").write_text("fsync returned")

    log = record(used, append)
    seen = set()
    for _, image in disks(base, log, list(range(0, len(writes(log)), 4))):
        tree, remarks = browsed_tree(image)
        if b"committed" in tree and b"fsynced" not in tree:
            said = [remark for remark in remarks if "last commit" in remark]
            seen.add(bool(said))
            assert all(re.search(r"\(\d+, 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\)", remark) for remark in said)
    assert True in seen


@pytest.fixture(scope="module")
def ntfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = tmp_path_factory.mktemp("ntfs") / "ntfs.img"
    image.touch()
    os.truncate(image, 16 << 20)
    run("mkntfs", "-q", "-F", "-f", image)
    return image


def restart_page(*, lsn: int, in_use: int = 0, flags: int = 0) -> bytes:
    """As Windows writes it: a header whose area is 48 bytes in."""
    page = bytearray(4096)
    page[:4] = b"RSTR"
    struct.pack_into("<H", page, 24, 48)
    struct.pack_into("<QHHHH", page, 48, lsn, 1, NO_CLIENT, in_use, flags)
    return bytes(page)


def with_journal(image: Path, *pages: bytes) -> Image:
    data = bytearray(image.read_bytes())
    for place, page in zip(restart_pages(Image(image)), pages, strict=True):
        data[place : place + len(page)] = page
    return Image(bytes(data))


def test_logfile_is_found(ntfs: Path) -> None:
    first, second = restart_pages(Image(ntfs))
    assert second == first + 4096
    assert Image(ntfs).read(first, 8192) == b"\xff" * 8192, "mkntfs resets it"
    assert journal_replayed(Image(ntfs)).remarks == ()


def test_an_open_logfile_is_said(ntfs: Path) -> None:
    closed, used = restart_page(lsn=5, in_use=NO_CLIENT), restart_page(lsn=9)
    assert "not replayed" in journal_replayed(with_journal(ntfs, closed, used)).remarks[0]
    assert journal_replayed(with_journal(ntfs, used, restart_page(lsn=10, in_use=NO_CLIENT))).remarks == ()
    assert journal_replayed(with_journal(ntfs, used, restart_page(lsn=10, flags=2))).remarks == ()


@given(st.dictionaries(st.integers(0, 511), st.integers(1, 255), max_size=4), st.data())
def test_no_boot_sector_does_harm(ntfs: Path, boot: dict[int, int], data: st.DataObject) -> None:
    image = Image(ntfs)
    table = struct.unpack("<Q", image.read(48, 8))[0] * 4096
    record = data.draw(
        st.dictionaries(st.integers(table + 2048, table + 2600), st.integers(1, 255), max_size=4)
    )
    flipped = Image(ntfs, boot | record)
    journal_replayed(flipped)
    assert flipped.reads < 1 << 20
