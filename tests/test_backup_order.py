"""Which backup is the newest: by the repository's own time and the disk's history, whatever a clock said when one was made."""

import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from cdpserver.errors import CorruptError
from cdpserver.repository import prune, sessions, tape
from cdpserver.repository.copy import copy
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.record import FULL, INCREMENTAL, Backup
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.untape import import_
from cdpserver.retention.slots import DAY_NS, parse_slots
from cdpserver.vm.backup.choice import choose
from recovery.repositories import find_id
from tests.backed_up import CHUNK, SIZE, Case, small_case
from tests.model import BLOCK
from tests.test_backup_pushed import DISK, full, live
from tests.test_backup_pushed import SIZE as SENT

YEARS_NS = 20 * 365 * DAY_NS


@dataclass
class Wall:
    """What the clock says; the time that is lived through is another thing."""

    ahead_ns: int = 0


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    made, real = Wall(), time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + made.ahead_ns)
    return made


@pytest.fixture
def case() -> Iterator[Case]:
    """A disk with some history, and an empty repository."""
    with small_case() as made:
        yield made


def made_once_ahead(case: Case, wall: Wall, jumps: tuple[int, ...] = (0, YEARS_NS, 0, 0, 0)) -> list[str]:
    """A backup after each small write, the clock ahead (or behind) by so much."""
    ids = []
    for ahead_ns in jumps:
        wall.ahead_ns = ahead_ns
        case.line.write(7 * CHUNK, os.urandom(BLOCK))
        ids.append(case.back_up(most=2).id)
    wall.ahead_ns = 0
    return ids


def is_called(id_: str, backup: Backup) -> bool:
    return backup.id == id_


def opened(path: Path, name: str) -> Repository:
    return Repository(DirectoryPlace(path / name), cache=path / f"{name}-cache")


def test_a_clock_that_was_ahead_once(case: Case, wall: Wall) -> None:
    """Each backup is built on the one before it, full ones come when they are due, and the newest is the last that was made."""
    ids = made_once_ahead(case, wall)
    with case.repository() as repository:
        made = [repository.backup(id_) for id_ in ids]
        assert [one.kind for one in made] == [FULL, INCREMENTAL, INCREMENTAL, FULL, INCREMENTAL]
        assert [one.parent for one in made] == ["", ids[0], ids[1], "", ids[3]]
        assert made[4].read_bytes == BLOCK
        assert [one.id for one in repository.backups()] == ids
        assert find_id(repository, "latest") == ids[-1]
    case.verify()


@pytest.mark.parametrize("rule", ["none", "3d"])
def test_a_rule_keeps_the_newest(case: Case, wall: Wall, rule: str) -> None:
    """What a clock dated years ahead, or back, is neither kept for it, nor does it cost one that was made since."""
    ids = made_once_ahead(case, wall, (0, YEARS_NS, -YEARS_NS, 0))
    with case.repository() as repository:
        verdicts = prune.plan(list(repository.backups()), parse_slots(rule), locked={})
    assert [verdict.backup.id for verdict in verdicts] == ids
    # By days: those of the three newest days that have any, of which two are not today.
    assert [verdict.keep for verdict in verdicts] == [False, rule != "none", rule != "none", True]


def test_a_disk_that_grew_since(case: Case, wall: Wall) -> None:
    """The first one is a full one, and no other."""
    made_once_ahead(case, wall, (0, YEARS_NS))
    case.line.grow(SIZE + 3 * CHUNK)
    assert case.back_up().reason == "the disk was resized"
    case.line.write(SIZE, os.urandom(BLOCK))
    assert case.back_up().kind == INCREMENTAL
    case.verify()


def test_copies_and_tapes_keep_the_order(case: Case, wall: Wall) -> None:
    """Whenever one came there: a backup that is copied late is no newer for it."""
    ids = made_once_ahead(case, wall, (0, YEARS_NS, 0))
    stream = io.BytesIO()
    create(DirectoryPlace(case.path / "other"), chunk_size=CHUNK)
    with case.repository() as repository, opened(case.path, "other") as other:
        last = repository.backup(ids[-1])
        for wanted in (ids[2], ids[1], ids[0]):
            copy(repository, other, wanted=partial(is_called, wanted))
        assert [backup.id for backup in other.backups()] == ids
        assert find_id(other, "latest") == last.id
        copied = other.backup(last.id)
        assert copied.since_ns > last.since_ns, "immutable from when it came"
        backups = [repository.backup(id_) for id_ in reversed(ids)]
        tape.export(repository, backups, stream.write, created_ns=1)
    import_(DirectoryPlace(case.path / "tape"), io.BytesIO(stream.getvalue()), cache=case.path / "tape-cache")
    with opened(case.path, "tape") as back:
        assert [backup.id for backup in back.backups()] == ids


def test_a_vm_whose_clock_was_ahead_once(tmp_path: Path) -> None:
    """Its disk has grown since: that is told once, and then its bitmap counts."""
    create(DirectoryPlace(tmp_path / "repo"), chunk_size=CHUNK)
    with opened(tmp_path, "repo") as repository:
        early = full(repository, b"a" * SENT)
        repository.write_backup(replace(early, id=sessions.new_id(time.time_ns() + YEARS_NS)))
        repository.remove(early.id)
        second = full(repository, b"b" * 2 * SENT)
        disk = replace(live(repository, second), size=2 * SENT)
        chosen = choose(repository, "web", [disk], full=False, max_increments=63)
        assert (chosen.kind, chosen.parent) == (INCREMENTAL, second)
        assert disk.name == DISK


def test_what_is_known_of_backups_is_forgotten_with_them(case: Case, wall: Wall) -> None:
    """Read once by each machine; one that cannot be read is told when it is the newest, and is nobody's parent."""
    ids = made_once_ahead(case, wall, (0, YEARS_NS, 0))
    with case.repository() as repository:
        assert set(repository.index.briefs()) <= set(ids)
        assert [brief.id for brief in repository.briefs()] == ids
        assert set(repository.index.briefs()) == set(ids)
        repository.remove(ids[0])
        assert [brief.id for brief in repository.briefs()] == ids[1:]
        assert set(repository.index.briefs()) == set(ids[1:])
    path = case.path / "repo/backups" / ids[2]
    path.write_bytes(path.read_bytes()[:-1])
    for cache in ("cache", "another machine's"):
        with case.repository(cache) as repository, pytest.raises(CorruptError, match=ids[2]):
            repository.backup(find_id(repository, ids[2]))
    assert case.back_up().parent == ids[1]
