"""Compares two NBD exports by digests of their ranges; if asked, it makes the second one like the first, and writes no more."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import blake3

from cdpserver.copying.nbdend import Connection
from cdpserver.copying.plan import CHUNK, Chunk
from cdpserver.copying.target import NbdTarget, Writer
from cdpserver.limits import BLOCK

WORKERS = 2


@dataclass(slots=True)
class Compared:
    """Bytes read from each side, and the ranges that differ."""

    bytes: int = 0
    written: int = 0
    different: list[tuple[int, int]] = field(default_factory=list)


class Compare:
    """`steps` of two exports."""

    def __init__(
        self,
        left: str,
        right: str,
        steps: Iterable[Chunk],
        progress: Callable[[int], None],
        *,
        mend: bool = False,
    ) -> None:
        """With `mend`, blocks of the right one that differ are written; durable when `run` returns."""
        self._uris = left, right
        self._target = NbdTarget(right) if mend else None
        self._steps = iter(steps)
        self._progress = progress
        self._lock = threading.Lock()
        self._compared = Compared()
        self._failure: BaseException | None = None
        self._stop = threading.Event()

    def run(self) -> Compared:
        """Read both sides; CdpError of the first request that failed."""
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.1)
                    self._progress(self._compared.bytes)
        finally:
            self._stop.set()
        if self._failure is not None:
            raise self._failure
        self._compared.different.sort()
        if self._target is not None:
            self._target.flush()
            self._target.end()
        return self._compared

    def _work(self) -> None:
        try:
            left = Connection(self._uris[0])
            try:
                right = Connection(self._uris[1])
                writer = self._target.writer() if self._target is not None else None
                try:
                    self._compare(left, right, writer)
                finally:
                    right.close()
                    if writer is not None:
                        writer.close()
            finally:
                left.close()
        except BaseException as error:  # noqa: BLE001 - the rim of a thread; `run` raises it
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()

    def _compare(self, left: Connection, right: Connection, writer: Writer | None) -> None:
        one, other = bytearray(CHUNK), bytearray(CHUNK)
        while not self._stop.is_set():
            with self._lock:
                chunk = next(self._steps, None)
            if chunk is None:
                return
            length = chunk.end - chunk.start
            reads = left.begin_read(one, chunk.start, length), right.begin_read(other, chunk.start, length)
            left.wait(reads[0], chunk.start)
            right.wait(reads[1], chunk.start)
            same = _digest(one, length) == _digest(other, length)
            written = 0
            if not same and writer is not None:
                for start, end in differing(memoryview(one)[:length], memoryview(other)[:length]):
                    _put(writer, memoryview(one)[start:end], chunk.start + start)
                    written += end - start
            with self._lock:
                self._compared.written += written
                self._compared.bytes += length
                if not same:
                    self._compared.different.append((chunk.start, chunk.end))


def _digest(buffer: bytearray, length: int) -> bytes:
    return blake3.blake3(memoryview(buffer)[:length]).digest()


def differing(left: memoryview, right: memoryview, *, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Runs of blocks that differ."""
    start = -1
    for at in range(0, len(left), block):
        if left[at : at + block] != right[at : at + block]:
            start = at if start < 0 else start
        elif start >= 0:
            yield start, at
            start = -1
    if start >= 0:
        yield start, len(left)


def _put(writer: Writer, data: memoryview, offset: int) -> None:
    if any(data):
        writer.write(data, offset)
    else:
        writer.zero(offset, offset + len(data))
