"""When base points are cut, and that every cut becomes a file: on demand, at *synced*, and every `bp_every`.

A cut is a record, made by the target in microseconds; its file is written afterwards by a process of its own, in order for each
disk, and again after a pause when that fails. Views use the older interval meanwhile.
"""

from dataclasses import dataclass
from typing import Any

import trio

from cdpserver import basepoint
from cdpserver.catalog import Entry
from cdpserver.errors import BrokenError, CdpError, CorruptError
from cdpserver.service.core import Core
from cdpserver.service.merges import Merges
from cdpserver.service.room import Room

PUBLISHERS = 2
"""Base points written at once: each keeps a processor and the store's disk busy."""

ATTEMPTS = 3
"""How often a request's own base point is tried; the export may just be restarting."""

ATTEMPT_PAUSE_S = 1.0

LOOK_S = 1.0
"""How often the scheduler looks which disk is due; a look at one that is not costs nothing."""

SECOND_NS = 1_000_000_000
FIRST_RETRY_NS = 30 * SECOND_NS
LONGEST_RETRY_NS = 1200 * SECOND_NS


@dataclass
class Schedule:
    """When a disk is looked at next (on the server's clock), and how often publishing failed in a row."""

    due_ns: int = 0
    failures: int = 0
    retry_at_ns: int = 0
    busy: bool = False


