"""Guests that are frozen for an instant: the processes that do it, and what makes sure of the thaw.

Before a guest is touched there is a file `run/frozen-VM.json`; it goes when the guest is known to be thawed. Whoever finds one
has a thaw to do: the service does so at its start, and after each process of its own that could not say that it did.
"""

import subprocess
from pathlib import Path

import trio

from cdpserver import durable
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.service.core import Core
from cdpserver.vm.frozen import Frozen, hear, start
from cdpserver.vm.guest_agent import address
from cdpserver.vm.record import ProtectedVm, row_id

AGAIN_S = 5.0
"""Between two attempts to thaw a guest whose agent does not answer."""


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
            process = await start(agent, stdin=subprocess.PIPE)
        except BaseException:
            self._busy.discard(vm.name)
            raise
        held = Frozen(vm.name, process)
        self._nursery.start_soon(self._follow, held, note)
        await held.wait_frozen()
        return held

    async def _follow(self, held: Frozen, note: Path) -> None:
        """Hear what the process says, and see to it that the guest is thawed in the end.

        When the service stops, the process ends by itself, and the note is left for the next service.
        """
        await held.follow()
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
            process = await start(agent, "--thaw", stdin=subprocess.DEVNULL)
        except OSError as error:
            return str(error)
        held = Frozen("", process)
        await hear(held)
        return "" if process.returncode == 0 else str(held.said.get("message", "its process ended"))

    def _note(self, vm: str) -> Path:
        return self._core.state.run / f"frozen-{row_id(vm)}.json"
