"""A VM on its way into a QEMU: when the service is told, and that a guest which is held goes on whatever happens."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from cdpserver.errors import UnreachableError
from cdpserver.vm import arrival
from cdpserver.vm.arrival import HELD_NODE, HELD_S, Arrival
from cdpserver.vm.qmp import Event, QmpRefusedError
from cdpserver.vm.record import Connection, LibvirtDomain, ProtectedVm, QmpSocket

ARRIVES_S = 7.0


class Qemu:
    """A monitor of a QEMU whose guest comes after ARRIVES_S, as QMP's documentation says of `stop` and `cont`."""

    version = (7, 2, 0)

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self.autostart = True
        self.paused_s = 0.0
        self._came = False
        self._running = False
        self._paused_at: float | None = None

    def _look(self) -> str:
        if trio.current_time() < ARRIVES_S:
            return "inmigrate"
        if not self._came:
            self._came, self._running = True, self.autostart
            self._paused_at = None if self._running else trio.current_time()
        return "running" if self._running else "paused"

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        await trio.lowlevel.checkpoint()
        state, given = self._look(), arguments or {}
        match command:
            case "query-status":
                return {"status": state}
            case "query-named-block-nodes":
                return [{"node-name": name} for name in self.nodes]
            case "blockdev-add":
                self.nodes.add(given["node-name"])
            case "blockdev-del":
                self.nodes.remove(given["node-name"])
            case "stop":
                self.autostart = False
            case "cont":
                self.autostart = True
                if self._paused_at is not None:
                    self.paused_s, self._running = trio.current_time() - self._paused_at, True
            case _:
                raise QmpRefusedError(command, "CommandNotFound", "no such command")
        return {}

    async def next_event(self) -> Event | None:
        await trio.sleep_forever()
        raise AssertionError

    @contextlib.asynccontextmanager
    async def connect(self, _: Connection) -> AsyncIterator["Qemu"]:
        yield self


def vm(*, wait: bool, libvirt: bool = False) -> ProtectedVm:
    at = LibvirtDomain("qemu:///system", "web") if libvirt else QmpSocket("/run/web.qmp")
    return ProtectedVm("web", at, (), 1, wait=wait)


@pytest.mark.parametrize(("wait", "libvirt"), [(False, False), (True, True)])
async def test_told_when_it_is_there_and_not_before(
    wait: bool, libvirt: bool, autojump_clock: MockClock
) -> None:
    qemu = Qemu()
    told: list[float] = []

    async def hand_over() -> None:
        told.append(trio.current_time())

    await Arrival(vm(wait=wait, libvirt=libvirt), qemu.connect, hand_over).run()
    (at,) = told
    assert ARRIVES_S <= at < ARRIVES_S + 1 and qemu.autostart and not qemu.nodes


async def test_a_held_guest_is_left_to_who_begins_its_mirrors(autojump_clock: MockClock) -> None:
    qemu = Qemu()

    async def hand_over() -> None:
        assert (await qemu.execute("query-status"))["status"] == "paused"

    await Arrival(vm(wait=True), qemu.connect, hand_over).run()
    assert qemu.nodes == {HELD_NODE}
    await arrival.let_go(qemu)
    assert not qemu.nodes and qemu.autostart
    await arrival.let_go(qemu)


@pytest.mark.parametrize("fails", [True, False])
async def test_a_held_guest_does_not_wait_for_a_service_that_is_away(
    fails: bool, autojump_clock: MockClock
) -> None:
    """One that refuses, and one that does not answer: the guest goes on, and the service is told when it is back."""
    qemu = Qemu()
    asked: list[float] = []

    async def hand_over() -> None:
        asked.append(trio.current_time())
        if trio.current_time() < ARRIVES_S + 30:
            if fails:
                raise UnreachableError("no service", hint="start it")
            await trio.sleep(30)

    await Arrival(vm(wait=True), qemu.connect, hand_over).run()
    assert len(asked) > 1 and not qemu.nodes
    assert qemu.paused_s <= HELD_S + 1 and (await qemu.execute("query-status"))["status"] == "running"


async def test_a_guest_that_is_waited_for_no_more_arrives_running(autojump_clock: MockClock) -> None:
    qemu = Qemu()

    async def hand_over() -> None:
        raise AssertionError

    with trio.move_on_after(ARRIVES_S / 2):
        await Arrival(vm(wait=True), qemu.connect, hand_over).run()
    assert qemu.autostart and not qemu.nodes
