"""Before anything listens: the state directory is made ready, with the server's lock held.

Children that an earlier service left may still serve; nothing here disturbs them.
"""

from pathlib import Path

from cdpserver import durable, events, offtime
from cdpserver.catalog import Catalog
from cdpserver.chain import merge
from cdpserver.clock import Clock, fix_clock
from cdpserver.config import SECOND_NS
from cdpserver.errors import CdpError, CorruptError
from cdpserver.journal.log import Journal
from cdpserver.names import format_time
from cdpserver.service import inventory, processes
from cdpserver.service.children import serves
from cdpserver.state import VERSION, StateDir
from cdpserver.upgrade import check_current, upgrade


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
    """Take away what crashes left over."""
    for directory in (state.path, state.bases, state.timelines, *state.timelines.iterdir()):
        if directory.is_dir():
            durable.sweep(directory)


def bring_up_to_date(
    state: StateDir, log: events.EventLog, *, allowed: bool, had_events: bool = True
) -> list[Path]:
    """Upgrade the directory's format, before anything reads it; the files of the children that still serve."""
    if not allowed:
        check_current(state)
    if not had_events:
        inventory.say_events_lost(log)
    orphans = _end_orphans(state, log)
    upgrade(state, log)
    return orphans


def _end_orphans(state: StateDir, log: events.EventLog) -> list[Path]:
    """End what an earlier service left running, but for what serves clients and can be taken over."""
    left = processes.orphans(state.run)
    go_on = _orphans_may_go_on(state)
    kill = [file for file in left if not (go_on and serves(processes.name_of(file)))]
    for name in processes.kill_orphans(kill):
        log.emit("service.orphan-killed", level="warning", child=name)
    return [file for file in left if file.exists()]


def _orphans_may_go_on(state: StateDir) -> bool:
    """Will their files and their clock still be those of the service? Else they would write beside it."""
    try:
        Clock.load(state.clock)
    except (CdpError, OSError):
        return False
    return state.version() == VERSION


def prepare(state: StateDir, log: events.EventLog) -> tuple[Clock, Catalog]:
    """Make the directory ready: the clock is fixed, the catalog is whole."""
    sweep(state)
    inventory.look_at_clock(state, log)
    inventory.look_at_key(state, log)
    newest = [0]

    def last_ns() -> int:
        newest[0] = last_stored_ns(state)
        return newest[0]

    def note(clock: Clock) -> None:
        """While the host was off nothing grew older: durable before anybody can ask the new clock."""
        now_ns = clock.now_ns()
        try:
            noted = offtime.note(state, newest[0], now_ns)
        except CorruptError as error:
            log.emit("service.boots-damaged", level="error", reason=str(error))
            return
        if noted:
            seconds = (now_ns - newest[0]) // SECOND_NS
            log.emit("service.was-off", off_s=seconds, meaning="history and locks do not age by this time")

    clock, fresh = fix_clock(state.clock, last_ns, note)
    if fresh:
        log.emit("service.clock-fixed", boot_id=clock.boot_id, now=format_time(clock.now_ns()))
    for sentence in Catalog.recover(state):
        log.emit("service.catalog-recovered", level="warning", said=sentence)
    done, failed = merge.finish_all(state)
    for sentence in done:
        log.emit("snapshot.finished", said=sentence)
    for sentence in failed:
        log.emit("snapshot.unfinished", level="warning", reason=sentence)
    catalog = Catalog.open(state, writable=True)
    inventory.look(state, log, [entry.id for entry in catalog.names().values() if entry.state == "live"])
    return clock, catalog
