"""Base points that cannot be made, since what they would hold rotted, and which of them later ones can do without.

    published   bp:3
    cut               bp:4   bp:5   bp:6   now
    rotted             x      x                   4 and 5 are left out; bp:6 stands on bp:3 and holds all that changed since
    rotted             x      x      x      x     nothing is left out yet: what is written there again ends it

Rotted is a payload, or the header of a record. What such a record changed nobody knows where no index has it: then all of the
disk has to be written again.

Reads only, and verifies what it reads: a base point is made of what is whole, or not at all. The journal keeps the instants of
those that are left out, as far as they can be read.
"""

import contextlib
from dataclasses import dataclass

from cdpserver import basepoint
from cdpserver.cuts import Cut
from cdpserver.errors import CorruptError
from cdpserver.view.delta import Delta
from cdpserver.view.extent import Files
from cdpserver.view.history import History
from cdpserver.view.view import View

STEP = 1 << 20
"""Longest read."""

AFTER_ALL = 1 << 62
"""A number beyond that of any base point: one that is cut now."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Cuts that are to be left out; or, where that would not help, a sentence that says why and what does."""

    left_out: tuple[int, ...] = ()
    says: str = ""


def look(history: History) -> Waiting:
    """Which base points that are still to be published have rotted. RefusedError where they wait for something else."""
    rotted: list[int] = []
    problem = ""
    for cut in basepoint.pending(history):
        problem = _unnoted(history, cut) or _problem(history, cut.seq, basepoint.ground(history, cut.number))
        if not problem:
            return Waiting(tuple(rotted))
        rotted.append(cut.number)
    if not rotted:
        return Waiting()
    problem = _problem(history, history.journal.last().seq, basepoint.ground(history, AFTER_ALL))
    if not problem:
        return Waiting(tuple(rotted))
    return Waiting(
        says=f"bp:{rotted[0]} and those after it wait ({problem}): once these bytes are written again, by the guest or "
        "a copy of the whole disk (cdp protect VM --remove, then cdp protect VM), a repair leaves out what rotted"
    )


def _unnoted(history: History, cut: Cut) -> str:
    """Why nobody can tell what counts at a cut; empty if that is known."""
    try:
        basepoint.note(history, cut)
    except CorruptError as error:
        return error.message
    return ""


def _problem(history: History, seq: int, under: basepoint.Backing) -> str:
    """Why no base point can be made of an instant; empty if it can."""
    try:
        with (
            contextlib.closing(View(history, seq, Files(verify=True))) as new,
            contextlib.closing(View(under.history, under.seq)) as old,
        ):
            for start, end in Delta(new, old).ranges:
                _read(new, start, end)
    except CorruptError as error:
        return error.message
    return ""


def _read(view: View, start: int, end: int) -> None:
    at = start
    while at < end:
        for low, high, zero in view.status(at, end, one=False):
            for place in range(low, high, STEP) if not zero else ():
                view.read(place, min(STEP, high - place))
            at = high
