"""A disk of a backup, read by offset: its list of chunks, and the chunks used last.

    pages of the backup -> page (4096 ids) -> chunk

Threads: none; every connection has its own. Who reads forwards has the next chunks fetched, decompressed and compared meanwhile.
"""

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from cdpserver.errors import CorruptError
from cdpserver.repository.format import ID_SIZE, PAGE_IDS, ZERO_ID, chunk_count, page_count
from cdpserver.repository.record import BackedUpDisk
from cdpserver.repository.repository import Repository

KEPT_BYTES = 64 << 20
"""Chunks kept for one reader; at least two."""

KEPT_PAGES = 64


class ChunkList:
    """The ids of a disk's chunks."""

    def __init__(self, repository: Repository, disk: BackedUpDisk) -> None:
        """CorruptError if the backup has not the pages that a disk of this size has."""
        self._repository = repository
        self.disk = disk
        self.step = repository.chunk_size
        self.count = chunk_count(disk.size, repository.chunk_size)
        if len(disk.pages) != page_count(disk.size, repository.chunk_size):
            raise CorruptError(f"the backup of {disk.name} has not the pages of its size")
        self._pages: OrderedDict[int, bytes] = OrderedDict()

    def page(self, number: int) -> bytes:
        """The ids of a page, one after the other."""
        found = self._pages.get(number)
        if found is None:
            ids = min(PAGE_IDS, self.count - number * PAGE_IDS)
            found = self._pages[number] = self._repository.load(self.disk.pages[number], ids * ID_SIZE)
            if len(self._pages) > KEPT_PAGES:
                self._pages.popitem(last=False)
        return found

    def id(self, chunk: int) -> bytes:
        """Of chunk number `chunk`."""
        at = chunk % PAGE_IDS * ID_SIZE
        return self.page(chunk // PAGE_IDS)[at : at + ID_SIZE]

    def used(self) -> Iterator[int]:
        """Numbers of the chunks that are not zeros, ascending."""
        for number, page in enumerate(self.disk.pages):
            if page != ZERO_ID:
                ids = self.page(number)
                for at in range(0, len(ids), ID_SIZE):
                    if ids[at : at + ID_SIZE] != ZERO_ID:
                        yield number * PAGE_IDS + at // ID_SIZE

    def length(self, chunk: int) -> int:
        """Bytes of it: the last one may be short."""
        return min(self._repository.chunk_size, self.disk.size - chunk * self._repository.chunk_size)


class Content:
    """What a view has: size, bytes, block status."""

    def __init__(self, repository: Repository, disk: BackedUpDisk, *, ahead: int = 0) -> None:
        """`ahead`: how many chunks are fetched before they are asked for."""
        self._repository = repository
        self.chunks = ChunkList(repository, disk)
        self.size = disk.size
        self._ahead = min(ahead, KEPT_BYTES // repository.chunk_size)
        self._pool = ThreadPoolExecutor(self._ahead) if self._ahead else None
        self._coming: dict[int, Future[bytes]] = {}
        self._last = -1
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
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
            id_ = self.chunks.id(number)
            if id_ == ZERO_ID:
                part[:] = bytes(len(part))
            else:
                part[:] = memoryview(self._chunk(id_, number))[low : low + len(part)]
            at = stop

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""
        buffer = bytearray(length)
        self.read_into(buffer, offset)
        return bytes(buffer)

    def _chunk(self, id_: bytes, number: int) -> bytes:
        found = self._kept.get(id_)
        if number != self._last and self._pool is not None:
            self._look_ahead(number, self._pool)
        if found is None:
            coming = self._coming.pop(number, None)
            length = self.chunks.length(number)
            found = coming.result() if coming is not None else self._repository.load(id_, length)
            self._kept[id_] = found
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(id_)
        return found

    def _look_ahead(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Fetch what comes next, of one who reads forwards."""
        forwards = 0 < number - self._last <= self._ahead
        self._last = number
        for other in [n for n in self._coming if not number <= n <= number + self._ahead]:
            self._coming.pop(other).cancel()
        if not forwards:
            return
        for after in range(number + 1, min(number + 1 + self._ahead, self.chunks.count)):
            id_ = self.chunks.id(after)
            if after not in self._coming and id_ != ZERO_ID and id_ not in self._kept:
                self._coming[after] = pool.submit(self._repository.load, id_, self.chunks.length(after))

    def status(self, offset: int, end: int, *, one: bool) -> list[tuple[int, int, bool]]:
        """(start, end, zero) runs from `offset` on: the first one, or (not `one`) those up to `end`."""
        step = self._repository.chunk_size
        runs: list[tuple[int, int, bool]] = []
        at = offset
        while at < end:
            number = at // step
            zero = self.chunks.id(number) == ZERO_ID
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
