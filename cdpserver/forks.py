"""Which timelines are forks of a timeline."""

from cdpserver import timeline
from cdpserver.catalog import Catalog
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.state import StateDir
from cdpserver.timeline import PointBase, Timeline


def forks_of(state: StateDir, catalog: Catalog, id: str) -> list[tuple[PointBase, Timeline]]:
    """The forks of a timeline, those of its oldest instants first, also ones that are being removed, each with where it starts.

    One that cannot be read may stand anywhere: CorruptError.
    """
    found = []
    for other in catalog.names().values():
        if other.id == id:
            continue
        try:
            line = timeline.load(state.timeline(other.id))
        except NotFoundError:
            if other.state == "removing":
                continue
            raise CorruptError(
                f"the timeline of {other.name} is missing, and may be a fork",
                hint=f"cdp disk remove {other.name} if it is lost",
            ) from None
        except CorruptError as error:
            raise CorruptError(f"{other.name} may be a fork: {error.message}", hint=error.hint) from None
        if isinstance(line.base, PointBase) and line.base.timeline == id:
            found.append((line.base, line))
    return sorted(found, key=lambda fork: (fork[0].seq, fork[1].id))
