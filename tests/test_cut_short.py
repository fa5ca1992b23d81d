"""LMDB files that are shorter than they say: no process dies of them, what they hold is had elsewhere, and a check names them."""

import contextlib
import os
from pathlib import Path

import lmdb
import pytest

from cdpserver import mapped
from cdpserver.catalog import Catalog
from cdpserver.catalog.recovery import is_readable
from cdpserver.catalog.store import DATA, Store, add_row_tables
from cdpserver.check.repair import Step
from cdpserver.errors import CorruptError
from cdpserver.index.indexer import TimelineIndexer
from cdpserver.index.store import CLOSED_NAME, IndexFile, find_index, open_index
from cdpserver.journal.log import interval_path
from cdpserver.points import Timeline as Points
from cdpserver.repository.format import Entry, Kind
from cdpserver.repository.index import Index
from cdpserver.state import StateDir
from cdpserver.view.history import History
from recovery import stored
from recovery.cli import parse
from tests.test_check import BLOCK, BOOT, SEQS, SIZE, Disk, disk, template
from tests.test_check_depth import named
from tests.test_flips import apart, reads
from tests.test_repair import carry_out, plan

__all__ = ["disk", "named", "template"]  # fixtures

PAGE = 4096
PLACES = [0, 100, PAGE, 2 * PAGE, 3 * PAGE + 512, -1]
"""Lengths that are left; from the end where they are negative."""


def cut(path: Path, place: int) -> None:
    size = path.stat().st_size
    assert size > 8 * PAGE or path.name.startswith("open-")
    os.truncate(path, min(place, size - 1) if place >= 0 else size + place)


def serves(disk: Disk, whole: dict[int, bytes]) -> None:
    """Instants and points are had, in a process of its own."""

    def look() -> int:
        assert {seq: reads(disk, seq, verify=True) for seq in whole} == whole
        with contextlib.closing(History(disk.state.path, disk.timeline, BOOT)) as history:
            found = Points(history).bookmark("before-upgrade")
            assert found is not None and found.seq == SEQS["mark"]
        return 7

    assert apart(look) == 7


WHOLE = {
    SEQS["b"]: bytes([1]) * BLOCK + bytes([2]) * BLOCK + bytes(SIZE - 2 * BLOCK),
    SEQS["b2"]: bytes([3]) * BLOCK + bytes([5]) * BLOCK + bytes([4]) * BLOCK + bytes(SIZE - 3 * BLOCK),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_closed_index(disk: Disk, place: int) -> None:
    """Views and lists of points go by the header log."""
    path = interval_path(disk.directory, 1) / CLOSED_NAME
    cut(path, place)
    assert apart(lambda: 7 if open_index(path) is None else 1) == 7
    serves(disk, WHOLE)


def test_a_closed_index_is_named_and_made_anew(named: Disk) -> None:
    disk = named
    path = interval_path(disk.directory, 1) / CLOSED_NAME
    cut(path, -1)
    found = disk.only()
    assert "the index of interval 1 cannot be opened" in str(found["what"]) and "cut short" in str(
        found["what"]
    )
    assert found["path"] == str(path.relative_to(disk.state.path))
    steps = plan(disk)
    assert steps.steps == (Step("index", 1),)
    carry_out(disk, steps)
    assert apart(lambda: 7 if open_index(path) is not None else 1) == 7
    serves(disk, WHOLE)


@pytest.mark.parametrize("place", PLACES)
def test_an_open_index(disk: Disk, place: int) -> None:
    """The indexer makes it anew as soon as it would go on with it; meanwhile nobody uses it."""
    (path,) = interval_path(disk.directory, 2).glob("open-*.mdb")
    cut(path, place)
    serves(disk, WHOLE)

    def go_on() -> int:
        one = TimelineIndexer(disk.directory, BOOT)
        while one.step(0.0):
            pass
        one.close()
        assert one.remade or place == 0
        return 7

    assert apart(go_on) == 7
    assert find_index(path.parent, BOOT) == path
    assert apart(lambda: 7 if open_index(path) is not None else 1) == 7
    serves(disk, WHOLE)


def test_what_is_printed_of_one_says_that_it_is_damaged(disk: Disk) -> None:
    path = interval_path(disk.directory, 1) / CLOSED_NAME
    cut(path, 3 * PAGE)
    with pytest.raises(CorruptError, match="cut short to 12288 bytes of"):
        stored.index_show(parse(["index", "show", str(path), "--here"]))


# --- the catalog


@pytest.fixture
def catalogued(tmp_path: Path) -> StateDir:
    state = StateDir.create_or_open(tmp_path / "s")
    Catalog.recover(state)
    with Catalog.open(state, writable=True) as catalog:
        for number in range(1, 60):
            catalog.add(f"d{number}", f"t{number}", created_ns=number)
    return state


@pytest.mark.parametrize("place", PLACES)
def test_a_catalog(catalogued: StateDir, place: int) -> None:
    """Readers go by its copy; what opens it for changing is told, and the next start makes it anew."""
    cut(catalogued.catalog / DATA, place)

    def look() -> int:
        for change in (
            lambda: Store(catalogued.catalog, writable=True),
            lambda: add_row_tables(catalogued.catalog),
        ):
            with pytest.raises(CorruptError, match="damaged"):
                change()
        with Catalog.open(catalogued, writable=False) as catalog:
            assert len(catalog.names()) == 59
        assert not is_readable(catalogued.catalog)
        return 7

    assert apart(look) == 7
    assert Catalog.recover(catalogued)
    with Catalog.open(catalogued, writable=True) as catalog:
        assert len(catalog.names()) == 59


# --- the index of a repository


def entry(number: int) -> Entry:
    return Entry(number.to_bytes(32, "big"), number * 100, 100, 200, Kind.DATA, 0)


@pytest.mark.parametrize("place", PLACES)
def test_an_index_of_a_repository(tmp_path: Path, place: int) -> None:
    """It is empty then, and filled again from the packs."""
    path = tmp_path / "index.mdb"

    def fill() -> int:
        with Index(path) as index:
            index.add("p1", [entry(number) for number in range(500)])
            return 7 if index.packs() == {"p1"} and index.find(entry(3).id) else 1

    assert apart(fill) == 7
    cut(path, place)

    def look() -> int:
        with Index(path) as index:
            assert index.packs() == set()
        return 7

    assert apart(look) == 7
    assert apart(fill) == 7


# --- the length itself


def test_a_file_is_as_long_as_it_says(tmp_path: Path) -> None:
    """Also where LMDB left out pages at its end, since no one needs them."""
    path = tmp_path / "index.mdb"

    def fill() -> int:
        file = IndexFile(path, writable=True)
        with file.changing() as txn:
            for number in range(5000):
                txn.put(number.to_bytes(8, "big"), bytes(30), db=file.pieces)
        needed = path.stat().st_size
        os.truncate(path, needed - PAGE)
        with pytest.raises(lmdb.InvalidError, match=f"cut short to {needed - PAGE} bytes of {needed}"):
            mapped.check_length(file.env, path)
        mapped.keep_length(file.env, path)
        mapped.check_length(file.env, path)
        assert path.stat().st_size == needed
        file.env.close()
        return 7

    assert apart(fill) == 7
