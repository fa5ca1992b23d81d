"""Who comes first, of the processor and of memory: guests' writes.

Base points, retention, scrubbing, backups and QEMU's programs for them take the processor last, and are the first that the kernel
kills where memory runs out: a job that is killed is done again. Then come the export and the indexer, which are there again at
once, and last the workers, which guests wait for.
"""

import contextlib
import os
from pathlib import Path

NICE = 10
"""Beside a worker that wants all of a processor it gets about a tenth. The kernel takes the priority of its I/O from that."""

EXPENDABLE = 500
"""OOM score of a job: as if it held half of all memory more than it does."""

AFTER_JOBS = 250
"""By how much the export's and the indexer's is above the workers'."""

_OOM_SCORE = Path("/proc/self/oom_score_adj")
_HIGHEST = 1000


def behind_writes() -> list[str]:
    """What goes before a command, so that it runs at NICE and EXPENDABLE: no lower where this process does already."""
    score = max(EXPENDABLE, int(_OOM_SCORE.read_text()))
    nice = max(0, NICE - os.getpriority(os.PRIO_PROCESS, 0))
    return ["choom", "-n", str(score), "--", "nice", "-n", str(nice)]


def go_before_workers() -> None:
    """Where memory runs out the kernel is to kill this process rather than one that writes journals."""
    with contextlib.suppress(OSError):  # a container may not let it
        _OOM_SCORE.write_text(str(min(_HIGHEST, int(_OOM_SCORE.read_text()) + AFTER_JOBS)))
