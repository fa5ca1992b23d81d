"""Forks of VMs and groups: one for each disk, all at one instant, or none."""

import contextlib
from typing import Any

import trio

from cdpserver import groups, names
from cdpserver.errors import CdpError, RefusedError
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.vms import Vms


class Forks:
    """Makes forks of whatever has points."""

    def __init__(self, core: Core, disks: Disks) -> None:
        self._core = core
        self._disks = disks
        self._vms = Vms(core)

    async def add(self, point: str, name: str) -> dict[str, Any]:
        """A fork `name` of a disk's point; NAME/DISK of each disk of a VM, NAME-VM/DISK of a group's."""
        core = self._core
        what, when = names.parse_point(point)
        if not await core.thread(self._vms.several, what):
            return await self._disks.fork(point, name)
        names.check_name(name)
        found = await core.thread(self._vms.resolve, what, when)
        in_group = await core.thread(groups.find, core.catalog, what) is not None
        planned = [
            (placed.point, fork_name(name, placed.entry.name, in_group=in_group)) for placed in found.disks
        ]
        for _, fork in planned:
            if core.catalog.get(fork) is not None:
                raise RefusedError(f"there is a disk {fork} already", hint="choose another name")
        made: list[dict[str, Any]] = []
        try:
            for of, fork in planned:
                made.append(await self._disks.fork(of, fork))
        except BaseException:
            with trio.CancelScope(shield=True):
                for one in made:
                    with contextlib.suppress(CdpError):  # what stays is seen in `cdp fork list`
                        await self._disks.remove(one["name"], fork=True)
            raise
        return found.as_dict() | {"forks": made}


def fork_name(name: str, disk: str, *, in_group: bool) -> str:
    """What the fork of a VM's or group's disk is called."""
    short, vm = names.split_name(disk)
    if not in_group:
        return names.full_name(short, name)
    return names.check_disk_name(f"{name}-{disk}" if vm is not None else f"{name}-{short}")
