"""A whole QEMU command line from a description of a machine. Pure.

It is what a point is booted in when nobody says how: a q35 with one virtio disk for each disk of the VM, which firmware or
a kernel of the host starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cdpserver.vm.launch import parts
from cdpserver.vm.launch.parts import Accel, Disk, Places

Bus: TypeAlias = Literal["virtio-blk", "virtio-scsi", "ide"]

DRIVERS: dict[Bus, str] = {
    "virtio-blk": "virtio-blk-pci",
    "virtio-scsi": "scsi-hd,bus=recovered-scsi.0",
    "ide": "ide-hd",
}


@dataclass(frozen=True, slots=True)
class Direct:
    """A kernel of the host's instead of a boot loader on the first disk."""

    kernel: str
    initrd: str | None = None
    append: str = ""


@dataclass(frozen=True, slots=True)
class Firmware:
    """The files of UEFI's flash on this host. What the guest writes to its variables is let go of."""

    code: str
    variables: str | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """What the guest sees. `network` is a value of `-nic`; None is no network."""

    program: str = "qemu-system-x86_64"
    machine: str = "q35"
    cpu: str = "max"
    cpus: int = 1
    memory_mib: int = 1024
    network: str | None = None
    direct: Direct | None = None
    firmware: Firmware | None = None
    buses: tuple[tuple[str, Bus], ...] = ()
    """Of disks, by name, that are not on a bus of their own (virtio-blk)."""


def command(
    machine: Machine,
    name: str,
    disks: Sequence[Disk],
    places: Places,
    *,
    accel: Accel = "tcg",
    isolated: bool = False,
) -> list[str]:
    """The command line, complete. An isolated machine has no network, whatever it is described with."""
    made = [
        machine.program,
        *("-name", parts.comma(name)),
        *("-accel", accel),
        *("-machine", machine.machine),
        *("-cpu", machine.cpu if accel == "tcg" or machine.cpu != "max" else "host"),
        *("-smp", str(machine.cpus)),
        *("-m", str(machine.memory_mib)),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-nic", "none" if isolated or machine.network is None else machine.network),
        *("-serial", parts.console(places, isolated=isolated)),
        *parts.agent_port(places),
        *parts.monitor(places),
    ]
    if machine.direct is not None:
        made += ["-kernel", machine.direct.kernel]
        made += [] if machine.direct.initrd is None else ["-initrd", machine.direct.initrd]
        made += ["-append", machine.direct.append]
    if machine.firmware is not None:
        made += _flash(machine.firmware)
    buses = dict(machine.buses)
    if "virtio-scsi" in buses.values():
        made += ["-device", "virtio-scsi-pci,id=recovered-scsi"]
    for number, disk in enumerate(disks):
        made += parts.blockdevs(number, disk)
        made += ["-device", device(number, disk, buses.get(disk.name, "virtio-blk"))]
    return made


def _flash(firmware: Firmware) -> list[str]:
    made = ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={parts.comma(firmware.code)}"]
    if firmware.variables is not None:
        # The VM that they are of may run, and has them locked.
        file = f"file.filename={parts.comma(firmware.variables)},file.locking=off"
        made += ["-drive", f"if=pflash,unit=1,format=raw,snapshot=on,{file}"]
    return made


def device(number: int, disk: Disk, bus: Bus = "virtio-blk") -> str:
    """The guest's device on a disk's node."""
    serial = parts.comma(parts.serial(disk))
    boot = f",bootindex={number + 1}"
    return f"{DRIVERS[bus]},drive={parts.node(number)},id={parts.node(number)}-device,serial={serial}{boot}"
