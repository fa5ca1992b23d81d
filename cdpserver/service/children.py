"""The service's children: the workers of the target and the export (nbdkit), and the indexer. Started, watched, started anew.

The listening sockets belong to the service and outlive a child: a client that reconnects waits in the backlog until the next one
accepts. Crash-only: children are stopped with SIGKILL, since SIGTERM never ends nbdkit under a live mirror and turns its writes
into errors.

Taking over from an earlier service, whose children still serve: each new child loads everything, says `warm`, and waits for the
lock that its predecessor holds for life. When all are warm the predecessors are killed; what their clients see is a connection
that ends and another that is accepted a few milliseconds later. No word of ours is needed in between, so a service that is
killed half-way leaves one that serves.
"""

import importlib.util
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from cdpserver import tls
from cdpserver.config import Config
from cdpserver.errors import CdpError
from cdpserver.events import EventLog
from cdpserver.service import processes
from cdpserver.service.listeners import Listeners
from cdpserver.state import StateDir

FIRST_PAUSE_S = 0.1
"""Pause before the second start in a row; the first comes at once, so that a killed target costs a mirror milliseconds."""

LONGEST_PAUSE_S = 10.0
"""A child that always fails costs no more than this, and is back soon after what ails it is gone."""

READY_S = 30.0
"""How long the children may take until they serve before it is said aloud; normally 0.3 s."""

STEADY_S = 30.0
"""A child that ran this long had started well: its next death counts as the first."""

NOTE_S = 1.0
"""How often it is looked whether a child that has just begun is noted."""

TARGET = "target"
EXPORT = "export"


@dataclass
class Child:
    """One process that is to run as long as the service does."""

    name: str
    command: list[str]
    sockets: list[socket.socket] = field(default_factory=list)
    pid: int | None = None
    note: Path | None = None
    """The file in which it notes itself, until it is seen to have."""
    starts: int = 0
    warm: trio.Event = field(default_factory=trio.Event)
    """Set when it first could serve, had its predecessor gone."""
    ready: trio.Event = field(default_factory=trio.Event)
    """Set when it first serves."""


def plugin(name: str) -> str:
    """Path of one of our nbdkit plugins: scripts beside this package, which nbdkit reads by path."""
    found = importlib.util.find_spec("nbdplugin")
    assert found is not None and found.submodule_search_locations
    return str(Path(found.submodule_search_locations[0]) / f"{name}.py")


def _nbdkit(name: str, state: StateDir, config: Config, *parameters: str) -> list[str]:
    options = ["-f", "-t", "1", *tls.nbdkit_arguments(config.tls_certificates, config.tls_psk)]
    asked = [f"clients={config.nbd_clients}", *(["tls=1"] if config.nbd_tls else [])]
    return ["nbdkit", *options, "python", plugin(name), f"state_dir={state.path}", *parameters, *asked]


def export_command(state: StateDir, config: Config) -> list[str]:
    """How the export is started."""
    return _nbdkit(EXPORT, state, config, f"verify={config.export_verify}")


def serves(name: str) -> bool:
    """Does a child of this name serve clients, which are to be taken over and not cut off?"""
    return name == EXPORT or name.startswith(f"{TARGET}-")


