"""Keeping chains short: how long the chain under a disk is, and which automatic base points make room for a new one.

`manual.json` in a timeline names the base points that somebody asked for, and so does the note beside each; all others were cut
by the clock. The earliest automatic one goes first, in the disk or in what it is a fork of; one that something needs is passed
over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdpserver import durable
from cdpserver.catalog import Catalog
from cdpserver.chain.holds import holds
from cdpserver.errors import CorruptError
from cdpserver.nodes import MANUAL, base_point_path, listed_manual, nodes, published, read_header
from cdpserver.state import StateDir
from cdpserver.timeline import PointBase, load


@dataclass(frozen=True, slots=True)
class Slot:
    """A base point of a chain; `free` if it may go by itself."""

    timeline: str
    number: int
    free: bool


@dataclass(frozen=True, slots=True)
class Pull:
    """What makes room: in `timeline` those between `base` and `number` go, or all below it."""

    timeline: str
    number: int
    base: int | None
    count: int


def manual(directory: Path) -> set[int]:
    """The base points of a timeline that somebody asked for: as listed, and as their notes say. CorruptError."""
    return listed_manual(directory) | {node.number for node in nodes(directory) if node.manual}


def add_manual(directory: Path, number: int) -> None:
    """Note that somebody asked for a base point, before it is published; durable on return. Those that are gone are forgotten."""
    there = set(published(directory))
    numbers = sorted({old for old in manual(directory) if old in there} | {number})
    durable.write_json(directory / MANUAL, {"numbers": numbers})


def chain(state: StateDir, id: str) -> list[tuple[str, int]]:
    """The chain that the next base point of a timeline will stand on, oldest first: (timeline, number)."""
    directory = state.timeline(id)
    numbers = published(directory)
    if not numbers:
        base = load(directory).base
        # The first of a fork stands on one of its parent's; the newest is the worst case.
        return chain(state, base.timeline) if isinstance(base, PointBase) else []
    found: list[tuple[str, int]] = []
    path = base_point_path(directory, numbers[-1])
    while path.suffix == ".qcow2":
        place = (path.parent.name, int(path.stem.removeprefix("bp-")))
        if place in found:
            raise CorruptError(f"{path} stands on itself", hint="cdp check says what it touches")
        found.append(place)
        path = path.parent.joinpath(read_header(path)[0]).resolve()
    return found[::-1]


def slots(state: StateDir, catalog: Catalog, places: Sequence[tuple[str, int]]) -> list[Slot]:
    """Which base points of a chain may go by themselves."""
    ids = {id for id, _ in places}
    asked = {id: manual(state.timeline(id)) for id in ids}
    held = {id: holds(state, catalog, id) for id in ids}
    return [Slot(id, n, n not in asked[id] and not held[id].get(n)) for id, n in places]


def make_room(chain: Sequence[Slot], too_many: int) -> Pull | None:
    """The pull that removes the earliest free base points, up to `too_many` in a row; None if none is free. Pure."""
    for at, slot in enumerate(chain):
        if not slot.free:
            continue
        end = at
        while end - at < too_many and chain[end].free and chain[end].timeline == slot.timeline:
            end += 1
            if end == len(chain):
                return None  # the newest of a chain is never free
        if chain[end].timeline != slot.timeline:
            continue  # its successor is the file of a fork, and holds it
        below = chain[at - 1] if at and chain[at - 1].timeline == slot.timeline else None
        return Pull(slot.timeline, chain[end].number, below.number if below else None, end - at)
    return None
