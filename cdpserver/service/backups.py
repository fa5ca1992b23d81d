"""Backups by the clock: at the times that a policy names, the newest good point of a VM or disk goes to its repository.

    backups.json    of each VM or disk: its schedule, the time that was dealt with last, and what came of it

A time is dealt with when there is a backup: a service that was down, or killed in the middle, makes one for all that passed,
and one that fails is tried again after RETRY_S. Times are those of the host's clock, as text: where summer ends, an hour that
comes again brings no second one. A clock that goes back by more than a day (an hour, if hourly) begins with its next time.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import trio

from cdpserver import durable, names
from cdpserver.errors import CdpError, CorruptError, RefusedError
from cdpserver.retention.backups import BackupPlan, parse_plan
from cdpserver.retention.slots import format_slots
from cdpserver.service.core import Core
from cdpserver.service.instants import Instants
from cdpserver.service.jobs import Jobs
from cdpserver.service.nightly import by_the_clock
from cdpserver.service.vms import Vms
from cdpserver.state import StateDir
from cdpserver.vm.trial.schedule import Planned

FILE = "backups.json"

LOOK_S = 5.0

RETRY_S = 15 * 60.0

OLDEST = "-30d"
"""A disk whose mirror is not in sync: so far back a good point is looked for."""


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be backed up, and the time that it is for."""

    planned: Planned
    plan: BackupPlan
    slot: str


def load(state: StateDir) -> dict[str, dict[str, Any]]:
    """By VM or disk; {} where nothing was noted, or what was cannot be read: then each begins with its next time."""
    try:
        found = durable.read_json(state.path / FILE)
    except (FileNotFoundError, CorruptError):
        return {}
    return {subject: said for subject, said in found.items() if isinstance(said, dict)}


def due(
    noted: dict[str, dict[str, Any]], wanted: list[Planned], now: datetime
) -> tuple[list[Due], dict[str, dict[str, Any]]]:
    """(what is due, what is to be noted from here on). Pure. What is new, or has another schedule, begins with its next time."""
    found, kept = [], {}
    for one in wanted:
        text = one.policy.backup or ""
        plan = parse_plan(text)
        slot = f"{plan.last(now):%Y-%m-%dT%H:%M}"
        said = noted.get(one.subject, {})
        before = said.get("slot")
        if said.get("schedule") != text or not _is_of_now(before, plan, now):
            said = said | {"schedule": text, "slot": slot}
        elif str(before) < slot:
            found.append(Due(one, plan, slot))
        kept[one.subject] = said
    return found, kept


def _is_of_now(slot: object, plan: BackupPlan, now: datetime) -> bool:
    """Is it a time that has come, or comes once more since clocks went back a little?"""
    try:
        at = datetime.fromisoformat(str(slot))
    except ValueError:
        return False
    again = timedelta(hours=1) if plan.every == "hourly" else timedelta(days=1)
    return at.tzinfo is None and at - now.replace(tzinfo=None) <= again


