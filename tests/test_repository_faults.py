"""A repository and what befalls it: every kind of file flipped, deleted and swapped; every command killed at each step."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdpserver.errors import CorruptError, NotFoundError, RefusedError
from cdpserver.repository import clock, gc, packs, prune, sessions
from cdpserver.repository.check import Damage, check
from cdpserver.repository.copy import copy
from cdpserver.repository.locks import locks
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.record import Backup
from cdpserver.repository.repository import Repository, create
from tests.backed_up import CHUNK, SIZE, Case, small_case


@pytest.fixture
def case() -> Iterator[Case]:
    """A disk with some history, and an empty repository."""
    with small_case() as made:
        yield made


def two(case: Case) -> tuple[Backup, Backup]:
    """A full backup, and one more of which chunk 3 is the only new one."""
    first = case.back_up()
    case.line.write(3 * CHUNK, os.urandom(CHUNK))
    return first, case.back_up()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


# --- flipped, deleted, swapped


def test_a_flipped_chunk_touches_what_names_it(case: Case) -> None:
    """One range of one disk of one backup; the other backup is whole, and a new one stores the chunk anew."""
    first, second = two(case)
    with case.repository() as repository:
        pack = next(name for name, _ in repository.place.names("packs") if second.id in name)
        flip(case.path / "repo" / pack, 2000)
        found = check(repository)
        assert [(d.backup, d.disk, d.start, d.end) for d in found.damage] == [
            (second.id, "d1", 3 * CHUNK, 4 * CHUNK)
        ]
        assert "in packs/" in found.damage[0].reason
        case.compare(repository, repository.backup(first.id))


def test_backups_swapped_and_deleted(case: Case) -> None:
    """One under the other's name is damage of that one; one that is gone is not there, and nothing else changed."""
    first, second = two(case)
    one, other = (case.path / "repo/backups" / backup.id for backup in (first, second))
    kept = other.read_bytes()
    other.write_bytes(one.read_bytes())
    with case.repository() as repository:
        assert [(d.backup, d.disk) for d in check(repository).damage] == [(second.id, "")]
        with pytest.raises(CorruptError, match="says that it is"):
            repository.backup(second.id)
        with pytest.raises(CorruptError, match=f"{second.id} cannot be read, so nobody knows what is unused"):
            gc.sweep(repository)
        assert abs(sessions.time_of(second.id) - second.created_ns) < 10**7
        assert sessions.time_of("junk") == 0
        other.unlink()
        assert [(d.backup, d.disk, d.reason) for d in check(repository).damage] == [
            (second.id, "", "it is gone, and nobody removed it")
        ]
        with pytest.raises(CorruptError, match=f"{second.id} is gone and nobody removed it"):
            gc.sweep(repository)
        case.compare(repository, repository.backup(first.id))
    other.write_bytes(kept)
    case.verify("anew")


def test_a_backup_that_is_removed_is_missed_by_nobody(case: Case) -> None:
    """One that the place does not let go still is, and one that was lost can be given up, or comes back with a copy."""
    first, second = two(case)
    create(DirectoryPlace(case.path / "other"), chunk_size=CHUNK)
    with case.repository() as repository, case.repository("cache") as same:
        with Repository(DirectoryPlace(case.path / "other"), cache=case.path / "cache") as other:
            copy(repository, other)
            other.place.delete(f"backups/{second.id}")
            assert other.missed() == [second.id]
            assert [backup.id for backup in copy(repository, other).copied] == [second.id]
            assert check(other).sound
        repository.place.delete(f"backups/{second.id}")
        assert same.missed() == [second.id]
        repository.remove(second.id)
        assert check(repository).sound
        gc.sweep(repository)
        repository.remove(first.id)
        assert check(repository).sound
        assert not list(repository.place.names("listed"))


