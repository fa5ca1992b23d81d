"""Base points: QCOW2 external snapshots that stock QEMU tools write from a delta export of ours.

    base.raw <- bp-0 <- bp-1 <- ... <- bp-N        a disk; the arrow is "backing file of", by relative name
                          \\- ../t7/bp-0 <- ...     a fork of it

A cut is a control record; its base point is a file that appears later, whole or not at all (`publish`). Base points are
published in order, since each one backs the next. One whose content rotted is never
made; a repair leaves it out (`nodes.left_out`).
Durability: a published file is on stable storage, and so is what it stands on. A crash leaves at most a `.tmp-*` name, swept
at the next start.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cdpserver import durable, messages, qemu, sums, timeline
from cdpserver.catalog import Catalog
from cdpserver.chain import lock
from cdpserver.cuts import Cut, cuts, find_cut
from cdpserver.errors import CdpError, CorruptError, NotFoundError, RefusedError
from cdpserver.journal.log import FIRST_INTERVAL, Journal
from cdpserver.journal.record import CHANGES
from cdpserver.nodes import (
    ROTTED,
    Node,
    base_point_path,
    left_out,
    newest_at,
    nodes,
    without_note,
    write_note,
)
from cdpserver.progress import Progress, nobody, part, to_stdout
from cdpserver.state import StateDir
from cdpserver.timeline import BackupBase, ImageBase, PointBase
from cdpserver.view.chain import write_map
from cdpserver.view.delta import Delta
from cdpserver.view.extent import Files
from cdpserver.view.history import History
from cdpserver.view.view import View


@dataclass(frozen=True, slots=True)
class Backing:
    """What a base point stands on: a file, and the instant of a line of history that it holds."""

    path: Path
    format: str
    history: History
    seq: int


@dataclass(frozen=True, slots=True)
class DeltaViews:
    """The two instants between which base point `cut.number` is computed. `histories` stay the caller's to close."""

    cut: Cut
    new: View
    old: View
    histories: list[History]

    def close(self) -> None:
        """Close both views (not the histories)."""
        self.new.close()
        self.old.close()


def backing(history: History, cut: Cut) -> Backing:
    """What base point `cut` stands on now. RefusedError while that is not published or not durable yet."""
    published = nodes(history.directory)
    waiting = next((c for c in _after(published, history) if c.number < cut.number), None)
    if waiting is not None:
        raise RefusedError(
            f"base point {waiting.number} of {history.timeline.full_name} is not published yet",
            hint=f"base points are published in order; the events say why it failed, and cdp repair "
            f"{history.timeline.full_name} whether later ones can do without it",
        )
    return ground(history, cut.number)


def ground(history: History, number: int) -> Backing:
    """What base point `number` would stand on if no other were published before it. RefusedError where nothing is durable."""
    published = nodes(history.directory)
    below = [node for node in published if node.number < number]
    if below:
        return Backing(base_point_path(history.directory, below[-1].number), "qcow2", history, below[-1].seq)
    return _root(history)


def _after(published: list[Node], history: History) -> list[Cut]:
    """Cuts after the newest published base point. An older one that has no file was taken away, or left out."""
    newest, without = published[-1].number if published else -1, left_out(history.directory)
    return [cut for cut in all_cuts(history) if cut.number > newest and cut.number not in without]


def _root(history: History) -> Backing:
    """What the first base point of a timeline stands on."""
    base = history.timeline.base
    if isinstance(base, PointBase):
        assert history.parent is not None
        return _newest_before(history.parent, base.seq)
    if isinstance(base, ImageBase):
        return Backing(history.state_dir / base.file, "raw", history, 0)
    check_ground(history)
    if not (history.directory / "base.synced").exists():
        raise RefusedError(
            f"the base of {history.timeline.full_name} is not durable yet", hint="try again in a moment"
        )
    return Backing(history.directory / "base.raw", "raw", history, 0)


def _newest_before(history: History, seq: int) -> Backing:
    """The newest published base point at or before `seq`, in this timeline or one that it was forked from."""
    node = newest_at(history.directory, seq)
    if node is not None:
        return Backing(base_point_path(history.directory, node.number), "qcow2", history, node.seq)
    return _root(history)


def delta_views(state_dir: Path, history: History, number: int) -> DeltaViews:
    """The instants that base point `number` is computed from: its cut, and what its backing file holds.

    NotFoundError if there is no such cut, RefusedError while its backing file is still to come.
    """
    assert history.state_dir == state_dir
    cut = _cut(history, number)
    return _open_views(history, cut, backing(history, cut), Files())


