"""Verifies everything of a timeline, and says what is wrong in terms of time and points.

    timeline.json -> base -> segments (headers, payload) -> index -> base points

Reads only, and only what it was given: nothing is printed, asked for or repaired here. Safe beside a running target,
indexer and service: what is not indexed yet, a record in flight and an index that lags are no damage. While it runs no
interval is dropped or thinned. Base points may be merged: what is wrong with one is said when it still is while none is.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from cdpserver import durable, timeline
from cdpserver.basepoint import below_intervals
from cdpserver.chain.lock import intervals_stand, stays
from cdpserver.check.basepoints import (
    check_base,
    check_base_content,
    check_base_point,
    check_base_point_content,
    compare_base_point,
)
from cdpserver.check.damage import Damage, Effects, Finding
from cdpserver.check.depth import BASE_POINT, INDEX, MERGED_INDEXES, Depth, Everything, Part
from cdpserver.check.isolated import MERGED, check_indexes
from cdpserver.check.links import Head, broken_links, check_links
from cdpserver.check.segments import SegmentCheck, Totals, size_bytes
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.journal.log import interval_path, intervals, segments
from cdpserver.journal.segment import SegmentReader
from cdpserver.nodes import base_point_path, nodes, published, read_header
from cdpserver.timeline import Timeline
from cdpserver.view.history import History

__all__ = ["Damage", "Depth", "Report", "check_timeline"]

Cuts: TypeAlias = dict[int, tuple[int, int]]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being verified, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was verified, and what is wrong. `untold` findings came after the limit of those that are listed."""

    records: int
    segments: int
    bytes: int
    damage: tuple[Damage, ...]
    untold: int
    depth: str = "normal"
    complete: bool = True
    """Was all verified that a check of this depth looks at?"""

    chain: Head | None = None
    """The hash chain, where that was asked for and there is one."""

    @property
    def whole(self) -> bool:
        """Nothing is wrong."""
        return not self.damage

    def as_dict(self, disk: str, root: Path) -> dict[str, Any]:
        """The report for programs; paths are relative to `root`, the state directory."""
        return {
            "disk": disk,
            "depth": self.depth,
            "complete": self.complete,
            "whole": self.whole,
            "records": self.records,
            "segments": self.segments,
            "bytes": self.bytes,
            "damage": [damage.as_dict(root) for damage in self.damage],
            "untold": self.untold,
            **({"chain": self.chain.as_dict()} if self.chain is not None else {}),
        }


def check_timeline(
    state_dir: Path,
    id: str,
    *,
    boot_id: str,
    depth: Depth | None = None,
    chain: bool = False,
    progress: Progress = lambda *_: None,
) -> Report:
    """Verify timeline `id`, by default everything but the content of its base points.

    With `chain` also that history is what it was, by its hash chain.
    NotFoundError if there is no such timeline, RemovedError if it is being removed, BrokenError if qemu-img cannot be run.
    """
    directory = state_dir / "timelines" / id
    if not directory.is_dir():
        raise NotFoundError(f"there is no timeline {id}", hint="list the disks: cdp disk list")
    effects, totals = Effects(), Totals()
    deep, head = Everything() if depth is None else depth, None
    try:
        head = _check(state_dir, directory, boot_id, effects, totals, deep, chain=chain, progress=progress)
    except OSError as error:
        if not durable.is_damage(error):
            raise
        effects.add(_all_of(Path(error.filename or directory), error.strerror or "it cannot be read"))
    return _report(effects, totals, deep, head)


def lost(directory: Path) -> Report:
    """Of a timeline whose directory is gone, while its disk is there."""
    effects = Effects()
    effects.add(_all_of(directory, "it is missing"))
    return _report(effects, Totals(), Everything(), None)


def _all_of(path: Path, why: str) -> Finding:
    hint = f"restore {path.name} from a backup of the state directory"
    return Finding(f"{path} is damaged: {why}", path, 1, 0, hint=hint)


def _report(effects: Effects, totals: Totals, depth: Depth, head: Head | None) -> Report:
    return Report(
        records=totals.records,
        segments=totals.segments,
        bytes=totals.bytes,
        damage=tuple(effects.damage()),
        untold=effects.untold,
        depth=depth.name,
        complete=not (isinstance(depth, Part) and depth.ended),
        chain=head,
    )


