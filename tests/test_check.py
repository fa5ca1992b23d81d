"""`cdpserver.check`: what is whole is called whole, also beside a running writer; damage is found, named and placed in time."""

import contextlib
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver.basepoint import note_what_is_missing
from cdpserver.check import Report, check_timeline
from cdpserver.check.damage import Effects, Finding
from cdpserver.check.depth import Everything
from cdpserver.check.segments import SegmentCheck
from cdpserver.index.indexer import TimelineIndexer, rebuild
from cdpserver.index.store import IndexFile
from cdpserver.journal import control
from cdpserver.journal.begin import start_history
from cdpserver.journal.log import interval_path
from cdpserver.journal.record import DTYPE, RECORD_SIZE, Kind
from cdpserver.journal.segment import FIXED, PAGE, data_path, log_path
from cdpserver.journal.writer import JournalWriter
from cdpserver.state import StateDir
from cdpserver.timeline import EmptyBase, Timeline, create_timeline, load

SIZE = 1 << 20
BLOCK = 4096
SECOND_NS = 1_000_000_000
START_NS = 1_800_000_000 * SECOND_NS
BOOT = "boot-one-0"
TAIL_AT, STATE_AT = 16, 24


@dataclass
class Disk:
    """A timeline on disk with a history of a few seconds in two intervals, a writer that may go on, and a fake clock."""

    state: StateDir
    timeline: Timeline
    now_ns: int = START_NS
    writer: JournalWriter | None = None

    @property
    def directory(self) -> Path:
        return self.state.timeline(self.timeline.id)

    def clock_ns(self) -> int:
        return self.now_ns

    def open(self, boot: str = BOOT) -> JournalWriter:
        made = JournalWriter(
            self.directory,
            uuid=self.timeline.uuid,
            size=self.timeline.size,
            clock_ns=self.clock_ns,
            boot_id=boot,
        )
        self.writer = made
        return made

    def write(self, block: int, fill: int, *, after_s: float = 1.0) -> int:
        """One block, some time after what was before it; its seq."""
        assert self.writer is not None
        self.now_ns += int(after_s * SECOND_NS)
        self.writer.write(memoryview(bytes([fill]) * BLOCK), block * BLOCK)
        return self.writer.last_seq

    def check(self, *, boot: str = BOOT, full: bool = False) -> Report:
        return check_timeline(self.state.path, self.timeline.id, boot_id=boot, depth=Everything(content=full))

    def only(self, *, boot: str = BOOT) -> dict[str, object]:
        """The one damage that is found."""
        report = self.check(boot=boot)
        assert [damage.finding.what for damage in report.damage if damage][1:] == []
        assert not report.whole
        return report.as_dict("d", self.state.path)["damage"][0]  # type: ignore[no-any-return]

    def log(self, interval: int, segment: int = 1) -> Path:
        return log_path(interval_path(self.directory, interval), segment)

    def data(self, interval: int, segment: int = 1) -> Path:
        return data_path(interval_path(self.directory, interval), segment)


def empty_disk(path: Path, size: int = SIZE) -> Disk:
    """A disk whose history has just begun."""
    state = StateDir.create_or_open(path / "s")
    made = create_timeline(state, id="t1", name="d", vm=None, size=size, base=EmptyBase(), now_ns=START_NS)
    disk = Disk(state, made)
    with open(disk.directory / "base.raw", "wb") as base:
        base.truncate(size)
    (disk.directory / "base.synced").touch()
    start_history(disk.directory, uuid=made.uuid, boot_id=BOOT, now_ns=START_NS, mode="first-copy", session=1)
    return disk


SEQS = {"a": 4, "b": 5, "a2": 6, "mark": 7, "zero": 9, "cut": 10, "c": 12, "b2": 13}
"""Seq of every change that `fill` makes, a second apart each."""


