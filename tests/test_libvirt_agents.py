"""Domains of a libvirt of the test's own: guests frozen through libvirt's channel, and looked after by an agent beside it."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cdpserver.vm.agent import AgentRefusedError, AgentSilentError, NoAgentError
from cdpserver.vm.guest_agent import connect
from tests.guest_image import guest_image
from tests.test_protect_agent import free_port
from tests.test_service import ApiError, Server, until
from tools.kit.libvirtd import Libvirtd
from tools.kit.processes import stop
from tools.kit.processes import until as within
from tools.kit.source import make_image

pytestmark = pytest.mark.real

BOOT_S = 180


@dataclass
class World:
    server: Server
    libvirtd: Libvirtd
    console: Path

    def disk(self, vm: str) -> dict[str, Any]:
        return dict(self.server.get(f"/v1/vms/{vm}")["disks"][0])

    def in_sync(self, vm: str) -> None:
        until(lambda: self.disk(vm)["state"] == "synced", "mirror in sync")

    def cdp(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "recovery.cli", *arguments, "--json"]
        command += ["--state-dir", str(self.server.state_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A service, and a libvirtd with a domain `guest`, whose agent answers, and a domain `bare` without one."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory, Libvirtd(Path(directory)) as libvirtd:
        path, image = Path(directory), guest_image()
        console = path / "console"
        root = image.copy_root(path / "root.raw")
        libvirtd.define_guest("guest", root, kernel=image.kernel, initrd=image.initrd, console=console)
        make_image(path / "bare.qcow2", 4 << 20, "qcow2")
        libvirtd.define("bare", path / "bare.qcow2")
        with Server(path / "s", "--listen", f"127.0.0.1:{free_port()}") as server:
            yield World(server, libvirtd, console)


def test_a_guest_is_frozen_through_libvirts_own_channel(world: World) -> None:
    """No socket of the agent is named: libvirt holds it."""
    server, uri = world.server, world.libvirtd.uri
    shown = server.request("PUT", "/v1/vms/web", {"libvirt": uri, "domain": "guest"})
    assert shown["agent"] is None
    world.in_sync("web")

    def pings() -> bool:
        with contextlib.suppress(AgentSilentError), connect(f"{uri}#guest") as agent:
            agent.sync(within_s=5)
            return True
        return False

    within(pings, "answer of the guest's agent", seconds=BOOT_S)
    made = server.post("/v1/disks/web:mark", name="quiet", freeze=True)
    assert (made["grade"], made["reason"]) == ("app", "")
    until(lambda: "GUEST thaw" in world.console.read_text(), "thaw")
    assert "GUEST freeze" in world.console.read_text()
    with connect(f"{uri}#guest") as agent:
        assert agent.call("guest-fsfreeze-status", within_s=30) == "thawed"
        with pytest.raises(AgentRefusedError, match="guest-nonsense"):
            agent.call("guest-nonsense", within_s=30)


def test_domains_whose_guests_cannot_be_frozen(world: World) -> None:
    server, uri = world.server, world.libvirtd.uri
    with connect(f"{uri}#bare") as agent, pytest.raises(AgentRefusedError, match="has no guest agent"):
        agent.sync(within_s=3)
    with pytest.raises(NoAgentError, match="does not run"):
        connect(f"{uri}#nothing")
    with pytest.raises(AgentSilentError, match="did not answer"):
        connect(f"{uri}-nowhere#bare")
    server.request("PUT", "/v1/vms/db", {"libvirt": uri, "domain": "bare"})
    world.in_sync("db")
    with pytest.raises(ApiError, match="has no guest agent"):
        server.post("/v1/disks/db:mark", name="quiet", freeze=True)
    assert server.post("/v1/disks/db:mark", name="less", freeze=True, or_crash=True)["grade"] == "crash"
    assert not list((server.state_dir / "run").glob("frozen-*.json"))
    server.delete("/v1/vms/db")


def test_an_agent_beside_libvirt(world: World) -> None:
    """`cdp protect --libvirt --by`: the domain's mirror is the agent's; libvirtd may die meanwhile."""
    server, libvirtd = world.server, world.libvirtd
    with open(server.state_dir.with_name("agent.log"), "ab") as log:
        agent = subprocess.Popen(
            [sys.executable, "-m", "recovery.cli", "agent", "lv1", "--state-dir", str(server.state_dir)],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        protect = ("protect", "far", "--libvirt", libvirtd.uri, "--domain", "bare", "--by", "lv1")
        shown = world.cdp(*protect, "--disk", "vda", "--wait-synced")
        assert (shown["by"], shown["domain"]) == ("lv1", "bare")
        assert [one["name"] for one in shown["disks"]] == ["far/vda"]
        libvirtd.io("bare", "write -P 5 0 64k")
        assert server.get("/v1/points/far/vda@latest")["evidence"]["observed"]["by"] == "agent"
        with pytest.raises(ApiError, match="runs beside the agent lv1"):
            server.post("/v1/disks/far:mark", name="quiet", freeze=True)
        libvirtd.kill()
        until(lambda: world.disk("far")["state"] == "waiting", "notice of the lost libvirtd")
        libvirtd.start()
        world.in_sync("far")
        assert not server.events("disk.gap")
        assert "lv1" in world.cdp("protect", "far", "--remove")["left"]

        def gone() -> bool:
            named = libvirtd.virsh("qemu-monitor-command", "bare", '{"execute":"query-block-jobs"}')
            return not json.loads(named)["return"]

        until(gone, "the end of the mirror")
    finally:
        stop(agent)
