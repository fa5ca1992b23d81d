"""One protected VM: what is desired is made so, forever.

    monitor ──► for each disk:   no job ──► start ──► copying ──► in sync ──► *synced* said of the session
                                    ▲                    ▲            │ error, lost connection
                                    └── job ended        └── resumed ─┴──► degraded

Evidence for *synced*: the target's session is read first, then QEMU's job. What QEMU shows may be older than its last resume by
an instant, so session and errors must have been the same for a while before "everything is copied" counts; the target refuses
the word for a session that is over.
A QEMU that is gone is waited for; whatever runs already is taken over. Nothing here holds up another disk or another VM.
"""

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import trio

from cdpserver.errors import CdpError, RefusedError
from cdpserver.vm import disks
from cdpserver.vm.mirror import Job, Mirror
from cdpserver.vm.qmp import Monitor, QmpClosedError, QmpGoneError
from cdpserver.vm.record import Connection, ProtectedDisk, ProtectedVm

RETRY_S = 1.0
"""Between two attempts to reach a QEMU that is gone, or to start a job that was refused."""

LOOK_S = 0.5
SOON_S = 0.25
"""Between two looks at a job that is in sync, and at one that is not yet."""

SETTLE_S = 0.4
"""How long session and errors must have stayed the same."""

PATIENCE = 20
"""So many resumes in vain, of a target that answers, and the job is started anew: its connection may be beyond repair."""

HUNG_S = 1.4
"""A target that did not answer for so long costs the guest no more: killing it should have helped by then."""

GUARD_S = 0.1

ENDINGS = frozenset({"BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"})

State: TypeAlias = Literal["waiting", "starting", "copying", "resyncing", "synced", "degraded"]

Connect: TypeAlias = Callable[[Connection], AbstractAsyncContextManager[Monitor]]


@dataclass(frozen=True, slots=True)
class TargetState:
    """What our side says of a disk: a session of 0 has not begun."""

    session: int
    synced: bool


class Target(Protocol):
    """Our side of a mirror. Every method but `hung_s` may raise CdpError."""

    async def identity(self, disk: str) -> tuple[str, str]:
        """(uuid of its timeline, URI that a mirror on this host writes to)."""
        ...

    async def check_size(self, disk: str, size: int) -> None:
        """The disk has this size from here on. RefusedError if that would lose something."""
        ...

    async def state(self, disk: str) -> TargetState:
        """The session and whether it is in sync."""
        ...

    async def synced(self, disk: str, session: int) -> None:
        """The mirror is in sync and write-blocking. RefusedError for a session that is over."""
        ...

    async def lost(self, disk: str, session: int, reason: str, *, ago_s: float | None) -> None:
        """Writes of the guest did not arrive: a gap, from at most `ago_s` ago, and points are unordered after it.

        Nothing if that is on record, or if the disk was not in sync before.
        """
        ...

    def hung_s(self, disk: str) -> float:
        """For how long the target has not answered; 0.0 if it does, or is not there to answer."""
        ...

    def emit(self, event: str, **fields: Any) -> None:
        """Put an event on record."""
        ...


@dataclass
class DiskState:
    """How far one disk is. Sizes in bytes."""

    wanted: ProtectedDisk
    state: State = "waiting"
    reason: str = ""
    node: str = ""
    done: int = 0
    total: int = 0
    in_sync_before: bool = False
    told: str = ""
    """The reason put on record last, since it was in sync: the same is not said twice."""
    missed: str = ""
    """Why writes of the guest did not arrive, until that is on record."""
    unsaid: bool = True
    """It may have been in sync since that was said last."""
    whole_at: float | None = None
    """When nothing was missing last, by trio.current_time."""
    behind_since_ns: int | None = None
    """When it was in sync last, in time.monotonic_ns; None while it is, or if it never was."""

    def behind_ns(self, now_ns: int) -> int:
        """How long ago it was in sync, by time.monotonic_ns; 0 while it is."""
        return 0 if self.behind_since_ns is None else now_ns - self.behind_since_ns

    @property
    def resync(self) -> dict[str, Any] | None:
        """The copy under way: how, and how far."""
        if self.state not in ("copying", "resyncing"):
            return None
        return {"method": "full", "done_bytes": self.done, "total_bytes": self.total}


