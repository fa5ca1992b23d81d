"""A merged index: what several closed intervals hold at their ends, in one sorted file, so that one lookup answers for all.

    page | 256 keys | 256 values |  page ...  | first key of every page | map | trailer |

A key is `place << 16 | ordinal`: a place is a piece (the GiB of the disk, the level, the piece in it), the ordinal says which
interval. So the newest content of a piece at the end of any of the intervals is what comes last at or before one key. Within an
interval nothing is kept that a newer, greater piece hides: of two pieces of one interval the smaller holds.
Invariants: a file is made of the closed indexes that its map names by inode, length and time of change, and says nothing of an
interval whose index is another one by now (thinned, rebuilt) or gone. Never changed in place; disposable, as the indexes are.
Threads: none; every view maps the file for itself.
"""

import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from cdpserver import durable, messages
from cdpserver.errors import CorruptError
from cdpserver.index.pieces import SHIFTS
from cdpserver.limits import BLOCK

DIRECTORY = "merged"
"""In the timeline's directory."""

MAGIC = b"cdpmidx1"
TRAILER = struct.Struct("<8sQQQ32s")
"""End of the file: magic, pages, entries, length of the map, BLAKE3 of the map."""

ROWS = 256
"""Keys in a page of 4096 bytes, with as many values."""

PAGE_WORDS = 2 * ROWS
NO_KEY = (1 << 64) - 1
"""Behind the last key of the last page."""

ORDINAL_BITS = 16
ORDINAL_MASK = (1 << ORDINAL_BITS) - 1
MOST_INTERVALS = 1 << ORDINAL_BITS

REGION_SHIFT = SHIFTS[-1]
REGION_BLOCKS = 1 << REGION_SHIFT
"""Blocks of the greatest piece: all that can hide a piece lies in its region."""

REGION_MASK = REGION_BLOCKS - 1
LEVEL_SHIFT = REGION_SHIFT
PLACE_SHIFT = REGION_SHIFT + 3

CHUNK_PAGES = 256
"""Pages looked at together: a megabyte, however many are asked for."""

REBUILD = "cdp index rebuild DISK makes it anew; nothing is lost"

Words: TypeAlias = npt.NDArray[np.uint64]
Entries: TypeAlias = tuple[Words, Words]
"""(keys, values), ascending by key."""

Identity: TypeAlias = tuple[int, int, int]
"""Inode, length and time of change (ns) of a closed index."""


def identity(index: Path | str) -> Identity | None:
    """What tells a closed index from every other one; None where there is none."""
    try:
        stat = os.stat(index)
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Member:
    """One interval in a merged index: the index that it was made of, how many entries, and their digest."""

    index: Identity
    entries: int
    digest: int


def place_of(block: int, level: int) -> int:
    """The place of the piece of `level` that holds a block."""
    inside = (block & REGION_MASK) >> SHIFTS[level]
    return block >> REGION_SHIFT << PLACE_SHIFT | level << LEVEL_SHIFT | inside


def digests(keys: Words, values: Words) -> dict[int, tuple[int, int]]:
    """By ordinal how many entries there are, and the sum of what each comes to: whatever the order or the parts, the same."""
    mixed = (keys >> np.uint64(ORDINAL_BITS)) * np.uint64(0x9E3779B97F4A7C15) ^ (
        values * np.uint64(0xC2B2AE3D27D4EB4F)
    )
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    ordinals = (keys & np.uint64(ORDINAL_MASK)).astype(np.int64)
    order = np.argsort(ordinals, kind="stable")
    ordinals, mixed = ordinals[order], mixed[order]
    starts = np.flatnonzero(np.diff(ordinals, prepend=-1))
    sums = np.add.reduceat(mixed, starts) if len(starts) else mixed
    counts = np.diff(starts, append=len(ordinals))
    found = zip(ordinals[starts].tolist(), counts.tolist(), sums.tolist(), strict=True)
    return {ordinal: (count, total) for ordinal, count, total in found}


