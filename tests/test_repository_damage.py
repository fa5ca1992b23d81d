"""A chunk that rotted is stored anew by the next backup after somebody found it, and what names it is whole again."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdpserver.errors import CorruptError
from cdpserver.repository import gc, tape
from cdpserver.repository.check import check, check_backup
from cdpserver.repository.format import Entry, Kind
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.record import FULL, INCREMENTAL, Backup
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.untape import import_
from cdpserver.vm.backup.choice import choose
from tests.backed_up import CHUNK, Case, small_case
from tests.test_backup_pushed import SIZE, full, live, read
from tests.test_repository_faults import flip, two

KINDS = pytest.mark.parametrize("kind", [Kind.DATA, Kind.PAGE])


@pytest.fixture
def case() -> Iterator[Case]:
    """A disk with some history, and an empty repository."""
    with small_case() as made:
        yield made


def place_of(repository: Repository, backup: Backup, kind: Kind) -> tuple[str, Entry]:
    """A chunk of that kind that the backup stored itself."""
    for pack, length in repository.place.names("packs"):
        if backup.id in pack:
            return pack, next(e for e in repository.entries(pack, length) if e.kind == kind)
    raise AssertionError(f"{backup.id} stored nothing")


def rot(repository: Repository, backup: Backup, kind: Kind) -> tuple[Path, int]:
    """One bit of such a chunk; where it is."""
    pack, entry = place_of(repository, backup, kind)
    at = Path(repository.place.where) / pack, entry.place + entry.stored // 2
    flip(*at)
    return at


def notes(repository: Repository) -> list[str]:
    return [name for name, _ in repository.place.names("damaged")]


@KINDS
@pytest.mark.parametrize("found_by", ["check", "verify", "restore", "the next one"])
def test_the_next_backup_is_a_full_one_and_heals(case: Case, kind: Kind, found_by: str) -> None:
    """Of data that is found by whoever reads it, of a page by the next backup too. It is made by another machine."""
    first, second = two(case)
    with case.repository() as repository:
        rot(repository, second, kind)
        if found_by == "check":
            assert {d.backup for d in check(repository).damage} == {second.id}
            assert not check(repository, read_data=False).sound
        elif found_by == "verify":
            assert not check_backup(repository, second).sound
        elif found_by == "restore":
            with pytest.raises(CorruptError):
                case.compare(repository, second)
        assert len(notes(repository)) == (found_by != "the next one")
    case.path.joinpath("cache").rename(case.path / "another machine's")
    third = case.back_up()
    if kind == Kind.DATA and found_by == "the next one":
        assert third.kind == INCREMENTAL, "no backup reads what is stored to see whether it is whole"
        return
    assert (third.kind, third.reason.partition(":")[0]) == (FULL, f"backup {second.id} is damaged")
    assert third.new_bytes == (CHUNK if kind == Kind.DATA else 0)
    assert third.stored_bytes > 0
    with case.repository() as repository:
        assert check(repository).sound, "older backups have it from the new pack"
        assert case.back_up().kind == INCREMENTAL
    with case.repository() as repository:
        assert gc.sweep(repository).damaged == ()
        assert notes(repository) == [], (
            "the pack in which it rotted went, and what else was used in it did not"
        )
        assert check(repository).sound
    case.verify()
    assert first.id in case.taken


@KINDS
def test_a_full_one_that_was_asked_for_heals_too(case: Case, kind: Kind) -> None:
    """A page is looked at even if nobody found it damaged before: all of the disk hangs on it."""
    _, second = two(case)
    with case.repository() as repository:
        rot(repository, second, kind)
        if kind == Kind.DATA:
            check(repository)
    made = case.back_up(full=True)
    with case.repository() as repository:
        case.compare(repository, made)
        assert check(repository).sound


@KINDS
def test_what_a_vm_sends_heals_too(tmp_path: Path, kind: Kind) -> None:
    """The same of a running VM: its bitmap counts for nothing where the backup that it reaches back to is damaged."""
    create(DirectoryPlace(tmp_path / "repo"), chunk_size=CHUNK)
    content = random.Random(5).randbytes(SIZE)
    with Repository(DirectoryPlace(tmp_path / "repo"), cache=tmp_path / "cache") as repository:
        first = full(repository, content)
        rot(repository, first, kind)
        assert not check(repository).sound
        chosen = choose(repository, "web", [live(repository, first)], full=False, max_increments=63)
        assert chosen.kind == FULL
        assert "is damaged" in chosen.reason
        second = full(repository, content)
        assert second.new_bytes == (CHUNK if kind == Kind.DATA else 0)
        assert read(repository, second) == read(repository, first) == content
        assert check(repository).sound


def test_a_chunk_that_is_whole_in_another_pack_stays_there(case: Case) -> None:
    """`gc` keeps the good one of two, wherever the index has it; and a note goes when what it tells is not so any more."""
    _, second = two(case)
    with case.repository() as repository:
        at = rot(repository, second, Kind.DATA)
        check(repository)
    case.back_up()
    flip(*at)  # as if a copy of the pack had been put back
    with case.repository() as repository:
        assert len(notes(repository)) == 1
        assert check(repository).sound
        assert notes(repository) == []
        flip(*at)
        case.compare(repository, second)
        assert len(notes(repository)) == 1, "read from the other pack, and told all the same"
    with case.repository("another machine's") as repository:
        gc.sweep(repository)
        assert check(repository).sound
    case.verify()


def test_gc_cannot_move_it_and_says_so_until_it_is_healed(case: Case) -> None:
    """What else was in the pack is moved once, not with every run."""
    _, second = two(case)
    with case.repository() as repository:
        rot(repository, second, Kind.DATA)
        check(repository)
        packs = dict(repository.place.names("packs"))
        for _ in range(2):
            swept = gc.sweep(repository)
            assert (swept.doomed, swept.deleted) == ((), 0)
        assert dict(repository.place.names("packs")) == packs
        assert [d.backup for d in check(repository).damage] == [second.id]


class ReadOnly(DirectoryPlace):
    """As a directory of somebody else's, or a file system that is mounted read-only."""

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        raise PermissionError(13, "Permission denied", name)


