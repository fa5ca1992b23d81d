"""Recoveries: what VMs start on, made at once, and a task for each that moves its disks home.

Invariants: a recovery's row says what is about to be done before it is; QEMU and the row together are enough to go on after a
restart of the service. Whatever fails before the pivot leaves the VM on its forks, where everything written is journalled, or,
when streaming, on what it has at home. What belongs to the VM that is protected is said last, when it is home.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from cdpserver import durable, names, qemu
from cdpserver.errors import CdpError, NotFoundError, RefusedError
from cdpserver.service import domains, homes, launched
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks, never_written
from cdpserver.service.drills import Drills
from cdpserver.service.handover import HandOver
from cdpserver.service.isolated import Isolated
from cdpserver.service.launching import Vm
from cdpserver.service.planned import Request, check_isolated, plan
from cdpserver.service.protection import Protection
from cdpserver.service.recovering import Prepare, Runner, fork_uri
from cdpserver.service.tasks import Tasks
from cdpserver.vm.launch import parts
from cdpserver.vm.launch.parts import Disk
from cdpserver.vm.recovery import record
from cdpserver.vm.recovery.record import RecoveredDisk, Recovery
from cdpserver.vm.recovery.states import (
    ACTIVE,
    BEGIN,
    COMMITTED,
    HOME,
    NEXT,
    OVER,
    STOPPED,
    UNDONE,
    Step,
    follow,
)

STOP_S = 15.0
"""How long aborting waits for QEMU to cancel the copies."""

PROTECT_AGAIN_S = 3.0
"""Pause before another try to protect a VM that is home."""


class Recoveries:
    """The recoveries of a state directory. `keep_running` before anything else."""

    def __init__(
        self, core: Core, disks: Disks, protection: Protection, drills: Drills, isolated: Isolated
    ) -> None:
        self._core = core
        self.drills = drills
        self._isolated = isolated
        self._disks = disks
        self._hand_over = HandOver(core, protection)
        self._changing = trio.Lock()
        self._runners: dict[str, Runner] = {}
        self._protecting: set[str] = set()
        self._nursery: trio.Nursery | None = None
        self._tasks: Tasks | None = None

    async def keep_running(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Go on with every recovery that is under way, and with those to come, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery, self._tasks = nursery, Tasks(nursery)
            for wrong in await self._core.thread(record.unreadable, self._core.catalog):
                self._core.log.emit("recovery.unreadable", level="error", reason=str(wrong))
            for one in await self._core.thread(record.all_of, self._core.catalog):
                if one.stage in ACTIVE:
                    self._core.log.emit("recovery.adopted", recovery=one.id, state=one.stage.state)
                    self._run(one, self._go_on)
                    continue
                if one.stage == HOME or (one.stage == COMMITTED and one.protect and not one.protected):
                    self._protect(one.id)
                if one.stage == HOME:
                    nursery.start_soon(partial(domains.settle, self._core, one, home=True))
                if one.stage in OVER:
                    nursery.start_soon(self._forget, one)
            task_status.started()
            await trio.sleep_forever()

    async def _forget(self, one: Recovery) -> None:
        try:
            await self._core.thread(launched.forget, self._core, one)
        except (CdpError, OSError) as error:
            self._core.log.emit("recovery.vm-stays", level="warning", recovery=one.id, reason=str(error))

    def _run(self, one: Recovery, prepare: Prepare | None = None) -> None:
        assert self._tasks is not None
        runner = self._runners[one.id] = Runner(self._core, one, prepare or self._prepare)
        self._tasks.begin(one.id, partial(self._until_it_ends, one.id, runner))

    async def _until_it_ends(self, id: str, runner: Runner) -> None:
        try:
            await runner.run()
            await self._settle(runner)
        except Exception as error:  # noqa: BLE001
            # The process's rim: one recovery's trouble is said in its record, and the service goes on.
            reason = f"internal error: {error!r}"
            if "fail" in NEXT[runner.recovery.stage]:
                await runner.step("fail", reason=reason)
            else:
                self._core.log.emit("recovery.unsettled", level="error", recovery=id, reason=reason[:2000])

    # -- starting --------------------------------------------------------------------------------------------

    async def start(self, asked: Request) -> dict[str, Any]:
        """Make the forks that the VM runs on, and begin to watch for it. They can be connected to on return."""
        begun = trio.current_time()
        core = self._core
        if asked.isolated:
            check_isolated(asked)
            return await self._isolated.start(asked.point, asked.vm_command, asked.accel, force=asked.force)
        accel = await self.drills.accels.choose(asked.accel)
        async with self._changing:
            one = await core.thread(plan, core, asked, accel)
            await core.thread(launched.check_command, one)
            await domains.check_free(one)
            await self._hand_over.check_idle(one)
            for disk in one.disks:
                await core.make_durable(core.entry(disk.disk), disk.seq)
            await core.thread(core.catalog.put_row, "recoveries", one.row())
            try:
                await self._hand_over.hold(one)
                one = await self._prepare(one)
                one = replace(one, rto_ms=round((trio.current_time() - begun) * 1000))
                await launched.launch(core, one)
            except BaseException:
                with trio.CancelScope(shield=True):
                    # Once it is over nothing stands on its forks any more.
                    one = one.after("abort", now_ns=core.clock.now_ns())
                    await core.thread(core.catalog.put_row, "recoveries", one.row())
                    await self._take_away(one)
                    await core.thread(core.catalog.delete_row, "recoveries", one.id)
                    await self._hand_over.let_go(one)
                raise
            await core.thread(core.catalog.put_row, "recoveries", one.row())
        core.log.emit(
            "recovery.started", recovery=one.id, point=asked.point, mode=one.mode, rto_ms=one.rto_ms
        )
        for disk in one.disks:
            if disk.warning:
                said = {"recovery": one.id, "point": f"{disk.disk}@seq:{disk.seq}", "reason": disk.warning}
                core.log.emit("recovery.forced", level="warning", **said)
        self._run(one)
        return self._shown(one)

    async def _prepare(self, one: Recovery) -> Recovery:
        """Make what the VM starts on, as far as it is not there yet; the recovery as its row says it then."""
        for disk in one.disks:
            if self._core.catalog.get(disk.fork) is None:
                await self._disks.make_fork(f"{disk.disk}@seq:{disk.seq}", disk.fork)
        if one.mode == "mirror":
            return one
        for number, disk in enumerate(one.disks):
            if not disk.made:
                one = one.with_disk(number, made=True)
                await self._core.thread(self._core.catalog.put_row, "recoveries", one.row())
                with durable.io_errors("make", Path(disk.target)):
                    await self._core.thread(homes.make_overlay, self._core, one, disk)
        return one

    async def _go_on(self, one: Recovery) -> Recovery:
        """The same for what an earlier service began, which may have ended before QEMU had the disks."""
        one = await self._prepare(one)
        if one.attach and one.stage == BEGIN:
            await launched.launch(self._core, one)
        return one

    async def _take_away(self, one: Recovery) -> Recovery:
        """What nobody has written to goes again; what is in use stays, and so does what it stands on."""
        if one.mode == "stream":
            made = [number for number, disk in enumerate(one.disks) if disk.made]
            if not await self._core.thread(_are_untouched, one):
                return one
            for number in made:
                with homes.errors_said(self._core, one, one.disks[number]):
                    await self._core.thread(homes.remove, one.disks[number], one.id)
                one = one.with_disk(number, made=False)
            await self._core.thread(self._core.catalog.put_row, "recoveries", one.row())
        for disk in one.disks:
            entry = self._core.catalog.get(disk.fork)
            if entry is None or not await self._core.thread(
                never_written, self._core.state.timeline(entry.id)
            ):
                continue
            try:
                await self._disks.remove(disk.fork, fork=True)
            except RefusedError as error:
                self._core.log.emit("recovery.fork-stays", recovery=one.id, fork=disk.fork, reason=str(error))
        return one

    async def _settle(self, runner: Runner) -> None:
        """After a way home or back: the record of what belongs to the VM follows."""
        one = runner.recovery
        if one.stage == HOME:
            self._protect(one.id)
            await domains.settle(self._core, one, home=True)
        elif one.stage == UNDONE:
            await self._go_back(runner)
            await domains.settle(self._core, one, home=False)

    def _protect(self, id: str) -> None:
        """Begin to protect the VM that is home, and go on until it is, or is not at home any more."""
        assert self._nursery is not None
        if id not in self._protecting:
            self._protecting.add(id)
            self._nursery.start_soon(self._until_protected, id)

    async def _until_protected(self, id: str) -> None:
        said = ""
        try:
            while True:
                async with self._changing:
                    one = await self._find(id)
                    if one.stage not in (HOME, COMMITTED):
                        return
                    try:
                        await self._hand_over.protect(one)
                        return
                    except CdpError as error:
                        if error.message != said:
                            said = error.message
                            self._core.log.emit(
                                "recovery.unprotected", level="warning", recovery=id, reason=said
                            )
                        if isinstance(error, NotFoundError):
                            return  # a disk of it was removed
                await trio.sleep(PROTECT_AGAIN_S)
        finally:
            self._protecting.remove(id)

    async def _go_back(self, runner: Runner, *, discard: bool = False) -> None:
        """The VM is not at home any more: what it replaced there is as it was. With `discard`, what it left there goes."""
        for number, disk in enumerate(runner.recovery.disks):
            if disk.made and (disk.replaces or discard):
                with homes.errors_said(self._core, runner.recovery, disk):
                    await self._core.thread(homes.remove, disk, runner.recovery.id)
                await runner.keep(runner.recovery.with_disk(number, made=False))
        await self._hand_over.let_go(runner.recovery)

    # -- showing ---------------------------------------------------------------------------------------------

    def _shown(self, one: Recovery) -> dict[str, Any]:
        runner = self._runners.get(one.id)
        if runner is not None and one.stage in ACTIVE:
            one = replace(one, copied=runner.copied, total=runner.total)
        disks = [self._shown_disk(one, number, disk) for number, disk in enumerate(one.disks)]
        vm = {"launched": Vm(self._core, one.id).describe()} if one.vm_command and not one.libvirt else {}
        waits = runner.waits if runner is not None and one.stage in ACTIVE else ""
        return {**one.describe(), "waits": waits, "uri": disks[0]["uri"], "disks": disks, **vm}

    def _shown_disk(self, one: Recovery, number: int, disk: RecoveredDisk) -> dict[str, Any]:
        core = self._core
        if one.mode == "stream":
            uris = core.point_uris(disk.disk, disk.seq)
            uri: str | None = uris.get("uri_unix", uris["uri"])
        else:
            uri = fork_uri(core, disk) if core.catalog.get(disk.fork) is not None else None
        return {
            "point": f"{disk.disk}@seq:{disk.seq}",
            "time": names.format_time(disk.time_ns),
            "fork": disk.fork,
            "uri": uri,
            "target": disk.target,
            "format": disk.format,
            "base": disk.base,
            "at": "home" if one.mode == "stream" and disk.made else disk.at,
            "warning": disk.warning,
            "blockdev": self._words(one, number, disk),
        }

    def _words(self, one: Recovery, number: int, disk: RecoveredDisk) -> list[str]:
        """What QEMU's command line needs for the VM to run on what there is of this disk now; nothing once that is gone."""
        source = launched.source_of(self._core, one, disk) if self._is_there(one, disk) else None
        return [] if source is None else parts.blockdevs(number, Disk(names.split_name(disk.disk)[0], source))

    def _is_there(self, one: Recovery, disk: RecoveredDisk) -> bool:
        at_home = disk.made if one.mode == "stream" else disk.at == "home"
        return at_home or (one.mode == "mirror" and self._core.catalog.get(disk.fork) is not None)

    async def show(self, which: str) -> dict[str, Any]:
        """One recovery, by its id or name. NotFoundError."""
        if self._isolated.has(which):
            return await self._isolated.show(which)
        one = await self._find(which)
        return await self._core.thread(self._shown, one)

    async def list_recoveries(self) -> list[dict[str, Any]]:
        """Every recovery, oldest first."""
        found = await self._core.thread(record.all_of, self._core.catalog)
        shown = await self._core.thread(lambda: [self._shown(one) for one in found])
        return sorted([*shown, *await self._isolated.list_all()], key=lambda one: str(one["created"]))

    async def _find(self, which: str) -> Recovery:
        return await self._core.thread(record.find, self._core.catalog, which)

    # -- what an operator does -------------------------------------------------------------------------------

    async def abort(self, which: str) -> dict[str, Any]:
        """End the migration: the VM stays on its forks (in an undo: at home), and what was copied goes away."""
        if self._isolated.has(which):
            return await self._isolated.abort(which)
        async with self._changing:
            one = await self._stopped(which, "abort")
            runner = Runner(self._core, one, self._prepare)
            await runner.take_back(within_s=STOP_S)
            one = await runner.step("abort")
            if one.stage == STOPPED:
                await self._take_away(one)
                await self._hand_over.let_go(one)
            elif one.stage == HOME:
                self._protect(one.id)
        return await self.show(one.id)

    async def _stopped(self, which: str, step: Step) -> Recovery:
        """The recovery without its task, if the step is possible; once it is pivoting it is not."""
        assert self._tasks is not None
        one = await self._find(which)
        follow(one.stage, step, one.id)
        if (runner := self._runners.get(one.id)) is not None:
            # Between this look and the cancelling nothing else runs.
            follow(runner.recovery.stage, step, one.id)
            self._tasks.cancel(one.id)
        return await self._at_rest(one.id, step)

    async def _at_rest(self, which: str, step: Step) -> Recovery:
        """The recovery, if the step is possible, when its task has ended: one that says *done* may be settling what follows."""
        assert self._tasks is not None
        one = await self._find(which)
        follow(one.stage, step, one.id)
        await self._tasks.last_ended(one.id)
        one = await self._find(one.id)
        follow(one.stage, step, one.id)
        return one

    async def retry(self, which: str) -> dict[str, Any]:
        """Begin a recovery that failed or was aborted again: its VM runs on the forks, or is to be started on them."""
        return await self._again(which, "retry")

    async def undo(self, which: str, *, discard: bool) -> dict[str, Any]:
        """Move the VM back onto its forks with all that it wrote since; or, when it does not run any more, let go of that."""
        if not discard:
            return await self._again(which, "undo")
        async with self._changing:
            one = await self._at_rest(which, "discard")
            if one.mode == "mirror" and one.stage == STOPPED:
                follow(STOPPED, "undo", one.id)  # all of it is in the forks
            await self._core.thread(_check_not_home, one)
            runner = Runner(self._core, await self._hand_over.take_back(one, runs=False), self._prepare)
            for number in range(len(one.disks)):
                await runner.keep(runner.recovery.with_disk(number, at="fork", device=""))
            await runner.keep(replace(runner.recovery, mode="mirror"))
            one = await runner.step("discard")
            await self._go_back(runner, discard=True)
            await domains.settle(self._core, one, home=False)
        return await self.show(one.id)

    async def commit(self, which: str) -> dict[str, Any]:
        """Say that the VM stays at home: there is no undo from here on. Its forks stay, as forks like any other."""
        async with self._changing:
            runner = Runner(self._core, await self._at_rest(which, "commit"), self._prepare)
            await domains.define(self._core, runner.recovery)
            one = await runner.step("commit")
            for disk in one.disks:
                with homes.errors_said(self._core, one, disk):
                    await self._core.thread(homes.forget, disk, one.id)
        return await self.show(one.id)

    async def _again(self, which: str, step: Step) -> dict[str, Any]:
        async with self._changing:
            one = await self._at_rest(which, step)
            runner = Runner(self._core, one, self._prepare)
            if step == "undo":
                one = await self._hand_over.take_back(one, runs=True)
                await runner.keep(replace(one, mode="mirror"))
            else:
                await self._begin_again(runner)
            one = await runner.step(step)
            self._run(one)
        return await self.show(one.id)

    async def _begin_again(self, runner: Runner) -> None:
        one = runner.recovery
        if one.stage in OVER:  # meanwhile the VM that it was to replace may have been started
            await self._hand_over.check_idle(one)
            for disk in one.disks:
                if disk.replaces and not disk.made:
                    await self._core.thread(homes.check_closed, Path(disk.target))
        await self._hand_over.hold(one)
        try:
            await runner.keep(await self._prepare(one))
            await launched.launch(self._core, runner.recovery)
        except BaseException:
            if one.stage in OVER:
                with trio.CancelScope(shield=True):
                    if one.stage == STOPPED:
                        await self._take_away(runner.recovery)
                    await self._hand_over.let_go(one)
            raise


def _are_untouched(one: Recovery) -> bool:
    """Has nobody written, or has open, what was made for a VM to start on?"""
    made = [Path(disk.target) for disk in one.disks if disk.made]
    return all(not path.exists() or qemu.is_untouched(path) for path in made)


def _check_not_home(one: Recovery) -> None:
    """RefusedError while a VM runs on what is to be discarded."""
    for disk in one.disks:
        if disk.made and qemu.is_open(Path(disk.target)):
            raise RefusedError(
                f"the VM runs on {disk.target}, and would see its disk change",
                hint="shut it down first, or undo without --discard",
            )
