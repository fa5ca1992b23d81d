"""After an unclean boot: a journal cut or flipped anywhere in its tail opens as a prefix that holds everything durable.

Damage before the durable seq is another thing: it is reported and never cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cdpserver import limits
from cdpserver.cuts import find_cut
from cdpserver.errors import CorruptError
from cdpserver.journal import recovery, segment
from cdpserver.journal.log import Journal
from cdpserver.journal.segment import PAGE
from cdpserver.target.leftover import needs_recovery
from tests.core import Line, World, remove, scratch
from tests.model import BLOCK, CONTROL, DATA, LogRecord, read_log

SIZE = 16 * BLOCK + 1536
"""The last extent is short, so that a payload can be cut at every byte in little time."""

LAST = 16 * BLOCK
AFTER_DURABLE = 11


@dataclass
class Killed:
    """A journal whose host went down: what its files said then, and what had been made durable."""

    world: World
    records: list[LogRecord]
    durable_seq: int
    opened: int = 0

    @property
    def line(self) -> Line:
        return self.world.lines[0]

    def path(self, r: LogRecord) -> Path:
        """The header log of a record."""
        return self.line.directory / f"intervals/{r.interval:06d}/{r.segment:08d}.log"

    def at(self, r: LogRecord) -> int:
        """Where a record is in its header log."""
        first = next(other for other in self.records if self.path(other) == self.path(r))
        return PAGE + (r.seq - first.seq) * 64


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Killed]:
    """Segments of 16 records; the last 11 records were written after the last commit."""
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 16)
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    with scratch() as path:
        yield write(World(path))


def write(world: World) -> Killed:
    line = world.add(SIZE)
    line.write(0, b"base" * 512)
    line.synced()
    for number in range(10):
        line.write(number * BLOCK, bytes([number + 1]) * BLOCK)
    line.cut()
    for number in range(18):
        world.now_ns += 300_000_000
        line.write(number % 9 * BLOCK, bytes([32 + number]) * BLOCK)
    line.mark("durable")
    durable_seq = line.writer.durable_seq
    for number in range(AFTER_DURABLE - 2):
        world.now_ns += 300_000_000
        line.write(LAST, bytes([64 + number]) * 1536)
    line.zero(0, 4 * BLOCK)
    line.write(LAST, b"last" * 384)
    assert line.writer.state.grade.label == "crash"
    line.close(clean=False)
    records = read_log(line.directory)
    # The commit's own record follows the durable ones.
    assert len([r for r in records if r.seq > durable_seq]) == AFTER_DURABLE + 1
    return Killed(world, records, durable_seq)


def surveyed(case: Killed, boot: str = "99999999-boot") -> tuple[int, bool]:
    """(newest seq that is kept, damaged), as another boot sees the files. Nothing is written."""
    journal = Journal(case.line.directory)
    try:
        found = recovery.survey(journal, boot)
        assert found.unclean
        (interval, number), count = found.valid[-1]
        return journal.reader(interval, number).first_seq + count - 1, found.damaged
    finally:
        journal.close()


def opened(case: Killed) -> int:
    """Open a copy as another boot, check all that is left, and write on; the newest seq that was kept."""
    case.opened += 1
    path = case.world.state.path.parent / f"copy-{case.opened}"
    world = case.world.clone(path)
    world.boots += 1
    line = world.lines[0]
    assert needs_recovery(line.directory, world.boot)
    line.open()
    records = read_log(line.directory)
    gap = next(number for number, r in enumerate(records) if r.message.get("type") == "gap")
    kept = records[gap - 1].seq
    assert records[:gap] == case.records[:gap]
    assert kept >= case.durable_seq
    assert (records[gap].message["from_seq"], records[gap].seq) == (kept, kept + limits.SEQ_JUMP)
    assert [(e, f["level"], f.get("kept_seq", kept)) for e, f in world.events] == [
        ("target.unclean-boot", "warning", kept),
        ("disk.gap", "warning", kept),
    ]
    # What a cut file doesn't show any more cannot be counted.
    assert kept < case.records[-1].seq or world.events[0][1]["cut_records"] == 0
    line.forget_after(kept)
    for seq in line.model.instants[-3:]:
        line.check(seq)
    line.model.remember(line.last_seq)
    assert line.writer.state.grade.label == "unordered"
    line.write(BLOCK, b"goes on " * 512)
    line.cut()
    for seq in line.model.instants[-4:]:
        line.check(seq)
    world.close()
    remove(path)
    return kept


@dataclass
class Bytes:
    """A file whose bytes are damaged and restored."""

    path: Path

    def __post_init__(self) -> None:
        self.whole = self.path.read_bytes()

    def cut(self, at: int, *, zeros: bool) -> None:
        """The file ends at `at`; or it is as long as before and holds zeros from there."""
        self.path.write_bytes(self.whole[:at] + bytes(len(self.whole) - at if zeros else 0))

    def flip(self, bit: int) -> None:
        """One bit is another."""
        flipped = bytearray(self.whole)
        flipped[bit // 8] ^= 1 << bit % 8
        self.path.write_bytes(flipped)

    def restore(self) -> None:
        self.path.write_bytes(self.whole)


# --- the tail that was not durable yet


@pytest.mark.parametrize("zeros", [False, True])
def test_the_header_log_cut_at_every_byte(killed: Killed, zeros: bool) -> None:
    """All records before the cut are kept, and nothing else.

    A digest or check may end in zeros: a record that loses nothing else to zeros is whole.
    """
    tail = [r for r in killed.records if r.seq > killed.durable_seq + 1]
    assert len({killed.path(r) for r in tail}) == 1
    log = Bytes(killed.path(tail[-1]))
    for r in tail[-7:]:
        for byte in range(64):
            cut = killed.at(r) + byte
            log.cut(cut, zeros=zeros)
            whole = zeros and not any(log.whole[cut : killed.at(r) + 64])
            kept = r.seq if whole else r.seq - 1
            assert surveyed(killed) == (kept, False)
            if byte % 16 == 5:
                assert opened(killed) == kept
    log.restore()
    assert opened(killed) == killed.records[-1].seq


@pytest.mark.parametrize("zeros", [False, True])
def test_the_data_file_cut_at_every_byte(killed: Killed, zeros: bool) -> None:
    """A record whose payload isn't there has never been."""
    payloads = [r for r in killed.records if r.kind == DATA][-3:]
    data = Bytes(killed.path(payloads[-1]).with_suffix(".data"))
    for r in payloads:
        for byte in range(0, r.length, 1 if r is payloads[-1] else 61):
            data.cut(r.place + byte, zeros=zeros)
            assert surveyed(killed) == (r.seq - 1, False)
            if byte % 244 == 0:
                assert opened(killed) == r.seq - 1


