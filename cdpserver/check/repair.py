"""Repair: what can be made anew from what is whole, planned from what a check found, and done only when the operator has seen it.

    check -> plan (steps, and what no step mends) -> digest -> apply, step by step, each of them safe to repeat

Invariants: no step takes away what can still be read. A step that would leave less than there is (an index whose records are
damaged too) is no step. What is dropped is unreadable as a whole, nothing needs it, and it is set aside rather than deleted.
Durability: `repair.json` has the plan while it is being carried out; whoever comes after an interruption goes on with that.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cdpserver import basepoint, durable, qemu, timeline
from cdpserver.catalog import Catalog
from cdpserver.chain import lock
from cdpserver.chain.holds import holds
from cdpserver.check import Report, check_timeline, waiting
from cdpserver.check.depth import Everything
from cdpserver.cuts import find_cut
from cdpserver.errors import CdpError, CorruptError
from cdpserver.index.indexer import rebuild
from cdpserver.index.merged import DIRECTORY as MERGED
from cdpserver.journal import links
from cdpserver.nodes import (
    NUMBERED,
    base_point_path,
    leave_out,
    note_path,
    published,
    read_header,
    without_note,
)
from cdpserver.state import StateDir
from cdpserver.view.history import History

FILE = "repair.json"
ASIDE = ".damaged"

Kind: TypeAlias = Literal["note", "index", "base-point", "drop", "chain", "leave-out"]

Serve: TypeAlias = Callable[[], AbstractContextManager[Path]]
"""Serves the state directory's points on the socket that it gives."""


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """One thing to do. `number` is an interval (0: merged indexes) or a base point; 0 for the chain."""

    kind: Kind
    number: int

    @property
    def says(self) -> str:
        """What it does, for the operator."""
        match self.kind:
            case "note":
                return f"write the note of bp:{self.number} anew, from the journal"
            case "index" if self.number == 0:
                return "remove the merged indexes; the indexer makes them anew"
            case "index":
                return f"make the index of interval {self.number} anew, from its records"
            case "base-point":
                return f"make bp:{self.number} anew, from the journal"
            case "drop":
                return f"set bp:{self.number} aside: it cannot be read, the journal does not have it, and nothing needs it"
            case "chain":
                return (
                    "set the hash chain aside and begin another one: history before it is not proven any more"
                )
            case "leave-out":
                return (
                    f"leave bp:{self.number} out, since what it would hold rotted: "
                    "the next one stands on the one before it, and holds what changed since"
                )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a repair would do, and what is left damaged after it, in sentences."""

    disk: str
    steps: tuple[Step, ...]
    left: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names this very plan."""
        told = json.dumps([self.disk, [asdict(step) for step in self.steps]], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "disk": self.disk,
            "plan": self.digest,
            "steps": [{**asdict(step), "says": step.says} for step in self.steps],
            "left": list(self.left),
        }


def look(state: StateDir, catalog: Catalog, disk: str, id: str, *, boot_id: str, full: bool = False) -> Plan:
    """The plan for what is damaged now; that of an interrupted repair first."""
    with contextlib.suppress(FileNotFoundError):
        return _interrupted(state.timeline(id) / FILE)
    report = check_timeline(state.path, id, boot_id=boot_id, depth=Everything(content=full), chain=True)
    return _plan(state, catalog, disk, id, report)


def _plan(state: StateDir, catalog: Catalog, disk: str, id: str, report: Report) -> Plan:
    directory = state.timeline(id)
    harmed = _harmed_intervals(report)
    steps: set[Step] = {Step("note", number) for number in without_note(directory)}
    left: list[str] = []
    for damage in report.damage:
        found, path = damage.finding, damage.finding.path
        match = NUMBERED.fullmatch(path.name)
        if MERGED in (path.parent.name, path.name):
            steps.add(Step("index", 0))
        elif path.suffix == ".mdb" and path.parent.name.isdigit():
            interval = int(path.parent.name)
            if interval in harmed:
                left.append(f"{found.what}: it stays as it is, since records of the interval are damaged too")
            else:
                steps.add(Step("index", interval))
        elif match and Step("note", int(match[1])) not in steps:
            step = _base_point_step(state, catalog, id, int(match[1]))
            if step is not None:
                steps.add(step)
            else:
                left.append(f"{found.what}: {found.hint}")
        elif path == directory / links.FILE:
            steps.add(Step("chain", 0))
        elif not match:
            left.append(f"{found.what}: {found.hint}")
    if harmed or any(damage.finding.path.suffix == ".raw" for damage in report.damage):
        found_waiting = _waiting(state, id)
        steps |= {Step("leave-out", number) for number in found_waiting.left_out}
        left += [found_waiting.says] if found_waiting.says else []
    order = {
        kind: at for at, kind in enumerate(("chain", "note", "index", "base-point", "drop", "leave-out"))
    }
    return Plan(disk, tuple(sorted(steps, key=lambda step: (order[step.kind], step.number))), tuple(left))


