"""Copies an NBD export to a target: several requests in flight, checkpoints on the way, an end that can come at any time.

Durability: `checkpoint(at)` is called when everything before `at` is durable in the target; a later run starts there.
Threads: every worker has a connection to read from and a writer; while it writes a chunk its next one is under way. The caller's
thread shows progress, and is the one that an interrupt ends: the workers end, then what they did is made durable.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cdpserver.copying.nbdend import Connection
from cdpserver.copying.plan import CHUNK, Chunk, Extents, Watermark, chunks
from cdpserver.copying.target import Target, Writer
from cdpserver.errors import CdpError

WORKERS = 3
"""Connections to read from, two requests each."""

CHECKPOINT_S = 5.0
"""What an interruption costs at most, in time."""

LOOK_S = 0.1

ZERO_BLOCK = 64 << 10
"""What `sparse` leaves out at a time: a cluster of a QCOW2 file."""

_ZEROS = memoryview(bytes(ZERO_BLOCK))


@dataclass(slots=True)
class Copied:
    """What a run did, in bytes."""

    read: int = 0
    zeroed: int = 0
    skipped: int = 0


class Copy:
    """One run from `start` to the end."""

    def __init__(
        self,
        uri: str,
        target: Target,
        extents: Extents,
        *,
        start: int = 0,
        sparse: bool = False,
        checkpoint: Callable[[int], None] = lambda _: None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`extents` is the data of `uri`; `sparse` looks for zeros in it; `progress` hears of bytes read so far."""
        self.copied = Copied()
        self._uri = uri
        self._target = target
        self._sparse = sparse
        self._checkpoint = checkpoint
        self._progress = progress
        self._steps: Iterator[Chunk] = chunks(extents, zeros=not target.fresh, start=start)
        self._mark = Watermark(start)
        self._size = extents.size
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._flushed_at = time.monotonic()
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def run(self) -> Copied:
        """Copy. CdpError of the first request that failed, KeyboardInterrupt; what was done by then is durable if it can be."""
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                workers[0].join(LOOK_S) if workers[0].is_alive() else time.sleep(LOOK_S / 10)
                self._progress(self.copied.read)
        except BaseException as error:
            self._stop.set()
            for worker in workers:
                worker.join()
            self._sync_if_it_can(error)
            raise
        if self._failure is not None:
            self._sync_if_it_can(self._failure)
            raise self._failure
        self._target.flush()
        self._checkpoint(self._size)
        return self.copied

    def _sync_if_it_can(self, first: BaseException) -> None:
        try:
            self._sync()
        except CdpError as error:
            # What came first is what the operator is told.
            first.add_note(f"nor could it be made durable: {error}")

    def _sync(self) -> None:
        with self._lock:
            at = self._mark.at
        self._target.flush()
        self._checkpoint(at)

    def _work(self) -> None:
        try:
            source = Connection(self._uri)
            try:
                writer = self._target.writer()
                try:
                    self._copy(source, writer)
                finally:
                    writer.close()
            finally:
                source.close()
        except BaseException as error:  # noqa: BLE001 - the rim of a thread; `run` raises it
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()

    def _copy(self, source: Connection, writer: Writer) -> None:
        buffers = [bytearray(CHUNK), bytearray(CHUNK)]
        coming = self._begin(source, buffers[0])
        while coming is not None:
            chunk, cookie = coming
            if cookie is not None:
                source.wait(cookie, chunk.start)
            buffers.reverse()
            coming = None if self._stop.is_set() else self._begin(source, buffers[0])
            self._write(writer, chunk, memoryview(buffers[1]))
            self._done(chunk)

    def _begin(self, source: Connection, buffer: bytearray) -> tuple[Chunk, int | None] | None:
        with self._lock:
            chunk = next(self._steps, None)
            if chunk is None:
                return None
            self._mark.begin(chunk)
        if not chunk.parts:
            return chunk, None
        return chunk, source.begin_read(buffer, chunk.start, chunk.end - chunk.start)

    def _write(self, writer: Writer, chunk: Chunk, data: memoryview) -> None:
        if not chunk.parts:
            writer.zero(chunk.start, chunk.end)
        for start, end in chunk.parts:
            part = data[start - chunk.start : end - chunk.start]
            if self._sparse:
                self._write_sparse(writer, part, start)
            else:
                writer.write(part, start)

    def _write_sparse(self, writer: Writer, data: memoryview, offset: int) -> None:
        """Write what is not zero."""
        for zero, low, high in _runs(data, offset):
            if not zero:
                writer.write(data[low:high], offset + low)
                continue
            self.copied.skipped += high - low
            if not self._target.fresh:
                writer.zero(offset + low, offset + high)

    def _done(self, chunk: Chunk) -> None:
        with self._lock:
            self._mark.end(chunk)
            if chunk.parts:
                self.copied.read += chunk.bytes
            else:
                self.copied.zeroed += chunk.end - chunk.start
            due = time.monotonic() - self._flushed_at > CHECKPOINT_S
        if due and self._flushing.acquire(blocking=False):
            try:
                self._sync()
                self._flushed_at = time.monotonic()
            finally:
                self._flushing.release()


def _runs(data: memoryview, offset: int) -> Iterator[tuple[bool, int, int]]:
    """(zero, low, high) runs of blocks, which lie at multiples of their size on the disk."""
    run: tuple[bool, int, int] | None = None
    at = 0
    while at < len(data):
        stop = min(len(data), at + ZERO_BLOCK - (offset + at) % ZERO_BLOCK)
        zero = data[at] == 0 and data[at:stop] == _ZEROS[: stop - at]
        if run is not None and run[0] == zero:
            run = (zero, run[1], stop)
        else:
            if run is not None:
                yield run
            run = (zero, at, stop)
        at = stop
    if run is not None:
        yield run
