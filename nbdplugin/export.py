"""nbdkit plugin: the time machine. Any instant of any timeline, read-only, by export name.

    DISK@WHEN      a view; WHEN as an operator writes it, resolved once per connection
    DISK@WHEN/p3   a partition of it; DISK@WHEN/lv/VG/LV a logical volume
    DISK@delta:N   what changed for base point N: unchanged ranges are holes, so `qemu-img convert -B` skips them

A view never reports a hole without zero: QEMU's mirror would copy zeros over data. Only the delta does, under its own name.
Where a request finds no memory the process ends (`cdpserver/memory.py`): views share what they have read.
"""

import builtins
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import nbdkit

from cdpserver import durable, events, memory, sealed
from cdpserver.basepoint import delta_views
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock
from cdpserver.errors import CdpError, NotFoundError
from cdpserver.files.browser import Browser
from cdpserver.held import hold, open_history
from cdpserver.leases import Lease
from cdpserver.limits import NBD_CLIENTS
from cdpserver.names import DeltaExport, DiskExport, MirrorExport, Seq, parse_export
from cdpserver.priority import go_before_workers
from cdpserver.state import StateDir
from cdpserver.view.delta import Delta
from cdpserver.view.extent import Files
from cdpserver.view.history import History
from cdpserver.view.view import View
from cdpserver.view.volume import Part, VolumeView
from nbdplugin import serving, thread_state
from nbdplugin.admission import Admission, Clients
from nbdplugin.negotiation import Negotiations

API_VERSION = 2

MAX_REQUEST = 32 << 20
"""Largest request that we advertise; QEMU's own limit."""

KEPT_MAPS = 64
"""Maps of volumes kept: a client with several connections has its point parsed once."""

_state_dir = ""
_alone = False
_patience_s = 0
_tls = False
_clients = Clients(NBD_CLIENTS)
_verify = False
_came = threading.Event()
_state: StateDir | None = None
_catalog: Catalog | None = None
_admission: Admission | None = None
_negotiations = Negotiations()
_log: events.EventLog | None = None
_maps: OrderedDict[tuple[str, int, str], Sequence[Part]] = OrderedDict()


@dataclass
class Export:
    """One connection's view, the histories that it holds, and whether another connection would see the same instant."""

    view: View | VolumeView | Delta
    histories: builtins.list[History]
    name: str
    absolute: bool
    lock: threading.Lock
    thread_state: int = 0
    lease: Lease | None = None


