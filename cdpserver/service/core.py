"""What every part of the service needs: the state directory, the clock, the catalog, the target, and threads to wait in."""

import contextlib
import ipaddress
import json
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import trio

from cdpserver import groups, messages, names, progress, sealed, timeline
from cdpserver.catalog import Catalog, Entry, Row
from cdpserver.clock import Clock
from cdpserver.config import Address, Config
from cdpserver.errors import BrokenError, CorruptError, NotFoundError, RemovedError
from cdpserver.events import EventLog
from cdpserver.journal.log import Position
from cdpserver.names import When, check_disk_name
from cdpserver.points import Timeline as Points
from cdpserver.priority import behind_writes
from cdpserver.retention import policies
from cdpserver.retention.policy import Policy, combine
from cdpserver.service import processes
from cdpserver.service.control import Targets
from cdpserver.state import StateDir
from cdpserver.view.history import History

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

THREADS = 16
"""Threads that wait for the store's disk at once; more requests queue."""


@dataclass(frozen=True, slots=True)
class Core:
    """The service's own things. Methods named `thread*` and the coroutines never block the event loop."""

    state: StateDir
    config: Config
    clock: Clock
    catalog: Catalog
    log: EventLog
    targets: Targets
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(THREADS))

    async def thread(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run something that blocks in a thread."""
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)

    async def job(self, name: str, module: str, *arguments: str, let_end_s: float = 0) -> Any:
        """Run `python -m module` in a process of its own, behind guests' writes; its JSON answer, or the error it reports. Killed
        when cancelled; with `let_end_s` only if SIGTERM has not ended it by then.
        """
        command = [*behind_writes(), sys.executable, "-m", module, *arguments]
        tell = progress.hearer.get()

        def hear(line: bytes) -> None:
            if (fraction := progress.read_line(line)) is not None:
                tell(fraction)

        done = await processes.run(self.state.run / f"{name}.pid", command, hear, let_end_s=let_end_s)
        try:
            last = done.stdout.rpartition(b"\n")[2]
            answer = json.loads(last or b"{}")
        except ValueError:
            answer = {}
        messages.raise_error(answer)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {done.returncode}"
            raise BrokenError(f"{module} failed: {reason[:300]}", hint="look at the log")
        return answer

    # -- disks -----------------------------------------------------------------------------------------------

    def entry(self, name: str) -> Entry:
        """The live disk or fork of this name. NotFoundError, RemovedError."""
        found = self.catalog.get(check_disk_name(name))
        if found is None:
            raise groups.no_disk(self.catalog, name)
        if found.state != "live":
            raise RemovedError(f"{name} is being removed", hint=f"to end that: cdp disk remove {name}")
        return found

    @contextlib.contextmanager
    def history(self, entry: Entry) -> Iterator[History]:
        """The history of a disk, open for reading; holds its lease. For threads."""
        history = History(self.state.path, timeline.load(self.state.timeline(entry.id)))
        try:
            yield history
        finally:
            history.close()

    def look(self, entry: Entry, look: Callable[[Points], Result]) -> Result:
        """What a look at the points of a disk finds, also if some are dropped meanwhile; holds its lease. For threads."""
        with self.history(entry) as history:
            points = Points(history)
            return history.journal.settled(partial(look, points))

    def has_bookmark(self, entry: Entry, name: str) -> bool:
        """Has a disk a bookmark of this name? For threads."""
        return self.look(entry, lambda points: not points.journal.empty and points.bookmark(name) is not None)

    def policy(self, entry: Entry) -> Policy:
        """The policy of a disk as it is now. For threads."""
        return policies.effective(self.catalog, self.config, entry).policy

    def rp_every_ns(self, entry: Entry, rows: Mapping[str, Row] | None = None) -> int:
        """How far apart a disk's recovery points are listed; `rows` saves reading the policies again. For threads."""
        try:
            found = self.catalog.rows("policies") if rows is None else rows
            return combine(policies.layers(found, self.config, entry)).policy.rp_every_ns
        except CorruptError:
            return self.config.policy_rp_every_ns  # what cannot be read keeps nobody from seeing points

    def resolve(self, entry: Entry, when: When) -> tuple[Position, int]:
        """(place of an instant, size of the disk then). For threads."""
        now_ns = self.clock.now_ns()

        def look(points: Points) -> tuple[Position, int]:
            position = points.resolve(when, now_ns=now_ns)
            return position, points.history.size_at(position.seq)

        return self.look(entry, look)

    async def target_status(self, entry: Entry) -> dict[str, Any]:
        """What the target says of one disk; {} when it has not opened it."""
        name = entry.name
        with contextlib.suppress(
            CorruptError, NotFoundError
        ):  # a damaged disk can be asked about, and removed
            name = (await self.thread(timeline.load, self.state.timeline(entry.id))).full_name
        answer = await self.targets.call(entry.id, "status", disks=[name])
        status: dict[str, Any] = answer.get(name, {})
        return status

    async def make_durable(self, entry: Entry, seq: int) -> None:
        """On return the record `seq` of a disk survives a power loss. A broken writer matters only to what is not durable."""
        status = await self.target_status(entry)
        if status.get("durable_seq", -1) < seq:
            await self.targets.call(entry.id, "commit", disk=entry.name)

    # -- URIs ------------------------------------------------------------------------------------------------

    def disk_uris(self, entry: Entry, secret: str = "") -> dict[str, str]:
        """Where a mirror (or a fork's guest) writes to: `uri`, and `uri_unix` when that is not it.

        Over TCP with TLS it opens only with the disk's secret (see `secret`).
        """
        unix = unix_uri(entry.name, str(self.state.nbd / f"{entry.id}.sock"))
        if self.config.listen is None:
            return {"uri": unix}
        return {"uri": self._tcp_uri(entry.name, self.config.listen, secret), "uri_unix": unix}

    def point_uris(
        self, name: str, seq: int, volume: str | None = None, *, secret: str = ""
    ) -> dict[str, str]:
        """Where a point, or a volume of it, is read; absolute, so that a second connection sees the same instant."""
        export = names.format_export(names.PointExport(name, names.Seq(seq), volume))
        unix = unix_uri(export, str(self.state.export_socket))
        if self.config.listen_export is None:
            return {"uri": unix}
        return {"uri": self._tcp_uri(export, self.config.listen_export, secret), "uri_unix": unix}

    def _tcp_uri(self, export: str, address: Address, secret: str) -> str:
        name = sealed.seal(export, secret) if secret else export
        return tcp_uri(name, address, tls=self.config.nbd_tls)

    def secret(self, entry: Entry) -> str:
        """What opens a disk over TCP; "" where nothing is needed. For threads."""
        if not self.config.nbd_tls:
            return ""
        found = timeline.load(self.state.timeline(entry.id))
        return sealed.secret_of(sealed.load_key(self.state), found.uuid)


def unix_uri(export: str, socket_path: str) -> str:
    """The NBD URI of an export on a Unix socket. Names need no quoting: they have been checked."""
    return f"nbd+unix:///{export}?socket={urllib.parse.quote(socket_path)}"


def tcp_uri(export: str, address: Address, *, tls: bool = False) -> str:
    """The NBD URI of an export on an address. A wildcard becomes this host's name, which others can reach."""
    host, port = address
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{'nbds' if tls else 'nbd'}://{place}/{export}"
