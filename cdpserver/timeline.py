"""What a timeline is (`timeline.json`), and how its directory is made.

Invariants: `timeline.json` is written once and never changed, but for the size of a disk that grows before its history begins
(later growth is in the journal). A directory in `timelines/` named by an id is
complete: it is built under a temporary name and appears by rename.
"""

import contextlib
import re
import uuid as uuids
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from cdpserver import durable
from cdpserver.durable import corrupt_json, take_int, take_keys, take_str
from cdpserver.errors import NotFoundError, RefusedError, UsageError
from cdpserver.limits import MAX_DISK_SIZE, SECTOR
from cdpserver.names import BACKUP_ID, MAX_NUMBER, check_disk_name, full_name
from cdpserver.state import StateDir, check_timeline_id

FORMAT = 1
FILE = "timeline.json"
INTERVALS = "intervals"
LOCKS = ("writer.lock", "index.lock", "lease")

# A name directly in bases/, without '..': it is joined to the state directory.
_REPOSITORY = re.compile(r"[0-9a-f]{32}")
_IMAGE_FILE = re.compile(r"bases/[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.))*\.raw")


@dataclass(frozen=True, slots=True)
class EmptyBase:
    """A disk that gets a first copy into its own base.raw."""


@dataclass(frozen=True, slots=True)
class ImageBase:
    """A disk on the shared base image `file`, relative to the state directory."""

    file: str


@dataclass(frozen=True, slots=True)
class PointBase:
    """A fork of another timeline just after its record `seq`, whose time was `time_ns`."""

    timeline: str
    seq: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image on primary storage, from which a disk was made once."""

    path: str
    digest: str
    """BLAKE3 of the file, hexadecimal; empty where nobody read it."""


@dataclass(frozen=True, slots=True)
class BackupBase:
    """A disk that stands on `disk` of a backup, in a repository that the state directory knows by its id."""

    repository: str
    backup: str
    disk: str
    image: ImageFile | None = None
    """What the disk that was backed up was made from, if that is known."""


Base: TypeAlias = EmptyBase | ImageBase | PointBase | BackupBase


@dataclass(frozen=True, slots=True)
class Timeline:
    """One line of history of one disk. `name` is the disk's own name, without its VM."""

    id: str
    uuid: bytes
    name: str
    vm: str | None
    size: int
    created_ns: int
    base: Base

    @property
    def is_fork(self) -> bool:
        """Whether it starts at a point of another timeline, or at a backup."""
        return isinstance(self.base, PointBase | BackupBase)

    @property
    def full_name(self) -> str:
        """The name in the catalog: NAME or VM/NAME."""
        return full_name(self.name, self.vm)

    def to_json(self) -> dict[str, Any]:
        """The object of timeline.json."""
        return {
            "format": FORMAT,
            "id": self.id,
            "uuid": self.uuid.hex(),
            "name": self.name,
            "vm": self.vm,
            "size": self.size,
            "created_ns": self.created_ns,
            "base": _base_to_json(self.base),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], path: Path) -> "Timeline":
        """The reverse of `to_json`; `path` is where it was read. CorruptError for anything else."""
        if take_int(value, "format", path) != FORMAT:
            raise corrupt_json(path, f"its format is not {FORMAT}")
        take_keys(value, {"format", "id", "uuid", "name", "vm", "size", "created_ns", "base"}, path)
        uuid = take_str(value, "uuid", path)
        if not re.fullmatch("[0-9a-f]{32}", uuid):
            raise corrupt_json(path, "'uuid' is not 32 hexadecimal digits")
        timeline = cls(
            id=take_str(value, "id", path),
            uuid=bytes.fromhex(uuid),
            name=take_str(value, "name", path),
            vm=None if value["vm"] is None else take_str(value, "vm", path),
            size=take_int(value, "size", path),
            created_ns=take_int(value, "created_ns", path),
            base=_base_from_json(value["base"], path),
        )
        try:
            _check(timeline)
        except UsageError as error:
            raise corrupt_json(path, error.message) from None
        return timeline


def _base_to_json(base: Base) -> dict[str, Any]:
    match base:
        case EmptyBase():
            return {"kind": "empty"}
        case ImageBase(file):
            return {"kind": "image", "file": file}
        case PointBase(timeline, seq, time_ns):
            return {"kind": "point", "timeline": timeline, "seq": seq, "time_ns": time_ns}
        case BackupBase(repository, backup, disk, image):
            known = {} if image is None else {"image": {"path": image.path, "digest": image.digest}}
            return {"kind": "backup", "repository": repository, "backup": backup, "disk": disk} | known


