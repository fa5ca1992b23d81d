"""What our processes and the store take over time, and whether it stays bounded.

Caches fill in the first quarter, and history grows to what the policy keeps. From there on the last quarter's median is not above
the second's by more than a stated part and a stated amount.
"""

import contextlib
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tools.measure.processes import memory as memory_of

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Bound:
    """By how much the end may be above the beginning: so many times, and so much."""

    times: float
    more: float


MEMORY = Bound(1.25, 16 * MIB)
FILES = Bound(1.1, 16)
"""A client costs some files while it is there (docs/reliability.md: Open files), and there are a few at any time, so quarters
differ by what those have open; what is left of clients that are gone adds up."""

DELETED = Bound(0, 16)
"""Of files of the store that are open without a name, however many there were: only what was dropped a moment ago, or since a
client that is still there began to read it."""

ROOM = Bound(1.25, 64 * MIB)


class Series:
    """Values over time, each with a name."""

    def __init__(self) -> None:
        self.values: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, name: str, at_s: float, value: float) -> None:
        self.values[name].append((at_s, value))

    def highest(self, name: str) -> float:
        return max(value for _, value in self.values[name])

    def ends(self, name: str, since_s: float) -> tuple[float, float]:
        """The medians of the second quarter and of the last, of what was seen from `since_s` on."""
        values = [value for at_s, value in self.values[name] if at_s >= since_s]
        quarter = math.ceil(len(values) / 4)
        return median(values[quarter : 2 * quarter] or values), median(values[-quarter:])

    def grown(self, name: str, since_s: float, bound: Bound) -> str:
        """What is to be said of a series that does not stay within its bound; empty if it does."""
        early, late = self.ends(name, since_s)
        limit = early * bound.times + bound.more
        return f"{name} grew from {early:,.0f} to {late:,.0f}, past {limit:,.0f}" if late > limit else ""


def sample(series: Series, at_s: float, processes: Mapping[str, list[int]], store: Path, used: int) -> None:
    """One look at everything. A process that ends meanwhile is left out."""
    series.add("store bytes", at_s, used)
    for kind, pids in processes.items():
        with contextlib.suppress(OSError, StopIteration):
            memory = sum(map(memory_of, pids))
            files = [path for pid in pids for path in open_files(pid)]
            series.add(f"{kind} memory", at_s, memory)
            series.add(f"{kind} files", at_s, len(files))
            series.add(f"{kind} deleted", at_s, len(deleted(files, store)))


def open_files(pid: int) -> list[str]:
    """What a process has open, by the names that the kernel has for it."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def deleted(files: list[str], store: Path) -> list[str]:
    """Those below a directory that have lost their names."""
    return [path for path in files if path.startswith(f"{store}/") and path.endswith(" (deleted)")]
