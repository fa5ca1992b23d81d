"""Copies an NBD export to a target: several requests in flight.

Threads: every worker has a connection to read from and a writer; while it writes a chunk its next one is under way.
"""

from collections.abc import Callable, Iterator

from cdpserver.copying.nbdend import Connection
from cdpserver.copying.plan import CHUNK, Chunk, Extents, Watermark, chunks
from cdpserver.copying.target import Target, Writer
from cdpserver.copying.work import Work

WORKERS = 3
"""Connections to read from, two requests each."""


class Copy(Work):
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
        super().__init__(target, size=extents.size, sparse=sparse, checkpoint=checkpoint, progress=progress)
        self._uri = uri
        self._steps: Iterator[Chunk] = chunks(extents, zeros=not target.fresh, start=start)
        self._mark = Watermark(start)

    def _workers(self) -> int:
        return WORKERS

    def _done_before(self) -> int:
        return self._mark.at

    def _copy(self, writer: Writer) -> None:
        source = Connection(self._uri)
        try:
            self._copy_from(source, writer)
        finally:
            source.close()

    def _copy_from(self, source: Connection, writer: Writer) -> None:
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
            self._put(writer, data[start - chunk.start : end - chunk.start], start)

    def _done(self, chunk: Chunk) -> None:
        with self._lock:
            self._mark.end(chunk)
            if chunk.parts:
                self.copied.read += chunk.bytes
            else:
                self.copied.zeroed += chunk.end - chunk.start
        self._sync_when_due()
