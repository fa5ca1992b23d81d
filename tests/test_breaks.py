"""Gaps that a controller knows of: writes of the guest that were never received, on record in the journal."""

import errno
from collections.abc import Iterator

import pytest

from cdpserver.errors import NoSpaceError, NotFoundError, RefusedError, RemovedError, UsageError
from cdpserver.journal import control
from cdpserver.journal.control import Grade
from cdpserver.names import At, MirrorExport, Seq
from cdpserver.stretches import grade_at, stretches
from tests.core import INDEXER, SECOND_NS, Line, World, scratch
from tests.test_journal import Fault

BLOCK = 4096
MS = 10**6


@pytest.fixture
def line() -> Iterator[Line]:
    """A disk in sync, with a write a second ago."""
    with scratch() as path:
        world = World(path)
        line = world.add(1 << 20)
        line.write(0, b"a" * BLOCK)
        line.synced()
        world.now_ns += SECOND_NS
        line.write(0, b"b" * BLOCK)
        world.now_ns += SECOND_NS
        yield line
        world.close()


def lose(line: Line, *, ago_ns: int | None = None) -> None:
    """QEMU was seen in sync, and now its job stands."""
    whole_ns = None if ago_ns is None else line.world.now_ns - ago_ns
    line.disk.lost(1, "test", whole_ns=whole_ns, freed_ns=None)


def offered(line: Line, *times_ns: int) -> list[Grade | None]:
    """The grade of each instant, by the list of stretches and by opening it: they agree."""
    now_ns = line.world.now_ns
    found: list[Grade | None] = []
    with line.points() as points:
        listed = stretches(points, now_ns=now_ns)
        for time_ns in times_ns:
            try:
                grade = points.journal.state_at(points.resolve(At(time_ns), now_ns=now_ns).seq).grade
            except UsageError:
                grade = None
            assert grade == grade_at(listed, time_ns)
            found.append(grade)
    return found


def gap(line: Line) -> dict[str, object]:
    (fields,) = [fields for name, fields in line.world.events if name == "disk.gap"]
    return fields


def test_a_gap_is_open_until_the_next_first_write(line: Line) -> None:
    world = line.world
    last_ns = line.writer.last_time_ns
    broke_ns = world.now_ns
    world.now_ns += MS
    line.disconnect()
    world.now_ns += 99 * MS
    lose(line, ago_ns=100 * MS)
    lose(line, ago_ns=100 * MS)  # said again: it is known
    assert gap(line)["from_ns"] == broke_ns and gap(line)["until_ns"] is None
    world.now_ns += SECOND_NS
    inside = (broke_ns + 1, broke_ns + 100 * MS, world.now_ns)
    assert offered(line, last_ns, broke_ns, *inside) == [Grade.CRASH, Grade.CRASH, None, None, None]
    with pytest.raises(RefusedError, match="inside a gap"):
        line.disk.marker("bookmark")
    world.now_ns += SECOND_NS
    line.write(BLOCK, b"c" * BLOCK)
    began_ns = world.now_ns
    world.now_ns += 10 * MS
    line.synced()
    world.now_ns += 10 * MS
    assert offered(line, broke_ns, *inside, began_ns - 1, began_ns, world.now_ns) == [
        Grade.CRASH, None, None, None, None, Grade.UNORDERED, Grade.CRASH,
    ]  # fmt: skip
    line.disk.marker("bookmark").mark(control.mark("after"))


def test_what_came_in_late_is_no_point(line: Line) -> None:
    """A target that hung goes on and takes what lay in its socket, before anybody tells it that the guest went on without it."""
    world = line.world
    before_ns = line.writer.last_time_ns
    world.now_ns += 100 * MS
    line.write(0, b"c" * BLOCK)
    seq = line.writer.last_seq
    line.disk.marker("bookmark").mark(control.mark("then"))
    world.now_ns += 100 * MS
    line.disk.lost(1, "test", whole_ns=world.now_ns - SECOND_NS, freed_ns=world.now_ns - 150 * MS)
    world.now_ns += 2 * SECOND_NS
    with line.points() as points:
        listed = points.points(now_ns=world.now_ns)
        assert [p.grade for p in listed if p.name == "then"] == [Grade.UNORDERED]
        assert all(p.time_ns <= before_ns for p in listed if p.kind == "rp")
        for upto_ns in (before_ns, world.now_ns):
            assert points.points(now_ns=world.now_ns, until_ns=upto_ns, kind="rp"), "the one before stays"
        assert points.grade_at(points.resolve(Seq(seq), now_ns=world.now_ns)) is Grade.UNORDERED
        assert points.grade_at(points.resolve(At(before_ns), now_ns=world.now_ns)) is Grade.CRASH
    INDEXER.call("drain", line.directory, world.boot)
    with line.points() as points:
        assert points.points(now_ns=world.now_ns) == listed