class Backups:
    """Makes them, one at a time."""

    def __init__(self, core: Core, jobs: Jobs) -> None:
        self._core, self._jobs = core, jobs
        self._wanted = by_the_clock(core, "backup")
        self._again: dict[str, float] = {}
        self._said = ""

    async def keep_backing_up(self) -> None:
        """Look at the clock until cancelled."""
        while True:
            try:
                wanted = await self._core.thread(self._look)
                self._said = ""
            except (CdpError, OSError) as error:
                wanted = []
                if str(error) != self._said:
                    self._core.log.emit("backup.schedule-failed", level="warning", reason=str(error))
                self._said = str(error)
            for one in wanted:
                if trio.current_time() >= self._again.get(one.planned.subject, 0):
                    await self._back_up(one)
            await trio.sleep(LOOK_S)

    def _look(self) -> list[Due]:
        core = self._core
        noted = load(core.state)
        found, kept = due(noted, self._wanted.now(), datetime.now(UTC).astimezone())
        if kept != noted:
            self._write(kept)
        return found

    def _write(self, noted: dict[str, dict[str, Any]]) -> None:
        durable.write_whole(self._core.state.path / FILE, json.dumps(noted, indent=1).encode() + b"\n")

    async def _back_up(self, one: Due) -> None:
        """One backup as a job; what came of it is noted, and an event."""
        core, subject = self._core, one.planned.subject
        try:
            job = self._jobs.start("backup", subject, lambda: self._run(one))
        except RefusedError:
            return  # so many jobs are under way; it stays due
        await job.ended.wait()
        if job.result is None:
            reason = job.error["message"] if job.error is not None else "it was cancelled"
            self._again[subject] = trio.current_time() + RETRY_S
            core.log.emit(
                "backup.failed", level="error", what=subject, reason=reason, retry_in_s=int(RETRY_S)
            )
            await core.thread(self._note, subject, {"state": "failed", "reason": reason})
            return
        self._again.pop(subject, None)
        made = {key: job.result[key] for key in ("id", "kind", "read_bytes", "stored_bytes", "seconds")}
        if wrong := job.result.get("copy_error"):
            core.log.emit("backup.copy-failed", level="error", what=subject, backup=made["id"], reason=wrong)
        core.log.emit(
            "backup.done", what=subject, backup=made.pop("id"), **made, removed=job.result["removed"]
        )
        said = {"state": "done", "reason": wrong or "", "slot": one.slot, "id": job.result["id"], **made}
        await core.thread(self._note, subject, said)

    def _note(self, subject: str, said: dict[str, Any]) -> None:
        noted = load(self._core.state)
        ended = {"ended_ns": self._core.clock.now_ns()}
        try:
            self._write({**noted, subject: {**noted.get(subject, {}), **said, **ended}})
        except CdpError as error:  # it is due again when this one is known no more
            self._core.log.emit("backup.not-noted", level="error", what=subject, reason=str(error))

    async def _run(self, one: Due) -> dict[str, Any]:
        core, policy = self._core, one.planned.policy
        name, points = await self._points(one.planned.subject)
        if policy.backup_to is None:
            raise RefusedError("the policy does not say where to", hint="cdp policy set --backup-to PATH")
        arguments = ["--state-dir", str(core.state.path), "--name", name, "--to", policy.backup_to]
        if policy.backup_copy is not None:
            arguments += ["--copy-to", policy.backup_copy]
        if one.plan.keep is not None:
            arguments += ["--keep", format_slots(one.plan.keep)]
        made: dict[str, Any] = await core.job("backup", "cdpserver.repository.scheduled", *arguments, *points)
        return made

    async def _points(self, subject: str) -> tuple[str, list[str]]:
        """What the backup is called, and the newest good point of each disk, durable. RefusedError if there is none."""
        core = self._core
        entry = core.catalog.get(subject)
        if entry is None:
            found = await core.thread(Vms(core).resolve, subject, names.Latest())
            name = f"{subject}@{names.format_time(found.time_ns)}"
            places = [(placed.entry, placed.seq) for placed in found.disks]
        else:
            seq = await self._newest_good(subject)
            name, places = f"{subject}@seq:{seq}", [(entry, seq)]
        for one, seq in places:
            await core.make_durable(one, seq)
        return name, [f"{one.name}@seq:{seq}" for one, seq in places]

    async def _newest_good(self, disk: str) -> int:
        instants = Instants(self._core)
        newest = await instants.show(f"{disk}@latest")
        if newest["grade"] != "unordered":
            return int(newest["seq"])
        for point in reversed(await instants.points(disk, since=OLDEST, until=None, kind="rp", limit=None)):
            if point["grade"] != "unordered":
                return int(point["seq"])
        raise RefusedError(
            f"{disk} has no good point: its mirror was never in sync", hint=f"cdp point list {disk}"
        )