def _check(
    state_dir: Path,
    directory: Path,
    boot_id: str,
    effects: Effects,
    totals: Totals,
    depth: Depth,
    *,
    chain: bool,
    progress: Progress,
) -> Head | None:
    head = None
    with contextlib.ExitStack() as stack:
        history = None
        held = None
        if (directory / timeline.INTERVALS).is_dir():
            stack.enter_context(intervals_stand(directory))
        try:
            held = timeline.load(directory)
        except CorruptError as error:
            hint = "restore timeline.json from a backup of the state directory"
            effects.add(Finding(error.message, directory / timeline.FILE, 1, 0, hint=hint))
        else:
            with contextlib.suppress(CorruptError, NotFoundError):  # a fork's parent: said by check_base
                history = History(state_dir, held, boot_id)
                stack.callback(history.close)
        if held is not None:
            # Before the records, which say until when it shows.
            for finding in check_base_content(state_dir, held, depth):
                effects.add(finding, after_seq=0)
        total = size_bytes(directory)
        check = SegmentCheck(
            directory,
            held,
            boot_id,
            effects,
            lambda done: progress("journal", min(done, total), total),
            depth,
            totals,
        )
        check.run()
        known = _cuts(directory, check, history)
        for finding in _the_rest(state_dir, directory, held, check, known, boot_id, progress, depth):
            effects.add(finding)
        if chain and held is not None:
            head, wrong = check_links(directory, held.uuid)
        else:
            wrong = list(broken_links(directory))
        for finding in wrong:
            effects.add(finding)
        if depth.content and history is not None:
            for finding in _contents(history, known, progress, depth):
                effects.add(finding)
    return head


def _the_rest(
    state_dir: Path,
    directory: Path,
    held: Timeline | None,
    check: SegmentCheck,
    known: Cuts,
    boot_id: str,
    progress: Progress,
    depth: Depth,
) -> Iterator[Finding]:
    """Everything but the segments, which say what there should be."""
    yield from _indexes(directory, check, boot_id, progress, depth)
    files = published(directory)
    begun = check.totals.segments > 0 or bool(check.unsure)
    if not begun and (files or (directory / "base.synced").exists()):
        path = directory / timeline.INTERVALS
        yield Finding(
            "the history is missing: there is no segment", path, 1, 0, hint="restore it from a backup"
        )
    if held is None:
        return
    if begun:
        yield from check_base(state_dir, held, boot_id=boot_id, first_boot_id=_first_boot_id(directory))
    for done, number in enumerate(files, start=1):
        if not base_point_path(directory, number).exists():
            continue  # merged away meanwhile: what was lost is missed by what stands on it
        place = (BASE_POINT, number, 0, 0)
        found_wrong = partial(
            check_base_point,
            state_dir,
            held,
            number,
            known,
            check.sizes.get(number),
            deep=depth.takes(place),
        )
        wrong = _still(directory, found_wrong)
        if wrong:
            depth.found(place)
        else:
            wrong = list(check_base_point_content(directory, number, known, depth))
        yield from wrong
        if number not in known and not check.unsure:
            path = directory / f"bp-{number}.qcow2"
            what = f"there is a base point {number}, but no record of its cut"
            named = (f"bp:{number}",)
            yield Finding(what, path, 0, 0, 0, 0, named=named, hint=_without_a_name(directory, number))
        progress("base points", done, len(files))


def _indexes(
    directory: Path, check: SegmentCheck, boot_id: str, progress: Progress, depth: Depth
) -> Iterator[Finding]:
    """The intervals' indexes, and then the merged ones."""
    numbers = [*intervals(directory), MERGED]
    places = {number: place for place, number in enumerate(numbers, start=1)}
    wanted = (number for number in numbers if depth.takes((INDEX, number or MERGED_INDEXES, 0, 0)))
    for number, found in check_indexes(directory, wanted, check.unsure, boot_id):
        progress("index", places[number], len(numbers))
        if found:
            depth.found((INDEX, number or MERGED_INDEXES, 0, 0))
        yield from found


def _still(directory: Path, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What is wrong with a base point, also while nobody merges."""
    if not (found := list(look())):
        return found
    with stays(directory):
        return list(look())


def _first_boot_id(directory: Path) -> str:
    for interval in intervals(directory):
        for number in segments(directory, interval):
            with (
                contextlib.suppress(CorruptError),
                contextlib.closing(SegmentReader(interval_path(directory, interval), number)) as reader,
            ):
                return reader.header.boot_id
    return ""


def _without_a_name(directory: Path, number: int) -> str:
    """What to do with a file that nobody can name: another may hold only what differs from it."""
    for later in published(directory):
        with contextlib.suppress(CorruptError, FileNotFoundError):
            if read_header(base_point_path(directory, later))[0] == base_point_path(directory, number).name:
                return f"leave the file where it is: bp:{later} stands on it"
    return "remove the file"


def _cuts(directory: Path, check: SegmentCheck, history: History | None) -> Cuts:
    """(seq, time) of base points by number: as noted, and as the journal says where it still does."""
    found = nodes(directory)
    if history is not None:
        with contextlib.suppress(CorruptError):  # a segment that cannot be read: said already
            history.journal.refresh()
            found += below_intervals(history.journal).values()
    return {node.number: (node.seq, node.time_ns) for node in found} | check.cuts


def _contents(history: History, known: Cuts, progress: Progress, depth: Depth) -> Iterator[Finding]:
    files = [number for number in published(history.directory) if number in known]
    for done, number in enumerate(files, start=1):
        yield from compare_base_point(history, number, known[number], depth)
        progress("content of base points", done, len(files))
