"""What is known of one backup: which disks, as of when, how it was made, and where their content is."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

import msgpack

from cdpserver.errors import CorruptError
from cdpserver.repository.format import ID_SIZE
from cdpserver.timeline import ImageFile

FULL, INCREMENTAL = "full", "incremental"


@dataclass(frozen=True, slots=True)
class BackedUpDisk:
    """One disk of a backup. `pages` are the ids of its list's pages: every backup has the whole list, and stands on no other.

    `patches` are the ids of the pages' tables of patched places (patches.py): one for each page, or none at all.
    """

    name: str
    timeline: str
    seq: int
    time_ns: int
    size: int
    grade: str
    pages: tuple[bytes, ...]
    chunks: int
    """Places that are not zeros."""
    image: ImageFile | None = None
    """What the disk was made from, if that is known: it may be on other machines too."""
    patches: tuple[bytes, ...] = ()
    patched: int = 0
    """Places that are a chunk with some blocks of another one."""


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup as `backups/ID` holds it."""

    id: str
    kind: str
    reason: str
    created_ns: int
    name: str
    """The disk, VM or group that was backed up, with the instant: `web/vda@seq:12`."""
    disks: tuple[BackedUpDisk, ...]
    parent: str = ""
    """The backup that an incremental one was compared with; it may be gone."""
    increments: int = 0
    """Incremental ones since a full one was read, this one included."""
    read_bytes: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    tags: dict[str, str] = field(default_factory=dict)
    since_ns: int = 0
    """When it came here by the repository's time (clock.py): from then on it is immutable."""
    made_ns: int = 0
    """When it was made by the time of the repository that it was made in; copies and imports keep it."""

    @property
    def order(self) -> tuple[int, str]:
        """What sorts backups from the oldest to the newest, whatever a clock said when one was made."""
        return self.made_ns or self.since_ns or self.created_ns, self.id

    @property
    def subject(self) -> str:
        """The disk, VM or group: its name without the instant."""
        return self.name.partition("@")[0]

    def pack(self) -> bytes:
        """As msgpack; who reads an unknown key passes over it."""
        value = asdict(self)
        for disk in value["disks"]:
            disk["pages"] = b"".join(disk["pages"])
            disk["patches"] = b"".join(disk["patches"])
        packed: bytes = msgpack.packb(value)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """CorruptError for anything that `pack` did not make."""
        try:
            value = msgpack.unpackb(data, max_map_len=1 << 16)
            disks = tuple(_disk(disk) for disk in value["disks"])
            found = cls(**{**{k: value[k] for k in cls.__slots__ if k in value}, "disks": disks})
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise CorruptError(f"the backup cannot be read: {error}") from None
        if found.kind not in (FULL, INCREMENTAL) or not found.disks:
            raise CorruptError("the backup says nothing that can be")
        return found

    def show(self) -> dict[str, Any]:
        """For people and programs, without the ids of lists."""
        shown = asdict(self)
        for disk in shown["disks"]:
            del disk["pages"], disk["patches"]
        shown["size"] = sum(disk.size for disk in self.disks)
        return shown

    @property
    def has_patches(self) -> bool:
        """Must who reads it know of patched places?"""
        return any(disk.patches for disk in self.disks)

    def disk(self, name: str | None) -> BackedUpDisk | None:
        """The disk of that name (in full, or without its VM); without a name, the only one."""
        if name is None:
            return self.disks[0] if len(self.disks) == 1 else None
        return next((d for d in self.disks if name in (d.name, d.name.rpartition("/")[2])), None)


@dataclass(frozen=True, slots=True)
class Brief:
    """What is enough of a backup to choose one of many: kept in the index, so that they are not all read for it."""

    id: str
    subject: str
    """Empty for one that cannot be read."""
    made_ns: int
    seqs: dict[str, tuple[str, int]]
    """(timeline, seq) by disk."""

    @property
    def order(self) -> tuple[int, str]:
        """As that of the backup; of one that cannot be read by the time that its id says."""
        return self.made_ns, self.id

    @classmethod
    def of(cls, backup: Backup) -> Self:
        """The brief of a backup."""
        seqs = {disk.name: (disk.timeline, disk.seq) for disk in backup.disks}
        return cls(backup.id, backup.subject, backup.order[0], seqs)

    def pack(self) -> bytes:
        """As msgpack."""
        packed: bytes = msgpack.packb([self.subject, self.made_ns, self.seqs])
        return packed

    @classmethod
    def unpack(cls, id_: str, data: bytes) -> Self:
        """What `pack` made."""
        subject, made_ns, seqs = msgpack.unpackb(data, max_map_len=1 << 16)
        return cls(id_, subject, made_ns, {disk: (timeline, seq) for disk, (timeline, seq) in seqs.items()})


def _disk(value: dict[str, Any]) -> BackedUpDisk:
    known = {key: value[key] for key in BackedUpDisk.__slots__ if key in value}
    lists = {"pages": _ids(value["pages"]), "patches": _ids(value.get("patches", b""))}
    image = value.get("image")
    read_image = None if image is None else ImageFile(image["path"], image["digest"])
    disk = BackedUpDisk(**{**known, **lists, "image": read_image})
    if not isinstance(disk.size, int) or disk.size < 0:
        raise ValueError("a disk without a size")
    if image is not None and not (isinstance(image["path"], str) and isinstance(image["digest"], str)):
        raise ValueError("an image without a path")
    return disk


def _ids(joined: object) -> tuple[bytes, ...]:
    if not isinstance(joined, bytes) or len(joined) % ID_SIZE:
        raise ValueError("a list of ids that is none")
    return tuple(joined[at : at + ID_SIZE] for at in range(0, len(joined), ID_SIZE))
