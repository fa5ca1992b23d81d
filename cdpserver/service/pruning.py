"""Pruning: passes over all disks in a process of its own, by the clock and when somebody asks."""

import contextlib
from typing import Any

import trio

from cdpserver import groups, locks
from cdpserver.catalog.derived import Derived
from cdpserver.config import Settings
from cdpserver.errors import CdpError, RefusedError
from cdpserver.names import format_bytes
from cdpserver.retention.policy import REFUSE, SHORTEN
from cdpserver.retention.quota import WARNING_PERCENT, quota_bytes
from cdpserver.service.core import Core
from cdpserver.service.warned import Rising
from cdpserver.vm import instant

LONGEST = 10
"""Looks after which there is a pass though nothing has changed: history grows old by itself."""

LEVELS = (95, 90, 80)
"""Percent of a cap at which a warning is said, each once on the way up."""


class Pruning:
    """The passes of a service; one at a time."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._may_refuse = Derived(core.catalog, self._has_refusing)
        self._one = trio.Lock()
        self._fullness = Rising(LEVELS, fall=5)
        self._failed: dict[str, str] = {}
        self._full: dict[str, str] = {}
        self._locks_near = False
        self._store_full = False
        """All disks together were at the store's cap when they were last looked at."""

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
            self._say(done, disk)
            await self._refuse()
        return done

    def _say(self, done: dict[str, Any], only: str | None) -> None:
        """Tell what a pass found. One over a single disk knows nothing of the others, nor of the store."""
        log, disks = self._core.log, done["disks"]
        for disk in dict.fromkeys(gone["disk"] for gone in done["dropped"]):
            mine = [gone for gone in done["dropped"] if gone["disk"] == disk]
            size = sum(gone["bytes"] for gone in mine)
            log.emit("retention.dropped", disk=disk, things=[gone["what"] for gone in mine], bytes=size)
        for disk, reason in done["failed"].items():
            if self._failed.get(disk) != reason:
                log.emit("retention.left-alone", level="warning", disk=disk, reason=reason)
        others = {disk: why for disk, why in self._failed.items() if only not in (None, disk)}
        self._failed = others | done["failed"]
        if only is None:
            self._say_of_store(disks)
        for disk, held in disks.items():
            self._note_full(disk, held)
            if held["size_cap"] is not None:
                self._warn(disk, held["bytes"], held["size_cap"], held["at_cap"])

    def _say_of_store(self, disks: dict[str, dict[str, Any]]) -> None:
        self._warn_of_locks(sum(held["locked_bytes"] for held in disks.values()))
        used, cap = sum(held["bytes"] for held in disks.values()), self._core.config.store_size_cap
        self._store_full = cap is not None and used >= cap
        if cap is not None and disks:
            all_refuse = all(held["at_cap"] == REFUSE for held in disks.values())
            self._warn("", used, cap, REFUSE if all_refuse else SHORTEN)

    def _note_full(self, disk: str, held: dict[str, Any]) -> None:
        """Is a disk that is never shortened at its own cap, or with all others at that of the store?"""
        cap, store_cap = held["size_cap"], self._core.config.store_size_cap
        reached = None
        if held["at_cap"] == REFUSE and cap is not None and held["bytes"] >= cap:
            reached, why = cap, f"{disk} is at its size_cap of {format_bytes(cap)}"
        elif held["at_cap"] == REFUSE and store_cap is not None and self._store_full:
            reached, why = (
                store_cap,
                f"all disks together are at the size_cap {format_bytes(store_cap)} of [store]",
            )
        if (reached is not None) != bool(self._full.get(disk)):
            self._core.log.emit(
                "retention.writes-refused" if reached is not None else "retention.writes-taken",
                level="error" if reached is not None else "info",
                disk=disk,
                bytes=held["bytes"],
                size_cap=cap if reached is None else reached,
            )
            self._full[disk] = (
                "" if reached is None else f"{why}, and the policy of {disk} refuses writes then"
            )

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
        """A pass whenever something has changed, now and then, and always where writes may have to be refused; for ever."""
        seen, skipped = None, LONGEST - 2  # so the second look makes a pass
        while True:
            try:
                await self._refuse()
                now = await self._core.thread(self._signature)
                await self._core.thread(self._drop_expired)
                skipped += 1
                changed = seen is not None and now != seen
                if changed or skipped >= LONGEST or await self._core.thread(self._may_refuse.now):
                    await self._pass(None, dry_run=False)
                    skipped = 0
                seen = now
            except (CdpError, OSError) as error:
                self._core.log.emit("retention.pass-failed", level="error", reason=str(error))
            await trio.sleep(self._core.config.store_prune_every_ns / 1e9)

    def _has_refusing(self) -> bool:
        """Is there a disk that is to refuse writes at a cap? It grows at any time, so that it is looked at each time."""
        core = self._core
        for entry in core.catalog.names().values():
            with contextlib.suppress(CdpError):  # a pass says what is wrong with a policy
                policy = core.policy(entry)
                if policy.at_cap == REFUSE and (policy.size_cap or core.config.store_size_cap) is not None:
                    return True
        return False

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