@pytest.mark.parametrize("folder", ["locks", "doomed", "damaged", "listed", "clock"])
def test_small_files_lost(case: Case, folder: str) -> None:
    """What they tell is not told any more; every backup is as whole as before, and `gc` does its work again."""
    first, second = two(case)
    case.line.zero(3 * CHUNK, CHUNK)
    case.line.write(4 * CHUNK, os.urandom(CHUNK))
    third = case.back_up()
    with case.repository() as repository:
        place = repository.place
        place.put(f"locks/{first.id}", b"{}")
        repository.remove(second.id)
        repository.damaged.note(*place_of(repository, third))
        with sessions.session(place, "old"):
            assert gc.sweep(repository).waiting == 1
        assert list(place.names(folder))
        for name, _ in list(place.names(folder)):
            place.delete(name)
        assert repository.now_ns() >= third.since_ns
        assert bool(locks(repository)) == (folder != "locks")
    with case.repository() as repository:
        gc.sweep(repository)
        gc.sweep(repository)
        assert not list(repository.place.names("doomed"))
        assert check(repository).sound
        assert not [name for name, _ in repository.place.names("packs") if second.id in name]
    case.verify()


def place_of(repository: Repository, backup: Backup) -> tuple[str, bytes]:
    """A chunk that the backup stored."""
    pack, length = next(found for found in repository.place.names("packs") if backup.id in found[0])
    return pack, repository.entries(pack, length)[0].id


def test_the_configuration_lost_or_of_another(case: Case) -> None:
    """Nothing is made there anew, and nothing is read by it."""
    two(case)
    path = case.path / "repo/repo.json"
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(NotFoundError, match="no repository"), case.repository():
        pass
    with pytest.raises(RefusedError, match=r"no repo\.json"):
        create(DirectoryPlace(case.path / "repo"))
    create(DirectoryPlace(case.path / "other"), chunk_size=CHUNK)
    path.write_bytes((case.path / "other/repo.json").read_bytes())
    with case.repository("other") as repository:
        assert len(check(repository).packs_damaged) == 2, "packs say whose they are"
    path.write_bytes(kept)
    case.verify("anew")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"sessions": 3}', b'{"reason": {}}'])
def test_small_files_damaged(case: Case, damage: bytes) -> None:
    """A lock holds, a doomed pack is doomed again, a session is nobody's, and time is what the newest backup says."""
    first, second = two(case)
    with case.repository() as repository:
        place = repository.place
        place.put(f"locks/{first.id}", damage)
        assert first.id in locks(repository)
        place.put("sessions/dead", damage)
        place.put(clock.NAME, damage)
        assert repository.now_ns() == second.since_ns
        repository.remove(second.id)
        pack = next(name for name, _ in place.names("packs") if second.id in name)
        place.put("doomed/" + pack.removeprefix("packs/").replace("/", "."), damage)
        assert gc.sweep(repository).deleted == 1
        assert not [*place.names("doomed"), *place.names("sessions")]
        assert check(repository).sound
        case.compare(repository, repository.backup(first.id))


def test_gc_waits_for_those_that_ran_and_for_nobody_since(case: Case) -> None:
    """There is always some backup under way: a doomed pack goes when those have ended that ran when it was doomed."""
    first, second = two(case)
    with case.repository() as repository:
        place = repository.place
        repository.remove(second.id)
        with sessions.session(place, "old"):
            assert gc.sweep(repository).waiting == 1
        with sessions.session(place, "young"):
            assert gc.sweep(repository).deleted == 1
        case.compare(repository, repository.backup(first.id))


