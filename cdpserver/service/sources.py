"""Running VMs that CDP does not protect, which the service backs up as their policies say: named, listed, forgotten."""

from collections.abc import Mapping
from typing import Any

import trio

from cdpserver import groups
from cdpserver.errors import NotFoundError, RefusedError
from cdpserver.retention import policies
from cdpserver.service.core import Core
from cdpserver.vm.backup import sources
from cdpserver.vm.backup.sources import MAX_SOURCES, LiveSource


class Sources:
    """The sources of a state directory."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._changing = trio.Lock()

    async def list_sources(self) -> list[dict[str, Any]]:
        """All, by name."""
        found = await self._core.thread(sources.load, self._core.state.path)
        return [_shown(one) for _, one in sorted(found.items())]

    async def add(self, vm: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """Name one, or where it is now. UsageError; RefusedError for a name that is a disk's, a protected VM's or a group's."""
        source = sources.checked(vm, said)
        async with self._changing:
            await self._core.thread(self._add, source)
        self._core.log.emit("backup.source-added", what=vm, source=str(source.connection))
        return _shown(source)

    def _add(self, source: LiveSource) -> None:
        vm, catalog = source.vm, self._core.catalog
        if any(name.partition("/")[0] == vm for name in catalog.names()) or groups.find(catalog, vm):
            raise RefusedError(
                f"{vm} has points here, or is a group",
                hint=f"its policy backs them up: cdp policy set {vm} --backup WHEN",
            )
        known = sources.load(self._core.state.path)
        if vm not in known and len(known) >= MAX_SOURCES:
            raise RefusedError(f"there are {MAX_SOURCES} sources", hint="cdp backup source remove VM")
        sources.save(self._core.state.path, known | {vm: source})

    async def remove(self, vm: str) -> dict[str, Any]:
        """Forget one, and its policy; its backups stay, and QEMU's bitmaps until it ends. NotFoundError."""
        async with self._changing:
            gone = await self._core.thread(self._remove, vm)
        self._core.log.emit("backup.source-removed", what=vm)
        return _shown(gone)

    def _remove(self, vm: str) -> LiveSource:
        known = sources.load(self._core.state.path)
        if vm not in known:
            raise NotFoundError(f"there is no source {vm}", hint="cdp backup source list")
        gone = known.pop(vm)
        sources.save(self._core.state.path, known)
        if not any(name.startswith(f"{vm}/") for name in self._core.catalog.names()):
            policies.remove(self._core.catalog, policies.vm_row(vm))
        return gone


def _shown(source: LiveSource) -> dict[str, Any]:
    return {"vm": source.vm, **source.as_dict()}