class Merged:
    """An open merged index. CorruptError, FileNotFoundError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.inode = os.fstat(file.fileno()).st_ino
            length = os.fstat(file.fileno()).st_size
            if length < TRAILER.size:
                raise _damaged(path, "it is cut short")
            self._map = mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ)
        try:
            self._read(length)
        except BaseException:
            self._map.close()
            raise

    def _read(self, length: int) -> None:
        magic, pages, entries, map_length, digest = TRAILER.unpack_from(self._map, length - TRAILER.size)
        if magic != MAGIC:
            raise _damaged(self.path, "it is no merged index")
        end = pages * (BLOCK + 8)
        held = max(1, -(-entries // ROWS))
        if length != end + map_length + TRAILER.size or pages != held:
            raise _damaged(self.path, "it is cut short")
        raw = self._map[end : end + map_length]
        if blake3(raw).digest() != digest:
            raise _damaged(self.path, "its map fails its check")
        value = messages.unpack(raw, f"{self.path}: the map")
        try:
            self.first = int(value["first"])
            self.levels = tuple(int(level) for level in value["levels"])
            self.members = {
                int(number): Member((int(inode), int(size), int(time)), int(count), int(sum_))
                for number, inode, size, time, count, sum_ in value["intervals"]
            }
        except (KeyError, TypeError, ValueError):
            raise _damaged(self.path, "its map is none") from None
        if not set(self.levels) <= set(range(len(SHIFTS))):
            raise _damaged(self.path, "it has levels that there are not")
        self.pages, self.entries = pages, entries
        view = memoryview(self._map)
        self._words = view[: pages * BLOCK].cast("Q")
        self._fences = view[pages * BLOCK : end].cast("Q")

    def newest(self, place: int, oldest: int, newest: int) -> tuple[int, int] | None:
        """(ordinal, value) of the newest piece at a place that ordinals [oldest, newest] have."""
        key = place << ORDINAL_BITS | newest
        page = bisect_right(self._fences, key) - 1
        if page < 0:
            return None
        start = page * PAGE_WORDS
        at = bisect_right(self._words, key, start, start + ROWS) - 1
        found = self._words[at]
        if found >> ORDINAL_BITS != place or found & ORDINAL_MASK < oldest:
            return None
        return found & ORDINAL_MASK, self._words[at + ROWS]

    def pieces(self, low: int, high: int, oldest: int, newest: int) -> list[tuple[int, int, int]]:
        """(place, ordinal, value) of the newest piece at each of the places [low, high), ascending."""
        first = max(0, bisect_right(self._fences, low << ORDINAL_BITS) - 1)
        last = bisect_right(self._fences, (high << ORDINAL_BITS) - 1)
        found: list[tuple[int, int, int]] = []
        for start in range(first, last, CHUNK_PAGES):
            keys, values = self._page_entries(start, min(last, start + CHUNK_PAGES))
            places, ordinals = keys >> np.uint64(ORDINAL_BITS), keys & np.uint64(ORDINAL_MASK)
            chosen = (places >= low) & (places < high) & (ordinals >= oldest) & (ordinals <= newest)
            places, ordinals, values = places[chosen], ordinals[chosen], values[chosen]
            if not len(places):
                continue
            ends = np.flatnonzero(np.append(places[1:] != places[:-1], True))
            rows = list(
                zip(places[ends].tolist(), ordinals[ends].tolist(), values[ends].tolist(), strict=True)
            )
            if found and found[-1][0] == rows[0][0]:
                found.pop()  # a newer one of the same place lies on the next page
            found += rows
        return found

    def _page_entries(self, first: int, end: int) -> Entries:
        words = np.frombuffer(self._map, np.uint64, (end - first) * PAGE_WORDS, first * BLOCK)
        pages = words.reshape(-1, 2, ROWS)
        # Copies, so that nobody who has them keeps the file mapped.
        return pages[:, 0, :].flatten(), pages[:, 1, :].flatten()

    def chunks(self) -> Iterator[Entries]:
        """All entries, a megabyte at a time."""
        for start in range(0, self.pages, CHUNK_PAGES):
            end = min(self.pages, start + CHUNK_PAGES)
            keys, values = self._page_entries(start, end)
            held = min(len(keys), self.entries - start * ROWS)
            if held:
                yield keys[:held], values[:held]

    def whole(self) -> bool:
        """Are all entries in order, and what the map says of every interval?"""
        found: dict[int, tuple[int, int]] = {}
        before = -1
        for keys, values in self.chunks():
            if int(keys[0]) <= before or not bool((keys[1:] > keys[:-1]).all()):
                return False
            before = int(keys[-1])
            add_digests(found, digests(keys, values))
        expected = {
            number - self.first: (member.entries, member.digest)
            for number, member in self.members.items()
            if member.entries
        }
        fences = np.frombuffer(self._map, np.uint64, self.pages, self.pages * BLOCK)
        firsts = np.frombuffer(self._map, np.uint64, self.pages * PAGE_WORDS)[::PAGE_WORDS]
        return found == expected and bool((fences == firsts).all())

    def is_gone(self) -> bool:
        """Is another file there by now, or none?"""
        found = identity(self.path)
        return found is None or found[0] != self.inode

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self._fences.release()
        self._map.close()


def add_digests(into: dict[int, tuple[int, int]], more: dict[int, tuple[int, int]]) -> None:
    """Add what another part of the same entries comes to."""
    for ordinal, (count, total) in more.items():
        had = into.get(ordinal, (0, 0))
        into[ordinal] = (had[0] + count, (had[1] + total) & NO_KEY)


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(f"{path} is damaged: {why}", hint=REBUILD)


class Writer:
    """Writes a merged index at a temporary path, from entries in ascending order."""

    def __init__(self, path: Path, first: int) -> None:
        self._path = path
        self._first = first
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `publish`, else by `__exit__`
        self._left: Entries = (np.empty(0, np.uint64), np.empty(0, np.uint64))
        self._fences: list[Words] = []
        self._levels: set[int] = set()
        self._entries = 0
        self._digests: dict[int, tuple[int, int]] = {}

    def add(self, keys: Words, values: Words) -> None:
        """The entries that follow."""
        if not len(keys):
            return
        self._entries += len(keys)
        add_digests(self._digests, digests(keys, values))
        levels = keys >> np.uint64(ORDINAL_BITS + LEVEL_SHIFT) & np.uint64(7)
        self._levels |= {int(level) for level in np.unique(levels)}
        keys = np.concatenate((self._left[0], keys))
        values = np.concatenate((self._left[1], values))
        whole = len(keys) // ROWS * ROWS
        self._pages(keys[:whole], values[:whole])
        self._left = (keys[whole:], values[whole:])

    def _pages(self, keys: Words, values: Words) -> None:
        if len(keys):
            self._fences.append(keys[::ROWS].copy())
            pages = np.stack((keys.reshape(-1, ROWS), values.reshape(-1, ROWS)), axis=1)
            self._file.write(pages.tobytes())

    def publish(self, path: Path, indexes: dict[int, Identity]) -> None:
        """Give it its name, durable; `indexes` are the closed indexes that it was made of, by interval."""
        # The last page is filled up; one there always is.
        missing = -len(self._left[0]) % ROWS if self._entries else ROWS
        fill = np.full(missing, NO_KEY, np.uint64)
        self._pages(np.concatenate((self._left[0], fill)), np.concatenate((self._left[1], fill)))
        fences = np.concatenate(self._fences)
        self._file.write(fences.tobytes())
        rows: list[list[Any]] = []
        for number, index in sorted(indexes.items()):
            rows.append([number, *index, *self._digests.get(number - self._first, (0, 0))])
        value = {"first": self._first, "levels": sorted(self._levels), "intervals": rows}
        raw: bytes = msgpack.packb(value)
        self._file.write(raw)
        self._file.write(TRAILER.pack(MAGIC, len(fences), self._entries, len(raw), blake3(raw).digest()))
        self._file.close()
        os.chmod(self._path, 0o600)
        durable.publish(self._path, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What was not published is removed."""
        self._file.close()
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Source:
    """Intervals [low, high], consecutive, that are read together: through a merged index, or one through its own."""

    low: int
    high: int
    merged: Merged | None
    entries: int


def cover(numbers: Sequence[int], files: Sequence[Merged], indexes: dict[int, Identity]) -> list[Source]:
    """What consecutive intervals, the newest first, are read through, the newest first: as few as the files allow."""
    found: list[Source] = []
    at = 0
    while at < len(numbers):
        best, reach, entries = None, 1, 0
        for file in files:
            count = held = 0
            for number in numbers[at:]:
                member = file.members.get(number)
                if member is None or member.index != indexes.get(number):
                    break
                count, held = count + 1, held + member.entries
            if count and (best is None or count > reach):
                best, reach, entries = file, count, held
        found.append(Source(numbers[at + reach - 1], numbers[at], best, entries))
        at += reach
    return found