def fill(disk: Disk) -> None:
    """Blocks 0 and 1, block 0 again, a bookmark, a zero of 64 KiB, a cut; then block 2, and block 1 again."""
    writer = disk.open()
    writer.synced(control.synced(1, write_blocking=True))
    seqs = {"a": disk.write(0, 1), "b": disk.write(1, 2), "a2": disk.write(0, 3)}
    seqs["mark"] = writer.mark(control.mark("before-upgrade"))[0]
    disk.now_ns += SECOND_NS
    writer.zero(16 * BLOCK, 16 * BLOCK)
    seqs["zero"] = writer.last_seq
    seqs["cut"] = writer.cut()[1]
    seqs["c"] = disk.write(2, 4)
    seqs["b2"] = disk.write(1, 5)
    assert seqs == SEQS
    writer.commit()
    writer.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with a disk that is filled and indexed."""
    path = tmp_path_factory.mktemp("template")
    disk = empty_disk(path)
    fill(disk)
    assert rebuild(disk.directory, BOOT) == 14
    return path


@pytest.fixture
def disk(template: Path, tmp_path: Path) -> Disk:
    """A copy of its own of the filled disk."""
    shutil.copytree(template / "s", tmp_path / "s")
    state = StateDir.open(tmp_path / "s")
    return Disk(state, load(state.timeline("t1")), now_ns=START_NS + 100 * SECOND_NS)


def flip(path: Path, at: int, mask: int = 1) -> None:
    """Change bits of one byte."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))
    path.chmod(mode)


def record_at(interval_first_seq: int, seq: int) -> int:
    """Where a record is in its header log."""
    return PAGE + (seq - interval_first_seq) * RECORD_SIZE


# --- what is whole


