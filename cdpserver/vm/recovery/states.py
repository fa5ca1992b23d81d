"""The states of a recovery, and what leads from one to the next. Pure.

    running/waiting ──connected──► copying/copying ──ready──► pivoting/pivoting ──pivoted──► done/home ──commit──► done/committed
          │                              │                          │                          │  ▲
          ├──────────── fail ────────────┴──────────────────────────┤                         undo └─ fail, abort ┐
          │                                                         ▼                          ▼                  │
          └──abort──► aborted/stopped ◄──abort── failed/... ──retry──► running/waiting   copying/undoing ─────────┤
                                                                                               │ready             │
                                            aborted/undone ◄───────────pivoted─────────── pivoting/undoing ───────┘

In every state but *done* the VM's newest content is in the forks; in *done* it is at home. When streaming it is at home from the
start; *discard* of what was stopped lets go of it.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from cdpserver.errors import RefusedError

State: TypeAlias = Literal["running", "copying", "pivoting", "done", "failed", "aborted"]
Phase: TypeAlias = Literal[
    "waiting", "copying", "pivoting", "home", "committed", "undoing", "stopped", "undone"
]
Step: TypeAlias = Literal[
    "connected", "ready", "pivoted", "fail", "abort", "retry", "undo", "discard", "commit"
]


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a recovery is."""

    state: State
    phase: Phase


BEGIN = Stage("running", "waiting")
COPYING = Stage("copying", "copying")
PIVOTING = Stage("pivoting", "pivoting")
HOME = Stage("done", "home")
COMMITTED = Stage("done", "committed")
UNDOING = Stage("copying", "undoing")
PIVOTING_BACK = Stage("pivoting", "undoing")
FAILED_WAITING = Stage("failed", "waiting")
FAILED_COPYING = Stage("failed", "copying")
FAILED_PIVOTING = Stage("failed", "pivoting")
FAILED_UNDOING = Stage("failed", "undoing")
STOPPED = Stage("aborted", "stopped")
UNDONE = Stage("aborted", "undone")

NEXT: dict[Stage, dict[Step, Stage]] = {
    BEGIN: {"connected": COPYING, "fail": FAILED_WAITING, "abort": STOPPED},
    COPYING: {"ready": PIVOTING, "fail": FAILED_COPYING, "abort": STOPPED},
    PIVOTING: {"pivoted": HOME, "fail": FAILED_PIVOTING},
    HOME: {"commit": COMMITTED, "undo": UNDOING, "discard": UNDONE},
    COMMITTED: {},
    UNDOING: {"ready": PIVOTING_BACK, "fail": HOME, "abort": HOME},
    PIVOTING_BACK: {"pivoted": UNDONE, "fail": FAILED_UNDOING},
    FAILED_WAITING: {"retry": BEGIN, "abort": STOPPED},
    FAILED_COPYING: {"retry": BEGIN, "abort": STOPPED},
    FAILED_PIVOTING: {"retry": BEGIN},
    FAILED_UNDOING: {"undo": UNDOING},
    STOPPED: {"retry": BEGIN, "discard": UNDONE},
    UNDONE: {"retry": BEGIN},
}

ACTIVE = frozenset({BEGIN, COPYING, PIVOTING, UNDOING, PIVOTING_BACK})
"""The service is at work on these, and goes on with them after a restart."""

BACKWARD = frozenset({UNDOING, PIVOTING_BACK})

OVER = frozenset({COMMITTED, STOPPED, UNDONE})
"""Nothing of the recovery needs its forks any more, unless its VM runs on them."""

_HINTS: dict[Step, str] = {
    "abort": "once it has pivoted: cdp recover undo",
    "commit": "commit a recovery whose VM is home: cdp recover list",
    "undo": "undo is for a recovery that is done and not committed: cdp recover list",
    "discard": "undo is for a recovery that is done and not committed: cdp recover list",
    "retry": "retry is for one that failed or was aborted; after a failed undo: cdp recover undo",
}


def follow(stage: Stage, step: Step, name: str) -> Stage:
    """The stage that `step` leads to. RefusedError where it leads nowhere; `name` is the recovery's."""
    found = NEXT[stage].get(step)
    if found is None:
        raise RefusedError(
            f"{name} is {stage.state} ({stage.phase}): no {step} now",
            hint=_HINTS.get(step, "cdp recover list"),
        )
    return found
