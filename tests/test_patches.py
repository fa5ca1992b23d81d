"""Places of a backup that are the chunk of an earlier one but for some blocks: always the disk's content, never deeper than one
patch, found when they are damaged, kept as long as they are needed, and refused by who does not know of them.

The oracle is a disk in memory (`Written`), or the model of tests/core.py.
"""

import contextlib
import io
import itertools
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpserver.errors import CorruptError
from cdpserver.limits import BLOCK
from cdpserver.repository import gc, patches, sessions, tape
from cdpserver.repository.check import check
from cdpserver.repository.content import ChunkList, Content
from cdpserver.repository.copy import copy
from cdpserver.repository.format import PAGE_IDS, ZERO_ID, Kind
from cdpserver.repository.layer import HOLE, HOLE_ZERO, Layer
from cdpserver.repository.patches import Patch, bits, gathered, pack_table, parse_table, runs_of_bits, touched
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.pushed import Intent, Pushed, Sent
from cdpserver.repository.record import FULL, INCREMENTAL, Backup
from cdpserver.repository.repository import BACKUP_MAGIC, PATCHED_MAGIC, Repository, create
from cdpserver.repository.restore import Restore
from cdpserver.repository.untape import import_
from tests.backed_up import CHUNK, SIZE, Case, Written, with_history
from tests.core import scratch
from tests.test_restore import Memory

BLOCKS = CHUNK // BLOCK
DAY_NS = 86_400 * 10**9


@contextlib.contextmanager
def opened(path: Path, name: str = "repo", *, chunk: int = CHUNK) -> Iterator[Repository]:
    """A repository, made if it is not there."""
    place = DirectoryPlace(path / name)
    if not (path / name).exists():
        create(place, chunk_size=chunk)
    with Repository(place, cache=path / "cache") as repository:
        yield repository


@pytest.fixture
def repository() -> Iterator[Repository]:
    with scratch() as path, opened(path) as found:
        yield found


@pytest.fixture
def case() -> Iterator[Case]:
    """A disk of 41 places, and a full backup of it."""
    with scratch() as path:
        world, line = with_history(path)
        create(DirectoryPlace(path / "repo"), chunk_size=CHUNK)
        made = Case(world, line, path)
        for number in range(40):
            line.write(number * CHUNK, os.urandom(CHUNK))
        made.back_up()
        yield made
        world.close()


def block(case: Case, place: int, number: int = 3) -> None:
    """Write one block of a place."""
    case.line.write(place * CHUNK + number * BLOCK, os.urandom(BLOCK))


def chunks_of(repository: Repository, backup: Backup) -> ChunkList:
    return ChunkList(repository, backup.disks[0])


def patched(repository: Repository, backup: Backup) -> dict[int, Patch]:
    chunks = chunks_of(repository, backup)
    found = ((number, chunks.patch(number)) for number in range(chunks.count))
    return {number: patch for number, patch in found if patch is not None}


# --- bits, blocks and tables


@given(st.integers(0, 1 << 70))
def test_runs_of_bits(value: int) -> None:
    runs = list(runs_of_bits(value))
    assert sum(bits(low, high) for low, high in runs) == value
    assert all(low < high for low, high in runs)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))


