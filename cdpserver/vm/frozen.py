"""A guest that is frozen for an instant, by a process of its own (vm/freeze.py) that thaws it whatever becomes of us."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import trio

from cdpserver import messages
from cdpserver.errors import BrokenError, RefusedError
from cdpserver.vm import freeze

MODULE = "cdpserver.vm.freeze"

LIMIT_S = freeze.SYNC_S * 2 + freeze.FREEZE_S + freeze.HOLD_S + freeze.THAW_S + 10.0
"""After which such a process is taken for hung and killed: longer than all that it may wait for."""

STARTED_S = freeze.SYNC_S * 2 + freeze.FREEZE_S + 5.0
"""How long one waits for the guest to be frozen, the process's start included."""


@dataclass
class Frozen:
    """A guest that is frozen until `release`, or until its process thaws it by itself."""

    vm: str
    process: trio.Process
    said: dict[str, Any] = field(default_factory=dict)
    frozen: trio.Event = field(default_factory=trio.Event)
    """It is, or will not be."""
    ended: trio.Event = field(default_factory=trio.Event)

    async def wait_frozen(self) -> None:
        """Until it is; `follow` runs meanwhile. RefusedError, BrokenError: then it is thawed, or will be."""
        try:
            with trio.fail_after(STARTED_S):
                await self.frozen.wait()
            messages.raise_error(self.said)
            if not self.said.get("frozen"):
                raise RefusedError(
                    f"no file system of {self.vm} could be frozen",
                    hint="without --freeze the point is one, too",
                )
        except BaseException as error:
            await self.let_thaw()
            if isinstance(error, trio.TooSlowError):
                raise BrokenError(
                    f"freezing {self.vm} took too long", hint="is the host overloaded?"
                ) from None
            raise

    async def release(self) -> str:
        """Thaw it. Why the instant is not one of a frozen guest, or nothing."""
        await self.let_thaw()
        with trio.move_on_after(freeze.THAW_S):
            await self.ended.wait()
        if "thawed" not in self.said:
            return f"the thaw of {self.vm} is not confirmed"
        if self.said["late"]:
            return f"{self.vm} was thawed before the instant was taken: that took more than {freeze.HOLD_S:.0f} s"
        if self.said["thawed"] < self.said["frozen"]:
            return f"somebody else thawed {self.vm} meanwhile"
        return ""

    async def let_thaw(self) -> None:
        """It thaws when its input ends."""
        if self.process.stdin is not None:
            with trio.CancelScope(shield=True):
                await self.process.stdin.aclose()

    async def follow(self) -> None:
        """Hear what the process says, until it has ended; one that does not is killed. It thaws, also when this is cancelled."""
        try:
            await hear(self)
        finally:
            self.frozen.set()
            self.ended.set()
            await self.let_thaw()


async def start(agent: str, *more: str, stdin: int) -> trio.Process:
    """The process, for the agent at an address."""
    # A session of its own: what is sent to ours is not for it.
    return await trio.lowlevel.open_process(
        [sys.executable, "-m", MODULE, agent, *more],
        stdin=stdin,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


async def hear(held: Frozen) -> None:
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