def _open_views(history: History, cut: Cut, under: Backing, files: Files) -> DeltaViews:
    new = View(history, cut.seq, files)
    try:
        return DeltaViews(cut, new, View(under.history, under.seq), [history])
    except BaseException:
        new.close()
        raise


def _cut(history: History, number: int) -> Cut:
    name = history.timeline.full_name
    if history.journal.empty:
        history.journal.refresh()
    if not history.journal.empty:
        history.journal.newest()
        found = history.journal.settled(partial(find_cut, history.journal, number))
        if found is not None:
            return found
    raise NotFoundError(f"{name} has no base point {number}", hint=f"cdp bp list {name}")


def stands_on_backup(history: History) -> bool:
    """Does its lineage begin with a backup? Then no base point can be published, so none is cut."""
    if history.parent is not None:
        return stands_on_backup(history.parent)
    return isinstance(history.timeline.base, BackupBase)


def check_ground(history: History) -> None:
    """RefusedError where there is no file that a base point could stand on."""
    if stands_on_backup(history):
        raise RefusedError(
            f"{history.timeline.full_name} stands on a backup, which is no file that a base point could stand on",
            hint="cdp export writes it out; cdp backup run backs it up",
        )


def pending(history: History) -> list[Cut]:
    """Cuts whose base point is not published yet, oldest first."""
    return _after(nodes(history.directory), history)


def list_base_points(history: History) -> list[dict[str, Any]]:
    """The published base points, oldest first, as the CLI and the API show them."""
    return [describe(history, node) for node in nodes(history.directory)]


def describe(history: History, node: Node | Cut) -> dict[str, Any]:
    """One base point as the CLI and the API show it."""
    path = base_point_path(history.directory, node.number)
    return {"number": node.number, "path": str(path.resolve()), "time_ns": node.time_ns, "seq": node.seq}


def note(history: History, cut: Cut) -> Node:
    """What is noted of a cut: everything that the journal says of it."""
    state = history.journal.settled(partial(history.journal.state_at, cut.seq))
    return Node(
        cut.number,
        cut.seq,
        cut.time_ns,
        cut.interval,
        state.grade,
        state.session,
        state.evidence,
        state.observed,
    )


def all_cuts(history: History) -> list[Cut]:
    history.journal.refresh()
    return history.journal.settled(partial(_all_cuts, history.journal))


def _all_cuts(journal: Journal) -> list[Cut]:
    if journal.empty:
        return []
    journal.newest()
    return cuts(journal)


def changed_since_cut(history: History) -> bool:
    """Has anything been written since the newest cut, or since the history began?"""
    return history.journal.settled(partial(_changed_since_cut, history))


def _changed_since_cut(history: History) -> bool:
    held = all_cuts(history)
    after = held[-1].seq if held else 0
    if history.journal.empty:
        return False
    return any(
        ((run.records["kind"] >= CHANGES[0]) & (run.records["kind"] <= CHANGES[-1])).any()
        for run in history.journal.runs(after, history.journal.last().seq)
    )


def note_base_points(state: StateDir) -> None:
    """2 -> 3: a note beside every published base point, from the journal. May be repeated.

    A timeline that cannot be read is left alone: every start of the service tries again.
    """
    for directory in sorted(state.timelines.glob("t*")):
        with contextlib.suppress(CdpError, FileNotFoundError):
            note_what_is_missing(state, directory)


def note_what_is_missing(state: StateDir, directory: Path) -> tuple[list[int], list[int]]:
    """Write lost notes of a timeline's base points anew, as far as the journal has their cuts.

    Returns (numbers of those, numbers of those that nobody can tell any more).
    """
    numbers = without_note(directory)
    if not numbers:
        return [], []
    history = History(state.path, timeline.load(directory))
    try:
        held = {cut.number: note(history, cut) for cut in all_cuts(history)} | below_intervals(
            history.journal
        )
        for number in numbers:
            if number in held:
                write_note(directory, held[number])
    finally:
        history.close()
    return [n for n in numbers if n in held], [n for n in numbers if n not in held]


def below_intervals(journal: Journal) -> dict[int, Node]:
    """What stands in the place of dropped intervals, as the first segment after them says, which carries on from it."""
    found = {}
    for interval in journal.intervals:
        if interval > FIRST_INTERVAL and interval - 1 not in journal.intervals:
            first = journal.first_reader(interval)
            state, number = first.header.carry, first.header.carry.cuts - 1
            found[number] = Node(
                number,
                first.first_seq - 1,
                first.header.first_time_ns,
                interval - 1,
                state.grade,
                state.session,
                state.evidence,
                state.observed,
            )
    return found


# --- publishing


