"""Full or incremental: which earlier backup QEMU's dirty bitmaps reach back to, if any. Pure but for reading the repository.

A bitmap is called after the backup at whose instant it began, so it is the repository that decides which one counts:

    backup A done         bitmap A
    backup B under way    bitmap A, bitmap B, begun at B's instant
    B is in the repository: A goes.    It is not, whoever was killed when: A counts, and B goes
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.repository.record import FULL, INCREMENTAL, BackedUpDisk, Backup
from cdpserver.repository.repository import Repository
from cdpserver.repository.take import NEW_REPOSITORY, Choice, check_chunks
from cdpserver.vm.disks import OURS

PREFIX = OURS + "backup-"

ENOUGH = 0.9
"""An incremental backup that sends so much of what a full one would is none: images have some data of their own."""


def prefix_of(repository: bytes) -> str:
    """What the names of bitmaps, jobs and nodes for a repository begin with; a node's may have 31 characters."""
    return f"{PREFIX}{repository.hex()[:8]}-"


@dataclass(frozen=True, slots=True)
class Marks:
    """A dirty bitmap of ours; `marked` in bytes."""

    name: str
    marked: int
    granularity: int
    inconsistent: bool
    recording: bool


@dataclass(frozen=True, slots=True)
class LiveDisk:
    """A disk of the VM: its name in the backup, its node in QEMU, bytes that its image takes (0 where nobody knows)."""

    name: str
    node: str
    size: int
    allocated: int
    marks: Mapping[str, Marks]


def read_marks(node: Mapping[str, Any], prefix: str) -> dict[str, Marks]:
    """Of one entry of `query-named-block-nodes`, by name."""
    found = {}
    for one in node.get("dirty-bitmaps", ()):
        name = str(one.get("name", ""))
        if name.startswith(prefix):
            found[name] = Marks(
                name=name,
                marked=int(one["count"]),
                granularity=int(one["granularity"]),
                inconsistent=bool(one.get("inconsistent")),
                recording=bool(one["recording"]),
            )
    return found


def choose(
    repository: Repository,
    vm: str,
    disks: Sequence[LiveDisk],
    *,
    full: bool,
    max_increments: int,
) -> Choice:
    """Incremental where every disk has a bitmap that began with a backup which is there and whole, and marks less than all."""
    if full:
        return Choice(FULL, "a full one was asked for")
    backups = _newest_first(repository, vm)
    newest = next(backups, None)
    if newest is None:
        return Choice(FULL, NEW_REPOSITORY)
    if reason := _differs(newest, disks):
        return Choice(FULL, reason)
    prefix = prefix_of(repository.config.id)
    parent = next((one for one in chain([newest], backups) if not _unmarked(disks, prefix, one.id)), None)
    if parent is None:
        return Choice(FULL, _unmarked(disks, prefix, newest.id))
    reason = _differs(parent, disks) or _why_not(repository, parent, disks, prefix, max_increments)
    if reason:
        return Choice(FULL, reason)
    return Choice(INCREMENTAL, f"QEMU marked what changed since backup {parent.id}", parent)


def _why_not(
    repository: Repository, parent: Backup, disks: Sequence[LiveDisk], prefix: str, max_increments: int
) -> str:
    """Why a backup that the bitmaps reach back to is no parent; nothing if it is one."""
    if parent.increments >= max_increments:
        return f"{parent.increments} incremental ones followed the last full one"
    try:
        for disk in disks:
            check_chunks(repository, _of(parent, disk))
    except CorruptError as error:
        return f"backup {parent.id} is damaged: {error.message}"
    if _is_all(repository.chunk_size, parent, disks, prefix + parent.id):
        return f"as much changed since backup {parent.id} as a full one reads"
    return ""


def _newest_first(repository: Repository, vm: str) -> Iterator[Backup]:
    for brief in reversed(repository.briefs()):
        if brief.subject == vm:
            with contextlib.suppress(CorruptError, NotFoundError):
                yield repository.backup(brief.id)


def _differs(backup: Backup, disks: Iterable[LiveDisk]) -> str:
    there = {one.name: one for one in backup.disks}
    for disk in disks:
        if disk.name not in there:
            return f"backup {backup.id} has no {disk.name}"
        if there[disk.name].size != disk.size:
            return f"{disk.name} was resized since backup {backup.id}"
    return ""


def _unmarked(disks: Iterable[LiveDisk], prefix: str, since: str) -> str:
    """Why no bitmap says what changed of each disk since that backup; nothing if one does."""
    for disk in disks:
        marks = disk.marks.get(prefix + since)
        if marks is None and disk.marks:
            return f"QEMU marks what changed of {disk.name} since a backup that is not in the repository"
        if marks is None:
            return f"QEMU has no dirty bitmap of {disk.name} since backup {since}: it was started anew, or has another image"
        if marks.inconsistent or not marks.recording:
            return f"QEMU's dirty bitmap of {disk.name} since backup {since} is not consistent"
    return ""


def _of(backup: Backup, disk: LiveDisk) -> BackedUpDisk:
    return next(one for one in backup.disks if one.name == disk.name)


def _is_all(step: int, parent: Backup, disks: Iterable[LiveDisk], bitmap: str) -> bool:
    marked = used = 0
    for disk in disks:
        marked += disk.marks[bitmap].marked
        # A block device does not tell what is used; all of it is read then.
        used += min(max(_of(parent, disk).chunks * step, disk.allocated or disk.size), disk.size)
    return 0 < marked >= used * ENOUGH
