"""What an operator says of groups: which VMs and disks are cut at one instant."""

from dataclasses import replace
from typing import Any

import trio

from cdpserver import groups, names
from cdpserver.errors import CdpError, NotFoundError, RefusedError, UsageError
from cdpserver.groups import MAX_MEMBERS, Group
from cdpserver.service.core import Core
from cdpserver.vm import instant


class Groups:
    """The groups of a state directory."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._changing = trio.Lock()

    async def add(self, name: str, members: list[str]) -> dict[str, Any]:
        """Make a group, or add members to it; durable on return. RefusedError if the name is taken."""
        names.check_name(name)
        if not members:
            raise UsageError(
                "a group has members", hint=f"name VMs or disks: cdp group add {name} web db/vda"
            )
        async with self._changing:
            made = await self._core.thread(self._add, name, members)
        self._core.log.emit("group.added", group=name, members=list(made.members))
        return await self.show(name)

    def _add(self, name: str, members: list[str]) -> Group:
        core = self._core
        for member in members:
            names.check_disk_name(member)
            if groups.find(core.catalog, member) is not None:
                raise UsageError(f"{member} is a group", hint="name the VMs and disks themselves")
            if core.catalog.get(member) is None:
                instant.disks_of(core.state, core.catalog, member)  # or NotFoundError
        old = groups.find(core.catalog, name) or Group(name, (), core.clock.now_ns())
        made = replace(old, members=tuple(sorted({*old.members, *members})))
        if len(made.members) > MAX_MEMBERS:
            raise RefusedError(
                f"{name} would have {len(made.members)} members, and {MAX_MEMBERS} are the most",
                hint="make several groups",
            )
        core.catalog.put_row("groups", groups.row(made))
        return made

    async def remove(self, name: str, members: list[str]) -> dict[str, Any]:
        """Take members out, or the whole group away; what it was before. NotFoundError."""
        async with self._changing:
            before = await self.show(name)
            await self._core.thread(self._remove, name, members)
        self._core.log.emit("group.removed", group=name, members=members or before["members"])
        return before

    def _remove(self, name: str, members: list[str]) -> None:
        old = self._find(name)
        unknown = sorted({*members} - {*old.members})
        if unknown:
            raise NotFoundError(
                f"{unknown[0]} is no member of {name}", hint=f"its members: {', '.join(old.members)}"
            )
        left = tuple(member for member in old.members if member not in members)
        if members and left:
            self._core.catalog.put_row("groups", groups.row(replace(old, members=left)))
        else:
            self._core.catalog.delete_row("groups", groups.row_id(name))

    def _find(self, name: str) -> Group:
        found = groups.find(self._core.catalog, names.check_name(name))
        if found is None:
            raise NotFoundError(f"there is no group {name}", hint="list them: cdp group list")
        return found

    async def show(self, name: str) -> dict[str, Any]:
        """One group, and the disks that it means now. NotFoundError."""
        return await self._core.thread(lambda: self._shown(self._find(name)))

    async def list_groups(self) -> list[dict[str, Any]]:
        """Every group, by name."""
        return await self._core.thread(
            lambda: [self._shown(group) for group in groups.all_of(self._core.catalog)]
        )

    def _shown(self, group: Group) -> dict[str, Any]:
        try:
            entries = instant.disks_of(self._core.state, self._core.catalog, group.name)
        except CdpError as error:
            return group.as_dict() | {"disks": [], "problem": str(error)}
        return group.as_dict() | {"disks": [entry.name for entry in entries], "problem": None}
