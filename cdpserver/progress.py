"""How far long work is: a fraction from 0 to 1, told to whoever waits for it.

A process of ours tells the service in lines on its standard output, `{"progress": 0.25}`, before the line of its answer.
Inside the service who wants to hear puts a function into `hearer`; the work between need not know of it.
"""

import json
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeAlias

Progress: TypeAlias = Callable[[float], None]


def nobody(_: float) -> None:
    """For work that nobody watches."""


hearer: ContextVar[Progress] = ContextVar("hearer", default=nobody)
"""Who hears of the work that is done in this context."""

_LEAST = 0.005
"""Closer steps are not told: nobody sees them."""


def part(progress: Progress, start: float, end: float) -> Progress:
    """Tells the progress of a part of the work, from `start` to `end` of the whole."""
    return lambda fraction: progress(start + (end - start) * min(max(fraction, 0.0), 1.0))


def to_stdout() -> Progress:
    """Tells the process that started this one."""
    told = 0.0

    def tell(fraction: float) -> None:
        nonlocal told
        if fraction - told >= _LEAST:
            told = fraction
            sys.stdout.write(json.dumps({"progress": round(fraction, 4)}) + "\n")
            sys.stdout.flush()

    return tell


def read_line(line: bytes) -> float | None:
    """The fraction in a line of such a process; None for any other line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.keys() != {"progress"}:
        return None
    fraction = value["progress"]
    return float(fraction) if isinstance(fraction, int | float) else None
