"""Backups by the clock: at the times that a policy names, the newest good point of a VM or disk goes to its repository, or a
running VM that has no points here (sources.py) as it is then.

Each repository has one thing to do at a time: a backup, or copies to it. One that hangs keeps those of others from nothing; what
waits for it is said.

What fails is tried again after RETRY_S. Which times count says backup_due.py.
"""

import hashlib
import json
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import trio

from cdpserver import durable, names
from cdpserver.errors import CdpError, CorruptError, RefusedError
from cdpserver.repository import registered
from cdpserver.retention import policies
from cdpserver.retention.backups import parse_plan
from cdpserver.retention.slots import format_slots
from cdpserver.service.backup_due import DUE, FILE, Due, Work, copies_due, due, load
from cdpserver.service.core import Core
from cdpserver.service.instants import Instants
from cdpserver.service.jobs import Jobs
from cdpserver.service.nightly import by_the_clock
from cdpserver.service.vms import Vms
from cdpserver.vm.backup import sources
from cdpserver.vm.trial.schedule import Planned

LOOK_S = 5.0

RETRY_S = 15 * 60.0

WAITS_S = 15 * 60.0
"""What is due waits for so long behind another one of its repository, and that is an event."""

LET_END_S = 30.0
"""A backup that is cancelled takes its jobs out of QEMU, where a guest may wait for them."""

OLDEST = "-30d"
"""A disk whose mirror is not in sync: so far back a good point is looked for."""


