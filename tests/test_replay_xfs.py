"""XFS after a crash reads as after the kernel's recovery, and no log does harm.

CDP_LONG=N makes N times as many points; CDP_SEED=S another life of the file system.
"""

import os
import struct
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import limits
from cdpserver.files.replay import journal_replayed
from cdpserver.files.replay.xfs import open_log
from cdpserver.files.replay.xfsitems import Cancelled
from cdpserver.files.replay.xfslog import Item, Transaction, find_live
from tests.filesystems import SBIN, run
from tests.recorded import Image, browsed_tree, churn, disks, kernel_tree, record, tear, writes

pytestmark = pytest.mark.real

LONG = int(os.environ.get("CDP_LONG", "1"))
SEED = int(os.environ.get("CDP_SEED", "11"))
SIZE = 320 << 20

KINDS = {
    "small-log": ("-l", "size=10m"),
    "owners-and-large-counters": ("-m", "rmapbt=1,bigtime=1", "-i", "nrext64=1", "-l", "size=13m"),
    "small-blocks": ("-b", "size=1k", "-l", "size=10m"),
    "large-inodes": ("-i", "size=2048", "-l", "size=16m,su=64k"),
    "as-it-comes": (),
}
QUICK = ("owners-and-large-counters", "small-blocks")


def make_image(image: Path, *options: str, size: int = SIZE) -> None:
    image.touch()
    os.truncate(image, size)
    # Logs that are wrapped in seconds are smaller than mkfs.xfs supports.
    run("mkfs.xfs", "-q", "--unsupported", *options, image)


