"""`cdpserver`: the service in the foreground.

    lock -> orphans -> upgrade -> clock -> catalog -> left-overs          sync, before anything listens
      sockets
        children (target, export, indexer)
          scheduler, watches of the target and of the wall clock
            control API                                        ready
    stop: API, scheduler, target shuts its journals, children are killed

Lifetimes are nested as drawn. Children hold nothing that must survive, so killing them is always right.
"""

import argparse
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence

import trio
from fastapi import FastAPI

import cdpserver
from cdpserver import durable, events
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock, fix_clock, wall_difference_ns
from cdpserver.config import Settings
from cdpserver.errors import CdpError
from cdpserver.journal.log import Journal
from cdpserver.names import format_time
from cdpserver.service import api, inventory, processes, tails
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.children import READY_S, Children, bind_unix, wait_for_greeting
from cdpserver.service.control import TargetControl
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.service.instants import Instants
from cdpserver.service.jobs import Jobs
from cdpserver.service.options import options
from cdpserver.service.roles import Roles
from cdpserver.state import StateDir, default_state_dir
from cdpserver.upgrade import check_current, upgrade

SHUT_S = 20.0
"""How long the target may take to make its journals durable at a stop; then it is killed all the same, losing nothing."""

PING_S = 2.0
"""A target that is not there has nothing to close."""

WALL_LOOK_S = 1.0
WALL_JUMP_NS = 250_000_000
"""A clock that is slewed drifts by 0.5 ms a second at most; more than this was set by somebody."""


# --- before anything listens


def last_stored_ns(state: StateDir) -> int:
    """The newest time in any journal. A damaged one is passed over: its writer goes by its own last time anyway."""
    newest = 0
    for directory in state.timelines.iterdir():
        try:
            journal = Journal(directory)
            if not journal.empty:
                newest = max(newest, journal.last().time_ns)
            journal.close()
        except (CdpError, OSError) as error:
            events.EventLog(state.events).emit(
                "service.time-unknown", level="warning", timeline=directory.name, reason=str(error)
            )
    return newest


def sweep(state: StateDir) -> None:
    """Take away what crashes left over, with the server's lock held and no child running."""
    for directory in (state.path, state.bases, state.timelines, *state.timelines.iterdir()):
        if directory.is_dir():
            durable.sweep(directory)
    for path in state.run.iterdir():
        if path.suffix in (".sock", ".ctl"):
            path.unlink()


def bring_up_to_date(
    state: StateDir, log: events.EventLog, *, allowed: bool, had_events: bool = True
) -> None:
    """Upgrade the directory's format, before anything reads it. An orphan of an older server would read it too."""
    if not allowed:
        check_current(state)
    if not had_events:
        inventory.say_events_lost(log)
    for name in processes.kill_orphans(state.run):
        log.emit("service.orphan-killed", level="warning", child=name)
    upgrade(state, log)


def prepare(state: StateDir, log: events.EventLog) -> tuple[Clock, Catalog]:
    """Make the directory ready: the clock is fixed, the catalog is whole."""
    sweep(state)
    inventory.look_at_clock(state, log)
    clock, fresh = fix_clock(state.clock, lambda: last_stored_ns(state))
    if fresh:
        log.emit("service.clock-fixed", boot_id=clock.boot_id, now=format_time(clock.now_ns()))
    for sentence in Catalog.recover(state):
        log.emit("service.catalog-recovered", level="warning", said=sentence)
    inventory.look(state, log)
    return clock, Catalog.open(state, writable=True)


# --- running


async def serve(core: Core, children: Children) -> None:
    """Everything that runs, until a signal says stop."""
    disks, instants, base_points = Disks(core), Instants(core), BasePoints(core)
    stopping = trio.Event()
    roles = Roles.of(core.config)
    jobs = Jobs(core.state.run / "jobs.json", core.clock, core.log)
    await core.thread(disks.finish_what_was_left)
    app = api.build(core, children, disks, instants, base_points, jobs, roles, stopping)
    children.bind()
    listener = bind_unix(core.state.api_socket)
    if roles.groups:
        core.state.api_socket.chmod(0o666)  # who may do what is asked of each connection
    try:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with children.running(), trio.open_nursery() as nursery:
                with trio.CancelScope() as starting:
                    nursery.start_soon(stop_at_signal, signals, stopping, starting, core)
                    await children_answer(core)
                if not stopping.is_set():
                    await nursery.start(jobs.keep_running)
                    nursery.start_soon(base_points.keep_cutting)
                    nursery.start_soon(watch_wall_clock, core)
                    nursery.start_soon(tails.watch, core, children.target)
                    async with trio.open_nursery() as requests:
                        await requests.start(_serve_api, core, app, roles, listener, stopping)
                        core.log.emit("service.ready", api=str(core.state.api_socket), pid=os.getpid())
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await shut_target(core)
    finally:
        listener.close()
        core.state.api_socket.unlink(missing_ok=True)
        children.close()


async def _serve_api(
    core: Core,
    app: FastAPI,
    roles: Roles,
    listener: socket.socket,
    stopping: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    await api.serve(app, listener, roles, core.log, until=stopping, task_status=task_status)


async def stop_at_signal(
    signals: AsyncIterator[int], stopping: trio.Event, starting: trio.CancelScope, core: Core
) -> None:
    """At the first SIGTERM or SIGINT: set the event, and don't wait for children that are still starting."""
    async for number in signals:
        core.log.emit("service.stopping", signal=signal.Signals(number).name)
        stopping.set()
        starting.cancel()
        return


async def children_answer(core: Core) -> None:
    """Wait until both NBD servers speak; a child that doesn't is said aloud and the service goes on, to be asked about it."""
    with trio.move_on_after(READY_S) as scope:
        await wait_for_greeting(core.state.target_socket)
        await wait_for_greeting(core.state.export_socket)
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


async def shut_target(core: Core) -> None:
    """Let the target make everything durable and close; killing it afterwards is clean."""
    try:
        with trio.fail_after(PING_S):
            await core.target.call("ping")
        with trio.fail_after(SHUT_S):
            count = await core.target.call("shut-all")
            core.log.emit("service.journals-closed", disks=count)
    except (CdpError, trio.TooSlowError) as error:
        core.log.emit("service.journals-left-open", level="warning", reason=str(error) or "it took too long")


def run(chosen: argparse.Namespace) -> None:
    """The whole life of the service. Raises CdpError for what stands in its way at the start."""
    config = Settings.collect(chosen.config, chosen).config
    # Segments, indexes and connections of many disks; the children inherit it.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    state = StateDir.create_or_open(default_state_dir(chosen.state_dir))
    events.configure("cdpserver")
    log = events.EventLog(state.events)
    with state.lock():
        had_events = inventory.had_events(state)
        log.emit(
            "service.starting", version=cdpserver.__version__, state_dir=str(state.path), pid=os.getpid()
        )
        Roles.of(config).open_up(state)
        bring_up_to_date(state, log, allowed=not chosen.no_upgrade, had_events=had_events)
        if chosen.upgrade_only:
            return
        clock, catalog = prepare(state, log)
        with catalog:
            children = Children(state, config, log)
            core = Core(state, config, clock, catalog, log, TargetControl(state.run / "target.ctl"))
            trio.run(serve, core, children, strict_exception_groups=True)
        log.emit("service.stopped")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes are those of cdpserver.errors."""
    try:
        chosen = options(arguments)
        if chosen.show_config:
            sys.stdout.write(Settings.collect(chosen.config, chosen).to_toml())
        else:
            run(chosen)
    except CdpError as error:
        sys.stderr.write(f"cdpserver: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
