"""What a backup changes against another one of the same disk: the content of a layer of a chain.

    this backup    | a | b | c | d |
    the other      | a | x | c | 0 |
    the layer      |   | b |   | d |      in a chunk that differs, only the blocks that do

Threads: none; every connection has its own.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from cdpserver.copying.compare import differing
from cdpserver.errors import CorruptError
from cdpserver.repository.content import Content, Made, may_differ
from cdpserver.repository.format import ZERO_ID

DATA, HOLE, HOLE_ZERO = 0, 1, 3
"""As NBD's base:allocation has it: a hole that is not zero is what the backing file has."""

CLUSTER = 64 << 10
"""What a QCOW2 file holds at least."""

ZEROS: Made = (ZERO_ID, None)

KEPT = 256
"""Places whose differences are remembered: who asks for status reads them next."""


class Layer:
    """A disk of one backup against the same disk of another."""

    def __init__(self, content: Content, other: Content) -> None:
        """CorruptError if the disk had another size then."""
        if content.size != other.size:
            raise CorruptError("the disk had another size in that backup")
        self._content, self._other = content, other
        self.size = content.size
        self._step = content.chunks.step
        self._runs: OrderedDict[int, list[tuple[int, int, int]]] = OrderedDict()

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """The bytes of this backup, whether they are another one's too."""
        self._content.read_into(buffer, offset)

    def status(self, offset: int, end: int, *, one: bool) -> list[tuple[int, int, int]]:
        """(start, end, type) runs from `offset` on: the first one, or (not `one`) those up to `end`."""
        found: list[tuple[int, int, int]] = []
        at = offset
        while at < end:
            for low, high, kind in self._chunk(at // self._step):
                start, stop = max(low, at), min(high, end)
                if start >= stop:
                    continue
                if found and found[-1][2] == kind:
                    found[-1] = (found[-1][0], stop, kind)
                elif found and one:
                    return found
                else:
                    found.append((start, stop, kind))
                at = stop
        return found

    def _chunk(self, number: int) -> list[tuple[int, int, int]]:
        """The runs of one place."""
        start = number * self._step
        length = self._content.chunks.length(number)
        mine, theirs = self._content.chunks.made_of(number), self._other.chunks.made_of(number)
        if mine == theirs:
            return [(start, start + length, HOLE)]
        if mine == ZEROS:
            return [(start, start + length, HOLE_ZERO)]
        if theirs == ZEROS and mine[1] is None:
            return [(start, start + length, DATA)]
        if number not in self._runs:
            if mine[0] == theirs[0]:
                clusters = _clusters(may_differ(mine, theirs, length))
            else:
                new, old = self._content.read(start, length), self._other.read(start, length)
                clusters = differing(memoryview(new), memoryview(old), block=CLUSTER)
            self._runs[number] = self._runs_of(clusters, start, length)
            if len(self._runs) > KEPT:
                self._runs.popitem(last=False)
        return self._runs[number]

    def _runs_of(
        self, clusters: Iterable[tuple[int, int]], start: int, length: int
    ) -> list[tuple[int, int, int]]:
        runs: list[tuple[int, int, int]] = []
        at = 0
        for low, high in clusters:
            if at < low:
                runs.append((start + at, start + low, HOLE))
            runs.append((start + low, start + high, DATA))
            at = high
        if at < length:
            runs.append((start + at, start + length, HOLE))
        return runs

    def close(self) -> None:
        """Forget what is kept."""
        self._content.close()
        self._other.close()


def _clusters(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Those that ascending ranges touch, as runs."""
    last: tuple[int, int] | None = None
    for low, high in ranges:
        start, end = low // CLUSTER * CLUSTER, -(-high // CLUSTER) * CLUSTER
        if last is not None and start <= last[1]:
            last = last[0], end
            continue
        if last is not None:
            yield last
        last = start, end
    if last is not None:
        yield last
