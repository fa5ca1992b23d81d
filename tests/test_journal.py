"""The journal: its formats as laws, finding one's way in it, one writer, sessions, and what an I/O error does."""

import contextlib
import errno
import os
import random
import struct
import subprocess
import sys
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import limits, messages
from cdpserver.cuts import find_cut
from cdpserver.errors import BrokenError, CdpError, CorruptError, NoSpaceError, RefusedError
from cdpserver.journal import control, firstcopy, log, record, segment
from cdpserver.journal.begin import lock_timeline
from cdpserver.journal.control import Grade, State
from cdpserver.journal.log import CACHED_READERS, Journal
from cdpserver.journal.observed import MOST_CHARACTERS, NOT_WRITTEN, OBSERVERS, Observed
from cdpserver.journal.record import Kind, Record
from cdpserver.journal.segment import SEALED, Header
from cdpserver.retention.facts import _intervals
from tests.core import ROOT, Line, World, check_log, scratch
from tests.model import BLOCK, SAME, equals_but, read_log

MIB = 1 << 20
U64 = st.integers(0, (1 << 64) - 1)
texts = st.text(max_size=12)
observations = st.one_of(
    st.just(NOT_WRITTEN),
    st.builds(
        Observed,
        by=st.sampled_from(OBSERVERS),
        ready=st.booleans(),
        io_status=st.text(max_size=MOST_CHARACTERS),
        time_ns=st.integers(0, 1 << 62),
    ),
)
states = st.builds(
    State,
    observed=observations,
    session=st.integers(0, 1 << 40),
    synced=st.booleans(),
    write_blocking=st.booleans(),
    fork=st.booleans(),
    cuts=st.integers(0, 1 << 40),
    resync_ref=st.integers(-1, 1 << 61),
    gap_until_ns=st.integers(0, 1 << 62),
)
control_messages = st.one_of(
    st.builds(control.begin, st.sampled_from(("first-copy", "image", "point")), st.integers(0, 1 << 40)),
    st.builds(control.session, st.integers(0, 1 << 40), texts),
    st.builds(
        lambda n, w, o: control.synced(n, write_blocking=w, observed=o),
        st.integers(0, 1 << 40),
        st.booleans(),
        observations,
    ),
    st.builds(control.mark, texts),
    st.builds(control.cut, st.integers(0, 1 << 40)),
    st.builds(
        lambda a, b, r: control.gap(from_seq=a, from_time_ns=b, reason=r),
        st.integers(0, 1 << 61),
        st.integers(0, 1 << 62),
        texts,
    ),
    st.builds(
        lambda a, b, r: control.missed(from_time_ns=a, until_time_ns=b, reason=r),
        st.integers(0, 1 << 62),
        st.integers(0, 1 << 62),
        texts,
    ),
)
anything = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(), st.text(max_size=5)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
"""What msgpack can carry."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 8 records, intervals of 3 segments, windows of one page."""
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 8)
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    monkeypatch.setattr(limits, "INTERVAL_SEGMENTS", 3)


def history(world: World, size: int = MIB) -> Line:
    """A disk whose history has begun and whose mirror is in sync."""
    line = world.add(size)
    line.write(0, b"base" * 1024)
    line.synced()
    return line


# --- laws of the formats


@given(
    st.sampled_from(Kind),
    U64,
    U64,
    U64,
    st.integers(0, (1 << 32) - 1),
    U64,
    st.binary(min_size=20, max_size=20),
)
def test_a_record_decodes_to_what_was_encoded(
    kind: Kind, seq: int, time_ns: int, offset: int, sectors: int, place: int, digest: bytes
) -> None:
    start = record.salt(bytes(16), 1, 2)
    place = place // BLOCK * BLOCK if kind is Kind.DATA else place
    is_control = kind is Kind.CONTROL
    made = Record(
        kind,
        seq,
        time_ns,
        0 if is_control else offset,
        sectors if is_control else sectors * 512,
        place,
        digest,
    )
    assert record.decode(record.encode(made, start), start) == made
    with pytest.raises(CorruptError):
        record.decode(record.encode(made, start), record.salt(bytes(16), 1, 3))


