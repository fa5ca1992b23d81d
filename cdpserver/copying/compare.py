"""Compares an NBD export with another one by digests of their ranges; if asked, it makes it like that, and writes no more."""

import threading
from abc import ABC, abstractmethod
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


class Comparing(ABC):
    """Ranges of an export against what it should hold. `steps` are (start, end), ascending."""

    def __init__(
        self,
        right: str,
        steps: Iterable[tuple[int, int]],
        progress: Callable[[int], None],
        *,
        mend: bool = False,
    ) -> None:
        """With `mend`, blocks of it that differ are written; durable when `run` returns."""
        self._right = right
        self._target = NbdTarget(right) if mend else None
        self._steps = iter(steps)
        self._progress = progress
        self._lock = threading.Lock()
        self._compared = Compared()
        self._failure: BaseException | None = None
        self._stop = threading.Event()

    @abstractmethod
    def _compare(self, right: Connection, writer: Writer | None) -> None:
        """What a worker does: `_next`, and `_done` of each."""

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
            right = Connection(self._right)
            writer = self._target.writer() if self._target is not None else None
            try:
                self._compare(right, writer)
            finally:
                right.close()
                if writer is not None:
                    writer.close()
        except BaseException as error:  # noqa: BLE001 - the rim of a thread; `run` raises it
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            return None if self._stop.is_set() else next(self._steps, None)

    def _done(self, start: int, end: int, *, same: bool, written: int) -> None:
        with self._lock:
            self._compared.written += written
            self._compared.bytes += end - start
            if not same:
                self._compared.different.append((start, end))


class Compare(Comparing):
    """With another export, in steps of a request's length."""

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
        super().__init__(right, ((step.start, step.end) for step in steps), progress, mend=mend)
        self._left = left

    def _compare(self, right: Connection, writer: Writer | None) -> None:
        left = Connection(self._left)
        try:
            self._compare_with(left, right, writer)
        finally:
            left.close()

    def _compare_with(self, left: Connection, right: Connection, writer: Writer | None) -> None:
        one, other = bytearray(CHUNK), bytearray(CHUNK)
        while (step := self._next()) is not None:
            start, end = step
            length = end - start
            reads = left.begin_read(one, start, length), right.begin_read(other, start, length)
            left.wait(reads[0], start)
            right.wait(reads[1], start)
            same = _digest(one, length) == _digest(other, length)
            written = 0
            if not same and writer is not None:
                written = mend(writer, memoryview(one)[:length], memoryview(other)[:length], start)
            self._done(start, end, same=same, written=written)


def mend(writer: Writer, wanted: memoryview, there: memoryview, offset: int) -> int:
    """Write the blocks that differ; bytes written."""
    written = 0
    for start, end in differing(wanted, there):
        _put(writer, wanted[start:end], offset + start)
        written += end - start
    return written


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
