"""`cdpserver`: the service in the foreground.

    lock -> upgrade -> clock -> catalog                                   sync, before anything listens (`prepare`)
      sockets: kept from before, or made                       (`listeners`, `keeper`)
        children: workers, export, indexer; an earlier service's are taken over
          left-overs, scheduler, watches of the workers and of the wall clock
            control API                                        ready
    stop: API, scheduler, the workers shut their journals, children are killed; the sockets are kept for a while

Lifetimes are nested as drawn. Children hold nothing that must survive, so killing them is always right.
At SIGHUP the process becomes a new program with a new configuration; its children serve until the new one takes them over.
"""

import argparse
import importlib
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

import cdpserver
from cdpserver import events, tls
from cdpserver.clock import wall_difference_ns
from cdpserver.config import SECOND_NS, Settings
from cdpserver.errors import CdpError, RefusedError
from cdpserver.service import again, disks, inventory, keeper, nightly, notify, processes, tails
from cdpserver.service.attached import Attached
from cdpserver.service.backups import Backups
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.browsing import Browsing
from cdpserver.service.children import READY_S, Children
from cdpserver.service.control import Targets
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.drills import Drills
from cdpserver.service.freezer import Freezer
from cdpserver.service.isolated import Isolated
from cdpserver.service.jobs import Jobs
from cdpserver.service.launched import Accels
from cdpserver.service.listeners import Listeners
from cdpserver.service.marks import Marks
from cdpserver.service.options import options
from cdpserver.service.parts import Parts
from cdpserver.service.prepare import bring_up_to_date, prepare
from cdpserver.service.protection import Protection
from cdpserver.service.recoveries import Recoveries
from cdpserver.service.roles import Roles
from cdpserver.service.sampler import Sampler
from cdpserver.service.schedule import Schedule
from cdpserver.service.scrubbing import Scrubbing
from cdpserver.service.trials import Trials
from cdpserver.state import StateDir, default_state_dir

SHUT_S = 20.0
"""How long the target may take to make its journals durable at a stop; then it is killed all the same, losing nothing."""

PING_S = 2.0
"""A target that is not there has nothing to close."""

WALL_LOOK_S = 1.0
WALL_JUMP_NS = 250_000_000
"""A clock that is slewed drifts by 0.5 ms a second at most; more than this was set by somebody."""


@dataclass
class Stop:
    """How the service is told to end."""

    asked: trio.Event = field(default_factory=trio.Event)
    again: bool = False
    """To go on as a new program, which takes the children over."""


async def serve(core: Core, children: Children, listeners: Listeners, kept_by: keeper.Keeper) -> bool:
    """Everything that runs, until a signal says stop. True when a new program is to go on."""
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
    parts = Parts(children, all_disks, protection, jobs, recoveries, marks, sampler, attached)
    roles = Roles.of(core.config)
    # Who may do what is asked of each connection.
    core.state.api_socket.chmod(0o666 if roles.groups else 0o600)
    stop = Stop()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with children.running(lambda: disks.link_sockets(core)), trio.open_nursery() as nursery:
            nursery.start_soon(kept_by.stay)
            nursery.start_soon(notify.feed_watchdog)
            with trio.CancelScope() as starting:
                nursery.start_soon(stop_at_signal, signals, stop, starting, core)
                api: Any = await trio.to_thread.run_sync(_load_api, abandon_on_cancel=True)
                await children_answer(core, children)
                await core.thread(all_disks.finish_what_was_left)
            if not stop.asked.is_set():
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
                nursery.start_soon(Backups(core, jobs).keep_backing_up)
                app = api.build(core, parts, roles, stop.asked)
                async with trio.open_nursery() as requests:
                    await requests.start(_serve_api, api, app, core, roles, listeners, stop)
                    core.log.emit("service.ready", api=str(core.state.api_socket), pid=os.getpid())
                    notify.ready()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                if stop.again:
                    children.keep_for_next()
                    notify.reloading()
                else:
                    notify.stopping()
                    await shut_targets(core)
    return stop.again


def _load_api() -> Any:
    """FastAPI takes half a second to import; the children start meanwhile."""
    return importlib.import_module("cdpserver.service.api")


