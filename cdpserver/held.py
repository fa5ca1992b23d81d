"""A point that is held while somebody reads it: resolved, leased, and looked at again."""

from pathlib import Path

from cdpserver import groups
from cdpserver import timeline as timeline_file
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock
from cdpserver.errors import RemovedError
from cdpserver.journal.log import Position
from cdpserver.leases import Lease
from cdpserver.names import Seq, When
from cdpserver.points import Timeline as Points
from cdpserver.state import StateDir
from cdpserver.view.history import History
from cdpserver.view.view import View


def open_history(catalog: Catalog, state_dir: Path, name: str) -> History:
    """The history of a disk or fork. NotFoundError, or RemovedError while it is being removed."""
    entry = catalog.get(name)
    if entry is None:
        raise groups.no_disk(catalog, name)
    if entry.state != "live":
        raise RemovedError(f"{name} is being removed")
    return History(state_dir, timeline_file.load(StateDir(state_dir).timeline(entry.id)))


def hold(history: History, when: When, now_ns: int) -> tuple[Position, Lease]:
    """The place of an instant, and its lease: it is there, and stays."""
    position = Points(history).resolve(when, now_ns=now_ns)
    lease = Lease.take(history.directory, position.seq)
    try:
        # It may have been dropped between the look and the lease.
        history.journal.refresh()
        return Points(history).resolve(Seq(position.seq), now_ns=now_ns), lease
    except BaseException:
        lease.close()
        raise


class HeldPoint:
    """The view of `NAME@WHEN`, which stays while this is open. Needs no service, only the state directory."""

    def __init__(self, state: StateDir, name: str, when: When) -> None:
        """NotFoundError, RefusedError if there is no such disk or instant."""
        with Catalog.open(state, writable=False) as catalog:
            self._history = open_history(catalog, state.path, name)
        try:
            now_ns = Clock.for_reading(state.clock).now_ns()
            self.position, self._lease = hold(self._history, when, now_ns)
            try:
                self.view = View(self._history, self.position.seq)
            except BaseException:
                self._lease.close()
                raise
        except BaseException:
            self._history.close()
            raise
        self.name = f"{name}@seq:{self.position.seq}"

    def close(self) -> None:
        """The lease's grace begins."""
        self.view.close()
        self._lease.close()
        self._history.close()