def test_a_whole_timeline_is_called_whole(disk: Disk) -> None:
    stages = []
    report = check_timeline(
        disk.state.path,
        "t1",
        boot_id=BOOT,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert report.whole and report.records == 14 and report.segments == 2
    assert {stage for stage, _, _ in stages} == {"journal", "index"}
    assert all(done <= total for _, done, total in stages)


def test_a_timeline_in_its_first_copy_is_whole(tmp_path: Path) -> None:
    state = StateDir.create_or_open(tmp_path / "s")
    create_timeline(state, id="t1", name="d", vm=None, size=SIZE, base=EmptyBase(), now_ns=START_NS)
    assert check_timeline(state.path, "t1", boot_id=BOOT).whole


def test_an_index_that_is_missing_or_behind_is_no_damage(disk: Disk) -> None:
    disk.open()
    disk.write(5, 9)
    assert disk.check().whole
    for path in disk.directory.glob("intervals/*/*.mdb*"):
        path.unlink()
    report = disk.check()
    assert report.whole and report.records == 15


def test_a_record_in_flight_is_no_damage(disk: Disk) -> None:
    writer = disk.open()
    disk.write(5, 9)
    words = writer._segment.words
    words[2] -= 1
    assert disk.check().whole
    words[2] += 1


def test_check_beside_a_running_writer_and_indexer(tmp_path: Path) -> None:
    disk = empty_disk(tmp_path)
    disk.open().synced(control.synced(1, write_blocking=True))
    ends = threading.Event()

    def work() -> None:
        assert disk.writer is not None
        indexer = TimelineIndexer(disk.directory, BOOT)
        chooser = random.Random(1)
        for number in range(1_000_000):
            disk.write(chooser.randrange(200), number % 251, after_s=0.01)
            if number % 50 == 0:
                indexer.step(0.0)
            if number % 1000 == 999:
                disk.writer.cut()
            if number % 100 == 0:
                disk.writer.commit()
                if ends.is_set():
                    break
        indexer.close()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        reports = [disk.check() for _ in range(4)]
    finally:
        ends.set()
        worker.join()
    for report in reports:
        assert report.whole, report
    assert reports[0].records < reports[-1].records <= disk.check().records
    assert disk.check().whole


def test_what_an_unclean_boot_left_is_no_damage(disk: Disk) -> None:
    writer = disk.open()
    writer.commit()
    durable = writer.durable_seq
    disk.write(5, 9)
    disk.write(6, 9)
    # The payload of the last write never reached the disk, and it was never said to be durable.
    flip(disk.data(2, writer._segment.header.segment), writer._segment.place - 1)
    assert not disk.check().whole
    assert disk.check(boot="boot-two-0").whole
    # The writer of the next boot cuts it off, and goes on.
    again = disk.open("boot-two-0")
    assert again.recovered is not None and again.recovered["kept_seq"] >= durable
    disk.write(5, 1)
    assert disk.check(boot="boot-two-0").whole


def test_a_durable_record_that_an_unclean_boot_lost_is_damage(disk: Disk) -> None:
    writer = disk.open()
    lost = disk.write(5, 9)
    writer.commit()
    disk.write(6, 9)
    segment = writer._segment.header
    flip(disk.log(2, segment.segment), record_at(segment.first_seq, lost))
    found = disk.only(boot="boot-two-0")
    assert found["what"] == f"records from {lost} on were durable, and are damaged or missing"


# --- damaged segments


@pytest.mark.parametrize("at", [0, 8, 63])
def test_a_flipped_bit_in_a_record(disk: Disk, at: int) -> None:
    flip(disk.log(2), record_at(SEQS["cut"] + 1, SEQS["c"]) + at)
    found = disk.only()
    assert found["what"] == f"the header of record {SEQS['c']} fails its check"
    assert found["path"] == "timelines/t1/intervals/000002/00000001.log"
    # Which bytes it was, nobody knows: it shows to the end.
    assert (found["from_seq"], found["to_seq"]) == (SEQS["c"], 14)
    points = found["points"]
    assert isinstance(points, dict)
    assert points["affected"] == 1
    assert points["before"]["name"] == "bp:0" and points["after"] is None


def test_a_flipped_bit_in_a_payload_shows_until_it_is_overwritten(disk: Disk) -> None:
    # The third payload: that of block 1, which is written again at the end.
    flip(disk.data(1), 3 * BLOCK + 100)
    found = disk.only()
    assert found["what"] == f"the payload of record {SEQS['b']} does not match its digest"
    assert found["path"] == "timelines/t1/intervals/000001/00000001.data"
    assert (found["from_seq"], found["to_seq"]) == (SEQS["b"], SEQS["b2"] - 1)
    assert found["points"] == {
        "affected": 6,
        "named": ["before-upgrade", "bp:0"],
        "before": {"seq": SEQS["a"], "time": "2027-01-15T08:00:01.000000000Z", "name": None},
        "after": {"seq": SEQS["b2"], "time": "2027-01-15T08:00:06.000000000Z", "name": None},
    }


def test_a_damaged_payload_of_a_control_record_harms_no_content(disk: Disk) -> None:
    flip(disk.data(1), 5 * BLOCK + 3)
    found = disk.only()
    assert found["what"] == f"the payload of record {SEQS['mark']} does not match its digest"
    assert found["from_seq"] == found["to_seq"] == SEQS["mark"]


def test_a_missing_data_file(disk: Disk) -> None:
    disk.data(2).unlink()
    found = disk.only()
    assert str(found["what"]).endswith("do not match their digests: the data file is missing")
    assert (found["from_seq"], found["to_seq"]) == (SEQS["c"], 14)


@pytest.mark.parametrize("at", [0, 100])
def test_a_flipped_bit_in_a_header_page(disk: Disk, at: int) -> None:
    flip(disk.log(1), at)
    found = disk.only()
    assert found["path"] == "timelines/t1/intervals/000001/00000001.log"
    assert (found["from_seq"], found["to_seq"]) == (1, 14)


def test_a_tail_word_that_counts_too_few(disk: Disk) -> None:
    with open(disk.log(1), "r+b") as log:
        log.seek(TAIL_AT)
        log.write((3).to_bytes(8, "little"))
    assert disk.only()["what"] == "the tail word counts 3 records, and whole ones follow"


def test_a_log_that_was_cut_short(disk: Disk) -> None:
    os.truncate(disk.log(1), record_at(1, 8))
    found = disk.only()
    assert found["what"] == "the tail word counts 10 records, the file holds 7"
    assert found["from_seq"] == 8


def test_a_state_that_is_none(disk: Disk) -> None:
    flip(disk.log(1), STATE_AT, 0x40)
    assert disk.only()["what"] == "the segment's state is 66, which is none"


def test_a_missing_segment(disk: Disk) -> None:
    for path in (disk.log(1), disk.data(1)):
        path.unlink()
    whats = [damage.finding.what for damage in disk.check().damage]
    assert "the interval holds no segment" in whats


def test_a_missing_interval(disk: Disk) -> None:
    shutil.rmtree(interval_path(disk.directory, 1))
    found = disk.only()
    assert found["what"] == f"records 1 to {SEQS['cut']} are missing before this segment"


def test_a_history_that_is_missing(disk: Disk) -> None:
    shutil.rmtree(disk.directory / "intervals")
    (disk.directory / "intervals").mkdir()
    assert disk.only()["what"] == "the history is missing: there is no segment"


def test_segments_that_were_swapped(disk: Disk) -> None:
    one, two = disk.log(1), disk.log(2)
    shutil.copyfile(two, one)
    assert not disk.check().whole


def used_bytes(disk: Disk) -> Iterator[tuple[Path, int, int]]:
    """Ranges of bytes that mean something, by file."""
    for interval in (1, 2):
        log = disk.log(interval)
        page = log.read_bytes()[:PAGE]
        _, _, length, count, _, _ = FIXED.unpack_from(page)
        yield log, 0, 16
        yield log, FIXED.size, FIXED.size + length + 4
        yield log, PAGE, PAGE + count * RECORD_SIZE
        records = np.frombuffer(log.read_bytes()[PAGE:], DTYPE, count=count)
        for record in records:
            if record["kind"] == Kind.DATA:
                yield (
                    disk.data(interval),
                    int(record["place"]),
                    int(record["place"]) + int(record["length"]) * 512,
                )


def test_every_flipped_bit_is_found(disk: Disk) -> None:
    def findings() -> int:
        effects = Effects()
        SegmentCheck(disk.directory, disk.timeline, BOOT, effects, lambda _: None).run()
        return len(effects.damage())

    assert findings() == 0
    chooser = random.Random(7)
    for path, start, end in used_bytes(disk):
        for _ in range(4):
            at, mask = chooser.randrange(start, end), 1 << chooser.randrange(8)
            flip(path, at, mask)
            assert findings(), f"{path.name}: byte {at}, mask {mask}"
            flip(path, at, mask)
    assert findings() == 0


# --- what a timeline stands on


def test_a_damaged_timeline_json(disk: Disk) -> None:
    (disk.directory / "timeline.json").write_text("{}")
    assert disk.only()["path"] == "timelines/t1/timeline.json"


def test_a_missing_base(disk: Disk) -> None:
    (disk.directory / "base.raw").unlink()
    found = disk.only()
    assert found["what"] == "the first copy is missing"
    assert (found["from_seq"], found["to_seq"]) == (1, 14)


def test_a_base_that_was_cut_short(disk: Disk) -> None:
    os.truncate(disk.directory / "base.raw", SIZE - 512)
    assert disk.only()["what"] == f"the first copy has {SIZE - 512} bytes, the disk {SIZE}"


# --- the index


@contextlib.contextmanager
def changing(disk: Disk, interval: int) -> Iterator[tuple[IndexFile, lmdb.Transaction]]:
    """The index of an interval, to be damaged."""
    path = next(interval_path(disk.directory, interval).glob("*.mdb"))
    file = IndexFile(path, writable=True)
    try:
        with file.env.begin(write=True) as txn:
            yield file, txn
    finally:
        file.env.close()


def piece(unit: int, seq: int) -> bytes:
    return unit.to_bytes(6, "big") + seq.to_bytes(8, "big")


def put_piece(file: IndexFile, txn: lmdb.Transaction) -> None:
    txn.put(piece(1, SEQS["b"]), (99).to_bytes(8, "little"), db=file.pieces)


def add_piece(file: IndexFile, txn: lmdb.Transaction) -> None:
    txn.put(piece(77, SEQS["a"]), (99).to_bytes(8, "little"), db=file.pieces)


def remove_piece(file: IndexFile, txn: lmdb.Transaction) -> None:
    assert txn.delete(piece(1, SEQS["b"]), db=file.pieces)


def put_point(file: IndexFile, txn: lmdb.Transaction) -> None:
    key = (START_NS // SECOND_NS + 2).to_bytes(8, "big")
    value = txn.get(key, db=file.points)
    assert value is not None
    txn.put(key, bytes([value[0] ^ 1]) + value[1:], db=file.points)


def remove_mark(file: IndexFile, txn: lmdb.Transaction) -> None:
    assert txn.delete(b"mark/before-upgrade", db=file.control)


def put_indexed(file: IndexFile, txn: lmdb.Transaction) -> None:
    txn.put(b"indexed", (4711).to_bytes(8, "little"), db=file.meta)


def put_levels(file: IndexFile, txn: lmdb.Transaction) -> None:
    txn.put(b"levels", b"\x01", db=file.meta)


def put_state(file: IndexFile, txn: lmdb.Transaction) -> None:
    txn.put(b"state", b"\x80", db=file.meta)


@pytest.mark.parametrize(
    ("damage", "what", "from_seq"),
    [
        (put_piece, "has a wrong value for bytes 4096 to 8192 at record 5", 5),
        (add_piece, "has a piece that no record has for bytes 315392 to 319488 at record 4", 4),
        (remove_piece, "misses a piece for bytes 4096 to 8192 at record 5", 5),
        (put_point, "has a wrong row for 1 second, the first 1800000002", 1),
        (remove_mark, "misses row for 1 control record, the first mark/before-upgrade", 1),
        (put_indexed, "reaches to record 4711, the interval to 10", 1),
        (put_levels, "says that it has the levels 0001, not 0011", 1),
        (put_state, "holds another state than the records give", 1),
    ],
)
def test_a_damaged_index(
    disk: Disk, damage: Callable[[IndexFile, lmdb.Transaction], None], what: str, from_seq: int
) -> None:
    with changing(disk, 1) as (file, txn):
        damage(file, txn)
    found = disk.only()
    assert found["what"] == f"the index of interval 1 {what}"
    assert found["path"] == "timelines/t1/intervals/000001/index.mdb"
    assert (found["from_seq"], found["to_seq"]) == (from_seq, SEQS["cut"])
    assert found["hint"] == "cdp index rebuild DISK makes it anew; nothing is lost"
    assert rebuild(disk.directory, BOOT) == 14
    assert disk.check().whole


@pytest.mark.parametrize(
    ("how", "what"),
    [("garbage", "cannot be opened: "), ("cut", "cannot be opened: ")],
)
def test_an_index_file_that_lmdb_cannot_read(disk: Disk, how: str, what: str) -> None:
    path = interval_path(disk.directory, 1) / "index.mdb"
    path.chmod(0o600)
    if how == "garbage":
        path.write_bytes(random.Random(1).randbytes(path.stat().st_size))
    else:
        # LMDB reads it through a mapping: what is missing there would end a process with SIGBUS.
        os.truncate(path, 2 * PAGE)
    report = disk.check()
    assert [damage.finding.path.parent.name for damage in report.damage] == ["000001"]
    assert report.damage[0].finding.what.startswith(f"the index of interval 1 {what}")


def test_an_index_is_held_against_what_is_whole(disk: Disk) -> None:
    """A damaged record is one damage: that the index still knows the record is none."""
    flip(disk.log(1), record_at(1, SEQS["b"]) + 20)
    assert disk.only()["what"] == f"the header of record {SEQS['b']} fails its check"


# --- base points


def make_base_point(disk: Disk, number: int, backing: str, *, fill: int = 0) -> Path:
    """A base point as QEMU makes it."""
    path = disk.directory / f"bp-{number}.qcow2"
    made = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        backing,
        "-F",
        "raw" if backing.endswith(".raw") else "qcow2",
    ]
    subprocess.run([*made, path.name], cwd=disk.directory, check=True)
    writes = ["write -q -P 3 0 4k", "write -q -P 2 4k 4k", "write -q -z 64k 64k"] if number == 0 else []
    if fill:
        writes.append(f"write -q -P {fill} 512k 4k")
    command = [part for write in writes for part in ("-c", write)]
    if command:
        subprocess.run(["qemu-io", *command, path.name], cwd=disk.directory, check=True)
    note_what_is_missing(disk.state, disk.directory)
    return path


@pytest.mark.real
def test_whole_base_points(disk: Disk) -> None:
    make_base_point(disk, 0, "base.raw")
    report = disk.check(full=True)
    assert report.whole, report


@pytest.mark.real
def test_a_base_point_whose_content_differs(disk: Disk) -> None:
    make_base_point(disk, 0, "base.raw", fill=9)
    assert disk.check().whole
    damage = disk.check(full=True).damage
    assert len(damage) == 1 and damage[0].named == ("bp:0",)
    assert damage[0].finding.what.startswith("base point 0 differs from the journal in bytes ")
    assert damage[0].finding.from_seq == SEQS["cut"]


@pytest.mark.real
@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda path: path.write_bytes(b"QFI"), "bp-0.qcow2 is no QCOW2 file"),
        (lambda path: flip(path, 4, 0xFF), "bp-0.qcow2 has a header that no base point has"),
        (lambda path: os.truncate(path, 70_000), "qemu-img does not find base point 0 whole: "),
        (lambda path: (path.parent / "base.raw").rename(path.parent / "x"), "the backing file base.raw"),
    ],
)
def test_a_damaged_base_point(disk: Disk, harm: Callable[[Path], None], what: str) -> None:
    harm(make_base_point(disk, 0, "base.raw"))
    found = [damage for damage in disk.check().damage if damage.finding.named]
    assert len(found) == 1 and found[0].named == ("bp:0",) and found[0].affected == 1
    assert found[0].finding.what.startswith(what)


