"""Several hosts with one directory, blind to each other's locks: who lives is left alone, who was not makes no backup."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdpserver.errors import BrokenError, RefusedError
from cdpserver.repository import gc, sessions
from cdpserver.repository.check import check
from cdpserver.repository.format import Kind
from cdpserver.repository.lease import LEASE_S
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.take import back_up
from tests.backed_up import CHUNK, Made
from tools.kit.processes import until

ELSEWHERE = b"another-boot 51 0123456789abcdef\n"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    place = DirectoryPlace(tmp_path / "repo")
    create(place, chunk_size=CHUNK)
    with Repository(place, cache=tmp_path / "cache") as opened:
        yield opened


def on_another_host(repository: Repository, session: str, *, ago_s: float = 0) -> Path:
    """What is seen here of one that holds that name elsewhere, and renewed it so long ago."""
    path = Path(repository.place.where) / "sessions" / session
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(ELSEWHERE)
    moment = path.stat().st_mtime - ago_s
    os.utime(path, (moment, moment))
    return path


def test_gc_leaves_a_backup_on_another_host_alone(repository: Repository) -> None:
    """Until it has not been heard of for a lease."""
    id_ = sessions.new_id(1)
    with PackWriter(repository, id_) as writer:
        content = random.Random(1).randbytes(CHUNK)
        writer.add(
            repository.id(content),
            Kind.DATA,
            CHUNK,
            repository.seal(repository.id(content), Kind.DATA, content),
        )
        writer.flush()
    path = on_another_host(repository, id_, ago_s=LEASE_S - 60)
    assert sessions.running(repository.place) == {id_}
    assert gc.sweep(repository).deleted == 0
    on_another_host(repository, id_, ago_s=LEASE_S + 60)
    assert gc.sweep(repository).deleted == 1
    assert not path.exists()


def test_one_gc_at_a_time(repository: Repository) -> None:
    on_another_host(repository, sessions.GC)
    with pytest.raises(RefusedError, match="on another host"):
        gc.sweep(repository)
    on_another_host(repository, sessions.GC, ago_s=LEASE_S + 60)
    assert gc.sweep(repository).deleted == 0
    assert not list(repository.place.names("sessions"))


class Disturbed(Made):
    """A disk, while which is read something happens."""

    def __init__(self, event: Callable[[], None]) -> None:
        super().__init__(3 * CHUNK)
        self._event = event

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        self._event()
        super().read_into(buffer, offset)


@pytest.mark.parametrize("what", ["deleted", "taken by another"])
def test_who_was_taken_for_dead_makes_no_backup(repository: Repository, what: str) -> None:
    """Another host's `gc` has deleted its session, and perhaps its packs."""

    def taken_for_dead() -> None:
        for name, _ in repository.place.names("sessions"):
            if what == "deleted":
                repository.place.delete(name)
            else:
                on_another_host(repository, name.removeprefix("sessions/"))

    with pytest.raises(BrokenError, match="another host took it for dead"):
        back_up(repository, [Disturbed(taken_for_dead)], "made@1")
    assert repository.backup_ids() == []
    assert check(repository).sound
    left = [name for name, _ in repository.place.names("sessions")]
    assert bool(left) == (what == "taken by another"), "what is another's stays"


def test_who_could_not_renew_does_not_believe_in_it(tmp_path: Path) -> None:
    """Its machine stood still, or the file system did: others may count on its end."""
    place = DirectoryPlace(tmp_path, lease_s=0.0)
    with place.hold("sessions/one") as check_held, pytest.raises(BrokenError, match="renewed in time"):
        check_held()


def test_it_is_renewed(tmp_path: Path) -> None:
    """By the file's time, which other hosts see; and it goes with who held it."""
    place, path = DirectoryPlace(tmp_path, lease_s=20.0), tmp_path / "sessions/one"
    with place.hold("sessions/one") as check_held:
        said = path.read_bytes()
        assert len(said.split()) == 3
        os.utime(path, (1, 1))
        until(lambda: path.stat().st_mtime > 1, "a renewal")
        assert path.read_bytes() == said
        check_held()
    assert not path.exists()
    assert [*path.parent.iterdir()] == []
