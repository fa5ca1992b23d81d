"""Recovered disks handed to a QEMU that is there already: their nodes, the guest's devices on them, and the word to begin.

    device  DISK  ──►  raw or qcow2  cdp-ID-N-disk  ──►  nbd or file  cdp-ID-N-nbd

Whatever of it is there already stays, so that it can be done again. A device's id is the disk's name, by which it is known once
it is protected. Which ports of a PCI Express machine are free QEMU does not say before firmware has run, so they are tried.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import trio

from cdpserver.errors import RefusedError
from cdpserver.vm.disks import peripheral
from cdpserver.vm.launch import parts
from cdpserver.vm.launch.parts import Disk, Image, Nbd
from cdpserver.vm.qmp import Monitor, QmpRefusedError
from cdpserver.vm.recovery.graph import Graph, read_graph

Attach: TypeAlias = Literal["virtio-blk", "virtio-scsi", "nodes"]

NOT_BEGUN = "prelaunch"
"""QEMU's word for a VM that was started with -S."""


GIVE_UP_S = 3.0
"""How long a device may take to go."""

LOOK_S = 0.05


class NoPortError(RefusedError):
    """QEMU has no place for one more device."""

    usual_hint = "give its machine a free port for each (-device pcie-root-port,id=port1,chassis=1), or take --attach nodes"


async def attach(monitor: Monitor, id: str, disks: Sequence[tuple[int, Disk]], how: Attach) -> None:
    """Give the VM these disks of recovery `id`, each with its number; one that has not begun begins. NoPortError,
    QmpRefusedError.
    """
    stem = f"cdp-{id.rpartition('-')[2]}"
    graph = await read_graph(monitor)
    for number, disk in disks:
        if _is_used(graph, disk):
            continue
        below, over = parts.nodes(f"{stem}-{number}", disk, top=f"{stem}-{number}-disk")
        for node in (below, over):
            if node["node-name"] not in graph.names:
                await monitor.execute("blockdev-add", node)
        if how != "nodes":
            await _add_device(monitor, stem, number, disk, over["node-name"], how)
    if how != "nodes" and (await monitor.execute("query-status"))["status"] == NOT_BEGUN:
        await monitor.execute("system_reset")  # firmware is told the order of its devices at a reset
        await monitor.execute("cont")


def _is_used(graph: Graph, disk: Disk) -> bool:
    """Does the VM have it already?"""
    match disk.source:
        case Nbd(uri):
            return bool(graph.used_on_export(parts.nbd_server(uri)[1]))
        case Image(path, format):
            return graph.image(path, format) is not None


async def detach(monitor: Monitor, id: str, count: int) -> None:
    """Take back what `attach` gave for the disks below `count`, as far as a VM gives it up: one that has not begun does."""
    stem = f"cdp-{id.rpartition('-')[2]}"
    stems = [f"{stem}-{number}" for number in range(count)]
    tops = [f"{one}-disk" for one in stems]
    used = [block for block in await monitor.execute("query-block") if _node_of(block) in tops]
    for device in [*filter(None, map(peripheral, used)), f"{stem}-scsi"]:
        await _refused(monitor, "device_del", {"id": device})
    if used and (await monitor.execute("query-status"))["status"] == NOT_BEGUN:
        await monitor.execute("system_reset")  # what is to go goes then
    for one, top in zip(stems, tops, strict=True):
        with trio.move_on_after(GIVE_UP_S):
            while True:
                if "in use" not in await _refused(monitor, "blockdev-del", {"node-name": top}):
                    break
                await trio.sleep(LOOK_S)
        for below in ("nbd", "file"):
            await _refused(monitor, "blockdev-del", {"node-name": f"{one}-{below}"})


def _node_of(block: dict[str, Any]) -> str:
    return str(block.get("inserted", {}).get("node-name", ""))


async def _refused(monitor: Monitor, command: str, arguments: dict[str, Any]) -> str:
    """Why QEMU would not do it, or an empty text."""
    try:
        await monitor.execute(command, arguments)
    except QmpRefusedError as error:
        return error.desc
    return ""


async def _add_device(monitor: Monitor, stem: str, number: int, disk: Disk, node: str, how: Attach) -> None:
    taken = {one["name"] for one in await monitor.execute("qom-list", {"path": "/machine/peripheral"})}
    device = {
        "id": disk.name if disk.name not in taken else f"{stem}-{number}",
        "drive": node,
        "serial": parts.serial(disk),
    }
    if how == "virtio-blk":
        await _plug(monitor, {"driver": "virtio-blk-pci", **device}, disk)
        return
    controller = f"{stem}-scsi"
    if controller not in taken:
        await _plug(monitor, {"driver": "virtio-scsi-pci", "id": controller}, disk)
    await monitor.execute(
        "device_add", {"driver": "scsi-hd", "bus": f"{controller}.0", "scsi-id": number, **device}
    )


async def _plug(monitor: Monitor, device: dict[str, Any], disk: Disk) -> None:
    """Add a PCI device, wherever there is room."""
    said = ""
    # QEMU 7.2 would put a second device behind a PCI Express port as well, at an address that no guest looks at.
    behind = [{"bus": port, "addr": "0"} for port in ports(await monitor.execute("query-pci"))]
    for bus in ({}, *behind):
        try:
            await monitor.execute("device_add", {**device, **bus})
            return
        except QmpRefusedError as error:
            said = said or error.desc
    raise NoPortError(f"QEMU takes no device for {disk.name}: {said}")


def ports(buses: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The bridges that have a name, of the answer to `query-pci`: that is also the name of the bus behind it."""
    for bus in buses:
        for device in bus.get("devices", ()):
            if "pci_bridge" in device:
                if device["qdev_id"]:
                    yield device["qdev_id"]
                yield from ports([device["pci_bridge"]])