def _harmed_intervals(report: Report) -> set[int]:
    """Intervals with a header log or payload that is damaged."""
    paths = (damage.finding.path for damage in report.damage)
    return {
        int(path.parent.name)
        for path in paths
        if path.suffix in (".log", ".data") and path.parent.name.isdigit()
    }


def _base_point_step(state: StateDir, catalog: Catalog, id: str, number: int) -> Step | None:
    """What can be done about a damaged base point."""
    directory = state.timeline(id)
    try:
        if _journal_has(state, id, number):
            return Step("base-point", number)
    except CdpError:
        return None  # the journal cannot be read there now
    if _readable(base_point_path(directory, number)) or _stood_on(directory, number):
        return None
    try:
        held = holds(state, catalog, id)
    except CdpError:
        return None
    return Step("drop", number) if held.get(number) == [] else None


def _journal_has(state: StateDir, id: str, number: int) -> bool:
    """Can a base point be made anew?"""
    with contextlib.closing(History(state.path, timeline.load(state.timeline(id)))) as history:
        basepoint.all_cuts(history)
        cut = None if history.journal.empty else find_cut(history.journal, number)
        return cut is not None and bool(history.standing(cut.seq)[0])


def _waiting(state: StateDir, id: str) -> waiting.Waiting:
    try:
        with contextlib.closing(History(state.path, timeline.load(state.timeline(id)))) as history:
            return waiting.look(history)
    except CdpError:
        return waiting.Waiting()  # said already: neither cuts nor what they stand on can be read


def _readable(path: Path) -> bool:
    """May any of its content be had? Only what is no QCOW2 file, or has no sound tables, is lost as a whole."""
    try:
        read_header(path)
        qemu.check(path)
    except CorruptError:
        return False
    return True


def _stood_on(directory: Path, number: int) -> bool:
    """Does another base point name it as its backing file? Also one that cannot be read might."""
    for other in published(directory):
        try:
            backing = read_header(base_point_path(directory, other))[0] if other != number else ""
        except CorruptError:
            return True
        if backing == base_point_path(directory, number).name:
            return True
    return False


# --- carrying it out


def apply(
    state: StateDir,
    plan: Plan,
    id: str,
    *,
    boot_id: str,
    serve: Serve,
    tell: Callable[[Step], None] = lambda _: None,
) -> None:
    """Carry a plan out. Whoever is interrupted can say the same again. RefusedError where something holds what a step needs."""
    directory = state.timeline(id)
    durable.write_json(
        directory / FILE,
        {"disk": plan.disk, "steps": [asdict(s) for s in plan.steps], "left": list(plan.left)},
    )
    for step in plan.steps:
        tell(step)
        _do(state, id, step, boot_id=boot_id, serve=serve, disk=plan.disk)
    (directory / FILE).unlink()
    durable.fsync_dir(directory)


def _interrupted(path: Path) -> Plan:
    value = durable.read_json(path)
    try:
        steps = tuple(Step(row["kind"], row["number"]) for row in value["steps"])
        return Plan(value["disk"], steps, tuple(value["left"]))
    except (KeyError, TypeError):
        raise durable.corrupt_json(path, "it is no plan of a repair") from None


def _do(state: StateDir, id: str, step: Step, *, boot_id: str, serve: Serve, disk: str) -> None:
    directory = state.timeline(id)
    match step.kind:
        case "note":
            basepoint.note_what_is_missing(state, directory)
        case "index" if step.number == 0:
            for path in (directory / MERGED).glob("[0-9]*"):
                path.unlink()
        case "index":
            rebuild(directory, boot_id, only=step.number)
        case "base-point":
            _make_anew(state, id, step.number, serve, disk)
        case "drop":
            _set_aside(base_point_path(directory, step.number), note_path(directory, step.number))
        case "chain":
            _begin_chain(directory)
        case "leave-out":
            leave_out(directory, step.number)


def _make_anew(state: StateDir, id: str, number: int, serve: Serve, disk: str) -> None:
    history = History(state.path, timeline.load(state.timeline(id)))
    with contextlib.closing(history), serve() as socket:
        basepoint.rebuild(state, history, number, export=disk, socket=socket)


def _set_aside(path: Path, note: Path) -> None:
    with lock.alone(path.parent):
        if path.exists():
            os.rename(path, _free(path))
        note.unlink(missing_ok=True)  # without its file it means nothing
        durable.fsync_dir(path.parent)


def _begin_chain(directory: Path) -> None:
    uuid = timeline.load(directory).uuid
    try:
        usable = links.read(directory)[0] == uuid
    except FileNotFoundError:
        usable = True
    except CorruptError:
        usable = False
    if not usable:
        os.rename(directory / links.FILE, _free(directory / links.FILE))
    with links.Chain.open(directory, uuid) as chain:
        chain.catch_up(1 << 62, anew=True)


def _free(path: Path) -> Path:
    """A name beside it for what is set aside."""
    return next(found for found in _names(path) if not found.exists())


def _names(path: Path) -> Iterator[Path]:
    number = 1
    while True:
        yield path.with_name(f"{path.name}{ASIDE}-{number}")
        number += 1
