"""Recoveries: forks made at once for VMs to run on, and a task for each that moves its disks home.

Invariants: a recovery's row says what is about to be done before it is; QEMU and the row together are enough to go on after a
restart of the service. Whatever fails before the pivot leaves the VM on its forks, where everything written is journalled.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from cdpserver import names
from cdpserver.errors import RefusedError, UsageError
from cdpserver.service.chosen import Chosen, choose
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks, never_written
from cdpserver.service.recovering import Runner, fork_uri
from cdpserver.vm import qmp
from cdpserver.vm.recovery import record
from cdpserver.vm.recovery.record import MAX_DISKS, Format, RecoveredDisk, Recovery
from cdpserver.vm.recovery.states import ACTIVE, BEGIN, HOME, STOPPED, UNDONE, Step, follow

STOP_S = 15.0
"""How long aborting waits for QEMU to cancel the copies."""


@dataclass(frozen=True, slots=True)
class Request:
    """What `cdp recover start` asks for; paths are absolute."""

    point: str
    to: str
    qmp: str
    name: str | None = None
    format: Format = "qcow2"
    force: bool = False


@dataclass(eq=False)
class _Running:
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Recoveries:
    """The recoveries of a state directory. `keep_running` before anything else."""

    def __init__(self, core: Core, disks: Disks) -> None:
        self._core = core
        self._disks = disks
        self._changing = trio.Lock()
        self._running: dict[str, _Running] = {}
        self._runners: dict[str, Runner] = {}
        self._nursery: trio.Nursery | None = None

    async def keep_running(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Go on with every recovery that is under way, and with those to come, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for one in await self._core.thread(record.all_of, self._core.catalog):
                if one.stage in ACTIVE:
                    self._core.log.emit("recovery.adopted", recovery=one.id, state=one.stage.state)
                    self._run(one)
            task_status.started()
            await trio.sleep_forever()

    def _run(self, one: Recovery) -> None:
        assert self._nursery is not None
        running = self._running[one.id] = _Running()
        runner = self._runners[one.id] = Runner(self._core, one, self._make_forks)
        self._nursery.start_soon(self._until_it_ends, one.id, running, runner)

    async def _until_it_ends(self, id: str, running: _Running, runner: Runner) -> None:
        try:
            with running.scope:
                await runner.run()
        except Exception as error:  # noqa: BLE001
            # The process's rim: one recovery's trouble is said in its record, and the service goes on.
            await runner.step("fail", reason=f"internal error: {error!r}")
        finally:
            running.ended.set()
            self._running.pop(id, None)

    # -- starting --------------------------------------------------------------------------------------------

    async def start(self, asked: Request) -> dict[str, Any]:
        """Make the forks that the VM runs on, and begin to watch for it. They can be connected to on return."""
        begun = trio.current_time()
        core = self._core
        async with self._changing:
            one = await core.thread(self._plan, asked)
            for disk in one.disks:
                await core.make_durable(core.entry(disk.disk), disk.seq)
            await core.thread(core.catalog.put_row, "recoveries", one.row())
            try:
                await self._make_forks(one)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await core.thread(core.catalog.delete_row, "recoveries", one.id)
                    await self._drop_forks(one)
                raise
            one = replace(one, rto_ms=round((trio.current_time() - begun) * 1000))
            await core.thread(core.catalog.put_row, "recoveries", one.row())
        core.log.emit("recovery.started", recovery=one.id, point=asked.point, to=asked.to, rto_ms=one.rto_ms)
        self._run(one)
        return self._shown(one)

    def _plan(self, asked: Request) -> Recovery:
        core = self._core
        directory = _check_directory(core, asked.to)
        held = record.all_of(core.catalog)
        for other in held:
            if other.qmp == asked.qmp and other.stage in ACTIVE:
                raise RefusedError(
                    f"{other.id} uses the monitor {asked.qmp}",
                    hint=f"wait for it: cdp recover show {other.id}",
                )
        id = record.new_id(other.id for other in held)
        name = names.check_name(asked.name) if asked.name is not None else id
        chosen = choose(core, asked.point, force=asked.force, most=MAX_DISKS)
        disks = [_disk(one, name, directory, asked.format) for one in chosen]
        for disk in disks:
            if core.catalog.get(disk.fork) is not None:
                raise RefusedError(f"there is a disk {disk.fork} already", hint="choose another --name")
        for target in {disk.target for disk in disks}:
            if os.path.lexists(target):
                raise RefusedError(
                    f"there is {target} already", hint="name another directory, or move it away"
                )
        now_ns = core.clock.now_ns()
        one = Recovery(id, name, asked.point, asked.qmp, tuple(disks), BEGIN, now_ns)
        return one.noted("started", now_ns=now_ns)

    async def _make_forks(self, one: Recovery) -> None:
        """Those that are not there yet."""
        for disk in one.disks:
            if self._core.catalog.get(disk.fork) is None:
                await self._disks.fork(f"{disk.disk}@seq:{disk.seq}", disk.fork)

    async def _drop_forks(self, one: Recovery) -> None:
        """Those that nobody has written to. One that is in use stays."""
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

    # -- showing ---------------------------------------------------------------------------------------------

    def _shown(self, one: Recovery) -> dict[str, Any]:
        runner = self._runners.get(one.id)
        if runner is not None and one.stage in ACTIVE:
            one = replace(one, copied=runner.copied, total=runner.total)
        disks = [self._shown_disk(disk) for disk in one.disks]
        return {**one.describe(), "uri": disks[0]["uri"], "disks": disks}

    def _shown_disk(self, disk: RecoveredDisk) -> dict[str, Any]:
        entry = self._core.catalog.get(disk.fork)
        return {
            "point": f"{disk.disk}@seq:{disk.seq}",
            "time": names.format_time(disk.time_ns),
            "fork": disk.fork,
            "uri": fork_uri(self._core, disk) if entry is not None else None,
            "target": disk.target,
            "format": disk.format,
            "at": disk.at,
        }

    async def show(self, which: str) -> dict[str, Any]:
        """One recovery, by its id or name. NotFoundError."""
        one = await self._find(which)
        return await self._core.thread(self._shown, one)

    async def list_recoveries(self) -> list[dict[str, Any]]:
        """Every recovery, oldest first."""
        found = await self._core.thread(record.all_of, self._core.catalog)
        return await self._core.thread(lambda: [self._shown(one) for one in found])

    async def _find(self, which: str) -> Recovery:
        return await self._core.thread(record.find, self._core.catalog, which)

    # -- what an operator does -------------------------------------------------------------------------------

    async def abort(self, which: str) -> dict[str, Any]:
        """End the migration: the VM stays on its forks (in an undo: at home), and what was copied goes away."""
        async with self._changing:
            one = await self._stopped(which, "abort")
            runner = Runner(self._core, one, self._make_forks)
            await runner.take_back(within_s=STOP_S)
            one = await runner.step("abort")
            if one.stage == STOPPED:
                await self._drop_forks(one)
        return await self.show(one.id)

    async def _stopped(self, which: str, step: Step) -> Recovery:
        """The recovery without its task, if the step is possible; once it is pivoting it is not."""
        one = await self._find(which)
        follow(one.stage, step, one.id)
        running = self._running.get(one.id)
        if running is not None:
            # Between this look and the cancelling nothing else runs.
            follow(self._runners[one.id].recovery.stage, step, one.id)
            running.scope.cancel()
            await running.ended.wait()
        one = await self._find(which)
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
            one = await self._find(which)
            follow(one.stage, "discard", one.id)
            await self._check_not_home(one)
            runner = Runner(self._core, one, self._make_forks)
            for number in range(len(one.disks)):
                await runner.keep(runner.recovery.with_disk(number, at="fork"))
            one = await runner.step("discard")
            assert one.stage == UNDONE
        return await self.show(one.id)

    async def _check_not_home(self, one: Recovery) -> None:
        """RefusedError while the VM runs on what is to be discarded."""
        try:
            async with qmp.connect(Path(one.qmp)) as monitor:
                runner = Runner(self._core, one, self._make_forks)
                running = [move.disk.target for move in runner.moves(monitor) if await move.is_home()]
        except qmp.QmpClosedError:
            return  # nobody runs there
        if running:
            raise RefusedError(
                f"the VM runs on {running[0]}, and would see its disk change",
                hint="shut it down first, or undo without --discard",
            )

    async def commit(self, which: str) -> dict[str, Any]:
        """Say that the VM stays at home: there is no undo from here on. Its forks stay, as forks like any other."""
        async with self._changing:
            runner = Runner(self._core, await self._find(which), self._make_forks)
            one = await runner.step("commit")
        return await self.show(one.id)

    async def _again(self, which: str, step: Step) -> dict[str, Any]:
        async with self._changing:
            one = await self._find(which)
            runner = Runner(self._core, one, self._make_forks)
            follow(one.stage, step, one.id)
            if one.stage != HOME:
                await self._make_forks(one)
            one = await runner.step(step)
            self._run(one)
        return await self.show(one.id)


def _disk(chosen: Chosen, name: str, directory: Path, format: Format) -> RecoveredDisk:
    return RecoveredDisk(
        disk=chosen.entry.name,
        seq=chosen.seq,
        time_ns=chosen.time_ns,
        size=chosen.size,
        fork=names.full_name(chosen.short_name, name),
        target=str(directory / f"{chosen.short_name}.{format}"),
        format=format,
    )


def _check_directory(core: Core, path: str) -> Path:
    directory = Path(path)
    if not directory.is_absolute() or not directory.is_dir():
        raise UsageError(
            f"{names.show(path)} is no directory here", hint="make it, and name its absolute path"
        )
    if directory.resolve().is_relative_to(core.state.path.resolve()):
        raise UsageError(
            f"{names.show(path)} is in the state directory", hint="name a directory on primary storage"
        )
    return directory
