"""What the service does beside its children, from left-overs to the control API: each part is a task of its own.

`main` imports this when the children have been started, since it takes longer than all that they wait for.
"""

import os

import trio

from cdpserver import tls
from cdpserver.clock import wall_difference_ns
from cdpserver.service import api, nightly, notify, tails
from cdpserver.service.attached import Attached
from cdpserver.service.backups import Backups
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.browsing import Browsing
from cdpserver.service.children import Children
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.drills import Drills
from cdpserver.service.freezer import Freezer
from cdpserver.service.isolated import Isolated
from cdpserver.service.jobs import Jobs
from cdpserver.service.launched import Accels
from cdpserver.service.listeners import Listeners
from cdpserver.service.marks import Marks
from cdpserver.service.parts import Parts
from cdpserver.service.protection import Protection
from cdpserver.service.recoveries import Recoveries
from cdpserver.service.roles import Roles
from cdpserver.service.sampler import Sampler
from cdpserver.service.schedule import Schedule
from cdpserver.service.scrubbing import Scrubbing
from cdpserver.service.trials import Trials

WALL_LOOK_S = 1.0
WALL_JUMP_NS = 250_000_000
"""A clock that is slewed drifts by 0.5 ms a second at most; more than this was set by somebody."""


async def run(
    core: Core, children: Children, listeners: Listeners, roles: Roles, stopping: trio.Event
) -> None:
    """Everything that is asked for or due, until `stopping`."""
    browsing = Browsing(core)
    all_disks, base_points = Disks(core, browsing), BasePoints(core)
    protection = Protection(core, children, all_disks, base_points)
    jobs = Jobs(core.state.run / "jobs.json", core.clock, core.log)
    trials = Trials(core, all_disks)
    drills = Drills(trials, Accels(), protection.machine)
    isolated = Isolated(drills)
    recoveries = Recoveries(core, all_disks, protection, drills, isolated)
    freezer = Freezer(core)
    marks = Marks(core, protection, freezer)
    sampler = Sampler(core, protection)
    attached = Attached(core, all_disks)
    backups = Backups(core, jobs)
    parts = Parts(children, all_disks, protection, jobs, recoveries, marks, sampler, attached, backups)
    await core.thread(all_disks.finish_what_was_left)
    if stopping.is_set():
        return
    async with trio.open_nursery() as nursery:
        await nursery.start(jobs.keep_running)
        await nursery.start(trials.keep_running)
        nursery.start_soon(nightly.keep_drilling, core, drills, jobs)
        nursery.start_soon(base_points.keep_cutting)
        nursery.start_soon(all_disks.pruning.keep_pruning)
        nursery.start_soon(browsing.keep_running)
        nursery.start_soon(watch_wall_clock, core)
        nursery.start_soon(tails.watch, core, children.targets)
        await nursery.start(freezer.run)
        await nursery.start(protection.run)
        await nursery.start(recoveries.keep_running)
        nursery.start_soon(Schedule(core, marks).keep_marking)
        nursery.start_soon(sampler.keep_sampling)
        nursery.start_soon(Scrubbing(core).keep_scrubbing)
        nursery.start_soon(attached.keep_tidy)
        nursery.start_soon(backups.keep_backing_up)
        async with trio.open_nursery() as requests:
            await requests.start(_serve_api, core, parts, roles, listeners, stopping)
            core.log.emit("service.ready", api=str(core.state.api_socket), pid=os.getpid())
            notify.ready()
        nursery.cancel_scope.cancel()


async def _serve_api(
    core: Core,
    parts: Parts,
    roles: Roles,
    listeners: Listeners,
    stopping: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    app = api.build(core, parts, roles, stopping)
    certificates, tcp = core.config.tls_certificates, listeners.api_tcp
    secured = None if tcp is None or certificates is None else (tcp, tls.server_context(certificates))
    await api.serve(
        app, listeners.api, roles, core.log, secured=secured, until=stopping, task_status=task_status
    )


async def watch_wall_clock(core: Core) -> None:
    """Points carry our clock's time, people look at the wall: a jump between them is an event."""
    before = wall_difference_ns(core.clock)
    while True:
        await trio.sleep(WALL_LOOK_S)
        now = wall_difference_ns(core.clock)
        if abs(now - before) > WALL_JUMP_NS:
            core.log.emit("service.wall-clock-jump", level="warning", jump_ns=now - before, ahead_ns=now)
        before = now
