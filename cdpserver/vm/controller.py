"""One protected VM: what is desired is made so, forever.

    monitor ──► for each disk:   no job ──► start ──► copying ──► in sync ──► *synced* said of the session
                                    ▲                    ▲            │ error, lost connection
                                    └── job ended        └── resumed ─┴──► degraded

Evidence for *synced*: the target's session is read first, then QEMU's job. What QEMU shows may be older than its last resume by
an instant, so session and errors must have been the same for a while before "everything is copied" counts; the target refuses
the word for a session that is over.
A QEMU that is gone is waited for; whatever runs already is taken over. Nothing here holds up another disk or another VM.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import trio

from cdpserver.errors import CdpError, RefusedError
from cdpserver.vm import arrival, disks, machines, proof
from cdpserver.vm.bitmaps import Anchoring, Bitmaps
from cdpserver.vm.changes import CannotError, Changes
from cdpserver.vm.connect import Connect
from cdpserver.vm.copies import Copy, How
from cdpserver.vm.marks import Mark
from cdpserver.vm.mirror import Job, Mirror, waiting_uri
from cdpserver.vm.qmp import Event, Monitor, QmpClosedError, QmpGoneError, QmpRefusedError
from cdpserver.vm.record import ProtectedDisk, ProtectedVm, QmpSocket
from cdpserver.vm.target import Ago, SeenJob, Target, TargetState

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

TRIES = 3
TRY_AGAIN_S = 2.5
"""So often what changed is sent alone before the whole disk is. QEMU tells of a second write that failed only after a second."""

RUN_EVENTS = frozenset({"STOP", "RESUME"})

ENDINGS = frozenset({"BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"})

State: TypeAlias = Literal["waiting", "starting", "copying", "resyncing", "synced", "degraded"]


@dataclass
class DiskState:
    """How far one disk is. Sizes in bytes."""

    wanted: ProtectedDisk
    state: State = "waiting"
    reason: str = ""
    node: str = ""
    copy: Copy | None = None
    """The last copy, or the one under way."""
    bitmap: str = ""
    """The source's dirty bitmap that the target is anchored to; a resync sends what it marks."""
    in_sync_before: bool = False
    told: str = ""
    """The reason put on record last, since it was in sync: the same is not said twice."""
    missed: str = ""
    """Why writes of the guest did not arrive, until that is on record."""
    unsaid: bool = True
    """It may have been in sync since that was said last."""
    whole_at: float | None = None
    """When nothing was missing last, by trio.current_time."""
    freed_at: float | None = None
    """When the guest was let go on without a target that hung, the first time since then."""
    behind_since_ns: int | None = None
    """When it was in sync last, in time.monotonic_ns; None while it is, or if it never was."""

    def behind_ns(self, now_ns: int) -> int:
        """How long ago it was in sync, by time.monotonic_ns; 0 while it is."""
        return 0 if self.behind_since_ns is None else now_ns - self.behind_since_ns

    @property
    def resync(self) -> dict[str, Any] | None:
        """The last copy or the one under way: how, why, how far, and what it cost."""
        return None if self.copy is None else self.copy.as_dict()


