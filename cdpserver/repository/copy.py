"""Backups into a second repository, each with its id: it may have another chunk size, another key, or none.

Read is what the other one lacks: where it has an earlier backup of the same disk, the two lists of chunks say what changed.
Durability: as any backup's; a copy that was killed is none, and the next one goes on with what it stored.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cdpserver.errors import CorruptError
from cdpserver.progress import Progress, nobody, part
from cdpserver.repository.content import Content, may_differ
from cdpserver.repository.record import BackedUpDisk, Backup
from cdpserver.repository.repository import Repository
from cdpserver.repository.source import UnknownChangeError
from cdpserver.repository.take import MAX_INCREMENTS, Known, back_up


class CopiedSource:
    """A disk of a backup as the source of another one."""

    def __init__(self, repository: Repository, disk: BackedUpDisk, before: Sequence[Backup]) -> None:
        """`before` are the backups of this repository that the other one may have, too."""
        self._repository, self._disk, self._before = repository, disk, before
        self._content = Content(repository, disk)
        self.name = disk.name
        self.timeline = disk.timeline
        self.seq = disk.seq
        self.time_ns = disk.time_ns
        self.size = disk.size
        self.grade = disk.grade
        self.image = disk.image

    def used(self) -> Iterator[tuple[int, int]]:
        """Chunks that are not zeros."""
        for start, end, zero in self._content.status(0, self.size, one=False):
            if not zero:
                yield start, end

    def changed_since(self, disk: BackedUpDisk) -> list[tuple[int, int]]:
        """Places that are not made of the same as at the same instant here; of those whose chunk is, what is patched."""
        here = next((found for found in self._same(disk) if found.size == self.size), None)
        if here is None:
            raise UnknownChangeError("the backup that is there is not here any more, or of another size")
        old, new = Content(self._repository, here).chunks, self._content.chunks
        found: list[tuple[int, int]] = []
        for number in range(new.count):
            for low, high in may_differ(old.made_of(number), new.made_of(number), new.length(number)):
                start = number * new.step
                if found and found[-1][1] == start + low:
                    found[-1] = found[-1][0], start + high
                else:
                    found.append((start + low, start + high))
        return found

    def _same(self, disk: BackedUpDisk) -> Iterator[BackedUpDisk]:
        """The disk at that instant, in the backups of this repository."""
        for backup in reversed(self._before):
            held = backup.disk(disk.name)
            if held is not None and (held.timeline, held.seq) == (disk.timeline, disk.seq):
                yield held

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Chunks, compared with their ids."""
        self._content.read_into(buffer, offset)


@dataclass(frozen=True, slots=True)
class Copied:
    """What a run did; `damaged` are backups that cannot be read whole here, with the reason."""

    copied: tuple[Backup, ...]
    there: int
    damaged: tuple[tuple[str, str], ...]


def copy(
    source: Repository,
    target: Repository,
    *,
    wanted: Callable[[Backup], bool] = lambda _: True,
    progress: Progress = nobody,
) -> Copied:
    """Every `wanted` backup that the other one lacks, oldest first. One that is damaged stops no other."""
    held = list(source.backups())
    there = set(target.backup_ids())
    meant = [backup for backup in held if wanted(backup)]
    lacking = [backup for backup in meant if backup.id not in there]
    copied, damaged = [], []
    for number, backup in enumerate(lacking):
        told = part(progress, number / len(lacking), (number + 1) / len(lacking))
        try:
            sources = [CopiedSource(source, disk, held) for disk in backup.disks]
            known = Known(backup.id, backup.created_ns, backup.order[0])
            copied.append(
                back_up(
                    target,
                    sources,
                    backup.name,
                    tags=backup.tags,
                    known=known,
                    max_increments=MAX_INCREMENTS,
                    progress=told,
                )
            )
        except CorruptError as error:
            damaged.append((backup.id, error.message))
    progress(1.0)
    return Copied(tuple(copied), len(meant) - len(lacking), tuple(damaged))
