"""A whole QEMU command line from a description of a machine. Pure.

It is what a point is booted in when nobody says how: a q35 with one virtio disk for each disk of the VM, which firmware or
a kernel of the host starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cdpserver.vm.launch import parts
from cdpserver.vm.launch.parts import Accel, Disk, Places


@dataclass(frozen=True, slots=True)
class Direct:
    """A kernel of the host's instead of a boot loader on the first disk."""

    kernel: str
    initrd: str | None = None
    append: str = ""


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
    for number, disk in enumerate(disks):
        made += parts.blockdevs(number, disk)
        made += ["-device", device(number, disk)]
    return made


def device(number: int, disk: Disk) -> str:
    """The guest's device on a disk's node."""
    serial = parts.comma(parts.serial(disk))
    boot = f",bootindex={number + 1}"
    return f"virtio-blk-pci,drive={parts.node(number)},id={parts.node(number)}-device,serial={serial}{boot}"
