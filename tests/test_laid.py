"""Maps of a chain laid over each other in windows: the same owner and place for every sector as when they are laid one by one."""

import numpy as np
import numpy.typing as npt

from cdpserver.view.laid import WINDOW_PARTS, ZERO, Laid, OwnMap, lay

SECTOR = 512
SECTORS = 24_576
SIZE = SECTORS * SECTOR

Numbers = npt.NDArray[np.int64]


def made(chance: np.random.Generator, parts: int) -> OwnMap:
    """Parts of one sector or a few, some of them zeros; neighbours touch now and then."""
    edges = np.sort(chance.choice(SECTORS, 2 * parts, replace=False)).astype(np.int64) * SECTOR
    place = np.where(chance.random(parts) < 0.2, ZERO, chance.integers(0, 1 << 30, parts) * SECTOR)
    return OwnMap(edges[::2], edges[1::2], place.astype(np.int64))


def model(maps: list[OwnMap]) -> tuple[Numbers, Numbers]:
    """Owner and place of every sector."""
    owner, place = np.zeros(SECTORS, dtype=np.int64), np.arange(SECTORS, dtype=np.int64) * SECTOR
    for number, held in enumerate(maps, 1):
        for start, end, at in zip(held.start // SECTOR, held.end // SECTOR, held.place, strict=True):
            owner[start:end] = number
            place[start:end] = ZERO if at == ZERO else at + np.arange(end - start) * SECTOR
    return owner, place


def told(parts: list[tuple[int, int, int, int]], offset: int, end: int) -> tuple[Numbers, Numbers]:
    """The same from an answer, which covers [offset, end) without holes."""
    owner: list[int] = []
    place: list[int] = []
    at = offset
    for start, stop, number, where in parts:
        assert start == at < stop
        owner += [number] * ((stop - start) // SECTOR)
        place += (
            [ZERO] * ((stop - start) // SECTOR)
            if where == ZERO
            else range(where, where + stop - start, SECTOR)
        )
        at = stop
    assert at == end
    return np.array(owner), np.array(place)


def same(parts: list[tuple[int, int, int, int]], offset: int, end: int, maps: list[OwnMap]) -> bool:
    owner, place = told(parts, offset, end)
    low, high = offset // SECTOR, end // SECTOR
    wanted = model(maps)
    return bool((owner == wanted[0][low:high]).all() and (place == wanted[1][low:high]).all())


def test_the_highest_file_that_holds_a_sector_has_it_in_every_window() -> None:
    chance = np.random.default_rng(1)
    maps = [made(chance, 3 * WINDOW_PARTS // 2) for _ in range(4)]
    laid = Laid(maps, SIZE)
    assert same(laid.parts(0, SIZE), 0, SIZE, maps)
    assert len(laid._windows) > 1
    for _ in range(200):
        low, high = sorted(chance.choice(SECTORS + 1, 2, replace=False).tolist())
        assert laid.parts(low * SECTOR, high * SECTOR) == Laid(maps, SIZE).parts(low * SECTOR, high * SECTOR)


def test_only_the_window_that_is_read_is_laid() -> None:
    maps = [made(np.random.default_rng(2), 3 * WINDOW_PARTS // 2) for _ in range(4)]
    laid = Laid(maps, SIZE)
    assert same(laid.parts(SIZE // 2, SIZE // 2 + SECTOR), SIZE // 2, SIZE // 2 + SECTOR, maps)
    assert len(laid._windows) == 1


def test_a_window_begins_and_ends_within_parts() -> None:
    held = OwnMap(*(np.array(column, dtype=np.int64) for column in ([0, 4096], [4096, 12288], [65536, ZERO])))
    window = lay([held], 1024, 8192)
    assert window.starts.tolist() == [1024, 4096]
    assert window.place.tolist() == [65536 + 1024, ZERO]
    assert window.owner.tolist() == [1, 1]


def test_without_maps_there_is_the_root() -> None:
    assert Laid([], 10 * SECTOR).parts(SECTOR, 3 * SECTOR) == [(SECTOR, 3 * SECTOR, 0, SECTOR)]
    # A file that was made for a disk which was larger says no more than this one has.
    beyond = OwnMap(*(np.array([n], dtype=np.int64) for n in (0, 20 * SECTOR, 65536)))
    assert Laid([beyond], 10 * SECTOR).parts(0, 10 * SECTOR) == [(0, 10 * SECTOR, 1, 65536)]
