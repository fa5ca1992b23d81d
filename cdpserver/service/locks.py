"""Locks on points, as an operator takes and gives them back.

Invariants: a lock's point exists, and is durable, before the lock is; nothing is dropped between the look and the lock's row.
"""

from typing import Any

import trio

from cdpserver import locks, names
from cdpserver.catalog import Entry
from cdpserver.chain.lock import stays
from cdpserver.errors import CdpError, NotFoundError, UsageError
from cdpserver.locks import Lock
from cdpserver.names import Seq
from cdpserver.retention.facts import gather_all
from cdpserver.retention.plan import locked_bytes
from cdpserver.retention.quota import check_quota, quota_bytes
from cdpserver.service.core import Core
from cdpserver.service.vms import Vms
from cdpserver.vm.instant import Instant


class Locks:
    """The locks of a state directory."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._vms = Vms(core)
        self._changing = trio.Lock()

    async def add(
        self, point: str, *, until: str | None, reason: str | None, immutable: bool
    ) -> dict[str, Any]:
        """Lock `DISK@WHEN`, durable on return; a point that is locked already gets the new terms.

        Of a VM or group all disks are locked at the one instant, or none is.
        """
        core = self._core
        disk, when = names.parse_point(point)
        until_ns = None if until is None else locks.parse_until(until, now_ns=core.clock.now_ns())
        if immutable and until_ns is None:
            raise UsageError(
                "an immutable lock needs an end, since nobody could take it back",
                hint="add --until with a time, or with how long from now: 30d",
            )
        locks.check_reason(reason or "")
        several = await core.thread(self._vms.several, disk)
        entry = None if several else core.entry(disk)
        await core.thread(self._check_quota)
        if entry is None:
            found = await core.thread(self._vms.resolve, disk, when)
            places = [(placed.entry, placed.seq) for placed in found.disks]
        else:
            position, _ = await core.thread(core.resolve, entry, when)
            places = [(entry, position.seq)]
        for one, seq in places:
            await core.make_durable(one, seq)
        async with self._changing:
            made = await core.thread(self._put_all, places, until_ns, reason, immutable)
        shown = [self._set(one, lock) for (one, _), lock in zip(places, made, strict=True)]
        return found.as_dict() | {"locks": shown} if several else shown[0]

    def _set(self, entry: Entry, made: Lock) -> dict[str, Any]:
        self._core.log.emit(
            "lock.set",
            disk=entry.name,
            lock=made.id,
            seq=made.seq,
            until_ns=made.until_ns,
            immutable=made.immutable,
        )
        return locks.describe(made, entry.name, now_ns=self._core.clock.now_ns())

    def _put_all(
        self, places: list[tuple[Entry, int]], until_ns: int | None, reason: str | None, immutable: bool
    ) -> list[Lock]:
        """All of them, or none."""
        before = self._core.catalog.rows("locks")
        made: list[Lock] = []
        try:
            for entry, seq in places:
                made.append(self._put(entry, seq, until_ns, reason, immutable))
        except CdpError:
            for lock in made:
                if lock.id in before:
                    self._core.catalog.put_row("locks", before[lock.id])
                else:
                    self._core.catalog.delete_row("locks", lock.id)
            raise
        return made

    def _check_quota(self) -> None:
        core = self._core
        found, _ = gather_all(core.state, core.catalog, core.config, now_ns=core.clock.now_ns())
        check_quota(map(locked_bytes, found), quota_bytes(core.state, core.config))

    def _put(self, entry: Entry, seq: int, until_ns: int | None, reason: str | None, immutable: bool) -> Lock:
        core, now_ns = self._core, self._core.clock.now_ns()
        with stays(core.state.timeline(entry.id)):
            position, _ = core.resolve(entry, Seq(seq))
            held = locks.all_locks(core.catalog)
            old = next((lock for lock in held if (lock.timeline, lock.seq) == (entry.id, seq)), None)
            if old is not None and old.holds(now_ns):
                made = locks.renew(old, until_ns=until_ns, immutable=immutable, reason=reason, now_ns=now_ns)
            else:
                id = locks.new_id(lock.id for lock in held)
                made = Lock(id, entry.id, seq, position.time_ns, until_ns, immutable, reason or "", now_ns)
                if old is not None:
                    core.catalog.delete_row("locks", old.id)
            core.catalog.put_row("locks", made.row())
            self._still_there(entry, made)
        return made

    def _still_there(self, entry: Entry, made: Lock) -> None:
        """A removal that began meanwhile did not see the lock: then there is none. It looks for locks after it says so."""
        try:
            self._core.entry(entry.name)
        except CdpError:
            self._core.catalog.delete_row("locks", made.id)
            raise

    async def remove(self, which: str) -> dict[str, Any]:
        """Take a lock back, by its id or by `DISK@WHEN`; of a VM or group those of all disks.

        RefusedError for an immutable one before its time: then none is taken back.
        """
        core = self._core
        async with self._changing:
            found, at = await core.thread(self._find, which)
            for lock in found:
                locks.check_removable(lock, now_ns=core.clock.now_ns())
            for lock in found:
                await core.thread(core.catalog.delete_row, "locks", lock.id)
        shown = []
        for lock in found:
            disk = await core.thread(self._disk, lock)
            core.log.emit("lock.removed", disk=disk, lock=lock.id, seq=lock.seq)
            shown.append(locks.describe(lock, disk, now_ns=core.clock.now_ns()))
        return shown[0] if at is None else at.as_dict() | {"locks": shown}

    def _find(self, which: str) -> tuple[list[Lock], Instant | None]:
        """The locks that are meant, and the instant of a VM or group that they hold."""
        held = locks.all_locks(self._core.catalog)
        if "@" not in which:
            return [locks.find(held, which)], None
        name, when = names.parse_point(which)
        at = self._vms.resolve(name, when) if self._vms.several(name) else None
        if at is not None:
            places = {(disk.entry.id, disk.seq) for disk in at.disks}
        else:
            entry = self._core.entry(name)
            places = {(entry.id, self._core.resolve(entry, when)[0].seq)}
        found = [lock for lock in held if (lock.timeline, lock.seq) in places]
        if not found:
            raise NotFoundError(f"{which} is not locked", hint=f"list them: cdp point locks {name}")
        return found, at

    def _disk(self, lock: Lock) -> str:
        entry = self._core.catalog.by_id(lock.timeline)
        return lock.timeline if entry is None else entry.name

    async def list_locks(self, disk: str | None) -> list[dict[str, Any]]:
        """Every lock, or those of one disk, VM or group, oldest first."""
        return await self._core.thread(self._list, disk)

    def _list(self, disk: str | None) -> list[dict[str, Any]]:
        core = self._core
        ids = None
        if disk is not None:
            ids = {e.id for e in (self._vms.disks(disk) if self._vms.several(disk) else [core.entry(disk)])}
        now_ns = core.clock.now_ns()
        return [
            locks.describe(lock, self._disk(lock), now_ns=now_ns)
            for lock in locks.all_locks(core.catalog)
            if ids is None or lock.timeline in ids
        ]
