r"""The digest of a large payload, taken while its bytes are copied into the data file.

    writer --large payload--> queue --> one thread a process: BLAKE3     both release the GIL, so they use two processors
       \--------------------> pwrite --> the digest: waited for, or, where that thread has not come to it, taken here

Of 1 MiB BLAKE3 takes about as long as `pwrite`. Where no processor is free nothing is lost: whoever comes first takes the digest.
"""

import _thread
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue

from cdpserver import memory
from cdpserver.journal.record import payload_digest

LARGE = 256 << 10
"""Bytes from which on a hand-over (some 20 us) is worth it."""


class Digest:
    """Of one payload, taken by whoever comes first."""

    __slots__ = ("_claim", "_digest", "_done", "_payload")

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._digest = b""
        self._claim = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()

    def take(self) -> None:
        """Take the digest, unless the other thread does."""
        if self._claim.acquire(blocking=False):
            try:
                self._digest = payload_digest(self._payload)
            finally:
                self._done.release()

    def result(self) -> bytes:
        """The digest; nobody looks at the payload any more."""
        self.take()
        with self._done:
            return self._digest or payload_digest(self._payload)  # the other thread may have had no memory


_asked: SimpleQueue[Digest] = SimpleQueue()
_starting = threading.Lock()
_started = _runs = False


def beside(payload: memoryview, copy: Callable[[memoryview], int]) -> tuple[int, bytes]:
    """What `copy(payload)` returns, and the digest of `payload`, taken meanwhile. Nobody looks at the payload afterwards."""
    if not _started:
        _start()
    one = Digest(payload)
    if _runs:
        _asked.put(one)
    try:
        place = copy(payload)
    finally:
        digest = one.result()
    return place, digest


def _start() -> None:
    """Not by `threading`: see `cdpserver/memory.py`. Where no thread begins, whoever waits takes all digests himself."""
    global _started
    with _starting:
        if not _started:
            _started = True
            with contextlib.suppress(RuntimeError):
                _thread.start_new_thread(_run, ())


def _run() -> None:
    global _runs
    _runs = True
    while True:
        with contextlib.suppress(*memory.NONE):
            _asked.get().take()  # kept no longer: its payload belongs to a request
