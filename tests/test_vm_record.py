"""What is desired of VMs survives in the catalog as it was written."""

from dataclasses import replace

import pytest

from cdpserver.catalog import Catalog, Row
from cdpserver.errors import CorruptError
from cdpserver.state import StateDir
from cdpserver.vm import record
from cdpserver.vm.launch.machine import Direct, Firmware, Machine

VMS = [
    record.ProtectedVm(
        "shop", record.QmpSocket("/run/shop.qmp"), (record.ProtectedDisk("shop/vda", "drive0"),), 42
    ),
    record.ProtectedVm(
        "web",
        record.LibvirtDomain("qemu:///system", "web-1"),
        (record.ProtectedDisk("web/a", "x"), record.ProtectedDisk("web/b", "y")),
        43,
        method="drive-mirror",
        wait=True,
        guest_agent="/run/web.qga",
        machine=Machine(
            program="qemu-system-x86_64",
            machine="pc-q35-7.2",
            cpus=4,
            memory_mib=4096,
            direct=Direct("/boot/vmlinuz", "/boot/initrd", "console=ttyS0"),
            firmware=Firmware("/usr/share/OVMF/code.fd", "/var/lib/web.fd"),
            buses=(("a", "ide"), ("b", "virtio-scsi")),
        ),
    ),
]


def test_written_and_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    state = StateDir.create_or_open(tmp_path_factory.mktemp("s"))
    with Catalog.open(state, writable=True) as catalog:
        for vm in reversed(VMS):
            catalog.put_row("vms", record.row(vm))
        assert record.all_of(catalog) == VMS
        assert [vm.machine for vm in record.all_of(catalog)] == [vm.machine for vm in VMS]
        assert record.find(catalog, "web") == VMS[1]
        assert record.find(catalog, "other") is None


def test_a_vm_that_is_to_move() -> None:
    coming = replace(VMS[0], connection=record.QmpSocket("/run/there.qmp"), by="hv1")
    found = record.read(record.row(replace(VMS[0], next=coming)))
    assert found == VMS[0] and found.next == coming and coming.place != VMS[0].place
    row = record.row(VMS[0])
    older = {key: value for key, value in row.fields.items() if key not in ("next", "by")}
    assert record.read(Row(row.id, 1, older)).next is None, "written before there were any"


@pytest.mark.parametrize("machine", [{}, {"buses": 1}, {"buses": {"a": "usb"}}, 7])
def test_a_strange_machine(machine: object) -> None:
    row = record.row(VMS[0])
    with pytest.raises(CorruptError, match="cdp protect VM again"):
        record.read(Row(row.id, 1, {**row.fields, "machine": machine}))


@pytest.mark.parametrize("missing", ["connection", "disks", "created_ns", "wait"])
def test_a_strange_row(missing: str) -> None:
    row = record.row(VMS[0])
    fields = {key: value for key, value in row.fields.items() if key != missing}
    with pytest.raises(CorruptError, match="cdp protect VM again"):
        record.read(Row(row.id, 1, fields))
    with pytest.raises(CorruptError, match="schema"):
        record.read(Row(row.id, 2, row.fields))
