"""The commands that work on the files themselves, whether the service runs or not: show, rebuild, check."""

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cdpserver.catalog import Catalog
from cdpserver.clock import boot_id
from cdpserver.errors import CdpError, CorruptError, NotFoundError, RemovedError
from cdpserver.names import format_bytes, show
from cdpserver.state import StateDir, default_state_dir
from recovery.output import answer, answer_json, answer_json_items, show_time

if TYPE_CHECKING:
    from cdpserver.check import Damage, Progress, Report

LOCK_SECONDS = 10.0
"""How long a rebuild waits for the indexer to let go of the timeline; it holds it for one batch."""


def _timeline(state: StateDir, disk: str) -> str:
    """The id of the disk's timeline."""
    with Catalog.open(state, writable=False) as catalog:
        entry = catalog.get(disk)
    if entry is None:
        raise NotFoundError(f"there is no disk {show(disk)}", hint="list the disks: cdp disk list")
    if entry.state != "live":
        raise RemovedError(f"{disk} is being removed", hint="cdp disk list shows when it is gone")
    return entry.id


# --- segment show


def segment_show(options: Namespace) -> None:
    """A segment as text. CorruptError at the end if any of it is damaged."""
    from recovery.segment_text import SegmentText
    from recovery.segment_text import show as show_segment

    segment = SegmentText(Path(options.path))
    with contextlib.closing(segment):
        write = answer_json_items if options.json else _answer_lines
        damaged = show_segment(segment, verify=options.verify, as_json=options.json, write=write)
        if segment.damage or damaged:
            said = [segment.damage] if segment.damage else []
            said += (
                [f"{damaged} records are damaged" if damaged > 1 else "a record is damaged"]
                if damaged
                else []
            )
            raise CorruptError(
                f"{segment.path}: {'; '.join(said)}", hint="cdp check DISK says what that touches"
            )


def _answer_lines(lines: Iterator[str]) -> None:
    for line in lines:
        answer(line)


# --- index rebuild


def index_rebuild(options: Namespace) -> None:
    """Make the index of a disk anew."""
    state = StateDir.open(default_state_dir(options.state_dir))
    directory = state.timeline(_timeline(state, options.disk))
    started = time.monotonic()
    with _busy(f"indexing {options.disk}"):
        records = _rebuild(directory)
    seconds = time.monotonic() - started
    rate = round(records / seconds) if seconds else 0
    if options.json:
        answer_json(
            {"disk": options.disk, "records": records, "seconds": round(seconds, 3), "per_second": rate}
        )
    else:
        answer(f"{options.disk}: {records:,} records indexed in {seconds:.2f} s ({rate:,} a second)")


def _rebuild(directory: Path) -> int:
    from cdpserver.index.indexer import rebuild

    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return rebuild(directory, boot_id())
        except CorruptError:
            raise
        except CdpError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


@contextlib.contextmanager
def _busy(doing: str) -> Iterator[None]:
    """Show on a terminal that something is going on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(doing)):
        yield


# --- check


def check(options: Namespace) -> None:
    """Verify everything of a disk, or of each disk of a VM or group. CorruptError after the answer if anything is damaged."""
    from cdpserver import groups
    from cdpserver.check import check_timeline, lost
    from cdpserver.vm import instant

    state = StateDir.open(default_state_dir(options.state_dir))
    disks = {options.disk: ""}
    with Catalog.open(state, writable=False) as catalog:
        several = groups.is_several(catalog, options.disk)
        if several:
            disks = {entry.name: entry.id for entry in instant.disks_of(state, catalog, options.disk)}
    reports = {}
    for disk, known in disks.items():
        id = known or _timeline(state, disk)
        with _progress() as progress:
            try:
                reports[disk] = check_timeline(
                    state.path, id, boot_id=boot_id(), full=options.full, progress=progress
                )
            except NotFoundError:
                # It was removed just now, which this says, or its directory is lost.
                reports[disk] = lost(state.timeline(_timeline(state, disk)))
        if not options.json:
            _answer_report(disk, reports[disk], state.path)
    if options.json:
        told = [report.as_dict(disk, state.path) for disk, report in reports.items()]
        answer_json(told if several else told[0])
    for disk, report in reports.items():
        if not report.whole:
            places = len(report.damage) + report.untold
            raise CorruptError(
                f"{disk} is damaged in {places} place{'s' if places > 1 else ''}",
                hint=report.damage[0].finding.hint,
            )


def _answer_report(disk: str, report: "Report", root: Path) -> None:
    word = "whole" if report.whole else "damaged"
    answer(
        f"{disk} is {word}: {report.records:,} records in {report.segments:,} segments, "
        f"{format_bytes(report.bytes)} verified"
    )
    for damage in report.damage:
        for line in _damage_lines(damage, root):
            answer(line)
    if report.untold:
        answer(f"and {report.untold:,} more places that are not listed")


def _damage_lines(damage: "Damage", root: Path) -> Iterator[str]:
    found = damage.finding
    path = found.path.relative_to(root) if found.path.is_relative_to(root) else found.path
    yield ""
    yield f"{found.what}"
    yield f"  in       {path}"
    start = (
        f"{show_time(found.from_time_ns)} (seq:{found.from_seq})" if found.from_time_ns else "the beginning"
    )
    end = f"{show_time(damage.to_time_ns)} (seq:{damage.to_seq})" if damage.to_time_ns else "the end"
    yield f"  shows    from {start} to {end}"
    named = f": {', '.join(damage.named)}" if damage.named else ""
    yield f"  touches  {damage.affected:,} point{'' if damage.affected == 1 else 's'}{named}"
    for side, place in (("before", damage.before), ("after", damage.after)):
        if place is not None:
            name = f" {place.name}" if place.name else ""
            yield f"  intact   {side}: {show_time(place.time_ns)} (seq:{place.seq}){name}"
    if found.hint:
        yield f"  next     {found.hint}"


@contextlib.contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on a terminal's stderr, else nothing."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield advance