@pytest.mark.real
def test_a_base_point_on_the_wrong_backing_file(disk: Disk) -> None:
    shutil.copyfile(disk.directory / "base.raw", disk.directory / "other.raw")
    make_base_point(disk, 0, "other.raw")
    found = disk.only()
    assert found["what"] == "base point 0 has the backing file 'other.raw', which it should not stand on"


@pytest.mark.real
def test_a_base_point_without_a_cut(disk: Disk) -> None:
    make_base_point(disk, 0, "base.raw")
    make_base_point(disk, 1, "bp-0.qcow2")
    assert disk.only()["what"] == "there is a base point 1, but no record of its cut"


# --- how long damage shows

BLOCKS = 6

CHANGES = st.lists(
    st.tuples(
        st.sampled_from([Kind.DATA, Kind.ZERO, Kind.SAME]),
        st.integers(0, BLOCKS - 1),
        st.integers(1, BLOCKS),
        st.integers(0, 1 << 30),
    ),
    min_size=1,
    max_size=12,
)


@given(CHANGES, st.integers(0, 1 << 30))
def test_damage_never_shows_longer_than_is_said(
    changes: list[tuple[Kind, int, int, int]], choice: int
) -> None:
    """Against a model that paints every record's blocks as harmed or not, and looks when the last harm is gone."""
    records = np.zeros(len(changes), DTYPE)
    painted = [[False] * BLOCKS]
    harmed = choice % len(changes) + 1
    for number, (kind, first, count, ref) in enumerate(changes, start=1):
        end = min(first + count, BLOCKS)
        place = ref % number if kind is Kind.SAME else 0
        record = records[number - 1]
        record["kind"], record["seq"], record["time"] = kind, number, number * SECOND_NS
        record["offset"], record["length"], record["place"] = first * BLOCK, (end - first) * 8, place
        after = painted[-1].copy()
        for block in range(first, end):
            after[block] = number == harmed or (kind is Kind.SAME and painted[place][block])
        painted.append(after)
    bad = records[harmed - 1]
    start, end = int(bad["offset"]), int(bad["offset"]) + int(bad["length"]) * 512
    effects = Effects()
    effects.add(Finding("x", Path("x"), harmed, harmed * SECOND_NS, extents=((start, end),)))
    for record in records:
        effects.feed(records[int(record["seq"]) - 1 : int(record["seq"])])
    shows = max(seq for seq, blocks in enumerate(painted) if any(blocks))
    damage = effects.damage()[0]
    assert damage.to_seq >= shows
    if not any(kind is Kind.SAME for kind, *_ in changes):
        assert damage.to_seq == shows
    assert damage.affected == damage.to_seq - harmed + 1
