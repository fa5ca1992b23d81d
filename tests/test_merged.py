"""Merged indexes: what they hold, how few are left, what a view makes of damaged, old and vanished ones, and what they cost."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import durable
from cdpserver.catalog import Catalog
from cdpserver.check import check_timeline
from cdpserver.config import Config
from cdpserver.errors import CorruptError, NoSpaceError
from cdpserver.index import merged as merged_module
from cdpserver.index import merging
from cdpserver.index.fold import fold
from cdpserver.index.merged import CHUNK_PAGES, ROWS, Merged, Source, Writer, cover, digests, place_of
from cdpserver.index.merging import MOST, choose, interleave, load, merge
from cdpserver.index.pieces import SHIFTS
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal.log import interval_path
from cdpserver.journal.record import Kind
from cdpserver.retention.facts import gather
from cdpserver.retention.usage import by_kind
from cdpserver.view.layers import NOTHING, Layer
from cdpserver.view.span import Span
from cdpserver.view.view import View
from tests.core import INDEXER, ROOT, Line, World, check_view, forget_indexes
from tests.dying import Step, dies_at
from tests.islands import drop, publish
from tests.model import BLOCK
from tests.test_view import closed, opened
from tools.kit.processes import until

MIB, GIB = 1 << 20, 1 << 30


def churn(line: Line, dice: random.Random, requests: int) -> None:
    """Writes and zeros of every size, near each other and around the borders of the greatest pieces."""
    size = line.model.size
    for _ in range(requests):
        near = dice.choice((0, 64 << 10, 4 * MIB, min(GIB, size) - 8 * BLOCK))
        at = min(max(0, near + dice.randrange(-20, 20) * BLOCK), size - BLOCK)
        kind = dice.random()
        if kind < 0.6:
            line.write(at, dice.randbytes(BLOCK))
        elif kind < 0.8:
            data = bytes([dice.randrange(1, 255)]) * dice.choice((64 << 10, 3 * BLOCK, MIB))
            line.write(at, data[: size - at])
        else:
            line.zero(at, min(dice.choice((BLOCK, 64 << 10, MIB, 32 * MIB, GIB)), size - at))


def with_history(world: World, intervals: int, *, size: int = MIB, requests: int = 12) -> Line:
    """A disk with so many closed intervals, all indexed."""
    line = world.add(size)
    line.write(0, b"base" * 1024)
    line.synced()
    dice = random.Random(intervals)
    for _ in range(intervals):
        churn(line, dice, requests)
        line.cut()
    churn(line, dice, 3)
    INDEXER.call("drain", line.directory, world.boot)
    return line


def merged_files(line: Line) -> list[Path]:
    return sorted((line.directory / merged_module.DIRECTORY).glob("[0-9]*"))


def all_merged(line: Line) -> Path:
    """All closed intervals in one file."""
    INDEXER.call("merge", line.directory, line.world.boot)
    (path,) = merged_files(line)
    return path


def none_merged(line: Line) -> None:
    shutil.rmtree(line.directory / merged_module.DIRECTORY)


@contextlib.contextmanager
def view_at(line: Line, seq: int) -> Iterator[View]:
    view = opened(line, seq)
    try:
        yield view
    finally:
        closed(view)


# --- the file


def entries(rows: dict[tuple[int, int], int]) -> tuple[Any, Any]:
    """(place, ordinal) -> value, as the writer takes them."""
    keys = sorted((place << 16 | ordinal, value) for (place, ordinal), value in rows.items())
    return np.array([key for key, _ in keys], np.uint64), np.array([value for _, value in keys], np.uint64)


def written(path: Path, rows: dict[tuple[int, int], int], *, first: int = 1, intervals: int = 9) -> Merged:
    indexes = {first + number: (number, 2, 3) for number in range(intervals)}
    with Writer(path.with_name(".tmp-x"), first) as writer:
        keys, values = entries(rows)
        for at in range(0, len(keys), 100):
            writer.add(keys[at : at + 100], values[at : at + 100])
        writer.publish(path, indexes)
    return Merged(path)


places = st.integers(0, 40) | st.integers(place_of(1 << 20, 0), place_of((1 << 20) + 60, 0))


@given(st.dictionaries(st.tuples(places, st.integers(0, 8)), st.integers(0, (1 << 64) - 1), max_size=700))
def test_a_file_answers_like_a_dictionary(rows: dict[tuple[int, int], int]) -> None:
    path = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp") / f"cdp-merged-{os.getpid()}"
    file = written(path, rows)
    try:
        assert file.whole() and file.entries == len(rows)
        chance = random.Random(len(rows))
        for _ in range(40):
            place, newest = chance.choice([*rows, (41, 0), (0, 0)])[0], chance.randrange(9)
            oldest = chance.randrange(newest + 1)
            held = [(o, v) for (p, o), v in rows.items() if p == place and oldest <= o <= newest]
            assert file.newest(place, oldest, newest) == max(held, default=None, key=lambda found: found[0])
            low, high = sorted((place, chance.choice([*rows, (60, 0)])[0]))
            expected = {
                p: (p, o, v)
                for (p, o), v in sorted(rows.items())
                if low <= p < high and oldest <= o <= newest
            }
            assert file.pieces(low, high, oldest, newest) == list(expected.values())
    finally:
        file.close()
        path.unlink()


def test_a_place_whose_intervals_fill_many_pages_is_one_piece(tmp_path: Path) -> None:
    """Also where what is looked at together ends in the middle of it."""
    count = CHUNK_PAGES * ROWS * 2 // 3
    rows = {(place, ordinal): ordinal for place in (6, 7) for ordinal in range(count)} | {(8, 3): 5}
    file = written(tmp_path / "1-2", rows, intervals=count)
    last = count - 1
    assert file.pieces(0, 100, 0, count) == [(6, last, last), (7, last, last), (8, 3, 5)]
    assert file.pieces(7, 8, 0, 10) == [(7, 10, 10)]
    assert file.newest(7, 0, 1000) == (1000, 1000)
    file.close()


@given(st.lists(st.tuples(st.integers(0, 1 << 50), st.integers(0, 9), st.integers(0, 1 << 63)), max_size=60))
def test_digests_are_sums_of_any_parts(rows: list[tuple[int, int, int]]) -> None:
    found = {(place % (1 << 40), ordinal): value for place, ordinal, value in rows}
    keys, values = entries(found)
    whole = digests(keys, values)
    parts: dict[int, tuple[int, int]] = {}
    for part in (slice(0, None, 2), slice(1, None, 2)):
        merged_module.add_digests(parts, digests(keys[part], values[part]))
    assert parts == whole
    if len(values):
        values = values.copy()
        values[0] ^= np.uint64(1)
        assert digests(keys, values) != whole


@given(st.lists(st.lists(st.integers(0, 300), unique=True), min_size=1, max_size=5), st.integers(1, 7))
def test_streams_are_interleaved(lists: list[list[int]], step: int) -> None:
    streams = []
    for number, held in enumerate(lists):
        keys = np.array(sorted(value * 8 + number for value in held), np.uint64)
        streams.append(
            iter([(keys[at : at + step], keys[at : at + step]) for at in range(0, len(keys), step)])
        )
    found = [key for keys, _ in interleave(streams) for key in keys.tolist()]
    assert found == sorted(value * 8 + number for number, held in enumerate(lists) for value in held)


# --- what is merged


def grown(count: int, size: Callable[[], int]) -> tuple[float, list[int]]:
    """(times that an entry was written, what is left) when intervals come one by one."""
    held: list[int] = []
    total = written = 0
    for _ in range(count):
        held.insert(0, size())
        total += held[0]
        while (chosen := choose(held)) is not None:
            window = held[slice(*chosen)]
            assert len(window) > 1
            written += sum(window)
            held[slice(*chosen)] = [sum(window)]
        assert len(held) <= MOST
    return written / total, held


def test_merging_leaves_few_and_writes_an_entry_a_few_times() -> None:
    chance = random.Random(1)
    for count, most in ((72, 4), (128, 5), (1000, 9)):
        assert grown(count, lambda: 1000)[0] < most
        assert grown(count, lambda: chance.randrange(1, 10_000))[0] < 1.5 * most
    assert choose([]) is choose([1, 2, 3]) is None
    assert choose([0, 0, 0, 0, 0]) is not None


def test_what_intervals_are_read_through(tmp_path: Path) -> None:
    """The file that reaches furthest; where an interval's index is another one by now, that index itself."""
    small = written(tmp_path / "a", {(1, 0): 1, (1, 2): 1}, first=4, intervals=3)
    large = written(tmp_path / "b", {(1, 4): 1, (2, 4): 1}, first=1, intervals=5)
    indexes = {number: small.members[number].index for number in (4, 5, 6)}
    indexes |= {number: large.members[number].index for number in (1, 2, 3)}
    assert cover([7, 6, 5, 4, 3, 2, 1], [small, large], indexes) == [
        Source(7, 7, None, 0),
        Source(4, 6, small, 2),
        Source(1, 3, large, 0),
    ]
    indexes[2] = (9, 9, 9)
    assert cover([3, 2, 1], [small, large], indexes) == [
        Source(3, 3, large, 0),
        Source(2, 2, None, 0),
        Source(1, 1, large, 0),
    ]
    small.close()
    large.close()


