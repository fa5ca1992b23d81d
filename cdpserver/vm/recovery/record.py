"""What is kept of a recovery: rows of the catalog's table `recoveries`.

The row is written before anything that it speaks of is begun, so that a service that was killed knows what to look for.
"""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from cdpserver.catalog import Catalog, Row
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.names import format_time, show
from cdpserver.vm.recovery.states import NEXT, OVER, Phase, Stage, State, Step, follow

SCHEMA = 1

Format: TypeAlias = Literal["qcow2", "raw"]
Place: TypeAlias = Literal["fork", "home"]

KEPT_EVENTS = 20
"""Of one recovery, the newest: a row holds 4 KiB. The event log has them all."""

MAX_REASON = 300

MAX_DISKS = 16
"""Of one recovery, for the same reason."""


@dataclass(frozen=True, slots=True)
class RecoveredDisk:
    """One disk: the point `disk@seq:seq`, the fork of it that the VM runs on, and where it moves to.

    `made` is said before the file at `target` is created: from then on it is ours to replace or remove.
    """

    disk: str
    seq: int
    time_ns: int
    size: int
    fork: str
    target: str
    format: Format
    at: Place = "fork"
    made: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery. `events` are (time, what) of our clock, oldest first; `reason` is why it failed."""

    id: str
    name: str
    what: str
    qmp: str
    disks: tuple[RecoveredDisk, ...]
    stage: Stage
    created_ns: int
    rto_ms: int = 0
    copied: int = 0
    total: int = 0
    reason: str = ""
    events: tuple[tuple[int, str], ...] = ()

    def after(self, step: Step, *, now_ns: int, reason: str = "") -> "Recovery":
        """The recovery after a step. RefusedError where that is not possible."""
        stage = follow(self.stage, step, self.id)
        return replace(self, stage=stage, reason=reason[:MAX_REASON]).noted(step, now_ns=now_ns)

    def noted(self, what: str, *, now_ns: int) -> "Recovery":
        """The recovery with one more event."""
        return replace(self, events=(*self.events, (now_ns, what))[-KEPT_EVENTS:])

    def with_disk(self, number: int, **changed: Any) -> "Recovery":
        """The recovery with one disk changed."""
        disks = list(self.disks)
        disks[number] = replace(disks[number], **changed)
        return replace(self, disks=tuple(disks))

    def row(self) -> Row:
        """The row that says it."""
        fields = {
            "name": self.name,
            "what": self.what,
            "qmp": self.qmp,
            "state": self.stage.state,
            "phase": self.stage.phase,
            "created_ns": self.created_ns,
            "rto_ms": self.rto_ms,
            "copied": self.copied,
            "total": self.total,
            "reason": self.reason,
            "events": [list(event) for event in self.events],
            "disks": [
                {
                    "disk": one.disk,
                    "seq": one.seq,
                    "time_ns": one.time_ns,
                    "size": one.size,
                    "fork": one.fork,
                    "target": one.target,
                    "format": one.format,
                    "at": one.at,
                    "made": one.made,
                }
                for one in self.disks
            ],
        }
        return Row(self.id, SCHEMA, fields)

    def describe(self) -> dict[str, Any]:
        """The recovery as the API shows it."""
        return {
            "id": self.id,
            "name": self.name,
            "what": self.what,
            "state": self.stage.state,
            "phase": self.stage.phase,
            "copied_bytes": self.copied,
            "total_bytes": self.total,
            "rto_ms": self.rto_ms,
            "reason": self.reason,
            "created": format_time(self.created_ns),
            "qmp": self.qmp,
            "events": [{"time": format_time(time_ns), "event": what} for time_ns, what in self.events],
        }


def read(row: Row) -> Recovery:
    """What a row says; CorruptError."""
    fields = row.fields
    try:
        if row.schema != SCHEMA:
            raise ValueError(f"its schema is {row.schema}")
        return Recovery(
            id=row.id,
            name=str(fields["name"]),
            what=str(fields["what"]),
            qmp=str(fields["qmp"]),
            disks=tuple(_read_disk(disk) for disk in fields["disks"]),
            stage=_read_stage(fields["state"], fields["phase"]),
            created_ns=int(fields["created_ns"]),
            rto_ms=int(fields["rto_ms"]),
            copied=int(fields["copied"]),
            total=int(fields["total"]),
            reason=str(fields["reason"]),
            events=tuple((int(time_ns), str(what)) for time_ns, what in fields["events"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"the catalog's row {row.id} of a recovery cannot be read: {error}",
            hint="its forks are there all the same: cdp fork list",
        ) from None


def _read_stage(state: State, phase: Phase) -> Stage:
    stage = Stage(state, phase)
    if stage not in NEXT:
        raise ValueError(f"there is no stage {state}/{phase}")
    return stage


def _read_disk(fields: dict[str, Any]) -> RecoveredDisk:
    if fields["format"] not in get_args(Format) or fields["at"] not in get_args(Place):
        raise ValueError("a format or place that does not exist")
    return RecoveredDisk(
        disk=str(fields["disk"]),
        seq=int(fields["seq"]),
        time_ns=int(fields["time_ns"]),
        size=int(fields["size"]),
        fork=str(fields["fork"]),
        target=str(fields["target"]),
        format=fields["format"],
        at=fields["at"],
        made=bool(fields["made"]),
    )


def all_of(catalog: Catalog) -> list[Recovery]:
    """Every recovery, oldest first; CorruptError."""
    return sorted(map(read, catalog.rows("recoveries").values()), key=lambda one: (one.created_ns, one.id))


def find(catalog: Catalog, which: str) -> Recovery:
    """The recovery of this id, or else the newest of this name. NotFoundError."""
    held = all_of(catalog)
    found = [one for one in held if one.id == which] or [one for one in held if one.name == which]
    if not found:
        raise NotFoundError(f"there is no recovery {show(which)}", hint="list them: cdp recover list")
    return found[-1]


def new_id(taken: Iterable[str]) -> str:
    """An id that no recovery has."""
    used = set(taken)
    while (id := f"recovery-{secrets.token_hex(4)}") in used:
        continue
    return id


def holding(catalog: Catalog, fork: str) -> Recovery | None:
    """The recovery that is not over and has its VM, or the way back, on this fork."""
    for one in all_of(catalog):
        if one.stage not in OVER and any(disk.fork == fork for disk in one.disks):
            return one
    return None