def test_every_bit_of_the_tail_flipped(killed: Killed) -> None:
    """Header or payload, a record that isn't what was written is cut, with all that follows."""
    tail = killed.records[-3:]
    log = Bytes(killed.path(tail[0]))
    for r in tail:
        for bit in range(512):
            log.flip(killed.at(r) * 8 + bit)
            assert surveyed(killed) == (r.seq - 1, False)
            if bit % 100 == 0:
                assert opened(killed) == r.seq - 1
    log.restore()
    data = Bytes(killed.path(tail[-1]).with_suffix(".data"))
    for bit in range(0, 1536 * 8, 7):
        data.flip(tail[-1].place * 8 + bit)
        assert surveyed(killed) == (tail[-1].seq - 1, False)


def test_the_tail_word_of_another_boot_is_not_believed(killed: Killed) -> None:
    """Its page may be older or younger than the records' pages."""
    log = Bytes(killed.path(killed.records[-1]))
    for word in (0, 1, 5, 10_000, (1 << 64) - 1):
        log.path.write_bytes(log.whole[:16] + word.to_bytes(8, "little") + log.whole[24:])
        assert opened(killed) == killed.records[-1].seq


def test_a_segment_whose_first_commit_never_ended_is_cut(killed: Killed) -> None:
    """A file that got its name but not its pages."""
    newest = killed.path(killed.records[-1])
    for size in (0, 100, PAGE, PAGE + 4096):
        empty = newest.with_name(f"{int(newest.stem) + 1:08d}.log")
        empty.write_bytes(bytes(size))
        empty.with_suffix(".data").write_bytes(b"")
        assert opened(killed) == killed.records[-1].seq
        empty.unlink()


def test_a_tail_over_several_segments(killed: Killed) -> None:
    """A hole in one of them cuts the following ones whole, also where they are whole themselves."""
    world = killed.world
    killed.line.open()
    killed.line.writer.commit()
    killed.durable_seq = killed.line.writer.durable_seq
    for number in range(40):
        killed.line.write(number % 8 * BLOCK, bytes([100 + number]) * BLOCK)
    killed.line.close(clean=False)
    killed.records = read_log(killed.line.directory)
    paths = list(dict.fromkeys(killed.path(r) for r in killed.records if r.seq > killed.durable_seq + 1))
    assert len(paths) >= 3
    for path in paths[:-1]:
        inside = [r for r in killed.records if killed.path(r) == path and r.seq > killed.durable_seq + 1]
        for r in (inside[0], inside[-1]):
            log = Bytes(path)
            log.flip(killed.at(r) * 8)
            assert opened(killed) == r.seq - 1
            log.restore()
    paths[-2].rename(paths[-2].with_suffix(".gone"))
    first_lost = next(r for r in killed.records if killed.path(r) == paths[-2])
    assert opened(killed) == first_lost.seq - 1
    assert world.boots == 0


