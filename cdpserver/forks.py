"""Which timelines are forks of which."""

from cdpserver import timeline
from cdpserver.catalog import Catalog
from cdpserver.catalog.derived import Derived
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.state import StateDir
from cdpserver.timeline import PointBase, Timeline


class Forks:
    """The forks of every timeline, also those that are being removed.

    What a timeline stands on never changes: each is read once for as long as the catalog stays as it is.
    """

    def __init__(self, state: StateDir, catalog: Catalog) -> None:
        self._read = Derived(catalog, lambda: _Read(state, catalog))

    def of(self, id: str) -> list[tuple[PointBase, Timeline]]:
        """The forks of a timeline, those of its oldest instants first, each with where it starts.

        Another that could not be read may stand anywhere: CorruptError.
        """
        read = self._read.now()
        for other, (message, hint) in read.unreadable.items():
            if other != id:
                raise CorruptError(message, hint=hint)
        return sorted(read.forks.get(id, []), key=lambda fork: (fork[0].seq, fork[1].id))


class _Read:
    """All timelines: the forks by what they are forks of, and by id why one could not be read, with a hint."""

    def __init__(self, state: StateDir, catalog: Catalog) -> None:
        self.forks: dict[str, list[tuple[PointBase, Timeline]]] = {}
        self.unreadable: dict[str, tuple[str, str]] = {}
        for entry in catalog.names().values():
            try:
                line = timeline.load(state.timeline(entry.id))
            except NotFoundError:
                if entry.state != "removing":
                    message = f"the timeline of {entry.name} is missing, and may be a fork"
                    self.unreadable[entry.id] = message, f"cdp disk remove {entry.name} if it is lost"
            except CorruptError as error:
                self.unreadable[entry.id] = f"{entry.name} may be a fork: {error.message}", error.hint
            else:
                if isinstance(line.base, PointBase):
                    self.forks.setdefault(line.base.timeline, []).append((line.base, line))


def forks_of(state: StateDir, catalog: Catalog, id: str) -> list[tuple[PointBase, Timeline]]:
    """The forks of one timeline; see Forks."""
    return Forks(state, catalog).of(id)
