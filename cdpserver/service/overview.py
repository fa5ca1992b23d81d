"""Everything that an operator wants to see at once: the source of `cdp status` and of the metrics.

One look is one `status` question to the target, with a deadline, and a pass over the disks' files in a thread. A target that
hangs costs its own figures, not the others.
"""

import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

import cdpserver
from cdpserver import timeline
from cdpserver.catalog import Entry
from cdpserver.check.scrub import Progress
from cdpserver.clock import wall_difference_ns
from cdpserver.errors import CdpError, CorruptError
from cdpserver.journal.control import Grade
from cdpserver.limits import TAIL_RECORDS
from cdpserver.names import format_bytes, format_duration
from cdpserver.service import backup_due, behind, facts
from cdpserver.service.children import Children
from cdpserver.service.core import Core
from cdpserver.service.event_counts import EventCounts
from cdpserver.service.protection import Protection
from cdpserver.service.sampler import Sampler
from cdpserver.target.placement import worker_name
from cdpserver.view.history import History
from cdpserver.vm.controller import DiskState
from cdpserver.vm.trial import record as trials

TARGET_S = 2.0
"""How long the target may take to answer: it takes milliseconds, and Prometheus gives up after ten seconds."""

LITTLE_FREE = 0.1
"""Share of the store below which free space is a warning."""

MINUTE_NS, HOUR_NS, DAY_NS = 60 * 10**9, 3600 * 10**9, 86_400 * 10**9
WRONG_CLOCK_NS = MINUTE_NS
"""A server's clock that is further from the host's is a warning: people look for points by the wall."""

ALWAYS_COUNTED = ("error", "warning")
"""Levels that are shown as 0 of each process before the first such event, so that an alarm sees it come."""

