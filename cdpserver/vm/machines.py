"""What machine a running QEMU is, as its monitor tells: enough to boot a point of its disks in one that is like it.

Memory, processors, the machine's type, firmware, a kernel of the host's, and the bus of each disk. Network cards and whatever
else the guest has are not asked for: who needs them gives a command.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cdpserver.vm.disks import guest_disks
from cdpserver.vm.launch.machine import Bus, Direct, Firmware, Machine
from cdpserver.vm.qmp import Monitor, QmpRefusedError

MIB = 1 << 20

LONGEST_COMMAND_LINE = 1024
"""Of a kernel of the host's: a machine is kept in a row of 4 KiB."""


async def read_machine(monitor: Monitor) -> Machine | None:
    """The machine; None of a QEMU that has none, as qemu-storage-daemon, or does not tell."""
    try:
        memory = await monitor.execute("query-memory-size-summary")
        processors = await monitor.execute("query-cpus-fast")
        arch = (await monitor.execute("query-target"))["arch"]
        kind = await _property(monitor, "/machine", "type")
        blocks = await monitor.execute("query-block")
        buses = [(disk.name, await _bus(monitor, disk.device, blocks)) for disk in guest_disks(blocks)]
        direct = await _direct(monitor)
    except (QmpRefusedError, KeyError):
        return None
    return Machine(
        program=f"qemu-system-{arch}",
        machine=kind.removesuffix("-machine"),
        cpus=len(processors),
        memory_mib=max(1, (memory["base-memory"] + memory.get("plugged-memory", 0)) // MIB),
        direct=direct,
        firmware=firmware_of(blocks),
        buses=tuple((name, bus) for name, bus in buses if bus != "virtio-blk"),
    )


async def _property(monitor: Monitor, path: str, name: str) -> str:
    return str(await monitor.execute("qom-get", {"path": path, "property": name}))


async def _bus(monitor: Monitor, device: str, blocks: Iterable[Mapping[str, Any]]) -> Bus:
    for block in blocks:
        if (found := guest_disks([block])) and found[0].device == device:
            path = str(block["qdev"])
            path = path if path.startswith("/") else f"/machine/peripheral/{path}"
            kind = await _property(monitor, path, "type")
            return (
                "virtio-scsi"
                if kind.startswith("scsi")
                else "ide"
                if kind.startswith("ide")
                else "virtio-blk"
            )
    return "virtio-blk"


async def _direct(monitor: Monitor) -> Direct | None:
    kernel, initrd, append = [
        await _property(monitor, "/machine", name) for name in ("kernel", "initrd", "append")
    ]
    if not kernel or len(kernel + initrd + append) > LONGEST_COMMAND_LINE:
        return None
    return Direct(kernel, initrd or None, append)


def firmware_of(blocks: Iterable[Mapping[str, Any]]) -> Firmware | None:
    """The files of its flash, of the answer to `query-block`: code that is read only, and variables."""
    flash = [
        block["inserted"] for block in blocks if "flash" in block.get("qdev", "") and block.get("inserted")
    ]
    code = [str(one["file"]) for one in flash if one["ro"] and str(one["file"]).startswith("/")]
    variables = [str(one["file"]) for one in flash if not one["ro"] and str(one["file"]).startswith("/")]
    return Firmware(code[0], variables[0] if variables else None) if code else None


def fitted(machine: Machine, *, memory_mib: int, cpus: int) -> Machine:
    """The machine, no larger than what there is for it."""
    return replace(
        machine, memory_mib=max(1, min(machine.memory_mib, memory_mib)), cpus=max(1, min(machine.cpus, cpus))
    )


def as_fields(machine: Machine) -> dict[str, Any]:
    """What a row keeps of it."""
    direct, firmware = machine.direct, machine.firmware
    return {
        "program": machine.program,
        "machine": machine.machine,
        "cpus": machine.cpus,
        "memory_mib": machine.memory_mib,
        "direct": None if direct is None else [direct.kernel, direct.initrd, direct.append],
        "firmware": None if firmware is None else [firmware.code, firmware.variables],
        "buses": dict(machine.buses),
    }


def from_fields(fields: Mapping[str, Any]) -> Machine:
    """The reverse; KeyError, TypeError, ValueError for what is none."""
    buses = {str(name): str(bus) for name, bus in dict(fields["buses"]).items()}
    if wrong := set(buses.values()) - {"virtio-blk", "virtio-scsi", "ide"}:
        raise ValueError(f"there is no bus {wrong}")
    return Machine(
        program=str(fields["program"]),
        machine=str(fields["machine"]),
        cpus=int(fields["cpus"]),
        memory_mib=int(fields["memory_mib"]),
        direct=None if fields["direct"] is None else Direct(*fields["direct"]),
        firmware=None if fields["firmware"] is None else Firmware(*fields["firmware"]),
        buses=tuple(buses.items()),  # type: ignore[arg-type]
    )
