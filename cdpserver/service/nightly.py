"""Drills by the clock: at the time of day that a policy names, the newest good point of a VM or disk is booted."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import trio

from cdpserver import names, timeline
from cdpserver.catalog import Entry
from cdpserver.catalog.derived import Derived
from cdpserver.errors import CdpError
from cdpserver.service.core import Core
from cdpserver.service.drills import Drills, Request
from cdpserver.service.instants import Instants
from cdpserver.service.jobs import Jobs
from cdpserver.service.trials import BY_OPERATOR
from cdpserver.service.vms import Vms
from cdpserver.vm.trial import record
from cdpserver.vm.trial.schedule import Planned, is_due, planned, slot_of

LOOK_S = 5.0

CATCH_UP = timedelta(minutes=10)
"""A service that was down at the time still drills, if it is back soon after."""

SINCE = "-1d"
"""A point that is older is not what the night was to show."""


async def keep_drilling(core: Core, drills: Drills, jobs: Jobs) -> None:
    """Look at the clock until cancelled. One drill at a time: each is a VM of its own."""
    wanted = by_the_clock(core, "drill")
    before = _now() - CATCH_UP
    said = ""
    while True:
        now = _now()
        try:
            due = await core.thread(_due, core, wanted, before, now)
            said = ""
        except CdpError as error:
            if error.message != said:
                said = error.message
                core.log.emit("drill.schedule-unreadable", level="warning", reason=said)
            due = []
        before = now
        for one in due:
            await _drill(core, drills, jobs, one, slot_of(one, now))
        await trio.sleep(LOOK_S)


def _now() -> datetime:
    """What a clock on the host's wall says."""
    return datetime.now(UTC).astimezone().replace(tzinfo=None)


def _due(core: Core, wanted: Derived[list[Planned]], before: datetime, now: datetime) -> list[Planned]:
    trials = record.all_of(core.catalog)
    return [one for one in wanted.now() if is_due(one, trials, after=before, now=now)]


def by_the_clock(core: Core, what: str) -> Derived[list[Planned]]:
    """Where policies have a time for `what`. For threads; CorruptError."""

    def read() -> list[Planned]:
        entries = [
            entry
            for entry in core.catalog.names().values()
            if entry.state == "live" and not names.is_attached(entry.name)
        ]
        forks = {entry.name for entry in entries if _is_fork(core, entry)}
        return planned(core.catalog.rows("policies"), core.config, entries, forks, what)

    return Derived(core.catalog, read)


def _is_fork(core: Core, entry: Entry) -> bool:
    """A disk that is damaged keeps no other from its drill; its own does not begin, and says why."""
    try:
        return timeline.load(core.state.timeline(entry.id)).is_fork
    except CdpError:
        return False


async def _drill(core: Core, drills: Drills, jobs: Jobs, one: Planned, slot: str) -> None:
    """One drill as a job; what keeps it from beginning is an event."""
    policy = one.policy
    try:
        point = await _newest(core, one.subject)
        asked = Request(
            point,
            vm_command=policy.drill_command,
            marker=policy.drill_marker,
            check=policy.drill_check,
            slot=slot,
        )
        job = jobs.start("drill", one.subject, lambda: drills.run(asked))
    except CdpError as error:
        core.log.emit("drill.not-begun", level="warning", what=one.subject, reason=str(error))
        return
    await job.ended.wait()
    if job.state == "cancelled":  # by an operator: else this had been cancelled, too
        await core.thread(_note_operator, core, one.subject, slot)


def _note_operator(core: Core, subject: str, slot: str) -> None:
    for trial in record.all_of(core.catalog):
        if (trial.subject, trial.slot) == (subject, slot) and trial.was_cut_short:
            core.catalog.put_row("trials", replace(trial, reason=BY_OPERATOR).row())


async def _newest(core: Core, subject: str) -> str:
    """The newest point that is not unordered. CdpError if there is none of the last day."""
    if subject in await core.thread(core.catalog.names):
        listed = await Instants(core).points(subject, since=SINCE, until=None, kind="rp", limit=None)
        good = [point for point in listed if point["grade"] != "unordered"]
        if good:
            return f"{subject}@seq:{good[-1]['seq']}"
    elif found := await Vms(core).points(subject, since=SINCE, until=None, kind="rp", limit=1):
        return f"{subject}@{names.format_time(found[-1]['time_ns'])}"
    raise CdpError(f"{subject} has no good point of the last day", hint=f"cdp point list {subject}")
