"""Why a base point must stay. Every reason is a sentence for the operator.

A view of an instant walks the journal's intervals downwards and stands on a base point only where they end: on the one that
closed the first interval that is gone. So while the interval before is there, nothing that is read through the journal needs a
base point.
"""

from cdpserver import leases
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock
from cdpserver.errors import CdpError, CorruptError
from cdpserver.forks import forks_of
from cdpserver.journal.log import interval_path
from cdpserver.locks import locked_points
from cdpserver.nodes import Node, base_point_path, nodes, published, read_header, without_note
from cdpserver.state import StateDir
from cdpserver.timeline import Timeline

NEWEST = "the next base point will stand on it"


def now_ns(state: StateDir) -> int:
    """The server's time, for a process that has only the files. 0, when no lock has expired, if nobody knows it."""
    try:
        return Clock.load(state.clock).now_ns()
    except (CdpError, OSError):
        return 0


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
    for base, fork in forks_of(state, catalog, id):
        for node in held:
            if node.seq == base.seq and not _has(state, id, node.interval):
                reasons[node.number].append(f"the fork {fork.full_name} starts at it")
    return reasons


def _has(state: StateDir, id: str, interval: int) -> bool:
    return interval_path(state.timeline(id), interval).is_dir()


def _carries_history(state: StateDir, id: str, node: Node) -> bool:
    return not _has(state, id, node.interval) and _has(state, id, node.interval + 1)


def _descendants(state: StateDir, catalog: Catalog, id: str) -> list[Timeline]:
    """Forks, and forks of forks: one without base points of its own lets those on it stand on its parent's."""
    found = [fork for _, fork in forks_of(state, catalog, id)]
    for fork in tuple(found):
        found += _descendants(state, catalog, fork.id)
    return found


def _stood_on(state: StateDir, fork: Timeline, id: str) -> set[int]:
    """Which base points of timeline `id` the files of a fork name as their backing file."""
    directory = state.timeline(fork.id)
    found = set()
    for number in published(directory):
        try:
            backing, _ = read_header(base_point_path(directory, number))
        except FileNotFoundError:  # merged away meanwhile: what took it over stands on what it stood on
            return _stood_on(state, fork, id)
        if backing.startswith(f"../{id}/bp-") and backing.endswith(".qcow2"):
            found.add(int(backing.removeprefix(f"../{id}/bp-").removesuffix(".qcow2")))
    return found
