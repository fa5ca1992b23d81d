"""Which disks a QEMU has, from what its monitor answers. Pure.

    query-block               what a guest has: drive name, qdev path, the node on top        qemu-system
    query-named-block-nodes   every node, ours and the guest's alike                          both

A qemu-storage-daemon has nodes alone, and nothing says which of them are a guest's disks: there they must be named.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cdpserver.errors import NotFoundError, RefusedError, UsageError
from cdpserver.names import check_name, show

OURS = "cdp-"
"""What the names of our nodes and jobs begin with."""

_PERIPHERAL = re.compile(r"/machine/peripheral/([^/]+)")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class FoundDisk:
    """A disk as QEMU has it.

    `device` is what stays over QEMU's restarts: its drive name, else the guest device's id, else the node's name. `node` is what
    block jobs are told now.
    """

    name: str
    device: str
    node: str
    size: int


def guest_disks(blocks: Iterable[Mapping[str, Any]]) -> list[FoundDisk]:
    """The writable disks that a guest has, of the answer to `query-block`. UsageError if two have one name."""
    found = [disk for block in blocks if (disk := _guest_disk(block)) is not None]
    if len({disk.name for disk in found}) < len(found):
        raise UsageError(
            "two disks of this VM would have one name",
            hint="name the disks with --disk, or give the guest's devices ids: -device virtio-blk-pci,id=vda",
        )
    return found


def _guest_disk(block: Mapping[str, Any]) -> FoundDisk | None:
    inserted = block.get("inserted")
    # Firmware's flash is a block device like any other, and no disk; so is what no guest device uses.
    if not inserted or inserted.get("ro") or not block.get("qdev") or "flash" in block["qdev"]:
        return None
    node = str(inserted["node-name"])
    device = str(block.get("device") or peripheral(block) or node)
    return FoundDisk(as_name(device), device, node, int(inserted["image"]["virtual-size"]))


def choose(
    blocks: Iterable[Mapping[str, Any]], nodes: Iterable[Mapping[str, Any]], wanted: Iterable[str]
) -> list[FoundDisk]:
    """The disks of a VM: those wanted by device, node or name, else all that its guest has.

    NotFoundError for one that QEMU has not, UsageError where none is wanted and nothing says which are the guest's.
    """
    guests = guest_disks(blocks)
    chosen = [find(guests, nodes, device) for device in dict.fromkeys(wanted)]
    if chosen or guests:
        return chosen or guests
    names = sorted(str(node["node-name"]) for node in nodes if not _is_ours(node))
    raise UsageError(
        "QEMU does not say which disks are the guest's", hint=f"choose with --disk: {', '.join(names[:20])}"
    )


def find(guests: Iterable[FoundDisk], nodes: Iterable[Mapping[str, Any]], device: str) -> FoundDisk:
    """One disk by its drive name, its guest device's id, or its node's name. NotFoundError."""
    for disk in guests:
        if device in (disk.device, disk.node, disk.name):
            return disk
    for node in nodes:
        if node.get("node-name") == device:
            return FoundDisk(as_name(device), device, device, int(node["image"]["virtual-size"]))
    raise NotFoundError(
        f"QEMU has no disk {show(device)}", hint="its node names: QMP query-named-block-nodes"
    )


def wrote(stats: Iterable[Mapping[str, Any]], disk: FoundDisk) -> bool:
    """Has the guest written to a disk since QEMU began, says the answer to `query-blockstats`? Yes where it says nothing."""
    mine = [one for one in stats if disk.device in (one.get("device"), one.get("node-name"), peripheral(one))]
    return not mine or any(one["stats"]["wr_operations"] > 0 for one in mine)


def peripheral(block: Mapping[str, Any]) -> str | None:
    """The id of the guest's device that has a block of `query-block` or `query-blockstats`."""
    match = _PERIPHERAL.match(block.get("qdev") or "")
    return match[1] if match else None


def _is_ours(node: Mapping[str, Any]) -> bool:
    return str(node["node-name"]).startswith(OURS)


def as_name(device: str) -> str:
    """The name that a disk gets here: QEMU's own, without what names cannot hold."""
    return check_name(_NOT_IN_NAMES.sub("-", device).strip("-.") or "disk")


def check_size(name: str, *, here: int, there: int) -> None:
    """A mirror wants both of one size. RefusedError if the disk has shrunk."""
    if there < here:
        raise RefusedError(
            f"{name} has {here} bytes here and {there} in QEMU: its points hold what would be cut off",
            hint="protect the smaller disk under a VM name of its own: cdp protect NEWNAME",
        )
