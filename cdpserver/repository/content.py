"""A disk of a backup, read by offset: its list of chunks and patches, and those used last.

    pages of the backup -> page (4096 ids) -> chunk
    tables of the backup -> table (patched places of a page) -> patch

Threads: none; every connection has its own. Who reads forwards has the next places fetched, decompressed and compared meanwhile.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from cdpserver.errors import CorruptError
from cdpserver.limits import BLOCK
from cdpserver.repository.format import ID_SIZE, PAGE_IDS, ZERO_ID, chunk_count, page_count
from cdpserver.repository.patches import Patch, most_bytes, parse_table, runs_of_bits
from cdpserver.repository.record import BackedUpDisk
from cdpserver.repository.repository import Repository

KEPT_BYTES = 64 << 20
"""Places kept for one reader; at least two."""

KEPT_PAGES = 64
KEPT_TABLES = 8
"""A table of nothing but patched places takes 2 MiB."""

KEPT_PATCHES = 8 << 20
"""Bytes of patches; at least two. Restoring, a stretch's lie within it, unless it was patched by very many backups."""

Made: TypeAlias = tuple[bytes, Patch | None]
"""What a place is made of: the id of its chunk, and what is not that chunk's."""


def may_differ(one: Made, other: Made, length: int) -> Iterator[tuple[int, int]]:
    """[low, high) of a place of `length` bytes in which it may differ between two backups; nothing is read."""
    if one[0] != other[0]:
        yield 0, length
    elif one != other:
        blocks = 0
        for _, patch in (one, other):
            blocks |= patch.blocks if patch is not None else 0
        for low, high in runs_of_bits(blocks):
            yield low * BLOCK, high * BLOCK