class Controller:
    """Protects one VM for as long as `run` runs."""

    def __init__(self, vm: ProtectedVm, connect: Connect, target: Target) -> None:
        self.vm = vm
        self.states = {disk.name: DiskState(disk) for disk in vm.disks}
        self.machine = vm.machine  # as QEMU told it last
        self._connect = connect
        self._target = target
        self._holding = trio.Lock()
        """Who has it may hold the guest."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            tried_at = trio.current_time()
            try:
                async with self._connect(self.vm.connection) as monitor:
                    self.machine = await machines.read_machine(monitor) or self.machine
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
            nursery.start_soon(until_closed, lambda: self._let_go(monitor, followers))
        raise closed[0]

    async def _let_go(self, monitor: Monitor, followers: list["_Follower"]) -> None:
        """A guest that was held at its arrival goes on when its mirrors have begun, or after a while without."""
        if await arrival.is_held(monitor):
            with trio.move_on_after(arrival.HELD_S):
                for follower in followers:
                    await follower.begun.wait()
            while await arrival.is_held(monitor):
                with contextlib.suppress(QmpRefusedError):  # a QEMU that cannot let it run now may later
                    await arrival.let_go(monitor)
                    return
                await trio.sleep(RETRY_S)

    async def _hear(self, monitor: Monitor, followers: list["_Follower"]) -> None:
        while True:
            event = await monitor.next_event()
            for follower in followers:
                follower.hear(event)

    def _note(self, seen: DiskState, state: State, reason: str = "") -> None:
        """Say what is new; leaving *synced* is what an operator must hear of."""
        if seen.state == "synced" and state != "synced":
            self._target.emit("disk.degraded", level="warning", disk=seen.wanted.name, reason=reason or state)
        if state == "synced" and seen.state != "synced":
            event = "disk.resynced" if seen.in_sync_before else "disk.protected"
            cost = {} if seen.copy is None else seen.copy.cost()
            self._target.emit(event, disk=seen.wanted.name, vm=self.vm.name, **cost)
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
        self._holding = controller._holding
        self._monitor = monitor
        self._seen = seen
        self._name = seen.wanted.name
        self._mirror: Mirror | None = None
        self._changes: Changes | None = None
        self._uri = ""
        self._trusted = self._gave_up = ""
        self._tries = self._errors = self._in_vain = 0
        self._write_blocking = False
        self._said: TargetState | None = None
        self._steady: tuple[int, int] = (-1, -1)
        self._steady_since = 0.0
        self._freed = False
        self._run_news = True
        self._elsewhere = ""
        self._news = trio.Event()
        self.begun = trio.Event()
        """There is a mirror: every write of the guest from here on is sent."""

    def hear(self, event: Event | None) -> None:
        """Every event of the monitor, in order; None for some that were lost."""
        if event is None or event.name in RUN_EVENTS:
            self._run_news = True
            self._news.set()
        if self._mirror is None or self._changes is None:
            return
        self._changes.heard(event)
        if event is None or (event.name in ENDINGS and event.data.get("device") == self._mirror.name):
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
                pause = TRY_AGAIN_S if isinstance(error, CannotError) and error.again else RETRY_S
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
                self._freed, now = True, trio.current_time()
                if await self._mirror.free_guest():
                    self._seen.freed_at = self._seen.freed_at or now
                    self._lose("the guest went on without a target that did not answer")
                    self._target.emit("disk.guest-freed", level="warning", disk=self._name)

    async def _step(self) -> None:
        if self._mirror is None:
            uuid, uri = await self._target.identity(self._name)
            self._uri = waiting_uri(uri, uuid) if self._vm.wait else uri
            found = Mirror(self._monitor, uuid)
            self._changes = Changes(self._monitor, found, self._holding)
            await self._changes.clean()
            if await found.look() is not None and not await found.leads_to(self._uri):
                await found.end(force=True)
            self._bitmaps = Bitmaps(self._monitor, found)
            self._anchoring = Anchoring(self._bitmaps, settle_s=SETTLE_S)
            self._mark = Mark(self._monitor, found)
            self._seen.node = self._seen.node or await self._bitmaps.source()
            self._mirror = found
        # No question to QEMU may wait for a target that hangs, and it would: opening a node does.
        if self._target.hung_s(self._name):
            self._note(self._seen, "degraded", "the target does not answer")
            return
        if await self._is_elsewhere():
            return
        looked_at = trio.current_time()
        said = await self._target.state(self._name)
        job = await self._mirror.look()
        distrust = await self._distrust(said, job)
        await self._say_lost(said)  # first: a start may take long, and a job that goes on would count again
        if job is None:
            await self._start(said)
            self.begun.set()
        elif distrust:
            self._lose(distrust)
            await self._mirror.end(force=True)
        elif job.stands:
            await self._resume(said)
        else:
            self.begun.set()
            await self._watch(said, job, looked_at)
        seen = self._seen
        if seen.state == "synced" and not seen.missed:
            seen.whole_at, seen.freed_at, seen.unsaid = looked_at, None, True
        else:
            await self._say_lost(said)
        if said.place:
            await self._mark.keep(said.place)
        self._said = said

    async def _is_elsewhere(self) -> bool:
        """Does the VM run in another QEMU, and this one only waits for it, or had it?"""
        assert self._mirror is not None
        if self._run_news:
            self._run_news = False
            state = await arrival.run_state(self._monitor)
            # No event says that a migration has ended: while the guest does not run, it is looked at again.
            self._run_news = self._run_news or state not in ("running", "")
            self._elsewhere = arrival.AWAY.get(state, "")
            if self._elsewhere and await self._mirror.look() is not None:
                await self._mirror.end()
        if self._elsewhere:
            self._note(self._seen, "waiting", self._elsewhere)
        return bool(self._elsewhere)

    async def _distrust(self, said: TargetState, job: Job | None) -> str:
        """Why the target cannot be what the job, or what was proven, is of."""
        reason = ""
        before = ""
        if self._said is not None:
            reason = proof.worse(said, self._said)
            before = self._said.place if said.session != self._said.session else ""
        elif job is not None:
            before = await self._mark.read()
            reason = proof.foreign(said, await self._bitmaps.look(), marked=bool(before))
        if before and not reason and not await self._target.holds(self._name, before):
            reason = proof.OLDER
        if reason:
            self._trusted, self._tries, self._gave_up = "", TRIES, reason
        return reason

    def _lose(self, reason: str) -> None:
        """Writes of the guest did not arrive."""
        self._note(self._seen, "degraded", reason)
        if self._seen.unsaid:
            self._seen.missed = reason

    async def _say_lost(self, said: TargetState) -> None:
        """Put on record what is missing, if anything is."""
        seen = self._seen
        if not seen.missed:
            return
        ago = Ago.of(trio.current_time(), whole_at=seen.whole_at, freed_at=seen.freed_at)
        await self._target.lost(self._name, said.session, seen.missed, ago=ago)
        seen.missed, seen.unsaid = "", False

    async def _start(self, said: TargetState) -> None:
        assert self._mirror is not None
        if self._seen.state == "synced":
            self._note(self._seen, "degraded", "its mirror job has ended")
        blocks = await self._monitor.execute("query-block")
        nodes = await self._monitor.execute("query-named-block-nodes")
        found = disks.find(disks.guest_disks(blocks), nodes, self._seen.wanted.device)
        await self._target.check_size(self._name, found.size)
        self._seen.node = found.node
        if self._seen.state != "degraded":
            self._note(self._seen, "starting")
        await self._mirror.end_others(found.node)
        self._anchoring.begin(found.node)
        bitmap, why = proof.bitmap_for(
            said, await self._bitmaps.look(), node=found.node, method=self._vm.method, trusted=self._trusted
        )
        if bitmap and self._tries < TRIES:
            await self._send_changes(said, found, bitmap, why)
        else:
            await self._bitmaps.remove_all(but=said.anchor)
            self._begin_copy("full", self._gave_up if bitmap else why, said).total = found.size
            await self._mirror.start(found.node, self._uri, method=self._vm.method, wait=self._vm.wait)
        self._in_vain, self._write_blocking, self._tries = 0, False, 0
        self._errors += 1
        # Asked after the start: from there on every write is mirrored.
        if self._seen.unsaid and disks.wrote(await self._monitor.execute("query-blockstats"), found):
            self._seen.missed = "the guest wrote while it was not mirrored"

    def _begin_copy(self, method: How, why: str, said: TargetState) -> Copy:
        self._seen.copy = Copy(method, why, said.payload_bytes)
        return self._seen.copy

    async def _send_changes(self, said: TargetState, found: disks.FoundDisk, bitmap: str, why: str) -> None:
        assert self._changes is not None
        copy = self._begin_copy("bitmap", why, said)
        self._note(self._seen, "resyncing")
        self._trusted = bitmap

        def progress(done: int, total: int) -> None:
            copy.done, copy.total = done, total

        try:
            sent = await self._changes.send(
                found.node, found.size, self._uri, bitmap, wait=self._vm.wait, progress=progress
            )
        except CannotError as error:
            self._tries = self._tries + 1 if error.again else TRIES
            self._gave_up = error.message
            raise
        copy.done = copy.total = sent.sent
        copy.pause_ns = sent.pause_ns

    async def _resume(self, said: TargetState) -> None:
        assert self._mirror is not None
        self._lose("QEMU could not write to the target")
        await self._say_lost(said)  # while QEMU shows it, whatever becomes of us
        self._in_vain += 1
        if self._in_vain > PATIENCE:
            await self._mirror.end(force=True)
        else:
            await self._mirror.resume()
        self._errors += 1

    async def _watch(self, said: TargetState, job: Job, looked_at: float) -> None:
        assert self._mirror is not None
        now, seen = trio.current_time(), self._seen
        if (steady := (said.session, self._errors)) != self._steady:
            self._steady, self._steady_since = steady, now
        if not (said.synced and job.ready):
            reason = "QEMU connected anew" if seen.state == "synced" else ""
            if seen.copy is None or not seen.copy.under_way:
                self._begin_copy("job", "QEMU's job kept what was missing", said).job_began = job.done
            assert seen.copy is not None
            seen.copy.follow(job.done, job.total)
            self._note(seen, "resyncing" if seen.in_sync_before else "copying", reason)
            if job.ready and not self._write_blocking:
                await self._mirror.make_write_blocking()
                self._write_blocking = True
                self._errors += 1  # what was seen before this does not count
                return
            if not job.in_sync or now - self._steady_since < SETTLE_S:
                return
            try:
                ago_ns = int((trio.current_time() - looked_at) * 1e9)
                by = "qmp" if isinstance(self._vm.connection, QmpSocket) else "libvirt"
                what = SeenJob(ready=job.ready, io_status=job.io_status, ago_ns=ago_ns, by=by)
                await self._target.synced(self._name, said.session, seen=what)
            except RefusedError:
                return  # the session ended meanwhile: what is said of the next one is another look's business
            seen.copy.took((await self._target.state(self._name)).payload_bytes)
            seen.copy.under_way = False
        self._in_vain, self._trusted = 0, ""
        self._note(seen, "synced")
        await self._anchor(said, job)

    async def _anchor(self, said: TargetState, job: Job) -> None:
        """Keep the target anchored to a dirty bitmap of the source."""
        anchor = self._seen.bitmap = said.anchor if said.anchored else ""
        bitmap = await self._anchoring.due(anchor, in_sync=job.in_sync, steady_since=self._steady_since)
        if not bitmap:
            return
        try:
            await self._target.synced(self._name, said.session, bitmap)
        except RefusedError:
            return  # the session ended meanwhile
        await self._anchoring.anchored()
        self._seen.bitmap = bitmap