NO_RECORDS: dict[str, Any] = {
    "durable_lag_ns": 0,
    "tail_records": 0,
    "index_lag_ns": 0,
    "last_base_point": None,
    "scrub": None,
}


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look knows before it goes through the disks."""

    now_ns: int
    said: dict[str, Any]
    answered: dict[str, bool]

    def asked(self, entry: Entry) -> bool:
        """Did the worker of this disk answer?"""
        return self.answered[worker_name(entry.id, len(self.answered))]


class Overview:
    """Looks at the service. One look at a time; who asks meanwhile waits for its own."""

    def __init__(self, core: Core, children: Children, protection: Protection, sampler: Sampler) -> None:
        self._core = core
        self._protection = protection
        self._sampler = sampler
        self._children = children
        self._started_ns = core.clock.now_ns()
        self._events = EventCounts(core.state.events)
        self._one = trio.Lock()
        self._cut_times: dict[tuple[str, int], int | None] = {}

    async def look(self) -> dict[str, Any]:
        """The whole, as plain values."""
        async with self._one:
            began = time.monotonic()
            said, answered = await self._core.targets.status(within_s=TARGET_S)
            look = _Look(self._core.clock.now_ns(), said, answered)
            found = await self._core.thread(self._collect, look)
            found["targets"] = answered
            found["warnings"] = warnings(found)
            found["look_s"] = time.monotonic() - began
            return found

    def _collect(self, look: _Look) -> dict[str, Any]:
        core = self._core
        self._events.update()
        disks = [self._disk(entry, look) for entry in core.catalog.names().values()]
        counts = self._events.counts
        processes = ("cdpserver", *(child.name for child in self._children.all))
        always = [(process, level) for process in processes for level in ALWAYS_COUNTED]
        return {
            "version": cdpserver.__version__,
            "state_dir": str(core.state.path),
            "pid": os.getpid(),
            "time_ns": look.now_ns,
            "clock_ahead_ns": -wall_difference_ns(core.clock),
            "started_ns": self._started_ns,
            "children": self._children.status(),
            "store": _store(core.state.path),
            "events": [
                {"process": process, "level": level, "count": counts[process, level]}
                for process, level in sorted({*counts, *always})
            ],
            "last_error": self._events.last_error,
            "drills": _drills(core),
            "backups": _backups(core),
            "disks": disks,
        }

    # -- a disk ----------------------------------------------------------------------------------------------

    def _disk(self, entry: Entry, look: _Look) -> dict[str, Any]:
        """One disk. What is damaged or vanishes meanwhile is said, and the others are shown."""
        mirror = self._protection.disk(entry.name)
        shown: dict[str, Any] = {
            "name": entry.name,
            "id": entry.id,
            "state": "removing",
            "size": None,
            "clients": 0,
            "broken": "",
            "grade": None,
            "lag_ns": 0,
            "rpo_ns": None,
            "write_ns": self._sampler.write_ns.get(entry.name),
            "mirror": {"state": mirror.state, "reason": mirror.reason} if mirror is not None else None,
            "resync": mirror.resync if mirror is not None else None,
            **NO_RECORDS,
            "counts": None,
        }
        if entry.state == "removing":
            return shown
        try:
            shown |= self._live(entry, look)
            shown["lag_ns"] = max(shown["lag_ns"], _behind_ns(mirror))
            return shown | {"rpo_ns": _rpo_ns(shown)}
        except (CdpError, OSError) as error:
            return shown | {"state": "damaged", "error": getattr(error, "message", str(error))}

    def _live(self, entry: Entry, look: _Look) -> dict[str, Any]:
        core = self._core
        found = timeline.load(core.state.timeline(entry.id))
        history = History(core.state.path, found, core.clock.boot_id)
        try:
            return history.journal.settled(partial(self._seen, entry, history, look))
        finally:
            history.close()

    def _seen(self, entry: Entry, history: History, look: _Look) -> dict[str, Any]:
        found = history.timeline
        status = look.said.get(found.full_name) or facts.closed_status(history)
        shown = {
            "size": history.size,
            "state": facts.state_of(found, status),
            # What only the target can say is not known while it says nothing.
            "clients": status.get("clients", 0) if look.asked(entry) else None,
            "grade": status.get("grade", Grade.UNORDERED.label),
            "broken": status.get("broken", ""),
            "counts": status.get("counts"),
        }
        if history.journal.empty:
            return shown | {"lag_ns": look.now_ns - entry.created_ns}
        return shown | self._journal(entry, history, look, status)

    def _journal(self, entry: Entry, history: History, look: _Look, status: dict[str, Any]) -> dict[str, Any]:
        journal, now_ns = history.journal, look.now_ns
        tail = behind.tail_of(journal, history.boot_id)
        complete = behind.complete_ns(journal)
        return {
            "lag_ns": 0 if complete is None else max(0, now_ns - (complete or entry.created_ns)),
            "durable_lag_ns": status.get("lag_ns", 0) if look.asked(entry) else None,
            "tail_records": tail.records,
            "index_lag_ns": 0 if tail.oldest_ns is None else max(0, now_ns - tail.oldest_ns),
            "last_base_point": self._base_point(entry, history),
            "scrub": Progress.load(history.directory).as_dict(),
        }

    def _base_point(self, entry: Entry, history: History) -> dict[str, Any] | None:
        number = behind.newest_base_point(history.directory)
        if number is None:
            return None
        key = (entry.id, number)
        if key not in self._cut_times:
            self._cut_times = {old: at for old, at in self._cut_times.items() if old[0] != entry.id}
            self._cut_times[key] = behind.cut_ns(history.journal, number)
        return {"number": number, "time_ns": self._cut_times[key]}


def _behind_ns(mirror: DiskState | None) -> int:
    """How long ago a mirror was in sync, which the target alone cannot know: it may hear nothing of a QEMU that writes on."""
    return mirror.behind_ns(time.monotonic_ns()) if mirror is not None else 0


def _rpo_ns(shown: dict[str, Any]) -> int | None:
    """What a loss of source and host would cost now; None while the target does not say what is durable."""
    if shown["durable_lag_ns"] is None:
        return None
    return int(max(shown["lag_ns"], shown["durable_lag_ns"]))


def _store(path: os.PathLike[str]) -> dict[str, Any]:
    found = os.statvfs(path)
    return {"size_bytes": found.f_blocks * found.f_frsize, "free_bytes": found.f_bavail * found.f_frsize}


def _drills(core: Core) -> list[dict[str, Any]]:
    """The newest drill of each VM or disk that has ended."""
    try:
        found = trials.all_of(core.catalog)
    except CorruptError:
        return []  # listing them says why
    newest = {one.subject: one for one in found if one.kind == "drill" and one.state != "running"}
    return [
        {
            "what": subject,
            "id": one.id,
            "state": one.state,
            "rto_ms": one.rto_ms,
            "time_ns": one.time_ns,
            "ended_ns": one.ended_ns,
            "reason": one.reason,
        }
        for subject, one in sorted(newest.items())
    ]


def _backups(core: Core) -> list[dict[str, Any]]:
    """The newest scheduled backup of each VM or disk, with what came of it."""
    return [
        {
            "what": subject,
            "state": said.get("state", "waiting"),
            "id": said.get("id", ""),
            "ended_ns": said.get("ended_ns", 0),
            "stored_bytes": said.get("stored_bytes", 0),
            "seconds": said.get("seconds", 0),
            "reason": said.get("reason") or said.get("copy_reason", ""),
            "waits": said.get("waits", ""),
        }
        for subject, said in sorted(backup_due.load(core.state).items())
        if said.get("state") or said.get("waits")
    ]


# --- warnings


def warnings(found: dict[str, Any]) -> list[str]:
    """What an operator should do something about, worst first. Each names the next step."""
    said = [
        f"{name} does not answer, so figures of disks may be missing (its events say why: {found['state_dir']}/events.jsonl)"
        for name, up in found["targets"].items()
        if not up
    ]
    said += [
        f"process {name} is not running; it is being started anew (events.jsonl says why it ended)"
        for name, child in found["children"].items()
        if child["pid"] is None
    ]
    if abs(ahead_ns := found["clock_ahead_ns"]) > WRONG_CLOCK_NS:
        way = "ahead of" if ahead_ns > 0 else "behind"
        said.append(
            f"the server's clock is about {_about(abs(ahead_ns))} {way} the host's, and points carry the server's "
            "(docs/runbook.md: The clock is wrong)"
        )
    store = found["store"]
    if store["free_bytes"] < LITTLE_FREE * store["size_bytes"]:
        said.append(
            f"the store has {format_bytes(store['free_bytes'])} left of {format_bytes(store['size_bytes'])} "
            "(make it larger, or remove disks: cdp disk remove)"
        )
    said += [
        f"the drill of {one['what']} has failed: {one['reason']} (cdp point drills {one['what']})"
        for one in found["drills"]
        if one["state"] == "failed"
    ]
    said += [
        f"the backup of {one['what']} has failed: {one['reason']} (cdp event list --event backup)"
        for one in found["backups"]
        if one["reason"]
    ]
    said += [f"the backup of {one['what']} waits {one['waits']}" for one in found["backups"] if one["waits"]]
    for disk in found["disks"]:
        said += _disk_warnings(disk)
    return said


def _about(span_ns: int) -> str:
    """A span in whole days, hours or minutes."""
    unit_ns = next((unit_ns for unit_ns in (DAY_NS, HOUR_NS) if span_ns >= 2 * unit_ns), MINUTE_NS)
    return format_duration(round(span_ns / unit_ns) * unit_ns)


def _disk_warnings(disk: dict[str, Any]) -> list[str]:
    name = disk["name"]
    if disk["state"] == "damaged":
        return [f"{name} is damaged: {disk['error']} (cdp check {name})"]
    said = []
    if disk["broken"]:
        said.append(
            f"{name} takes no writes: {disk['broken']} (free space or mend the store, then reconnect)"
        )
    if disk["tail_records"] > TAIL_RECORDS:
        said.append(
            f"{name}: the index is {disk['tail_records']:,} records behind, so writes are slowed down"
        )
    if disk["scrub"] is not None and (places := disk["scrub"]["damaged"]):
        said.append(
            f"{name} is damaged in {places} place{'s' if places > 1 else ''}: "
            f"cdp check {name} says which points that touches, cdp repair {name} what can be made anew"
        )
    mirror = disk["mirror"]
    if mirror is not None and mirror["state"] != "synced":
        why = mirror["reason"] or f"its mirror is {mirror['state']}"
        said.append(f"{name} is not protected now: {why} (cdp event list --level warning)")
    elif mirror is None and disk["clients"] and disk["state"] == "unordered":
        said.append(f"{name} is not in sync (when its mirror job is ready: cdp disk synced {name})")
    return said
