"""Backups by several processes into one repository at once, with `gc` between any two of their steps."""

from pathlib import Path

from cdpserver.repository import gc
from cdpserver.repository.check import check
from cdpserver.repository.content import Content
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.repository import Repository, create
from tests.backed_up import CHUNK, SIZE
from tests.gated import NEVER, Process, at_once, content


def sweep(path: Path, cache: str) -> None:
    with Repository(DirectoryPlace(path / "repo"), cache=path / cache) as repository:
        gc.sweep(repository)


def test_processes_that_back_up_the_same_disks_and_others_beside_gc(tmp_path: Path) -> None:
    """They build on what only a removed backup had, store the same chunks at once, and share an index or have their own."""
    place = DirectoryPlace(tmp_path / "repo")
    create(place, chunk_size=CHUNK)
    old = Process(tmp_path, "one", "web", "ab", NEVER).end()
    with at_once(
        tmp_path,
        ("one", "web", "ab", 0),  # has seen that all of it is there
        ("two", "web", "ac", 1),  # has built on the half of it that is there
        (
            "one",
            "mail",
            "cb",
            1,
        ),  # has stored what that one is about to store, and shares the first one's index
        ("two", "log", "de", 1),
    ) as running:
        with Repository(place, cache=tmp_path / "three") as repository:
            repository.remove(old)
        made = {}
        for number in (1, 0, 3, 2):
            sweep(tmp_path, "one" if number % 2 else "two")
            made[number] = running[number].end()
    for cache in ("one", "two"):
        sweep(tmp_path, cache)
    with Repository(place, cache=tmp_path / "anew") as repository:
        assert check(repository).sound
        assert repository.backup_ids() == sorted(made.values())
        for number, letters in enumerate(("ab", "ac", "cb", "de")):
            for disk, letter in zip(repository.backup(made[number]).disks, letters, strict=True):
                assert Content(repository, disk).read(0, SIZE) == content(letter)
