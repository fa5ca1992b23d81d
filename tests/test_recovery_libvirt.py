"""A point that becomes a domain of libvirt: started on its forks, moved home, defined there. A libvirtd of the test's own."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cdpserver.errors import UsageError
from cdpserver.vm.launch import domain
from cdpserver.vm.launch.machine import Direct, Machine
from cdpserver.vm.launch.parts import Disk, Image, Nbd
from tests.test_rapid_recovery import SIZE, at_home, protect, wait
from tests.test_service import ApiError, Server, read, until
from tools.kit.libvirtd import DOMAIN, Libvirtd, is_running

MIB = 1 << 20

DISKS = [
    Disk("vda", Nbd("nbd+unix:///again/vda?socket=/s/a b")),
    Disk("data", Nbd("nbd://[::1]:7/again/data")),
]


def sources(text: str) -> list[tuple[str, dict[str, str]]]:
    disks = ElementTree.fromstring(text).findall("./devices/disk")
    return [(disk.get("type", ""), dict(disk.find("source").attrib)) for disk in disks]  # type: ignore[union-attr]


# --- what is pure


def test_a_domain_of_our_own_is_complete_and_has_no_network() -> None:
    machine = Machine(direct=Direct("/boot/k", "/boot/i", "console=ttyS0"), memory_mib=256, network="user")
    made = domain.fill(domain.describe(machine, DISKS), "again", "u", DISKS)
    root = ElementTree.fromstring(made)
    assert (root.findtext("name"), root.findtext("uuid"), root.get("type")) == ("again", "u", "qemu")
    assert (root.findtext("memory"), root.findtext("os/cmdline")) == ("256", "console=ttyS0")
    assert root.find("./devices/interface") is None
    assert sources(made) == [
        ("network", {"protocol": "nbd", "name": "again/vda"}),
        ("network", {"protocol": "nbd", "name": "again/data"}),
    ]
    hosts = [dict(host.attrib) for host in root.iterfind("./devices/disk/source/host")]
    assert hosts == [{"transport": "unix", "socket": "/s/a b"}, {"name": "::1", "port": "7"}]
    home = [Disk("vda", Image("/h/a", "qcow2")), Disk("data", Image("/dev/x", "raw", is_device=True))]
    later = domain.fill(made, "again", "u", home, accel="kvm")
    assert sources(later) == [("file", {"file": "/h/a"}), ("block", {"dev": "/dev/x"})]
    drivers = [disk.get("type") for disk in ElementTree.fromstring(later).iterfind("./devices/disk/driver")]
    assert drivers == ["qcow2", "raw"] and ElementTree.fromstring(later).get("type") == "kvm"


def test_an_operators_domain_keeps_what_is_no_disk_of_the_point() -> None:
    text = DOMAIN.format(name="web", image="/old").replace("<vcpu>", "<uuid>old</uuid><vcpu>")
    iso = "<disk type='file' device='cdrom'><source file='/i'/><target dev='sda'/></disk>"
    one = [Disk("vda", Nbd("nbd+unix:///again/vda?socket=/s"))]
    made = domain.fill(text.replace("<controller", f"{iso}<controller"), "again", "new", one)
    assert sources(made)[1] == ("file", {"file": "/i"}) and "/old" not in made
    assert ElementTree.fromstring(made).findtext("uuid") == "new"
    assert ElementTree.fromstring(domain.fill(text, "x", "new", one, same=True)).findtext("uuid") == "old"
    with pytest.raises(UsageError, match="no place for the disk data"):
        domain.fill(text, "again", "u", DISKS)
    with pytest.raises(UsageError, match="the disk 'vda', and the point no such disk"):
        domain.fill(text, "again", "u", [])
    for wrong, why in (("<domain", "cannot be read"), ("<network/>", "<network> is no domain")):
        with pytest.raises(UsageError, match=why):
            domain.read(wrong)


# --- with libvirt


@pytest.fixture
def libvirtd(short_path: Path) -> Iterator[Libvirtd]:
    with Libvirtd(short_path) as daemon:
        yield daemon


def nodes(libvirtd: Libvirtd) -> list[str]:
    said = libvirtd.virsh("qemu-monitor-command", "again", '{"execute":"query-named-block-nodes"}')
    return [node["node-name"] for node in json.loads(said)["return"]]


def begin(server: Server, libvirtd: Libvirtd, home: Path, point: str, **more: Any) -> dict[str, Any]:
    asked = {"point": point, "to": str(home), "libvirt": libvirtd.uri, "name": "again", **more}
    shown: dict[str, Any] = server.post("/v1/recoveries", **asked)
    libvirtd.adopt("again")
    return shown


@pytest.mark.real
def test_a_domain_starts_on_forks_moves_home_and_is_defined_there(
    short_path: Path, libvirtd: Libvirtd
) -> None:
    home = short_path / "home"
    home.mkdir()
    with Server(short_path / "s") as server:
        content = protect(server)
        description = short_path / "web.xml"
        description.write_text(DOMAIN.format(name="web", image="/nowhere"))
        begun = begin(server, libvirtd, home, "web/vda@good", vm_command=str(description))
        assert (begun["libvirt"], begun["domain"], begun["disks"][0]["at"]) == (libvirtd.uri, "again", "fork")
        assert "again" not in libvirtd.virsh("list", "--all", "--persistent")
        assert any(node.endswith("-nbd") for node in nodes(libvirtd)), (
            "a connection that waits for the server"
        )
        os.kill(export := server.pids()["export"], signal.SIGSTOP)
        try:
            wait(server, begun["id"], "copying")
            libvirtd.kill()
        finally:
            os.kill(export, signal.SIGCONT)
        os.kill(export, signal.SIGKILL)  # the guest's requests wait for the next one
        libvirtd.start()
        libvirtd.io("again", f"write -P 7 {MIB} 64k")
        content[MIB : MIB + (64 << 10)] = b"\7" * (64 << 10)
        shown = wait(server, begun["id"], "done")
        target = shown["disks"][0]["target"]
        until(lambda: "again" in libvirtd.virsh("list", "--all", "--persistent"), "the definition")
        assert sources(libvirtd.virsh("dumpxml", "--inactive", "again")) == [("file", {"file": target})]
        assert "libvirt-" not in "".join(nodes(libvirtd)), "what it was started on is let go of"
        until(lambda: server.get("/v1/vms/again")["disks"][0]["state"] == "synced", "its protection")
        assert server.get("/v1/vms/again")["domain"] == "again"

        # What libvirt starts next is what is at home.
        pid = libvirtd.pid("again")
        libvirtd.virsh("destroy", "again")
        until(lambda: not is_running(pid), "the end of QEMU")
        assert at_home(target) == content
        libvirtd.start_domain("again")
        libvirtd.io("again", f"write -P 8 {2 * MIB} 64k")
        content[2 * MIB : 2 * MIB + (64 << 10)] = b"\x08" * (64 << 10)

        # Back on its fork nobody is to start it again from home.
        until(lambda: server.get("/v1/vms/again")["disks"][0]["state"] == "synced", "its protection")
        server.post(f"/v1/recoveries/{begun['id']}:undo")
        shown = wait(server, begun["id"], "aborted")
        until(lambda: "again" not in libvirtd.virsh("list", "--all", "--persistent"), "the end of it")
        assert read(begun["uri"], SIZE) == content


@pytest.mark.real
def test_what_cannot_be_started_leaves_nothing(short_path: Path, libvirtd: Libvirtd) -> None:
    home = short_path / "home"
    home.mkdir()
    with Server(short_path / "s") as server:
        protect(server)
        description = short_path / "web.xml"
        description.write_text(DOMAIN.format(name="web", image="/nowhere").replace("q35", "none"))
        none = f"qemu:///system?socket={short_path}/none"
        asked: dict[str, Any]
        for asked, why in (
            ({"vm_command": str(description)}, "libvirt refused again: XML error"),
            ({"libvirt": none}, "look whether libvirtd runs"),
            ({"libvirt": "here"}, "not the URI of a libvirt"),
            ({"mode": "stream"}, "mirrored home, not streamed"),
            ({"isolated": True}, "an isolated VM has no .*--libvirt"),
            ({"qmp": "/x"}, "either you start the VM, or the service does"),
            ({"libvirt": None, "domain": "x", "qmp": "/x"}, "--domain goes with --libvirt"),
        ):
            with pytest.raises(ApiError, match=why):
                begin(server, libvirtd, home, "web/vda@good", **asked)
        assert server.get("/v1/recoveries") == server.get("/v1/forks") == []
        assert libvirtd.virsh("list", "--all").strip() == ""

        # One of our own that ends before it is home has failed, and is started again.
        begun = begin(server, libvirtd, home, "web/vda@good", domain="again")
        os.kill(export := server.pids()["export"], signal.SIGSTOP)
        try:
            os.kill(libvirtd.pid("again"), signal.SIGKILL)
        finally:
            os.kill(export, signal.SIGCONT)
        found = wait(server, begun["id"], "failed", "done")
        if found["state"] == "failed":
            server.post(f"/v1/recoveries/{begun['id']}:retry")
            libvirtd.adopt("again")
        wait(server, begun["id"], "done")
