"""Every disk that the target has open, the thread that commits them, and what the service may ask.

A worker opens a timeline when its first client or the service asks for it, and keeps it: opening takes the writer lock, and
each disk is with one worker. Timelines that another host boot left open are opened at the start, so that nobody reads a tail
that may have holes.
"""

import _thread
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cdpserver import durable, limits, memory, messages
from cdpserver import timeline as timeline_file
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock, boot_id
from cdpserver.errors import BrokenError, CdpError, NotFoundError, RemovedError
from cdpserver.events import EventLog
from cdpserver.index.store import find_index, open_index, release
from cdpserver.journal.log import interval_path
from cdpserver.state import StateDir
from cdpserver.target.disk import TargetDisk
from cdpserver.target.leftover import needs_recovery
from cdpserver.target.place import holds
from cdpserver.target.placement import worker_of

STARVED_S = 0.1
"""Between two attempts to take a call while there are no files left for it."""

TIDY_S = 5.0
"""How often disks that were read are looked at, for what they need not keep open. One at rest costs a comparison or two."""

COMMITTERS = 16
"""Commits under way at once: disks wait for the same device, which makes many durable in one go."""


class Registry:
    """The disks of one target process: number `worker` of `workers`."""

    def __init__(
        self,
        state: StateDir,
        *,
        durable_lag_ns: int = limits.COMMIT_LAG_NS,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        self.state = state
        self._worker = worker
        self._workers = workers
        self._durable_lag_ns = durable_lag_ns
        self.clock = Clock.load(state.clock)
        self.boot_id = boot_id()
        self.catalog = Catalog.open(state, writable=False)
        self.log = EventLog(state.events)
        self._disks: dict[str, TargetDisk] = {}
        self._full: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._committers = ThreadPoolExecutor(COMMITTERS, thread_name_prefix="commit")

    def start(self) -> None:
        """Recover what another boot left, then commit and listen. Call after the fork."""
        for name, entry in self.catalog.names().items():
            if entry.state != "live" or worker_of(entry.id, self._workers) != self._worker:
                continue
            try:
                if needs_recovery(self.state.timeline(entry.id), self.boot_id):
                    self.disk(name)
            except CdpError as error:
                self.log.emit("target.open-failed", level="error", disk=name, reason=str(error))
            except memory.NONE:
                memory.end(self.log, "start")
            except Exception as error:  # noqa: BLE001 - the process's rim: the other disks are served
                self.log.emit("target.open-failed", level="error", disk=name, reason=repr(error))
        # All threads now: later there may be none left.
        together = threading.Barrier(COMMITTERS)
        list(self._committers.map(lambda _: together.wait(), range(COMMITTERS)))
        threading.Thread(target=self._commit_loop, name="committer", daemon=True).start()
        threading.Thread(target=self._tidy_loop, name="tidy", daemon=True).start()
        listener = self._listen()
        threading.Thread(target=self._serve, args=(listener,), name="control", daemon=True).start()

    def disk(self, name: str) -> TargetDisk:
        """The open disk of this name; opened now if need be. A broken one is closed and opened anew."""
        entry = self.catalog.get(name)
        if entry is None:
            raise NotFoundError(f"there is no disk {name!r}", hint="cdp disk list shows the names")
        if entry.state != "live":
            raise RemovedError(f"{name} is being removed")
        with self._lock:
            if self._closing:
                raise RemovedError("the service is stopping", hint="connect again when it is back")
            found = self._disks.get(entry.id)
            if found is not None and found.broken and found.clients == 0:
                found.shut(removing=False)
                del self._disks[entry.id]
                found = None
            if found is None:
                found = self._open(self.state.timeline(entry.id))
                found.full = self._full.get(entry.id, "")
                self._disks[entry.id] = found
            return found

    def _open(self, directory: Path) -> TargetDisk:
        with durable.unreadable(directory):
            return TargetDisk(
                self.state.path,
                timeline_file.load(directory),
                clock_ns=self.clock.now_ns,
                boot_id=self.boot_id,
                emit=self.log.emit,
            )

    # -- group commit ----------------------------------------------------------------------------------------

    def _commit_loop(self) -> None:
        """For ever: a process that commits no more must not go on."""
        due = time.monotonic()
        try:
            while True:
                # Counted from the last start: a round that takes its time must not add it to the lag.
                due = max(due + limits.COMMIT_INTERVAL_S, time.monotonic())
                time.sleep(max(0.0, due - time.monotonic()))
                self._commit_round()
        except memory.NONE:
            memory.end(self.log, "commit")

    def _commit_round(self) -> None:
        with self._lock:
            disks = list(self._disks.values())
        # Disks at rest are passed over here, where that costs two comparisons.
        behind = [d for d in disks if d.journal is not None and not d.broken and d.journal.behind]
        list(self._committers.map(self._commit_one, behind))

    def _commit_one(self, disk: TargetDisk) -> None:
        journal, name = disk.journal, disk.timeline.full_name
        assert journal is not None
        try:
            lag_ns = journal.lag_ns()
            if lag_ns:
                journal.commit()
                self._pace(disk, lag_ns)
        except BrokenError as error:
            self.log.emit("target.broken", level="error", disk=name, reason=str(error))
        except CdpError as error:
            self.log.emit("target.commit-failed", level="error", disk=name, reason=str(error))
        except memory.NONE:
            raise
        except Exception as error:  # noqa: BLE001 - the process's rim: the other disks are committed, and this one again
            self.log.emit("target.commit-failed", level="error", disk=name, reason=repr(error))

    def _tidy_loop(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(TIDY_S)
            with self._lock:
                disks = list(self._disks.values())
            for disk in disks:
                disk.tidy()

    def _pace(self, disk: TargetDisk, lag_ns: int) -> None:
        """Slow writes down a little while the store or the indexer cannot keep up."""
        journal = disk.journal
        assert journal is not None
        # An index only grows, so while what was seen of it is near enough, nobody has to look.
        behind = journal.records_after(disk.indexed)
        if behind > limits.TAIL_RECORDS or journal.slow_s:
            disk.indexed = self._indexed(disk.directory, journal.interval)
            behind = journal.records_after(disk.indexed)
        slow = 0.0
        if lag_ns > self._durable_lag_ns:
            slow = limits.COMMIT_DELAY_S
        elif behind > limits.TAIL_RECORDS:
            slow = limits.TAIL_DELAY_S
        if bool(slow) != bool(journal.slow_s):
            event = "target.slowed" if slow else "target.full-speed"
            self.log.emit(event, disk=disk.timeline.full_name, lag_ns=lag_ns, unindexed=behind)
        journal.slow_s = slow

    def _indexed(self, directory: Path, newest: int) -> int:
        """How far the index of the newest interval, or of the one before while that is new, has come."""
        for interval in (newest, newest - 1):
            path = find_index(interval_path(directory, interval), self.boot_id) if interval else None
            file = open_index(path) if path is not None else None
            if file is not None:
                indexed = file.indexed()
                release(file)
                if indexed:
                    return indexed
        return 0

    # -- the service's requests ------------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        path = self.state.worker_control(self._worker)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(16)
        return listener

    def _serve(self, listener: socket.socket) -> None:
        """For ever: who asks while files or threads have run out waits, or is cut off and asks again."""
        starved = False
        while True:
            try:
                connection, _ = listener.accept()
                with contextlib.ExitStack() as unless_served:
                    unless_served.callback(connection.close)
                    _thread.start_new_thread(self._converse, (connection,))  # not threading: see `memory`
                    unless_served.pop_all()
                starved = False
            except (OSError, RuntimeError) as error:
                if not starved:
                    self.log.emit("target.starved", level="error", reason=str(error))
                starved = True
                time.sleep(STARVED_S)
            except memory.NONE:
                memory.end(self.log, "control")

    def _converse(self, connection: socket.socket) -> None:
        with (
            connection,
            contextlib.suppress(ConnectionError),
        ):  # who asked may be killed before it is answered
            while (request := messages.receive(connection)) is not None:
                try:
                    reply = {"ok": self._answer(request)}
                except CdpError as error:
                    reply = messages.error_fields(error)
                except memory.NONE:
                    memory.end(self.log, str(request.get("op")))
                except Exception as error:  # noqa: BLE001 - the process's rim: the thread must go on
                    self.log.emit(
                        "target.request-failed", level="error", op=request.get("op"), reason=repr(error)
                    )
                    reply = {"error": "error", "message": f"the target failed: {error!r}", "hint": ""}
                connection.sendall(messages.pack(reply))

    def _answer(self, request: dict[str, Any]) -> Any:
        operations: dict[str, Callable[[dict[str, Any]], Any]] = {
            "ping": lambda _: os.getpid(),
            "status": self._status,
            "look": lambda r: self.disk(r["disk"]).status(),
            "holds": lambda r: holds(self.disk(r["disk"]).directory, r["place"]),
            "synced": lambda r: self.disk(r["disk"]).synced(
                r["session"],
                write_blocking=r["write_blocking"],
                bitmap=r.get("bitmap", ""),
                observed=r.get("observed"),
            ),
            "lost": lambda r: self.disk(r["disk"]).lost(
                r["session"], r["reason"], whole_ns=r["whole_ns"], freed_ns=r["freed_ns"]
            ),
            "mirrored": lambda r: self.disk(r["disk"]).mirrored(),
            "direct": lambda r: self.disk(r["disk"]).direct(),
            "mark": lambda r: (
                self.disk(r["disk"]).marker("bookmark").mark(r["message"], interval=r.get("interval"))
            ),
            "cut": lambda r: self.disk(r["disk"]).marker("base point").cut(),
            "grow": lambda r: self.disk(r["disk"]).grow(r["size"]),
            "commit": lambda r: self.disk(r["disk"]).writer("point").commit(),
            "full": self._set_full,
            "shut": self._shut,
            "shut-all": self._shut_all,
        }
        return operations[request["op"]](request)

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        """Status of the disks named, or of every open one; a disk that is not open has none."""
        with self._lock:
            disks = {disk.timeline.full_name: disk for disk in self._disks.values()}
        wanted = request.get("disks")
        return {name: disk.status() for name, disk in disks.items() if wanted is None or name in wanted}

    def _set_full(self, request: dict[str, Any]) -> None:
        """Refuse writes to one disk, or take them again; holds until this process ends."""
        with self._lock:
            self._full[request["id"]] = request["why"]
            found = self._disks.get(request["id"])
            if found is not None:
                found.full = request["why"]

    def _shut(self, request: dict[str, Any]) -> None:
        """Close one timeline for good (it is being removed)."""
        with self._lock:
            found = self._disks.pop(request["id"], None)
        if found is not None:
            found.shut(removing=True)

    def _shut_all(self, _: dict[str, Any]) -> int:
        """Close everything cleanly: the host may go down after this."""
        with self._lock:
            self._closing = True
            disks, self._disks = list(self._disks.values()), {}
        for disk in disks:
            disk.shut(removing=False)
        return len(disks)
