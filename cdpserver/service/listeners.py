"""The listening sockets: which there are, where, and how a restarted service comes by them again.

    run/worker-K.sock   writes, to worker K; each disk's `nbd/ID.sock` and `target.sock` are links to one of these
    export.sock         points
    api.sock            the control API

and, when configured, the same over TCP. Over TCP every worker has a socket of its own on the one port (SO_REUSEPORT): the kernel
spreads clients over them, and a worker passes on those of another's disks. Two processes that accept from one socket would do
worse: nbdkit blocks or spins in accept when the other one was quicker. A socket unit's TCP socket is root's, and shares its port
with none of ours: then worker 0 takes every client, and passes on.
"""

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import TypeAlias

from cdpserver.config import Address, Config
from cdpserver.errors import RefusedError
from cdpserver.service import keeper, processes
from cdpserver.service.keeper import Keeper
from cdpserver.state import StateDir

BACKLOG = 1024
"""Clients that wait for a process to come back; QEMU holds one connection a disk."""

Place: TypeAlias = Path | Address

API = "api"
API_TCP = "api-tcp"
EXPORT = "export"

ALIASES = {"target-tcp": "worker-0-tcp"}
"""What a socket unit may call a socket, for people."""


def worker_name(number: int) -> str:
    """The name of a worker's Unix socket; its TCP socket has `-tcp` appended."""
    return f"worker-{number}"


class Listeners:
    """The service's sockets. `open` before anything else."""

    def __init__(self, state: StateDir, config: Config, kept_by: Keeper) -> None:
        self._keeper = kept_by
        self._sockets: dict[str, socket.socket] = {}
        self.dropped: list[str] = []
        """What `open` found and let go of: the configuration names no such socket, or another address."""
        self._wanted: dict[str, Place] = {API: state.api_socket, EXPORT: state.export_socket}
        if config.listen_export is not None:
            self._wanted[f"{EXPORT}-tcp"] = config.listen_export
        if config.listen_api is not None:
            self._wanted[API_TCP] = config.listen_api
        for number in range(config.workers):
            self._wanted[worker_name(number)] = state.worker_socket(number)
            if config.listen is not None:
                self._wanted[f"{worker_name(number)}-tcp"] = config.listen

    def open(self) -> list[str]:
        """Take what is kept from before, make what is missing, let go of what is not wanted; the names of those taken.

        RefusedError if a port is another program's; then nothing is open.
        """
        try:
            return self._open()
        except BaseException:
            for sock in self._sockets.values():
                sock.close()
            self._sockets.clear()
            raise

    def _open(self) -> list[str]:
        kept = {ALIASES.get(name, name): sock for name, sock in self._keeper.take().items()}
        for name, sock in keeper.left_by_self().items():
            if name in kept:
                sock.close()
            else:
                kept[name] = sock
        for name in list(kept):
            place = self._wanted.get(name)
            if place is None or not _listens_at(kept[name], place):
                kept.pop(name).close()
                self._keeper.drop(name)
                self.dropped.append(name)
        # A port of which we hold no socket may be another program's, and SO_REUSEPORT would not say so.
        ours = {place for name, place in self._wanted.items() if name in kept}
        # Only sockets of one user share a port. Beside one that systemd made as root there is none: its worker takes all clients.
        foreign = {
            place
            for name, place in self._wanted.items()
            if name in kept and os.fstat(kept[name].fileno()).st_uid != os.geteuid()
        }
        for name, place in self._wanted.items():
            if name in kept:
                made = kept[name]
            elif isinstance(place, Path):
                made = bind_unix(place)
            else:
                if place in foreign:
                    continue
                if place not in ours:
                    bind_tcp(place, shared=False).close()
                    ours.add(place)
                made = bind_tcp(place, shared=True)
            self._sockets[name] = processes.keep_for_children(made)
            self._keeper.put(name, self._sockets[name])
        return sorted(kept)

    def of_worker(self, number: int) -> list[socket.socket]:
        """What a worker listens on."""
        return self._those(worker_name(number))

    def of_export(self) -> list[socket.socket]:
        """What the export listens on."""
        return self._those(EXPORT)

    @property
    def api(self) -> socket.socket:
        """What the control API listens on, to be closed by it."""
        return self._sockets[API].dup()

    @property
    def api_tcp(self) -> socket.socket | None:
        """What it listens on over TCP, to be closed by it."""
        found = self._sockets.get(API_TCP)
        return None if found is None else found.dup()

    def _those(self, name: str) -> list[socket.socket]:
        return [self._sockets[n] for n in (name, f"{name}-tcp") if n in self._sockets]

    def close(self, *, for_self: bool = False) -> None:
        """Let go of them; the keeper still holds those of NBD. `for_self`: this process's next program takes them."""
        if for_self:
            keeper.leave_to_self(self._sockets)
            return
        self._keeper.stop(API)
        self._keeper.stop(API_TCP)
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()


def _listens_at(sock: socket.socket, place: Place) -> bool:
    """Is this socket the one that clients of `place` reach?"""
    name = sock.getsockname()
    if isinstance(place, Path):
        with contextlib.suppress(FileNotFoundError):
            return bool(name == str(place)) and stat.S_ISSOCK(place.lstat().st_mode)
        return False
    return isinstance(name, tuple) and name[:2] == place


def bind_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket of ours, only for our own user; a stale one goes. Hold the server's lock."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    listener.listen(BACKLOG)
    return listener


def bind_tcp(address: Address, *, shared: bool) -> socket.socket:
    """Listen on an address, `shared` with other sockets of ours; RefusedError if that is not possible."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RefusedError(
            f"cannot listen on {address[0]}:{address[1]}: {error.strerror}",
            hint="choose another address or port",
        ) from None
    return listener