class Controller:
    """Protects one VM for as long as `run` runs."""

    def __init__(self, vm: ProtectedVm, connect: Connect, target: Target) -> None:
        self.vm = vm
        self.states = {disk.name: DiskState(disk) for disk in vm.disks}
        self._connect = connect
        self._target = target

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            tried_at = trio.current_time()
            try:
                async with self._connect(self.vm.connection) as monitor:
                    await self._protect(monitor)
            except CdpError as error:
                for seen in self.states.values():
                    self._note(seen, "waiting", str(error))
                    if isinstance(error, QmpGoneError) and seen.whole_at is not None:
                        seen.whole_at = tried_at  # a guest that does not run writes nothing
            await trio.sleep(RETRY_S)

    async def _protect(self, monitor: Monitor) -> None:
        """Until the monitor is gone: QmpClosedError."""
        followers = [_Follower(self, monitor, seen) for seen in self.states.values()]
        closed: list[CdpError] = []
        async with trio.open_nursery() as nursery:

            async def until_closed(work: Callable[[], Any]) -> None:
                try:
                    await work()
                except QmpClosedError as error:
                    closed.append(error)
                    nursery.cancel_scope.cancel()

            for follower in followers:
                nursery.start_soon(until_closed, follower.follow)
                nursery.start_soon(until_closed, follower.guard)
            nursery.start_soon(until_closed, lambda: self._hear(monitor, followers))
        raise closed[0]

    async def _hear(self, monitor: Monitor, followers: list["_Follower"]) -> None:
        while True:
            event = await monitor.next_event()
            for follower in followers:
                if event is None or (event.name in ENDINGS and event.data.get("device") == follower.job):
                    follower.heard()

    def _note(self, seen: DiskState, state: State, reason: str = "") -> None:
        """Say what is new; leaving *synced* is what an operator must hear of."""
        if seen.state == "synced" and state != "synced":
            self._target.emit("disk.degraded", level="warning", disk=seen.wanted.name, reason=reason or state)
        if state == "synced" and seen.state != "synced":
            event = "disk.resynced" if seen.in_sync_before else "disk.protected"
            self._target.emit(event, disk=seen.wanted.name, vm=self.vm.name)
            seen.in_sync_before, seen.told = True, ""
        elif state == "degraded" and reason != seen.told:
            self._target.emit("disk.unprotected", level="warning", disk=seen.wanted.name, reason=reason)
            seen.told = reason
        if seen.state == "synced" and state != "synced":
            seen.behind_since_ns = time.monotonic_ns()
        elif state == "synced":
            seen.behind_since_ns = None
        seen.state, seen.reason = state, reason


