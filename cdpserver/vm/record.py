"""Which VMs are to be protected, and how: rows of the catalog's table `vms`.

Desired state: the row stands from `cdp protect` until `cdp protect --remove`, whatever becomes of QEMU, the host or us.
A VM that is to move has in its row where to, until it runs there; then that is its row.
A row goes by a digest of the VM's name, since names are longer than rows' ids.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from cdpserver.catalog import Catalog, Row
from cdpserver.catalog.rows import read_each
from cdpserver.errors import CorruptError
from cdpserver.vm import machines
from cdpserver.vm.launch.machine import Machine

SCHEMA = 1

Method: TypeAlias = Literal["blockdev-mirror", "drive-mirror"]


@dataclass(frozen=True, slots=True)
class QmpSocket:
    """The monitor's own Unix socket."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class LibvirtDomain:
    """A domain of a libvirt connection, which owns the monitor."""

    uri: str
    domain: str

    def __str__(self) -> str:
        return f"{self.domain} of {self.uri}"


Connection: TypeAlias = QmpSocket | LibvirtDomain


@dataclass(frozen=True, slots=True)
class ProtectedDisk:
    """`name` is the disk's full name here (VM/DISK); `device` QEMU's node name, or its qdev id or drive name."""

    name: str
    device: str


@dataclass(frozen=True, slots=True)
class ProtectedVm:
    """One VM; `wait` chooses a guest that waits over a gap, `guest_agent` is its agent's Unix socket.

    `by` is the `cdp agent` that looks after it, beside QEMU on another host; nothing for the service itself.
    `next` is the same VM where it is to move to; it says nothing of the VM where it is.
    """

    name: str
    connection: Connection
    disks: tuple[ProtectedDisk, ...]
    created_ns: int
    method: Method = "blockdev-mirror"
    wait: bool = False
    guest_agent: str | None = None
    by: str = ""
    machine: Machine | None = field(default=None, compare=False)
    """What it was when its protection began, for drills while it does not run."""
    next: "ProtectedVm | None" = field(default=None, compare=False)

    @property
    def place(self) -> tuple[Connection, str]:
        """Where it is looked after: at which monitor, and by whom."""
        return self.connection, self.by

    def mirrored_like(self, other: "ProtectedVm") -> bool:
        """Would a mirror of the other do for this one? How it is made and how long it waits is fixed at its start."""
        return (self.method, self.wait) == (other.method, other.wait)


def row_id(vm: str) -> str:
    """The id of the row of a VM."""
    return hashlib.sha256(vm.encode()).hexdigest()[:24]


def row(vm: ProtectedVm) -> Row:
    """The row that says it."""
    coming = None if vm.next is None else fields_of(vm.next)
    return Row(row_id(vm.name), SCHEMA, fields_of(vm) | {"next": coming})


def fields_of(vm: ProtectedVm) -> dict[str, Any]:
    """The fields of a row, but for where the VM is to move to."""
    match vm.connection:
        case QmpSocket(path):
            connection = {"qmp": path}
        case LibvirtDomain(uri, domain):
            connection = {"libvirt": uri, "domain": domain}
    return {
        "vm": vm.name,
        "connection": connection,
        "disks": [{"name": disk.name, "device": disk.device} for disk in vm.disks],
        "created_ns": vm.created_ns,
        "method": vm.method,
        "wait": vm.wait,
        "guest_agent": vm.guest_agent,
        "by": vm.by,
        "machine": None if vm.machine is None else machines.as_fields(vm.machine),
    }


def as_shown(vm: ProtectedVm) -> dict[str, Any]:
    """Where it is looked after, as the CLI and the API show it."""
    at = vm.connection
    return {
        "qmp": at.path if isinstance(at, QmpSocket) else None,
        "libvirt": at.uri if isinstance(at, LibvirtDomain) else None,
        "domain": at.domain if isinstance(at, LibvirtDomain) else None,
        "by": vm.by or None,
    }


def read(found: Row) -> ProtectedVm:
    """What a row says; CorruptError."""
    try:
        if found.schema != SCHEMA:
            raise ValueError(f"its schema is {found.schema}")
        coming = found.fields.get("next")
        vm = _read_fields(found.fields)
        return vm if coming is None else replace(vm, next=_read_fields(coming))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"the catalog's row {found.id} of a protected VM cannot be read: {error}",
            hint="cdp protect VM again writes it anew",
        ) from None


def _read_fields(fields: Mapping[str, Any]) -> ProtectedVm:
    return ProtectedVm(
        name=str(fields["vm"]),
        connection=_read_connection(fields["connection"]),
        disks=tuple(ProtectedDisk(str(disk["name"]), str(disk["device"])) for disk in fields["disks"]),
        created_ns=int(fields["created_ns"]),
        method="drive-mirror" if fields["method"] == "drive-mirror" else "blockdev-mirror",
        wait=bool(fields["wait"]),
        guest_agent=None if fields["guest_agent"] is None else str(fields["guest_agent"]),
        by=str(fields.get("by", "")),
        machine=None if (machine := fields.get("machine")) is None else machines.from_fields(machine),
    )


def _read_connection(value: Mapping[str, Any]) -> Connection:
    if "qmp" in value:
        return QmpSocket(str(value["qmp"]))
    return LibvirtDomain(str(value["libvirt"]), str(value["domain"]))


def find(catalog: Catalog, vm: str) -> ProtectedVm | None:
    """The protected VM of this name."""
    found = catalog.row("vms", row_id(vm))
    return None if found is None else read(found)


def all_of(catalog: Catalog) -> list[ProtectedVm]:
    """Every protected VM whose row can be read, by name."""
    return sorted(read_each(catalog.rows("vms").values(), read)[0], key=lambda vm: vm.name)


def unreadable(catalog: Catalog) -> list[CorruptError]:
    """What is wrong with the other rows."""
    return read_each(catalog.rows("vms").values(), read)[1]