class ChunkList:
    """The ids of a disk's chunks, and what is patched."""

    def __init__(self, repository: Repository, disk: BackedUpDisk) -> None:
        """CorruptError if the backup has not the pages that a disk of this size has."""
        self._repository = repository
        self.disk = disk
        self.step = repository.chunk_size
        self.count = chunk_count(disk.size, repository.chunk_size)
        pages = page_count(disk.size, repository.chunk_size)
        if len(disk.pages) != pages or len(disk.patches) not in (0, pages):
            raise CorruptError(f"the backup of {disk.name} has not the pages of its size")
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self._tables: OrderedDict[int, dict[int, Patch]] = OrderedDict()

    def page(self, number: int) -> bytes:
        """The ids of a page, one after the other."""
        found = self._pages.get(number)
        if found is None:
            ids = min(PAGE_IDS, self.count - number * PAGE_IDS)
            found = self._pages[number] = self._repository.load(self.disk.pages[number], ids * ID_SIZE)
            if len(self._pages) > KEPT_PAGES:
                self._pages.popitem(last=False)
        return found

    def table_id(self, number: int) -> bytes:
        """Of the table of a page; that of zeros if nothing is patched there."""
        return self.disk.patches[number] if self.disk.patches else ZERO_ID

    def table(self, number: int) -> dict[int, Patch]:
        """What is patched in a page, by the numbers of the places in it."""
        id_ = self.table_id(number)
        if id_ == ZERO_ID:
            return {}
        found = self._tables.get(number)
        if found is None:
            size = self.disk.size - number * PAGE_IDS * self.step
            found = self._tables[number] = parse_table(self._repository.load(id_, None), self.step, size)
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        return found

    def id(self, chunk: int) -> bytes:
        """Of the chunk of place number `chunk`."""
        at = chunk % PAGE_IDS * ID_SIZE
        return self.page(chunk // PAGE_IDS)[at : at + ID_SIZE]

    def patch(self, chunk: int) -> Patch | None:
        """What is not that chunk's."""
        return self.table(chunk // PAGE_IDS).get(chunk % PAGE_IDS) if self.disk.patches else None

    def made_of(self, chunk: int) -> Made:
        """Both. Places that are made of the same have the same content."""
        return self.id(chunk), self.patch(chunk)

    def is_zero(self, chunk: int) -> bool:
        """Is the place known to be zeros?"""
        return self.id(chunk) == ZERO_ID and self.patch(chunk) is None

    def used(self) -> Iterator[int]:
        """Numbers of the places that are not zeros, ascending."""
        for number, page in enumerate(self.disk.pages):
            table = self.table(number)
            if page != ZERO_ID or table:
                ids = self.page(number)
                for place in range(len(ids) // ID_SIZE):
                    if ids[place * ID_SIZE : (place + 1) * ID_SIZE] != ZERO_ID or place in table:
                        yield number * PAGE_IDS + place

    def named(self, number: int, read: set[bytes]) -> set[bytes]:
        """What page `number` needs: itself, its table, chunks and patches. A page or table that was `read` is not read
        again. These are told from what is named: a guest can write a chunk that has a page's content, and so its id.
        """
        found: set[bytes] = set()
        page, table = self.disk.pages[number], self.table_id(number)
        if page != ZERO_ID and page not in read:
            ids = self.page(number)
            found.add(page)
            found.update(ids[at : at + ID_SIZE] for at in range(0, len(ids), ID_SIZE))
        if table != ZERO_ID and table not in read:
            found.add(table)
            found.update(patch.id for patch in self.table(number).values())
        read |= {page, table}
        found.discard(ZERO_ID)
        return found

    def length(self, chunk: int) -> int:
        """Bytes of a place: the last one may be short."""
        return min(self._repository.chunk_size, self.disk.size - chunk * self._repository.chunk_size)


class Patches:
    """Patches that are read once for all of their places, as long as they are kept. Threads: any."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._most = max(KEPT_PATCHES, 2 * most_bytes(repository.chunk_size))
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, int], Future[bytes]] = OrderedDict()
        self._bytes = 0

    def get(self, patch: Patch) -> bytes:
        """The whole of it, verified. CorruptError."""
        key = patch.id, patch.length
        mine: Future[bytes] = Future()
        with self._lock:
            coming = self._kept.setdefault(key, mine)
            self._kept.move_to_end(key)
            if coming is mine:
                self._bytes += patch.length
                self._make_room()
        if coming is mine:
            self._fetch(key, mine)
        return coming.result()

    def _make_room(self) -> None:
        while self._bytes > self._most and len(self._kept) > 1:
            (_, length), _ = self._kept.popitem(last=False)
            self._bytes -= length

    def _fetch(self, key: tuple[bytes, int], mine: Future[bytes]) -> None:
        try:
            mine.set_result(self._repository.load(*key))
        except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it, this thread too
            with self._lock:  # it may be there when it is asked for again
                if self._kept.get(key) is mine:
                    del self._kept[key]
                    self._bytes -= key[1]
            mine.set_exception(error)

    def place(self, made: Made, length: int) -> bytes | bytearray:
        """A place of `length` bytes, verified. CorruptError."""
        id_, patch = made
        content = self._repository.load(id_, length)
        return content if patch is None else patch.over(content, self.get(patch))


class Content:
    """What a view has: size, bytes, block status."""

    def __init__(self, repository: Repository, disk: BackedUpDisk, *, ahead: int = 0) -> None:
        """`ahead`: how many places are fetched before they are asked for."""
        self._repository = repository
        self.chunks = ChunkList(repository, disk)
        self.size = disk.size
        self._ahead = min(ahead, KEPT_BYTES // repository.chunk_size)
        self._pool = ThreadPoolExecutor(self._ahead) if self._ahead else None
        self._coming: dict[int, Future[bytes | bytearray]] = {}
        self._last = -1
        self._patches = Patches(repository)
        self._kept: OrderedDict[Made, bytes | bytearray] = OrderedDict()
        self._most = max(2, KEPT_BYTES // repository.chunk_size)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on. CorruptError: nothing that is damaged is ever given out."""
        target = memoryview(buffer)
        step = self._repository.chunk_size
        at, end = offset, offset + len(target)
        while at < end:
            number = at // step
            low, stop = at - number * step, min(end, (number + 1) * step)
            part = target[at - offset : stop - offset]
            self._fill(part, number, low)
            at = stop

    def _fill(self, part: memoryview, number: int, low: int) -> None:
        """With what is in place `number` from `low` on."""
        made = self.chunks.made_of(number)
        id_, patch = made
        at = patch.find(low, low + len(part)) if patch is not None else None
        if patch is not None and at is not None:  # its chunk need not be read
            part[:] = memoryview(self._patches.get(patch))[at : at + len(part)]
        elif patch is None and id_ == ZERO_ID:
            part[:] = bytes(len(part))
        else:
            part[:] = memoryview(self._place(made, number))[low : low + len(part)]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""
        buffer = bytearray(length)
        self.read_into(buffer, offset)
        return bytes(buffer)

    def _place(self, made: Made, number: int) -> bytes | bytearray:
        found = self._kept.get(made)
        if number != self._last and self._pool is not None:
            self._look_ahead(number, self._pool)
        if found is None:
            coming = self._coming.pop(number, None)
            found = coming.result() if coming is not None else self._load(made, number)
            self._kept[made] = found
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(made)
        return found

    def _load(self, made: Made, number: int) -> bytes | bytearray:
        return self._patches.place(made, self.chunks.length(number))

    def _look_ahead(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Fetch what comes next, of one who reads forwards."""
        forwards = 0 < number - self._last <= self._ahead
        self._last = number
        for other in [n for n in self._coming if not number <= n <= number + self._ahead]:
            self._coming.pop(other).cancel()
        if not forwards:
            return
        for after in range(number + 1, min(number + 1 + self._ahead, self.chunks.count)):
            made = self.chunks.made_of(after)
            if after not in self._coming and made != (ZERO_ID, None) and made not in self._kept:
                self._coming[after] = pool.submit(self._load, made, after)

    def status(self, offset: int, end: int, *, one: bool) -> list[tuple[int, int, bool]]:
        """(start, end, zero) runs from `offset` on: the first one, or (not `one`) those up to `end`."""
        step = self._repository.chunk_size
        runs: list[tuple[int, int, bool]] = []
        at = offset
        while at < end:
            number = at // step
            zero = self.chunks.is_zero(number)
            stop = min(end, (number + 1) * step)
            if runs and runs[-1][2] == zero:
                runs[-1] = (runs[-1][0], stop, zero)
            elif runs and one:
                break
            else:
                runs.append((at, stop, zero))
            at = stop
        return runs

    def close(self) -> None:
        """Forget what is kept; the repository is the caller's."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._coming.clear()
        self._kept.clear()
        self._patches = Patches(self._repository)
