"""One drill at work: a QEMU is watched until what is waited for has come.

QEMU ──► monitor answers ──► first read ──► first write ──► marker, agent ──► check script ──► passed
  │                                                             │                 │
  └── ends ──► failed                                   none in time ──► failed ──┘ not 0, or hangs
"""

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from cdpserver import names
from cdpserver.config import SECOND_NS
from cdpserver.errors import UnreachableError
from cdpserver.service import processes
from cdpserver.service.core import Core
from cdpserver.service.launching import Vm, last_line, limited
from cdpserver.vm import qmp
from cdpserver.vm.agent import Agent
from cdpserver.vm.trial.record import Span, Trial

LOOK_S = 0.01
"""Between two looks at what the guest has read and written: a hundredth of the second that is aimed at."""

PING_AGAIN_S = 0.5

PING_S = 2.0
"""An agent that is there answers in milliseconds; one that is just starting does not hear what came before it."""

LAST_LOOK_S = 1.0
"""How long the serial line is still read when QEMU has ended: a guest may say its marker and power off."""


class FailedError(Exception):
    """Why the drill did not pass."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a drill waits for; `check` is run when the others have come."""

    marker: str | None
    agent: bool
    check: str | None
    within_ns: int

    def __str__(self) -> str:
        things = [
            f"marker {names.show(self.marker)}" if self.marker is not None else "",
            "guest agent" if self.agent else "",
            f"check {self.check}" if self.check is not None else "",
        ]
        return ", ".join(thing for thing in things if thing)[:300]


class Drill:
    """A trial's VM and what is waited for. `spans` counts from `begun`, of Trio's clock."""

    def __init__(self, core: Core, one: Trial, awaited: Awaited, begun: float) -> None:
        self._core = core
        self._one = one
        self._awaited = awaited
        self._begun = begun
        self._vm = Vm(core, one.id)
        self._came = trio.Event()
        self.spans: dict[Span, int] = {}

    def note(self, span: Span) -> None:
        """It has come this far."""
        self.spans.setdefault(span, round((trio.current_time() - self._begun) * 1000))

    async def run(self, command: list[str], environment: dict[str, str]) -> None:
        """Returns when all that is waited for has come. FailedError, LaunchError."""
        with trio.move_on_after(self._awaited.within_ns / SECOND_NS) as patience:
            await self._vm.start(command, isolated=True)
            self.note("process")
            await self._race(partial(self._see_it_through, environment))
        if patience.cancelled_caught:
            span = names.format_duration(self._awaited.within_ns)
            missing = f"check {self._awaited.check}" if self._came.is_set() else str(self._awaited)
            raise FailedError(f"no {missing} in {span}; {self._console()}")

    def _console(self) -> str:
        last = last_line(self._vm.places.serial)
        return f"the serial line ends: {last}" if last else "nothing came on the serial line"

    async def _race(self, wanted: Callable[[], Awaitable[None]]) -> None:
        """`wanted`, unless QEMU ends before. FailedError of either."""
        failed: list[FailedError] = []

        async def watch() -> None:
            await self._vm.ended()
            with trio.move_on_after(LAST_LOOK_S):
                await self._came.wait()
                if self._awaited.check is None:
                    await trio.sleep_forever()  # the other one is about to say so
            failed.append(FailedError(f"QEMU ended: {self._vm.last_words()}; {self._console()}"))
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                await wanted()
            except FailedError as error:
                failed.insert(0, error)
            nursery.cancel_scope.cancel()
        if failed:
            raise failed[0]

    async def _see_it_through(self, environment: dict[str, str]) -> None:
        awaited = self._awaited
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure)
            if awaited.marker is not None:
                await self._marker(awaited.marker)
            if awaited.agent:
                await self._agent()
            nursery.cancel_scope.cancel()  # the monitor is the script's
        if awaited.marker is not None or awaited.agent:
            self.note("ready")
        self._came.set()
        if awaited.check is not None:
            await self._check(awaited.check, environment)
            self.note("ready")

    async def _measure(self) -> None:
        """Note the guest's first read and first write. QEMU counts them when it has answered them."""
        with suppress(qmp.QmpClosedError):
            async with qmp.connect(self._vm.places.qmp) as monitor:
                while not {"read", "write"} <= self.spans.keys():
                    stats = [disk["stats"] for disk in await monitor.execute("query-blockstats")]
                    if any(found["rd_operations"] for found in stats):
                        self.note("read")
                    if any(found["wr_operations"] for found in stats):
                        self.note("write")
                    await trio.sleep(LOOK_S)

    async def _marker(self, marker: str) -> None:
        command = [sys.executable, "-m", "cdpserver.vm.trial.watch"]
        command += ["--serial", str(self._vm.places.serial), "--marker", marker]
        pid_file = self._core.state.run / f"{self._one.id}-watch.pid"
        done = await processes.run(pid_file, command, lambda _: None)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise FailedError(f"nobody watches the serial line: {lines[-1] if lines else done.returncode}")

    async def _agent(self) -> None:
        while True:
            try:
                await self._core.thread(_ping, self._vm.places.agent)
                return
            except UnreachableError:
                await trio.sleep(PING_AGAIN_S)

    async def _check(self, script: str, environment: dict[str, str]) -> None:
        """Run the script to its end; what it leaves running goes with it."""
        places = self._vm.places
        said = places.directory / "check.log"
        more = {
            **environment,
            "CDP_TRIAL": self._one.id,
            "CDP_QMP": str(places.qmp),
            "CDP_AGENT": str(places.agent),
            "CDP_SERIAL": str(places.serial),
        }
        pid_file = self._core.state.run / f"{self._one.id}-check.pid"
        pid = processes.spawn(pid_file, limited([script]), output=said, more=more)
        try:
            status = await processes.wait(pid)
        finally:
            _end_group(pid, pid_file)
        if status:
            how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
            last = last_line(said)
            raise FailedError(f"check {script} failed: {how}{f': {last}' if last else ''}")


def _ping(path: Path) -> None:
    """Return when the guest's agent has answered. UnreachableError. For threads."""
    with Agent(path) as agent:
        agent.sync(within_s=PING_S)


def _end_group(pid: int, pid_file: Path) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    pid_file.unlink(missing_ok=True)