def drop_unfinished(timeline: Path, number: int) -> None:
    """Remove what a killed `publish` left of a base point. Nobody else may be writing it."""
    final = base_point_path(timeline, number)
    final.with_name(f"{durable.TEMPORARY}{final.name}").unlink(missing_ok=True)


def rebuild(
    state: StateDir,
    history: History,
    number: int,
    *,
    export: str,
    progress: Progress = nobody,
    socket: Path | None = None,
) -> dict[str, Any]:
    """Make a damaged or lost file of a base point anew: the same instant, from the journal, on what is below it now.

    What stands on it is whole again with it. RefusedError where the journal does not reach that instant any more.
    """
    name = history.timeline.full_name
    all_cuts(history)
    cut = None if history.journal.empty else find_cut(history.journal, number)
    if cut is None or history.standing(cut.seq)[0] == []:
        raise RefusedError(
            f"the journal does not have bp:{number} of {name} any more",
            hint="restore its file from a backup; cdp check says what it touches",
        )
    with lock.alone(history.directory):
        return publish(state, history, number, export=export, progress=progress, again=True, socket=socket)


def publish(
    state: StateDir,
    history: History,
    number: int,
    *,
    export: str,
    progress: Progress = nobody,
    again: bool = False,
    socket: Path | None = None,
) -> dict[str, Any]:
    """Make the file of base point `number`; on return it is durable and what it changes was read back and compared.

    `export` is the disk's name on the export's `socket`, by default the service's.
    A file that is there already is left alone, or replaced with
    `again`. On an error nothing has changed.
    """
    from cdpserver.readback import compare  # libnbd, which others that import this module have no use for

    cut = _cut(history, number)
    final = base_point_path(history.directory, number)
    if final.exists() and not again:
        return describe(history, cut)
    under = backing(history, cut)
    try:
        views = _open_views(history, cut, under, Files(verify=True))
    except CorruptError:
        _note_rotted(history.directory)
        raise
    building = final.with_name(f"{durable.TEMPORARY}{final.name}")
    try:
        building.unlink(missing_ok=True)
        # The export looks for the backing of a fork's first base point by itself. Should the parent publish one between
        # our look and its own, the file lacks what lies between, and comparing finds that.
        # What the comparison reads of the journal is verified: nothing that rotted gets sums of its own.
        uri = f"nbd+unix:///{export}@delta:{number}?socket={socket or state.export_socket}"
        qemu.convert_delta(
            uri, building, backing=under.path, format=under.format, progress=part(progress, 0.0, 0.5)
        )
        qemu.check(building)
        delta = Delta(views.new, views.old)
        with qemu.serve(building, state.run / f"bp-{history.timeline.id}.sock") as served:
            compare(served, delta, part(progress, 0.5, 1.0))
        building.chmod(0o400)
        with lock.standing_on(under.path, history.directory):
            write_note(history.directory, note(history, cut))
            durable.publish(building, final)
        # A view can ask qemu-img instead, and a scrub writes sums, so the base point counts without them.
        with contextlib.suppress(CdpError, OSError):
            write_map(final)
            sums.write(final)
        (history.directory / ROTTED).unlink(missing_ok=True)
    except BaseException as error:
        with contextlib.suppress(OSError, CdpError):
            building.unlink(missing_ok=True)
        if isinstance(error, CorruptError):
            _note_rotted(history.directory)
        raise
    finally:
        views.close()
    return describe(history, cut)


def _note_rotted(directory: Path) -> None:
    """A base point waits for what rotted: who copies the disk verifies what it compares with (`target.reads`)."""
    with contextlib.suppress(OSError, CdpError):
        durable.write_whole(directory / ROTTED, b"")


def run(state_dir: Path, id: str, number: int, *, again: bool) -> dict[str, Any]:
    """Publish one base point of timeline `id`, or make its file anew."""
    state = StateDir.open(state_dir)
    with Catalog.open(state, writable=False) as catalog:
        entry = catalog.by_id(id)
    if entry is None:
        raise NotFoundError(f"no disk has timeline {id}", hint="cdp disk list")
    history = History(state.path, timeline.load(state.timeline(id)))
    try:
        work = rebuild if again else publish
        return work(state, history, number, export=entry.name, progress=to_stdout())
    finally:
        history.close()


def main() -> int:
    """`python -m cdpserver.basepoint`: publish a base point in a process of its own; the result or error as JSON."""
    parser = argparse.ArgumentParser(description="publish a base point")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--timeline", required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    return messages.tell(
        lambda: run(options.state_dir, options.timeline, options.number, again=options.again)
    )


if __name__ == "__main__":
    sys.exit(main())
