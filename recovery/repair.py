"""`cdp repair`: the plan first; it is carried out when its digest is said. Works on the files, and needs no service."""

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cdpserver import events
from cdpserver.catalog import Catalog
from cdpserver.clock import boot_id
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.state import StateDir, default_state_dir
from recovery.local import timeline_of
from recovery.opened import alone
from recovery.output import answer, answer_json, say

if TYPE_CHECKING:
    from cdpserver.check.repair import Plan


def repair(options: Namespace) -> None:
    """Show what would be done; with --apply do it. CorruptError after the answer if something stays damaged."""
    from cdpserver.check.repair import apply, look

    state = StateDir.open(default_state_dir(options.state_dir))
    id = timeline_of(state, options.disk)

    def plan() -> "Plan":
        with Catalog.open(state, writable=False) as catalog:
            return look(state, catalog, options.disk, id, boot_id=boot_id(), full=options.full)

    found = plan()
    if options.apply is None:
        _answer(found, options)
        if found.steps or found.left:
            raise CorruptError(
                f"{options.disk} is damaged",
                hint=f"cdp repair {options.disk} --apply {found.digest}"
                if found.steps
                else "cdp check says what it touches",
            )
        return
    if options.apply != found.digest:
        raise RefusedError(
            f"{options.apply} is not the plan for what is damaged now",
            hint=f"look at it: cdp repair {options.disk}",
        )
    log = events.EventLog(state.events)
    log.record(
        "repair.begun", disk=options.disk, plan=found.digest, steps=[step.says for step in found.steps]
    )
    apply(
        state,
        found,
        id,
        boot_id=boot_id(),
        serve=lambda: _serving(state),
        tell=lambda step: say(step.says),
    )
    after = plan()
    log.record("repair.ended", disk=options.disk, plan=found.digest, left=list(after.left))
    _answer(after, options)
    if after.steps or after.left:
        raise CorruptError(f"{options.disk} is still damaged", hint=f"cdp repair {options.disk} says where")


def _answer(plan: "Plan", options: Namespace) -> None:
    if options.json:
        answer_json(plan.as_dict())
        return
    if not plan.steps and not plan.left:
        answer(f"{plan.disk} is whole: nothing to repair")
    for step in plan.steps:
        answer(f"would {step.says}")
    for what in plan.left:
        answer(f"stays damaged: {what}")
    if plan.steps:
        answer(f"plan {plan.digest}")


@contextlib.contextmanager
def _serving(state: StateDir) -> Iterator[Path]:
    """An export of our own, which ends with this process."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        socket = Path(directory) / "nbd"
        with alone("export", [f"state_dir={state.path}", "alone=1"], socket):
            yield socket
