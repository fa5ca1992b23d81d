"""Guests that are frozen for an instant: the processes that do it, and what makes sure of the thaw.

Before a guest is touched there is a file `run/frozen-VM.json`; it goes when the guest is known to be thawed. Whoever finds one
has a thaw to do: the service does so at its start, and after each process of its own that could not say that it did.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from cdpserver import durable, messages
from cdpserver.errors import BrokenError, CorruptError, RefusedError
from cdpserver.service.core import Core
from cdpserver.vm import freeze
from cdpserver.vm.guest_agent import address
from cdpserver.vm.record import ProtectedVm, row_id

LIMIT_S = freeze.SYNC_S * 2 + freeze.FREEZE_S + freeze.HOLD_S + freeze.THAW_S + 10.0
"""After which such a process is taken for hung and killed: longer than all that it may wait for."""

STARTED_S = freeze.SYNC_S * 2 + freeze.FREEZE_S + 5.0
"""How long a mark waits for the guest to be frozen, the process's start included."""

AGAIN_S = 5.0
"""Between two attempts to thaw a guest whose agent does not answer."""

MODULE = "cdpserver.vm.freeze"


@dataclass
class Frozen:
    """A guest that is frozen until `release`, or until its process thaws it by itself."""

    vm: str
    process: trio.Process
    said: dict[str, Any] = field(default_factory=dict)
    frozen: trio.Event = field(default_factory=trio.Event)
    """It is, or will not be."""
    ended: trio.Event = field(default_factory=trio.Event)

    async def release(self) -> str:
        """Thaw it. Why the instant is not one of a frozen guest, or nothing."""
        await _let_thaw(self.process)
        with trio.move_on_after(freeze.THAW_S):
            await self.ended.wait()
        if "thawed" not in self.said:
            return f"the thaw of {self.vm} is not confirmed"
        if self.said["late"]:
            return f"{self.vm} was thawed before the instant was taken: that took more than {freeze.HOLD_S:.0f} s"
        if self.said["thawed"] < self.said["frozen"]:
            return f"somebody else thawed {self.vm} meanwhile"
        return ""


class Freezer:
    """Freezes and thaws. `run` before anything else."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._nursery: trio.Nursery | None = None
        self._busy: set[str] = set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Guests that an earlier service left frozen are thawed first of all."""
        async with trio.open_nursery() as self._nursery:
            for path in sorted(self._core.state.run.glob("frozen-*.json")):
                self._nursery.start_soon(self._thaw_left, path)
            task_status.started()
            await trio.sleep_forever()

    # -- freezing --------------------------------------------------------------------------------------------

    async def freeze(self, vm: ProtectedVm) -> Frozen:
        """The guest is frozen on return, for some seconds at most. Whatever this raises, it is thawed, or will be."""
        assert self._nursery is not None
        agent = address(vm)
        if agent is None:
            raise RefusedError(
                f"no guest agent of {vm.name} is known",
                hint=f"it runs beside the agent {vm.by}, where the service does not reach it: leave --freeze away"
                if vm.by
                else f"name its socket: cdp protect {vm.name} --agent PATH",
            )
        if vm.name in self._busy:
            raise RefusedError(f"{vm.name} is being frozen or thawed", hint="try again in some seconds")
        self._busy.add(vm.name)
        try:
            note = self._note(vm.name)
            note_fields = {"vm": vm.name, "agent": agent, "since_ns": self._core.clock.now_ns()}
            await self._core.thread(durable.write_json, note, note_fields)
            process = await self._start(agent, stdin=subprocess.PIPE)
        except BaseException:
            self._busy.discard(vm.name)
            raise
        held = Frozen(vm.name, process)
        self._nursery.start_soon(self._follow, held, note)
        try:
            with trio.fail_after(STARTED_S):
                await held.frozen.wait()
            messages.raise_error(held.said)
            if not held.said.get("frozen"):
                raise RefusedError(
                    f"no file system of {vm.name} could be frozen", hint="a mark without --freeze is one, too"
                )
        except BaseException as error:
            await _let_thaw(process)
            if isinstance(error, trio.TooSlowError):
                raise BrokenError(
                    f"freezing {vm.name} took too long", hint="is the host overloaded?"
                ) from None
            raise
        return held

    async def _start(self, agent: str, *more: str, stdin: int) -> trio.Process:
        # A session of its own: what is sent to ours is not for it.
        return await trio.lowlevel.open_process(
            [sys.executable, "-m", MODULE, agent, *more],
            stdin=stdin,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    async def _follow(self, held: Frozen, note: Path) -> None:
        """Hear what the process says, and see to it that the guest is thawed in the end.

        When the service stops, the process ends by itself, and the note is left for the next service.
        """
        try:
            await _ended(held)
        finally:
            held.frozen.set()
            held.ended.set()
            await _let_thaw(held.process)
        if held.process.returncode == 0:
            await self._core.thread(note.unlink, True)
            self._busy.discard(held.vm)
        else:
            await self._thaw_left(note)

    # -- thawing ---------------------------------------------------------------------------------------------

    async def _thaw_left(self, note: Path) -> None:
        """Thaw the guest of a note, as long as that takes."""
        try:
            fields = await self._core.thread(durable.read_json, note)
            vm, agent = str(fields["vm"]), str(fields["agent"])
        except (CorruptError, KeyError, FileNotFoundError):
            await self._core.thread(note.unlink, True)
            return
        self._busy.add(vm)
        told = ""
        while reason := await self._thaw(agent):
            if reason != told:
                self._core.log.emit("vm.thaw-waits", level="error", vm=vm, agent=agent, reason=reason)
                told = reason
            await trio.sleep(AGAIN_S)
        await self._core.thread(note.unlink, True)
        self._busy.discard(vm)
        self._core.log.emit("vm.thawed", level="warning", vm=vm)

    async def _thaw(self, agent: str) -> str:
        """Why it is not known to be thawed, or nothing."""
        try:
            process = await self._start(agent, "--thaw", stdin=subprocess.DEVNULL)
        except OSError as error:
            return str(error)
        held = Frozen("", process)
        await _ended(held)
        return "" if process.returncode == 0 else str(held.said.get("message", "its process ended"))

    def _note(self, vm: str) -> Path:
        return self._core.state.run / f"frozen-{row_id(vm)}.json"


async def _ended(held: Frozen) -> None:
    """Take what the process says, line by line, until it has ended; one that does not is killed."""
    process = held.process
    with trio.move_on_after(LIMIT_S):
        await _hear(held)
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _hear(held: Frozen) -> None:
    assert held.process.stdout is not None
    buffer = b""
    async with held.process.stdout as stream:
        async for part in stream:
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                held.said |= json.loads(line)
                held.frozen.set()


async def _let_thaw(process: trio.Process) -> None:
    """It thaws when its input ends."""
    if process.stdin is not None:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
