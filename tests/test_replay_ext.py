"""ext3 and ext4 after a crash read as after the kernel's or e2fsck's recovery, and no journal does harm.

CDP_LONG=N makes N times as many points; CDP_SEED=S another life of the file system.
"""

import os
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import limits
from cdpserver.files.replay import journal_replayed
from cdpserver.files.replay.ext import Superblock, open_journal
from cdpserver.files.replay.jbd2 import MAGIC_BYTES, crc32_be
from cdpserver.files.replay.overlay import MASK32, crc32c
from tests.filesystems import SBIN, run
from tests.recorded import Image, browsed_tree, churn, disks, kernel_tree, record, writes

pytestmark = pytest.mark.real

LONG = int(os.environ.get("CDP_LONG", "1"))
SEED = int(os.environ.get("CDP_SEED", "7"))

KINDS = {
    "ext4": (("-t", "ext4", "-J", "size=4"), ()),
    "ext4-large-blocks": (
        ("-t", "ext4", "-b", "4096", "-O", "inline_data,metadata_csum_seed", "-J", "size=4"),
        (),
    ),
    "ext3": (("-t", "ext3", "-J", "size=4"), ()),
    "sums-of-transactions": (
        ("-t", "ext4", "-b", "4096", "-O", "^metadata_csum,^64bit", "-J", "size=4"),
        ("journal_checksum",),
    ),
    "asynchronous-commits": (
        ("-t", "ext4", "-J", "size=4"),
        ("journal_async_commit", "data=writeback"),
    ),
    "content-in-the-journal": (("-t", "ext4", "-b", "4096", "-J", "size=8"), ("data=journal",)),
    "fast-commits": (("-t", "ext4", "-b", "4096", "-O", "fast_commit", "-J", "size=8"), ()),
}
BY_KERNEL = ("ext4-large-blocks", "content-in-the-journal")
"""What a quick run compares with the kernel; the others with e2fsck, which is quicker, and wrong about old fast commits."""


def make_crashes(folder: Path, kind: str, points: int) -> tuple[Path, Path, list[int]]:
    """An image, the log of its life, and where to cut that."""
    options, mount = KINDS[kind]
    base, used = folder / "base.img", folder / "used.img"
    run("mke2fs", "-q", "-F", *options, base, "64M")
    shutil.copyfile(base, used)
    log = record(used, lambda point: churn(point, SEED, operations=500 * min(LONG, 4)), *mount)
    count = len(writes(log))
    return base, log, sorted(Random(SEED).sample(range(count // 10, count), points))


@pytest.mark.parametrize("kind", KINDS if LONG > 1 else BY_KERNEL)
def test_the_tree_is_the_kernels(kind: str, tmp_path: Path) -> None:
    base, log, cuts = make_crashes(tmp_path, kind, 4 * LONG)
    replayed = 0
    for cut, image in disks(base, log, cuts):
        ours, remarks = browsed_tree(image)
        run("cp", "--sparse=always", image, tmp_path / "kernel.img")
        truth = kernel_tree(tmp_path / "kernel.img")
        if any("fast commit" in remark for remark in remarks):
            continue
        assert ours == truth, (kind, cut)
        replayed += any("replayed" in remark for remark in remarks)
    assert replayed


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"fast-commits"}))
def test_every_block_is_that_of_e2fsck(kind: str, tmp_path: Path) -> None:
    base, log, cuts = make_crashes(tmp_path, kind, 6 * LONG)
    replayed = 0
    for cut, image in disks(base, log, cuts):
        remarks = journal_replayed(Image(image)).remarks
        if not any("replayed" in remark for remark in remarks):
            continue
        replayed += 1
        recovered = tmp_path / "e2fsck.img"
        run("cp", "--sparse=always", image, recovered)
        # Beside the journal e2fsck writes what it did into the superblock, which is told apart below.
        run("sh", "-c", 'PATH=$1 e2fsck -y -E journal_only "$2" || test $? = 1', "sh", SBIN, recovered)
        assert different_blocks(image, recovered) <= {"superblock", "journal"}, (kind, cut)
    assert replayed


def test_fast_commits_are_said(tmp_path: Path) -> None:
    base, used = tmp_path / "base.img", tmp_path / "used.img"
    run("mke2fs", "-q", "-F", *KINDS["fast-commits"][0], base, "64M")
    shutil.copyfile(base, used)

    def append(point: Path) -> None:
        with open(point / "log", "wb") as file:
            for number in range(40):
                file.write(b"%d\n" % number * 500)
                file.flush()
                os.fsync(file.fileno())

    log = record(used, append)
    said = 0
    for cut, image in disks(base, log, list(range(20, len(writes(log)), 20))):
        ours, remarks = browsed_tree(image)
        run("cp", "--sparse=always", image, tmp_path / "kernel.img")
        truth = kernel_tree(tmp_path / "kernel.img")
        if any("fast commit" in remark for remark in remarks):
            said += 1
        else:
            assert ours == truth, cut
    assert said


def different_blocks(image: Path, recovered: Path) -> set[str]:
    """What differs between our replay of one and the other."""
    ours, theirs = journal_replayed(Image(image)).reader, Image(recovered)
    superblock = Superblock.parse(ours.read(1024, 1024))
    assert not superblock.needs_recovery
    journal = open_journal(theirs, superblock)
    of_journal = {journal.place(number) for number in range(journal.blocks)}
    size, found = superblock.block_size, set()
    for start in range(0, ours.size, 1 << 20):
        a, b = ours.read(start, 1 << 20), theirs.read(start, 1 << 20)
        if a == b:
            continue
        for at in range(0, len(a), size):
            if a[at : at + size] != b[at : at + size]:
                number = (start + at) // size
                name = "superblock" if number == 1024 // size else str(number)
                found.add("journal" if number in of_journal else name)
    return found