def test_what_is_hidden_at_the_end_of_an_interval_is_not_kept(world: World) -> None:
    """Every block of the fold is what the index gives, and of two pieces the smaller holds."""
    line = with_history(world, 3, size=GIB + 2 * MIB, requests=60)
    for interval in (1, 2, 3):
        layer = Layer(interval_path(line.directory, interval), interval, world.boot)
        assert layer._file is not None
        held = {
            int(place): int(value)
            for places, values in fold(layer._file)
            for place, value in zip(places, values, strict=True)
        }
        layer.begin()
        assert layer._snapshot is not None
        assert 0 < len(held) < layer._snapshot.txn.stat(layer._file.pieces)["entries"]
        for block in [*range(2048), *range((1 << 18) - 40, (1 << 18) + 40), (1 << 18) + 511]:
            found = layer.newest(block, 1 << 60)
            mine = next(
                (
                    further(held[place_of(block, level)], block, level)
                    for level in range(len(SHIFTS))
                    if place_of(block, level) in held
                ),
                None,
            )
            assert mine == (found[1] if found is not None else None)
        layer.end()
        layer.close()


def further(value: int, block: int, level: int) -> int:
    return value + (block & (1 << SHIFTS[level]) - 1) if value >> 61 == Kind.DATA else value


# --- views through them


