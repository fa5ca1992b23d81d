"""Makes a backup: decides what must be read, reads it once, and stores what is not stored yet.

    source -> chunk -> id (threads) -> known? -> compressed, encrypted (threads) -> pack
                                        yes: nothing more

Durability: packs as they fill; the backup itself last. Killed, it leaves chunks that `gc` takes away, and no backup.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cdpserver.errors import BrokenError, CorruptError, RefusedError
from cdpserver.progress import Progress, nobody
from cdpserver.repository import sessions
from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import ID_SIZE, PAGE_IDS, ZERO_ID, Kind, chunk_count
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.place import HeldCheck
from cdpserver.repository.record import FULL, INCREMENTAL, BackedUpDisk, Backup
from cdpserver.repository.repository import Repository
from cdpserver.repository.retain import retain
from cdpserver.repository.source import Source, UnknownChangeError

MAX_INCREMENTS = 63
"""A full backup follows after so many that read only what changed: it finds what any of them may have missed."""

WORKERS = min(8, os.cpu_count() or 1)
DEPTH = 2 * WORKERS
"""Chunks in memory on their way."""

NEW_REPOSITORY = "there is no backup of it in this repository"


@dataclass(frozen=True, slots=True)
class Choice:
    """How a backup is made, and why so. Incremental: what is read of each disk."""

    kind: str
    reason: str
    parent: Backup | None = None
    ranges: tuple[tuple[tuple[int, int], ...], ...] = ()


def choose(
    repository: Repository, sources: Sequence[Source], name: str, *, full: bool, max_increments: int
) -> Choice:
    """Incremental wherever what changed since an earlier backup is known for sure, and less than everything."""
    if full:
        return Choice(FULL, "a full one was asked for")
    parent = _parent(repository, sources, name)
    if parent is None:
        return Choice(FULL, NEW_REPOSITORY)
    if parent.increments >= max_increments:
        return Choice(FULL, f"{parent.increments} incremental ones followed the last full one")
    found = []
    for source in sources:
        disk = parent.disk(source.name)
        if disk is None:
            return Choice(FULL, f"backup {parent.id} has no {source.name}")
        try:
            ChunkList(repository, disk)
            for number in range(len(disk.pages)):
                if disk.pages[number] != ZERO_ID and not repository.has(disk.pages[number]):
                    raise CorruptError("its list is not all there")
            found.append(tuple(source.changed_since(disk)))
        except CorruptError as error:
            return Choice(FULL, f"backup {parent.id} is damaged: {error.message}")
        except UnknownChangeError as error:
            return Choice(FULL, str(error))
    if _is_all(sources, sum(map(_bytes, found))):
        return Choice(FULL, f"as much changed since backup {parent.id} as a full one reads")
    return Choice(INCREMENTAL, f"what changed since backup {parent.id} is known", parent, tuple(found))


def _is_all(sources: Sequence[Source], changed: int) -> bool:
    """Did as much change as is used? Block status is asked only as far as it takes to know."""
    used = 0
    for source in sources:
        for start, end in source.used():
            used += end - start
            if used > changed:
                return False
    return used > 0


def _bytes(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def _parent(repository: Repository, sources: Sequence[Source], name: str) -> Backup | None:
    """The newest backup of the same thing that is no later than this one."""
    seqs = {source.name: (source.timeline, source.seq) for source in sources}
    for id_ in reversed(repository.backup_ids()):
        try:
            backup = repository.backup(id_)
        except CorruptError:
            continue
        if backup.name.partition("@")[0] == name.partition("@")[0]:
            later = any(
                d.timeline == seqs[d.name][0] and d.seq > seqs[d.name][1]
                for d in backup.disks
                if d.name in seqs
            )
            if not later:
                return backup
    return None


@dataclass(frozen=True, slots=True)
class Known:
    """The id and time that a backup has already, elsewhere."""

    id: str
    created_ns: int


def back_up(
    repository: Repository,
    sources: Sequence[Source],
    name: str,
    *,
    full: bool = False,
    max_increments: int = MAX_INCREMENTS,
    tags: dict[str, str] | None = None,
    known: Known | None = None,
    progress: Progress = nobody,
) -> Backup:
    """All `sources` as one backup called `name`. NoSpaceError, BrokenError: then there is no backup."""
    assert sources
    started = time.monotonic()
    created_ns = time.time_ns() if known is None else known.created_ns
    id_ = sessions.new_id(created_ns) if known is None else known.id
    with sessions.session(repository.place, id_) as check_held:
        repository.refresh()
        choice = choose(repository, sources, name, full=full, max_increments=max_increments)
        with PackWriter(repository, id_) as writer, ThreadPoolExecutor(WORKERS) as pool:
            run = _Run(repository, writer, pool)
            disks = [
                run.disk(source, choice, number, progress, len(sources))
                for number, source in enumerate(sources)
            ]
            writer.flush()
        backup = Backup(
            id=id_,
            kind=choice.kind,
            reason=choice.reason,
            created_ns=created_ns,
            name=name,
            disks=tuple(disks),
            parent=choice.parent.id if choice.parent is not None else "",
            increments=choice.parent.increments + 1 if choice.parent is not None else 0,
            read_bytes=run.read_bytes,
            new_bytes=run.new_bytes,
            stored_bytes=writer.stored_bytes,
            seconds=round(time.monotonic() - started, 3),
            tags=tags or {},
            since_ns=repository.now_ns(),
        )
        retain(repository, backup)
        _publish(repository, backup, check_held)
    return backup


def _publish(repository: Repository, backup: Backup, check_held: HeldCheck) -> None:
    """Now it is a backup, unless `gc` may have taken this session for dead, and chunks from under it. BrokenError."""
    check_held()
    repository.write_backup(backup)
    try:
        check_held()
    except BrokenError:
        with contextlib.suppress(
            RefusedError
        ):  # immutable already: `cdp repo check` says whether it is whole
            repository.place.delete(f"backups/{backup.id}")
        raise


class _Run:
    """What is under way for one backup."""

    def __init__(self, repository: Repository, writer: PackWriter, pool: ThreadPoolExecutor) -> None:
        self._repository = repository
        self._writer = writer
        self._pool = pool
        self._zeros: dict[int, bytes] = {}
        self.read_bytes = 0
        self.new_bytes = 0

    def disk(
        self, source: Source, choice: Choice, number: int, progress: Progress, disks: int
    ) -> BackedUpDisk:
        """Read and store one disk."""
        step = self._repository.chunk_size
        count = chunk_count(source.size, step)
        old: ChunkList | None = None
        ranges: Iterable[tuple[int, int]] = source.used()
        if choice.parent is not None:
            before = choice.parent.disk(source.name)
            assert before is not None
            old = ChunkList(self._repository, before)
            ranges = choice.ranges[number]
        pages: dict[int, bytearray] = {}

        def put(chunk: int, id_: bytes) -> None:
            page = chunk // PAGE_IDS
            if page not in pages:
                length = min(PAGE_IDS, count - page * PAGE_IDS) * ID_SIZE
                pages[page] = bytearray(old.page(page) if old is not None else length)
            at = chunk % PAGE_IDS * ID_SIZE
            pages[page][at : at + ID_SIZE] = id_
            progress((number + min(chunk + 1, count) / max(count, 1)) / disks)

        self._store(source, chunks_of(ranges, step), put)
        return BackedUpDisk(
            name=source.name,
            timeline=source.timeline,
            seq=source.seq,
            time_ns=source.time_ns,
            size=source.size,
            grade=source.grade,
            pages=tuple(self._pages(pages, old, count)),
            chunks=self._used(pages, old, count),
        )

    def _store(self, source: Source, chunks: Iterator[int], put: Callable[[int, bytes], None]) -> None:
        """Every chunk's id to `put`, in order; those that are new into packs."""
        step = self._repository.chunk_size
        named: deque[tuple[int, bytearray, Future[bytes]]] = deque()
        sealed: deque[tuple[bytes, int, Future[tuple[bytes, int]]]] = deque()

        def add_sealed(most: int) -> None:
            while len(sealed) > most:
                id_, length, future = sealed.popleft()
                self._writer.add(id_, Kind.DATA, length, future.result())

        def add_named(most: int) -> None:
            while len(named) > most:
                chunk, content, future = named.popleft()
                id_ = future.result()
                if id_ == self._zero(len(content)):
                    put(chunk, ZERO_ID)
                    continue
                put(chunk, id_)
                if self._writer.claim(id_):
                    self.new_bytes += len(content)
                    sealed.append(
                        (id_, len(content), self._pool.submit(self._repository.seal, id_, Kind.DATA, content))
                    )
                    add_sealed(DEPTH)

        for chunk in chunks:
            content = bytearray(min(step, source.size - chunk * step))
            source.read_into(content, chunk * step)
            self.read_bytes += len(content)
            named.append((chunk, content, self._pool.submit(self._repository.id, content)))
            add_named(DEPTH)
        add_named(0)
        add_sealed(0)

    def _zero(self, length: int) -> bytes:
        if length not in self._zeros:
            self._zeros[length] = self._repository.id(bytes(length))
        return self._zeros[length]

    def _pages(self, pages: dict[int, bytearray], old: ChunkList | None, count: int) -> Iterator[bytes]:
        for number in range(-(-count // PAGE_IDS)):
            if number not in pages:
                yield old.disk.pages[number] if old is not None else ZERO_ID
                continue
            content = bytes(pages[number])
            if not any(content):
                yield ZERO_ID
                continue
            id_ = self._repository.id(content)
            if self._writer.claim(id_):
                self._writer.add(id_, Kind.PAGE, len(content), self._repository.seal(id_, Kind.PAGE, content))
            yield id_

    def _used(self, pages: dict[int, bytearray], old: ChunkList | None, count: int) -> int:
        used = 0
        for number in range(-(-count // PAGE_IDS)):
            if number in pages:
                content = bytes(pages[number])
            elif old is not None and old.disk.pages[number] != ZERO_ID:
                content = old.page(number)
            else:
                continue
            used += sum(content[at : at + ID_SIZE] != ZERO_ID for at in range(0, len(content), ID_SIZE))
        return used


def chunks_of(ranges: Iterable[tuple[int, int]], step: int) -> Iterator[int]:
    """Numbers of the chunks that ascending ranges touch, each once."""
    following = 0
    for start, end in ranges:
        if end > start:
            first = max(start // step, following)
            following = max(following, -(-end // step))
            yield from range(first, following)