@given(st.binary(min_size=60, max_size=60), st.integers(-3, 3))
def test_a_record_of_any_bytes_is_a_record_or_corrupt(body: bytes, more: int) -> None:
    """Also if the check is right."""
    for head in (body, struct.pack("<HBB", record.MAGIC, 1, body[3]) + body[4:]):
        raw = head + struct.pack("<I", zlib.crc32(head, 7))
        with contextlib.suppress(CorruptError):
            decoded = record.decode(raw, 7)
            assert record.decode(record.encode(decoded, 7), 7) == decoded
        with pytest.raises(CorruptError):
            record.decode((raw + bytes(3))[: 64 + more] if more else head, 7)


@given(st.binary(min_size=16, max_size=16), U64, U64, states, st.text(min_size=8, max_size=40))
def test_a_header_page_decodes_to_what_was_encoded(
    timeline: bytes, number: int, seq: int, state: State, boot: str
) -> None:
    header = Header(timeline, number, number, seq, seq, boot, state)
    page = segment.encode_page(header)
    assert len(page) == segment.PAGE
    assert segment.decode_page(page, "x") == header


def page_of(values: bytes) -> bytes:
    fixed = segment.FIXED.pack(segment.SEGMENT_MAGIC, 1, len(values), 0, 0, bytes(32))
    check = struct.pack("<I", zlib.crc32(values, zlib.crc32(fixed[:16])))
    return (fixed + values + check).ljust(segment.PAGE, b"\0")


@given(st.one_of(st.binary(max_size=64), anything.map(msgpack.packb)))
def test_a_header_page_of_any_bytes_is_corrupt(values: bytes) -> None:
    with pytest.raises(CorruptError):
        segment.decode_page(page_of(values), "x")
    with pytest.raises(CorruptError):
        segment.decode_page(values.ljust(segment.PAGE, b"\0"), "x")


FIELDS = ("timeline", "interval", "segment", "first_seq", "first_time_ns", "boot_id", "previous", "carry")
GOOD_PAGE = {
    "timeline": bytes(16),
    **dict.fromkeys(FIELDS[1:5], 1),
    "boot_id": "b",
    "previous": bytes(32),
    "carry": control.pack(State()),
}


@given(st.sampled_from(FIELDS), anything)
def test_a_header_page_with_any_value_in_it_is_one_or_corrupt(name: str, value: object) -> None:
    with contextlib.suppress(CorruptError):
        header = segment.decode_page(page_of(msgpack.packb(GOOD_PAGE | {name: value})), "x")
        assert segment.decode_page(segment.encode_page(header), "x") == header


@given(control_messages, states)
def test_a_control_record_decodes_and_folds(message: dict[str, Any], state: State) -> None:
    assert control.decode(control.encode(message)) == message
    folded = control.fold(state, message, seq=9, time_ns=99)
    assert control.unpack(control.pack(folded)) == folded


@given(
    st.one_of(st.binary(max_size=64), anything.map(msgpack.packb)),
    control_messages,
    st.data(),
)
def test_a_control_record_of_any_bytes_is_one_or_corrupt(
    raw: bytes, message: dict[str, Any], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(message)))
    broken = msgpack.packb(message | {name: data.draw(anything)})
    missing = msgpack.packb({key: value for key, value in message.items() if key != name})
    for payload in (raw, broken, missing):
        with contextlib.suppress(CorruptError):
            control.fold(State(), control.decode(payload), seq=1, time_ns=1)


