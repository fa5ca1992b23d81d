"""What `cdp recover start` asks for, checked, and made into the recovery that it means. Nothing is begun."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cdpserver import names
from cdpserver.errors import RefusedError, UsageError
from cdpserver.service import homes
from cdpserver.service.chosen import Chosen, choose
from cdpserver.service.core import Core
from cdpserver.service.launching import Vm
from cdpserver.vm import record as protected
from cdpserver.vm.connect import check_connection
from cdpserver.vm.launch.parts import Accel
from cdpserver.vm.recovery import record
from cdpserver.vm.recovery.attach import Attach
from cdpserver.vm.recovery.record import MAX_DISKS, Format, Mode, RecoveredDisk, Recovery
from cdpserver.vm.recovery.states import ACTIVE, BEGIN, OVER


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for; paths are absolute. `targets` names places by disk, `to` that of all others."""

    point: str
    qmp: str | None = None
    to: str | None = None
    targets: Mapping[str, str] = field(default_factory=dict)
    mode: Mode = "mirror"
    name: str | None = None
    format: Format | None = None
    shape: Literal["image", "chain"] = "image"
    base: str | None = None
    overwrite: bool = False
    protect: bool = True
    force: bool = False
    vm_command: str | None = None
    libvirt: str | None = None
    domain: str | None = None
    accel: str | None = None
    attach: Attach | None = None
    isolated: bool = False


def check_isolated(asked: Request) -> None:
    """UsageError for what an isolated look has no use for."""
    given = {
        "--to": asked.to or asked.targets,
        "--qmp": asked.qmp,
        "--attach": asked.attach,
        "--libvirt": asked.libvirt,
        "--name": asked.name,
        "--mode stream": asked.mode != "mirror",
        "--as chain": asked.shape != "image",
        "--base": asked.base,
        "--format": asked.format,
        "--overwrite": asked.overwrite,
    }
    if wrong := [option for option, value in given.items() if value]:
        raise UsageError(
            f"an isolated VM has no {', '.join(wrong)}: nothing of it stays",
            hint="leave that away, or start a recovery that stays: without --isolated",
        )


def plan(core: Core, asked: Request, accel: Accel | None = None) -> Recovery:
    """The recovery. UsageError, NotFoundError, RefusedError for what cannot be."""
    _check_who_starts(asked)
    held = record.all_of(core.catalog)
    id = record.new_id(other.id for other in held)
    name = names.check_name(asked.name) if asked.name is not None else id
    chosen = choose(core, asked.point, force=asked.force, most=MAX_DISKS)
    overwrites = _overwritten(core, chosen) if asked.overwrite else ""
    before = protected.find(core.catalog, overwrites) if overwrites else None
    qmp = asked.qmp or ("" if asked.libvirt else str(Vm(core, id).places.qmp))
    disks = tuple(_disk(core, disk, name, asked) for disk in chosen)
    _check_disks(core, disks, asked, held)
    now_ns = core.clock.now_ns()
    one = Recovery(
        id,
        name,
        asked.point,
        qmp,
        disks,
        BEGIN,
        now_ns,
        mode=asked.mode,
        overwrites=overwrites,
        protect=asked.protect,
        before=None if before is None else protected.row(before).fields,
        vm_command=asked.vm_command or "",
        accel=accel or "",
        attach=asked.attach or "",
        libvirt=asked.libvirt or "",
        domain=(asked.domain or name) if asked.libvirt else "",
    ).noted("started", now_ns=now_ns)
    _check_monitor(core, one.connection, held, overwrites)
    record.check_fits(one)
    return one


def _check_who_starts(asked: Request) -> None:
    if (asked.qmp is None) == (asked.vm_command is None and asked.libvirt is None):
        raise UsageError(
            "either you start the VM, or the service does",
            hint="name its monitor with --qmp PATH, or its command with --vm-command FILE, or --libvirt URI",
        )
    if asked.attach is not None and asked.qmp is None:
        raise UsageError(
            "--attach goes with --qmp", hint="name the monitor of the QEMU that is to have the disks"
        )
    if asked.domain is not None and asked.libvirt is None:
        raise UsageError("--domain goes with --libvirt", hint="leave it away")
    if asked.libvirt is not None and asked.mode != "mirror":
        # libvirt would open what the files stand on by itself, and nothing could give that a reconnect delay.
        raise UsageError("a domain of libvirt is mirrored home, not streamed", hint="leave --mode away")


