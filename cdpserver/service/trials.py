"""Forks that nobody is to keep, and what runs on them: they go when it ends, or when the service starts again.

Invariants: a trial's row is there before its forks, and says *running* until they are gone: what a service that was killed
left behind is found by it. The point itself is never written, and nothing of a trial outlives it but the row of a drill.
"""

import contextlib
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import trio

from cdpserver import names
from cdpserver.errors import CdpError, RefusedError, UsageError
from cdpserver.service import processes
from cdpserver.service.chosen import Chosen, choose
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.launching import LaunchError, Vm
from cdpserver.vm.launch.parts import Disk, Nbd
from cdpserver.vm.recovery.record import MAX_DISKS
from cdpserver.vm.trial import record
from cdpserver.vm.trial.record import Kind, State, Trial, TrialDisk

GONE_S = 20.0
"""How long a fork may still have a client after its QEMU was killed: the target sees the end of the connection at once."""

LOOK_S = 0.05

LENT_AT_ONCE = 64
"""A program that borrows more has lost count."""

BY_OPERATOR = "ended by an operator"

Work: TypeAlias = Callable[[], Awaitable[None]]


class Trials:
    """The trials of a state directory. `keep_running` before anything else."""

    def __init__(self, core: Core, disks: Disks) -> None:
        self.core = core
        self._disks = disks
        self._nursery: trio.Nursery | None = None
        self._ends: dict[str, trio.Event] = {}
        self._scopes: dict[str, trio.CancelScope] = {}

    async def keep_running(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take away what an earlier service left, then run what is begun, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for wrong in await self.core.thread(record.unreadable, self.core.catalog):
                self.core.log.emit("trial.unreadable", level="error", reason=str(wrong))
            for one in await self.core.thread(record.all_of, self.core.catalog):
                if one.owner is not None:
                    self._begin_task(one, partial(self._until_returned, one))
                elif one.state == "running":
                    await self.over(one, "failed", record.KILLED)
                else:
                    await self._drop_forks(one)
            task_status.started()
            await trio.sleep_forever()

    def _begin_task(self, one: Trial, until: Work) -> None:
        assert self._nursery is not None
        self._ends[one.id], self._scopes[one.id] = trio.Event(), trio.CancelScope()
        self._nursery.start_soon(self._run, one, until)

    async def _run(self, one: Trial, until: Work) -> None:
        """Wait for its end, or for ours: what stays then is taken away by the next service."""
        try:
            with self._scopes[one.id] as scope:
                await until()
            if await self.core.thread(self.core.catalog.row, "trials", one.id) is not None:
                await self.over(one, "ended", BY_OPERATOR if scope.cancelled_caught else "")
        finally:
            self._ends.pop(one.id).set()
            del self._scopes[one.id]

    # -- forks -----------------------------------------------------------------------------------------------

    async def begin(self, kind: Kind, point: str, *, force: bool, **more: Any) -> Trial:
        """The forks of a point; they can be connected to on return, and are there until `over`."""
        core = self.core
        chosen = await core.thread(lambda: choose(core, point, force=force, most=MAX_DISKS))
        one = await core.thread(self._plan, kind, point, chosen, more)
        try:
            for disk in one.disks:
                await self._disks.make_fork(f"{disk.disk}@seq:{disk.seq}", disk.fork)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                reason = error.message if isinstance(error, CdpError) else record.CANCELLED
                await self.over(one, "failed", reason)
            raise
        return one

    def _plan(self, kind: Kind, point: str, chosen: list[Chosen], more: dict[str, Any]) -> Trial:
        core = self.core
        held = record.all_of(core.catalog)
        if kind == "probe" and sum(one.kind == kind for one in held) >= LENT_AT_ONCE:
            raise RefusedError(f"{LENT_AT_ONCE} probes are under way", hint="end one of them")
        id = record.new_id(kind, (one.id for one in held))
        disks = [
            TrialDisk(one.entry.name, one.entry.id, one.seq, names.full_name(one.short_name, id))
            for one in chosen
        ]
        trial = Trial(
            id=id,
            kind=kind,
            what=point,
            command=more.pop("command", ""),
            time_ns=max(one.time_ns for one in chosen),
            disks=tuple(disks),
            created_ns=core.clock.now_ns(),
            **more,
        )
        core.catalog.put_row("trials", trial.row())
        return trial

    def uri(self, disk: TrialDisk) -> str | None:
        """Where a fork is; None when it is gone, or going. For threads."""
        entry = self.core.catalog.get(disk.fork)
        if entry is None or entry.state != "live":
            return None
        uris = self.core.disk_uris(entry)
        return uris.get("uri_unix", uris["uri"])

    def launch_disks(self, one: Trial) -> list[Disk]:
        """The forks as disks of a VM, by their short names. For threads."""
        found = [(names.split_name(disk.disk)[0], self.uri(disk)) for disk in one.disks]
        return [Disk(name, Nbd(uri)) for name, uri in found if uri is not None]

    async def over(self, one: Trial, state: State, reason: str = "") -> Trial:
        """Kill what runs on it, remove the forks, and say how it ended: durable on return."""
        core = self.core
        with contextlib.suppress(CdpError):
            await core.thread(Vm(core, one.id).end)
        await self._drop_forks(one)
        ended = one.after(state, now_ns=core.clock.now_ns(), reason=reason)
        await core.thread(self._note_end, ended)
        if one.kind != "probe":
            core.log.emit(
                f"{one.kind}.{state}",
                level="warning" if state == "failed" else "info",
                trial=one.id,
                point=one.what,
                rto_ms=one.rto_ms,
                **({"reason": reason} if reason else {}),
            )
        return ended

    def _note_end(self, ended: Trial) -> None:
        catalog = self.core.catalog
        if ended.kind == "probe":
            catalog.delete_row("trials", ended.id)
            return
        catalog.put_row("trials", ended.row())
        for id in record.too_many(record.all_of(catalog), ended.subject):
            catalog.delete_row("trials", id)

    async def _drop_forks(self, one: Trial) -> None:
        for disk in one.disks:
            deadline = trio.current_time() + GONE_S
            while self.core.catalog.get(disk.fork) is not None:
                try:
                    await self._disks.remove(disk.fork, fork=True)
                except CdpError as error:
                    if trio.current_time() < deadline and isinstance(error, RefusedError):
                        await trio.sleep(LOOK_S)
                        continue
                    said = {"trial": one.id, "fork": disk.fork, "reason": str(error)}
                    self.core.log.emit("trial.fork-stays", level="warning", **said)
                    break

    # -- an operator's own look ------------------------------------------------------------------------------

    async def isolated(self, one: Trial, command: list[str]) -> None:
        """Start the VM, which is watched until it ends; then everything of it goes. LaunchError."""
        vm = Vm(self.core, one.id)
        try:
            await vm.start(command, isolated=True)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self.over(
                    one, "failed", error.message if isinstance(error, LaunchError) else "cancelled"
                )
            raise
        self._begin_task(one, partial(self._until_ended, vm))

    async def _until_ended(self, vm: Vm) -> None:
        try:
            await vm.ended()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self.core.thread(vm.end)
            raise

    # -- lending ---------------------------------------------------------------------------------------------

    async def lend(self, point: str, pid: int, *, force: bool) -> dict[str, Any]:
        """Forks of a point for a program: they go when it returns them, or ends."""
        try:
            owner = (pid, int(processes.start_time(pid)))
        except ProcessLookupError:
            raise UsageError(
                f"there is no process {pid}", hint="name the process that needs the forks"
            ) from None
        one = await self.begin("probe", point, force=force, owner=owner)
        self._begin_task(one, partial(self._until_returned, one))
        uris = await self.core.thread(lambda: [self.uri(disk) for disk in one.disks])
        shown = one.describe()
        shown["disks"] = [disk | {"uri": uri} for disk, uri in zip(shown["disks"], uris, strict=True)]
        return shown

    async def _until_returned(self, one: Trial) -> None:
        assert one.owner is not None
        fd = _owner(one.owner)
        try:
            if fd is not None:
                await trio.lowlevel.wait_readable(fd)
        finally:
            if fd is not None:
                os.close(fd)

    async def give_back(self, id: str) -> None:
        """End a probe; its forks are gone on return. NotFoundError."""
        one = await self.core.thread(record.find, self.core.catalog, id)
        if one.kind != "probe":
            raise RefusedError(f"{id} is no probe", hint=f"cdp recover abort {id}")
        await self._stop(one)

    async def stop(self, id: str) -> Trial:
        """End an isolated VM; everything of it is gone on return. NotFoundError."""
        one = await self.core.thread(record.find, self.core.catalog, id)
        await self._stop(one)
        return await self.core.thread(record.find, self.core.catalog, id)

    async def _stop(self, one: Trial) -> None:
        if (end := self._ends.get(one.id)) is not None:
            self._scopes[one.id].cancel()
            await end.wait()


def _owner(owner: tuple[int, int]) -> int | None:
    return processes.same_process(owner[0], str(owner[1]))
