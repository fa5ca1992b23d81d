"""Views: the algebra that they are made of, what they cost, and how they stand what happens to a journal meanwhile."""

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import limits
from cdpserver.errors import CorruptError, RemovedError
from cdpserver.index.build import catch_up
from cdpserver.index.pieces import KIND_BITS, LEVEL_BITS, SHIFTS, record_pieces, split
from cdpserver.index.store import CLOSED_NAME, IndexFile, Snapshot
from cdpserver.journal import segment
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.record import Kind
from cdpserver.nodes import note_path
from cdpserver.view import live as live_module
from cdpserver.view import view as view_module
from cdpserver.view.delta import subtract, union
from cdpserver.view.extent import Extent, coalesce
from cdpserver.view.history import History
from cdpserver.view.layers import NOTHING, Layer, Piece, advance, lay
from cdpserver.view.tail import Tail
from cdpserver.view.view import View
from tests.core import INDEXER, Line, World, check_view, path_of
from tests.islands import publish
from tests.model import BLOCK

MIB = 1 << 20


def history(world: World, size: int = MIB) -> Line:
    line = world.add(size)
    line.write(0, b"base" * 1024)
    line.synced()
    return line


def opened(line: Line, seq: int) -> View:
    return View(History(line.world.state.path, line.timeline, line.world.boot), seq)


def closed(view: View) -> None:
    view.close()
    view.history.close()


# --- the algebra

blocks = st.integers(0, 3 << 18)


@given(blocks, st.integers(1, 3 << 18))
def test_an_extent_is_few_aligned_pieces(first: int, count: int) -> None:
    """They cover it exactly; a terabyte of zeros is about a thousand entries."""
    at = first
    found = split(first, first + count)
    for unit, start in found:
        shift = SHIFTS[unit >> LEVEL_BITS]
        assert start == at
        assert start >> shift == unit & (1 << LEVEL_BITS) - 1
        assert start % (1 << shift) == 0
        at = start + (1 << shift)
    assert at == first + count
    assert len(found) <= 2 * (15 + 15 + 31 + 31) + (count >> SHIFTS[-1])


def test_a_terabyte_is_a_thousand_pieces() -> None:
    assert len(split(0, limits.MAX_EXTENT // BLOCK)) == 1024


@given(
    blocks, st.integers(1, 5000), st.integers(0, 1 << 20), st.sampled_from((Kind.DATA, Kind.SAME, Kind.ZERO))
)
def test_every_block_of_a_record_has_its_place(first: int, count: int, place: int, kind: Kind) -> None:
    for unit, value in record_pieces(kind, first, count, 7, place * BLOCK if kind is Kind.DATA else place):
        start = (unit & (1 << LEVEL_BITS) - 1) << SHIFTS[unit >> LEVEL_BITS]
        assert value >> KIND_BITS == kind
        rest = value & (1 << KIND_BITS) - 1
        expected = {Kind.DATA: 7 << 32 | place + start - first, Kind.SAME: place}.get(kind, 0)
        assert rest == expected


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12).map(
    lambda pairs: [(start, start + length) for start, length in pairs]
)


def points_of(ranges: Any) -> set[int]:
    return {at for start, end in np.asarray(ranges).reshape(-1, 2).tolist() for at in range(start, end)}


def as_ranges(pairs: list[tuple[int, int]]) -> Any:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


@given(intervals, intervals)
def test_ranges_are_sets(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    ours, theirs = union(as_ranges(left)), union(as_ranges(right))
    assert points_of(ours) == points_of(left)
    flat = ours.flatten().tolist()
    assert flat == sorted(set(flat)), "disjoint, ascending, not even adjoining"
    assert points_of(subtract(ours, theirs)) == points_of(left) - points_of(right)


extent_lists = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from((None, "a", "b")), st.integers(0, 3)), max_size=15
)


@given(extent_lists)
def test_coalescing_changes_no_byte(parts: list[tuple[int, str | None, int]]) -> None:
    extents: list[Extent] = []
    at = 0
    for length, path, place in parts:
        extents.append((at, at + length, path, place))
        at += length

    def told(found: list[Extent]) -> list[tuple[int, str | None, int]]:
        return [(b, p, place + b - s if p else 0) for s, e, p, place in found for b in range(s, e)]

    merged = coalesce(extents)
    assert told(merged) == told(extents)
    assert coalesce(merged) == merged