def test_gc_leaves_what_it_cannot_read(case: Case) -> None:
    """A pack that is to go holds a chunk that is used and damaged: it stays, and is said; other packs go."""
    first, second = two(case)
    for chunk in (8, 9, 10):
        case.line.write(chunk * CHUNK, os.urandom(CHUNK))
    third = case.back_up()
    case.line.zero(8 * CHUNK, 2 * CHUNK)
    fourth = case.back_up()
    with case.repository() as repository:
        place = repository.place
        for backup in (second, third):
            repository.remove(backup.id)
        names = [name for name, _ in place.names("packs") if third.id in name]
        entries = repository.entries(names[0], dict(place.names("packs"))[names[0]])
        live = gc.live_ids(repository)
        used = next(entry for entry in entries if entry.id in live)
        flip(case.path / "repo" / names[0], used.place + 5)
        swept = gc.sweep(repository)
        assert swept.damaged == (names[0],)
        assert names[0] in dict(place.names("packs"))
        assert [d.backup for d in check(repository).damage] == [fourth.id]
        case.compare(repository, repository.backup(first.id))


# --- killed at each step


class Killed(BaseException):
    """What a kill is to the process: nothing of it goes on."""


class Dying(DirectoryPlace):
    """Ends before its n-th change, or right after it."""

    def __init__(self, path: Path, steps: int, *, after: bool) -> None:
        super().__init__(path)
        self.steps = steps
        self.after = after

    def _step(self, change: Callable[[], None]) -> None:
        self.steps -= 1
        if self.steps < 0 or (self.steps == 0 and not self.after):
            raise Killed
        change()
        if self.steps == 0:
            raise Killed

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        self._step(lambda: DirectoryPlace.put(self, name, data, until_ns))

    def delete(self, name: str) -> None:
        self._step(lambda: DirectoryPlace.delete(self, name))


def prune_all_but_the_newest(repository: Repository) -> None:
    """As `cdp repo prune` does."""
    verdicts = prune.plan(list(repository.backups()), (), locked={})
    for verdict in verdicts:
        if not verdict.keep:
            repository.remove(verdict.backup.id)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_each_step(case: Case, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """A backup, a prune and a gc, each killed at each of its changes: what is there is whole, and the next ones are right."""
    monkeypatch.setattr(packs, "PACK_BYTES", 3 * CHUNK)
    finished: set[str] = set()
    commands = ("run", "prune", "gc")
    for step in range(1, 60):
        for command in commands:
            if command in finished:
                continue
            case.line.write((step * 7 % 39) * CHUNK, os.urandom(3 * CHUNK // 2))
            case.place = Dying(case.path / "repo", 1 << 30, after=after)
            if command == "gc":  # something that is to go
                case.back_up()
                case.place = None
                with case.repository() as repository:
                    prune_all_but_the_newest(repository)
            case.place = Dying(case.path / "repo", step, after=after)
            with contextlib.suppress(Killed):
                if command == "run":
                    case.line.writer.commit()
                    case.back_up()
                else:
                    with case.repository() as repository:
                        gc.sweep(repository) if command == "gc" else prune_all_but_the_newest(repository)
            if case.place.steps > 0:
                finished.add(command)
            case.place = None
            with case.repository() as repository:
                for id_ in (
                    repository.backup_ids()
                ):  # a kill after the name appeared left a backup that nobody was told of
                    case.taken.setdefault(id_, repository.backup(id_).disks[0].seq)
                assert check(repository, read_data=False).sound
        if len(finished) == len(commands):
            break
    else:
        raise AssertionError(f"only {finished} came to an end")
    case.back_up()
    case.verify("anew")
    with case.repository() as repository:
        gc.sweep(repository)
        gc.sweep(repository)
        assert check(repository).sound
        assert not [*repository.place.names("doomed"), *repository.place.names("sessions")]
    case.verify("once more")


def test_damage_is_a_range(case: Case) -> None:
    """Neighbours with one reason are one; SIZE is the disk's end, not the chunk's."""
    first, _ = two(case)
    with case.repository() as repository:
        for name, _ in list(repository.place.names("packs")):
            repository.place.delete(name)
        found = check(repository)
        assert {(d.backup, d.start, d.end) for d in found.damage} >= {(first.id, 0, SIZE)}
        assert all(isinstance(d, Damage) and d.end <= SIZE for d in found.damage)
        assert json.dumps(sorted(sessions.running(repository.place))) == "[]"
