"""Which timelines are forks of which."""

from cdpserver import timeline
from cdpserver.catalog import Catalog
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.state import StateDir
from cdpserver.timeline import PointBase, Timeline


class Forks:
    """The forks of every timeline, also those that are being removed.

    What a timeline stands on never changes: each is read once for as long as the catalog stays as it is.
    """

    def __init__(self, state: StateDir, catalog: Catalog) -> None:
        self._state, self._catalog = state, catalog
        self._stamp: object = None
        self._of: dict[str, list[tuple[PointBase, Timeline]]] = {}
        self._unreadable: dict[str, tuple[str, str]] = {}

    def of(self, id: str) -> list[tuple[PointBase, Timeline]]:
        """The forks of a timeline, those of its oldest instants first, each with where it starts.

        Another that could not be read may stand anywhere: CorruptError.
        """
        # The stamp first: what changes after it is read again the next time.
        stamp = self._catalog.stamp()
        if stamp != self._stamp:
            self._read()
            self._stamp = stamp
        for other, (message, hint) in self._unreadable.items():
            if other != id:
                raise CorruptError(message, hint=hint)
        return sorted(self._of.get(id, []), key=lambda fork: (fork[0].seq, fork[1].id))

    def _read(self) -> None:
        self._of, self._unreadable = {}, {}
        for entry in self._catalog.names().values():
            try:
                line = timeline.load(self._state.timeline(entry.id))
            except NotFoundError:
                if entry.state != "removing":
                    message = f"the timeline of {entry.name} is missing, and may be a fork"
                    self._unreadable[entry.id] = message, f"cdp disk remove {entry.name} if it is lost"
            except CorruptError as error:
                self._unreadable[entry.id] = f"{entry.name} may be a fork: {error.message}", error.hint
            else:
                if isinstance(line.base, PointBase):
                    self._of.setdefault(line.base.timeline, []).append((line.base, line))


def forks_of(state: StateDir, catalog: Catalog, id: str) -> list[tuple[PointBase, Timeline]]:
    """The forks of one timeline; see Forks."""
    return Forks(state, catalog).of(id)