def config(key: str, value: str) -> None:
    """`state_dir=DIR`; `alone=1` for who starts it for itself, beside a service's or without one; `verify=reads`.

    With `patience=SECONDS` it ends if no client has come by then; with `tls=1` nobody is let in over TCP without TLS; with
    `clients=N` no more than so many of each disk at once; with `negotiation=SECONDS` who has chosen no export by then is gone.
    """
    global _state_dir, _alone, _patience_s, _tls, _clients, _verify
    if key == "state_dir":
        _state_dir = value
    elif key == "alone":
        _alone = value == "1"
    elif key == "verify" and value in ("nothing", "reads"):
        _verify = value == "reads"
    elif key == "patience" and value.isascii() and value.isdecimal():
        _patience_s = int(value)
    elif key == "tls":
        _tls = value == "1"
    elif key == "clients":
        _clients = Clients(int(value))
    elif key == "negotiation":
        _negotiations.limit_s = float(value)
    else:
        raise RuntimeError(
            f"unknown parameter {key}={value}; there are state_dir=DIR, alone=1, verify=reads, patience=SECONDS, tls=1, "
            "clients=N, negotiation=SECONDS"
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
    """LMDB and files belong to the process that serves."""
    events.configure("export")
    if _alone:
        # It waits for no predecessor, and ends with its parent.
        _start()
    else:
        go_before_workers()
        serving.begin(StateDir.open(Path(_state_dir)).run / "export.lock", _start)


def _start() -> None:
    global _state, _catalog, _admission, _log
    _state = StateDir.open(Path(_state_dir))
    _catalog = Catalog.open(_state, writable=False)
    _admission = Admission(_state, _catalog, tls=_tls)
    _log = events.EventLog(_state.events)
    _negotiations.begin(_say_late)
    if _patience_s:
        threading.Thread(target=_lose_patience, daemon=True).start()


def _say_late(count: int) -> None:
    assert _log is not None
    _log.emit("export.negotiation-ended", level="warning", connections=count, after_s=_negotiations.limit_s)


def preconnect(readonly: bool) -> None:
    """A client has come, and is not greeted yet."""
    _negotiations.began()


def _lose_patience() -> None:
    """Nobody knows of us but who was told our URI, and he may have gone."""
    if not _came.wait(_patience_s):
        os._exit(0)


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """The newest instant of every disk; any other instant opens by its name as well. For who may open them by their names."""
    assert _catalog is not None and _admission is not None
    if not _admission.lists(is_tls=is_tls):
        return []
    names = _catalog.names()
    return [
        (f"{name}@latest", "any instant: NAME@WHEN")
        for name, entry in sorted(names.items())
        if entry.state == "live"
    ]


def default_export(readonly: bool, is_tls: bool) -> str:
    """There is no default point; the empty name is refused by `open`."""
    return ""


def _open(text: str) -> Export:
    assert _state is not None
    export = parse_export(text)
    if isinstance(export, DiskExport | MirrorExport):
        raise NotFoundError(
            f"{export.name} names no instant", hint=f"open {export.name}@latest, or an earlier one"
        )
    assert _catalog is not None
    history = open_history(_catalog, _state.path, export.name)
    try:
        if isinstance(export, DeltaExport):
            pair = delta_views(_state.path, history, export.number)
            try:
                delta = Delta(pair.new, pair.old)
            except BaseException:
                pair.new.close()
                raise
            finally:
                pair.old.close()  # what changed is known: only the newer instant is read
            return Export(delta, pair.histories, text, absolute=True, lock=threading.Lock())
        now_ns = Clock.for_reading(_state.clock).now_ns()
        position, lease = hold(history, export.when, now_ns)
        absolute = isinstance(export.when, Seq)
        try:
            view = _view(history, position.seq, export.volume)
        except BaseException:
            lease.close()
            raise
        return Export(view, [history], text, absolute=absolute, lock=threading.Lock(), lease=lease)
    except BaseException:
        history.close()
        raise


def _view(history: History, seq: int, volume: str | None) -> View | VolumeView:
    view = View(history, seq, Files(verify=_verify))
    if volume is None:
        return view
    try:
        # Tables are a guest's, and this process serves everybody: another one parses them.
        key = (history.timeline.id, seq, volume)
        parts = _maps.get(key)
        if parts is None:
            with Browser(view) as browser:
                parts = _maps[key] = browser.parts(volume)
            while len(_maps) > KEPT_MAPS:
                _maps.popitem(last=False)
        return VolumeView(view, parts)
    except BaseException:
        view.close()
        raise


def open(readonly: bool) -> Export:
    """The instant of the export name that the client asked for."""
    try:
        with _negotiations.choosing():
            return _chosen()
    except memory.NONE:
        _no_memory("open")


def _chosen() -> Export:
    asked = nbdkit.export_name()
    text = sealed.unseal(asked)[1]  # what is said of it tells no secret
    started = time.monotonic()
    assert _admission is not None
    try:
        disk = parse_export(_admission.admit(asked)).name
        with _clients.entering(disk):
            export = _open(text)
    except (CdpError, OSError) as error:
        _fail(error, "open", export=text[:200])
        raise
    _came.set()  # who only failed to open a point has not come
    assert _log is not None
    _log.emit("export.opened", export=text, seconds=round(time.monotonic() - started, 4))
    _clients.came(export, disk)
    export.thread_state = thread_state.keep()
    return export


def _no_memory(where: str) -> NoReturn:
    assert _log is not None
    memory.end(_log, where)


def _fail(error: CdpError | OSError, where: str, **fields: object) -> None:
    assert _state is not None and _log is not None and _admission is not None
    try:
        with durable.unreadable(_state.timelines):
            raise error
    except CdpError as said:
        nbdkit.set_error(said.errno)
        if _admission.is_news(said, time.monotonic()):
            _log.emit(f"export.{said.kind}", level="warning", where=where, reason=str(said), **fields)


def close(h: Export) -> None:
    """Gives files, environments and leases back."""
    _negotiations.left()
    try:
        h.view.close()
        if h.lease is not None:
            h.lease.close()
        for history in h.histories:
            history.close()
    except memory.NONE:
        _no_memory("close")
    finally:
        _clients.left(h)
        thread_state.let_go(h.thread_state)


def get_size(h: Export) -> int:
    """Bytes of the disk."""
    return h.view.size


def block_size(h: Export) -> tuple[int, int, int]:
    """Any alignment is fine; 4 KiB is what the journal holds."""
    return 1, 4096, MAX_REQUEST


def can_write(h: Export) -> bool:
    """A point never changes; a fork of it can be written."""
    return False


def can_flush(h: Export) -> bool:
    """Nothing to flush."""
    return False


def can_multi_conn(h: Export) -> bool:
    """Connections by a relative name may have been resolved to different instants."""
    return h.absolute


def can_extents(h: Export) -> bool:
    """Block status is known."""
    return True


def pread(h: Export, buf: bytearray, offset: int, flags: int) -> None:
    """The bytes at the instant."""
    try:
        with h.lock:
            h.view.read_into(buf, offset)
    except (CdpError, OSError) as error:
        _fail(error, "read", export=h.name)
        raise
    except memory.NONE:
        _no_memory("read")


def extents(h: Export, count: int, offset: int, flags: int) -> builtins.list[tuple[int, int, int]]:
    """Block status: data, or a hole that reads as zeros; a delta also has holes alone."""
    one = bool(flags & REQ_ONE)
    try:
        with h.lock:
            if isinstance(h.view, Delta):
                return [
                    (s, e - s, DELTA_TYPES[t]) for s, e, t in h.view.status(offset, offset + count, one=one)
                ]
            runs = h.view.status(offset, offset + count, one=one)
    except (CdpError, OSError) as error:
        _fail(error, "extents", export=h.name)
        raise
    except memory.NONE:
        _no_memory("extents")
    return [(start, end - start, HOLE_ZERO if zero else 0) for start, end, zero in runs]


REQ_ONE = int(nbdkit.FLAG_REQ_ONE)
HOLE = int(nbdkit.EXTENT_HOLE)
HOLE_ZERO = HOLE | int(nbdkit.EXTENT_ZERO)
DELTA_TYPES = {0: 0, 1: HOLE, 3: HOLE_ZERO}
