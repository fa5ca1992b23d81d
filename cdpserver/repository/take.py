"""Makes a backup: decides what must be read, reads it once, and stores what is not stored yet.

The way from the source into packs is pipeline.py's.

Durability: packs as they fill; the backup itself last. Killed, it leaves chunks that `gc` takes away, and no backup.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cdpserver.errors import BrokenError, CorruptError, NotFoundError, RefusedError
from cdpserver.progress import Progress, nobody, part
from cdpserver.repository import sessions
from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import chunk_count
from cdpserver.repository.increment import Increment
from cdpserver.repository.listing import Listing
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.pipeline import Pipeline
from cdpserver.repository.place import HeldCheck
from cdpserver.repository.record import FULL, INCREMENTAL, BackedUpDisk, Backup
from cdpserver.repository.repository import Repository
from cdpserver.repository.retain import retain
from cdpserver.repository.source import Source, UnknownChangeError

MAX_INCREMENTS = 63
"""A full backup follows after so many that read only what changed: it finds what any of them may have missed."""

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
            found.append(tuple(source.changed_since(disk)))
            check_chunks(repository, disk)
        except CorruptError as error:
            return Choice(FULL, f"backup {parent.id} is damaged: {error.message}")
        except UnknownChangeError as error:
            return Choice(FULL, str(error))
    if _is_all(sources, sum(map(_bytes, found))):
        return Choice(FULL, f"as much changed since backup {parent.id} as a full one reads")
    return Choice(INCREMENTAL, f"what changed since backup {parent.id} is known", parent, tuple(found))


def check_list(repository: Repository, disk: BackedUpDisk) -> None:
    """Is the list of a disk's chunks all there? CorruptError: nothing can be built on it."""
    ChunkList(repository, disk)
    if not all(map(repository.has, (*disk.pages, *disk.patches))):
        raise CorruptError("its list is not all there")


def check_chunks(repository: Repository, disk: BackedUpDisk) -> None:
    """Has all that it needs a place still? CorruptError. A second and more for each TiB, and nothing is read of a chunk: what is
    in its place is for `cdp repo check` to say, and counts here once it was said.
    """
    check_list(repository, disk)
    chunks = ChunkList(repository, disk)
    for number in range(len(disk.pages)):
        repository.check_stored(chunks.named(number, set()))


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
    """The backup of the same thing whose instant is the newest that is no later than this one's; of several the newest."""
    seqs = {source.name: (source.timeline, source.seq) for source in sources}
    found: list[tuple[int, tuple[int, str]]] = []
    for brief in repository.briefs():
        if brief.subject != name.partition("@")[0]:
            continue
        same = [
            (seq, seqs[disk][1])
            for disk, (timeline, seq) in brief.seqs.items()
            if disk in seqs and timeline == seqs[disk][0]
        ]
        if all(seq <= mine for seq, mine in same):
            found.append((sum(seq for seq, _ in same), brief.order))
    for _, (_, id_) in sorted(found, reverse=True):
        with contextlib.suppress(CorruptError, NotFoundError):
            return repository.backup(id_)
    return None


@dataclass(frozen=True, slots=True)
class Known:
    """The id and times that a backup has already, elsewhere."""

    id: str
    created_ns: int
    made_ns: int


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
        with (
            PackWriter(repository, id_) as writer,
            contextlib.closing(Pipeline(repository, writer)) as pipeline,
        ):
            disks = [
                _store(
                    repository,
                    writer,
                    pipeline,
                    source,
                    choice,
                    number,
                    part(progress, number / len(sources), (number + 1) / len(sources)),
                )
                for number, source in enumerate(sources)
            ]
            writer.flush()
        now_ns = repository.now_ns()
        backup = Backup(
            id=id_,
            kind=choice.kind,
            reason=choice.reason,
            created_ns=created_ns,
            name=name,
            disks=tuple(disks),
            parent=choice.parent.id if choice.parent is not None else "",
            increments=choice.parent.increments + 1 if choice.parent is not None else 0,
            read_bytes=pipeline.read_bytes,
            new_bytes=pipeline.new_bytes,
            stored_bytes=writer.stored_bytes,
            seconds=round(time.monotonic() - started, 3),
            tags=tags or {},
            since_ns=now_ns,
            made_ns=now_ns if known is None else known.made_ns,
        )
        publish(repository, backup, check_held)
    return backup


def publish(repository: Repository, backup: Backup, check_held: HeldCheck) -> None:
    """Now it is a backup, unless `gc` may have taken this session for dead, and chunks from under it. BrokenError."""
    retain(repository, backup)
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
    repository.note_made(backup.id)


def _store(
    repository: Repository,
    writer: PackWriter,
    pipeline: Pipeline,
    source: Source,
    choice: Choice,
    number: int,
    progress: Progress,
) -> BackedUpDisk:
    """Read and store one disk, which is number `number` of the backup."""
    step = repository.chunk_size
    count = chunk_count(source.size, step)
    old: ChunkList | None = None
    ranges: Iterable[tuple[int, int]] = source.used()
    if choice.parent is not None:
        before = choice.parent.disk(source.name)
        assert before is not None
        old = ChunkList(repository, before)
        ranges = choice.ranges[number]
    made = Listing(writer, old, count=count, step=step)

    def told(places: int) -> None:
        progress(min(places, count) / max(count, 1))

    def put(chunk: int, id_: bytes) -> None:
        made.put(chunk, id_)
        told(chunk + 1)

    if old is None:
        pipeline.store(source, chunks_of(ranges, step), put)
    else:
        Increment(source, old, made, pipeline).store(ranges, told)
    listed = made.end()
    return BackedUpDisk(
        name=source.name,
        timeline=source.timeline,
        seq=source.seq,
        time_ns=source.time_ns,
        size=source.size,
        grade=source.grade,
        pages=listed.pages,
        chunks=listed.chunks,
        image=source.image,
        patches=listed.patches,
        patched=listed.patched,
    )


def chunks_of(ranges: Iterable[tuple[int, int]], step: int) -> Iterator[int]:
    """Numbers of the chunks that ascending ranges touch, each once."""
    following = 0
    for start, end in ranges:
        if end > start:
            first = max(start // step, following)
            following = max(following, -(-end // step))
            yield from range(first, following)
