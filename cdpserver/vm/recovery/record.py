"""What is kept of a recovery: rows of the catalog's table `recoveries`.

The row is written before anything that it speaks of is begun, so that a service that was killed knows what to look for.
"""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from cdpserver.catalog import Catalog, Row
from cdpserver.catalog.rows import check_row, read_each
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.names import format_time, show
from cdpserver.vm.record import Connection, LibvirtDomain, QmpSocket
from cdpserver.vm.recovery.states import HOME, NEXT, OVER, Phase, Stage, State, Step, follow

SCHEMA = 1

Format: TypeAlias = Literal["qcow2", "raw"]
Place: TypeAlias = Literal["fork", "home"]
Mode: TypeAlias = Literal["mirror", "stream"]

KEPT_EVENTS = 20
"""Of one recovery, the newest: a row holds 4 KiB. The event log has them all."""

MAX_REASON = 300

MAX_DEVICE = 64
"""Characters of a device's name."""

MAX_DISKS = 16
"""Of one recovery, for the same reason."""


@dataclass(frozen=True, slots=True)
class RecoveredDisk:
    """One disk: the point `disk@seq:seq`, the fork of it, and where it moves to.

    `at` says where all of the disk is: at the fork (when streaming, together with what is at home already), or at home.
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
    replaces: bool = False
    """A file lay at `target` before: it is kept beside until the recovery is committed."""
    device: str = ""
    """How QEMU names the disk that has arrived, for its protection."""
    warning: str = ""
    """What the point lacks; only with force."""
    of: str = ""
    """The disk whose content it is, where `disk` is a backup of it that is attached."""
    chain: bool = False
    """What is at home stands on an image of the point, and that on `base` if there is one."""
    base: str = ""

    def aside(self, id: str) -> str:
        """Where what `target` replaces is kept meanwhile."""
        return f"{self.target}.before-{id}"

    @property
    def point_image(self) -> str:
        """Of a chain: the image of the point."""
        return f"{self.target.removesuffix('.qcow2')}.point.qcow2"


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery. `events` are (time, what) of our clock, oldest first; `reason` is why it failed.

    In mode *mirror* the VM runs on the forks until it is home. In mode *stream* it runs at home from the start, on files that are
    filled from the point; the forks hold that, and are where an undo leads to. From then on it is a mirror's recovery.
    """

    id: str
    name: str
    what: str
    qmp: str
    disks: tuple[RecoveredDisk, ...]
    stage: Stage
    created_ns: int
    mode: Mode = "mirror"
    overwrites: str = ""
    """The VM whose disks it replaces; else a VM of its own, `name`, begins."""
    protect: bool = True
    """The VM is to be protected again when it is home."""
    protected: bool = False
    """It is."""
    before: Mapping[str, Any] | None = None
    """The record of protection of the VM that is overwritten, as it was."""
    rto_ms: int = 0
    copied: int = 0
    total: int = 0
    reason: str = ""
    events: tuple[tuple[int, str], ...] = ()
    vm_command: str = ""
    """The file with the command that the service starts the VM with; empty when somebody else does."""
    accel: Literal["", "tcg", "kvm"] = ""
    """What runs it in place of what the command says."""
    attach: Literal["", "virtio-blk", "virtio-scsi", "nodes"] = ""
    """How its disks are handed to the QEMU at its monitor, which is there already; empty when somebody starts it on them."""
    libvirt: str = ""
    """The libvirt that the service starts the VM in, as `domain`; the file is then a domain's description, or none."""
    domain: str = ""

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

    @property
    def connection(self) -> Connection:
        """The way to its QEMU's monitor."""
        return LibvirtDomain(self.libvirt, self.domain) if self.libvirt else QmpSocket(self.qmp)

    @property
    def vm(self) -> str:
        """The VM that it makes, or overwrites."""
        return self.overwrites or self.name

    def protected_name(self, disk: RecoveredDisk) -> str:
        """The disk that goes on with its history once it is home."""
        return (disk.of or disk.disk) if self.overwrites else disk.fork

    def row(self) -> Row:
        """The row that says it."""
        fields = {
            "name": self.name,
            "what": self.what,
            "qmp": self.qmp,
            "mode": self.mode,
            "overwrites": self.overwrites,
            "protect": self.protect,
            "protected": self.protected,
            "before": self.before,
            "state": self.stage.state,
            "phase": self.stage.phase,
            "created_ns": self.created_ns,
            "rto_ms": self.rto_ms,
            "copied": self.copied,
            "total": self.total,
            "reason": self.reason,
            "events": [list(event) for event in self.events],
            "vm_command": self.vm_command,
            "accel": self.accel,
            "attach": self.attach,
            "libvirt": self.libvirt,
            "domain": self.domain,
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
                    "replaces": one.replaces,
                    "device": one.device,
                    "warning": one.warning,
                    "of": one.of,
                    "chain": one.chain,
                    "base": one.base,
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
            "mode": self.mode,
            "vm": self.vm,
            "overwrites": bool(self.overwrites),
            "protected": self.protected,
            "state": self.stage.state,
            "phase": self.stage.phase,
            "copied_bytes": self.copied,
            "total_bytes": self.total,
            "rto_ms": self.rto_ms,
            "reason": self.reason,
            "created": format_time(self.created_ns),
            "qmp": self.qmp,
            "libvirt": self.libvirt or None,
            "domain": self.domain or None,
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
            mode=_one_of(get_args(Mode), fields.get("mode", "mirror")),
            overwrites=str(fields.get("overwrites", "")),
            # One begun by an older version said nothing of it, and nobody expects it.
            protect=bool(fields.get("protect", False)),
            protected=bool(fields.get("protected", False)),
            before=fields.get("before"),
            rto_ms=int(fields["rto_ms"]),
            copied=int(fields["copied"]),
            total=int(fields["total"]),
            reason=str(fields["reason"]),
            events=tuple((int(time_ns), str(what)) for time_ns, what in fields["events"]),
            vm_command=str(fields.get("vm_command", "")),
            accel=_one_of(("", "tcg", "kvm"), fields.get("accel", "")),
            attach=_one_of(("", "virtio-blk", "virtio-scsi", "nodes"), fields.get("attach", "")),
            libvirt=str(fields.get("libvirt", "")),
            domain=str(fields.get("domain", "")),
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


def _one_of(known: tuple[Any, ...], value: Any) -> Any:
    if value not in known:
        raise ValueError(f"there is no {value!r}")
    return value


def _read_disk(fields: dict[str, Any]) -> RecoveredDisk:
    return RecoveredDisk(
        disk=str(fields["disk"]),
        seq=int(fields["seq"]),
        time_ns=int(fields["time_ns"]),
        size=int(fields["size"]),
        fork=str(fields["fork"]),
        target=str(fields["target"]),
        format=_one_of(get_args(Format), fields["format"]),
        at=_one_of(get_args(Place), fields["at"]),
        made=bool(fields["made"]),
        replaces=bool(fields.get("replaces", False)),
        device=str(fields.get("device", "")),
        warning=str(fields.get("warning", "")),
        of=str(fields.get("of", "")),
        chain=bool(fields.get("chain", False)),
        base=str(fields.get("base", "")),
    )


def all_of(catalog: Catalog) -> list[Recovery]:
    """Every recovery whose row can be read, oldest first."""
    return _all_of(catalog)[0]


def unreadable(catalog: Catalog) -> list[CorruptError]:
    """What is wrong with the other rows."""
    return _all_of(catalog)[1]


def _all_of(catalog: Catalog) -> tuple[list[Recovery], list[CorruptError]]:
    found, wrong = read_each(catalog.rows("recoveries").values(), read)
    return sorted(found, key=lambda one: (one.created_ns, one.id)), wrong


def find(catalog: Catalog, which: str) -> Recovery:
    """The recovery of this id, or else the newest of this name. NotFoundError; CorruptError for the id of a damaged row."""
    if (row := catalog.rows("recoveries").get(which)) is not None:
        return read(row)
    held = all_of(catalog)
    found = [one for one in held if one.name == which]
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
    """The recovery that has its VM, its point, or the way back, on this fork. CorruptError if a damaged row names it."""
    for row in catalog.rows("recoveries").values():
        if f'"{fork}"' not in json.dumps(dict(row.fields)):
            continue
        one = read(row)
        for disk in one.disks:
            # What was streamed so far stands on the point, also when nobody goes on with it.
            needed = one.stage not in OVER or (one.mode == "stream" and disk.made and disk.at == "fork")
            if disk.fork == fork and needed:
                return one
    return None


def check_fits(one: Recovery) -> None:
    """UsageError unless its row will fit, whatever comes."""
    longest = "x" * MAX_DEVICE
    disks = tuple(replace(disk, device=longest) for disk in one.disks)
    events = tuple((one.created_ns, "connected") for _ in range(KEPT_EVENTS))
    check_row(replace(one, disks=disks, events=events, reason="x" * MAX_REASON).row())


def overwritten(catalog: Catalog) -> set[str]:
    """The VMs whose disks are being replaced: whatever runs at their monitors is not what their record speaks of."""
    return {one.overwrites for one in all_of(catalog) if one.overwrites and one.stage not in (*OVER, HOME)}
