"""The search for the last good of many points, by as few questions as possible. Pure.

    good . . . . . . ? . . . . . . bad        halves, until the two are next to each other

Where a point cannot be judged, its neighbours are asked, nearest first: what is left then is a good point, some that nobody can
judge, and a bad one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cdpserver.errors import RefusedError

Verdict: TypeAlias = Literal["good", "bad", "skip"]


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a search: numbers of points. What lies between could not be judged."""

    good: int
    bad: int


def next_question(count: int, verdicts: Mapping[int, Verdict]) -> int | Found:
    """Of `count` points in order, the first good and the last bad, which is to be asked next; or what was found.

    RefusedError if the verdicts contradict each other: a good one after a bad one.
    """
    good = max((number for number, verdict in verdicts.items() if verdict == "good"), default=0)
    bad = min((number for number, verdict in verdicts.items() if verdict == "bad"), default=count - 1)
    if good >= bad:
        raise RefusedError(
            "a later point is good than one that is bad",
            hint="the script's answers do not come from the point alone",
        )
    open_ones = [number for number in range(good + 1, bad) if verdicts.get(number) != "skip"]
    if not open_ones:
        return Found(good, bad)
    middle = (good + bad) // 2
    return min(open_ones, key=lambda number: (abs(number - middle), number))
