"""What an immutable backup needs is immutable as long as it is, where the place itself sees to that.

    pack     |-- period + a quarter --|          put, or put longer
    backup            |-- period --|             all packs that it names last at least as long

A pack that backups share is put longer when a new one names it and what is left is too short: once in a quarter of the period,
not for every backup. Until when is remembered in the index; forgotten, the place is asked.
"""

from collections.abc import Iterator

from cdpserver.repository.configuration import CONFIG
from cdpserver.repository.content import ChunkList
from cdpserver.repository.record import Backup
from cdpserver.repository.repository import Repository


def retain(repository: Repository, backup: Backup) -> None:
    """Before the backup is written. CorruptError if something that it names is not there."""
    period_ns = repository.config.immutable_ns
    if not period_ns or not repository.place.locks:
        return
    need_ns = repository.now_ns() + period_ns
    for name in sorted({CONFIG, *_packs(repository, backup)}):
        if repository.index.retained_until_ns(name) >= need_ns:
            continue
        until_ns = repository.place.retained_until_ns(name)
        if until_ns < need_ns:
            until_ns = repository.retain_until_ns()
            repository.place.retain(name, until_ns)
        repository.index.note_retained(name, until_ns)


def _packs(repository: Repository, backup: Backup) -> Iterator[str]:
    """Every pack in which something is that the backup names."""
    seen: set[bytes] = set()
    read: set[bytes] = set()
    for disk in backup.disks:
        chunks = ChunkList(repository, disk)
        for number in range(len(disk.pages)):
            ids = chunks.named(number, read)
            for id_ in ids - seen:
                yield from (pack for pack in repository.whole(id_) if pack not in repository.doomed)
            seen |= ids
