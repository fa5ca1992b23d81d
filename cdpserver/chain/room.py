"""Keeping chains short: how long the chain under a disk is, and which automatic base points make room for a new one.

`manual.json` in a timeline names the base points that somebody asked for, and so does the note beside each; all others were cut
by the clock. Of these some go, of the disk's own or of what it is a fork of, so that those that stay are spread over the time
that the chain covers: only where an old enough base point is left can the history before it be dropped.

    before a new one   |  4h  |  4h  |  4h  | 20m | 20m |
    what goes                                     ^        two of 20 minutes become one of 40; those of 4 hours stay

Cost: a merge writes what two spans changed. As long as neither is much longer than the other, whatever was written is written
again each time that its span grows by half, so about log(longest span / time between two base points) times in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cdpserver import durable
from cdpserver.catalog import Catalog
from cdpserver.chain.holds import holds
from cdpserver.errors import CorruptError
from cdpserver.nodes import MANUAL, base_point_path, listed_manual, nodes, published, read_header
from cdpserver.state import StateDir
from cdpserver.timeline import PointBase, load

WIDE = 1.5
"""A span is wide past so many times what it would be in an even chain. With less, spans could not meet that fit together."""

LOPSIDED = 2 / 3
"""Two spans are merged out of turn if one has more than this of both: its data would be written anew for little."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A base point of a chain, and which instant it holds; `free` if it may go by itself."""

    timeline: str
    number: int
    free: bool
    time_ns: int


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
    times = {id: {node.number: node.time_ns for node in nodes(state.timeline(id))} for id in ids}
    return [Slot(id, n, n not in asked[id] and not held[id].get(n), times[id][n]) for id, n in places]


def make_room(chain: Sequence[Slot], too_many: int) -> Pull | None:
    """The pull that leaves a chain most evenly spread in time, of at most `too_many` free base points in a row. Pure.

    None if none is free. The first, below which there is nothing to be spread, goes only where no other may; of several that are
    as good, the earliest.
    """
    best = min(_runs(chain, too_many), key=lambda run: _price(chain, too_many, *run), default=None)
    if best is None:
        return None
    at, end = best
    below = chain[at - 1] if at and chain[at - 1].timeline == chain[at].timeline else None
    return Pull(chain[at].timeline, chain[end].number, below.number if below else None, end - at)


def _runs(chain: Sequence[Slot], most: int) -> Iterator[tuple[int, int]]:
    """Each [start, end) of the chain that may go, at most so long. What follows is of the same timeline: a fork's holds them."""
    for at, slot in enumerate(chain):
        for end in range(at + 1, min(at + most, len(chain) - 1) + 1):
            if not (chain[end - 1].free and chain[end].timeline == slot.timeline):
                break
            yield at, end


def _price(chain: Sequence[Slot], too_many: int, at: int, end: int) -> tuple[bool, bool, int, bool, int]:
    """What is the better to go the less it is."""
    times = [slot.time_ns for slot in chain[max(at - 1, 0) : end + 1]]
    span = times[-1] - times[0]
    left = max(1, len(chain) - 1 - too_many)
    wide = span * left > WIDE * (chain[-1].time_ns - chain[0].time_ns)
    longest = max(later - earlier for earlier, later in pairwise(times))
    # One merge of many costs less than many, as long as it leaves no hole.
    count = end - at if wide else at - end
    return at == 0, wide, count, longest > LOPSIDED * span, span
