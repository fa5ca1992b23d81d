"""What is desired of VMs survives in the catalog as it was written."""

import pytest

from cdpserver.catalog import Catalog, Row
from cdpserver.errors import CorruptError
from cdpserver.state import StateDir
from cdpserver.vm import record

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
    ),
]


def test_written_and_read(tmp_path_factory: pytest.TempPathFactory) -> None:
    state = StateDir.create_or_open(tmp_path_factory.mktemp("s"))
    with Catalog.open(state, writable=True) as catalog:
        for vm in reversed(VMS):
            catalog.put_row("vms", record.row(vm))
        assert record.all_of(catalog) == VMS
        assert record.find(catalog, "web") == VMS[1]
        assert record.find(catalog, "other") is None


@pytest.mark.parametrize("missing", ["connection", "disks", "created_ns", "wait"])
def test_a_strange_row(missing: str) -> None:
    row = record.row(VMS[0])
    fields = {key: value for key, value in row.fields.items() if key != missing}
    with pytest.raises(CorruptError, match="cdp protect VM again"):
        record.read(Row(row.id, 1, fields))
    with pytest.raises(CorruptError, match="schema"):
        record.read(Row(row.id, 2, row.fields))