@given(anything)
def test_what_synced_rests_on_is_read_or_corrupt(value: object) -> None:
    """In a record and in a header page; old ones have none, and a page has room for the longest."""
    message = control.synced(1, write_blocking=True)
    assert (
        control.fold(State(), control.decode(control.encode(message)), seq=1, time_ns=1).observed
        == NOT_WRITTEN
    )
    for broken in (
        value,
        {"by": "qmp"},
        asdict(Observed("nobody")),
        asdict(Observed("qmp", io_status="x" * 65)),
    ):
        with pytest.raises(CorruptError, match="rests on"):
            control.decode(msgpack.packb(message | {"observed": broken}))
        with pytest.raises(CorruptError, match="rests on"):
            control.unpack({"observed": broken})
    longest = Observed("operator", True, "\U0010ffff" * MOST_CHARACTERS, (1 << 63) - 1)
    state = State(observed=longest, anchor="a" * 255, anchored=True, gap_open=True, size=4096)
    page = segment.encode_page(Header(bytes(16), 1, 1, 1, 1, "b" * 36, state))
    assert len(page) == segment.PAGE and segment.decode_page(page, "it").carry == state


def test_what_synced_rests_on_lasts_as_long_as_it() -> None:
    seen, later = Observed("qmp", True, "ok", 5), Observed("operator", time_ns=9)
    synced = control.synced(1, write_blocking=True, observed=seen)
    state = control.fold(State(session=1), synced, seq=2, time_ns=6)
    assert state.observed == seen
    shown = control.shown(state)
    assert shown["observed"] == {"by": "qmp", "ready": True, "io_status": "ok", "time_ns": 5}
    again = control.fold(state, control.synced(1, write_blocking=True, bitmap="b"), seq=3, time_ns=7)
    assert again.observed == seen, "another bitmap's word rests on what was seen before"
    told = control.fold(state, control.synced(1, write_blocking=True, observed=later), seq=3, time_ns=7)
    assert control.shown(told)["observed"] == {
        "by": "operator",
        "ready": None,
        "io_status": None,
        "time_ns": 9,
    }
    for end in (control.session(2, "x"), control.gap(from_seq=2, from_time_ns=6, reason="r")):
        ended = control.fold(again, end, seq=4, time_ns=8)
        assert ended.observed == NOT_WRITTEN and control.shown(ended)["observed"] is None


@given(anything)
def test_a_carry_of_any_values_is_one_or_corrupt(values: object) -> None:
    with contextlib.suppress(CorruptError):
        assert control.unpack(control.pack(control.unpack(values))) == control.unpack(values)


@given(st.one_of(st.binary(max_size=64), anything.map(msgpack.packb)))
def test_a_message_of_any_bytes_is_a_map_or_corrupt(body: bytes) -> None:
    with contextlib.suppress(CorruptError):
        assert isinstance(messages.unpack(body), dict)


# --- finding one's way


def busy(world: World, line: Line, seed: int) -> None:
    """Some hundred records over many segments and intervals, with pauses, sessions, marks, cuts and a reboot."""
    dice = random.Random(seed)
    for number in range(90):
        world.now_ns += dice.choice((0, 1, 700_000_000))
        line.write(dice.randrange(200) * BLOCK, dice.randbytes(BLOCK))
        if number % 17 == 0:
            line.mark(f"m{number}")
        if number % 29 == 0:
            line.cut()
        if number % 31 == 0:
            line.disconnect()
        if number == 60:
            world.reboot(clean=False)


