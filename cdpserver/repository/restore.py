"""A disk of a backup written out, in this process and without an export.

A stretch of the disk at a time, its chunks are read in the order of the packs, opened, compared with their ids, patched where
that is so, and written, by several workers at once.

Memory: a worker has one run and two chunks, and their number goes down as chunks get larger: IN_FLIGHT_BYTES in all, or what two
workers have. The patches that are kept come on top (content.py).
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cdpserver.copying.plan import Chunk, zeros_of
from cdpserver.copying.target import Target, Writer
from cdpserver.copying.work import Work
from cdpserver.errors import CorruptError
from cdpserver.repository.content import ChunkList, Patches
from cdpserver.repository.packed import RUN_BYTES, Run, Wanted, runs
from cdpserver.repository.patches import Patch
from cdpserver.repository.repository import Repository

MOST_WORKERS = 8
"""More than there are processors: a NAS or an object store takes its time for each request."""

IN_FLIGHT_BYTES = 32 << 20

STRETCH_BYTES = 32 << 20
"""Of the disk, whose chunks are put in the order of the packs. What is interrupted is resumed at the beginning of one."""


def workers(step: int) -> int:
    """For chunks of that size."""
    return max(2, min(MOST_WORKERS, IN_FLIGHT_BYTES // (max(step, RUN_BYTES) + 2 * step)))


@dataclass(slots=True)
class _Stretch:
    """Of the disk, from `start` on; `open` jobs of it are not done yet."""

    start: int
    patches: dict[int, Patch]
    open: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """A run to be read and written, or zeros to be written."""

    stretch: _Stretch
    what: Run | Chunk


class Restore(Work):
    """One run of writing a disk to a target, from `start` to the end."""

    def __init__(
        self,
        repository: Repository,
        chunks: ChunkList,
        target: Target,
        *,
        start: int = 0,
        sparse: bool = False,
        checkpoint: Callable[[int], None] = lambda _: None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """The chunk that `start` lies in is written whole."""
        super().__init__(
            target, size=chunks.disk.size, sparse=sparse, checkpoint=checkpoint, progress=progress
        )
        self._repository = repository
        self._chunks = chunks
        self._patches = Patches(repository)
        self._at = start if start == chunks.disk.size else start - start % chunks.step
        """Where the stretches end that were begun."""
        self._stretches: deque[_Stretch] = deque()
        self._jobs = self._all_jobs()

    def _workers(self) -> int:
        return workers(self._chunks.step)

    def _done_before(self) -> int:
        while self._stretches and not self._stretches[0].open:
            self._stretches.popleft()
        return self._stretches[0].start if self._stretches else self._at

    def _all_jobs(self) -> Iterator[_Job]:
        """Whoever goes on with this holds the lock."""
        for end, numbers in self._cut():
            patches = ((number, self._chunks.patch(number)) for number in numbers)
            stretch = _Stretch(self._at, {number: patch for number, patch in patches if patch is not None})
            wanted = [(number, self._chunks.id(number)) for number in numbers]
            jobs = [_Job(stretch, run) for run in runs(wanted, self._repository.places)]
            if not self._target.fresh:
                jobs += [_Job(stretch, zeros) for zeros in self._zeros(self._at, end, numbers)]
            stretch.open = len(jobs)
            self._stretches.append(stretch)
            self._at = end
            yield from jobs

    def _cut(self) -> Iterator[tuple[int, list[int]]]:
        """The rest of the disk in stretches: where each ends, and its chunks that are not zeros."""
        step = self._chunks.step
        first, most = self._at // step, max(1, STRETCH_BYTES // step)
        numbers: list[int] = []
        for number in self._chunks.used():
            if number < first:
                continue
            numbers.append(number)
            if len(numbers) == most:
                yield min((number + 1) * step, self._size), numbers
                numbers = []
        if self._at < self._size:
            yield self._size, numbers

    def _zeros(self, start: int, end: int, numbers: list[int]) -> Iterator[Chunk]:
        """What is between those chunks."""
        for number in numbers:
            yield from zeros_of(start, number * self._chunks.step)
            start = (number + 1) * self._chunks.step
        yield from zeros_of(start, end)

    def _copy(self, writer: Writer) -> None:
        while not self._stop.is_set():
            with self._lock:
                job = next(self._jobs, None)
            if job is None:
                return
            read = zeroed = 0
            if isinstance(job.what, Run):
                read = self._write(writer, job.what, job.stretch.patches)
            else:
                writer.zero(job.what.start, job.what.end)
                zeroed = job.what.end - job.what.start
            with self._lock:
                self.copied.read += read
                self.copied.zeroed += zeroed
                job.stretch.open -= 1
            self._sync_when_due()

    def _write(self, writer: Writer, run: Run, patches: Mapping[int, Patch]) -> int:
        """Bytes of the disk."""
        written = 0
        stored = read_run(self._repository, run)
        for wanted in run.wanted:
            length = self._chunks.length(wanted.numbers[0])
            content = memoryview(opened(self._repository, run, stored, wanted, length))
            for number in wanted.numbers:
                patch = patches.get(number)
                if patch is None:
                    self._put(writer, content, number * self._chunks.step)
                else:
                    place = patch.over(content, self._patches.get(patch))
                    self._put(writer, memoryview(place), number * self._chunks.step)
                written += length
        return written


def read_run(repository: Repository, run: Run) -> bytes:
    """Nothing where that pack is not there (any more) or too short: `opened` looks elsewhere."""
    if not run.pack:
        return b""
    try:
        return repository.place.read(run.pack, run.start, run.end - run.start)
    except (FileNotFoundError, CorruptError):
        return b""


def opened(repository: Repository, run: Run, stored: bytes, wanted: Wanted, length: int) -> bytes:
    """A chunk of what was read, verified; from another pack if it is damaged there. CorruptError if it is nowhere whole."""
    entry = wanted.entry
    if entry is not None and stored and entry.raw == length:
        at = entry.place - run.start
        try:
            return repository.opened(
                wanted.id, entry.kind, entry.codec, entry.raw, stored[at : at + entry.stored]
            )
        except CorruptError:
            return repository.load(wanted.id, length)
    return repository.load(wanted.id, length)
