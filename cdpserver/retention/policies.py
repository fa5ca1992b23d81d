"""Policies of disks and VMs as rows of the catalog, and the sum of the layers for one disk.

A disk's row goes by its timeline's id, which is never given twice: a new disk of an old name has no old policy.
A VM's goes by a digest of its name, since names are longer than rows' ids.
Values are kept as the operator writes them, readable in the plain copy.
"""

import hashlib
from collections.abc import Mapping

from cdpserver.catalog import Catalog, Entry, Row
from cdpserver.config import Config
from cdpserver.errors import CdpError, CorruptError
from cdpserver.names import split_name
from cdpserver.retention.policy import BY_NAME, Effective, Layer, Policy, combine, parse_values

SCHEMA = 1


def disk_row(id: str) -> str:
    """The id of the row of a disk's policy, by its timeline's id."""
    return f"disk-{id}"


def vm_row(vm: str) -> str:
    """The id of the row of a VM's policy."""
    return f"vm-{hashlib.sha256(vm.encode()).hexdigest()[:24]}"


def texts_of(row: Row | None) -> dict[str, str]:
    """What a row says, as the operator wrote it; {} for none. CorruptError."""
    if row is None:
        return {}
    values = row.fields.get("values")
    if row.schema != SCHEMA or not isinstance(values, dict):
        raise _strange(row)
    return dict(values)


def _strange(row: Row) -> CorruptError:
    return CorruptError(
        f"policy {row.id} in the catalog cannot be read", hint="cdp policy clear, then set it anew"
    )


def _layer(source: str, row: Row | None) -> Layer:
    texts = texts_of(row)
    if row is None:
        return Layer(source, {})
    # A value of a newer version, or out of a range that has become narrower.
    try:
        return Layer(source, parse_values(texts))
    except (CdpError, TypeError, AttributeError):
        raise _strange(row) from None


def layers(rows: Mapping[str, Row], config: Config, entry: Entry) -> list[Layer]:
    """The layers of a disk's policy, the weakest first."""
    _, vm = split_name(entry.name)
    found = [config.policy]
    if vm is not None:
        found.append(_layer(f"VM {vm}", rows.get(vm_row(vm))))
    return [*found, _layer("disk", rows.get(disk_row(entry.id)))]


def of_vm_or_disk(rows: Mapping[str, Row], config: Config, entry: Entry) -> Policy:
    """The policy of the VM that a disk is of, or of a disk that is of none. CorruptError."""
    found = layers(rows, config, entry)
    return combine(found[:-1] if split_name(entry.name)[1] is not None else found).policy


def of_vm(rows: Mapping[str, Row], config: Config, vm: str) -> Effective:
    """The policy of a VM of which there are no disks here. CorruptError."""
    return combine([config.policy, _layer(f"VM {vm}", rows.get(vm_row(vm)))])


def effective(catalog: Catalog, config: Config, entry: Entry) -> Effective:
    """The policy of a disk as it is now. CorruptError for a row that cannot be read."""
    return combine(layers(catalog.rows("policies"), config, entry))


def row(id: str, about: Mapping[str, str], texts: Mapping[str, str]) -> Row:
    """The row that keeps what an operator said of a disk or VM, which `about` names."""
    return Row(id, SCHEMA, {**about, "values": {name: texts[name] for name in BY_NAME if name in texts}})


def put(catalog: Catalog, row: Row) -> None:
    """Durable on return."""
    catalog.put_row("policies", row)


def remove(catalog: Catalog, id: str) -> None:
    """Forget a row, if there is one. Durable on return."""
    if catalog.row("policies", id) is not None:
        catalog.delete_row("policies", id)


def forget(catalog: Catalog, entry: Entry) -> None:
    """A disk is gone: so is its policy, and with a VM's last disk the VM's."""
    remove(catalog, disk_row(entry.id))
    _, vm = split_name(entry.name)
    if vm is not None and not any(name.startswith(f"{vm}/") for name in catalog.names()):
        remove(catalog, vm_row(vm))