@given(st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 200_000)), max_size=12))
def test_what_ranges_touch(steps: list[tuple[int, int]]) -> None:
    """Each block that a range touches, and no other; each place once, in order."""
    at, ranges, wanted = 0, [], set()
    for skip, length in steps:
        ranges.append((at + skip, at + skip + length))
        wanted |= set(range((at + skip) // BLOCK, -(-(at + skip + length) // BLOCK))) if length else set()
        at += skip + length
    found = list(touched(ranges, CHUNK))
    assert [place for place, _ in found] == sorted({place for place, _ in found})
    assert {place * BLOCKS + n for place, value in found for n in range(BLOCKS) if value >> n & 1} == wanted


TABLES = st.dictionaries(
    st.integers(0, 90),
    st.tuples(st.integers(0, 5), st.integers(0, 500), st.integers(1, (1 << BLOCKS) - 1)),
    min_size=1,
)


@given(TABLES, st.binary(max_size=80))
def test_a_table_says_what_was_put_in_and_junk_is_corrupt(
    rows: dict[int, tuple[int, int, int]], junk: bytes
) -> None:
    places = {
        place: Patch(bytes([number + 1]) * 32, 600 * BLOCK, first, value)
        for place, (number, first, value) in rows.items()
    }
    size = 91 * CHUNK + 512
    data = pack_table(places, CHUNK)
    assert parse_table(data, CHUNK, size) == places
    assert list(parse_table(data, CHUNK, size)) == sorted(places)
    for damaged in (junk, data[:-1], data + b"x", data[: len(junk)] + junk + data[2 * len(junk) :]):
        with contextlib.suppress(CorruptError):
            found = parse_table(damaged, CHUNK, size)
            assert all(0 <= place < 91 and patch.length <= 64 << 20 for place, patch in found.items())
            assert all(
                patch.first + patch.blocks.bit_count() <= patch.length // BLOCK for patch in found.values()
            )
    with pytest.raises(CorruptError):
        parse_table(data, CHUNK, max(places) * CHUNK + CHUNK - 512)  # a short place is never patched


@given(st.integers(1, (1 << BLOCKS) - 1), st.integers(0, 9), st.data())
def test_a_patch_lies_over_its_chunk(value: int, first: int, data: st.DataObject) -> None:
    """Block by block; and what lies in the patch alone is found there."""
    below = b"".join(bytes([n]) * BLOCK for n in range(BLOCKS))
    count = value.bit_count()
    content = bytes(first * BLOCK) + b"".join(bytes([100 + n]) * BLOCK for n in range(count))
    patch = Patch(b"p" * 32, len(content), first, value)
    place = patch.over(below, content)
    over = iter(range(100, 100 + count))
    wanted = [next(over) if value >> n & 1 else n for n in range(BLOCKS)]
    assert place == b"".join(bytes([n]) * BLOCK for n in wanted)
    low = data.draw(st.integers(0, CHUNK - 1))
    high = data.draw(st.integers(low + 1, min(CHUNK, low + 3 * BLOCK)))
    at = patch.find(low, high)
    inside = all(value >> n & 1 for n in range(low // BLOCK, (high - 1) // BLOCK + 1))
    assert (at is not None) == inside
    if at is not None:
        assert content[at : at + high - low] == place[low:high]


@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 1 << 64)), max_size=200),
    st.sampled_from([16, 18, 26]),
)
def test_who_shares_a_patch(found: list[tuple[int, int]], power: int) -> None:
    """Neighbours, in order, as much as a patch holds; one place is never divided."""
    step = 1 << power
    most = step // BLOCK // patches.PART
    places = [(place, value & bits(0, most) or 1) for place, value in sorted(dict(found).items())]
    groups = list(gathered(places, step))
    assert [place for group in groups for place in group] == places
    for group in groups:
        assert len({place // patches.PLACES for place, _ in group}) == 1
        assert sum(value.bit_count() for _, value in group) * BLOCK <= patches.most_bytes(step)


# --- generations


WRITE = st.tuples(st.integers(0, 66 * BLOCKS - 1), st.sampled_from([1, 1, 2, 4, 9, 40]), st.integers(0, 3))
GENERATION = st.tuples(st.lists(WRITE, max_size=8), st.integers(0, 9))


@settings(max_examples=25)
@given(st.lists(GENERATION, min_size=2, max_size=7), st.integers(0, 1 << 30))
def test_any_changes_over_generations(
    generations: list[tuple[list[tuple[int, int, int]], int]], seed: int
) -> None:
    """Whatever is written, and whichever backups go meanwhile: each is the disk as it was, in every way of reading."""
    dice = random.Random(seed)
    disk = Written(66 * CHUNK + 512)
    disk.write(0, dice.randbytes(60 * CHUNK))
    with scratch() as path, opened(path) as repository:
        was: dict[str, bytes] = {}
        for writes, dropped in generations:
            for at, count, kind in writes:
                length = min(count * BLOCK, disk.size - at * BLOCK)
                data = bytes(length) if kind == 0 else dice.randbytes(length)
                disk.write(at * BLOCK + 512 * (kind == 1), data[: length - 512 * (kind == 1)])
            made = disk.back_up(repository)
            was[made.id] = bytes(disk.content)
            if dropped == 0 and len(was) > 1:
                gone = dice.choice(sorted(was))
                repository.remove(gone)
                del was[gone]
                gc.sweep(repository)
        assert check(repository).sound
        backups = [repository.backup(id_) for id_ in repository.backup_ids()]
        assert [backup.id for backup in backups] == sorted(was)
        for backup in backups:
            compare(repository, backup, was[backup.id], dice)
        for one, other in itertools.pairwise(backups):
            lay_over(repository, one, other)


def compare(repository: Repository, backup: Backup, wanted: bytes, dice: random.Random) -> None:
    """Read at once, in pieces, and restored; block status; and what the record says of it."""
    chunks = chunks_of(repository, backup)
    target = Memory(bytes(len(wanted)), fresh=True)
    Restore(repository, chunks, target).run()
    assert target.content == wanted
    content = Content(repository, backup.disks[0])
    assert content.read(0, content.size) == wanted
    for _ in range(20):
        at = dice.randrange(len(wanted))
        length = min(dice.choice([1, 512, BLOCK, 3 * BLOCK, CHUNK]), len(wanted) - at)
        assert content.read(at, length) == wanted[at : at + length]
    assert not any(
        any(wanted[low:high]) for low, high, zero in content.status(0, len(wanted), one=False) if zero
    )
    found = patched(repository, backup)
    disk = backup.disks[0]
    assert (disk.patched, bool(disk.patches)) == (len(found), bool(found))
    assert disk.chunks == len(list(chunks.used()))
    assert all(patch.blocks.bit_count() * patches.PART <= BLOCKS for patch in found.values())


def lay_over(repository: Repository, one: Backup, other: Backup) -> None:
    """A layer of a chain holds all that another backup did not have."""
    new, old = Content(repository, other.disks[0]), Content(repository, one.disks[0])
    layer = Layer(new, old)
    at = 0
    for start, end, kind in layer.status(0, new.size, one=False):
        assert start == at
        at = end
        if kind == HOLE:
            assert new.read(start, end - start) == old.read(start, end - start)
        elif kind == HOLE_ZERO:
            assert not any(new.read(start, end - start))
    assert at == new.size


def test_what_is_read_and_stored(repository: Repository) -> None:
    """The blocks that changed, in one patch for neighbours; then with those that changed before; then the place whole."""
    disk = Written(200 * CHUNK)
    disk.write(0, os.urandom(200 * CHUNK))
    disk.back_up(repository)
    for place in range(64):
        disk.write(place * CHUNK + place % BLOCKS * BLOCK + 100, b"one")
    one = disk.back_up(repository)
    assert (one.kind, one.read_bytes, one.new_bytes, one.disks[0].patched) == (
        INCREMENTAL,
        64 * BLOCK,
        64 * BLOCK,
        64,
    )
    entries = list(entries_of(repository, one))
    assert [kind for _, kind, _ in entries] == [Kind.DATA, Kind.DATA], (
        "a patch and a table; the page is as it was"
    )
    disk.write(0 * CHUNK + 8 * BLOCK, b"two")
    disk.write(70 * CHUNK, b"two")
    two = disk.back_up(repository)
    assert two.read_bytes == 3 * BLOCK
    found = patched(repository, two)
    assert found[0].blocks == bits(0, 1) | bits(8, 9)
    assert (found[1], found[0].id == found[1].id) == (patched(repository, one)[1], False)
    disk.write(0 * CHUNK, bytes(5 * BLOCK))
    three = disk.back_up(repository)
    assert three.read_bytes == CHUNK, "six of sixteen blocks are more than a third"
    assert patched(repository, three).keys() == found.keys() - {0}
    four = disk.back_up(repository)
    assert (four.read_bytes, four.stored_bytes) == (0, 0)
    assert four.disks[0].patches == three.disks[0].patches


def entries_of(repository: Repository, backup: Backup) -> Iterator[tuple[bytes, Kind, int]]:
    lengths = dict(repository.place.names("packs"))
    for name in sorted(name for name in lengths if backup.id in name):
        for entry in repository.entries(name, lengths[name]):
            yield entry.id, entry.kind, entry.raw


def test_a_patch_of_zeros_is_stored_nowhere(repository: Repository) -> None:
    disk = Written(3 * CHUNK)
    disk.write(0, os.urandom(2 * CHUNK))
    disk.back_up(repository)
    disk.write(5 * BLOCK, bytes(BLOCK))
    made = disk.back_up(repository)
    assert patched(repository, made)[0].id == ZERO_ID
    assert made.new_bytes == 0
    assert check(repository).sound
    compare(repository, made, bytes(disk.content), random.Random(1))


def test_both_sides_of_a_page(repository: Repository) -> None:
    """Places 4095 and 4096 are in two pages, each with a table of its own; one that did not change stays as it is."""
    border = PAGE_IDS * CHUNK
    disk = Written(border + 70 * CHUNK)
    disk.write(border - CHUNK, os.urandom(3 * CHUNK))
    disk.back_up(repository)
    disk.write(border - BLOCK, os.urandom(2 * BLOCK))
    one = disk.back_up(repository)
    disk.write(border + CHUNK + BLOCK, os.urandom(BLOCK))
    two = disk.back_up(repository)
    assert patched(repository, two).keys() == {PAGE_IDS - 1, PAGE_IDS, PAGE_IDS + 1}
    assert two.disks[0].patches[0] == one.disks[0].patches[0]
    content = Content(repository, two.disks[0])
    assert content.read(border - CHUNK, 3 * CHUNK) == disk.content[border - CHUNK : border + 2 * CHUNK]
    assert check(repository).sound


class Counting(DirectoryPlace):
    """Counts what is read of packs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: Counter[tuple[str, int]] = Counter()

    def read(self, name: str, offset: int, length: int) -> bytes:
        self.reads[name, offset] += 1
        return super().read(name, offset, length)


def test_a_patch_is_read_once_for_all_of_its_places(tmp_path: Path) -> None:
    """By all workers of a restore, by a comparison block by block, and by who reads forwards with others fetching ahead."""
    create(DirectoryPlace(tmp_path / "repo"), chunk_size=CHUNK)
    place = Counting(tmp_path / "repo")
    disk = Written(64 * CHUNK)
    disk.write(0, os.urandom(disk.size))
    with Repository(place, cache=tmp_path / "cache") as repository:
        disk.back_up(repository)
        for number in range(64):
            disk.write(number * CHUNK + BLOCK, os.urandom(BLOCK))
        made = disk.back_up(repository)
        ((pack, entry),) = repository.index.find(patched(repository, made)[0].id)

        def read() -> int:
            found = place.reads[pack, entry.place]
            place.reads.clear()
            return found

        read()
        target = Memory(bytes(disk.size), fresh=True)
        Restore(repository, chunks_of(repository, made), target).run()
        assert target.content == disk.content
        assert read() == 1
        with contextlib.closing(Content(repository, made.disks[0], ahead=8)) as content:
            assert content.read(0, content.size) == disk.content
        assert read() == 1
        with contextlib.closing(Content(repository, made.disks[0])) as content:
            for number in range(64):
                at = number * CHUNK + BLOCK
                assert content.read(at, BLOCK) == disk.content[at : at + BLOCK]
            assert sum(place.reads.values()) <= 3, "a page, a table and the patch, and no chunk below it"


# --- damage


def packs_of(case: Case, backup: Backup) -> list[Path]:
    return sorted((case.path / "repo/packs").rglob(f"{backup.id}-*"))


def ranges(case: Case) -> set[tuple[str, int, int]]:
    with case.repository() as repository:
        return {(d.backup, d.start // CHUNK, d.end // CHUNK) for d in check(repository).damage}


def test_a_damaged_patch_is_named_by_the_places_that_need_it(case: Case) -> None:
    """In each backup that names it, and in no other; it is never given out, and the next backup reads and stores what changed."""
    for place in (3, 4, 9):
        block(case, place)
    one = case.back_up()
    block(case, 4)
    block(case, 20)
    two = case.back_up()
    with case.repository() as repository:
        patch = patched(repository, one)[3]
        assert patch.id == patched(repository, two)[3].id == patched(repository, one)[9].id
        ((pack, entry),) = repository.index.find(patch.id)
    path = case.path / "repo" / pack
    whole = path.read_bytes()
    path.write_bytes(
        whole[: entry.place + 7] + bytes([whole[entry.place + 7] ^ 1]) + whole[entry.place + 8 :]
    )
    assert ranges(case) == {(one.id, 3, 5), (one.id, 9, 10), (two.id, 3, 4), (two.id, 9, 10)}
    with case.repository() as repository:
        content = Content(repository, two.disks[0])
        model = case.line.model
        assert content.read(4 * CHUNK, 5 * CHUNK) == model.read(case.taken[two.id], 4 * CHUNK, 5 * CHUNK)
        for at, length in ((3 * CHUNK, CHUNK), (9 * CHUNK + 3 * BLOCK, 1)):
            with pytest.raises(CorruptError, match=f"chunk {patch.id.hex()[:16]} .*{pack}"):
                content.read(at, length)
        target = Memory(bytes(SIZE), fresh=True)
        with pytest.raises(CorruptError, match=patch.id.hex()[:16]):
            Restore(repository, chunks_of(repository, two), target).run()
        assert not any(target.content[3 * CHUNK : 4 * CHUNK])
    path.write_bytes(whole)
    case.verify()


def test_a_damaged_chunk_below_a_patch(case: Case) -> None:
    """Is damage of each backup that has it, patched or not."""
    first = next(iter(case.taken))
    block(case, 5)
    second = case.back_up()
    with case.repository() as repository:
        ((pack, entry),) = repository.index.find(chunks_of(repository, second).id(5))
    path = case.path / "repo" / pack
    data = bytearray(path.read_bytes())
    data[entry.place + 9] ^= 1
    path.write_bytes(data)
    assert ranges(case) == {(first, 5, 6), (second.id, 5, 6)}


def test_a_lost_pack_of_patches(case: Case) -> None:
    """The table is lost with it, so nobody knows what is patched there; the next backup is a full one, which is whole."""
    block(case, 5)
    one = case.back_up()
    (pack,) = packs_of(case, one)
    pack.unlink()
    assert ranges(case) == {(one.id, 0, SIZE // CHUNK)}
    block(case, 6)
    made = case.back_up()
    assert (made.kind, made.reason.partition(": ")[2]) == (FULL, "its list is not all there")
    assert {backup for backup, *_ in ranges(case)} == {one.id}
    with case.repository() as repository:
        case.compare(repository, made)


@pytest.mark.parametrize("what", ["chunk", "patch"])
def test_a_parent_that_misses_a_chunk_or_a_patch_is_none(case: Case, what: str) -> None:
    """The index knows, without reading them."""
    block(case, 5)
    one = case.back_up()
    block(case, 6)
    two = case.back_up()
    with case.repository() as repository:
        chunks = chunks_of(repository, two)
        patch = chunks.patch(5)
        assert patch is not None
        lost = patch.id if what == "patch" else chunks.id(5)
        ((pack, _),) = repository.index.find(lost)
        (case.path / "repo" / pack).unlink()
    made = case.back_up()
    assert made.kind == FULL
    assert "damaged" in made.reason
    with case.repository() as repository:
        case.compare(repository, made)
        assert one.id in {d.backup for d in check(repository).damage}


def test_tables_and_patches_that_changed_places(case: Case) -> None:
    """One pack under the other's name: found by their ids, whichever they hold."""
    block(case, 5)
    one = case.back_up()
    block(case, 5)
    two = case.back_up()
    left, right = (packs_of(case, backup)[0] for backup in (one, two))
    contents = left.read_bytes(), right.read_bytes()
    left.write_bytes(contents[1])
    right.write_bytes(contents[0])
    case.verify("found where they are now")
    left.write_bytes(contents[0])
    with case.repository("and one of them twice") as repository:
        assert {d.backup for d in check(repository).damage} == {two.id}
        case.compare(repository, repository.backup(one.id))


# --- gc, copies, tapes, what is sent, what is immutable


def test_gc_keeps_a_patch_as_long_as_a_place_needs_it(case: Case) -> None:
    """One that two places share goes when neither has it; the chunk below goes with the last that is patched."""
    first = next(iter(case.taken))
    block(case, 5)
    block(case, 6)
    one = case.back_up()
    block(case, 5)
    two = case.back_up()
    block(case, 6)
    three = case.back_up()
    with case.repository() as repository:
        shared, below = patched(repository, one)[5].id, chunks_of(repository, one).id(5)
        assert patched(repository, two)[6].id == shared

        def after(*gone: str) -> set[bytes]:
            for id_ in gone:
                repository.remove(id_)
            gc.sweep(repository)
            assert check(repository).sound
            return {id_ for id_ in (shared, below) if repository.index.find(id_)}

        assert after(first, one.id) == {shared, below}
        case.compare(repository, two)
        assert after(two.id) == {below}
        case.compare(repository, three)
    for place in (5, 6):
        case.line.write(place * CHUNK, os.urandom(CHUNK))
    whole = case.back_up()
    assert not whole.disks[0].patches
    with case.repository() as repository:
        repository.remove(three.id)
        gc.sweep(repository)
        assert below not in gc.live_ids(repository)
    case.verify("another machine's cache")


def test_what_a_guest_writes_is_no_list(repository: Repository) -> None:
    """Another disk holds what a table of patches does, and a page: whatever has that content, what these name is used."""
    disk = Written(9 * CHUNK)
    disk.write(0, os.urandom(disk.size))
    disk.back_up(repository)
    disk.write(CHUNK, b"x")
    made = disk.back_up(repository)
    lists = [made.disks[0].patches[0], made.disks[0].pages[0]]
    for number, id_ in enumerate(lists):
        content = repository.load(id_, None)
        other = Written(CHUNK + len(content))
        other.name = f"other-{number}"
        other.write(CHUNK, content)
        assert chunks_of(repository, other.back_up(repository)).id(1) == id_
    last = disk.back_up(repository)
    for gone in repository.backup_ids()[:2]:
        repository.remove(gone)
    assert [last.disks[0].patches[0], last.disks[0].pages[0]] == lists
    assert chunks_of(repository, last).named(0, set()) <= gc.live_ids(repository)
    gc.sweep(repository)
    assert check(repository).sound


@pytest.mark.parametrize("chunk", [CHUNK, 2 * CHUNK])
def test_a_copy_reads_what_was_patched(case: Case, chunk: int) -> None:
    """And stores no more than that, in chunks of the same size or others."""
    block(case, 5)
    case.back_up()
    block(case, 5, 4)
    block(case, 20)
    case.back_up()
    with case.repository() as source, opened(case.path, "other", chunk=chunk) as target:
        done = copy(source, target).copied
        assert [one.kind for one in done] == [FULL, INCREMENTAL, INCREMENTAL]
        assert [one.read_bytes for one in done[1:]] == [BLOCK, 3 * BLOCK]
        assert [one.disks[0].patched for one in done] == [0, 1, 2]
        assert check(target).sound
        for backup in done:
            case.compare(target, backup)


def test_out_on_a_tape_and_in_again(case: Case) -> None:
    """With all that a patched place needs; into an empty place, and by itself."""
    block(case, 5)
    block(case, 30)
    case.back_up()
    block(case, 5, 9)
    last = case.back_up()
    out = io.BytesIO()
    with case.repository() as repository:
        tape.export(repository, [last], out.write, created_ns=1)
    place = DirectoryPlace(case.path / "there")
    found = import_(place, io.BytesIO(out.getvalue()), cache=case.path / "there-cache")
    assert (found.sound, found.backups) == (True, [last.id])
    there = Case(case.world, case.line, case.path, None, place, case.taken)
    there.verify("there-cache")
    with there.repository("there-cache") as repository:
        assert check(repository).sound
        assert repository.backup(last.id).disks[0].patched == 2


def test_what_is_sent_lies_over_a_patched_backup(repository: Repository) -> None:
    """A place that comes is whole, and patched no more; the others stay as they are."""
    disk = Written(9 * CHUNK)
    disk.write(0, os.urandom(disk.size))
    disk.back_up(repository)
    for place in (2, 4, 6):
        disk.write(place * CHUNK, os.urandom(BLOCK))
    parent = disk.back_up(repository)
    id_ = sessions.new_id(1)
    intent = Intent(id_, 1, "written", INCREMENTAL, "for a test", parent.id, (Sent("written", disk.size),))
    with (
        sessions.session(repository.place, id_) as check_held,
        contextlib.closing(Pushed(repository, intent, check_held)) as pushed,
    ):
        sent = pushed.connect("written")
        disk.write(4 * CHUNK, os.urandom(CHUNK))
        pushed.write(sent, 4 * CHUNK, disk.content[4 * CHUNK : 5 * CHUNK])
        disk.write(6 * CHUNK, bytes(CHUNK))
        pushed.zero(sent, 6 * CHUNK, CHUNK)
        made = pushed.commit(5, "crash")
    assert patched(repository, made).keys() == {2}
    assert check(repository).sound
    compare(repository, made, bytes(disk.content), random.Random(1))


class Locking(DirectoryPlace):
    """A directory that sees to it that nothing is deleted too early, as a bucket with object lock does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.time_ns = 1
        self.until: dict[str, int] = {}

    @property
    def locks(self) -> bool:
        return True

    def now_ns(self) -> int | None:
        return self.time_ns

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        super().put(name, data, until_ns)
        self.until[name] = max(until_ns, self.until.get(name, 0))

    def retain(self, name: str, until_ns: int) -> None:
        self.until[name] = max(until_ns, self.until[name])

    def retained_until_ns(self, name: str) -> int:
        return self.until[name]


def test_all_that_a_patched_place_needs_is_held_as_long_as_the_backup(tmp_path: Path) -> None:
    """The pack of the chunk, that of the patch, and that of the table, whichever backup stored them."""
    place = Locking(tmp_path / "repo")
    create(place, chunk_size=CHUNK, immutable_ns=10 * DAY_NS)
    disk = Written(9 * CHUNK)
    disk.write(0, os.urandom(disk.size))
    with Repository(place, cache=tmp_path / "cache") as repository:
        disk.back_up(repository)
        disk.write(2 * CHUNK, os.urandom(BLOCK))
        disk.back_up(repository)
        for _ in range(3):
            place.time_ns += 9 * DAY_NS
            made = disk.back_up(repository)
            assert patched(repository, made).keys() == {2}
            needed = chunks_of(repository, made).named(0, set())
            assert len(needed) == 9 + 1 + 2, "chunks, the patch, page and table"
            packs = {pack for id_ in needed for pack, _ in repository.index.find(id_)}
            assert len(packs) == 2
            assert all(place.until[pack] >= place.time_ns + 10 * DAY_NS for pack in packs)


# --- forms


def test_who_knows_no_patches_refuses_the_record(case: Case) -> None:
    """Only records with patches are of the second form; a digest covers which; a third one is for a newer program."""
    first = next(iter(case.taken))
    block(case, 5)
    second = case.back_up()
    objects = {id_: case.path / "repo/backups" / id_ for id_ in (first, second.id)}
    assert [path.read_bytes()[:8] for path in objects.values()] == [BACKUP_MAGIC, PATCHED_MAGIC]
    whole = objects[second.id].read_bytes()
    body = whole[41:]

    def signed(magic: bytes) -> bytes:
        covered = b"" if magic == BACKUP_MAGIC else magic
        return magic + whole[8:9] + blake3(covered + whole[8:9] + body).digest() + body

    def said(data: bytes) -> str:
        objects[second.id].write_bytes(data)
        with case.repository() as repository:
            with pytest.raises(CorruptError) as raised:
                repository.backup(second.id)
            with pytest.raises(CorruptError, match="nobody knows what is unused"):
                gc.sweep(repository)
            assert [d.backup for d in check(repository).damage] == [second.id]
        return f"{raised.value.message}; {raised.value.hint}"

    assert signed(PATCHED_MAGIC) == whole
    assert "is damaged" in said(BACKUP_MAGIC + whole[8:])
    assert "not of the form that it says" in said(signed(BACKUP_MAGIC))
    assert "is damaged" in said(b"cdpback3" + whole[8:])
    assert "use a newer program" in said(signed(b"cdpback3"))
    with case.repository() as repository:
        repository.write_backup(replace(second, disks=(replace(second.disks[0], patches=()),)))
    with case.repository() as repository:
        repository.write_backup(
            replace(second, disks=(replace(second.disks[0], patches=(ZERO_ID, ZERO_ID)),))
        )
        assert [d.reason for d in check(repository).damage] == [
            "the backup of d1 has not the pages of its size"
        ]
    objects[second.id].write_bytes(whole)
    case.verify()


def test_a_repository_of_a_program_that_knew_no_patches(tmp_path: Path) -> None:
    """Is read as ever, and goes on with patches."""
    with tarfile.open(Path(__file__).parent / "fixtures/repository-v1.tar.xz") as packed:
        packed.extractall(tmp_path)
    content = bytearray(b"".join(bytes([number]) * BLOCK for number in range(80)) + (b"end" * 171)[:512])
    with Repository(DirectoryPlace(tmp_path / "repository"), cache=tmp_path / "cache") as repository:
        assert check(repository).sound
        full, more = repository.backups()
        assert (full.kind, more.kind, more.parent, more.tags) == (FULL, INCREMENTAL, full.id, {"by": "hand"})
        dice = random.Random(1)
        compare(repository, full, bytes(content), dice)
        content[5 * BLOCK : 6 * BLOCK] = b"changed!" * 512
        compare(repository, more, bytes(content), dice)
        disk = Written(len(content))
        disk.name, disk.timeline, disk.seq = "old/vda", "t-old", 3
        disk.content[:] = content
        disk.write(7 * BLOCK, b"new")
        made = disk.back_up(repository)
        assert (made.kind, made.parent, made.disks[0].patched) == (INCREMENTAL, more.id, 1)
        compare(repository, made, bytes(disk.content), dice)
        compare(repository, repository.backup(more.id), bytes(content), dice)
