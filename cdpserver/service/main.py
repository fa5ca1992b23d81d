"""`cdpserver`: the service in the foreground.

    lock -> upgrade -> clock -> catalog                                   sync, before anything listens (`prepare`)
      sockets: kept from before, or made                       (`listeners`, `keeper`)
        children: workers, export, indexer; an earlier service's are taken over
          left-overs, scheduler, watches, control API          ready          (`operations`)
    stop: API, scheduler, the workers shut their journals, children are killed; the sockets are kept for a while

Lifetimes are nested as drawn. Children hold nothing that must survive, so killing them is always right.
Imported here is what is needed until the children start, since guests wait for that: the rest is loaded beside their start.
At SIGHUP the process becomes a new program with a new configuration; its children serve until the new one takes them over.
"""

import argparse
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

import cdpserver
from cdpserver import events, tls
from cdpserver.config import SECOND_NS, Settings
from cdpserver.errors import CdpError, RefusedError
from cdpserver.service import again, inventory, keeper, notify, processes
from cdpserver.service.children import READY_S, Children
from cdpserver.service.control import Targets
from cdpserver.service.core import Core
from cdpserver.service.links import link_sockets
from cdpserver.service.listeners import Listeners
from cdpserver.service.options import options
from cdpserver.service.prepare import bring_up_to_date, prepare
from cdpserver.service.roles import Roles
from cdpserver.state import StateDir, default_state_dir

SHUT_S = 20.0
"""How long the target may take to make its journals durable at a stop; then it is killed all the same, losing nothing."""

PING_S = 2.0
"""A target that is not there has nothing to close."""


@dataclass
class Stop:
    """How the service is told to end."""

    asked: trio.Event = field(default_factory=trio.Event)
    again: bool = False
    """To go on as a new program, which takes the children over."""


async def serve(core: Core, children: Children, listeners: Listeners, kept_by: keeper.Keeper) -> bool:
    """Everything that runs, until a signal says stop. True when a new program is to go on."""
    roles = Roles.of(core.config)
    # Who may do what is asked of each connection.
    core.state.api_socket.chmod(0o666 if roles.groups else 0o600)
    stop = Stop()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with children.running(lambda: link_sockets(core)), trio.open_nursery() as nursery:
            nursery.start_soon(kept_by.stay)
            nursery.start_soon(notify.feed_watchdog)
            with trio.CancelScope() as starting:
                nursery.start_soon(stop_at_signal, signals, stop, starting, core)
                operate = await trio.to_thread.run_sync(_load_operations, abandon_on_cancel=True)
                await children_answer(core, children)
            if not stop.asked.is_set():
                await operate(core, children, listeners, roles, stop.asked)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                if stop.again:
                    children.keep_for_next()
                    notify.reloading()
                else:
                    notify.stopping()
                    await shut_targets(core)
    return stop.again


def _load_operations() -> Callable[[Core, Children, Listeners, Roles, trio.Event], Awaitable[None]]:
    """Most of what the service imports: the children start meanwhile, and guests wait for these alone."""
    from cdpserver.service import operations

    return operations.run


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