class BasePoints:
    """The base points of every disk and fork."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.merges = Merges(core)
        self._room = Room(core, self.merges)
        self._publishing: dict[str, trio.Lock] = {}
        self._publishers = trio.CapacityLimiter(PUBLISHERS)
        self._schedules: dict[str, Schedule] = {}
        self._changes = 0

    # -- on demand -------------------------------------------------------------------------------------------

    async def list_published(self, name: str) -> list[dict[str, Any]]:
        """The published base points of a disk, oldest first."""
        return await self._core.thread(self._list, self._core.entry(name))

    def _list(self, entry: Entry) -> list[dict[str, Any]]:
        with self._core.history(entry) as history:
            return basepoint.list_base_points(history)

    async def cut(self, name: str) -> dict[str, Any]:
        """Cut a base point; its file is published on return. RefusedError if the chain is as long as it may be."""
        entry = self._core.entry(name)
        await self._core.thread(self._check_ground, entry)
        await self._room.check(entry)
        number = await self._cut(entry)
        await self._room.asked_for(entry, number)
        await self._publish(entry, upto=number)
        return next(found for found in await self.list_published(name) if found["number"] == number)

    def _check_ground(self, entry: Entry) -> None:
        with self._core.history(entry) as history:
            basepoint.check_ground(history)

    async def rebuild(self, name: str, number: int) -> dict[str, Any]:
        """Make the file of a damaged or lost base point anew from the journal."""
        entry = self._core.entry(name)
        arguments = ["--state-dir", str(self._core.state.path), "--timeline", entry.id]
        async with self._publishing.setdefault(entry.id, trio.Lock()), self._publishers:
            made: dict[str, Any] = await self._core.job(
                f"basepoint-{entry.id}", "cdpserver.basepoint", *arguments, "--number", str(number), "--again"
            )
        self._core.log.emit("basepoint.rebuilt", disk=name, number=number)
        return made

    async def synced(self, name: str, session: int | None, *, write_blocking: bool) -> dict[str, Any]:
        """The first copy or a resync is complete. The first time, base point 0 is published on return."""
        entry = self._core.entry(name)
        said: dict[str, Any] = await self._core.targets.call(
            entry.id,
            "synced",
            disk=name,
            session=session,
            write_blocking=write_blocking,
            observed={"by": "operator", "ago_ns": 0},
        )
        await self.begin(name)
        return said

    async def begin(self, name: str) -> None:
        """Base point 0 of a disk that has a history; published on return."""
        entry = self._core.entry(name)
        if not await self._core.thread(self._list, entry):
            if not await self._core.thread(self._pending, entry):
                await self._cut(entry)
            await self._publish(entry, upto=0)

    async def _cut(self, entry: Entry) -> int:
        number, seq, _ = await self._core.targets.call(entry.id, "cut", disk=entry.name)
        self._core.log.emit("basepoint.cut", disk=entry.name, number=number, seq=seq)
        return int(number)

    def _pending(self, entry: Entry) -> list[int]:
        with self._core.history(entry) as history:
            return [cut.number for cut in basepoint.pending(history)]

    # -- publishing ------------------------------------------------------------------------------------------

    async def _publish(self, entry: Entry, *, upto: int) -> None:
        """Publish what is pending up to a number, with a few attempts. Raises why the last one failed."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._publish_pending(entry, upto=upto)
                return
            except (BrokenError, CorruptError):
                if attempt == ATTEMPTS:
                    raise
            await trio.sleep(ATTEMPT_PAUSE_S)

    async def _publish_pending(self, entry: Entry, *, upto: int | None = None) -> None:
        async with self._publishing.setdefault(entry.id, trio.Lock()), self._publishers:
            for number in await self._core.thread(self._pending, entry):
                if upto is None or number <= upto:
                    await self._room.make(entry, number)
                    await self._publish_one(entry, number)

    async def _publish_one(self, entry: Entry, number: int) -> None:
        core = self._core
        started = trio.current_time()
        arguments = ["--state-dir", str(core.state.path), "--timeline", entry.id, "--number", str(number)]
        try:
            await core.job(f"basepoint-{entry.id}", "cdpserver.basepoint", *arguments)
        except CdpError as error:
            core.log.emit(
                "basepoint.failed", level="error", disk=entry.name, number=number, reason=str(error)
            )
            self._schedule(entry).due_ns = core.clock.now_ns() + FIRST_RETRY_NS
            raise
        except BaseException:
            # Cancelled: its process is gone; the cut is a record, and so is published all the same, later.
            basepoint.drop_unfinished(core.state.timeline(entry.id), number)
            schedule = self._schedule(entry)
            schedule.due_ns = schedule.retry_at_ns = core.clock.now_ns() + FIRST_RETRY_NS
            raise
        seconds = round(trio.current_time() - started, 3)
        core.log.emit("basepoint.published", disk=entry.name, number=number, seconds=seconds)

    # -- the scheduler ---------------------------------------------------------------------------------------

    async def keep_cutting(self) -> None:
        """Cut every disk that changed every `bp_every`, and publish what is still to be published; for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                entries = await self._core.thread(self._core.catalog.names)
                now_ns = self._core.clock.now_ns()
                for entry in entries.values():
                    schedule = self._schedule(entry)
                    if entry.state == "live" and not schedule.busy and now_ns >= schedule.due_ns:
                        schedule.busy = True
                        nursery.start_soon(self._look, entry, schedule)
                self._forget({entry.id for entry in entries.values()})
                await trio.sleep(LOOK_S)

    def _schedule(self, entry: Entry) -> Schedule:
        return self._schedules.setdefault(entry.id, Schedule())

    def look_again(self) -> None:
        """Policies have changed: what was put off for a whole interval is due by the new one."""
        self._changes += 1
        for schedule in self._schedules.values():
            schedule.due_ns = schedule.retry_at_ns

    def _forget(self, ids: set[str]) -> None:
        for id in self._schedules.keys() - ids:
            del self._schedules[id]
            self._publishing.pop(id, None)

    async def _look(self, entry: Entry, schedule: Schedule) -> None:
        changes = self._changes
        try:
            every_ns = (await self._core.thread(self._core.policy, entry)).bp_every_ns
            due_ns, changed, pending = await self._core.thread(self._state_of, entry, every_ns)
            now_ns = self._core.clock.now_ns()
            # A disk at rest is looked at again soon after it is written to, not a whole interval later.
            if changes == self._changes:
                schedule.due_ns = max(due_ns, now_ns + max(SECOND_NS, every_ns // 20))
            if changed and now_ns >= due_ns:
                await self._cut(entry)
                pending = True
            if pending and now_ns >= schedule.retry_at_ns:
                await self._publish_pending(entry)
                schedule.failures = 0
        except (CdpError, OSError) as error:
            schedule.failures += 1
            pause_ns = min(FIRST_RETRY_NS << min(schedule.failures - 1, 10), LONGEST_RETRY_NS)
            schedule.due_ns = schedule.retry_at_ns = self._core.clock.now_ns() + pause_ns
            self._core.log.emit(
                "basepoint.put-off",
                level="warning",
                disk=entry.name,
                reason=str(error),
                retry_in_s=pause_ns // SECOND_NS,
            )
        finally:
            schedule.busy = False

    def _state_of(self, entry: Entry, every_ns: int) -> tuple[int, bool, bool]:
        """(when the next cut is due, has anything changed since the last one, are files missing)."""
        now_ns = self._core.clock.now_ns()

        def look() -> tuple[int, bool, bool]:
            if history.journal.empty or basepoint.stands_on_backup(history):
                return now_ns + SECOND_NS, False, False
            cuts = basepoint.all_cuts(history)
            last_ns = cuts[-1].time_ns if cuts else history.journal.first().time_ns
            due_ns = last_ns + every_ns
            changed = now_ns >= due_ns and basepoint.changed_since_cut(history)
            return due_ns, changed, bool(basepoint.pending(history))

        with self._core.history(entry) as history:
            return history.journal.settled(look)
