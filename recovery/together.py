"""`VM@WHEN` and `GROUP@WHEN` in commands that work on one disk at a time: which disks, and where each is then."""

from argparse import Namespace
from typing import Any

from cdpserver import names
from cdpserver.errors import UnreachableError, UsageError
from cdpserver.state import StateDir, default_state_dir


def several(options: Namespace, point: str) -> dict[str, Any] | None:
    """The instant that a VM's or group's point is, with its `disks`; None for the point of a disk.

    From the service, or without one from the state directory.
    """
    name, when = names.parse_point(point)
    if "/" in name:
        return None
    from recovery.remote import client

    try:
        found = client(options).point(point)
    except UnreachableError:
        return _alone(options, name, when)
    return found if "disks" in found else None


def _alone(options: Namespace, name: str, when: names.When) -> dict[str, Any] | None:
    from cdpserver import groups
    from cdpserver.catalog import Catalog
    from cdpserver.clock import Clock
    from cdpserver.vm import instant

    state = StateDir.open(default_state_dir(options.state_dir))
    with Catalog.open(state, writable=False) as catalog:
        if not groups.is_several(catalog, name):
            return None
        found = instant.resolve(state, catalog, name, when, now_ns=Clock.for_reading(state.clock).now_ns())
    return found.as_dict() | {"disks": [disk.as_dict() for disk in found.disks]}


def label(name: str, disk: str) -> str:
    """What a disk of a VM or group is called within it: DISK of a VM, the whole name of a group's."""
    return disk.removeprefix(f"{name}/")


def one_disk(options: Namespace, place: str) -> str:
    """`VM@WHEN/DISK` as a point of that disk, with the volume that may follow; what names a disk stays as it is.

    UsageError that says which disks there are, unless one of them is named or there is but one.
    """
    name, _, rest = place.partition("@")
    when, _, inner = rest.partition("/")
    found = several(options, f"{name}@{when}")
    if found is None:
        return place
    points = {label(name, disk["disk"]): disk["point"] for disk in found["disks"]}
    for disk, point in points.items():
        if inner == disk or inner.startswith(f"{disk}/"):
            return f"{point}{inner[len(disk) :]}"
    if len(points) == 1 and not inner:
        return str(*points.values())
    raise UsageError(
        f"{name} has the disks {', '.join(points)}", hint=f"name one: {name}@{when}/{next(iter(points))}"
    )
