"""A domain of a libvirt of the test's own, protected through libvirt: whatever dies, it is protected again."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.test_protect_resync import anchored
from tests.test_service import ApiError, Server, until
from tools.kit.libvirtd import Libvirtd, is_running
from tools.kit.source import make_image

pytestmark = pytest.mark.real

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def libvirtd(short_path: Path) -> Iterator[Libvirtd]:
    image = short_path / "web.qcow2"
    make_image(image, SIZE, "qcow2")
    with Libvirtd(short_path) as daemon:
        daemon.define("web", image)
        daemon.io("web", "write -P 1 0 4M")
        yield daemon


def protect(server: Server, libvirtd: Libvirtd, vm: str = "web", **more: Any) -> dict[str, Any]:
    return dict(server.request("PUT", f"/v1/vms/{vm}", {"libvirt": libvirtd.uri, **more}))


def byte_at(server: Server, offset: int) -> int:
    handle = nbd.NBD()
    handle.connect_uri(server.uri("web/vda@latest"))
    try:
        return int(handle.pread(1, offset)[0])
    finally:
        handle.shutdown()


def arrives(server: Server, libvirtd: Libvirtd, value: int, offset: int) -> None:
    """What the guest writes now is here at once."""
    libvirtd.io("web", f"write -P {value} {offset} 64k")
    until(lambda: byte_at(server, offset) == value, "the guest's write")


def resynced(server: Server, method: str, before: int) -> None:
    """The resync after so many, which must be done in this way."""
    (event,) = until(lambda: server.events("disk.resynced")[before:][:1], "a resync")
    assert event["method"] == method, event


def left(libvirtd: Libvirtd) -> bool:
    said = libvirtd.virsh("qemu-monitor-command", "web", '{"execute":"query-named-block-nodes"}')
    nodes = json.loads(said)["return"]
    names = [node["node-name"] for node in nodes]
    names += [bitmap.get("name", "") for node in nodes for bitmap in node.get("dirty-bitmaps", [])]
    return any(name.startswith("cdp-") for name in names)


def test_a_domain_is_protected_through_libvirt(short_path: Path, libvirtd: Libvirtd) -> None:
    with Server(short_path / "state") as server:
        shown = protect(server, libvirtd, disks=["vda"])
        assert (shown["libvirt"], shown["domain"]) == (libvirtd.uri, "web")
        assert [disk["name"] for disk in shown["disks"]] == ["web/vda"]
        assert anchored(server)["node"].startswith("libvirt-")
        assert server.get("/v1/points/web/vda@latest")["evidence"]["observed"]["by"] == "libvirt"
        arrives(server, libvirtd, 2, 0)

        # libvirtd is killed: the mirror goes on, and is taken over.
        libvirtd.kill()
        until(lambda: server.get("/v1/vms/web")["disks"][0]["state"] == "waiting", "the lost libvirtd")
        libvirtd.start()
        assert anchored(server)["resync"]["method"] == "full", "the first copy; nothing since"
        arrives(server, libvirtd, 3, MIB)

        # A worker is killed: QEMU connects anew.
        before = anchored(server)["bitmap"]
        os.kill(server.pids()["target-0"], signal.SIGKILL)
        libvirtd.io("web", f"write -P 4 {2 * MIB} 64k")
        until(lambda: anchored(server)["bitmap"] != before, "the anchor of the new session")
        assert byte_at(server, 2 * MIB) == 4

        # The domain is shut off and started: what changed is sent, which is little.
        count = len(server.events("disk.resynced"))
        with contextlib.suppress(subprocess.CalledProcessError):  # QEMU may be gone before its answer is read
            libvirtd.virsh("qemu-monitor-command", "web", '{"execute":"quit"}')
        until(lambda: "shut off" in libvirtd.virsh("domstate", "web"), "the end of the domain")
        libvirtd.start_domain("web")
        resynced(server, "bitmap", count)
        assert anchored(server)["resync"]["pause_ns"] > 0
        arrives(server, libvirtd, 5, 3 * MIB)

        # Its QEMU is killed, and the domain started.
        count = len(server.events("disk.resynced"))
        pid = libvirtd.pid("web")
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_running(pid), "the end of QEMU")
        until(lambda: "shut off" in libvirtd.virsh("domstate", "web"), "libvirt's notice of it")
        libvirtd.start_domain("web")
        resynced(server, "full", count)
        anchored(server)
        arrives(server, libvirtd, 6, 4 * MIB)

        assert server.delete("/v1/vms/web")["left"] == ""
        assert not left(libvirtd)


def test_what_libvirt_has_not(short_path: Path, libvirtd: Libvirtd) -> None:
    with Server(short_path / "state") as server:
        with pytest.raises(ApiError, match="libvirt has no domain 'nothing'"):
            protect(server, libvirtd, domain="nothing")
        with pytest.raises(ApiError, match="QEMU has no disk 'vdz'"):
            protect(server, libvirtd, disks=["vdz"])
        with pytest.raises(ApiError, match="look whether libvirtd runs"):
            server.request("PUT", "/v1/vms/web", {"libvirt": f"qemu:///system?socket={short_path}/none"})
        with pytest.raises(ApiError, match="not the URI of a libvirt"):
            server.request("PUT", "/v1/vms/web", {"libvirt": "here"})
        with pytest.raises(ApiError, match=r"the libvirt of another host.*run cdp agent NAME"):
            server.request("PUT", "/v1/vms/web", {"libvirt": "qemu+ssh://root@hv/system"})
        with pytest.raises(ApiError, match="not the URI of a libvirt"):
            server.request("PUT", "/v1/vms/web", {"libvirt": "qemu+tls://[hv/system"})
        with pytest.raises(ApiError, match="name qmp, or libvirt"):
            server.request("PUT", "/v1/vms/web", {"libvirt": libvirtd.uri, "qmp": "/none"})
        libvirtd.virsh("destroy", "web")
        with pytest.raises(ApiError, match="does not run"):
            protect(server, libvirtd)
        with contextlib.suppress(subprocess.CalledProcessError):
            libvirtd.virsh("undefine", "web")
