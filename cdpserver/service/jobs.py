"""Long work as a thing of its own: it has a name, it can be watched, waited for and cancelled.

Jobs live in memory: those that the service's stop cancels are gone with it. What they made or began is in files, as ever.
Numbers are not given twice: the next one is kept in `run/jobs.json` (without fsync: after a power loss one may come again).
"""

import json
import os
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import trio

from cdpserver import messages, progress
from cdpserver.clock import Clock
from cdpserver.errors import CdpError, NotFoundError, RefusedError
from cdpserver.events import EventLog
from cdpserver.names import format_time

Work: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]

current: ContextVar[str] = ContextVar("current", default="the service")
"""The name of the job that is at work in this context."""

MAX_RUNNING = 100
"""Each may hold a process; a client that starts more has lost count."""

KEPT = 1000
KEPT_NS = 86_400 * 1_000_000_000
"""Ended jobs are kept so many and so long, for those who ask late."""

CANCEL_S = 10.0
"""A job is usually gone in milliseconds; one that is just removing files ends when they are gone."""


@dataclass(eq=False)
class Job:
    """One piece of work. `state` is running, done, failed or cancelled."""

    number: int
    kind: str
    target: str
    created_ns: int
    state: str = "running"
    progress: float | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    ended_ns: int | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return f"jobs/{self.number}"

    def hear(self, fraction: float) -> None:
        """The work got on."""
        self.progress = round(min(max(fraction, self.progress or 0.0), 1.0), 4)

    def as_dict(self) -> dict[str, Any]:
        """The job as the API shows it."""
        ended = self.ended_ns
        return {
            "name": self.name,
            "kind": self.kind,
            "target": self.target,
            "state": self.state,
            "progress": self.progress,
            "result": self.result,
            "error": self.error,
            "created": format_time(self.created_ns),
            "ended": format_time(ended) if ended is not None else None,
            "kept_until": format_time(ended + KEPT_NS) if ended is not None else None,
        }


class Jobs:
    """The jobs of the service. `keep_running` before `start`."""

    def __init__(self, note: Path, clock: Clock, log: EventLog) -> None:
        self._note = note
        self._clock = clock
        self._log = log
        self._jobs: dict[int, Job] = {}
        self._nursery: trio.Nursery | None = None

    async def keep_running(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what is started until cancelled; then everything is."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def start(self, kind: str, target: str, work: Work) -> Job:
        """Begin work. RefusedError while too much is under way."""
        assert self._nursery is not None
        if sum(job.state == "running" for job in self._jobs.values()) >= MAX_RUNNING:
            raise RefusedError(f"{MAX_RUNNING} jobs are under way", hint="wait for one of them: cdp job list")
        job = Job(self._next_number(), kind, target, self._clock.now_ns())
        self._jobs[job.number] = job
        self._nursery.start_soon(self._run, job, work)
        return job

    def list_jobs(self) -> list[Job]:
        """All that are kept, oldest first."""
        self._forget()
        return list(self._jobs.values())

    def job(self, number: int) -> Job:
        """One job. NotFoundError."""
        self._forget()
        if number not in self._jobs:
            raise NotFoundError(
                f"there is no jobs/{number}",
                hint=f"the last {KEPT} are kept for a day, and until cdpserver stops: cdp job list",
            )
        return self._jobs[number]

    async def cancel(self, number: int) -> Job:
        """End a job; its processes are killed. One that has ended stays as it is."""
        job = self.job(number)
        job.scope.cancel()
        with trio.move_on_after(CANCEL_S):
            await job.ended.wait()
        return job

    async def _run(self, job: Job, work: Work) -> None:
        progress.hearer.set(job.hear)
        current.set(job.name)
        said: dict[str, Any] = {"job": job.name, "kind": job.kind, "disk": job.target}
        try:
            with job.scope:
                job.result = await work()
                job.state, job.progress = "done", 1.0
        except CdpError as error:
            job.state, job.error = "failed", {**messages.error_fields(error), "exit_code": error.exit_code}
        except Exception as error:  # noqa: BLE001
            # The process's rim: whatever went wrong in one job, the service goes on.
            failed = CdpError(f"the job failed: {error!r}"[:500], hint="the log says more")
            job.state, job.error = "failed", {**messages.error_fields(failed), "exit_code": failed.exit_code}
        finally:
            if job.state == "running":
                job.state = "cancelled"
            job.ended_ns = self._clock.now_ns()
            job.ended.set()
            level: Any = "warning" if job.state == "failed" else "info"
            reason = {"reason": job.error["message"]} if job.error else {}
            self._log.emit("job.ended", level=level, state=job.state, **said, **reason)

    def _forget(self) -> None:
        """Let go of what ended long ago, and of the oldest of too many."""
        ended = [job for job in self._jobs.values() if job.ended_ns is not None]
        oldest_ns = self._clock.now_ns() - KEPT_NS
        for number, job in enumerate(ended):
            if len(ended) - number > KEPT or (job.ended_ns or 0) < oldest_ns:
                del self._jobs[job.number]

    def _next_number(self) -> int:
        self._forget()
        newest = max(self._jobs, default=0)
        try:
            newest = max(newest, int(json.loads(self._note.read_text())["newest"]))
        except FileNotFoundError:
            newest = max(newest, 0)
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._log.emit("job.number-unknown", level="warning", reason=str(error))
        try:
            new = self._note.with_suffix(".new")
            new.write_text(json.dumps({"newest": newest + 1}))
            os.replace(new, self._note)
        except OSError as error:
            self._log.emit("job.number-not-kept", level="warning", reason=str(error))
        return newest + 1
