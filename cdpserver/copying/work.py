"""Workers that write a target: checkpoints on the way, an end that can come at any time.

Durability: `checkpoint(at)` is called when everything before `at` is durable in the target; a later run starts there.
Threads: each worker has a writer of its own. The caller's thread shows progress, and is the one that an interrupt ends: the
workers end, then what they did is made durable.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cdpserver.copying.target import Target, Writer
from cdpserver.errors import CdpError

CHECKPOINT_S = 5.0
"""What an interruption costs at most, in time."""

FLUSH_BYTES = 64 << 20
"""Written since the last flush, then comes another one: the device writes while the rest is read; the end waits for little."""

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


class Work(ABC):
    """One run, to the end of a disk of `size` bytes."""

    def __init__(
        self,
        target: Target,
        *,
        size: int,
        sparse: bool,
        checkpoint: Callable[[int], None],
        progress: Callable[[int], None],
    ) -> None:
        """`sparse` looks for zeros in what is written; `progress` hears of bytes read so far."""
        self.copied = Copied()
        self._target = target
        self._size = size
        self._sparse = sparse
        self._checkpoint = checkpoint
        self._progress = progress
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._flushed_at = time.monotonic()
        self._flushed_bytes = 0
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    @abstractmethod
    def _workers(self) -> int:
        """How many there are."""

    @abstractmethod
    def _copy(self, writer: Writer) -> None:
        """What one worker does, until there is no more or `_stop` is set."""

    @abstractmethod
    def _done_before(self) -> int:
        """Everything before this offset is written. The lock is held."""

    def run(self) -> Copied:
        """Copy. CdpError of the first request that failed, KeyboardInterrupt; what was done by then is durable if it can be."""
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers())]
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
            at = self._done_before()
        self._target.flush()
        self._checkpoint(at)

    def _work(self) -> None:
        try:
            writer = self._target.writer()
            try:
                self._copy(writer)
            finally:
                writer.close()
        except BaseException as error:  # noqa: BLE001 - the rim of a thread; `run` raises it
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()

    def _sync_when_due(self) -> None:
        """By one of the workers."""
        with self._lock:
            done = self.copied.read
            late = time.monotonic() - self._flushed_at > CHECKPOINT_S
        if (late or done - self._flushed_bytes > FLUSH_BYTES) and self._flushing.acquire(blocking=False):
            try:
                self._flushed_bytes = done
                self._sync()
                self._flushed_at = time.monotonic()
            finally:
                self._flushing.release()

    def _put(self, writer: Writer, data: memoryview, offset: int) -> None:
        """Write data: all of it, or with `sparse` what is not zero."""
        if not self._sparse:
            writer.write(data, offset)
            return
        for zero, low, high in _runs(data, offset):
            if not zero:
                writer.write(data[low:high], offset + low)
                continue
            with self._lock:
                self.copied.skipped += high - low
            if not self._target.fresh:
                writer.zero(offset + low, offset + high)


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
