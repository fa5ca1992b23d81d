"""A VM moves to a QEMU that somebody else looks after: the service, or an agent on another host. Real migrations."""

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.test_protect_agent import free_port
from tests.test_service import ApiError, Server, read, until
from tools.kit.processes import stop
from tools.kit.source import Machine

pytestmark = pytest.mark.real

MIB = 1 << 20
SIZE = 16 * MIB


@dataclass
class World:
    """A service, and hosts with agents; each test has a VM of its own."""

    path: Path
    server: Server
    listen: tuple[str, ...]
    agents: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def agent(self, name: str) -> None:
        """There is an agent of this name, alive."""
        if name not in self.agents or self.agents[name].poll() is not None:
            with open(self.path / f"{name}.log", "ab") as log:
                self.agents[name] = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "recovery.cli",
                        "agent",
                        name,
                        "--state-dir",
                        str(self.path / "s"),
                    ],
                    stdin=subprocess.DEVNULL,
                    stderr=log,
                )

    def cdp(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "recovery.cli", *arguments, "--json"]
        command += ["--state-dir", str(self.path / "s")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        path = Path(directory)
        listen = ("--listen", f"127.0.0.1:{free_port()}")
        found = World(path, Server(path / "s", *listen), listen)
        try:
            yield found
        finally:
            for agent in found.agents.values():
                stop(agent)
            found.server.stop()


@dataclass
class Vm:
    """A VM that runs in `here` and may move into `there`."""

    world: World
    name: str
    here: Machine
    there: Machine

    @property
    def server(self) -> Server:
        return self.world.server

    def shown(self) -> dict[str, Any]:
        return dict(self.server.get(f"/v1/vms/{self.name}"))

    def disk(self) -> dict[str, Any]:
        return dict(self.shown()["disks"][0])

    def protect(self, machine: Machine, by: str = "", **more: Any) -> dict[str, Any]:
        """As the service's host says it, or that of an agent."""
        if not by:
            body = {"qmp": str(machine.monitor2), **more}
            return dict(self.server.request("PUT", f"/v1/vms/{self.name}", body))
        self.world.agent(by)
        wait = ("--wait",) if more.get("wait") else ()
        return dict(self.world.cdp("protect", self.name, "--qmp", str(machine.monitor2), "--by", by, *wait))

    def in_sync(self, by: str | None = None) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            shown = self.shown()
            (disk,) = shown["disks"]
            anchored = disk["state"] == "synced" and disk["bitmap"]
            return dict(disk) if anchored and shown["by"] == by else None

        return until(look, f"mirror in sync by {by or 'the service'}")

    def waits(self, reason: str) -> None:
        until(lambda: reason in (self.shown()["moves_to"] or {}).get("reason", ""), f"notice: {reason}")

    def writes(self, machine: Machine, value: int) -> None:
        """What is written now is here."""
        machine.io(f"write -P {value} {value}M 64k")
        until(lambda: self.byte(value) == value, "the guest's write")

    def byte(self, value: int) -> int:
        uri = self.server.uri(f"{self.name}/drive0@latest")
        return read(uri, 1, value * MIB)[0]

    def move(self) -> None:
        self.here.qmp.call("migrate", uri=f"unix:{self.there.incoming}")
        until(lambda: self.migration() == "completed", "end of the migration")

    def migration(self) -> str:
        return str(self.here.qmp.call("query-migrate").get("status"))

    def events(self, name: str) -> list[dict[str, Any]]:
        disk = f"{self.name}/drive0"
        return [
            one for one in self.server.events(name) if self.name == one.get("vm") or one.get("disk") == disk
        ]

    def grade(self) -> str:
        return str(self.server.get(f"/v1/disks/{self.name}/drive0")["grade"])


@pytest.fixture
def new_vm(world: World) -> Iterator[Callable[..., Vm]]:
    with contextlib.ExitStack() as stack:

        def make(format: str = "qcow2") -> Vm:
            name = f"vm{next(world.numbers)}"
            places = [world.path / name, world.path / f"{name}-there"]
            for place in places:
                place.mkdir()
            here = stack.enter_context(Machine(places[0], SIZE, format=format, runs=True))
            here.io("write -P 1 0 4M")
            there = stack.enter_context(Machine(places[1], SIZE, format=format, waits_for=here))
            return Vm(world, name, here, there)

        yield make


def test_from_the_service_to_an_agent(world: World, new_vm: Callable[..., Vm]) -> None:
    vm = new_vm()
    vm.protect(vm.here)
    vm.in_sync()
    found = {"name": "drive0", "device": "drive0", "size": SIZE}
    body = {"qmp": str(vm.there.monitor2), "disks": [found]}
    with pytest.raises(ApiError, match="is in sync where it is looked after by this service"):
        vm.server.request("PUT", f"/v1/agents/hv1/vms/{vm.name}", body)
    strange = body | {"disks": [found | {"name": "other"}], "waits": True}
    with pytest.raises(ApiError, match=rf"the new QEMU of {vm.name} has not {vm.name}/drive0"):
        vm.server.request("PUT", f"/v1/agents/hv1/vms/{vm.name}", strange)
    shown = vm.protect(vm.there, "hv1")
    assert shown["by"] is None and shown["moves_to"]["by"] == "hv1"
    vm.waits("on its way into this QEMU")
    vm.writes(vm.here, 5)
    assert vm.disk()["state"] == "synced" and vm.grade() == "crash", "the old mirror goes on"
    vm.move()
    assert vm.in_sync("hv1")["resync"]["method"] == "bitmap", "which moved with the QCOW2 file"
    (moved,) = vm.events("vm.moved")
    assert (moved["from_agent"], moved["agent"]) == ("", "hv1")
    vm.writes(vm.there, 6)
    assert not vm.events("disk.gap"), "nothing was written on the way"


def test_the_old_agent_is_dead_at_the_hand_over_and_the_guest_is_held(
    world: World, new_vm: Callable[..., Vm]
) -> None:
    """With --wait the guest arrives held, and goes on when its mirror has begun: nothing can be missing."""
    vm = new_vm("raw")
    vm.protect(vm.here, "hv1")
    vm.in_sync("hv1")
    vm.protect(vm.there, "hv2", wait=True)
    until(lambda: "cdp-arriving" in nodes(vm.there), "a QEMU that is to hold its guest")
    assert vm.there.qmp.call("query-status")["status"] == "inmigrate"
    vm.writes(vm.here, 7)
    world.agents["hv1"].kill()
    world.agents["hv1"].wait()
    vm.move()
    vm.there.qmp.wait("RESUME")
    begun = [
        e
        for e in vm.there.qmp.events
        if e["event"] == "JOB_STATUS_CHANGE" and e["data"]["status"] == "running"
    ]
    assert begun, "the mirror had begun before the guest went on"
    assert vm.in_sync("hv2")["resync"]["method"] == "full"
    until(lambda: "cdp-arriving" not in nodes(vm.there), "nothing left of the holding")
    vm.writes(vm.there, 8)
    assert not vm.events("disk.gap") and vm.shown()["wait"]


def test_a_hand_over_that_fails_half_way_changes_nothing(world: World, new_vm: Callable[..., Vm]) -> None:
    vm = new_vm()
    vm.protect(vm.here)
    before = vm.in_sync()
    vm.protect(vm.there, "hv2")
    vm.waits("on its way into this QEMU")

    # The new QEMU dies in the middle: the guest goes on where it was, and so does its mirror.
    vm.here.qmp.call("migrate-set-parameters", max_bandwidth=4096)
    vm.here.qmp.call("migrate", uri=f"unix:{vm.there.incoming}")
    until(lambda: vm.migration() == "active", "a migration under way")
    vm.there.process.kill()
    until(lambda: vm.migration() == "failed", "the end of the migration")
    vm.waits("no QEMU listens")
    assert vm.disk()["state"] == "synced" and vm.grade() == "crash"
    vm.writes(vm.here, 5)
    assert not vm.events("disk.degraded") and not vm.events("disk.gap")

    # The service is killed: the next one knows where the VM is, and where it was to move.
    vm.server.kill()
    world.server = Server(world.server.state_dir, *world.listen)
    assert vm.in_sync()["node"] == before["node"]
    assert vm.shown()["moves_to"]["by"] == "hv2"

    # Said again where it is, it is to move no more.
    assert vm.protect(vm.here)["moves_to"] is None
    vm.in_sync()
    vm.writes(vm.here, 6)


def test_an_agent_is_told_after_the_move_and_the_service_takes_it_back(
    world: World, new_vm: Callable[..., Vm]
) -> None:
    """Without a word before, what is written until there is one is a gap."""
    vm = new_vm()
    vm.protect(vm.here, "hv1")
    vm.in_sync("hv1")
    vm.move()
    vm.there.io("aio_write -P 9 9M 64k")
    vm.there.io("aio_flush")
    until(lambda: "has moved" in vm.disk()["reason"], "notice of the move")
    assert vm.protect(vm.there)["by"] is None
    assert vm.in_sync()["resync"]["method"] == "bitmap"
    assert vm.byte(9) == 9
    assert vm.events("disk.gap")
    vm.writes(vm.there, 5)


def nodes(machine: Machine) -> set[str]:
    return {node["node-name"] for node in machine.qmp.call("query-named-block-nodes", flat=True)}
