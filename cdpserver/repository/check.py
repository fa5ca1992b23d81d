"""Is everything there, and what it should be? Damage is told as backups, disks and byte ranges."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from cdpserver.errors import CdpError, CorruptError, NotFoundError
from cdpserver.progress import Progress, nobody
from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import ID_SIZE, PAGE_IDS, ZERO_ID
from cdpserver.repository.patches import Patch
from cdpserver.repository.record import BackedUpDisk, Backup
from cdpserver.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [start, end) of a disk of a backup cannot be restored; a whole backup that cannot be read has no disk."""

    backup: str
    disk: str
    start: int
    end: int
    reason: str

    @property
    def where(self) -> str:
        """Disk and range, for people."""
        return f"{self.disk} [{self.start}, {self.end})" if self.disk else "all of it"


@dataclass(slots=True)
class Checked:
    """What was looked at, and what is wrong."""

    backups: int = 0
    packs: int = 0
    chunks: int = 0
    read_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    packs_damaged: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Nothing is wrong."""
        return not self.damage and not self.packs_damaged


def check(repository: Repository, *, read_data: bool = True, progress: Progress = nobody) -> Checked:
    """Has every chunk that a backup names a place? With `read_data` each is read and compared with its id, once."""
    found = Checked()
    found.packs_damaged = sorted(repository.refresh())
    for pack, _ in repository.place.names("packs"):
        found.packs += 1
        if read_data and pack not in found.packs_damaged and not repository.is_ours(pack):
            found.packs_damaged.append(pack)
    if read_data:
        repository.look_again()
    found.damage += [
        Damage(id_, "", 0, 0, "it is gone, and nobody removed it") for id_ in repository.missed()
    ]
    verdicts: dict[bytes, str] = {}
    ids = repository.backup_ids()
    for number, id_ in enumerate(ids):
        progress(number / max(len(ids), 1))
        found.backups += 1
        try:
            backup = repository.backup(id_)
        except NotFoundError:
            continue  # removed meanwhile
        except CorruptError as error:
            found.damage.append(Damage(id_, "", 0, 0, error.message))
            continue
        for disk in backup.disks:
            _check_disk(repository, backup, disk, read_data, verdicts, found)
    progress(1.0)
    return found


def check_backup(repository: Repository, backup: Backup, *, progress: Progress = nobody) -> Checked:
    """One backup, every chunk of it read."""
    found = Checked(backups=1)
    verdicts: dict[bytes, str] = {}
    for number, disk in enumerate(backup.disks):
        progress(number / len(backup.disks))
        _check_disk(repository, backup, disk, True, verdicts, found)
    progress(1.0)
    return found


def missing(repository: Repository, backup: Backup) -> list[Damage]:
    """What of a backup has no place; no data is read."""
    found = Checked(backups=1)
    for disk in backup.disks:
        _check_disk(repository, backup, disk, False, {}, found)
    return found.damage


def _check_disk(
    repository: Repository,
    backup: Backup,
    disk: BackedUpDisk,
    read_data: bool,
    verdicts: dict[bytes, str],
    found: Checked,
) -> None:
    try:
        chunks = ChunkList(repository, disk)
    except CorruptError as error:
        found.damage.append(Damage(backup.id, disk.name, 0, disk.size, error.message))
        return
    step = repository.chunk_size

    def verdict(id_: bytes, length: int) -> str:
        if id_ not in verdicts:
            verdicts[id_] = _look(repository, id_, length, read_data, found) if id_ != ZERO_ID else ""
        return verdicts[id_]

    for start, ids, table, reason in _pages(chunks):
        if reason:
            end = min(disk.size, (start + PAGE_IDS) * step)
            _say(found, Damage(backup.id, disk.name, start * step, end, reason))
            continue
        for place in range(len(ids) // ID_SIZE):
            length = chunks.length(start + place)
            wrong = verdict(ids[place * ID_SIZE : (place + 1) * ID_SIZE], length)
            if (patch := table.get(place)) is not None:
                wrong = wrong or verdict(patch.id, patch.length)
            if wrong:
                at = (start + place) * step
                _say(found, Damage(backup.id, disk.name, at, at + length, wrong))


def _pages(chunks: ChunkList) -> Iterator[tuple[int, bytes, dict[int, Patch], str]]:
    """(first place, ids, what is patched, what is wrong with the page or its table)."""
    for number in range(len(chunks.disk.pages)):
        try:
            yield number * PAGE_IDS, chunks.page(number), chunks.table(number), ""
        except CdpError as error:
            yield number * PAGE_IDS, b"", {}, error.message


def _look(repository: Repository, id_: bytes, length: int, read_data: bool, found: Checked) -> str:
    found.chunks += 1
    if not read_data:
        if repository.whole(id_):
            return ""
        return "a chunk was found damaged" if repository.index.find(id_) else "a chunk is missing"
    try:
        found.read_bytes += len(repository.load(id_, length))
    except CorruptError as error:
        return error.message
    return ""


def _say(found: Checked, damage: Damage) -> None:
    """Neighbours with the same reason are one range."""
    last = found.damage[-1] if found.damage else None
    if last is not None and (last.backup, last.disk, last.end) == (damage.backup, damage.disk, damage.start):
        found.damage[-1] = Damage(last.backup, last.disk, last.start, damage.end, last.reason)
    else:
        found.damage.append(damage)
