"""The list of a disk's places on its way into a repository: its pages, and the tables of what is patched."""

from dataclasses import dataclass

from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import ID_SIZE, PAGE_IDS, ZERO_ID
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.patches import Patch, pack_table


@dataclass(frozen=True, slots=True)
class Listed:
    """What a backup says of a disk: the ids of its pages and tables; places that are not zeros, and that are patched."""

    pages: tuple[bytes, ...]
    patches: tuple[bytes, ...]
    chunks: int
    patched: int


class Listing:
    """In ascending order of the pages: one is stored when another one begins, so that one is in memory."""

    def __init__(self, writer: PackWriter, old: ChunkList | None, *, count: int, step: int) -> None:
        """Of `count` places of `step` bytes. What is never put is as in `old`, or zeros."""
        self._writer, self._old = writer, old
        self._count, self._step = count, step
        self._pages: list[bytes] = []
        self._tables: list[bytes] = []
        self._page: bytearray | None = None
        """The ids of the page after those, if something of it was put; what is patched in it."""
        self._table: dict[int, Patch] = {}
        self._chunks = self._patched = 0
        """Of the pages that are stored."""

    def put(self, chunk: int, id_: bytes) -> None:
        """A place that is stored whole."""
        page = self._begun(chunk // PAGE_IDS)
        place = chunk % PAGE_IDS
        page[place * ID_SIZE : (place + 1) * ID_SIZE] = id_
        self._table.pop(place, None)

    def put_patch(self, chunk: int, patch: Patch) -> None:
        """A place that is its chunk of `old` with a patch."""
        self._begun(chunk // PAGE_IDS)
        self._table[chunk % PAGE_IDS] = patch

    def put_page(self, number: int, ids: bytearray, table: dict[int, Patch]) -> None:
        """All places of a page."""
        self._store_before(number)
        self._page, self._table = ids, table

    def _begun(self, number: int) -> bytearray:
        self._store_before(number)
        if self._page is None:
            if self._old is None:
                self._page = bytearray(min(PAGE_IDS, self._count - number * PAGE_IDS) * ID_SIZE)
            else:
                self._page, self._table = bytearray(self._old.page(number)), dict(self._old.table(number))
        return self._page

    def end(self) -> Listed:
        """All of it, which is stored."""
        self._store_before(-(-self._count // PAGE_IDS))
        tables = tuple(self._tables) if any(map(any, self._tables)) else ()
        return Listed(tuple(self._pages), tables, self._chunks, self._patched)

    def _store_before(self, number: int) -> None:
        while len(self._pages) < number:
            at = len(self._pages)
            if self._page is not None:
                ids, table = bytes(self._page), self._table
                self._pages.append(self._writer.add_page(ids))
                self._tables.append(
                    self._writer.add_table(pack_table(table, self._step)) if table else ZERO_ID
                )
            elif self._old is not None:
                ids, table = self._old.page(at), self._old.table(at)
                self._pages.append(self._old.disk.pages[at])
                self._tables.append(self._old.table_id(at))
            else:
                ids, table = b"", {}
                self._pages.append(ZERO_ID)
                self._tables.append(ZERO_ID)
            self._page, self._table = None, {}
            self._count_in(ids, table)

    def _count_in(self, ids: bytes, table: dict[int, Patch]) -> None:
        used = {at // ID_SIZE for at in range(0, len(ids), ID_SIZE) if ids[at : at + ID_SIZE] != ZERO_ID}
        self._chunks += len(used | table.keys())
        self._patched += len(table)