def _check_monitor(core: Core, at: protected.Connection, held: list[Recovery], overwrites: str) -> None:
    check_connection(at)
    for other in held:
        if other.connection == at and other.stage in ACTIVE:
            raise RefusedError(
                f"{other.id} uses the monitor {at}", hint=f"wait for it: cdp recover show {other.id}"
            )
    for vm in protected.all_of(core.catalog):
        if vm.connection == at and vm.name != overwrites:
            raise RefusedError(
                f"{at} is the monitor of {vm.name}, which is protected",
                hint="give the recovered VM a monitor of its own, or replace that VM: --overwrite",
            )


def _overwritten(core: Core, chosen: list[Chosen]) -> str:
    """The VM whose disks are replaced. RefusedError unless these are all of them."""
    short, vm = names.split_name(chosen[0].name)
    for disk in chosen:
        core.entry(disk.name)
    if vm is None:
        return short
    others = {name for name in core.catalog.names() if name.startswith(f"{vm}/")}
    if left := others - {disk.name for disk in chosen}:
        raise RefusedError(
            f"{vm} also has {', '.join(sorted(left)[:5])}, which would stay as they are",
            hint=f"replace all disks at one instant: {vm}@WHEN, or recover this one beside it",
        )
    return vm


def _disk(core: Core, chosen: Chosen, name: str, asked: Request) -> RecoveredDisk:
    short = chosen.short_name
    target, format = homes.choose(core, _place(asked, short), short, asked.format)
    if asked.mode == "stream" and format != "qcow2":
        raise UsageError(
            f"{target} would be raw, and a raw image cannot be filled while a VM writes to it",
            hint="add --format qcow2, or --mode mirror",
        )
    _check_shape(asked, target, format)
    chain = asked.shape == "chain"
    return RecoveredDisk(
        disk=chosen.entry.name,
        seq=chosen.seq,
        time_ns=chosen.time_ns,
        size=chosen.size,
        fork=names.full_name(short, name),
        target=target,
        format=format,
        warning=chosen.warning,
        of=chosen.of,
        chain=chain,
        base=homes.choose_base(core, chosen, asked.base) if chain else "",
        replaces=homes.check(target, size=chosen.size, overwrite=asked.overwrite, force=asked.force),
    )


def _check_shape(asked: Request, target: str, format: Format) -> None:
    if asked.shape == "image":
        if asked.base is not None:
            raise UsageError("a base image is for a chain", hint="add --as chain, or leave --base away")
        return
    if format != "qcow2":
        raise UsageError(f"{target} would be raw, and a chain is QCOW2", hint="add --format qcow2")
    if homes.is_device(Path(target)):
        raise UsageError(
            f"{target} is a block device, and a chain is files", hint="name a directory: --to DIR"
        )


def _place(asked: Request, disk: str) -> str:
    found = asked.targets.get(disk, asked.to)
    if found is None:
        raise UsageError(f"nothing says where {disk} goes", hint=f"add --to {disk}=PATH, or --to DIR")
    return found


def _check_disks(core: Core, disks: tuple[RecoveredDisk, ...], asked: Request, held: list[Recovery]) -> None:
    if unknown := set(asked.targets) - {names.split_name(disk.disk)[0] for disk in disks}:
        raise UsageError(
            f"there is no disk {', '.join(sorted(unknown))} to place", hint="cdp disk list shows the names"
        )
    taken = {disk.target: other.id for other in held for disk in other.disks if other.stage not in OVER}
    forks = {disk.fork: other.id for other in held for disk in other.disks}
    bases = {os.path.realpath(disk.base) for disk in disks if disk.base}
    for disk in disks:
        if core.catalog.get(disk.fork) is not None:
            raise RefusedError(
                f"there is a disk {disk.fork} already",
                hint=_rather_look(forks.get(disk.fork, ""), "choose another --name"),
            )
        if disk.chain and Path(disk.point_image).exists():
            raise RefusedError(f"there is {disk.point_image} already", hint="name another place")
        if disk.target in taken:
            other = taken[disk.target]
            raise RefusedError(
                f"{disk.target} is taken by {other or 'another disk of this recovery'}",
                hint=_rather_look(other, "name another place"),
            )
        if os.path.realpath(disk.target) in bases:
            raise UsageError(
                f"{disk.target} cannot be a base image and what is written", hint="name another place"
            )
        taken[disk.target] = ""


def _rather_look(other: str, hint: str) -> str:
    """What to do: maybe this was asked before, and is under way."""
    return f"look at {other}: cdp recover show {other}; else {hint}" if other else hint