@st.composite
def layings(draw: st.DrawFn) -> tuple[list[Piece], list[Piece]]:
    """A range covered without holes, and disjoint pieces in ascending order."""
    under: list[Piece] = []
    at = 0
    for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=6)):
        under.append(
            (
                at,
                at + length,
                draw(st.integers(NOTHING, 9)),
                Kind.DATA << KIND_BITS | draw(st.integers(0, 50)),
            )
        )
        at += length
    pieces: list[Piece] = []
    start = draw(st.integers(-4, 3))
    while start < at + 3:
        end = start + draw(st.integers(1, 8))
        if end > 0 and draw(st.booleans()):
            pieces.append(
                (start, end, draw(st.integers(0, 9)), Kind.DATA << KIND_BITS | draw(st.integers(0, 50)))
            )
        start = end
    return under, pieces


@given(layings())
def test_laying_levels_over_each_other_paints_the_newer(case: tuple[list[Piece], list[Piece]]) -> None:
    under, pieces = case

    def told(found: list[Piece]) -> list[tuple[int, int, int]]:
        return [
            (b, seq, advance(value, b - start)) for start, end, seq, value in found for b in range(start, end)
        ]

    painted = {block: (seq, value) for block, seq, value in told(under)}
    for block, seq, value in told(pieces):
        if block in painted and seq >= painted[block][0]:
            painted[block] = (seq, value)
    assert told(lay(under, pieces)) == [(block, *painted[block]) for block in sorted(painted)]


# --- the index and the tail answer alike


