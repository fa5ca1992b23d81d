"""nbdkit plugin: where QEMU's backup jobs write to; what comes goes into a repository, chunk by chunk.

One process takes one backup: an export for each of its disks, by the disk's name, for one client each. Whoever started it speaks
with it over the socket `control` (cdpserver/vm/backup/receiver.py): the first message says what is to be made, later ones ask
for its state, to commit, or to take no more. When that socket ends, so does this process, and there is no backup.
"""

import builtins
import contextlib
import errno
import os
import socket
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbdkit

from cdpserver import events, messages
from cdpserver.errors import CdpError
from cdpserver.repository import sessions
from cdpserver.repository.assembly import UNIT
from cdpserver.repository.places import open_place
from cdpserver.repository.pushed import Disk, Intent, Pushed
from cdpserver.repository.repository import Repository
from nbdplugin import thread_state
from nbdplugin.negotiation import Negotiations
from nbdplugin.parent import outlive_parent

API_VERSION = 2

MAX_REQUEST = 32 << 20
"""Largest request that we advertise; QEMU's own limit."""

PREFERRED = 64 << 10
"""What QEMU's backup copies at least."""

_control = -1
_held = contextlib.ExitStack()
_pushed: Pushed | None = None
_negotiations = Negotiations()


@dataclass
class Export:
    """One connection's disk."""

    disk: Disk
    thread_state: int = 0


def config(key: str, value: str) -> None:
    """`control=FD`: the number of a socket that is open here; `negotiation=SECONDS`: who has chosen no export by then is gone."""
    global _control
    if key == "negotiation":
        _negotiations.limit_s = float(value)
    elif key == "control":
        _control = int(value)
    else:
        raise RuntimeError(f"unknown parameter {key}; there are control=FD and negotiation=SECONDS")


def config_complete() -> None:
    """Errors raised here are seen by whoever started nbdkit."""
    if _control < 0:
        raise RuntimeError("control=FD is missing")


def thread_model() -> int:
    """Connections run side by side."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    """LMDB and threads belong to the process that serves."""
    outlive_parent()  # a thread of it, that is; the process's end is seen by the control socket
    events.configure("intake")
    control = socket.socket(fileno=_control)
    asked = messages.receive(control)
    if asked is None:
        raise RuntimeError("nobody says what is to be made")
    try:
        _begin(asked)
    except CdpError as error:
        control.sendall(messages.pack(messages.error_fields(error)))
        raise
    control.sendall(messages.pack({"ok": True}))
    _negotiations.begin(lambda count: nbdkit.debug(f"{count} connections chose no export in time"))
    threading.Thread(target=_answer, args=(control,), name="control", daemon=True).start()


def preconnect(readonly: bool) -> None:
    """A client has come, and is not greeted yet."""
    _negotiations.began()


def _begin(asked: dict[str, Any]) -> None:
    global _pushed
    intent = Intent.read(asked["intent"])
    cache = None if asked["cache"] is None else Path(asked["cache"])
    repository = _held.enter_context(
        Repository(open_place(asked["repo"]), secret=asked["secret"], cache=cache)
    )
    check_held = _held.enter_context(sessions.session(repository.place, intent.id))
    repository.refresh()
    _pushed = Pushed(repository, intent, check_held)
    _held.callback(_pushed.close)


def _answer(control: socket.socket) -> None:
    """Until whoever started us is gone, or ends it."""
    try:
        while (asked := messages.receive(control)) is not None:
            try:
                reply = _do(asked)
            except CdpError as error:
                reply = messages.error_fields(error)
            control.sendall(messages.pack(reply))
    except Exception:  # noqa: BLE001 - the rim of the process, which says what it died of
        traceback.print_exc()
    finally:
        os._exit(0)  # clients may be connected, for which nbdkit would wait


def _do(asked: dict[str, Any]) -> dict[str, Any]:
    assert _pushed is not None
    match asked["op"]:
        case "status":
            return _pushed.status()
        case "commit":
            return _pushed.commit(int(asked["time_ns"]), str(asked["grade"])).show()
        case "give-up":
            _pushed.give_up()
            return {}
        case "end":
            _held.close()
            return {}
    raise AssertionError(asked["op"])


def open(readonly: bool) -> Export:
    """The disk of the export name that the client asked for."""
    with _negotiations.choosing():
        return _chosen()


def _chosen() -> Export:
    assert _pushed is not None
    try:
        export = Export(_pushed.connect(nbdkit.export_name()))
    except CdpError as error:
        nbdkit.set_error(error.errno)
        raise
    export.thread_state = thread_state.keep()
    return export


def close(h: Export) -> None:
    """Before the commit that is the end of the backup."""
    _negotiations.left()
    assert _pushed is not None
    _pushed.lost(h.disk)
    thread_state.let_go(h.thread_state)


def get_size(h: Export) -> int:
    """Bytes of the disk."""
    return h.disk.size


def block_size(h: Export) -> tuple[int, int, int]:
    """QEMU keeps to it."""
    return UNIT, PREFERRED, MAX_REQUEST


def can_flush(h: Export) -> bool:
    """A flush is taken, and says nothing: durable is what is committed."""
    return True


def can_fua(h: Export) -> int:
    """As a flush."""
    return int(nbdkit.FUA_NATIVE)


def can_zero(h: Export) -> bool:
    """Zeros cost nothing."""
    return True


def can_fast_zero(h: Export) -> bool:
    """Never more than a write."""
    return True


def pread(h: Export, buf: bytearray, offset: int, flags: int) -> None:
    """A job that QEMU runs only writes."""
    nbdkit.set_error(errno.EPERM)
    raise RuntimeError("what is sent here cannot be read")


def pwrite(h: Export, buf: builtins.bytearray, offset: int, flags: int) -> None:
    """Taken on return, in memory: a backup whose process dies is none."""
    assert _pushed is not None
    try:
        _pushed.write(h.disk, offset, buf)
    except CdpError as error:
        nbdkit.set_error(error.errno)
        raise


def zero(h: Export, count: int, offset: int, flags: int) -> None:
    """The same for zeros."""
    assert _pushed is not None
    try:
        _pushed.zero(h.disk, offset, count)
    except CdpError as error:
        nbdkit.set_error(error.errno)
        raise


def flush(h: Export, flags: int) -> None:
    """Nothing to do."""
