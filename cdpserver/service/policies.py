"""What an operator says of policies: of a disk, or of a VM for all its disks. It holds from the next look on."""

from collections.abc import Callable, Mapping
from typing import Any

import trio

from cdpserver import groups, names
from cdpserver.catalog import Entry
from cdpserver.errors import CdpError, NotFoundError, UsageError
from cdpserver.retention import policies
from cdpserver.retention.facts import gather
from cdpserver.retention.plan import fixed_bytes
from cdpserver.retention.policy import FIELDS, SHORTEN, Effective, Policy, check_cap, combine, parse_values
from cdpserver.service.core import Core
from cdpserver.vm.backup import sources

OF_VMS = ("mark_every", "freeze")
"""Values that all disks of a VM have in common."""


OF_SOURCES = ("backup", "backup_to", "backup_copy")
"""Values of a VM that has no points here."""


class Policies:
    """The policies of a state directory. `changed` is told when one has changed."""

    def __init__(self, core: Core, changed: Callable[[], None]) -> None:
        self._core = core
        self._changed = changed
        self._changing = trio.Lock()

    async def show(self, name: str) -> dict[str, Any]:
        """The policy of a disk as it works, or what a VM gives its disks."""
        return await self._core.thread(self._show, name)

    def _show(self, name: str) -> dict[str, Any]:
        found = self._disks(name)
        catalog, config = self._core.catalog, self._core.config
        if found and found[0].name == name:
            shown = policies.effective(catalog, config, found[0])
        else:
            shown = policies.of_vm(catalog.rows("policies"), config, name)
        problem = shown.problem
        return {
            "name": name,
            **{field.name: field.write(shown.policy) for field in FIELDS},
            "sources": {field.name: shown.sources.get(field.name, "default") for field in FIELDS},
            "problem": None if problem is None else str(problem),
        }

    def _disks(self, name: str) -> list[Entry]:
        """The disk of this name, or the disks of the VM of this name, none of one that is only backed up. NotFoundError."""
        names.check_disk_name(name)
        entries = self._core.catalog.names()
        if name in entries:
            return [self._core.entry(name)]
        found = [entry for other, entry in entries.items() if other.startswith(f"{name}/")]
        if groups.find(self._core.catalog, name) is not None:
            raise UsageError(f"{name} is a group, which has no policy", hint="set those of its VMs and disks")
        if not found and name not in sources.load(self._core.state.path):
            raise NotFoundError(f"there is no disk or VM {name}", hint="list the disks: cdp disk list")
        return found

    async def set(self, name: str, given: Mapping[str, str]) -> dict[str, Any]:
        """Change values of a disk's or VM's policy, durable on return. UsageError for what contradicts the rest."""
        if not given:
            raise UsageError("nothing to set", hint="name a value: cdp policy set --help")
        async with self._changing:
            await self._core.thread(self._set, name, given)
        self._core.log.emit("policy.set", disk=name, values=dict(given))
        self._changed()
        return await self.show(name)

    def _set(self, name: str, given: Mapping[str, str]) -> None:
        parse_values(given)
        if "/" in name and not given.keys().isdisjoint(OF_VMS):
            raise UsageError(
                f"{name} is marked with its VM",
                hint=f"cdp policy set {name.partition('/')[0]} --mark-every 1h",
            )
        id, about, disks = self._row_of(name)
        catalog = self._core.catalog
        texts = {**policies.texts_of(catalog.row("policies", id)), **given}
        row = policies.row(id, about, texts)
        # What does not go together is refused before it is kept, for the first disk that it would hold for.
        if not disks:
            self._check_source(name, policies.of_vm({id: row}, self._core.config, name), given)
        for entry in disks:
            rows = catalog.rows("policies") | {id: row}
            found = combine(policies.layers(rows, self._core.config, entry))
            if found.problem is not None:
                raise UsageError(f"{entry.name}: {found.problem.message}", hint=found.problem.hint)
            if "size_cap" in given and found.policy.at_cap == SHORTEN:
                self._check_cap(entry, found.policy)
        policies.put(catalog, row)

    def _check_source(self, name: str, found: Effective, given: Mapping[str, str]) -> None:
        if not given.keys() <= set(OF_SOURCES):
            raise UsageError(
                f"{name} has no points here, so only its backups have a policy",
                hint=f"cdp policy set {name} --backup 'daily 02:00 keep 7d' --backup-to PATH",
            )
        if found.problem is not None:
            raise found.problem

    def _check_cap(self, entry: Entry, policy: Policy) -> None:
        core = self._core
        try:
            facts = gather(core.state, core.catalog, core.config, entry, now_ns=core.clock.now_ns())
        except (CdpError, OSError):
            return  # nothing of it is shortened as long as it cannot be read
        check_cap(policy, fixed_bytes=fixed_bytes(facts))

    def _row_of(self, name: str) -> tuple[str, dict[str, str], list[Entry]]:
        """(id of the row, what it is about, the disks that it holds for)."""
        disks = self._disks(name)
        if disks and disks[0].name == name:
            return policies.disk_row(disks[0].id), {"disk": disks[0].id}, disks
        return policies.vm_row(name), {"vm": name}, disks

    async def clear(self, name: str) -> dict[str, Any]:
        """Take back everything that was said of a disk or VM itself."""
        async with self._changing:
            await self._core.thread(self._clear, name)
        self._core.log.emit("policy.cleared", disk=name)
        self._changed()
        return await self.show(name)

    def _clear(self, name: str) -> None:
        id, _, disks = self._row_of(name)
        catalog = self._core.catalog
        for entry in disks:
            rows = {key: row for key, row in catalog.rows("policies").items() if key != id}
            problem = combine(policies.layers(rows, self._core.config, entry)).problem
            if problem is not None:
                raise UsageError(
                    f"{entry.name}: what is left contradicts itself: {problem.message}",
                    hint=f"cdp policy show {entry.name}",
                )
        policies.remove(catalog, id)