def _base_from_json(value: Any, path: Path) -> Base:
    if not isinstance(value, dict):
        raise corrupt_json(path, "'base' is not an object")
    match value.get("kind"):
        case "empty":
            take_keys(value, {"kind"}, path)
            return EmptyBase()
        case "image":
            take_keys(value, {"kind", "file"}, path)
            return ImageBase(take_str(value, "file", path))
        case "point":
            take_keys(value, {"kind", "timeline", "seq", "time_ns"}, path)
            return PointBase(
                take_str(value, "timeline", path),
                take_int(value, "seq", path),
                take_int(value, "time_ns", path),
            )
        case "backup":
            take_keys(value, {"kind", "repository", "backup", "disk"} | ({"image"} & value.keys()), path)
            return BackupBase(
                take_str(value, "repository", path),
                take_str(value, "backup", path),
                take_str(value, "disk", path),
                _image_from_json(value["image"], path) if "image" in value else None,
            )
    raise corrupt_json(path, "the kind of 'base' is not known")


def _image_from_json(value: Any, path: Path) -> ImageFile:
    if not isinstance(value, dict):
        raise corrupt_json(path, "'image' is not an object")
    take_keys(value, {"path", "digest"}, path)
    return ImageFile(take_str(value, "path", path), take_str(value, "digest", path))


def _check(timeline: Timeline) -> None:
    """UsageError if a field holds what no timeline can have."""
    check_timeline_id(timeline.id)
    full_name(timeline.name, timeline.vm)
    if not 0 < timeline.size <= MAX_DISK_SIZE or timeline.size % SECTOR:
        raise UsageError(
            f"size {timeline.size} is not that of a disk", hint="sizes are multiples of 512 up to 256T"
        )
    match timeline.base:
        case ImageBase(file) if not _IMAGE_FILE.fullmatch(file):
            raise UsageError("the base image is not a file of bases/", hint="import the image first")
        case PointBase(parent, seq, _):
            check_timeline_id(parent)
            if not 0 <= seq <= MAX_NUMBER or parent == timeline.id:
                raise UsageError(
                    "the point to fork from cannot exist", hint="name a point of another timeline"
                )
        case BackupBase(repository, backup, disk, _):
            check_disk_name(disk)
            if not _REPOSITORY.fullmatch(repository) or not BACKUP_ID.fullmatch(backup):
                raise UsageError("the backup to stand on cannot exist", hint="cdp backup list shows them")


def load(directory: Path) -> Timeline:
    """The timeline in `directory`. NotFoundError if there is none, CorruptError if it is damaged."""
    path = directory / FILE
    try:
        value = durable.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        if directory.is_dir():
            raise corrupt_json(path, "it is missing") from None
        raise NotFoundError(
            f"there is no timeline {directory.name}", hint="list the disks: cdp disk list"
        ) from None
    timeline = Timeline.from_json(value, path)
    if timeline.id != directory.name:
        raise corrupt_json(path, f"it is of timeline {timeline.id}")
    return timeline


def set_size(directory: Path, timeline: Timeline, size: int) -> Timeline:
    """Write another size into `timeline.json`, durably; for a disk before its history. UsageError if no disk can have it."""
    changed = replace(timeline, size=size)
    _check(changed)
    durable.write_json(directory / FILE, changed.to_json())
    return changed


def create_timeline(
    state: StateDir, *, id: str, name: str, vm: str | None, size: int, base: Base, now_ns: int
) -> Timeline:
    """Make the directory of a new timeline; on return it is durable. `id` comes from Catalog.next_id.

    UsageError for impossible arguments, RefusedError if the id is taken, NoSpaceError.
    """
    timeline = Timeline(id, uuids.uuid4().bytes, name, vm, size, now_ns, base)
    _check(timeline)
    final = state.timeline(id)
    if final.exists():
        raise RefusedError(f"timeline {id} exists already", hint="create the disk again: it gets a new id")
    building = final.with_name(durable.TEMPORARY + id)
    durable.remove_tree(building)
    try:
        durable.make_dir(building)
        durable.make_dir(building / INTERVALS)
        for lock in LOCKS:
            with durable.io_errors("create", building / lock):
                (building / lock).touch(0o644)
        durable.write_json(building / FILE, timeline.to_json())
        durable.publish(building, final)
    except BaseException:
        with contextlib.suppress(OSError):
            durable.remove_tree(building)
        raise
    return timeline