class Children:
    """The processes. `orphans` are the files of those that an earlier service left serving."""

    def __init__(
        self,
        state: StateDir,
        config: Config,
        log: EventLog,
        listeners: Listeners,
        orphans: Sequence[Path] = (),
    ) -> None:
        self._state = state
        self._log = log
        self._orphans = orphans
        self._kept = False
        self.targets = [
            Child(f"{TARGET}-{number}", target_command(state, config, number), listeners.of_worker(number))
            for number in range(config.workers)
        ]
        self.export = Child(EXPORT, export_command(state, config), listeners.of_export())
        indexer = [sys.executable, "-m", "cdpserver.index.indexer", "--state-dir", str(state.path)]
        self.indexer = Child("indexer", indexer)

    @property
    def all(self) -> tuple[Child, ...]:
        """Every child."""
        return (*self.targets, self.export, self.indexer)

    def status(self) -> dict[str, Any]:
        """What an operator wants to know of each child."""
        return {child.name: {"pid": child.pid, "starts": child.starts} for child in self.all}

    def keep_for_next(self) -> None:
        """At the end of `running` leave the children that serve clients to the next service."""
        self._kept = True

    @asynccontextmanager
    async def running(self, before_taking_over: Callable[[], None]) -> AsyncIterator[None]:
        """The children run as long as the context lasts; at its end they are killed and gone.

        `before_taking_over` is called when the new workers are warm and an earlier service's are still there.
        """
        async with trio.open_nursery() as nursery:
            for child in self.targets:
                nursery.start_soon(self._keep_running, child)
            nursery.start_soon(self._start_readers, nursery, before_taking_over)
            nursery.start_soon(self._keep_noted)
            try:
                yield
            except BaseException as error:
                # A defect, or want of memory, ends the service alone, as a kill does: guests' writes go on.
                self._kept = not _is_said(error)
                raise
            finally:
                nursery.cancel_scope.cancel()

    async def _keep_noted(self) -> None:
        """Who began while the store was full could not note itself, and the next service would not know of it; for ever."""
        while True:
            await trio.sleep(NOTE_S)
            for child in self.all:
                if child.pid is not None and child.note is not None and processes.note(child.note, child.pid):
                    child.note = None

    async def ready(self) -> None:
        """Return when all that serve do. Callers set the deadline."""
        for child in (*self.targets, self.export):
            await child.ready.wait()

    async def _start_readers(self, nursery: trio.Nursery, before_taking_over: Callable[[], None]) -> None:
        with trio.move_on_after(READY_S):
            for child in self.targets:
                await child.warm.wait()
        before_taking_over()
        await self._end_orphans(TARGET)
        # The target first cuts what an unclean boot left behind: nobody reads a tail that may have holes.
        with trio.move_on_after(READY_S):
            for child in self.targets:
                await child.ready.wait()
        nursery.start_soon(self._keep_running, self.indexer)
        nursery.start_soon(self._keep_running, self.export)
        with trio.move_on_after(READY_S):
            await self.export.warm.wait()
        await self._end_orphans(EXPORT)

    async def _end_orphans(self, kind: str) -> None:
        files = [file for file in self._orphans if file.name.startswith(kind)]
        for name in await trio.to_thread.run_sync(processes.kill_orphans, files):
            self._log.emit("service.child-taken-over", child=name)

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
        pid_file = processes.new_pid_file(self._state.run, child.name)
        reading, writing = processes.ready_pipe()
        try:
            child.pid = pid = processes.spawn(pid_file, child.command, child.sockets, ready_fd=writing)
        finally:
            os.close(writing)
        child.starts += 1
        child.note = pid_file
        self._log.emit("service.child-started", child=child.name, pid=pid, starts=child.starts)
        try:
            await _listen_to(child, reading)
            status = await processes.wait(pid)
        except trio.Cancelled:
            if not (self._kept and serves(child.name)):
                os.kill(pid, signal.SIGKILL)
                with trio.CancelScope(shield=True):
                    await processes.wait(pid)
                pid_file.unlink(missing_ok=True)
            raise
        finally:
            child.pid = None
            os.close(reading)
        pid_file.unlink(missing_ok=True)
        return status


def _is_said(error: BaseException) -> bool:
    """Is it what stands in the way of a start, for an operator to put right? For that nothing is left running."""
    if isinstance(error, BaseExceptionGroup):
        return error.split((CdpError, OSError))[1] is None
    return isinstance(error, CdpError | OSError)


def target_command(state: StateDir, config: Config, number: int) -> list[str]:
    return _nbdkit(
        TARGET,
        state,
        config,
        f"durable_lag_ns={config.durable_lag_limit_ns}",
        f"worker={number}",
        f"workers={config.workers}",
    )


async def _listen_to(child: Child, reading: int) -> None:
    """Note what the child says of itself, until it has nothing more to say or has ended."""
    said = b""
    while True:
        await trio.lowlevel.wait_readable(reading)
        data = os.read(reading, 64)
        said += data
        if b"warm\n" in said:
            child.warm.set()
        if b"ready\n" in said:
            child.ready.set()
        if not data:
            return
