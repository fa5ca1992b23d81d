"""Drills: a point is booted apart from everything, and what is waited for comes in time, or does not. Either is a result.

What it measured is kept on the point; nothing else of a drill stays. At the time of day that a policy names, the newest
point of a VM is drilled.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import trio

from cdpserver import names
from cdpserver.config import SECOND_NS
from cdpserver.errors import CdpError, UsageError
from cdpserver.service.drilling import Awaited, Drill, FailedError
from cdpserver.service.launched import Accels, read_command
from cdpserver.service.trials import Trials
from cdpserver.vm.launch import machine, template
from cdpserver.vm.launch.isolate import isolate
from cdpserver.vm.launch.machine import Machine
from cdpserver.vm.launch.parts import Accel, Disk, Nbd, Places
from cdpserver.vm.machines import fitted
from cdpserver.vm.trial import record
from cdpserver.vm.trial.record import State, Trial

WITHIN_NS = 300 * SECOND_NS
MOST_WITHIN_NS = 24 * 3600 * SECOND_NS

MAX_MARKER = 500


@dataclass(frozen=True, slots=True)
class Request:
    """What `cdp drill` asks for; paths are absolute. Without marker, agent and check the guest's agent is waited for."""

    point: str
    vm_command: str | None = None
    marker: str | None = None
    agent: bool = False
    check: str | None = None
    within_ns: int = WITHIN_NS
    accel: str | None = None
    force: bool = False
    slot: str = ""
    """Of a scheduled one: which night's it is."""

    @property
    def awaited(self) -> Awaited:
        """What it waits for."""
        nothing = self.marker is None and self.check is None
        return Awaited(self.marker, self.agent or nothing, self.check, self.within_ns)


def read_template(path: str) -> template.Template:
    """The operator's command, isolated. UsageError. For threads."""
    return isolate(read_command(path))


def free_memory_mib() -> int:
    """What this host could give away. For threads."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith("MemAvailable:"))


class Drills:
    """The drills of a state directory. `machine_of` tells what machine a protected VM is."""

    def __init__(
        self, trials: Trials, accels: Accels, machine_of: Callable[[str], Machine | None] = lambda _: None
    ) -> None:
        self._core = trials.core
        self.trials = trials
        self.accels = accels
        self._machine_of = machine_of

    def command(self, found: template.Template | None, one: Trial, accel: Accel | None) -> list[str]:
        """What an isolated VM is started with: the operator's command, else a machine like the VM's own. UsageError.

        For threads.
        """
        disks, places = self.trials.launch_disks(one), Places(self._core.state.run / one.id)
        if found is not None:
            return template.command(found, one.id, disks, places, accel=accel)
        vms = {names.split_name(disk.disk)[1] for disk in one.disks}
        vm = vms.pop() if len(vms) == 1 else None
        # Half of what is free: a drill is not worth a service that is ended for want of memory.
        like = fitted(
            (self._machine_of(vm) if vm is not None else None) or Machine(),
            memory_mib=free_memory_mib() // 2,
            cpus=os.cpu_count() or 1,
        )
        return machine.command(like, one.id, disks, places, accel=accel or "tcg", isolated=True)

    async def run(self, asked: Request) -> dict[str, Any]:
        """Boot the point and say what came of it. Errors are only for what could not be begun."""
        begun = trio.current_time()
        _check(asked)
        accel = await self.accels.choose(asked.accel)
        found = None
        if asked.vm_command is not None:
            found = await self._core.thread(read_template, asked.vm_command)
        one = await self.trials.begin(
            "drill",
            asked.point,
            force=asked.force,
            command=asked.vm_command or "",
            scheduled=bool(asked.slot),
            slot=asked.slot,
            waited_for=str(asked.awaited),
        )
        drill = Drill(self._core, one, asked.awaited, begun)
        drill.note("export")
        state: State = "failed"
        reason = record.CANCELLED
        try:
            disks = await self._core.thread(self.trials.launch_disks, one)
            command = await self._core.thread(self.command, found, one, accel)
            await drill.run(command, environment(asked.point, disks))
            state, reason = "passed", ""
        except FailedError as error:
            reason = str(error)
        except CdpError as error:
            reason = error.message
        finally:
            with trio.CancelScope(shield=True):
                one = await self.trials.over(replace(one, spans=drill.spans), state, reason)
        return one.describe()

    async def list_drills(self, name: str | None) -> list[dict[str, Any]]:
        """The drills that are kept, oldest first, of a VM or disk or of all."""
        found = await self._core.thread(record.all_of, self._core.catalog)
        return [one.describe() for one in found if one.kind == "drill" and name in (None, one.subject)]


def environment(point: str, disks: list[Disk]) -> dict[str, str]:
    """What a script is told of the forks: CDP_URI is the first disk's, CDP_URI_1, ... those of all in order of CDP_DISKS."""
    uris = [disk.source.uri for disk in disks if isinstance(disk.source, Nbd)]
    numbered = {f"CDP_URI_{number}": uri for number, uri in enumerate(uris, start=1)}
    return {
        "CDP_POINT": point,
        "CDP_DISKS": " ".join(disk.name for disk in disks),
        "CDP_URI": uris[0],
        **numbered,
    }


def _check(asked: Request) -> None:
    if not 0 < asked.within_ns <= MOST_WITHIN_NS:
        raise UsageError("a drill takes at most a day", hint="--within 5m")
    if asked.marker is not None:
        check_marker(asked.marker)
    path = asked.check
    if path is not None and not (os.path.isabs(path) and os.path.isfile(path) and os.access(path, os.X_OK)):
        raise UsageError(
            f"the check {names.show(path)} cannot be run", hint="name an executable file by its absolute path"
        )


def check_marker(marker: str) -> None:
    """UsageError for what is no regular expression."""
    try:
        re.compile(marker)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"not a marker: {names.show(marker)}: {error}", hint="write a regular expression"
        ) from None
    if len(marker) > MAX_MARKER:
        raise UsageError(f"the marker has {len(marker)} characters", hint=f"at most {MAX_MARKER}")
