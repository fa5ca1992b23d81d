"""Recovered disks handed to a QEMU that is there already, with real QEMU; the guest is a boot sector (tools.kit.bootsector)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver.vm.recovery.attach import ports
from tests.test_service import ApiError, Server, connected, until
from tools.kit.bootsector import boot_sector
from tools.kit.processes import listens, start, stop
from tools.kit.qmp import Qmp

real = pytest.mark.real

MIB = 1 << 20
SIZE = 8 * MIB

PORTS = ("-device", "pcie-root-port,id=one,chassis=1", "-device", "pcie-root-port,id=two,chassis=2")


@contextlib.contextmanager
def empty(directory: Path, *machine: str) -> Iterator[tuple[Path, Path]]:
    """A machine without a disk: (the service's monitor, the test's own)."""
    service, own, log = directory / "vm.qmp", directory / "own.qmp", directory / "vm.log"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none", *machine]
    command += ["-serial", f"file:{directory / 'serial'}"]
    for path in (service, own):
        command += ["-qmp", f"unix:{path},server=on,wait=off"]
    process = start(command, log)
    try:
        listens(process, own, log)
        yield service, own
    finally:
        stop(process)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A VM with two disks; the first has a boot sector."""
    with Server(tmp_path_factory.mktemp("cdp") / "s") as running:
        for name, first in (("vda", boot_sector()), ("vdb", b"\x22")):
            uri = running.post("/v1/disks", name=name, vm="web", size=SIZE)["uri"]
            with connected(uri) as client:
                client.pwrite(first.ljust(4096, b"\0"), 0)
                running.synced(f"web/{name}", write_blocking=True)
                client.pwrite(b"\x11" * 4096, MIB)
        yield running


def recover(server: Server, monitor: Path, home: Path, how: str, **more: Any) -> dict[str, Any]:
    home.mkdir(exist_ok=True)
    asked = {"point": "web@latest", "qmp": str(monitor), "to": str(home), "attach": how}
    found: dict[str, Any] = server.post("/v1/recoveries", **asked, protect=False, force=True, **more)
    return found


def ended(server: Server, id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        shown: dict[str, Any] = server.get(f"/v1/recoveries/{id}")
        return shown if shown["state"] not in ("running", "copying", "pivoting") else None

    return until(look, "end of the recovery")


def devices(monitor: Path) -> set[str]:
    with Qmp(monitor) as qmp:
        return {one["name"] for one in qmp.call("qom-list", path="/machine/peripheral")}


def guest_wrote(directory: Path) -> bool:
    serial = directory / "serial"
    return serial.exists() and b"W" in serial.read_bytes()


def test_ports_are_the_bridges_with_a_name() -> None:
    inner: dict[str, Any] = {"qdev_id": "b", "pci_bridge": {}}
    buses: list[dict[str, Any]] = [
        {"devices": [{"qdev_id": "nic"}, {"qdev_id": "", "pci_bridge": {}}]},
        {"devices": [{"qdev_id": "a", "pci_bridge": {"devices": [inner]}}]},
    ]
    assert list(ports(buses)) == ["a", "b"]


@real
@pytest.mark.parametrize("mode", ["mirror", "stream"])
def test_a_machine_that_waits_begins_with_its_disks(mode: str, server: Server, short_path: Path) -> None:
    """PCI Express, whose root takes nothing: the disks are behind its ports."""
    with empty(short_path, "-machine", "q35", "-S", *PORTS) as (monitor, own):
        found = recover(server, monitor, short_path / "home", "virtio-blk", mode=mode)
        assert found["state"] == "running" and found["rto_ms"] >= 0
        until(lambda: guest_wrote(short_path), "write of the guest")
        shown = ended(server, found["id"])
        assert shown["state"] == "done", shown
        assert devices(own) >= {"vda", "vdb"}
        server.post(f"/v1/recoveries/{found['id']}:commit")
    image = (short_path / "home" / "vda.qcow2").read_bytes()
    assert b"\x11" * 4096 in image


@real
def test_a_machine_that_runs_gets_more_disks_and_goes_on(server: Server, short_path: Path) -> None:
    with empty(short_path, "-machine", "pc") as (monitor, own), Qmp(own) as qmp:
        assert qmp.call("query-status")["status"] == "running"
        qmp.close()
        found = recover(server, monitor, short_path / "home", "virtio-scsi")
        shown = ended(server, found["id"])
        assert shown["state"] == "done", shown
        stem = found["id"].removeprefix("recovery-")
        assert devices(own) >= {"vda", "vdb", f"cdp-{stem}-scsi"}


@real
def test_what_is_taken_by_halves_is_taken_back(server: Server, short_path: Path) -> None:
    """There is room for one disk of two: the recovery does not begin, and nothing of it stays."""
    with empty(short_path, "-machine", "q35", "-S", *PORTS[:2]) as (monitor, own):
        with pytest.raises(ApiError) as error:
            recover(server, monitor, short_path / "home", "virtio-blk", name="halved")
        assert error.value.status == 409 and "pcie-root-port" in error.value.fields["hint"]
        assert devices(own) == {"one", "type"}
        with Qmp(own) as qmp:
            assert qmp.call("query-named-block-nodes") == []
            assert qmp.call("query-status")["status"] == "prelaunch"
        assert not [fork for fork in server.get("/v1/forks") if fork["name"].startswith("halved")], (
            server.events("recovery.fork-stays")
        )
        found = recover(server, monitor, short_path / "home", "nodes", name="halved")
        with Qmp(own) as qmp:
            tops = [
                node["node-name"]
                for node in qmp.call("query-named-block-nodes")
                if node["node-name"].endswith("-disk")
            ]
            assert len(tops) == 2 and qmp.call("query-status")["status"] == "prelaunch"
        server.post(f"/v1/recoveries/{found['id']}:abort")


@real
def test_without_a_qemu_there_is_no_recovery(server: Server, short_path: Path) -> None:
    with pytest.raises(ApiError) as error:
        recover(server, short_path / "none.qmp", short_path / "home", "virtio-blk", name="nowhere")
    assert error.value.status == 503
    assert not [fork for fork in server.get("/v1/forks") if fork["name"].startswith("nowhere")]
    with pytest.raises(ApiError) as usage:
        server.post("/v1/recoveries", point="web@latest", to=str(short_path), vm_command="/x", attach="nodes")
    assert usage.value.status == 400
