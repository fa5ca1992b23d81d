"""One connection to an NBD export, as copying needs it; no other module of the copying knows libnbd.

Errors: CutError when the connection is lost or nobody listens (try again), RefusedError when the server does not give the export
(any more), NoSpaceError, and BrokenError for any other request that fails.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import nbd

from cdpserver import durable
from cdpserver.copying.plan import Extents
from cdpserver.errors import BrokenError, CdpError, NoSpaceError, RefusedError

STATUS_BYTES = 1 << 30
"""Asked for at a time: the wire's lengths have 32 bits."""

ALLOCATION = "base:allocation"
ZERO = 2


class CutError(BrokenError):
    """The other side is gone, for now or for good."""

    kind = "cut"
    usual_hint = "look whether the server runs, then give the same command again: it goes on from there"


class Connection:
    """A connection that waits for its own requests; one thread uses it at a time."""

    def __init__(self, uri: str, *, writes: bool = False) -> None:
        self.uri = uri
        self._nbd: Any = nbd.NBD()
        self._nbd.add_meta_context(ALLOCATION)
        self._nbd.set_opt_mode(True)
        try:
            self._nbd.connect_uri(uri)
        except nbd.Error as error:
            raise CutError(f"no answer at {uri}: {_said(error)}") from None
        try:
            self._nbd.opt_go()
        except nbd.Error as error:
            raise RefusedError(
                f"{uri} is refused: {_said(error)}", hint="the server's log or `cdp event list` says why"
            ) from None
        if writes and self._nbd.is_read_only():
            self.close()
            raise RefusedError(f"{uri} is read-only", hint="serve it writable, or name another output")
        self.size: int = self._nbd.get_size()
        self.shared: bool = self._nbd.can_multi_conn()
        self._zeroes: bool = self._nbd.can_zero()
        self._flushes: bool = self._nbd.can_flush()

    def data(self) -> Extents:
        """What is not known to read as zeros."""
        found = Extents(self.size)
        if not self._nbd.can_meta_context(ALLOCATION):
            found.add(0, self.size)
            return found
        at = 0
        while at < self.size:
            for end, zero in self._runs(at):
                if not zero:
                    found.add(at, end)
                at = end
        return found

    def _runs(self, at: int) -> Iterator[tuple[int, bool]]:
        entries: list[int] = []

        def take(context: str, offset: int, runs: list[int], error: Any) -> int:
            if context == ALLOCATION:
                entries.extend(runs)
            return 0

        with _requests(self, f"block status at {at}"):
            self._nbd.block_status(min(STATUS_BYTES, self.size - at), at, take)
        if not entries or not any(entries[::2]):
            raise BrokenError(f"{self.uri} says nothing about its blocks at {at}", hint="look at its server")
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            at += length
            yield at, bool(flags & ZERO)

    def begin_read(self, buffer: bytearray | memoryview, offset: int, length: int) -> int:
        """Ask for bytes; they are in the buffer after `wait`. It must stay until then."""
        with _requests(self, f"reading at {offset}"):
            cookie: int = self._nbd.aio_pread(nbd.Buffer.from_buffer(memoryview(buffer)[:length]), offset)
        return cookie

    def wait(self, cookie: int, offset: int) -> None:
        """The end of a read at `offset`."""
        with _requests(self, f"reading at {offset}"):
            while not self._nbd.aio_command_completed(cookie):
                self._nbd.poll(-1)

    def read_into(self, buffer: bytearray, offset: int, length: int) -> None:
        """Bytes from `offset` on, at the buffer's beginning."""
        self.wait(self.begin_read(buffer, offset, length), offset)

    def write(self, data: memoryview, offset: int) -> None:
        """All of `data`."""
        with _requests(self, f"writing at {offset}"):
            self._nbd.pwrite(data, offset)

    def zero(self, start: int, end: int) -> None:
        """Let a range read as zeros; the server may give its room back."""
        if not self._zeroes:
            self.write(memoryview(bytes(end - start)), start)
            return
        with _requests(self, f"zeroing at {start}"):
            self._nbd.zero(end - start, start)

    def flush(self) -> None:
        """What was written is durable, as far as the server has any such thing."""
        if self._flushes:
            with _requests(self, "flushing"):
                self._nbd.flush()

    @property
    def lost(self) -> bool:
        """Is the other side gone?"""
        return bool(self._nbd.aio_is_dead() or self._nbd.aio_is_closed())

    def close(self) -> None:
        """Leave, whatever is under way."""
        if not self.lost and not self._nbd.aio_in_flight():
            with contextlib.suppress(nbd.Error):
                self._nbd.shutdown()
        # Its handle is closed with its last reference.
        self._nbd = None


class _requests:
    """Turns libnbd's errors into ours."""

    def __init__(self, connection: Connection, doing: str) -> None:
        self._connection = connection
        self._doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, nbd.Error):
            raise self._ours(error) from None

    def _ours(self, error: Any) -> CdpError:
        what = f"{self._doing} of {self._connection.uri}: {_said(error)}"
        if self._connection.lost:
            return CutError(f"connection lost, {what}")
        if error.errnum in durable.NO_SPACE:
            return NoSpaceError(what, hint="make room there, then give the same command again")
        return BrokenError(what, hint="the server's log or `cdp event list` says why")


def _said(error: Any) -> str:
    return str(error.string).partition(": ")[2] or str(error.string)