@pytest.mark.usefixtures("small")
def test_every_seq_and_time_is_found(world: World) -> None:
    line = history(world)
    busy(world, line, 1)
    records = read_log(line.directory)
    assert len({r.interval for r in records}) > 4
    journal = Journal(line.directory)
    seqs, times = [r.seq for r in records], [r.time_ns for r in records]
    for wanted in sorted({s + d for s in seqs for d in (-1, 0, 1)}):
        index = bisect_right(seqs, wanted) - 1
        if index >= 0:
            found = journal.at_seq(wanted)
            assert (found.seq, found.time_ns) == (seqs[index], times[index])
    for wanted in sorted({t + d for t in times for d in (-1, 0, 1)}):
        index = bisect_right(times, wanted) - 1
        position = journal.at_time(wanted)
        assert (position.seq if position else None) == (seqs[index] if index >= 0 else None)
    dice = random.Random(2)
    for _ in range(50):
        after, upto, limit = dice.choice(seqs), dice.choice(seqs), dice.choice((None, 1, 9))
        runs = list(journal.runs(after, upto, limit=limit))
        listed = [int(seq) for run in runs for seq in run.records["seq"]]
        assert listed == [s for s in seqs if after < s <= upto][:limit]
    journal.close()


@pytest.mark.usefixtures("small")
def test_the_state_at_every_seq_is_what_the_control_records_fold_to(world: World) -> None:
    line = history(world)
    busy(world, line, 3)
    journal, state = Journal(line.directory), State()
    for r in read_log(line.directory):
        if r.message:
            state = control.fold(state, r.message, seq=r.seq, time_ns=r.time_ns)
        assert journal.state_at(r.seq) == state
    journal.close()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("writes", [1, 9, 30, 80])
def test_a_reader_that_looked_away_misses_nothing(world: World, writes: int) -> None:
    """Segments were added to the interval that was the newest then, and intervals after it."""
    line = history(world)
    reader = Journal(line.directory)
    reader.last()
    for number in range(writes):
        line.write(number * BLOCK, bytes([number + 1]) * BLOCK)
    assert reader.last().seq == line.last_seq
    told = [int(seq) for run in reader.runs(0, line.last_seq) for seq in run.records["seq"]]
    assert told == [r.seq for r in read_log(line.directory)]
    reader.close()


def test_few_readers_are_kept_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 4)
    monkeypatch.setattr(log, "CACHED_READERS", 3)
    line = history(world)
    for number in range(60):
        line.write(number * BLOCK, b"x" * BLOCK)
        line.writer.commit()
    reader = Journal(line.directory)
    assert [int(s) for run in reader.runs(0, line.last_seq) for s in run.records["seq"]] == list(
        range(1, line.last_seq + 1)
    )
    assert len(reader._readers) <= 3
    reader.close()


# --- one writer


def test_a_second_writer_is_refused(world: World) -> None:
    line = history(world)
    with pytest.raises(RefusedError, match="another process writes"):
        lock_timeline(line.directory)
    code = "import sys, pathlib; from cdpserver.journal.begin import lock_timeline; lock_timeline(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(line.directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RefusedError" in done.stderr
    line.close(clean=False)
    os.close(lock_timeline(line.directory))
    line.open()


# --- sessions and grades


def grade(line: Line) -> str:
    return line.writer.state.grade.label


def test_a_session_ends_what_was_ordered(world: World) -> None:
    line = history(world)
    assert grade(line) == "crash"
    line.write(0, b"1" * BLOCK)
    assert grade(line) == "crash"
    line.disconnect()
    assert grade(line) == "unordered"
    line.write(0, b"2" * BLOCK)
    session = line.writer.state.session
    line.synced(write_blocking=False)
    assert grade(line) == "unordered"
    line.synced()
    assert grade(line) == "crash"
    line.write(0, b"3" * BLOCK, number=1)
    assert grade(line) == "unordered"
    with pytest.raises(RefusedError, match="is over"):
        line.disk.synced(session, write_blocking=True)
    assert line.disk.synced(session + 1, write_blocking=True)["session"] == session + 1
    assert grade(line) == "crash"


def test_readers_degrade_nothing(world: World) -> None:
    line = history(world)
    line.check_live(0, 4096, number=1)
    line.disconnect(1)
    assert grade(line) == "crash"