@pytest.mark.parametrize("size", [MIB + 512, GIB + 2 * MIB])
def test_views_through_merged_indexes_are_exact(world: World, size: int) -> None:
    """At every instant alike through one file, several, or none; block by block and in ranges."""
    line = with_history(world, 12, size=size)
    dice = random.Random(size)
    instants = [*dice.sample(line.model.instants, 12), *line.cuts[::3], line.last_seq]
    fallen: list[Any] = []
    for most in (1, 2, 4, 0):
        if most:
            none_merged(line)
            INDEXER.call("merge", line.directory, world.boot, batch=most)
        else:
            none_merged(line)
        for seq in instants:
            line.check(seq)
        with view_at(line, line.last_seq) as view:
            ranges = [(first, first + length) for first in (0, 5, 1000) for length in (1, 3, 200)]
            found = [view.resolve(a * BLOCK, min(b * BLOCK, size)) for a, b in ranges if a * BLOCK < size]
            fallen.append(found)
            blocks = [view.resolve(b * BLOCK, (b + 1) * BLOCK)[0][2:] for b in range(200)]
            fallen[-1].append(blocks)
    assert all(found == fallen[0] for found in fallen)


def test_a_lookup_costs_the_same_however_many_intervals_there_are(world: World) -> None:
    line = world.add(MIB)
    line.write(0, b"base" * 1024)
    line.synced()
    for number in range(240):
        line.write(number * BLOCK, bytes([number + 1]) * BLOCK)
        if number % 6 == 5:
            line.cut()
    INDEXER.call("drain", line.directory, world.boot)
    INDEXER.call("merge", line.directory, world.boot, batch=MOST)
    for number in range(256):
        with view_at(line, line.last_seq) as view:
            view.read(number * BLOCK, BLOCK)
            assert len(view._layers) <= 1 + MOST
    all_merged(line)
    with view_at(line, line.last_seq) as view:
        view.read(0, MIB)
        assert [type(layer) for layer in view._layers] == [Layer, Span]
        assert list(view._layers[1].intervals) == list(range(1, 41))
    with view_at(line, line.cuts[20] + 1) as view:
        view.read(0, MIB)
        assert list(view._layers[1].intervals) == list(range(1, 22)), "a view of the middle, by the same file"


