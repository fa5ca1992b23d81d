"""The task of one recovery: it waits for the VM on its forks, copies, pivots and checks; or the same on the way back.

It asks QEMU what stands there before it does anything, so that it can begin anywhere: after a restart of the service, a lost
connection, or a try that failed.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import trio

from cdpserver import durable, progress, qemu
from cdpserver.errors import CdpError, NotFoundError
from cdpserver.service import homes
from cdpserver.service.core import Core
from cdpserver.service.launching import LaunchError, Vm
from cdpserver.vm import qmp
from cdpserver.vm.connect import connect
from cdpserver.vm.recovery import jobs
from cdpserver.vm.recovery.chain import ChainMove
from cdpserver.vm.recovery.graph import device_of, read_graph
from cdpserver.vm.recovery.jobs import MoveFailedError, Progress
from cdpserver.vm.recovery.mirrorchain import MirrorChainMove
from cdpserver.vm.recovery.move import Move
from cdpserver.vm.recovery.record import MAX_DEVICE, Place, RecoveredDisk, Recovery
from cdpserver.vm.recovery.states import BACKWARD, BEGIN, COPYING, PIVOTING, PIVOTING_BACK, UNDOING, Step
from cdpserver.vm.recovery.stream import StreamMove

WAIT_S = 0.1
"""Between two looks whether the VM is there."""

LOOK_S = 0.2
"""Between two looks at how far the copies are."""

GONE_S = 10.0
"""A monitor that has been away for so long during a copy is taken for a QEMU that has ended."""

TAKE_BACK_S = 5.0
"""How long QEMU may take to cancel a copy that failed; what stays is cleared by the next try."""

KINDS: dict[tuple[str, bool], type[Move]] = {
    ("mirror", False): Move,
    ("mirror", True): MirrorChainMove,
    ("stream", False): StreamMove,
    ("stream", True): ChainMove,
}
"""By the recovery's mode, and whether home is a chain."""

Prepare: TypeAlias = Callable[[Recovery], Awaitable[Recovery]]


