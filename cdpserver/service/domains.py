"""The VM of a recovery as a domain of libvirt: started on its forks, defined when it is home, as before when it goes back."""

import uuid
from pathlib import Path

import trio

from cdpserver import names
from cdpserver.errors import CdpError, RefusedError
from cdpserver.service import homes
from cdpserver.service.core import Core
from cdpserver.service.launching import read_file
from cdpserver.service.recovering import fork_uri
from cdpserver.vm.launch import domain
from cdpserver.vm.launch.machine import Machine
from cdpserver.vm.launch.parts import Disk, Image, Nbd
from cdpserver.vm.record import LibvirtDomain
from cdpserver.vm.recovery import domains
from cdpserver.vm.recovery.record import RecoveredDisk, Recovery

NAMESPACE = uuid.UUID("0c1f6f4e-9c0e-4a5e-8f55-6d5f0d1d3a57")
"""Of the UUIDs of our domains: a recovery's is the same whenever it is asked for."""


def check(one: Recovery) -> None:
    """UsageError for a description that is none. For threads."""
    if one.vm_command:
        domain.read(read_file(one.vm_command, "the domain's description"))


async def check_free(one: Recovery) -> None:
    """RefusedError if a domain of this name runs already, which is not ours."""
    if one.libvirt and await domains.is_active(_at(one)):
        raise RefusedError(f"{_at(one)} runs already", hint="shut it down first, or choose another --domain")


async def launch(core: Core, one: Recovery) -> None:
    """Start it, unless it runs; its monitor listens on return. UsageError, DomainError, UnreachableError."""
    at = _at(one)
    if await domains.is_active(at):
        return
    text = await core.thread(_described, core, one)
    stem = one.id.rpartition("-")[2]
    forks = [
        (f"cdp-{stem}-{number}-nbd", fork_uri(core, disk))
        for number, disk in enumerate(one.disks)
        if disk.at == "fork"
    ]
    await domains.create(at, text, forks)
    core.log.emit("recovery.launched", recovery=one.id, command=one.vm_command, domain=str(at))


def _at(one: Recovery) -> LibvirtDomain:
    return LibvirtDomain(one.libvirt, one.domain)


def _described(core: Core, one: Recovery) -> str:
    disks = _disks(core, one)
    own = domain.describe(Machine(), disks)
    text = read_file(one.vm_command, "the domain's description") if one.vm_command else own
    return _filled(one, text, disks)


def _filled(one: Recovery, text: str, disks: list[Disk]) -> str:
    id = str(uuid.uuid5(NAMESPACE, one.id))
    return domain.fill(text, one.domain, id, disks, accel=one.accel or None, same=bool(one.overwrites))


def _disks(core: Core, one: Recovery) -> list[Disk]:
    return [Disk(names.split_name(disk.disk)[0], _source(core, disk)) for disk in one.disks]


def _source(core: Core, disk: RecoveredDisk) -> Nbd | Image:
    if disk.at == "home":
        return Image(disk.target, disk.format, homes.is_device(Path(disk.target)))
    return Nbd(fork_uri(core, disk))


async def end(one: Recovery) -> None:
    """Kill it. For a start that failed."""
    if one.libvirt:
        await domains.end(_at(one))


async def define(core: Core, one: Recovery) -> None:
    """It is home: from here on it can be started again, on what is there. DomainError, UnreachableError."""
    if not one.libvirt:
        return
    text = await domains.describe(_at(one))
    if text is None:  # it has ended meanwhile
        text = await core.thread(_described, core, one)
    disks = await core.thread(_disks, core, one)
    await domains.define(_at(one), _filled(one, text, disks))


async def settle(core: Core, one: Recovery, *, home: bool) -> None:
    """After a way home it is defined, after one back it is transient again. A libvirt that cannot do it is an event."""
    if not one.libvirt:
        return
    try:
        with trio.CancelScope(shield=True):
            if home:
                await define(core, one)
            elif (
                not one.overwrites
            ):  # what was there before is there again, under the names that the definition has
                await domains.undefine(_at(one))
    except CdpError as error:
        core.log.emit(
            "recovery.domain-stays", level="warning", recovery=one.id, domain=one.domain, reason=error.message
        )
