"""`cdp point` and `cdp uri`: points of disks, and those that the disks of a VM or group have in common."""

from argparse import Namespace
from typing import Any

from cdpserver.errors import UnreachableError, UsageError
from cdpserver.names import format_time
from recovery import points_local
from recovery.output import Column, answer, answer_fields, answer_json
from recovery.remote import answer_list, answer_one, client
from recovery.together import one_disk

POINT_COLUMNS = (
    Column("time_ns", "time"),
    Column("age", right=True),
    Column("kind"),
    Column("seq", right=True),
    Column("records", right=True),
    Column("bytes", right=True),
    Column("grade"),
    Column("name"),
    Column("locked"),
    Column("drill"),
)


def point_list(options: Namespace) -> None:
    """Points, oldest first: of a disk, or those that the disks of a VM have in common."""
    if (options.disk is None) == (options.vm is None):
        raise UsageError("name a disk, or a VM with --vm", hint="cdp point list --help")
    span = {"since": options.since, "until": options.until, "kind": options.kind, "limit": options.limit}
    if options.disk is not None:
        rows = client(options).points(options.disk, **span)
    else:
        rows = client(options).vm_points(options.vm, **span)
    if not options.json:
        rows = [row | {"age": row.get("time_ns"), "drill": _short(row.get("drill"))} for row in rows]
    answer_list(options, POINT_COLUMNS, rows, f"{options.disk or options.vm} has no such points")


def _short(drill: dict[str, Any] | None) -> str:
    """What came of a point's newest drill, for a table."""
    if drill is None:
        return ""
    rto_ms = drill.get("rto_ms")
    return str(drill["state"]) if rto_ms is None else f"{drill['state']} {rto_ms / 1000:.1f}s"


def point_mark(options: Namespace) -> None:
    """A bookmark; of a VM or group at one instant of all its disks."""
    how = {"freeze": options.freeze, "or_crash": options.or_crash}
    made = client(options).mark(
        options.disk, options.name, **{key: True for key, is_so in how.items() if is_so}
    )
    if not options.json and "disks" in made:
        made |= {"disks": ", ".join(f"{disk} {grade}" for disk, grade in made["disks"].items())}
    answer_one(options, made)


def point_show(options: Namespace) -> None:
    """One instant, and what its grade rests on."""
    shown = client(options).point(options.point)
    if options.json:
        answer_json(shown)
        return
    hidden = ("disks", "time_ns", "evidence")
    fields = {key: value for key, value in shown.items() if key not in hidden}
    fields |= {"evidence": _evidence(shown)} if "evidence" in shown else {}
    for disk in shown.get("disks", ()):
        fields[disk["disk"]] = f"seq:{disk['seq']}, {disk['grade']}: {_evidence(disk)}"
    answer_fields(fields)


def _evidence(shown: dict[str, Any]) -> str:
    said = dict(shown["evidence"])
    if seen := said.pop("observed", None):
        job = "" if seen["ready"] is None else f" (ready {seen['ready']}, io-status {seen['io_status']})"
        said["observed by"] = f"{seen['by']} at {format_time(seen['time_ns'])}{job}"
    return ", ".join(f"{key} {value}" for key, value in said.items() if value is not None)


def uri(options: Namespace) -> None:
    """The URI of a point, alone on its line; of a VM or group one for each disk, all of one instant."""
    service = client(options)
    name, _, rest = options.point.partition("@")
    if "/" in rest and "/" not in name:
        options.point = one_disk(options, options.point)
    try:
        found = service.place(options.point)
    except UnreachableError as error:
        found = points_local.uri(options, error)
    if options.json:
        answer_json(found if "disks" in found else {"uri": found["uri"]})
        return
    for disk in found.get("disks", [found]):
        answer(disk["uri"])