def test_the_replayed_superblock_has_its_checksum(crashed: Path) -> None:
    raw = journal_replayed(Image(crashed)).reader.read(1024, 1024)
    assert struct.unpack_from("<I", raw, 1020)[0] == crc32c(MASK32, raw[:1020])


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 image with some ten transactions in its journal."""
    folder = tmp_path_factory.mktemp("crashed")
    base, log, _ = make_crashes(folder, "ext4", 1)
    changes = writes(log)
    for _, image in disks(base, log, [len(changes) * 2 // 3]):
        assert "replayed" in journal_replayed(Image(image)).remarks[0]
    return base


@pytest.fixture(scope="module")
def journal_bytes(crashed: Path) -> list[int]:
    """Where on the image its journal's blocks begin."""
    image = Image(crashed)
    superblock = Superblock.parse(image.read(1024, 1024))
    journal = open_journal(image, superblock)
    return [journal.place(number) * superblock.block_size for number in range(journal.blocks)]


def test_a_clean_file_system_is_left_alone(tmp_path: Path) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext4", tmp_path / "clean.img", "16M")
    image = Image(tmp_path / "clean.img")
    replayed = journal_replayed(image)
    assert replayed.reader is image and replayed.remarks == ()
    assert image.reads < 16 << 10, "a clean file system costs its superblock"


def test_a_journal_elsewhere_is_said(tmp_path: Path, crashed: Path) -> None:
    # s_journal_inum says that it is inside.
    image = Image(crashed, {1024 + 224: crashed_byte(crashed, 1024 + 224)})
    replayed = journal_replayed(image)
    assert replayed.reader is image
    assert "another device" in replayed.remarks[0] and "cdp mount --kernel" in replayed.remarks[0]


def crashed_byte(image: Path, offset: int) -> int:
    return image.read_bytes()[offset]


def test_no_journal_is_said(tmp_path: Path) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext2", tmp_path / "ext2.img", "16M")
    assert journal_replayed(Image(tmp_path / "ext2.img")).remarks == ()
    # s_state: it was mounted.
    assert "has no journal" in journal_replayed(Image(tmp_path / "ext2.img", {1024 + 58: 1})).remarks[0]


def test_a_damaged_block_stops_the_replay(crashed: Path, journal_bytes: list[int]) -> None:
    image = Image(crashed)
    start = struct.unpack(">I", image.read(journal_bytes[0] + 28, 4))[0]
    # The block behind the first descriptor is one that belongs elsewhere.
    flipped = Image(crashed, {journal_bytes[start + 1] + 100: 1})
    replayed = journal_replayed(flipped)
    assert replayed.reader is flipped and "is damaged" in replayed.remarks[0]


def test_a_log_is_read_no_further_than_the_limit(crashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPLAY_LOG_BYTES", 4096)
    assert "MiB of changes" in journal_replayed(Image(crashed)).remarks[0]
    monkeypatch.undo()
    monkeypatch.setattr(limits, "REPLAY_BLOCKS", 3)
    assert "more than 3 blocks" in journal_replayed(Image(crashed)).remarks[0]


@given(st.data())
def test_no_journal_does_harm(crashed: Path, journal_bytes: list[int], data: st.DataObject) -> None:
    """Flipped bytes in the superblock, the journal's inode and its log: a replay or a remark, within the journal's size."""
    inode_at = 1024 + 7 * 256
    places = st.one_of(
        st.integers(1024, 2047),
        st.integers(inode_at, 64 << 10),
        st.integers(0, 1023).map(lambda at: journal_bytes[0] + at),
        st.tuples(st.sampled_from(journal_bytes[:200]), st.integers(0, 64)).map(sum),
    )
    flips = data.draw(st.dictionaries(places, st.integers(1, 255), min_size=1, max_size=8))
    image = Image(crashed, flips)
    replayed = journal_replayed(image)
    assert image.reads < 64 << 20
    assert replayed.reader is not image or all(
        "replayed" not in one or "not" in one for one in replayed.remarks
    )
    assert len(replayed.reader.read(0, 1 << 20)) == 1 << 20


def test_places_leave_out_what_only_the_journal_has(crashed: Path) -> None:
    image = Image(crashed)
    reader = journal_replayed(image).reader
    told = list(reader.places(0, reader.size))
    assert told and all(start < end and place == start for start, end, place in told)
    assert all(
        reader.read(start, min(end - start, 1 << 20)) == image.read(start, min(end - start, 1 << 20))
        for start, end, _ in told
    )
    left_out = [(a[1], b[0]) for a, b in pairwise(told)]
    assert any(reader.read(start, end - start) != image.read(start, end - start) for start, end in left_out)


def test_the_older_sum_is_the_kernels() -> None:
    def slowly(seed: int, data: bytes) -> int:
        for byte in data:
            seed ^= byte << 24
            for _ in range(8):
                seed = (seed << 1 ^ (0x04C11DB7 if seed & 1 << 31 else 0)) & MASK32
        return seed

    for seed in (0, MASK32, 0x12345678):
        assert crc32_be(seed, MAGIC_BYTES * 5 + b"odd") == slowly(seed, MAGIC_BYTES * 5 + b"odd")