def test_synced_may_be_said_in_the_middle_of_a_write(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror writes on while its controller speaks: the write has decided to compare, and then it is synced."""
    line = history(world)
    line.disconnect()
    line.write(0, b"x" * BLOCK)
    resync = line.writer._resync
    assert resync is not None
    real = resync.wants

    def interrupted(offset: int, length: int) -> bool:
        answer = real(offset, length)
        line.writer.synced(control.synced(line.writer.state.session, write_blocking=True))
        return answer

    monkeypatch.setattr(resync, "wants", interrupted)
    line.write(64 << 10, b"y" * BLOCK)
    line.check(line.last_seq)


def test_a_fork_has_no_sessions(world: World) -> None:
    line = history(world)
    fork = world.fork(line, line.last_seq)
    fork.write(0, b"f" * BLOCK)
    fork.disconnect()
    fork.write(0, b"g" * BLOCK)
    assert grade(fork) == "crash"
    assert fork.writer.state.session == 0
    with pytest.raises(CdpError, match="is a fork"):
        fork.disk.synced(None, write_blocking=True)


# --- what an I/O error does

ALLOCATING = ("pwrite", "posix_fallocate", "rename", "mkdir", "open")
WATCHED = {errno.EIO: (*ALLOCATING, "fdatasync", "fsync"), errno.ENOSPC: ALLOCATING}


class Fault:
    """Fails the n-th of the watched system calls, and with `stuck` all that follow."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, code: int, *, stuck: bool) -> None:
        self.left, self.code, self.stuck = number, code, stuck
        self.hit = False
        for name in WATCHED[code]:
            patch.setattr(os, name, self._watch(getattr(os, name)))

    def _watch(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if real.__name__ == "open" and not args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                return real(*args, **named)
            self.left -= 1
            if self.left == 0 or (self.left < 0 and self.stuck):
                self.hit = True
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **named)

        return call


def requests(line: Line) -> Iterator[tuple[Callable[[], object], int, int, bytes | None]]:
    """What is done while something fails: (request, extent, new content), with every way to append a record."""
    for number in range(3):
        data = bytes([16 + number]) * (2 * BLOCK)
        yield lambda d=data, n=number: line.write(n * BLOCK, d), number * BLOCK, 2 * BLOCK, data  # type: ignore[misc]
    yield lambda: line.write(100, b"unaligned"), 100, 9, b"unaligned"
    yield lambda: line.zero(8 * BLOCK, 4 * BLOCK), 8 * BLOCK, 4 * BLOCK, bytes(4 * BLOCK)
    yield lambda: line.mark(f"mark-{line.last_seq}"), 0, 0, b""
    yield lambda: bool(line.writer.cut()), 0, 0, b""
    yield line.disconnect, 0, 0, b""
    for number in range(9):
        data = bytes([32 + number]) * BLOCK
        yield lambda d=data, n=number: line.write((20 + n) * BLOCK, d), (20 + number) * BLOCK, BLOCK, data  # type: ignore[misc]
    yield line.writer.commit, 0, 0, b""


def content(line: Line) -> bytes:
    with line.view(line.writer.last_seq) as view:
        return view.read(0, line.model.size)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("stuck", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_whatever_system_call_fails_nothing_acknowledged_is_lost(code: int, stuck: bool) -> None:
    """EIO breaks the writer until it is opened anew. Without space requests are refused, and go on when there is some."""
    number, hit = 0, True
    while hit:
        number += 1
        with scratch() as path:
            world = World(path)
            line = history(world, 64 * BLOCK)
            hit = fail_once(line, number, code, stuck=stuck)
            world.close()
    assert number > 20


def fail_once(line: Line, number: int, code: int, *, stuck: bool) -> bool:
    expected = bytearray(content(line))
    doubt: list[tuple[int, bytes]] = []
    refused = NoSpaceError if code == errno.ENOSPC else BrokenError
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, number, code, stuck=stuck)
        for request, offset, length, data in requests(line):
            try:
                request()
            except refused:
                # Refused, so it may have happened, or a part of it, or nothing.
                doubt.append((offset, data or b""))
                continue
            expected[offset : offset + length] = data or b""
            doubt = [
                (at, old) for at, old in doubt if not (offset <= at and at + len(old) <= offset + length)
            ]
    assert bool(line.disk.broken) == (fault.hit and code == errno.EIO)
    if line.disk.broken:
        line.close(clean=False)
        line.open()
    assert equals_but(content(line), bytes(expected), doubt)
    line.write(0, b"afterwards" * 512)
    if number % 2:
        line.writer.cut()
    else:
        line.mark("afterwards")
    check_numbers(line)
    return fault.hit


def check_numbers(line: Line) -> None:
    """The files are whole; every cut ends its interval and is found."""
    records = read_log(line.directory)
    journal = Journal(line.directory)
    cuts = [(i, r) for i, r in enumerate(records) if r.message.get("type") == "cut"]
    assert [r.message["number"] for _, r in cuts] == list(range(len(cuts)))
    for index, r in cuts:
        following = records[index + 1] if index + 1 < len(records) else None
        assert following is None or following.interval > r.interval
        if following is not None:
            found = find_cut(journal, r.message["number"])
            assert found is not None and found.seq == r.seq
    journal.close()


def test_a_broken_writer_refuses_until_it_is_opened_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fdatasync the kernel may have dropped pages: nothing is acknowledged any more."""
    line = history(world)
    line.write(0, b"1" * BLOCK)
    with monkeypatch.context() as patch:
        Fault(patch, 1, errno.EIO, stuck=False)
        with pytest.raises(BrokenError):
            line.writer.commit()
    with pytest.raises(BrokenError):
        line.write(0, b"2" * BLOCK)
    with pytest.raises(BrokenError):
        line.zero(0, BLOCK)
    with pytest.raises(BrokenError):
        line.writer.commit()
    line.close(clean=False)
    line.open()
    line.check(line.last_seq)
    line.write(0, b"3" * BLOCK)
    line.check(line.last_seq)


@pytest.mark.parametrize("lost", [False, True])
def test_a_session_that_found_no_space_begins_with_the_next_write(
    world: World, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Else a mirror that lost writes would go on in the old session, whose points are `crash`."""
    line = history(world)
    line.write(0, b"0" * BLOCK)
    if lost:
        line.connection(1).write(memoryview(b"1" * BLOCK), 0)
        line.synced()
    with monkeypatch.context() as patch:
        Fault(patch, 1, errno.ENOSPC, stuck=True)
        if lost:
            line.connections.pop(1).close()
        else:
            with pytest.raises(NoSpaceError):
                line.connection(1).write(memoryview(b"2" * BLOCK), 0)
    line.write(0, b"3" * BLOCK, number=0 if lost else 1)
    assert grade(line) == Grade.UNORDERED.label


def test_a_clean_end_leaves_no_gap_whatever_it_left_to_seal(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit's own record may be the one that opens a segment."""
    for records in range(3, 20):
        monkeypatch.setattr(segment, "SEGMENT_RECORDS", records)
        line = world.add(MIB)
        line.synced()
        for number in range(8):
            line.write(number * BLOCK, b"x" * BLOCK)
            line.writer.commit()
    world.reboot(clean=True)
    for line in world.lines:
        assert line.writer.recovered is None
        assert all(r.message.get("type") != "gap" for r in read_log(line.directory))
        assert line.last_seq < limits.SEQ_JUMP
        line.check(line.last_seq)
    world.reboot(clean=False)
    assert all(line.writer.recovered is not None for line in world.lines)


@pytest.mark.parametrize("clean", [False, True])
def test_a_boot_without_a_write_is_remembered(world: World, clean: bool) -> None:
    """Killed right after a clean boot: there is nothing that could be missing."""
    line = history(world)
    world.reboot(clean=True)
    line.close(clean=clean)
    line.open()
    assert line.writer.recovered is None
    line.write(0, b"x" * BLOCK)
    world.reboot(clean=False)
    assert line.writer.recovered is not None
    check_log(line)


# --- first copy


def test_without_holes_in_files_zeros_are_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(firstcopy, "punch_hole", refuse)
    line = world.add(3 * MIB)
    line.write(0, b"x" * (3 * MIB))
    line.zero(100, 2 * MIB)
    line.synced()
    line.check(line.last_seq)


def test_the_base_is_read_only_after_the_switch(world: World) -> None:
    line = history(world)
    assert (line.directory / "base.raw").stat().st_mode & 0o777 == 0o400
    assert (line.directory / "base.synced").exists()
    assert not (line.directory / "first-copy.json").exists()


def test_same_records_name_a_seq_that_is_not_same_itself(world: World) -> None:
    """So that resolving takes one step, however often the disk is mirrored again."""
    line = history(world, 64 * BLOCK)
    line.write(0, random.Random(1).randbytes(64 * BLOCK))
    for _ in range(4):
        line.disconnect()
        held = line.model.read(line.model.latest, 0, 64 * BLOCK)
        line.zero(0, 64 * BLOCK)
        line.write(0, held)
        line.synced()
    records = read_log(line.directory)
    own = {r.seq: r.kind for r in records}
    refs = [r.place for r in records if r.kind == SAME]
    assert len(refs) >= 4
    with line.view(line.last_seq) as view:
        for ref in set(refs):
            assert ref == 0 or own[ref] != SAME
            assert all(value >> 61 != SAME for _, (_, _, _, value) in view.at(ref).pieces(0, 64))


def test_readers_in_use_stay_open_however_many(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal keeps a few open for later; who holds others goes on with them. They are closed when nobody does."""
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 4)
    line = world.add(1 << 20)
    line.write(0, b"base" * 1024)
    line.synced()
    for number in range(4 * (CACHED_READERS + 10)):
        line.write(0, bytes([number % 255 + 1]) * BLOCK)
    before = len(os.listdir("/proc/self/fd"))
    journal = Journal(line.directory)
    readers = [journal.reader(*place) for place in journal.places()]
    assert len(readers) > CACHED_READERS
    assert sum(reader.count for reader in readers) == line.last_seq
    assert [reader.records(0, 1)["seq"][0] for reader in readers] == [reader.first_seq for reader in readers]
    journal.close()
    readers.clear()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("reboot", [False, True])
def test_what_many_unsealed_segments_hold_is_taken_over(
    world: World, monkeypatch: pytest.MonkeyPatch, reboot: bool
) -> None:
    """A store's disk that hangs keeps segments from being sealed, while writes go on to new ones."""
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 4)
    line = world.add(1 << 20)
    line.write(0, b"base" * 1024)
    line.synced()
    for number in range(4 * (CACHED_READERS + 10)):
        line.write(number % 200 * BLOCK, bytes([number % 255 + 1]) * BLOCK)
    last = line.last_seq
    journal = Journal(line.directory)
    assert sum(journal.reader(*place).state != SEALED for place in journal.places()) > CACHED_READERS
    journal.close()
    if reboot:
        world.reboot(clean=False)
    else:
        line.close(clean=False)
        line.open()
    assert line.last_seq >= last
    line.check(last)


def test_a_long_interval_with_a_resync_is_weighed_for_retention(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 4)
    line = world.add(1 << 20)
    line.write(0, b"base" * 1024)
    line.synced()
    line.disconnect()
    for number in range(4 * (CACHED_READERS + 10)):
        line.write(number % 200 * BLOCK, bytes([number % 255 + 1]) * BLOCK)
    line.synced()
    journal = Journal(line.directory)
    found = list(_intervals(journal, (), references=True))
    assert found[-1].last_seq == line.last_seq
    journal.close()
