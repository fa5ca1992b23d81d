"""Chunks on their way into packs: gathered in memory, put whole, then known to the index. Some are put while one is gathered.

A pack is called after the session that wrote it, so that `gc` leaves it alone while that runs.
"""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from cdpserver.errors import CorruptError
from cdpserver.repository.format import ENTRY_SIZE, ZERO_ID, Entry, Kind, pack_end, pack_entry, pack_head
from cdpserver.repository.repository import Repository
from cdpserver.repository.sessions import pack_name

PACK_BYTES = 16 << 20
"""A pack is put when it has so much: what one request to an object store carries well."""

PUTTING = 2
"""Packs that are on their way at once, beside the one that is gathered: a device takes its time to make one durable."""


class PackWriter:
    """Writes chunks for one backup. Threads: `claim` any, the rest one; and PUTTING of its own put packs."""

    def __init__(self, repository: Repository, session: str) -> None:
        """For the session of that id, which is held."""
        self._repository = repository
        self._session = session
        self._number = 0
        self._pool = ThreadPoolExecutor(PUTTING)
        self._under_way: deque[tuple[str, list[Entry], Future[tuple[int, int]]]] = deque()
        self._begin()
        self.stored_bytes = 0
        """Bytes of the packs that were put."""
        self._claiming = threading.Lock()
        self._claimed: set[bytes] = set()
        """Chunks that are on their way, and not durable yet."""

    def _begin(self) -> None:
        self._data = bytearray(pack_head(self._repository.config.id))
        self._entries: list[Entry] = []

    def claim(self, id_: bytes) -> bool:
        """Is the chunk to be stored? True once: whoever asked adds it."""
        with self._claiming:
            if id_ in self._claimed or self._repository.has(id_):
                return False
            self._claimed.add(id_)
            return True

    def claim_page(self, id_: bytes, length: int) -> bool:
        """The same for a page of a list; stored already, it is read first: without it nothing that it lists can be found."""
        return self.claim(id_) or (self._is_damaged(id_, length) and self.claim(id_))

    def _is_damaged(self, id_: bytes, length: int) -> bool:
        with self._claiming:
            if id_ in self._claimed:
                return False
        try:
            self._repository.load(id_, length)
        except CorruptError:
            return True
        return False

    def add_page(self, ids: bytes) -> bytes:
        """The id of a page of a list, which is stored, or will be after `flush`."""
        return self._add_list(ids, Kind.PAGE) if any(ids) else ZERO_ID

    def add_table(self, table: bytes) -> bytes:
        """The same for a page's table of patches. Of a kind that older programs know: they read packs, too."""
        return self._add_list(table, Kind.DATA)

    def _add_list(self, content: bytes, kind: Kind) -> bytes:
        id_ = self._repository.id(content)
        if self.claim_page(id_, len(content)):
            self.add(id_, kind, len(content), self._repository.seal(id_, kind, content))
        return id_

    def add(self, id_: bytes, kind: Kind, raw: int, sealed: tuple[bytes, int]) -> None:
        """One chunk; durable after `flush`."""
        stored, codec = sealed
        entry = Entry(id_, len(self._data) + ENTRY_SIZE, len(stored), raw, kind, codec)
        self._data += pack_entry(entry)
        self._data += stored
        self._entries.append(entry)
        if len(self._data) >= PACK_BYTES:
            self._send()

    def flush(self) -> None:
        """Put what was gathered; durable and known on return. NoSpaceError, BrokenError: what failed is not known."""
        if self._entries:
            self._send()
        self._wait(0)

    def _send(self) -> None:
        """What was gathered goes on its way."""
        self._wait(PUTTING - 1)
        self._number += 1
        pack = pack_name(self._session, self._number)
        self._data += pack_end(self._entries, len(self._data))
        self._under_way.append((pack, self._entries, self._pool.submit(self._put, pack, self._data)))
        self._begin()

    def _put(self, pack: str, data: bytearray) -> tuple[int, int]:
        """Its bytes, and until when it is retained."""
        until_ns = self._repository.retain_until_ns()
        self._repository.place.put(pack, data, until_ns)
        return len(data), until_ns

    def _wait(self, most: int) -> None:
        """Until no more than so many are on their way; the others are durable, and known now."""
        while len(self._under_way) > most:
            pack, entries, future = self._under_way.popleft()
            length, until_ns = future.result()
            self._repository.index.add(pack, entries)
            if until_ns:
                self._repository.index.note_retained(pack, until_ns)
            with self._claiming:
                self._claimed.difference_update(entry.id for entry in entries)
            self.stored_bytes += length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What was not flushed is not known: at most there is a pack that `gc` takes away."""
        self._pool.shutdown()
        self._begin()
