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


class Locks:
    """The locks of a state directory."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._changing = trio.Lock()

    async def add(
        self, point: str, *, until: str | None, reason: str | None, immutable: bool
    ) -> dict[str, Any]:
        """Lock `DISK@WHEN`, durable on return; a point that is locked already gets the new terms."""
        core = self._core
        disk, when = names.parse_point(point)
        until_ns = None if until is None else locks.parse_until(until, now_ns=core.clock.now_ns())
        if immutable and until_ns is None:
            raise UsageError(
                "an immutable lock needs an end, since nobody could take it back",
                hint="add --until with a time, or with how long from now: 30d",
            )
        locks.check_reason(reason or "")
        entry = core.entry(disk)
        await core.thread(self._check_quota)
        position, _ = await core.thread(core.resolve, entry, when)
        await core.make_durable(entry, position.seq)
        async with self._changing:
            made = await core.thread(self._put, entry, position.seq, until_ns, reason, immutable)
        core.log.emit(
            "lock.set",
            disk=disk,
            lock=made.id,
            seq=made.seq,
            until_ns=made.until_ns,
            immutable=made.immutable,
        )
        return locks.describe(made, disk, now_ns=core.clock.now_ns())

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
        """Take a lock back, by its id or by `DISK@WHEN`. RefusedError for an immutable one before its time."""
        core = self._core
        async with self._changing:
            lock = await core.thread(self._find, which)
            locks.check_removable(lock, now_ns=core.clock.now_ns())
            await core.thread(core.catalog.delete_row, "locks", lock.id)
        disk = await core.thread(self._disk, lock)
        core.log.emit("lock.removed", disk=disk, lock=lock.id, seq=lock.seq)
        return locks.describe(lock, disk, now_ns=core.clock.now_ns())

    def _find(self, which: str) -> Lock:
        held = locks.all_locks(self._core.catalog)
        if "@" not in which:
            return locks.find(held, which)
        disk, when = names.parse_point(which)
        entry = self._core.entry(disk)
        position, _ = self._core.resolve(entry, when)
        found = [lock for lock in held if (lock.timeline, lock.seq) == (entry.id, position.seq)]
        if not found:
            raise NotFoundError(
                f"{disk}@seq:{position.seq} is not locked", hint=f"list them: cdp point locks {disk}"
            )
        return found[0]

    def _disk(self, lock: Lock) -> str:
        entry = self._core.catalog.by_id(lock.timeline)
        return lock.timeline if entry is None else entry.name

    async def list_locks(self, disk: str | None) -> list[dict[str, Any]]:
        """Every lock, or those of one disk, oldest first."""
        return await self._core.thread(self._list, disk)

    def _list(self, disk: str | None) -> list[dict[str, Any]]:
        core = self._core
        id = None if disk is None else core.entry(disk).id
        now_ns = core.clock.now_ns()
        return [
            locks.describe(lock, self._disk(lock), now_ns=now_ns)
            for lock in locks.all_locks(core.catalog)
            if id is None or lock.timeline == id
        ]