def test_a_gap_that_is_over_when_it_is_said(line: Line) -> None:
    """The mirror was back before its controller came to say what it had seen."""
    world = line.world
    broke_ns = world.now_ns
    world.now_ns += SECOND_NS // 2
    line.disconnect()  # QEMU had ended its job before
    world.now_ns += SECOND_NS // 2
    line.write(BLOCK, b"c" * BLOCK)
    began_ns = world.now_ns
    world.now_ns += SECOND_NS
    lose(line, ago_ns=2 * SECOND_NS)
    assert (gap(line)["from_ns"], gap(line)["until_ns"]) == (broke_ns, began_ns)
    world.now_ns += SECOND_NS
    times = (broke_ns, broke_ns + 1, began_ns - 1, began_ns, world.now_ns)
    expected = [Grade.CRASH, None, None, Grade.UNORDERED, Grade.UNORDERED]
    assert offered(line, *times) == expected
    INDEXER.call("drain", line.directory, world.boot)
    assert offered(line, *times) == expected


def test_a_killed_target_says_nothing_of_its_connections(line: Line) -> None:
    world = line.world
    last_ns = line.writer.last_time_ns - SECOND_NS
    line.close(clean=False)
    line.open()
    world.now_ns += SECOND_NS
    lose(line, ago_ns=None)
    assert last_ns <= gap(line)["from_ns"] <= line.writer.last_time_ns - SECOND_NS  # type: ignore[operator]
    assert offered(line, world.now_ns) == [None]


