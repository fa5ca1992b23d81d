"""When indexes are merged: the indexer's side. One process at a time does it, so that indexing never waits for it."""

import subprocess
import sys
from pathlib import Path

from cdpserver.index import merging

LOOK_S = 600.0
"""How often every timeline is looked at: what thinning or a failed merge left. One that has closed an interval is at once."""

AT_ONCE = 16
"""Timelines given to one process; it takes a third of a second to begin."""

LOOKS = 32
"""Timelines looked at between two steps of the indexer, each in under a millisecond."""

DYING = ("setpriv", "--pdeathsig", "KILL", "--")


class Merger:
    """Which timelines are to be looked at, and the process that merges."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._wanted: dict[Path, None] = {}
        self._due: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._looked = -LOOK_S

    def want(self, timeline: Path) -> None:
        """It has closed an interval."""
        self._wanted[timeline] = None

    def step(self, now: float, timelines: list[Path]) -> None:
        """Look at some that are wanted, or at all when it is time; start a process if there is none."""
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._wanted |= dict.fromkeys(timelines)
        for timeline in list(self._wanted)[:LOOKS]:
            del self._wanted[timeline]
            if timeline not in self._due and _due(timeline):
                self._due.append(timeline)
        if self._process is not None and self._process.poll() is None:
            return
        self._process = None
        if self._due:
            names, self._due = [path.name for path in self._due[:AT_ONCE]], self._due[AT_ONCE:]
            command = [sys.executable, "-m", "cdpserver.index.merging", "--state-dir", str(self._state_dir)]
            self._process = subprocess.Popen([*DYING, *command, *names], stdin=subprocess.DEVNULL)


def _due(timeline: Path) -> bool:
    try:
        return merging.due(timeline)
    except OSError:
        return False  # it is being removed, or cannot be read, which others say