async def _serve_api(
    api: Any,
    app: Any,
    core: Core,
    roles: Roles,
    listeners: Listeners,
    stop: Stop,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    certificates, tcp = core.config.tls_certificates, listeners.api_tcp
    secured = None if tcp is None or certificates is None else (tcp, tls.server_context(certificates))
    await api.serve(
        app, listeners.api, roles, core.log, secured=secured, until=stop.asked, task_status=task_status
    )


async def stop_at_signal(
    signals: AsyncIterator[int], stop: Stop, starting: trio.CancelScope, core: Core
) -> None:
    """At a signal ask for the end, and don't wait for children that are still starting.

    A new program that would not start is no reason to end: it is said, and the old one goes on.
    """
    async for number in signals:
        stop.again = number == signal.SIGHUP
        if stop.again and (wrong := await again.what_is_wrong()):
            core.log.emit("service.restart-refused", level="error", reason=wrong)
            continue
        core.log.emit(
            "service.restarting" if stop.again else "service.stopping", signal=signal.Signals(number).name
        )
        stop.asked.set()
        starting.cancel()
        return


async def children_answer(core: Core, children: Children) -> None:
    """Wait until the NBD servers serve; a child that doesn't is said aloud and the service goes on, to be asked about it."""
    with trio.move_on_after(READY_S) as scope:
        await children.ready()
    if scope.cancelled_caught:
        core.log.emit("service.children-silent", level="error", seconds=READY_S)


async def watch_wall_clock(core: Core) -> None:
    """Points carry our clock's time, people look at the wall: a jump between them is an event."""
    before = wall_difference_ns(core.clock)
    while True:
        await trio.sleep(WALL_LOOK_S)
        now = wall_difference_ns(core.clock)
        if abs(now - before) > WALL_JUMP_NS:
            core.log.emit("service.wall-clock-jump", level="warning", jump_ns=now - before, ahead_ns=now)
        before = now


async def shut_targets(core: Core) -> None:
    """Let the workers make everything durable and close; killing them afterwards is clean."""
    count, failed = await core.targets.shut_all(ping_s=PING_S, shut_s=SHUT_S)
    core.log.emit("service.journals-closed", disks=count)
    for reason in failed:
        core.log.emit("service.journals-left-open", level="warning", reason=reason)


def open_sockets(listeners: Listeners, orphans: list[Path], log: events.EventLog) -> list[Path]:
    """Take or make the listening sockets; the orphans that still serve.

    A port that is taken may be held by a child of the earlier service, whose keeper is gone: then that one ends first.
    """
    try:
        kept = listeners.open()
    except RefusedError:
        if not orphans:
            raise
        for name in processes.kill_orphans(orphans):
            log.emit("service.orphan-killed", level="warning", child=name)
        kept, orphans = listeners.open(), []
    if kept:
        log.emit("service.sockets-kept", sockets=kept)
    if listeners.dropped:
        log.emit("service.sockets-dropped", sockets=listeners.dropped)
    return orphans


def run(chosen: argparse.Namespace) -> bool:
    """The life of the service. True when a new program is to go on. Raises CdpError for what stands in its way at the start."""
    config = Settings.collect(chosen.config, chosen).config
    tls.check_files(config.tls_certificates, config.tls_psk)
    # Segments, indexes and connections of many disks; the children inherit it.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # What we and our processes make is for our own user; who else may read a recovered disk is for its directory's owner to say.
    os.umask(0o077)
    state = StateDir.create_or_open(default_state_dir(chosen.state_dir))
    events.configure("cdpserver")
    log = events.EventLog(state.events)
    with state.lock():
        had_events = inventory.had_events(state)
        log.emit(
            "service.starting", version=cdpserver.__version__, state_dir=str(state.path), pid=os.getpid()
        )
        Roles.of(config).open_up(state)
        orphans = bring_up_to_date(state, log, allowed=not chosen.no_upgrade, had_events=had_events)
        if chosen.upgrade_only:
            return False
        clock, catalog = prepare(state, log)
        kept_by = keeper.choose(state.run, linger_s=config.socket_linger_ns / SECOND_NS, log=log)
        listeners = Listeners(state, config, kept_by)
        goes_on = False
        try:
            with catalog:
                orphans = open_sockets(listeners, orphans, log)
                children = Children(state, config, log, listeners, orphans)
                core = Core(state, config, clock, catalog, log, Targets(state, config.workers))
                goes_on = trio.run(serve, core, children, listeners, kept_by, strict_exception_groups=True)
        finally:
            listeners.close(for_self=goes_on)
        log.emit("service.stopped")
    return goes_on


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes are those of cdpserver.errors."""
    try:
        chosen = options(arguments)
        if chosen.show_config:
            settings = Settings.collect(chosen.config, chosen)
            # What would stop the start: a group that does not exist, a certificate that cannot be read.
            Roles.of(settings.config)
            tls.check_files(settings.config.tls_certificates, settings.config.tls_psk)
            sys.stdout.write(settings.to_toml())
        elif run(chosen):
            again.go_on()
    except CdpError as error:
        sys.stderr.write(f"cdpserver: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
