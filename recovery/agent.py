"""`cdp agent`: looks after the mirrors of VMs on this host, for a service on another one.

The same controllers as the service's own, with its API between. What is desired is there; here is nothing but what runs. An agent
that dies takes no mirror with it: the next one takes them over. While the service does not answer, mirrors go on as they are.
"""

import time
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from cdpserver.catalog import Row
from cdpserver.errors import CdpError, UsageError
from cdpserver.state import StateDir, default_state_dir
from cdpserver.vm import record
from cdpserver.vm.arrival import Arrival
from cdpserver.vm.connect import connect
from cdpserver.vm.controller import Controller, DiskState
from cdpserver.vm.record import Connection, ProtectedVm
from cdpserver.vm.release import release
from cdpserver.vm.tls import Credential
from recovery.agent_client import AgentClient
from recovery.agent_target import ApiTarget
from recovery.output import say

EVERY_S = 1.0
"""Between two reports."""

ANSWER_S = 20.0
"""A service that answers later than this is taken for gone; a worker that restarts is waited for there up to 15 s."""

AGAIN_S = 5.0
LET_GO_S = 20.0


@dataclass
class _Running:
    controller: Controller
    scope: trio.CancelScope
    uuids: dict[str, str]


@dataclass
class _Coming:
    arrival: Arrival
    scope: trio.CancelScope


def agent(options: Namespace) -> None:
    """Until it is ended."""
    client = AgentClient(StateDir(default_state_dir(options.state_dir)), timeout_s=ANSWER_S)
    if options.tls is None and options.tls_user is not None:
        raise UsageError("--tls-user is of no use without --tls", hint="say where its key is: --tls DIR")
    credential = None if options.tls is None else Credential.found(Path(options.tls), options.tls_user)
    trio.run(_Agent(options.name, ApiTarget(client, options.nbd, credential), client).run)


class _Agent:
    """All VMs of this agent."""

    def __init__(self, name: str, target: ApiTarget, client: AgentClient) -> None:
        self._name = name
        self._target = target
        self._client = client
        self._running: dict[str, _Running] = {}
        self._coming: dict[str, _Coming] = {}
        self._arrived = trio.Event()
        self._told = ""

    async def run(self) -> None:
        """Until cancelled."""
        say(f"agent {self._name} asks {self._client.where}")
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    await self._look(nursery)
                    await self._report()
                    self._tell("the service answers")
                except CdpError as error:
                    self._tell(str(error))
                with trio.move_on_after(EVERY_S):
                    await self._arrived.wait()
                self._arrived = trio.Event()

    def _tell(self, what: str) -> None:
        if what != self._told:
            say(what)
            self._told = what

    async def _look(self, nursery: trio.Nursery) -> None:
        """Begin what is wanted, and end what is no more."""
        rows = await self._target.call(self._client.agent_vms, self._name)
        found = [(record.read(Row("", record.SCHEMA, row)), row["coming"]) for row in rows]
        wanted = {vm.name: vm for vm, coming in found if not coming}
        self._wait_for(nursery, {vm.name: vm for vm, coming in found if coming}, arrived=wanted)
        for name, running in list(self._running.items()):
            if wanted.get(name) != running.controller.vm:
                running.scope.cancel()
                del self._running[name]
                kept = {disk.name for disk in wanted[name].disks} if name in wanted else set()
                gone = [uuid for disk, uuid in running.uuids.items() if disk not in kept]
                await self._let_go(running.controller.vm.connection, gone)
        for name, vm in wanted.items():
            if name not in self._running:
                await self._begin(nursery, vm)

    def _wait_for(
        self, nursery: trio.Nursery, wanted: dict[str, ProtectedVm], *, arrived: dict[str, ProtectedVm]
    ) -> None:
        """Wait for the VMs that are to move here, and for no others."""
        for name, coming in list(self._coming.items()):
            if wanted.get(name) != coming.arrival.vm:
                del self._coming[name]
                # One that is here ends by itself when it hears so; cancelled it would let a guest go too early.
                if arrived.get(name) != coming.arrival.vm:
                    coming.scope.cancel()
        for name, vm in wanted.items():
            if name not in self._coming:
                hand_over = partial(self._hand_over, name)
                self._coming[name] = _Coming(Arrival(vm, connect, hand_over), trio.CancelScope())
                nursery.start_soon(self._await_vm, self._coming[name])

    async def _await_vm(self, coming: _Coming) -> None:
        with coming.scope:
            while True:
                try:
                    await coming.arrival.run()
                    # Its controller begins now, not in a second.
                    self._arrived.set()
                    return
                except Exception as error:  # noqa: BLE001 - one VM's rim: the others go on
                    name = coming.arrival.vm.name
                    self._target.emit("vm.failed", level="error", vm=name, reason=repr(error)[:2000])
                await trio.sleep(AGAIN_S)

    async def _hand_over(self, vm: str) -> None:
        await self._target.call(self._client.agent_vm_arrived, self._name, vm)

    async def _begin(self, nursery: trio.Nursery, vm: ProtectedVm) -> None:
        try:
            uuids = {disk.name: (await self._target.identity(disk.name))[0] for disk in vm.disks}
        except CdpError as error:  # of this VM: the others begin all the same
            say(f"{vm.name}: {error}")
            return
        running = _Running(Controller(vm, connect, self._target), trio.CancelScope(), uuids)
        self._running[vm.name] = running
        nursery.start_soon(self._keep, running)

    async def _keep(self, running: _Running) -> None:
        with running.scope:
            async with trio.open_nursery() as nursery:
                for disk in running.controller.vm.disks:
                    nursery.start_soon(self._target.watch, disk.name)
                await self._control(running)

    async def _control(self, running: _Running) -> None:
        while True:
            try:
                await running.controller.run()
            except Exception as error:  # noqa: BLE001 - one VM's rim: the others go on
                name = running.controller.vm.name
                self._target.emit("vm.failed", level="error", vm=name, reason=repr(error)[:2000])
            await trio.sleep(AGAIN_S)

    async def _let_go(self, connection: Connection, uuids: list[str]) -> None:
        with trio.move_on_after(LET_GO_S):
            try:
                async with connect(connection) as monitor:
                    await release(monitor, uuids)
            except CdpError as error:
                say(f"mirrors may still run in QEMU: {error}")

    async def _report(self) -> None:
        events = list(self._target.events)
        vms = [
            {"vm": name, "disks": [_seen(state) for state in running.controller.states.values()]}
            for name, running in self._running.items()
        ]
        coming = [{"vm": name, "reason": one.arrival.reason} for name, one in self._coming.items()]
        body = {"vms": vms, "events": events, "coming": coming}
        await self._target.call(self._client.report, self._name, body)
        for _ in events:
            self._target.events.popleft()


def _seen(state: DiskState) -> dict[str, Any]:
    since_ns = state.behind_since_ns
    return {
        "name": state.wanted.name,
        "state": state.state,
        "reason": state.reason,
        "node": state.node,
        "bitmap": state.bitmap,
        "behind_ns": None if since_ns is None else max(0, time.monotonic_ns() - since_ns),
        "resync": state.resync,
    }