def test_a_repository_that_cannot_be_written_is_read_all_the_same(case: Case) -> None:
    first, second = two(case)
    with case.repository() as repository:
        rot(repository, second, Kind.DATA)
    case.place = ReadOnly(case.path / "repo")
    with case.repository() as repository:
        assert [d.backup for d in check(repository).damage] == [second.id]
        assert notes(repository) == []
        assert not repository.has(place_of(repository, second, Kind.DATA)[1].id)
        case.compare(repository, first)


@KINDS
def test_a_stream_heals(case: Case, kind: Kind) -> None:
    """A tape that was written before brings back what was found damaged since; of a page without being told."""
    _, second = two(case)
    stream = io.BytesIO()
    with case.repository() as repository:
        tape.export(repository, list(repository.backups()), stream.write, created_ns=1)
        rot(repository, second, kind)
        if kind == Kind.DATA:
            check(repository)
    found = import_(
        DirectoryPlace(case.path / "repo"), io.BytesIO(stream.getvalue()), cache=case.path / "cache"
    )
    assert found.sound
    with case.repository() as repository:
        assert check(repository).sound
    case.verify()


def test_gc_moves_what_is_damaged_where_else_it_is(case: Case) -> None:
    """Of two places the good one is about to go, and the other one stays for what else is in it."""
    case.back_up()
    for chunk in (3, 5, *range(20, 30)):
        case.line.write(chunk * CHUNK, random.Random(chunk).randbytes(CHUNK))
    second = case.back_up()
    with case.repository() as repository:
        for pack, length in list(repository.place.names("packs")):
            if second.id in pack:
                for entry in repository.entries(pack, length)[:2]:
                    flip(case.path / "repo" / pack, entry.place + 9)
        assert len(check(repository).damage) == 2
    case.line.zero(5 * CHUNK, CHUNK)
    case.line.write(10 * CHUNK, random.Random(6).randbytes(4 * CHUNK))
    third = case.back_up()
    case.line.write(10 * CHUNK, random.Random(7).randbytes(4 * CHUNK))
    case.back_up()
    with case.repository() as repository:
        repository.remove(third.id)
        swept = gc.sweep(repository)
        assert [item.pack for item in swept.doomed if third.id in item.pack]
        assert swept.deleted == 1
        assert [(d.backup, d.start) for d in check(repository).damage] == [(second.id, 5 * CHUNK)]
