"""nbdkit plugin: the target that QEMU's mirrors (and the guests of forks) write to, by export name.

Run with `-t 1`: one thread a connection serves twice the requests of many that hand the GIL around.
Crash-only: it is stopped with SIGKILL, never SIGTERM, which would turn a live mirror's writes into errors; and where a request
finds no memory, it ends itself (`cdpserver/memory.py`).
The buffer that `pwrite` gets belongs to nbdkit and is gone after the return.
"""

import builtins
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import nbdkit

from cdpserver import events, memory, sealed
from cdpserver.errors import (
    BrokenError,
    CdpError,
    CorruptError,
    ForbiddenError,
    NoSpaceError,
    NotFoundError,
    RemovedError,
    UsageError,
)
from cdpserver.limits import COMMIT_LAG_NS, NBD_CLIENTS, SECTOR
from cdpserver.names import DiskExport, MirrorExport, format_export, parse_export
from cdpserver.state import StateDir
from cdpserver.target.connection import Connection
from cdpserver.target.placement import worker_of
from cdpserver.target.registry import Registry
from nbdplugin import serving, thread_state
from nbdplugin.admission import Admission, Clients
from nbdplugin.forward import DIRECT, Forward
from nbdplugin.negotiation import Negotiations

API_VERSION = 2

Handle: TypeAlias = Connection | Forward

ROOM_S = 0.2
"""Between two looks whether there is room now."""

MAX_REQUEST = 32 << 20
"""Largest request that we advertise; QEMU's own limit."""

_state_dir = ""
_durable_lag_ns = COMMIT_LAG_NS
_worker, _workers = 0, 1
_tls = False
_clients = Clients(NBD_CLIENTS)
_registry: Registry | None = None
_admission: Admission | None = None
_negotiations = Negotiations()


def registry() -> Registry:
    """The process's disks; there after the fork."""
    assert _registry is not None
    return _registry


def admission() -> Admission:
    """Who may open its disks; there after the fork."""
    assert _admission is not None
    return _admission


def config(key: str, value: str) -> None:
    """`state_dir=DIR`; `durable_lag_ns=N`: the durable lag past which writes slow down; `worker=K workers=N`: which of them
    this process is; `tls=1`: over TCP nobody is let in without; `clients=N`: so many of each disk at once; `negotiation=SECONDS`:
    who has chosen no export by then is gone.
    """
    global _state_dir, _durable_lag_ns, _worker, _workers, _tls, _clients
    if key == "state_dir":
        _state_dir = value
    elif key == "durable_lag_ns":
        _durable_lag_ns = int(value)
    elif key == "worker":
        _worker = int(value)
    elif key == "workers":
        _workers = int(value)
    elif key == "tls":
        _tls = value == "1"
    elif key == "clients":
        _clients = Clients(int(value))
    elif key == "negotiation":
        _negotiations.limit_s = float(value)
    else:
        raise RuntimeError(
            f"unknown parameter {key}; state_dir=DIR, durable_lag_ns=N, worker=K, workers=N, tls=1, clients=N, "
            "negotiation=SECONDS are known"
        )


def config_complete() -> None:
    """Errors raised here are seen by whoever started nbdkit."""
    if not _state_dir:
        raise RuntimeError("state_dir=DIR is missing")
    StateDir.open(Path(_state_dir))


def thread_model() -> int:
    """Connections run side by side."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    """LMDB, threads and files belong to the process that serves."""
    events.configure(f"target-{_worker}")
    serving.begin(StateDir.open(Path(_state_dir)).run / f"target-{_worker}.lock", _start)


def _start() -> None:
    global _registry, _admission
    state = StateDir.open(Path(_state_dir))
    _registry = Registry(state, durable_lag_ns=_durable_lag_ns, worker=_worker, workers=_workers)
    _admission = Admission(state, _registry.catalog, tls=_tls)
    _registry.start()
    _negotiations.begin(_say_late)


def _say_late(count: int) -> None:
    registry().log.emit(
        "target.negotiation-ended", level="warning", connections=count, after_s=_negotiations.limit_s
    )


def preconnect(readonly: bool) -> None:
    """A client has come, and is not greeted yet."""
    _negotiations.began()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """Every disk and fork that takes writes, for who may open them by their names."""
    if not admission().lists(is_tls=is_tls):
        return []
    names = registry().catalog.names()
    return [(name, "") for name, entry in sorted(names.items()) if entry.state == "live"]


def default_export(readonly: bool, is_tls: bool) -> str:
    """There is no default disk; the empty name is refused by `open`."""
    return ""


EVENTS: dict[type[CdpError], str] = {
    NotFoundError: "target.unknown-export",
    RemovedError: "target.removing",
    ForbiddenError: "target.forbidden",
    NoSpaceError: "target.no-space",
    BrokenError: "target.broken",
    CorruptError: "target.damaged",
    UsageError: "target.bad-request",
}


def _fail(error: CdpError, where: str, **fields: object) -> None:
    """Give the client the error's own errno, and say it once in the log and the event file."""
    nbdkit.set_error(error.errno)
    if not admission().is_news(error, time.monotonic()):
        return
    name = next((text for kind, text in EVENTS.items() if isinstance(error, kind)), "target.error")
    registry().log.emit(name, level="warning", where=where, reason=str(error), **fields)


def open(readonly: bool) -> Handle:
    """The disk of the export name that the client asked for."""
    try:
        with _negotiations.choosing():
            return _chosen()
    except memory.NONE:
        memory.end(registry().log, "open")