def test_the_index_and_the_tail_answer_like_a_list(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question of a snapshot, against brute force; the tail holds the same as a fresh index."""
    monkeypatch.setattr(live_module, "TAIL_REBUILD", 4)
    line = history(world, 40 * MIB + 512)
    dice = random.Random(5)
    for _ in range(150):
        at = min(
            40 * MIB, dice.choice((0, 64 << 10, 4 * MIB, 40 * MIB - 9 * BLOCK)) + dice.randrange(20) * BLOCK
        )
        if dice.random() < 0.7:
            line.write(
                at, b"x" * min(dice.choice((BLOCK, BLOCK, 3 * BLOCK, 20 * BLOCK)), line.model.size - at)
            )
        else:
            line.zero(at, min(dice.choice((BLOCK, MIB, 12 * MIB)), line.model.size - at))
    journal = Journal(line.directory)
    index = IndexFile(line.directory / "scratch.mdb", writable=True)
    while catch_up(journal, 1, index, batch=37):
        pass
    entries: list[tuple[int, int, int]] = []
    tail = Tail(0)
    for run in journal.runs(0, line.last_seq):
        tail.add(run)
        for r in run.records:
            if int(r["kind"]) in (Kind.DATA, Kind.ZERO, Kind.TRIM):
                blocks = -(-int(r["length"]) // 8)
                for unit, value in record_pieces(
                    int(r["kind"]), int(r["offset"]) >> 12, blocks, 1, int(r["place"])
                ):
                    entries.append((unit, int(r["seq"]), value))
    snapshot = Snapshot(index)
    for seq in (1, 20, 90, line.last_seq):
        newest = {unit: (s, value) for unit, s, value in sorted(entries) if s <= seq}
        for level in range(len(SHIFTS)):
            top = level << LEVEL_BITS
            here = sorted(
                (unit - top, *found) for unit, found in newest.items() if unit >> LEVEL_BITS == level
            )
            for first, end in ((0, 1 << 30), (3, 9), (1020, 1030), (5, 6)):
                expected = [row for row in here if first <= row[0] < end]
                assert snapshot.pieces(level, first, end, seq) == expected
                if seq == line.last_seq:
                    assert tail.pieces(level, first, end) == expected
            for block in {row[0] + more for row in here[:50] for more in (0, 1)}:
                assert snapshot.newest(top | block, seq) == newest.get(top | block)
    assert snapshot.newest(5 << LEVEL_BITS, 1 << 40) is None
    snapshot.close()
    index.env.close()
    journal.close()


# --- what happens to a journal while a view is open


def several_intervals(world: World) -> Line:
    line = history(world)
    for number in range(6):
        for at in range(8):
            line.write((at + 8 * number) * BLOCK, bytes([16 * number + at + 1]) * BLOCK)
        line.write(0, bytes([200 + number]) * BLOCK)
        line.cut()
    return line


@pytest.mark.parametrize("indexed", [False, True])
def test_an_open_view_outlives_indexing_and_rebuilding(world: World, indexed: bool) -> None:
    line = several_intervals(world)
    if indexed:
        INDEXER.call("drain", line.directory, world.boot)
    views = [(seq, opened(line, seq)) for seq in line.model.instants[::7]]
    for op in ("step", "drain", "rebuild", "drain"):
        for seq, view in views:
            check_view(view, line.model, seq)
        INDEXER.call(op, line.directory, world.boot, batch=5)
        line.write(3 * BLOCK, b"later" * 100)
    for seq, view in views:
        check_view(view, line.model, seq)
        closed(view)


@pytest.mark.parametrize("left", range(7))
def test_a_rebuild_under_way_hides_nothing(world: World, left: int) -> None:
    """A view that is open, but hasn't looked at older intervals yet, finds their indexes gone when it does."""
    line = several_intervals(world)
    INDEXER.call("drain", line.directory, world.boot)
    view = opened(line, line.last_seq)
    assert view.read(BLOCK * 100, 10)  # falls through to nothing of the older intervals' content
    others = [opened(line, seq) for seq in line.model.instants[::9]]
    INDEXER.call("close", line.directory, world.boot)
    for interval in range(left + 1, 8):
        for path in interval_path(line.directory, interval).glob("*.mdb*"):
            path.unlink()
    for other in [view, *others]:
        check_view(other, line.model, other.seq)
        closed(other)
    for seq in line.model.instants[::9]:
        line.check(seq)
    INDEXER.call("rebuild", line.directory, world.boot)
    line.check(line.last_seq)


def test_a_live_view_follows_the_index(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tail doesn't grow for ever: it drops what the index holds, and goes along with new intervals."""
    monkeypatch.setattr(live_module, "TAIL_REBUILD", 10)
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 16)
    monkeypatch.setattr(limits, "INTERVAL_SEGMENTS", 3)
    line = history(world)
    for number in range(120):
        line.write(number % 50 * BLOCK, bytes([number + 1]) * BLOCK)
        line.check_live(0, 60 * BLOCK)
        if number % 5 == 0:
            INDEXER.call("drain", line.directory, world.boot)
            assert line.disk.reads is not None
            newest = line.disk.reads._view._layers[0]
            assert isinstance(newest, Layer)
            tail = newest.tail
            assert tail is None or len(tail) < 60


def test_a_view_is_a_lease(world: World) -> None:
    """A removal takes the lease exclusive: not while somebody reads, and nobody opens it afterwards."""
    import fcntl

    line = history(world)
    view = opened(line, line.last_seq)
    with open(line.directory / "lease") as lease:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        closed(view)
        line.close(clean=True)
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(RemovedError):
            opened(line, 1)
    (line.directory / "lease").unlink()
    with pytest.raises(CorruptError, match="restart cdpserver"):
        opened(line, 1)
    (line.directory / "timeline.json").unlink()
    with pytest.raises(RemovedError):
        opened(line, 1)


# --- damage


@pytest.mark.parametrize("how", ["cut", "gone", "base gone"])
def test_missing_payload_is_corrupt_and_never_zeros(world: World, how: str) -> None:
    line = history(world)
    line.write(BLOCK, b"y" * (4 * BLOCK))
    data = line.directory / "intervals/000001/00000001.data"
    if how == "cut":
        os.truncate(data, data.stat().st_size - 2 * BLOCK)
    else:
        (data if how == "gone" else line.directory / "base.raw").unlink()
    with line.view(line.last_seq) as view:
        if how == "cut":
            assert view.read(BLOCK, 2 * BLOCK) == b"y" * (2 * BLOCK)
        with pytest.raises(CorruptError):
            view.read(0 if how == "base gone" else 4 * BLOCK, BLOCK)


def test_a_same_record_that_refers_forward_is_corrupt(world: World) -> None:
    line = history(world)
    with line.view(2) as view, pytest.raises(CorruptError, match="forward"):
        view.at(3)


# --- what it costs


@pytest.mark.parametrize("seq_of", [lambda last: last, lambda last: last // 2, lambda last: 5])
def test_opening_does_not_depend_on_the_length_of_the_journal(
    world: World, monkeypatch: pytest.MonkeyPatch, seq_of: Callable[[int], int]
) -> None:
    """Counted in files opened and records read, at ten times the history."""
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 16)
    monkeypatch.setattr(limits, "INTERVAL_SEGMENTS", 4)
    line = history(world)
    costs = []
    for number in range(1600):
        line.write(number % 100 * BLOCK, bytes([number % 251 + 1]) * BLOCK)
        if number in (159, 1599):
            INDEXER.call("drain", line.directory, world.boot)
            costs.append(cost_of_opening(line, seq_of(line.last_seq), monkeypatch))
    few, many = costs
    assert many[0] <= few[0] + 16, "files opened: a bisection over ten times the intervals costs a few more"
    assert many[1] <= few[1] + 16, "records read"


def cost_of_opening(line: Line, seq: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    counted = {"files": 0, "records": 0}
    real_open, real_records = os.open, segment.SegmentReader.records

    def count_open(path: Any, flags: int, *args: Any, **named: Any) -> int:
        counted["files"] += 1
        return real_open(path, flags, *args, **named)

    def count_records(self: segment.SegmentReader, first: int, end: int) -> Any:
        counted["records"] += end - first
        return real_records(self, first, end)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", count_open)
        patch.setattr(segment.SegmentReader, "records", count_records)
        view = opened(line, seq)
        view.read(0, BLOCK)
        closed(view)
    return counted["files"], counted["records"]


def test_status_of_a_huge_sparse_disk_is_few_runs(world: World) -> None:
    """REQ_ONE answers with the first run, whatever the size; the whole disk in one go merges neighbours."""
    line = world.add(1 << 40)
    line.synced()
    line.zero(0, 1 << 40)
    line.write(1 << 39, b"x" * BLOCK)
    for drained in (False, True):
        if drained:
            INDEXER.call("drain", line.directory, world.boot)
        with line.view(line.last_seq) as view:
            assert view.status(0, 1 << 40, one=True) == [(0, 1 << 39, True)]
            assert view.status(1 << 39, 1 << 40, one=True)[0] == (1 << 39, (1 << 39) + BLOCK, False)
            assert [zero for _, _, zero in view.status(0, 1 << 40, one=False)] == [True, False, True]
            assert path_of(view) == ("open" if drained else "tail")


def test_an_image_that_is_smaller_than_the_disk_ends_with_zeros(world: World) -> None:
    line = world.add(MIB, image=b"i" * 5120)
    line.check(line.last_seq)
    line.write(4096, b"w" * 512)
    line.check(line.last_seq)
    assert (world.state.bases / "b1.raw").read_bytes() == b"i" * 5120


def test_closed_indexes_are_dense_and_read_only_files(world: World) -> None:
    line = several_intervals(world)
    INDEXER.call("drain", line.directory, world.boot)
    for interval in range(1, 7):
        files = {path.name for path in interval_path(line.directory, interval).iterdir()}
        assert CLOSED_NAME in files
        assert not [name for name in files if name.startswith(("open-", ".tmp-"))]


def test_block_status_of_what_was_written_in_small_pieces_is_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer looks at so many extents, however few runs they come to; the next goes on from there."""
    line = history(world, 16 * MIB)
    for block in range(16 * MIB // BLOCK - 1, -1, -1):
        line.connection().write(memoryview(b"x" * BLOCK), block * BLOCK)
    monkeypatch.setattr(view_module, "STATUS_EXTENTS", 1000)
    monkeypatch.setattr(view_module, "STATUS_WINDOW", MIB)
    view = opened(line, line.writer.last_seq)
    for one in (False, True):
        at, answers = 0, 0
        while at < view.size:
            ((start, end, zero),) = view.status(at, view.size, one=one)
            assert start == at and end - start <= 1000 * BLOCK + MIB and not zero
            at, answers = end, answers + 1
        assert answers == 4
    closed(view)


@pytest.mark.parametrize("how", ["gone", "cut", "replaced", "note gone"])
def test_what_happens_to_base_points_is_nothing_to_a_view_that_the_journal_covers(
    world: World, how: str
) -> None:
    """Nothing is read from them while the intervals are there, also of an open view."""
    line = several_intervals(world)
    INDEXER.call("drain", line.directory, world.boot)
    paths = [publish(line, number) for number in range(6)]
    views = [opened(line, seq) for seq in line.model.instants[::6]]
    for number, path in enumerate(paths):
        if how == "note gone":
            note_path(line.directory, number).unlink()
            continue
        path.unlink()
        if how != "gone":
            path.write_bytes(b"QFI\xfb" if how == "cut" else bytes(1 << 20))
    for view in views:
        check_view(view, line.model, view.seq)
        closed(view)
    for seq in line.model.instants[::6]:
        line.check(seq)