class _Follower:
    """Follows the mirror of one disk over one connection to a monitor."""

    def __init__(self, controller: Controller, monitor: Monitor, seen: DiskState) -> None:
        self._vm = controller.vm
        self._target = controller._target
        self._note = controller._note
        self._monitor = monitor
        self._seen = seen
        self._name = seen.wanted.name
        self._mirror: Mirror | None = None
        self._uri = ""
        self._errors = 0
        self._in_vain = 0
        self._write_blocking = False
        self._session = 0
        self._steady: tuple[int, int] = (-1, -1)
        self._steady_since = 0.0
        self._freed = False
        self._news = trio.Event()

    @property
    def job(self) -> str:
        """The id of its job; nothing while that is not known."""
        return self._mirror.name if self._mirror is not None else ""

    def heard(self) -> None:
        """Something happened to the job."""
        self._errors += 1
        self._news.set()

    async def follow(self) -> None:
        """Look and act, again and again."""
        while True:
            try:
                await self._step()
                pause = min(SOON_S * (1 + self._in_vain), RETRY_S)
            except QmpClosedError:
                raise
            except CdpError as error:
                self._note(self._seen, "degraded", str(error))
                pause = RETRY_S
            if self._seen.state != "synced":
                await trio.sleep(pause)
                continue
            with trio.move_on_after(LOOK_S):
                await self._news.wait()
            self._news = trio.Event()

    async def guard(self) -> None:
        """Free the guest from a target that hangs, unless it is to wait."""
        while not self._vm.wait:
            await trio.sleep(GUARD_S)
            if self._target.hung_s(self._name) < HUNG_S:
                self._freed = False
            elif not self._freed and self._mirror is not None:
                self._freed = True
                if await self._mirror.free_guest():
                    self._target.emit("disk.guest-freed", level="warning", disk=self._name)

    async def _step(self) -> None:
        if self._mirror is None:
            uuid, self._uri = await self._target.identity(self._name)
            found = Mirror(self._monitor, uuid)
            if await found.look() is not None and not await found.leads_to(self._uri):
                await found.end(force=True)
            self._mirror = found
        # No question to QEMU may wait for a target that hangs, and it would: opening a node does.
        if self._target.hung_s(self._name):
            self._note(self._seen, "degraded", "the target does not answer")
            return
        looked_at = trio.current_time()
        said = await self._target.state(self._name)
        job = await self._mirror.look()
        if job is None:
            await self._start()
        elif said.session < self._session:
            self._lose("the target came back with an older state: everything is copied anew")
            await self._mirror.end(force=True)
        elif job.stands:
            await self._resume()
        else:
            await self._watch(said, job)
        seen = self._seen
        if seen.state == "synced":
            seen.whole_at, seen.unsaid = looked_at, True
        elif seen.missed:
            ago_s = trio.current_time() - seen.whole_at if seen.whole_at is not None else None
            await self._target.lost(self._name, said.session, seen.missed, ago_s=ago_s)
            seen.missed, seen.unsaid = "", False
        self._session = said.session

    def _lose(self, reason: str) -> None:
        """Writes of the guest did not arrive."""
        self._note(self._seen, "degraded", reason)
        if self._seen.unsaid:
            self._seen.missed = reason

    async def _start(self) -> None:
        assert self._mirror is not None
        if self._seen.state == "synced":
            self._note(self._seen, "degraded", "its mirror job has ended")
        blocks = await self._monitor.execute("query-block")
        nodes = await self._monitor.execute("query-named-block-nodes")
        found = disks.find(disks.guest_disks(blocks), nodes, self._seen.wanted.device)
        await self._target.check_size(self._name, found.size)
        self._seen.node, self._seen.done, self._seen.total = found.node, 0, found.size
        if self._seen.state != "degraded":
            self._note(self._seen, "starting")
        await self._mirror.start(found.node, self._uri, method=self._vm.method, wait=self._vm.wait)
        self._in_vain, self._write_blocking = 0, False
        # Asked after the start: from there on every write is mirrored.
        if self._seen.unsaid and disks.wrote(await self._monitor.execute("query-blockstats"), found):
            self._seen.missed = "the guest wrote while it was not mirrored"

    async def _resume(self) -> None:
        assert self._mirror is not None
        self._lose("QEMU could not write to the target")
        self._in_vain += 1
        if self._in_vain > PATIENCE:
            await self._mirror.end(force=True)
        else:
            await self._mirror.resume()
        self._errors += 1

    async def _watch(self, said: TargetState, job: Job) -> None:
        assert self._mirror is not None
        now, seen = trio.current_time(), self._seen
        seen.done, seen.total = job.done, job.total
        if (steady := (said.session, self._errors)) != self._steady:
            self._steady, self._steady_since = steady, now
        if not (said.synced and job.ready):
            reason = "QEMU connected anew" if seen.state == "synced" else ""
            self._note(seen, "resyncing" if seen.in_sync_before else "copying", reason)
            if job.ready and not self._write_blocking:
                await self._mirror.make_write_blocking()
                self._write_blocking = True
                self._errors += 1  # what was seen before this does not count
                return
            if not job.in_sync or now - self._steady_since < SETTLE_S:
                return
            try:
                await self._target.synced(self._name, said.session)
            except RefusedError:
                return  # the session ended meanwhile: what is said of the next one is another look's business
        self._in_vain = 0
        self._note(seen, "synced")
