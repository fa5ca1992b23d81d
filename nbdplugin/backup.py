"""nbdkit plugin: disks of backups, read-only, by export name.

ID/DISK             a disk of a backup; DISK as the backup knows it
ID/DISK@delta:ID    what it changes against the backup named last: unchanged ranges are holes, which `qemu-img convert -B` skips
"""

import builtins
import threading
from dataclasses import dataclass
from pathlib import Path

import nbdkit

from cdpserver import events
from cdpserver.errors import CdpError, NotFoundError
from cdpserver.repository.content import Content
from cdpserver.repository.layer import Layer
from cdpserver.repository.places import open_place
from cdpserver.repository.repository import Repository
from nbdplugin import thread_state
from nbdplugin.negotiation import Negotiations

API_VERSION = 2

MAX_REQUEST = 32 << 20
"""Largest request that we advertise; QEMU's own limit."""

AHEAD = 8
"""Chunks fetched before they are asked for, for who reads forwards: enough to hide the way to an object store."""

_parameters: dict[str, str] = {}
_repository: Repository | None = None
_negotiations = Negotiations()


@dataclass
class Export:
    """One connection's disk."""

    content: Content | Layer
    name: str
    lock: threading.Lock
    thread_state: int = 0


def config(key: str, value: str) -> None:
    """`repo=LOCATION`, `key_file=FILE` for an encrypted one; `negotiation=SECONDS`: who has chosen no export by then is gone."""
    if key == "negotiation":
        _negotiations.limit_s = float(value)
    elif key in ("repo", "key_file"):
        _parameters[key] = value
    else:
        raise RuntimeError(
            f"unknown parameter {key}; there are repo=PATH, key_file=FILE and negotiation=SECONDS"
        )


def config_complete() -> None:
    """Errors raised here are seen by whoever started nbdkit."""
    if "repo" not in _parameters:
        raise RuntimeError("repo=PATH is missing")


def thread_model() -> int:
    """Connections run side by side."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    """LMDB belongs to the process that serves."""
    global _repository
    events.configure("backup")
    key = _parameters.get("key_file")
    secret = Path(key).read_bytes() if key is not None else None
    _repository = Repository(open_place(_parameters["repo"]), secret=secret)
    _negotiations.begin(lambda count: nbdkit.debug(f"{count} connections chose no export in time"))


def preconnect(readonly: bool) -> None:
    """A client has come, and is not greeted yet."""
    _negotiations.began()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """Every disk of every backup."""
    assert _repository is not None
    return [
        (f"{backup.id}/{disk.name}", backup.name) for backup in _repository.backups() for disk in backup.disks
    ]


def default_export(readonly: bool, is_tls: bool) -> str:
    """There is no default."""
    return ""


def open(readonly: bool) -> Export:
    """The disk of the export name that the client asked for."""
    with _negotiations.choosing():
        return _chosen(nbdkit.export_name())


def _chosen(name: str) -> Export:
    try:
        where, delta, other = name.partition("@delta:")
        backup_id, _, disk_name = where.partition("/")
        content = _content(backup_id, disk_name)
        layer = Layer(content, _content(other, disk_name)) if delta else None
        export = Export(layer or content, name, threading.Lock())
    except CdpError as error:
        nbdkit.set_error(error.errno)
        raise
    export.thread_state = thread_state.keep()
    return export


def _content(backup_id: str, disk_name: str) -> Content:
    assert _repository is not None
    disk = _repository.backup(backup_id).disk(disk_name or None)
    if disk is None:
        raise NotFoundError(f"backup {backup_id} has no disk of that name", hint="cdp backup show ID")
    return Content(_repository, disk, ahead=AHEAD)


def close(h: Export) -> None:
    """Gives memory back."""
    _negotiations.left()
    try:
        h.content.close()
    finally:
        thread_state.let_go(h.thread_state)


def get_size(h: Export) -> int:
    """Bytes of the disk."""
    return h.content.size


def block_size(h: Export) -> tuple[int, int, int]:
    """Any alignment is fine; a chunk is what is read at once anyway."""
    assert _repository is not None
    return 1, min(_repository.chunk_size, MAX_REQUEST), MAX_REQUEST


def can_write(h: Export) -> bool:
    """A backup never changes."""
    return False


def can_flush(h: Export) -> bool:
    """Nothing to flush."""
    return False


def can_multi_conn(h: Export) -> bool:
    """All connections see the same."""
    return True


def can_extents(h: Export) -> bool:
    """Block status is known."""
    return True


def pread(h: Export, buf: bytearray, offset: int, flags: int) -> None:
    """The bytes, each chunk compared with its id."""
    try:
        with h.lock:
            h.content.read_into(buf, offset)
    except CdpError as error:
        nbdkit.set_error(error.errno)
        raise


def extents(h: Export, count: int, offset: int, flags: int) -> builtins.list[tuple[int, int, int]]:
    """Block status: data, or a hole that reads as zeros."""
    try:
        with h.lock:
            one = bool(flags & REQ_ONE)
            if isinstance(h.content, Layer):
                return [(s, e - s, t) for s, e, t in h.content.status(offset, offset + count, one=one)]
            runs = h.content.status(offset, offset + count, one=one)
    except CdpError as error:
        nbdkit.set_error(error.errno)
        raise
    return [(start, end - start, HOLE_ZERO if zero else 0) for start, end, zero in runs]


REQ_ONE = int(nbdkit.FLAG_REQ_ONE)
HOLE_ZERO = int(nbdkit.EXTENT_HOLE) | int(nbdkit.EXTENT_ZERO)