class Runner:
    """One recovery at work. `recovery` is what its row says, `copied` and `total` bytes are newer.

    `prepare` makes what the VM is started on, if it is not there yet.
    """

    def __init__(self, core: Core, recovery: Recovery, prepare: Prepare) -> None:
        self._core = core
        self._prepare = prepare
        self.recovery = recovery
        self.copied = recovery.copied
        self.total = recovery.total
        self.waits = ""
        """Why nothing goes on, while that is for somebody else to change; nothing else."""

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
            self.recovery = await self._prepare(self.recovery)
            await self._connect_and_work()
        except CdpError as error:
            with trio.CancelScope(shield=True):
                await self.take_back(within_s=TAKE_BACK_S)
                await self.step("fail", reason=error.message)

    async def _connect_and_work(self) -> None:
        lost_at: float | None = None
        while True:
            try:
                async with connect(self.recovery.connection) as monitor:
                    lost_at = None
                    await self._work(monitor)
                    return
            except qmp.QmpClosedError as error:
                self._check_launched(error)
                self.waits = f"{error.message}; {error.hint}"
                lost_at = trio.current_time() if lost_at is None else lost_at
                if self.recovery.stage != BEGIN and trio.current_time() - lost_at > GONE_S:
                    raise
            await trio.sleep(WAIT_S)

    def _check_launched(self, error: qmp.QmpClosedError) -> None:
        """LaunchError if the service started the VM, and it has ended: nobody else will start it."""
        if self.recovery.libvirt:
            if isinstance(error, qmp.QmpGoneError):
                raise LaunchError(error.message, hint="cdp recover retry starts it again")
            return
        vm = Vm(self._core, self.recovery.id)
        if self.recovery.vm_command and not vm.is_running():
            raise LaunchError(f"QEMU has ended: {vm.last_words()}", hint="cdp recover retry starts it again")

    async def _work(self, monitor: qmp.Monitor) -> None:
        if self.recovery.stage == BEGIN:
            await self._wait_for_vm(monitor)
            await self.step("connected")
        self.waits = ""
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
            kind = Move if self._backward else KINDS[self.recovery.mode, disk.chain]
            yield number, kind(monitor, self.recovery.id, number, disk, fork_uri(self._core, disk))

    def _moves(self, monitor: qmp.Monitor) -> list[tuple[int, Move]]:
        """Those of the disks that are not yet where they are to go."""
        goal = self._goal
        return [(number, move) for number, move in self._all_moves(monitor) if move.disk.at != goal]

    @property
    def _backward(self) -> bool:
        return self.recovery.stage in BACKWARD

    @property
    def _goal(self) -> Place:
        return "fork" if self._backward else "home"

    async def _wait_for_vm(self, monitor: qmp.Monitor) -> None:
        for _, move in self._all_moves(monitor):
            while True:
                if await move.is_there():
                    break
                self.waits = f"QEMU runs, and has no disk on {move.expected}; cdp recover show says what to start it on"
                await trio.sleep(WAIT_S)

    async def _copy(self, monitor: qmp.Monitor) -> None:
        moves = self._moves(monitor)
        for number, move in moves:
            if await move.is_under_way():
                continue
            if self._backward:
                await self._core.targets.call(
                    self._core.entry(move.disk.fork).id, "mirrored", disk=move.disk.fork
                )
                await move.begin_back()
                continue
            if self.recovery.mode == "mirror":
                await self._take_place(number, move.disk)
            if move.disk.chain and self.recovery.mode == "mirror":
                await self._core.thread(homes.make_over_fork, self._core, move.disk)
            await move.begin_home()
        if not self._backward:
            for _, move in moves:
                if move.disk.chain:
                    await self._make_point_image(move.disk)
        while True:
            if self._all_ready([await move.progress() for _, move in moves]):
                return
            await trio.sleep(LOOK_S)

    async def _make_point_image(self, disk: RecoveredDisk) -> None:
        """Of a chain, if it is not there: how far it is counts as the disk's share of the copy."""
        if await self._core.thread(Path(disk.point_image).exists):
            return
        core = self._core
        uris = core.point_uris(*(await self._instant(disk)))
        command = ["--uri", uris.get("uri_unix", uris["uri"]), "--target", disk.point_image]
        command += ["--size", str(disk.size)]
        if disk.base:
            found = await core.thread(qemu.info, Path(disk.base))
            command += ["--base", disk.base, "--base-format", found.format]
        before = self.copied
        self.total = max(self.total, before + disk.size)

        def hear(fraction: float) -> None:
            self.copied = before + int(fraction * disk.size)

        progress.hearer.set(hear)
        await core.job(f"{self.recovery.id}-image", "cdpserver.vm.recovery.pointimage", *command)
        self.copied = before + disk.size

    async def _instant(self, disk: RecoveredDisk) -> tuple[str, int]:
        """What the image is of: the point, or the fork as it is by now, since everything later is mirrored."""
        if self.recovery.mode == "stream":
            return disk.disk, disk.seq
        said = await self._core.targets.call(self._core.entry(disk.fork).id, "look", disk=disk.fork)
        return disk.fork, int(said["last_seq"])

    async def _take_place(self, number: int, disk: RecoveredDisk) -> None:
        """From here on what is at the target is ours."""
        if not disk.made and not disk.replaces:
            await self._core.thread(
                lambda: homes.check(disk.target, size=disk.size, overwrite=False, force=True)
            )
        await self.keep(self.recovery.with_disk(number, made=True))
        with durable.io_errors("make room at", Path(disk.target)):
            await self._core.thread(homes.set_aside, disk, self.recovery.id)

    def _all_ready(self, found: list[Progress]) -> bool:
        self.copied = sum(one.copied for one in found)
        self.total = sum(one.total for one in found)
        return all(one.ready for one in found)

    async def _pivot(self, monitor: qmp.Monitor) -> None:
        """All disks at once: while the guest's requests wait the row says that they are there, and then they are.

        So whenever QEMU or the service is killed, everything that the guest was answered for is where the row says.
        """
        if self.recovery.mode == "mirror":
            await self._hold(self._moves(monitor))
        failed = [await self._let_pivot(number, move) for number, move in self._all_moves(monitor)]
        if errors := [error for error in failed if error is not None]:
            raise errors[0]
        for number, move in self._all_moves(monitor):
            if self._backward:
                entry = self._core.entry(move.disk.fork)
                await self._core.targets.call(entry.id, "direct", disk=move.disk.fork)
                await move.clear()
            else:
                await move.settle()
                device = await self._device(monitor, move)
                await self.keep(self.recovery.with_disk(number, at="home", device=device))
                await move.let_go()

    async def _hold(self, moves: list[tuple[int, Move]]) -> None:
        """Every copy is whole, the guest waits, and the row says where its disks are to be. MoveFailedError."""
        for _, move in moves:
            await move.hold()
            if not await move.is_under_way() and not await self._has_arrived(move):
                raise MoveFailedError(jobs.UNKNOWN)
        before = self.recovery
        arrived = tuple(replace(disk, at=self._goal, device="") for disk in before.disks)
        try:
            await self.keep(replace(before, disks=arrived))
        except Exception:
            self.recovery = before
            for _, move in moves:
                await self._clear(move)
            raise

    async def _has_arrived(self, move: Move) -> bool:
        return await (move.is_on_fork() if self._backward else move.is_home())

    async def _let_pivot(self, number: int, move: Move) -> CdpError | None:
        """Why QEMU would not, if so: the row says again where the disk is."""
        try:
            await move.pivot()
            if await self._has_arrived(move):
                return None
            raise MoveFailedError(f"the VM does not stand on the copy of {move.disk.disk} after the pivot")
        except (MoveFailedError, qmp.QmpRefusedError) as error:
            if await move.is_on_fork() != self._backward:
                at: Place = "home" if self._backward else "fork"
                await self.keep(self.recovery.with_disk(number, at=at))
            return error

    async def _device(self, monitor: qmp.Monitor, move: Move) -> str:
        """What stays the name of this disk in QEMU, as far as something does."""
        node = (await read_graph(monitor)).top(await move.home_node())
        return device_of(await monitor.execute("query-block"), node)[:MAX_DEVICE]

    # -- taking back -----------------------------------------------------------------------------------------

    async def take_back(self, *, within_s: float) -> None:
        """Cancel what copies and remove unfinished files, as far as QEMU answers in time; a disk that has arrived stays."""
        kept: list[RecoveredDisk] = []
        try:
            with trio.fail_after(within_s):
                async with connect(self.recovery.connection) as monitor:
                    for _, move in self._moves(monitor):
                        kept.append(move.disk)
                        await self._clear(move)
                        kept.pop()
        except (CdpError, trio.TooSlowError) as error:
            if await _is_gone(self.recovery, error):
                kept.clear()  # nobody has the files open any more
            self._core.log.emit(
                "recovery.left-in-qemu", level="warning", recovery=self.recovery.id, reason=str(error)
            )
        if self.recovery.mode == "mirror" and not self._backward and not kept:
            for disk in self.recovery.disks:
                if disk.at == "fork" and disk.made:
                    await self._core.thread(self._remove, disk)

    async def _clear(self, move: Move) -> None:
        if self._backward:
            await move.clear(keep_home=True)
        elif not await move.is_home():
            await move.clear()

    def _remove(self, disk: RecoveredDisk) -> None:
        with homes.errors_said(self._core, self.recovery, disk):
            homes.remove(disk, self.recovery.id)


def fork_uri(core: Core, disk: RecoveredDisk) -> str:
    """Where the VM finds the fork. A QEMU of this host takes the Unix socket."""
    uris = core.disk_uris(core.entry(disk.fork))
    return uris.get("uri_unix", uris["uri"])


async def _is_gone(one: Recovery, error: Exception) -> bool:
    """Does the QEMU that gave this answer run no more?"""
    if one.libvirt:
        return isinstance(error, (qmp.QmpGoneError, NotFoundError))
    return await monitor_is_gone(one.qmp)


async def monitor_is_gone(path: str) -> bool:
    """Does nobody listen at a monitor's socket? One that is taken, or does not answer, is there."""
    try:
        stream = await trio.open_unix_socket(path)
    except OSError:
        return True
    await stream.aclose()
    return False
