"""The task of one recovery: it waits for the VM on its forks, copies, pivots and checks; or the same on the way back.

It asks QEMU what stands there before it does anything, so that it can begin anywhere: after a restart of the service, a lost
connection, or a try that failed.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import trio

from cdpserver.errors import CdpError
from cdpserver.service.core import Core
from cdpserver.vm import qmp
from cdpserver.vm.recovery.move import Move, MoveFailedError, Progress
from cdpserver.vm.recovery.record import RecoveredDisk, Recovery
from cdpserver.vm.recovery.states import BACKWARD, BEGIN, COPYING, PIVOTING, PIVOTING_BACK, UNDOING, Step

WAIT_S = 0.1
"""Between two looks whether the VM is there."""

LOOK_S = 0.2
"""Between two looks at how far the copies are."""

GONE_S = 10.0
"""A monitor that has been away for so long during a copy is taken for a QEMU that has ended."""

TAKE_BACK_S = 5.0
"""How long QEMU may take to cancel a copy that failed; what stays is cleared by the next try."""

Forks: TypeAlias = Callable[[Recovery], Awaitable[None]]


class Runner:
    """One recovery at work. `recovery` is what its row says, `copied` and `total` bytes are newer."""

    def __init__(self, core: Core, recovery: Recovery, make_forks: Forks) -> None:
        self._core = core
        self._make_forks = make_forks
        self.recovery = recovery
        self.copied = recovery.copied
        self.total = recovery.total

    # -- the record ------------------------------------------------------------------------------------------

    async def step(self, step: Step, *, reason: str = "") -> Recovery:
        """Take a step; durable on return. RefusedError where it is not possible."""
        now_ns = self._core.clock.now_ns()
        after = self.recovery.after(step, now_ns=now_ns, reason=reason)
        await self.keep(replace(after, copied=self.copied, total=self.total))
        stage = self.recovery.stage
        why = {"reason": reason} if reason else {}
        self._core.log.emit(
            "recovery.step",
            level="warning" if step == "fail" else "info",
            recovery=self.recovery.id,
            step=step,
            state=stage.state,
            phase=stage.phase,
            **why,
        )
        return self.recovery

    async def keep(self, recovery: Recovery) -> None:
        """Write the row. It counts from the beginning of this: whoever asks meanwhile is told what is about to be so."""
        self.recovery = recovery
        await self._core.thread(self._core.catalog.put_row, "recoveries", recovery.row())

    # -- the way ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the recovery is done or has failed."""
        try:
            await self._make_forks(self.recovery)
            await self._connect_and_work()
        except CdpError as error:
            with trio.CancelScope(shield=True):
                await self.take_back(within_s=TAKE_BACK_S)
                await self.step("fail", reason=error.message)

    async def _connect_and_work(self) -> None:
        lost_at: float | None = None
        while True:
            try:
                async with qmp.connect(Path(self.recovery.qmp)) as monitor:
                    lost_at = None
                    await self._work(monitor)
                    return
            except qmp.QmpClosedError:
                lost_at = trio.current_time() if lost_at is None else lost_at
                if self.recovery.stage != BEGIN and trio.current_time() - lost_at > GONE_S:
                    raise
            await trio.sleep(WAIT_S)

    async def _work(self, monitor: qmp.Monitor) -> None:
        if self.recovery.stage == BEGIN:
            await self._wait_for_vm(monitor)
            await self.step("connected")
        if self.recovery.stage in (COPYING, UNDOING):
            await self._copy(monitor)
            await self.step("ready")
        if self.recovery.stage in (PIVOTING, PIVOTING_BACK):
            await self._pivot(monitor)
            self.copied = self.total  # writes that came between the last look and the pivot are there too
            await self.step("pivoted")

    def moves(self, monitor: qmp.Monitor) -> list[Move]:
        """One for each disk."""
        return [move for _, move in self._all_moves(monitor)]

    def _all_moves(self, monitor: qmp.Monitor) -> Iterator[tuple[int, Move]]:
        for number, disk in enumerate(self.recovery.disks):
            yield number, Move(monitor, self.recovery.id, number, disk, fork_uri(self._core, disk))

    def _moves(self, monitor: qmp.Monitor) -> list[tuple[int, Move]]:
        """Those of the disks that are not yet where they are to go."""
        goal = self._goal
        return [(number, move) for number, move in self._all_moves(monitor) if move.disk.at != goal]

    @property
    def _backward(self) -> bool:
        return self.recovery.stage in BACKWARD

    @property
    def _goal(self) -> str:
        return "fork" if self._backward else "home"

    async def _wait_for_vm(self, monitor: qmp.Monitor) -> None:
        for _, move in self._moves(monitor):
            while True:
                if await move.is_on_fork():
                    break
                await trio.sleep(WAIT_S)

    async def _copy(self, monitor: qmp.Monitor) -> None:
        moves = self._moves(monitor)
        for number, move in moves:
            if await move.is_under_way():
                continue
            if self._backward:
                await move.begin_back()
            else:
                await self.keep(self.recovery.with_disk(number, made=True))
                await move.begin_home()
        while True:
            if self._all_ready([await move.progress() for _, move in moves]):
                return
            await trio.sleep(LOOK_S)

    def _all_ready(self, found: list[Progress]) -> bool:
        self.copied = sum(one.copied for one in found)
        self.total = sum(one.total for one in found)
        return all(one.ready for one in found)

    async def _pivot(self, monitor: qmp.Monitor) -> None:
        for number, move in self._moves(monitor):
            await move.pivot()
            if not (await move.is_on_fork() if self._backward else await move.is_home()):
                raise MoveFailedError(
                    f"the VM does not stand on the copy of {move.disk.disk} after the pivot"
                )
            await self.keep(self.recovery.with_disk(number, at=self._goal))
        for _, move in self._all_moves(monitor):
            if self._backward:
                await move.clear()
            else:
                await move.let_go_of_fork()

    # -- taking back -----------------------------------------------------------------------------------------

    async def take_back(self, *, within_s: float) -> None:
        """Cancel what copies and remove unfinished files, as far as QEMU answers in time; a disk that has arrived stays."""
        kept: list[RecoveredDisk] = []
        try:
            with trio.fail_after(within_s):
                async with qmp.connect(Path(self.recovery.qmp)) as monitor:
                    for _, move in self._moves(monitor):
                        kept.append(move.disk)
                        await self._clear(move)
                        kept.pop()
        except qmp.QmpClosedError:
            kept.clear()  # nobody has the files open any more
        except (CdpError, trio.TooSlowError) as error:
            self._core.log.emit(
                "recovery.left-in-qemu", level="warning", recovery=self.recovery.id, reason=str(error)
            )
        if not self._backward and not kept:
            for disk in self.recovery.disks:
                if disk.at == "fork" and disk.made:
                    await self._core.thread(self._remove, disk)

    async def _clear(self, move: Move) -> None:
        if self._backward:
            await move.clear(keep_home=True)
        elif not await move.is_home():
            await move.clear()

    def _remove(self, disk: RecoveredDisk) -> None:
        try:
            Path(disk.target).unlink(missing_ok=True)
        except OSError as error:
            said = {"recovery": self.recovery.id, "file": disk.target, "reason": str(error)}
            self._core.log.emit("recovery.file-stays", level="warning", **said)


def fork_uri(core: Core, disk: RecoveredDisk) -> str:
    """Where the VM finds the fork. A QEMU of this host takes the Unix socket."""
    uris = core.disk_uris(core.entry(disk.fork))
    return uris.get("uri_unix", uris["uri"])