def test_an_index_with_what_is_merged_stays_under_sixty_bytes_a_block(world: World) -> None:
    line = world.add(128 * MIB)
    line.write(0, b"base" * 1024)
    line.synced()
    blocks = list(range(128 * MIB // BLOCK))
    random.Random(1).shuffle(blocks)
    for part in range(2):
        for block in blocks[part::2]:
            line.connection().write(memoryview(b"x" * BLOCK), block * BLOCK)
        line.writer.commit()
        line.writer.cut()
    INDEXER.call("drain", line.directory, world.boot)
    path = all_merged(line)
    assert path.stat().st_size < 17 * len(blocks)
    closed_bytes = sum(file.stat().st_blocks * 512 for file in line.directory.glob("intervals/*/index.mdb"))
    assert (closed_bytes + path.stat().st_size) / len(blocks) < 60


def test_forks_read_their_parent_through_them(world: World) -> None:
    line = with_history(world, 8)
    fork = world.fork(line, line.cuts[5] + 2)
    churn(fork, random.Random(3), 5)
    all_merged(line)
    fork.check(fork.last_seq)
    with view_at(fork, fork.last_seq) as view:
        view.read(0, MIB)
        assert view._base_view is not None and any(
            isinstance(layer, Span) for layer in view._base_view._layers
        )


# --- what happens to them


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


def become_empty(path: Path) -> None:
    path.unlink()
    path.touch()


def become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": os.unlink,
    "directory gone": lambda path: shutil.rmtree(path.parent),
    "empty": become_empty,
    "cut": cut_in_half,
    "trailer": lambda path: flip(path, path.stat().st_size - 3),
    "map": lambda path: flip(path, path.stat().st_size - 100),
    "magic": lambda path: flip(path, path.stat().st_size - 60),
    "a directory": become_a_directory,
}


@pytest.mark.parametrize("how", list(DAMAGE))
def test_without_a_merged_index_the_indexes_answer(world: World, how: str) -> None:
    line = with_history(world, 8)
    path = all_merged(line)
    with view_at(line, line.last_seq) as before, view_at(line, line.cuts[4]) as unread:
        check_view(before, line.model, before.seq)
        DAMAGE[how](path)
        check_view(before, line.model, before.seq)
        check_view(unread, line.model, unread.seq)
        for seq in (line.last_seq, line.cuts[3]):
            line.check(seq)
        with view_at(line, line.last_seq) as view:
            view.read(0, MIB)
            assert not any(isinstance(layer, Span) for layer in view._layers)
    assert all_merged(line).exists(), "the next look makes it anew"
    line.check(line.last_seq)


@pytest.mark.parametrize("where", ["a key", "a value", "a fence"])
def test_a_flipped_bit_is_found_and_merged_no_further(world: World, where: str) -> None:
    line = with_history(world, 8)
    path = all_merged(line)
    file = Merged(path)
    pages = file.pages * BLOCK
    file.close()
    flip(path, {"a key": 3, "a value": ROWS * 8 + 1, "a fence": pages + 2}[where])
    report = check_timeline(world.state.path, line.timeline.id, boot_id=world.boot)
    (damage,) = report.damage
    assert "merged index 000001-000008 does not hold what it says" in damage.finding.what
    assert "cdp index rebuild" in damage.finding.hint
    churn(line, random.Random(1), 3)
    line.cut()
    churn(line, random.Random(2), 3)
    INDEXER.call("drain", line.directory, world.boot)
    all_merged(line)
    assert check_timeline(world.state.path, line.timeline.id, boot_id=world.boot).whole
    line.check(line.last_seq)


def test_one_that_tells_of_other_content_is_found(world: World) -> None:
    """A file that is whole in itself, but not what its indexes hold."""
    line = with_history(world, 5)
    path = all_merged(line)
    file = Merged(path)
    (keys, values), *_ = file.chunks()
    indexes = {number: member.index for number, member in file.members.items()}
    file.close()
    with Writer(path.with_name(".tmp-x"), 1) as writer:
        writer.add(keys[1:], values[1:])
        writer.publish(path, indexes)
    damage = check_timeline(world.state.path, line.timeline.id, boot_id=world.boot).damage
    assert [one.finding.what.rpartition(" ")[0] for one in damage] == [
        "the merged index 000001-000005 differs from the index of interval"
    ]
    INDEXER.call("rebuild", line.directory, world.boot)
    assert check_timeline(world.state.path, line.timeline.id, boot_id=world.boot).whole
    line.check(line.last_seq)


def test_a_rebuilt_index_is_another_one(world: World) -> None:
    line = with_history(world, 6)
    all_merged(line)
    with view_at(line, line.last_seq) as view:
        check_view(view, line.model, view.seq)
        INDEXER.call("rebuild", line.directory, world.boot)
        assert merged_files(line) == []
        check_view(view, line.model, view.seq)
        all_merged(line)
        check_view(view, line.model, view.seq)


def test_only_one_interval_is_looked_up_apart_when_its_index_is_made_anew(world: World) -> None:
    line = world.add(MIB)
    line.write(0, b"base" * 1024)
    line.synced()
    for number in range(7):  # each has a block that no other one has, so every one of them is asked
        line.write((number + 1) * BLOCK, bytes([number + 1]) * BLOCK)
        line.cut()
    line.write(9 * BLOCK, bytes([9]) * BLOCK)
    INDEXER.call("drain", line.directory, world.boot)
    all_merged(line)
    (interval_path(line.directory, 4) / CLOSED_NAME).unlink()
    INDEXER.call("close", line.directory, world.boot)
    for drained in (False, True):
        if drained:
            INDEXER.call("drain", line.directory, world.boot, batch=10)
            none_left = [file.members.keys() for file in load(line.directory)]
            assert none_left
        line.check(line.last_seq)
    with view_at(line, line.last_seq) as view:
        view.read(0, MIB)
        assert sorted(number for layer in view._layers for number in layer.intervals) == list(range(1, 9))


def test_history_that_is_dropped_is_read_through_no_index(world: World) -> None:
    """Entries of intervals that are gone are no content any more: the base point has it. Also under an open view."""
    line = with_history(world, 8)
    for number in range(8):
        publish(line, number)
    path = all_merged(line)
    with view_at(line, line.last_seq) as view:
        check_view(view, line.model, view.seq)
        for interval in (1, 2, 3):
            drop(line, interval)
        check_view(view, line.model, view.seq)
        with view_at(line, line.last_seq) as fresh:
            check_view(fresh, line.model, fresh.seq)
            assert [list(layer.intervals) for layer in fresh._layers] == [[9], [8, 7, 6, 5, 4][::-1]]
    drop(line, 6)
    line.check(line.cuts[7])
    assert path.exists()
    for interval in (4, 5, 7, 8):
        drop(line, interval)
    INDEXER.call("merge", line.directory, world.boot)
    assert merged_files(line) == [], "one that nothing is read through any more goes"
    line.check(line.last_seq)


def test_what_merged_indexes_take_is_counted(world: World) -> None:
    line = with_history(world, 6)
    used = durable.used_bytes(all_merged(line))
    assert used > 0
    Catalog.recover(world.state)
    with Catalog.open(world.state, writable=True) as catalog:
        entry = catalog.get("d1")
        assert entry is not None
        with_them = gather(world.state, catalog, Config(), entry, now_ns=world.now_ns).bytes
        index = by_kind(line.directory)["index"]
        none_merged(line)
        assert with_them - gather(world.state, catalog, Config(), entry, now_ns=world.now_ns).bytes == used
        assert index - by_kind(line.directory)["index"] == used


def test_they_are_printed(world: World) -> None:
    line = with_history(world, 5)
    path = all_merged(line)
    INDEXER.call("close", line.directory, world.boot)
    done = cdp("index", "show", str(path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    file = Merged(path)
    entries, file_levels = file.entries, list(file.levels)
    file.close()
    assert lines[0] == f"merged-index file=000001-000005 entries={entries} levels={file_levels}"
    assert [line.startswith("member interval=") for line in lines[1:6]] == [True] * 5
    assert all(line.endswith("current=true") for line in lines[1:6])
    assert len(lines) == 6 + entries and all(line.startswith("piece level=") for line in lines[6:])
    shown = cdp("timeline", "show", str(line.directory))
    assert "merged-index file=merged/000001-000005" in shown.stdout.splitlines()
    flip(path, ROWS * 8 + 1)
    done = cdp("index", "show", str(path))
    assert done.returncode == 4 and "does not hold what it says" in done.stdout
    path.unlink()
    assert cdp("index", "show", str(path)).returncode == 2


def cdp(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "recovery.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# --- merging dies, or cannot


def test_merging_may_die_at_any_step(world: World) -> None:
    line = with_history(world, 6)
    none_merged(line)
    INDEXER.call("close", line.directory, world.boot)

    def prepare(dying: Callable[[Step], Step]) -> None:
        Writer.add = dying(Writer.add)  # type: ignore[method-assign]
        Path.unlink = dying(Path.unlink)  # type: ignore[method-assign]
        for name in ("rename", "fsync", "chmod", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))

    step = 1
    while True:
        forget_indexes(world.state.path)
        if not dies_at(step, lambda: merge(line.directory), prepare):
            break
        line.check(line.last_seq)
        step += 1
    assert step > 5
    assert len(merged_files(line)) == 1
    line.check(line.last_seq)


def test_the_indexer_has_them_merged(world: World) -> None:
    """At its start, and again when intervals are closed."""
    line = with_history(world, 8)
    none_merged(line)
    INDEXER.call("close", line.directory, world.boot)
    forget_indexes(world.state.path)
    command = [sys.executable, "-m", "cdpserver.index.indexer", "--state-dir", str(world.state.path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        until(lambda: settled(line), "merged indexes", seconds=120)
        for number in range(6):
            churn(line, random.Random(number), 3)
            line.cut()
        until(lambda: settled(line), "more merged indexes", seconds=120)
    finally:
        process.kill()
        process.wait()
    line.check(line.last_seq)


def settled(line: Line) -> bool:
    """Is the index of every closed interval finished, and nothing left to merge?"""
    paths = sorted(line.directory.glob("intervals/[0-9]*"))[:-1]
    return all((path / CLOSED_NAME).exists() for path in paths) and not merging.due(line.directory)


def test_without_room_nothing_is_merged_and_nothing_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = with_history(world, 6)
    none_merged(line)
    forget_indexes(world.state.path)
    monkeypatch.setattr(merging, "SPARE", 1 << 60)
    with pytest.raises(NoSpaceError, match="no room"):
        merge(line.directory)
    assert merged_files(line) == []
    line.check(line.last_seq)


def test_one_at_a_time(world: World) -> None:
    line = with_history(world, 6)
    none_merged(line)
    forget_indexes(world.state.path)
    with merging.alone(line.directory) as mine:
        assert mine and merge(line.directory) == 0
    assert merging.due(line.directory)
    assert merge(line.directory) > 0
    assert not merging.due(line.directory)
    (line.directory / merged_module.DIRECTORY / ".tmp-left").write_bytes(b"x")
    merge(line.directory)
    assert os.listdir(line.directory / merged_module.DIRECTORY) == [path.name for path in merged_files(line)]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"x" * 63, b"x" * 4096):
        path = tmp_path / "f"
        path.write_bytes(content)
        with pytest.raises(CorruptError):
            Merged(path)
    assert NOTHING == -1