class Backups:
    """Makes them, one at a time for each repository."""

    def __init__(self, core: Core, jobs: Jobs) -> None:
        self._core, self._jobs = core, jobs
        self._with_points = by_the_clock(core, "backup")
        self._again: dict[str, float] = {}
        self._busy: dict[str, Work] = {}
        """Repository -> what it is doing."""
        self._waits: dict[str, float] = {}
        """What waits for its repository -> since when; inf once that was said."""
        self._said = ""
        self._wrong = ""
        """What kept some from being looked at."""
        self._noting = trio.Lock()

    async def keep_backing_up(self) -> None:
        """Look at the clock until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                wanted = await self._wanted()
                for work, repository in wanted:
                    if trio.current_time() < self._again.get(work.what, 0):
                        continue
                    if repository in self._busy:
                        await self._say_waits(work, repository)
                        continue
                    self._waits.pop(work.what, None)
                    self._busy[repository] = work
                    nursery.start_soon(self._work, work, repository)
                waiting = {work.what for work, _ in wanted}
                self._waits = {what: since for what, since in self._waits.items() if what in waiting}
                await trio.sleep(LOOK_S)

    async def _wanted(self) -> list[tuple[Work, str]]:
        """What is due and not at work, with its repository, as far as that can be known; what cannot is said once."""
        found: list[tuple[Work, str]] = []
        self._wrong = ""
        try:
            async with self._noting:
                found = await self._core.thread(self._look)
        except (CdpError, OSError) as error:
            self._wrong = str(error)
        if self._wrong and self._wrong != self._said:
            self._core.log.emit("backup.schedule-failed", level="warning", reason=self._wrong)
        self._said = self._wrong
        at_work = {work.what for work in self._busy.values()}
        return [(work, repository) for work, repository in found if work.what not in at_work]

    def _look(self) -> list[tuple[Work, str]]:
        wanted = self._planned()
        noted = load(self._core.state)
        found, kept = due(noted, wanted, datetime.now(UTC).astimezone())
        if kept != noted:
            self._write(kept)
        works = [Work(one) for one in found] + copies_due(kept, wanted)
        return [(work, self._repository(work)) for work in works]

    def _repository(self, work: Work) -> str:
        """The id of a repository that is registered, so that it is one by whichever name."""
        try:
            known = registered.load(self._core.state.path)
        except CorruptError as error:
            self._wrong, known = str(error), {}
        return next((one.id for one in known.values() if one.path == work.to), work.to or "")

    def _planned(self) -> list[Planned]:
        """Whatever has a schedule: disks and VMs that have points here, and sources."""
        core = self._core
        found = list(self._with_points.now())
        try:
            known = sources.load(core.state.path)
        except CorruptError as error:  # points are backed up all the same
            self._wrong, known = str(error), {}
        if known:
            rows = core.catalog.rows("policies")
            taken = {name.partition("/")[0] for name in core.catalog.names()}
            for vm in sorted(known.keys() - taken):
                policy = policies.of_vm(rows, core.config, vm).policy
                if policy.backup is not None:
                    found.append(Planned(vm, policy))
        return found

    async def _say_waits(self, work: Work, repository: str) -> None:
        """Once: the repository may hang, and whoever is in front with it."""
        now = trio.current_time()
        if now - self._waits.setdefault(work.what, now) < WAITS_S:
            return
        self._waits[work.what] = math.inf
        behind = self._busy[repository].what
        self._core.log.emit(
            "backup.waits", level="warning", what=work.what, repository=work.to, behind=behind
        )
        reason = f"for {behind}, which {work.to} has been at for long (cdp job list; cdp job cancel)"
        await self._note(work.due.planned.subject, {"waits": reason})

    async def _work(self, work: Work, repository: str) -> None:
        try:
            await (self._copy(work) if work.copies else self._back_up(work))
        finally:
            del self._busy[repository]

    def _write(self, noted: dict[str, dict[str, Any]]) -> None:
        durable.write_whole(self._core.state.path / FILE, json.dumps(noted, indent=1).encode() + b"\n")

    async def run_now(self, subject: str) -> dict[str, Any]:
        """The backup that a policy asks for, now; its times stay as they are. What was made. RefusedError while its repository is
        at work.
        """
        one = next((one for one in await self._core.thread(self._planned) if one.subject == subject), None)
        if one is None:
            raise RefusedError(
                f"no policy asks for backups of {subject}",
                hint=f"cdp policy set {subject} --backup 'daily 02:00' --backup-to PATH, or cdp backup run",
            )
        work = Work(Due(one, parse_plan(one.policy.backup or ""), ""))
        repository = await self._core.thread(self._repository, work)
        if repository in self._busy:
            raise RefusedError(
                f"{work.to} is busy with {self._busy[repository].what}", hint="try again when it has ended"
            )
        self._busy[repository] = work
        try:
            made = await self._run(work.due)
        except CdpError as error:
            await self._failed(work, error.message)
            raise
        else:
            await self._made(work.due, made)
            return made
        finally:
            del self._busy[repository]

    async def _back_up(self, work: Work) -> None:
        """One backup as a job; what came of it is noted, and an event."""
        made = await self._job("backup", work, lambda: self._run(work.due))
        if made is not None:
            await self._made(work.due, made)

    async def _copy(self, work: Work) -> None:
        """What is in the first repository goes to the second one, as a job."""
        subject = work.due.planned.subject
        done = await self._job("backup-copy", work, lambda: self._run_copies(work.due))
        if done is None:
            return
        self._core.log.emit("backup.copied", what=subject, copied=done["copied"], removed=done["removed"])
        await self._note(subject, {"copy": "done", "copy_reason": "", "waits": ""})

    async def _job(self, kind: str, work: Work, run: Callable[[], Awaitable[dict[str, Any]]]) -> Any:
        """What the job made; None if it failed, which is said, or could not begin."""
        try:
            job = self._jobs.start(kind, work.due.planned.subject, run)
        except RefusedError:
            return None  # so many jobs are under way; it stays due
        await job.ended.wait()
        if job.result is None:
            await self._failed(work, job.error["message"] if job.error is not None else "it was cancelled")
        return job.result

    async def _failed(self, work: Work, reason: str) -> None:
        subject, said = work.due.planned.subject, {"state": "failed", "reason": reason}
        self._again[work.what] = trio.current_time() + RETRY_S
        event = {"what": subject, "reason": reason, "retry_in_s": int(RETRY_S)}
        if work.copies:
            self._core.log.emit("backup.copy-failed", level="error", **event)
            said = {"copy_reason": reason}
        else:
            self._core.log.emit("backup.failed", level="error", **event)
        await self._note(subject, said | {"waits": ""})

    async def _made(self, one: Due, result: dict[str, Any]) -> None:
        """It is there; `slot` is empty for one out of turn."""
        subject = one.planned.subject
        self._again.pop(subject, None)
        made = {key: result[key] for key in ("id", "kind", "read_bytes", "stored_bytes", "seconds")}
        event = {key: value for key, value in made.items() if key != "id"}
        self._core.log.emit(
            "backup.done", what=subject, backup=made["id"], **event, removed=result["removed"]
        )
        said = {"state": "done", "reason": "", "waits": "", **made}
        if one.slot:
            said["slot"] = one.slot
        if one.planned.policy.backup_copy is not None:
            said |= {"copy": DUE, "copy_reason": ""}
            self._again.pop(Work(one, copies=True).what, None)
        await self._note(subject, said)

    async def _note(self, subject: str, said: dict[str, Any]) -> None:
        async with self._noting:
            await self._core.thread(self._note_it, subject, said)

    def _note_it(self, subject: str, said: dict[str, Any]) -> None:
        noted = load(self._core.state)
        ended = {"ended_ns": self._core.clock.now_ns()} if "state" in said else {}
        try:
            self._write({**noted, subject: {**noted.get(subject, {}), **said, **ended}})
        except CdpError as error:  # it is due again when this one is known no more
            self._core.log.emit("backup.not-noted", level="error", what=subject, reason=str(error))

    async def _run(self, one: Due) -> dict[str, Any]:
        core, subject, policy = self._core, one.planned.subject, one.planned.policy
        if policy.backup_to is None:
            raise RefusedError("the policy does not say where to", hint="cdp policy set --backup-to PATH")
        arguments = ["--state-dir", str(core.state.path), "--to", policy.backup_to]
        if one.plan.keep is not None:
            arguments += ["--keep", format_slots(one.plan.keep)]
        module = "cdpserver.repository.scheduled"
        if await core.thread(self._is_source, subject):
            module = "cdpserver.vm.backup.scheduled"
            arguments += ["--vm", subject]
        else:
            name, points = await self._points(subject)
            arguments += ["--name", name, *points]
        name = self._process("backup", subject)
        made: dict[str, Any] = await core.job(name, module, *arguments, let_end_s=LET_END_S)
        return made

    async def _run_copies(self, one: Due) -> dict[str, Any]:
        core, policy = self._core, one.planned.policy
        assert policy.backup_to is not None and policy.backup_copy is not None
        arguments = ["--state-dir", str(core.state.path), "--name", one.planned.subject]
        arguments += ["--to", policy.backup_copy, "--copies-of", policy.backup_to]
        if one.plan.keep is not None:
            arguments += ["--keep", format_slots(one.plan.keep)]
        name = self._process("backup-copy", one.planned.subject)
        done: dict[str, Any] = await core.job(name, "cdpserver.repository.scheduled", *arguments)
        return done

    def _process(self, kind: str, subject: str) -> str:
        """The name of its file of the process; names of VMs and disks may be longer than those of files."""
        return f"{kind}-{hashlib.sha256(subject.encode()).hexdigest()[:16]}"

    def _is_source(self, subject: str) -> bool:
        core = self._core
        has_points = any(name.partition("/")[0] == subject for name in core.catalog.names())
        return not has_points and subject in sources.load(core.state.path)

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