def make_crashes(folder: Path, kind: str, points: int, operations: int) -> tuple[Path, Path, list[int]]:
    """An image, the log of its life, and where to cut that."""
    base, used = folder / "base.img", folder / "used.img"
    make_image(base, *KINDS[kind])
    run("cp", "--sparse=always", base, used)
    log = record(used, lambda point: churn(point, SEED, operations=operations), "nouuid")
    count = len(writes(log))
    return base, log, sorted(Random(SEED).sample(range(count // 10, count), points))


@pytest.mark.parametrize("kind", KINDS if LONG > 1 else QUICK)
def test_the_tree_is_the_kernels(kind: str, tmp_path: Path) -> None:
    """Also where of the last writes some are missing and some torn, unless the kernel refuses such a disk."""
    base, log, cuts = make_crashes(tmp_path, kind, 4 * LONG, 1500 * min(LONG, 4))
    changes, dice = writes(log), Random(SEED)
    replayed = 0
    for cut, image in disks(base, log, cuts):
        for late in ([], changes[cut : cut + 4]):
            crashed, judged = tmp_path / "crashed.img", tmp_path / "kernel.img"
            run("cp", "--sparse=always", image, crashed)
            tear(crashed, late, dice)
            run("cp", "--sparse=always", crashed, judged)
            truth = kernel_tree(judged, "nouuid")
            assert truth is not None or late
            if truth is None:
                continue
            ours, remarks = browsed_tree(crashed)
            assert ours == truth, (kind, cut, bool(late), remarks)
            replayed += any("replayed" in remark for remark in remarks)
    assert replayed


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with some hundred transactions in its log."""
    base, log, _ = make_crashes(tmp_path_factory.mktemp("crashed"), "small-log", 1, 1000)
    for _, image in disks(base, log, [len(writes(log)) * 2 // 3]):
        assert "replayed" in journal_replayed(Image(image)).remarks[0]
    return base


@pytest.fixture(scope="module")
def log_at(crashed: Path) -> list[int]:
    """Bytes of the image where blocks of the log begin, that are replayed."""
    image = Image(crashed)
    raw = image.read(0, 512)
    log = open_log(image, raw)
    tail, head = find_live(log)
    start = struct.unpack_from(">Q", raw, 48)[0]
    group, block = start >> raw[124], start & ((1 << raw[124]) - 1)
    place = (group * struct.unpack_from(">I", raw, 84)[0] + block) * 4096
    assert image.read(place + tail * 512, 4) == bytes.fromhex("feedbabe")
    return [place + (tail + number) % log.blocks * 512 for number in range((head - tail) % log.blocks)]


def test_checksums_and_lsns_are_right(crashed: Path, tmp_path: Path) -> None:
    """What xfs_repair reads after the replay it has nothing against: the log itself, which is full still, is zeroed for it."""
    reader = journal_replayed(Image(crashed)).reader
    copy = tmp_path / "copy.img"
    with open(copy, "wb") as file:
        for at in range(0, reader.size, 1 << 20):
            data = reader.read(at, 1 << 20)
            if any(data):
                file.seek(at)
                file.write(data)
        file.truncate(reader.size)
    said = run("sh", "-c", 'PATH=$1 xfs_repair -n "$2" 2>&1 || true', "sh", SBIN, copy).decode()
    assert "Phase 7" in said
    assert not [
        line for line in said.splitlines() if "CRC" in line or "LSN" in line or "corrupt" in line.lower()
    ]


def test_a_clean_file_system_is_left_alone(tmp_path: Path) -> None:
    make_image(tmp_path / "clean.img")
    image = Image(tmp_path / "clean.img")
    replayed = journal_replayed(image)
    assert replayed.reader is image and replayed.remarks == ()


def test_a_large_log_is_searched_not_read(tmp_path: Path) -> None:
    make_image(tmp_path / "large.img", size=4 << 40)
    image = Image(tmp_path / "large.img")
    assert open_log(image, image.read(0, 512)).blocks * 512 > 1 << 30
    assert journal_replayed(image).remarks == ()
    assert image.reads < 16 << 20


def test_a_log_elsewhere_and_an_old_version_are_said(crashed: Path) -> None:
    raw = crashed.read_bytes()[:128]
    elsewhere = Image(crashed, {48 + number: raw[48 + number] for number in range(8) if raw[48 + number]})
    assert "another device" in journal_replayed(elsewhere).remarks[0]
    old = journal_replayed(Image(crashed, {101: raw[101] & 15 ^ 4}))
    assert "before 5" in old.remarks[0] and "cdp mount --kernel" in old.remarks[0]


def test_damage_inside_the_log_stops_the_replay(crashed: Path, log_at: list[int]) -> None:
    flipped = Image(crashed, {log_at[1] + 100: 1})
    replayed = journal_replayed(flipped)
    assert replayed.reader is flipped and "checksum" in replayed.remarks[0]


def test_a_log_is_replayed_no_further_than_the_limits(crashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most, said in (
        ("REPLAY_LOG_BYTES", 1 << 20, "MiB of changes"),
        ("REPLAY_CHANGED_BYTES", 1 << 16, "its changes take"),
        ("REPLAY_OPEN_BYTES", 1 << 10, "transactions in the log take"),
        ("REPLAY_OPERATIONS", 100, "more than 100 operations"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, most)
            image = Image(crashed)
            replayed = journal_replayed(image)
            assert replayed.reader is image and said in replayed.remarks[0]


def intent(kind: int, identity: int) -> Item:
    return Item([struct.pack("<HHIQ", kind, 1, 1, identity)], 1)


def test_unfinished_operations_are_counted() -> None:
    begun = Transaction(1, items=[intent(0x1236, 7), intent(0x1244, 8), intent(0x1244, 9)])
    done = Transaction(2, items=[intent(0x1237, 7), intent(0x1245, 9)])
    assert Cancelled([begun, done]).unfinished() == {0x1244: 1}


@given(st.data())
def test_no_log_does_harm(crashed: Path, log_at: list[int], data: st.DataObject) -> None:
    """Flipped bytes in the superblock, and in the log behind its checksums: a replay or a remark, within bounds."""
    places = st.one_of(
        st.integers(0, 511),
        st.tuples(st.sampled_from(log_at[:2000]), st.integers(0, 511)).map(sum),
        st.sampled_from(log_at).flatmap(lambda at: st.integers(at, at + 48)),
    )
    flips = data.draw(st.dictionaries(places, st.integers(1, 255), min_size=1, max_size=8))
    image = Image(crashed, flips)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr("cdpserver.files.replay.xfs.is_sound", lambda log, record: True)
            patch.setattr("cdpserver.files.replay.xfslog.is_sound", lambda log, record: True)
        replayed = journal_replayed(image)
    assert image.reads < 128 << 20
    assert replayed.reader is not image or not replayed.remarks or "could not" in replayed.remarks[0]
    assert len(replayed.reader.read(0, 1 << 20)) == 1 << 20
