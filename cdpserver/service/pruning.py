"""Pruning: passes over all disks in a process of its own, by the clock and when somebody asks."""

from typing import Any

import trio

from cdpserver import groups, locks
from cdpserver.config import Settings
from cdpserver.errors import CdpError, RefusedError
from cdpserver.names import format_bytes
from cdpserver.retention.policy import REFUSE
from cdpserver.retention.quota import WARNING_PERCENT, quota_bytes
from cdpserver.service.core import Core
from cdpserver.service.warned import Rising
from cdpserver.vm import instant

LOOK_S = 60.0
"""How often the service looks whether a pass is due."""

LONGEST = 10
"""Looks after which there is a pass though nothing has changed: history grows old by itself."""

LEVELS = (95, 90, 80)
"""Percent of a cap at which a warning is said, each once on the way up."""


class Pruning:
    """The passes of a service; one at a time."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._one = trio.Lock()
        self._fullness = Rising(LEVELS, fall=5)
        self._failed: dict[str, str] = {}
        self._full: dict[str, str] = {}
        self._locks_near = False
        self._near_refusal = False
        """A disk that refuses writes at its cap is near it, so it is looked at each time."""

    async def run(self, disk: str | None, *, dry_run: bool) -> list[dict[str, Any]]:
        """What a pass dropped, or would drop; of a VM or group that of each of its disks.

        Raises why a disk that was named could not be looked at.
        """
        core = self._core
        if disk is not None and await core.thread(groups.is_several, core.catalog, disk):
            entries = await core.thread(instant.disks_of, core.state, core.catalog, disk)
            return [gone for one in entries for gone in await self.run(one.name, dry_run=dry_run)]
        done = await self._pass(disk, dry_run=dry_run)
        if disk is not None and disk in done["failed"]:
            raise RefusedError(
                f"{disk} was left alone: {done['failed'][disk]}", hint="mend that, then: cdp prune"
            )
        dropped: list[dict[str, Any]] = done["dropped"]
        return dropped

    async def _pass(self, disk: str | None, *, dry_run: bool) -> dict[str, Any]:
        core = self._core
        arguments = ["--state-dir", str(core.state.path), "--config-text", Settings(core.config).to_toml()]
        arguments += ["--disk", disk] if disk is not None else []
        arguments += ["--dry-run"] if dry_run else []
        async with self._one:
            done: dict[str, Any] = await core.job("prune", "cdpserver.retention.prune", *arguments)
        if not dry_run:
            self._say(done)
            await self._refuse()
        return done

    def _say(self, done: dict[str, Any]) -> None:
        log = self._core.log
        for disk in dict.fromkeys(gone["disk"] for gone in done["dropped"]):
            mine = [gone for gone in done["dropped"] if gone["disk"] == disk]
            size = sum(gone["bytes"] for gone in mine)
            log.emit("retention.dropped", disk=disk, things=[gone["what"] for gone in mine], bytes=size)
        for disk, reason in done["failed"].items():
            if self._failed.get(disk) != reason:
                log.emit("retention.left-alone", level="warning", disk=disk, reason=reason)
        self._failed = dict(done["failed"])
        self._near_refusal = any(
            held["at_cap"] == REFUSE and held["bytes"] * 100 >= (held["size_cap"] or 1 << 62) * LEVELS[-1]
            for held in done["disks"].values()
        )
        for disk, held in done["disks"].items():
            if held["size_cap"] is not None:
                self._note_full(disk, held)
                self._warn(disk, held["bytes"], held["size_cap"], held["at_cap"])
        self._warn_of_locks(sum(held["locked_bytes"] for held in done["disks"].values()))
        cap = self._core.config.store_size_cap
        if cap is not None and len(done["disks"]) > 0:
            self._warn("", sum(held["bytes"] for held in done["disks"].values()), cap, "")

    def _note_full(self, disk: str, held: dict[str, Any]) -> None:
        full = held["at_cap"] == REFUSE and held["bytes"] >= held["size_cap"]
        why = f"{disk} is at its size_cap of {format_bytes(held['size_cap'])}, and its policy refuses writes then"
        if full != bool(self._full.get(disk)):
            self._core.log.emit(
                "retention.writes-refused" if full else "retention.writes-taken",
                level="error" if full else "info",
                disk=disk,
                bytes=held["bytes"],
                size_cap=held["size_cap"],
            )
            self._full[disk] = why if full else ""

    async def _refuse(self) -> None:
        """Tell the workers; each time, since one that was started anew does not know."""
        for disk, why in list(self._full.items()):
            entry = self._core.catalog.get(disk)
            if entry is None or entry.state != "live":
                del self._full[disk]
                continue
            await self._core.targets.call(entry.id, "full", id=entry.id, why=why)
            if not why:
                del self._full[disk]

    def _warn_of_locks(self, locked: int) -> None:
        quota = quota_bytes(self._core.state, self._core.config)
        near = locked * 100 >= quota * WARNING_PERCENT
        if near and not self._locks_near:
            self._core.log.emit(
                "retention.lock-quota-near",
                level="warning",
                reason=f"locked points hold {format_bytes(locked)} of {format_bytes(quota)}",
            )
        self._locks_near = near

    def _warn(self, disk: str, used: int, cap: int, at_cap: str) -> None:
        percent = used * 100 // cap
        if self._fullness.news(disk, percent):
            then = "writes are refused then" if at_cap == REFUSE else "the oldest history goes then"
            self._core.log.emit(
                "retention.cap-near",
                level="warning",
                disk=disk or None,
                percent=percent,
                reason=f"{format_bytes(used)} of {format_bytes(cap)}: {then}",
            )

    async def keep_pruning(self) -> None:
        """A pass whenever something has changed, and now and then; for ever."""
        seen, skipped = None, LONGEST
        while True:
            await trio.sleep(LOOK_S)
            try:
                await self._refuse()
                now = await self._core.thread(self._signature)
                await self._core.thread(self._drop_expired)
                skipped += 1
                if now != seen or skipped >= LONGEST or self._near_refusal:
                    await self._pass(None, dry_run=False)
                    seen, skipped = now, 0
            except (CdpError, OSError) as error:
                self._core.log.emit("retention.pass-failed", level="error", reason=str(error))

    def _signature(self) -> list[tuple[str, int]]:
        """Changes with every interval, base point, policy and lock."""
        state = self._core.state
        paths = [state.catalog_copy]
        for entry in self._core.catalog.names().values():
            paths += [state.timeline(entry.id), state.timeline(entry.id) / "intervals"]
        return [(str(path), path.stat().st_mtime_ns) for path in paths if path.exists()]

    def _drop_expired(self) -> None:
        """Take away the rows of locks whose time has come."""
        catalog, now_ns = self._core.catalog, self._core.clock.now_ns()
        for lock in locks.all_locks(catalog):
            if not lock.holds(now_ns):
                catalog.delete_row("locks", lock.id)
                entry = catalog.by_id(lock.timeline)
                disk = lock.timeline if entry is None else entry.name
                self._core.log.emit("lock.expired", disk=disk, lock=lock.id, seq=lock.seq)
