"""Why a base point must stay. Every reason is a sentence for the operator.

A view of an instant walks the journal's intervals downwards and stands on a base point only where they end: on the one that
closed the first interval that is gone. So while the interval before is there, nothing that is read through the journal needs a
base point.
"""

from cdpserver import leases, timeline
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock
from cdpserver.errors import CdpError, CorruptError
from cdpserver.journal.log import interval_path
from cdpserver.nodes import Node, base_point_path, nodes, published, read_header, without_note
from cdpserver.state import StateDir
from cdpserver.timeline import PointBase, Timeline

NEWEST = "the next base point will stand on it"


def locked_points(catalog: Catalog, id: str, *, now_ns: int) -> dict[int, int]:
    """Locked instants of a timeline: seq to time. CorruptError for a lock that cannot be read: it may hold anything."""
    found = {}
    for row in catalog.rows("locks").values():
        line, seq, time_ns, until_ns = (
            row.fields.get(key) for key in ("timeline", "seq", "time_ns", "until_ns")
        )
        if not isinstance(line, str) or type(seq) is not int or type(time_ns) is not int:
            raise CorruptError(
                f"lock {row.id} in the catalog cannot be read",
                hint="a newer cdpserver wrote it: use that one",
            )
        if line == id and (until_ns is None or now_ns < until_ns):
            found[seq] = time_ns
    return found


def now_ns(state: StateDir) -> int:
    """The server's time, for a process that has only the files. 0, when no lock has expired, if nobody knows it."""
    try:
        return Clock.load(state.clock).now_ns()
    except (CdpError, OSError):
        return 0


def forks_of(state: StateDir, catalog: Catalog, id: str) -> list[Timeline]:
    """The timelines that are forks of a timeline, oldest first. One that cannot be read stands in the way: CorruptError."""
    found = []
    for entry in catalog.names().values():
        try:
            line = timeline.load(state.timeline(entry.id))
        except CorruptError as error:
            raise CorruptError(f"{entry.name} may be a fork: {error.message}", hint=error.hint) from None
        except CdpError:
            continue  # it is just being removed
        if isinstance(line.base, PointBase) and line.base.timeline == id:
            found.append(line)
    return sorted(found, key=lambda line: (line.base.seq if isinstance(line.base, PointBase) else 0, line.id))


def holds(state: StateDir, catalog: Catalog, id: str) -> dict[int, list[str]]:
    """For each base point of a timeline why it must stay; empty if it may go. CorruptError where that cannot be known."""
    directory = state.timeline(id)
    if lost := without_note(directory):
        raise CorruptError(
            f"the note bp-{lost[0]}.json is lost or damaged, so nobody knows what needs bp:{lost[0]}",
            hint="restart cdpserver: it writes it anew from the journal",
        )
    held = nodes(directory)
    reasons: dict[int, list[str]] = {node.number: [] for node in held}
    if held:
        reasons[held[-1].number].append(NEWEST)
    locked = locked_points(catalog, id, now_ns=now_ns(state))
    for node in held:
        if node.seq in locked:
            reasons[node.number].append("it is locked")
        if _carries_history(state, id, node):
            reasons[node.number].append(
                "the journal after it reads from it, since what was before is dropped"
            )
    for seq in leases.held(directory, now_ns=now_ns(state)):
        for node in held:
            if node.seq == seq and not _has(state, id, node.interval):
                reasons[node.number].append("it is open, or was a moment ago")
    for fork in _descendants(state, catalog, id):
        for number in _stood_on(state, fork, id):
            if number in reasons:
                reasons[number].append(f"the fork {fork.full_name} stands on it")
        assert isinstance(fork.base, PointBase)
        if fork.base.timeline == id:
            for node in held:
                if node.seq == fork.base.seq and not _has(state, id, node.interval):
                    reasons[node.number].append(f"the fork {fork.full_name} starts at it")
    return reasons


def _has(state: StateDir, id: str, interval: int) -> bool:
    return interval_path(state.timeline(id), interval).is_dir()


def _carries_history(state: StateDir, id: str, node: Node) -> bool:
    return not _has(state, id, node.interval) and _has(state, id, node.interval + 1)


def _descendants(state: StateDir, catalog: Catalog, id: str) -> list[Timeline]:
    """Forks, and forks of forks: one without base points of its own lets those on it stand on its parent's."""
    found = forks_of(state, catalog, id)
    for fork in tuple(found):
        found += _descendants(state, catalog, fork.id)
    return found


def _stood_on(state: StateDir, fork: Timeline, id: str) -> set[int]:
    """Which base points of timeline `id` the files of a fork name as their backing file."""
    directory = state.timeline(fork.id)
    found = set()
    for number in published(directory):
        backing, _ = read_header(base_point_path(directory, number))
        if backing.startswith(f"../{id}/bp-") and backing.endswith(".qcow2"):
            found.add(int(backing.removeprefix(f"../{id}/bp-").removesuffix(".qcow2")))
    return found