def test_what_was_seen_in_sync_bounds_the_gap(line: Line) -> None:
    """A network that is cut: the target sees no connection end, and its last record may be old."""
    world = line.world
    world.now_ns += 60 * SECOND_NS
    lose(line, ago_ns=SECOND_NS // 2)
    seen_ns = world.now_ns - SECOND_NS // 2
    assert gap(line)["from_ns"] == seen_ns
    assert offered(line, seen_ns, seen_ns + 1) == [Grade.CRASH, None]
    assert line.writer.state.session == 2  # so that nobody's older word of being in sync counts
    line.write(BLOCK, b"c" * BLOCK)  # over the same connection, if it was no more than a store that was full
    assert not line.writer.state.gap_open and line.writer.state.session == 3


def test_what_was_on_its_way_when_the_target_hung_is_no_point_of_when_it_came(line: Line) -> None:
    """The guest was let go on at `freed_ns`; a second later the target goes on too, with the write that had hung."""
    world = line.world
    freed_ns = world.now_ns
    world.now_ns += SECOND_NS
    line.write(0, b"l" * BLOCK)
    late_ns = world.now_ns
    world.now_ns += MS
    line.disconnect()
    world.now_ns += MS
    line.disk.lost(1, "test", whole_ns=freed_ns - SECOND_NS // 2, freed_ns=freed_ns)
    assert gap(line)["from_ns"] == freed_ns
    assert offered(line, freed_ns, freed_ns + 1, late_ns, world.now_ns) == [Grade.CRASH, None, None, None]


def refuse(line: Line, monkeypatch: pytest.MonkeyPatch, *, full: bool) -> None:
    """A write of the guest finds no room: on the store, or for the disk's cap, where there is some for a control record."""
    line.disk.full = "" if full else "at its cap"
    with monkeypatch.context() as patch:
        if full:
            Fault(patch, 1, errno.ENOSPC, stuck=True)
        with pytest.raises(NoSpaceError):
            line.write(BLOCK, b"r" * BLOCK)
    line.disk.full = ""


@pytest.mark.parametrize("full", [False, True])
def test_what_comes_after_a_write_that_was_refused_is_no_point(
    line: Line, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """QEMU marks the place, its guest goes on without, and what that writes next, over the same connection, may find room."""
    world = line.world
    last_ns, seen_ns = line.writer.last_time_ns, world.now_ns
    world.now_ns += MS
    refuse(line, monkeypatch, full=full)
    assert line.writer.state.synced == full, "if there is room to say so, it is said at once"
    world.now_ns += SECOND_NS
    line.write(2 * BLOCK, b"d" * BLOCK)
    began_ns = world.now_ns
    world.now_ns += SECOND_NS // 3
    line.write(3 * BLOCK, b"e" * BLOCK)
    lose(line, ago_ns=world.now_ns - seen_ns)  # its controller, too, found no room to say so earlier
    assert (gap(line)["from_ns"], gap(line)["until_ns"]) == (seen_ns, began_ns)
    world.now_ns += SECOND_NS
    times = (last_ns, seen_ns, seen_ns + 1, began_ns - 1, began_ns, world.now_ns)
    assert offered(line, *times) == [Grade.CRASH, Grade.CRASH, None, None, Grade.UNORDERED, Grade.UNORDERED]
    with line.points() as points:
        grades = [point.grade for point in points.points(now_ns=world.now_ns, kind="rp")]
    assert grades == [Grade.CRASH, Grade.UNORDERED]
    line.synced()
    line.write(0, b"f" * BLOCK)
    assert line.writer.state.synced, "one refusal ends one session"


def test_what_comes_after_a_write_that_was_refused_on_its_way_is_no_point(line: Line) -> None:
    """Whatever stands between QEMU and the target: no connection ended, the target knows of nothing, and the next write came."""
    world = line.world
    seen_ns = world.now_ns
    world.now_ns += 100 * MS  # here one is refused
    refused_ns = world.now_ns
    world.now_ns += 100 * MS
    line.write(2 * BLOCK, b"d" * BLOCK)
    later_ns = world.now_ns
    world.now_ns += 100 * MS
    line.disk.lost(1, "test", whole_ns=seen_ns, freed_ns=None)
    assert gap(line)["from_ns"] == seen_ns
    assert offered(line, seen_ns, refused_ns, later_ns, world.now_ns) == [Grade.CRASH, None, None, None]


def test_a_write_that_waited_for_room_was_not_refused(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guest has heard of nothing."""
    line.connection().waits = True
    for full in (False, True):
        refuse(line, monkeypatch, full=full)
        line.write(BLOCK, b"r" * BLOCK)
        assert line.writer.state.synced


def test_a_read_that_fails_counts_for_who_writes(line: Line) -> None:
    """QEMU reads around a write that is smaller than a block; if that fails, so does the write, which never comes."""
    beyond = line.disk.size
    with pytest.raises(UsageError):
        line.connection(1).read_into(memoryview(bytearray(BLOCK)), beyond)
    assert line.writer.state.synced, "a reader"
    with pytest.raises(UsageError):
        line.connection().read_into(memoryview(bytearray(BLOCK)), beyond)
    assert not line.writer.state.synced


def test_no_gap_without_being_in_sync(line: Line) -> None:
    line.disk.lost(7, "of another session", whole_ns=None, freed_ns=None)
    line.disconnect()
    line.write(0, b"c" * BLOCK)
    lose(line, ago_ns=0)  # seen in sync up to the first write of the next
    line.synced()
    lose(line)  # said too late
    assert not [name for name, _ in line.world.events if name == "disk.gap"]
    fresh = line.world.add(1 << 20)
    fresh.write(0, b"d" * BLOCK)
    lose(fresh)
    assert fresh.disk.journal is None


def test_a_gap_outlives_the_target_and_its_segment(line: Line) -> None:
    world = line.world
    line.disconnect()
    broke_ns = world.now_ns
    lose(line)
    line.close(clean=True)
    world.boots += 1
    line.open()
    world.now_ns += SECOND_NS
    assert line.writer.state.gap_open
    assert offered(line, broke_ns + 1, world.now_ns) == [None, None]
    lose(line)
    gap(line)


# --- one mirror at a time


def mirror(line: Line, born_ns: int) -> MirrorExport:
    return MirrorExport(line.timeline.full_name, line.timeline.uuid.hex(), born_ns)


def test_what_an_older_mirror_still_sends_is_refused(line: Line) -> None:
    line.disconnect()
    first = line.disk.connect(mirror(line, 1))
    first.write(memoryview(b"1" * BLOCK), 0)
    line.synced()
    session = line.writer.state.session
    second = line.disk.connect(mirror(line, 2))
    assert line.writer.state.session == session + 1 and not line.writer.state.synced
    second.write(memoryview(b"2" * BLOCK), 0)
    for late in (
        first,
        line.disk.connect(mirror(line, 1)),
    ):  # also where it comes anew, by way of another worker
        with pytest.raises(RemovedError, match="another mirror"):
            late.write(memoryview(b"1" * BLOCK), 0)
        with pytest.raises(RemovedError, match="another mirror"):
            late.zero(0, BLOCK)
    line.synced()
    with pytest.raises(RemovedError, match="another mirror"):
        first.write(memoryview(b"1" * BLOCK), 0)
    first.close()
    assert line.writer.state.synced, "neither is news, of a connection that was replaced"
    buffer = bytearray(BLOCK)
    second.read_into(memoryview(buffer), 0)
    assert buffer == b"2" * BLOCK


def test_a_mirror_of_another_timeline_is_refused(line: Line) -> None:
    with pytest.raises(NotFoundError, match="another disk"):
        line.disk.connect(MirrorExport(line.timeline.full_name, "0" * 32, 1))
