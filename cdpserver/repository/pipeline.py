"""From a source into packs: read by one thread, named and sealed by some, written by the reader again, in the order of the disk.

    read (a run of chunks) -> id -> zeros? stored already? -> compressed, encrypted -> pack

Memory: at most IN_FLIGHT_BYTES of what was read and as much again of what is sealed, whatever the size of the disk; where a chunk
is larger than half of that, two chunks. The packs come on top (packs.py).
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeAlias

from cdpserver.repository.format import ZERO_ID, Kind
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.repository import Repository

WORKERS = min(8, os.cpu_count() or 1)

RUN_BYTES = 1 << 20
"""Read at once and given to one worker: what takes a millisecond or more, so that handing it over is not seen."""

IN_FLIGHT_BYTES = 16 << 20
"""Content that was read and is not in a pack yet: enough for eight workers, each with a run at hand."""


class Readable(Protocol):
    """What chunks are read from."""

    size: int

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on."""


class _Run:
    """Chunks [first, last) in a buffer."""

    __slots__ = ("buffer", "first", "last")

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.first = self.last = 0


Put: TypeAlias = Callable[[int, bytes], None]
"""Takes a chunk's number and id."""

Sent: TypeAlias = tuple[Put, int, bytearray]
"""Where a chunk's id goes, its number, its content."""

_Named = tuple[bytes, tuple[bytes, int] | None, int]
"""Id, (stored bytes, codec) if this one stores it, raw bytes."""


class Pipeline:
    """For the chunks of one backup. Threads: one, and WORKERS of its own."""

    def __init__(self, repository: Repository, writer: PackWriter) -> None:
        self._repository = repository
        self._writer = writer
        self._pool = ThreadPoolExecutor(WORKERS)
        self._step = repository.chunk_size
        self._chunks = max(1, RUN_BYTES // self._step)
        run_bytes = self._chunks * self._step
        self.most = max(2, min(2 * WORKERS, IN_FLIGHT_BYTES // run_bytes))
        """Runs that are under way at most; each has a buffer, and there are no others."""
        self._free = [_Run() for _ in range(self.most)]
        self.read_bytes = 0
        self.new_bytes = 0

    def store(self, source: Readable, chunks: Iterator[int], put: Put) -> None:
        """Every chunk's id to `put`, in order; those that are new into packs."""
        under_way: deque[tuple[_Run, Future[list[_Named]]]] = deque()
        for first, last in runs_of(chunks, self._chunks):
            if not self._free:
                self._take(*under_way.popleft(), put)
            run = self._free.pop()
            self._read(source, run, first, last)
            under_way.append((run, self._pool.submit(self._named, run, source.size)))
        while under_way:
            self._take(*under_way.popleft(), put)

    def _read(self, source: Readable, run: _Run, first: int, last: int) -> None:
        start, end = first * self._step, min(last * self._step, source.size)
        if not run.buffer:
            run.buffer = bytearray(self._chunks * self._step)
        run.first, run.last = first, last
        source.read_into(memoryview(run.buffer)[: end - start], start)
        self.read_bytes += end - start

    def _named(self, run: _Run, size: int) -> list[_Named]:
        """What becomes of each chunk. In a worker."""
        found: list[_Named] = []
        content = memoryview(run.buffer)
        for number in range(run.first, run.last):
            at = (number - run.first) * self._step
            found.append(self._name(content[at : at + min(self._step, size - number * self._step)]))
        return found

    def _name(self, content: bytearray | memoryview) -> _Named:
        """What becomes of one chunk. In a worker."""
        id_ = self._repository.id(content)
        if id_ == self._repository.id_of_zeros(len(content)):
            return ZERO_ID, None, len(content)
        if self._writer.claim(id_):
            return id_, self._repository.seal(id_, Kind.DATA, content), len(content)
        return id_, None, len(content)

    def store_sent(self, chunks: Iterable[Sent]) -> None:
        """The same for chunks that come as they are, of several disks and in any order."""
        under_way: deque[tuple[Put, int, Future[_Named]]] = deque()

        def take() -> None:
            put, number, named = under_way.popleft()
            self._add(put, number, named.result())

        for put, number, content in chunks:
            if len(under_way) >= self.most:
                take()
            under_way.append((put, number, self._pool.submit(self._name, content)))
        while under_way:
            take()

    def _take(self, run: _Run, named: "Future[list[_Named]]", put: Put) -> None:
        """The oldest run's chunks go on; its buffer is free."""
        for number, one in enumerate(named.result(), run.first):
            self._add(put, number, one)
        self._free.append(run)

    def _add(self, put: Put, number: int, named: _Named) -> None:
        id_, sealed, raw = named
        put(number, id_)
        if sealed is not None:
            self.new_bytes += raw
            self._writer.add(id_, Kind.DATA, raw, sealed)

    def close(self) -> None:
        """What is under way is of no use any more."""
        self._pool.shutdown(cancel_futures=True)


def runs_of(chunks: Iterator[int], most: int) -> Iterator[tuple[int, int]]:
    """[first, last) runs of at most `most` ascending numbers that follow each other."""
    first = last = -1
    for number in chunks:
        if number == last and last - first < most:
            last += 1
            continue
        if last > first:
            yield first, last
        first, last = number, number + 1
    if last > first:
        yield first, last
