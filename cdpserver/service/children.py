"""The service's children: the target and the export (nbdkit), and the indexer. Started, watched, started anew.

The listening sockets belong to the service and outlive a child: a client that reconnects waits in the backlog until the next one
accepts. Crash-only: children are stopped with SIGKILL, since SIGTERM never ends nbdkit under a live mirror and turns its writes
into errors.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from cdpserver.config import Address, Config
from cdpserver.errors import RefusedError
from cdpserver.events import EventLog
from cdpserver.service import processes
from cdpserver.state import StateDir

FIRST_PAUSE_S = 0.1
"""Pause before the second start in a row; the first comes at once, so that a killed target costs a mirror milliseconds."""

LONGEST_PAUSE_S = 10.0
"""A child that always fails costs no more than this, and is back soon after what ails it is gone."""

READY_S = 30.0
"""How long the children may take until they serve before it is said aloud; normally 0.3 s."""

STEADY_S = 30.0
"""A child that ran this long had started well: its next death counts as the first."""

BACKLOG = 1024
"""Clients that wait for a child to come back; QEMU holds one connection a disk."""

GREETING = b"NBDMAGIC"
GOODBYE = bytes([0, 0, 0, 3]) + b"IHAVEOPT" + bytes([0, 0, 0, 2, 0, 0, 0, 0])
"""Client flags (fixed newstyle, no zeroes) and NBD_OPT_ABORT without data: the polite end of a handshake."""


@dataclass
class Child:
    """One process that is to run as long as the service does."""

    name: str
    command: list[str]
    sockets: list[socket.socket] = field(default_factory=list)
    pid: int | None = None
    starts: int = 0


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


def bind_tcp(address: Address) -> socket.socket:
    """Listen on an address; RefusedError if that is not possible."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RefusedError(
            f"cannot listen on {address[0]}:{address[1]}: {error.strerror}",
            hint="choose another address or port",
        ) from None
    return listener


def plugin(name: str) -> str:
    """Path of one of our nbdkit plugins: scripts beside this package, which nbdkit reads by path."""
    found = importlib.util.find_spec("nbdplugin")
    assert found is not None and found.submodule_search_locations
    return str(Path(found.submodule_search_locations[0]) / f"{name}.py")


def _nbdkit(name: str, state: StateDir, *parameters: str) -> list[str]:
    return ["nbdkit", "-f", "-t", "1", "python", plugin(name), f"state_dir={state.path}", *parameters]


class Children:
    """The three processes. `bind` before `running`."""

    def __init__(self, state: StateDir, config: Config, log: EventLog) -> None:
        self._state = state
        self._log = log
        indexer = [sys.executable, "-m", "cdpserver.index.indexer", "--state-dir", str(state.path)]
        self.target = Child(
            "target", _nbdkit("target", state, f"durable_lag_ns={config.durable_lag_limit_ns}")
        )
        self.export = Child("export", _nbdkit("export", state))
        self.indexer = Child("indexer", indexer)
        self._listen = {
            "target": (state.target_socket, config.listen),
            "export": (state.export_socket, config.listen_export),
        }

    @property
    def all(self) -> tuple[Child, ...]:
        """Every child."""
        return (self.target, self.export, self.indexer)

    def bind(self) -> None:
        """Make the listening sockets. RefusedError if a port is taken."""
        for child in (self.target, self.export):
            path, address = self._listen[child.name]
            if address is not None:
                child.sockets.append(processes.keep_for_children(bind_tcp(address)))
            child.sockets.append(processes.keep_for_children(bind_unix(path)))

    def close(self) -> None:
        """Close the sockets; the names in the file system go too, so that nobody waits for us."""
        for child in self.all:
            for listener in child.sockets:
                listener.close()
            child.sockets.clear()
        for path, _ in self._listen.values():
            path.unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """What an operator wants to know of each child."""
        return {child.name: {"pid": child.pid, "starts": child.starts} for child in self.all}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The children run as long as the context lasts; at its end they are killed and gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_running, self.target)
            nursery.start_soon(self._start_readers, nursery)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()

    async def _start_readers(self, nursery: trio.Nursery) -> None:
        # The target first cuts what an unclean boot left behind: nobody reads a tail that may have holes.
        with trio.move_on_after(READY_S):
            await wait_for_greeting(self._state.target_socket)
        nursery.start_soon(self._keep_running, self.export)
        nursery.start_soon(self._keep_running, self.indexer)

    async def _keep_running(self, child: Child) -> None:
        failures = 0
        while True:
            started = trio.current_time()
            status = await self._run_once(child)
            failures = 0 if trio.current_time() - started > STEADY_S else failures
            pause = min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S) if failures else 0.0
            failures = min(failures + 1, 20)
            self._log.emit(
                "service.child-died", level="error", child=child.name, status=status, restart_in_s=pause
            )
            await trio.sleep(pause)

    async def _run_once(self, child: Child) -> int:
        pid_file = self._state.run / f"{child.name}.pid"
        child.pid = pid = processes.spawn(pid_file, child.command, child.sockets)
        child.starts += 1
        self._log.emit("service.child-started", child=child.name, pid=pid, starts=child.starts)
        try:
            return await processes.wait(pid)
        except trio.Cancelled:
            os.kill(pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await processes.wait(pid)
            raise
        finally:
            child.pid = None
            pid_file.unlink(missing_ok=True)


async def wait_for_greeting(path: Path) -> None:
    """Return when an NBD server speaks on the socket. Callers set the deadline."""
    pause = 0.02
    while True:
        # A full backlog is an OSError: clients that wait for the server, too.
        with trio.move_on_after(1), contextlib.suppress(OSError, trio.BrokenResourceError):
            async with await trio.open_unix_socket(str(path)) as stream:
                if (await stream.receive_some(64)).startswith(GREETING):
                    await stream.send_all(GOODBYE)
                    return
        await trio.sleep(pause)
        pause = min(2 * pause, 0.5)