@pytest.mark.parametrize("lost", [False, True])
def test_a_cut_that_is_the_last_record_left_ends_its_interval(
    killed: Killed, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Else the base point could never be found again, and none after it be published."""
    line = killed.line
    line.open()
    monkeypatch.setattr(line.writer, "commit", lambda: None)
    number, cut_seq, _ = line.writer.cut()
    line.close(clean=False)
    if lost:
        for path in (line.directory / "intervals").glob("000003/*"):
            path.unlink()  # its name was not durable yet
    killed.world.boots += 1
    line.open()
    line.write(0, b"x" * BLOCK)
    journal = Journal(line.directory)
    found = find_cut(journal, number)
    assert found is not None and found.seq == cut_seq
    assert read_log(line.directory)[-1].interval == 3
    journal.close()
    line.close(clean=False)


def test_the_same_boot_loses_nothing(killed: Killed) -> None:
    """The page cache outlives a process: what it holds after the tail word was never acknowledged."""
    killed.line.open()
    assert killed.line.writer.recovered is None
    assert read_log(killed.line.directory) == killed.records
    for seq in killed.line.model.instants[-20:]:
        killed.line.check(seq)
    killed.line.close(clean=False)


def test_an_unclean_boot_is_recovered_once(killed: Killed) -> None:
    """Killed after it, and again: no second gap, no second jump."""
    world, line = killed.world, killed.line
    world.boots += 1
    line.open()
    for _ in range(3):
        line.write(0, b"x" * BLOCK)
        line.close(clean=False)
        line.open()
        assert line.writer.recovered is None
    line.close(clean=False)
    assert len([r for r in read_log(line.directory) if r.message.get("type") == "gap"]) == 1
    assert not needs_recovery(line.directory, world.boot)


def test_a_fork_has_no_gap(killed: Killed) -> None:
    """What its guest didn't flush, it knows to be lost."""
    world, line = killed.world, killed.line
    line.open()
    fork = world.fork(line, killed.records[-1].seq)
    fork.write(0, b"f" * BLOCK)
    last = fork.last_seq
    for each in (line, fork):
        each.close(clean=False)
    world.boots += 1
    fork.open()
    assert fork.last_seq == last + limits.SEQ_JUMP - 1
    assert all(r.message.get("type") != "gap" for r in read_log(fork.directory))
    assert fork.writer.state.grade.label == "crash"
    fork.write(BLOCK, b"g" * BLOCK)
    assert fork.last_seq == last + limits.SEQ_JUMP
    for seq in fork.model.instants:
        fork.check(seq)
    fork.close(clean=False)


# --- damage


def files(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_damage_before_the_durable_seq_is_reported_and_never_cut(killed: Killed) -> None:
    """Points before it stay readable, points after it are refused, and no file changes, however often it is opened."""
    line, world = killed.line, killed.world
    world.boots += 1
    newest = killed.path(killed.records[-1])
    durable = [r for r in killed.records if r.seq <= killed.durable_seq and killed.path(r) == newest]
    assert len(durable) >= 3
    log = Bytes(newest)
    for r in durable:
        log.flip((killed.at(r) + 8) * 8)
        assert surveyed(killed) == (r.seq - 1, True)
        before = files(line.directory)
        for _ in range(2):
            world.events.clear()
            with pytest.raises(CorruptError, match=f"record {r.seq} is damaged"):
                line.open()
            assert [(event, fields["level"]) for event, fields in world.events] == [
                ("target.damaged", "error")
            ]
        assert files(line.directory) == before
        older = [seq for seq in line.model.instants if seq < r.seq]
        for seq in older[-4:]:
            line.check(seq)
        with pytest.raises(CorruptError), line.view(killed.records[-1].seq) as view:
            view.read(0, SIZE)
        log.restore()


def test_a_damaged_control_record_is_corrupt(killed: Killed) -> None:
    """What points mean is never guessed."""
    line = killed.line
    mark = next(r for r in killed.records if r.kind == CONTROL and r.message["type"] == "mark")
    data = Bytes(killed.path(mark).with_suffix(".data"))
    data.flip(mark.place * 8)
    killed.world.boots += 1
    with pytest.raises(CorruptError):
        line.open()
    data.restore()
    line.open()
    line.close(clean=False)
