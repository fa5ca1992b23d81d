"""Groups: VMs and disks that are cut at one instant. Rows of the catalog's table `groups`, and what a name means. Pure.

Disks, VMs, groups and forks share one namespace. A group's row goes by a digest of its name, as that of a VM does.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from cdpserver.catalog import Catalog, Row
from cdpserver.errors import CorruptError, NotFoundError

SCHEMA = 1

MAX_MEMBERS = 24
"""A row has 4 KiB, and a member's name up to 129 characters."""


@dataclass(frozen=True, slots=True)
class Group:
    """`members` are names of VMs and disks, sorted."""

    name: str
    members: tuple[str, ...]
    created_ns: int

    def as_dict(self) -> dict[str, Any]:
        """The group as the CLI and the API show it."""
        return {"name": self.name, "members": list(self.members), "created_ns": self.created_ns}


def row_id(name: str) -> str:
    """The id of the row of a group."""
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def row(group: Group) -> Row:
    """The row that says it."""
    fields = {"group": group.name, "members": list(group.members), "created_ns": group.created_ns}
    return Row(row_id(group.name), SCHEMA, fields)


def read(found: Row) -> Group:
    """What a row says; CorruptError."""
    fields = found.fields
    name, members, created_ns = fields.get("group"), fields.get("members"), fields.get("created_ns")
    names_them = isinstance(members, list) and all(isinstance(one, str) for one in members)
    if names_them and found.schema == SCHEMA and isinstance(name, str) and isinstance(created_ns, int):
        return Group(name, tuple(fields["members"]), created_ns)
    raise CorruptError(
        f"the catalog's row {found.id} of a group cannot be read", hint="cdp group add writes it anew"
    )


def find(catalog: Catalog, name: str) -> Group | None:
    """The group of this name. CorruptError."""
    found = catalog.row("groups", row_id(name))
    return None if found is None else read(found)


def all_of(catalog: Catalog) -> list[Group]:
    """Every group, by name. CorruptError."""
    return sorted(map(read, catalog.rows("groups").values()), key=lambda group: group.name)


def is_several(catalog: Catalog, name: str) -> bool:
    """Is it a VM or a group, and no disk?"""
    if "/" in name or catalog.get(name) is not None:
        return False
    if catalog.row("groups", row_id(name)) is not None:
        return True
    return any(other.startswith(f"{name}/") for other in catalog.names())


def no_disk(catalog: Catalog, name: str) -> NotFoundError:
    """What to say of a name that is no disk's."""
    if not is_several(catalog, name):
        return NotFoundError(f"there is no disk {name}", hint="list the disks: cdp disk list")
    group = find(catalog, name)
    if group is not None:
        return NotFoundError(
            f"{name} is a group, and this takes a disk", hint=f"its members: {', '.join(group.members)}"
        )
    held = [other for other in catalog.names() if other.startswith(f"{name}/")]
    return NotFoundError(f"{name} is a VM, and this takes a disk", hint=f"it has {', '.join(held)}")