def _chosen() -> Handle:
    asked = nbdkit.export_name()
    text = sealed.unseal(asked)[1]  # what is said of it tells no secret
    name = text.removeprefix(DIRECT)
    try:
        admission().admit(asked)
        export = parse_export(name)
        if not isinstance(export, DiskExport | MirrorExport):
            raise NotFoundError(
                "points are served by the export socket", hint="cdp uri DISK@WHEN prints the URI"
            )
        with _clients.entering(export.name):
            connection = _connect(export, direct=name != text)
    except CdpError as error:
        _fail(error, "open", export=text[:200])
        raise
    _clients.came(connection, export.name)
    connection.thread_state = thread_state.keep()
    return connection


def _connect(export: DiskExport | MirrorExport, *, direct: bool) -> Handle:
    """This worker's own disk, or another's; `direct` when another worker asks."""
    name, mirror = export.name, export if isinstance(export, MirrorExport) else None
    if mirror is not None and not direct:
        export = mirror = replace(mirror, born_ns=time.monotonic_ns())
    found = registry().catalog.get(name)
    owner = worker_of(found.id, _workers) if found is not None else _worker
    if owner == _worker:
        connection = registry().disk(name).connect(mirror)
        connection.waits = mirror is not None and mirror.waits
        return connection
    if direct:
        # The number of workers is being changed, and the one that asks belongs to the others: its client connects again.
        raise RemovedError(f"{name} is with worker {owner} now", hint="connect again")
    return Forward(registry().state.worker_socket(owner), format_export(export))


def close(h: Handle) -> None:
    """The client is gone, or only asked."""
    _negotiations.left()
    try:
        h.close()
    except memory.NONE:
        memory.end(registry().log, "close")
    finally:
        _clients.left(h)
        thread_state.let_go(h.thread_state)


def get_size(h: Handle) -> int:
    """Bytes of the disk."""
    return h.size


def block_size(h: Handle) -> tuple[int, int, int]:
    """A sector, though any alignment is handled. With more than that QEMU would read what surrounds a guest's small write and
    write whole blocks; here that is read too, and verified (`JournalWriter.write`).
    """
    return SECTOR, 65536, MAX_REQUEST


def can_write(h: Handle) -> bool:
    """Always."""
    return True


def can_flush(h: Handle) -> bool:
    """Always."""
    return True


def can_trim(h: Handle) -> bool:
    """Trimmed blocks read as zeros."""
    return True


def can_zero(h: Handle) -> bool:
    """A zero is one record."""
    return True


def can_fast_zero(h: Handle) -> bool:
    """A zero is one record."""
    return True


def can_fua(h: Handle) -> int:
    """We commit ourselves."""
    return int(nbdkit.FUA_NATIVE)


def can_multi_conn(h: Handle) -> bool:
    """A FLUSH covers what was acknowledged over all connections."""
    return True


def can_extents(h: Handle) -> bool:
    """Block status is known."""
    return True


def pread(h: Handle, buf: bytearray, offset: int, flags: int) -> None:
    """What was written last."""
    try:
        h.read_into(memoryview(buf), offset)
    except CdpError as error:
        _fail(error, "read", disk=h.name)
        raise
    except memory.NONE:
        memory.end(registry().log, "read")


def _not_done(h: Handle, error: Exception, where: str, again: Callable[[], None]) -> None:
    """A change failed, of `error`. Where that is want of room and the guest is to wait, it is made once there is. Else it is the
    client's, and want of memory the end of this process.

    No lock is held, so that whoever closes the disk, or asks for its state, does not wait as well.
    """
    said = False
    while h.waits and isinstance(error, NoSpaceError):
        if not said:
            fields = {"where": where, "disk": h.name, "waits": True}
            registry().log.emit("target.no-space", level="warning", reason=str(error), **fields)
            said = True
        time.sleep(ROOM_S)
        try:
            return again()
        except (CdpError, *memory.NONE) as later:
            error = later
    if isinstance(error, memory.NONE):
        memory.end(registry().log, where)
    assert isinstance(error, CdpError)
    _fail(error, where, disk=h.name)
    raise error


def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Acknowledged when it would survive a kill of this process; with FUA when it is durable."""
    try:
        h.write(buf, offset, fua=flags & FUA)
    except (CdpError, *memory.NONE) as error:
        _not_done(h, error, "write", lambda: h.write(buf, offset, fua=flags & FUA))


def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    """One record without payload."""
    try:
        h.zero(offset, count, fua=flags & FUA)
    except (CdpError, *memory.NONE) as error:
        _not_done(h, error, "zero", lambda: h.zero(offset, count, fua=flags & FUA))


def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    """One record without payload; the blocks read as zeros."""
    try:
        h.zero(offset, count, trim=True, fua=flags & FUA)
    except (CdpError, *memory.NONE) as error:
        _not_done(h, error, "trim", lambda: h.zero(offset, count, trim=True, fua=flags & FUA))


def flush(h: Handle, flags: int) -> None:
    """Durable on return: everything acknowledged before, over all connections."""
    try:
        h.flush()
    except CdpError as error:
        _fail(error, "flush", disk=h.name)
        raise
    except memory.NONE:
        memory.end(registry().log, "flush")


def extents(h: Handle, count: int, offset: int, flags: int) -> builtins.list[tuple[int, int, int]]:
    """Data, or a hole that reads as zeros; never a hole alone."""
    try:
        runs = h.status(offset, count, one=bool(flags & REQ_ONE))
    except CdpError as error:
        _fail(error, "extents", disk=h.name)
        raise
    except memory.NONE:
        memory.end(registry().log, "extents")
    return [(start, end - start, HOLE_ZERO if zero else 0) for start, end, zero in runs]


FUA = int(nbdkit.FLAG_FUA)
REQ_ONE = int(nbdkit.FLAG_REQ_ONE)
HOLE_ZERO = int(nbdkit.EXTENT_HOLE) | int(nbdkit.EXTENT_ZERO)
