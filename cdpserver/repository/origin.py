"""A disk of a backup as something to be copied and compared, in this process and without an export.

What is compared is read from the other side only: its digest is the chunk's id, or it holds something else. A place that is
patched has no id, and is read here, too.
"""

from collections.abc import Callable, Iterable, Iterator

from cdpserver.copying.compare import Compared, Comparing, mend
from cdpserver.copying.nbdend import Connection
from cdpserver.copying.plan import CHUNK, Chunk, Extents
from cdpserver.copying.target import Target, Writer
from cdpserver.copying.work import Copied
from cdpserver.repository.content import ChunkList, Made, Patches
from cdpserver.repository.format import ZERO_ID
from cdpserver.repository.record import BackedUpDisk
from cdpserver.repository.repository import Repository
from cdpserver.repository.restore import Restore


class BackupOrigin:
    """One disk of one backup; the repository is the caller's."""

    def __init__(self, repository: Repository, disk: BackedUpDisk) -> None:
        """CorruptError if its list of chunks cannot be that of a disk of its size."""
        self._repository = repository
        self._chunks = ChunkList(repository, disk)
        self.size = disk.size

    def data(self) -> Extents:
        """Chunks that are not zeros."""
        found = Extents(self.size)
        for number in self._chunks.used():
            found.add(number * self._chunks.step, (number + 1) * self._chunks.step)
        return found

    def copy(
        self,
        target: Target,
        extents: Extents,
        *,
        start: int,
        sparse: bool,
        checkpoint: Callable[[int], None],
        progress: Callable[[int], None],
    ) -> Copied:
        """Its list of chunks says what `extents` would."""
        return Restore(
            self._repository, self._chunks, target, start=start, sparse=sparse, checkpoint=checkpoint, progress=progress
        ).run()  # fmt: skip

    def compare(
        self,
        other: str,
        steps: Iterable[Chunk],
        progress: Callable[[int], None],
        *,
        upto: int,
        mend: bool = False,
    ) -> Compared:
        """Whole chunks."""
        whole = self._whole(steps, upto)
        return _Comparison(self._repository, self._chunks, other, whole, progress, mend=mend).run()

    def _whole(self, steps: Iterable[Chunk], upto: int) -> Iterator[tuple[int, int]]:
        """The chunks that ascending steps touch, as [start, end), each once."""
        step, following = self._chunks.step, 0
        for asked in steps:
            for number in range(max(following, asked.start // step), -(-asked.end // step)):
                following = number + 1
                end = number * step + self._chunks.length(number)
                if end <= upto:
                    yield number * step, end


class _Comparison(Comparing):
    """Of an export with the ids of a disk's chunks."""

    def __init__(
        self,
        repository: Repository,
        chunks: ChunkList,
        other: str,
        steps: Iterator[tuple[int, int]],
        progress: Callable[[int], None],
        *,
        mend: bool,
    ) -> None:
        super().__init__(other, steps, progress, mend=mend)
        self._repository = repository
        self._chunks = chunks
        self._patches = Patches(repository)

    def _compare(self, right: Connection, writer: Writer | None) -> None:
        buffer = bytearray(self._chunks.step)
        while (step := self._next()) is not None:
            start, end = step
            there = memoryview(buffer)[: end - start]
            pieces = [(at, there[at - start : at - start + CHUNK]) for at in range(start, end, CHUNK)]
            reads = [(at, right.begin_read(piece, at, len(piece))) for at, piece in pieces]
            for at, cookie in reads:
                right.wait(cookie, at)
            with self._lock:
                made = self._chunks.made_of(start // self._chunks.step)
            same, written = self._is_same(made, there), 0
            if not same and writer is not None:
                wanted = memoryview(self._patches.place(made, len(there)))
                written = mend(writer, wanted, there, start)
            self._done(start, end, same=same, written=written)

    def _is_same(self, made: Made, there: memoryview) -> bool:
        id_, patch = made
        if patch is not None:
            return memoryview(self._patches.place(made, len(there))) == there
        expected = self._repository.id_of_zeros(len(there)) if id_ == ZERO_ID else id_
        return self._repository.id(there) == expected
