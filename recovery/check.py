"""`cdp check`: what is wrong with a disk's history, in an operator's terms. Works on the files; needs no service."""

import contextlib
import hashlib
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdpserver import durable
from cdpserver.catalog import Catalog
from cdpserver.clock import boot_id
from cdpserver.errors import CorruptError, NotFoundError, UsageError
from cdpserver.names import format_bytes
from cdpserver.state import StateDir, default_state_dir
from recovery.check_files import Files, files_of
from recovery.local import id_in, timeline_of
from recovery.output import answer, answer_json, say, show_time

if TYPE_CHECKING:
    from cdpserver.check import Damage, Depth, Progress, Report
    from cdpserver.check.anchor import Anchor
    from cdpserver.check.depth import Part

KEEP_S = 2.0
"""How much of a check in parts is done again when it was killed."""


def _disks_in(state: StateDir, catalog: Catalog, name: str) -> dict[str, str]:
    """Ids of timelines by the disk's name: of a disk, or of each disk of a VM or group."""
    from cdpserver import groups
    from cdpserver.vm import instant

    if groups.is_several(catalog, name):
        return {entry.name: entry.id for entry in instant.disks_of(state, catalog, name)}
    return {name: id_in(catalog, name)}


def check(options: Namespace) -> None:
    """Verify a disk, or each disk of a VM or group. CorruptError after the answer if anything is damaged."""
    from cdpserver.check import check_timeline, lost
    from recovery.check_catalog import CatalogCheck

    _refuse_what_excludes(options)
    state = StateDir.open(default_state_dir(options.state_dir))
    anchor = _anchor(options)
    catalog = CatalogCheck(state)
    with catalog.names() as names:
        disks = _disks_in(state, names, options.disk)
        if anchor is not None:
            live = {name: entry.id for name, entry in names.names().items() if entry.state == "live"}
            anchor.miss(state, live)
    deadline = None if options.within is None else time.monotonic() + options.within / 1e9
    told = []
    reports: dict[str, Report] = {}
    for disk, id in disks.items():
        note = _note(state, id)
        depth = _depth(options, note, deadline)
        with _progress() as progress:
            try:
                report = check_timeline(
                    state.path, id, boot_id=boot_id(), depth=depth, chain=options.chain, progress=progress
                )
            except NotFoundError:
                # It was removed just now, which this says, or its directory is lost.
                report = lost(state.timeline(timeline_of(state, disk)))
        _keep(note, depth, report)
        report = replace(report, damage=(*catalog.of(id), *report.damage))
        reports[disk] = report
        files = [files_of(state, disk, damage) for damage in report.damage] if options.files else None
        told.append({**_as_dict(disk, state, report, depth, files), "catalog": catalog.elsewhere()})
        if not options.json:
            _answer_report(disk, report, state.path, files)
        if anchor is not None and (report.whole or report.chain is not None):
            anchor.take(disk, state.timeline(id), report.chain)
    for row in catalog.elsewhere() if not options.json else ():
        say(f"{row['what']} ({row['hint']})")
    if options.json:
        answer_json(told if list(disks) != [options.disk] else told[0])
    for disk, report in reports.items():
        if not report.whole:
            for wrong in anchor.wrong if anchor is not None else ():
                say(wrong)
            places = len(report.damage) + report.untold
            raise CorruptError(
                f"{disk} is damaged in {places} place{'s' if places > 1 else ''}",
                hint=report.damage[0].finding.hint,
            )
    if anchor is not None:
        anchor.save()


def _anchor(options: Namespace) -> "Anchor | None":
    if options.anchor is None:
        return None
    from cdpserver.check.anchor import Anchor

    return Anchor(Path(options.anchor), forget=options.forget)


def _refuse_what_excludes(options: Namespace) -> None:
    given = [
        flag
        for flag, value in (
            ("--quick", options.quick),
            ("--full", options.full),
            ("--sample", options.sample is not None),
        )
        if value
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", hint="give one of them")
    if options.anchor is not None and not options.chain:
        raise UsageError("--anchor is of the hash chain", hint="cdp check DISK --chain --anchor FILE")
    if options.forget and options.anchor is None:
        raise UsageError(
            "--forget is of an anchor", hint="cdp check DISK --chain --anchor FILE --forget DISK"
        )
    if options.seed is not None and options.sample is None:
        raise UsageError("--seed is of a sample", hint="cdp check DISK --sample 5 --seed 1")
    if (options.resume or options.within is not None) and (options.quick or options.sample is not None):
        raise UsageError(
            "a check in parts verifies everything",
            hint="leave out --quick and --sample, or --within and --resume",
        )


def _depth(options: Namespace, note: Path, deadline: float | None) -> "Depth":
    from cdpserver.check.depth import Everything, Part, Quick, Sample

    def ends() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    if options.quick:
        return Quick()
    if options.sample is not None:
        seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
        return Sample(percent=options.sample, seed=seed)
    if options.resume:
        try:
            return replace(Part.from_json(durable.read_json(note), ends), keep=_keeper(note))
        except FileNotFoundError:
            say("no check of it is under way: this one begins anew")
    if options.resume or options.within is not None:
        return Part(content=options.full, ends=ends, keep=_keeper(note))
    return Everything(content=options.full)


# --- checks in parts


def _note(state: StateDir, id: str) -> Path:
    """Where it is written how far a check has come: of the operator's, since a store may be one that cannot be written."""
    from recovery.unfinished import state_home

    key = hashlib.sha256(f"{state.path}\0{id}".encode(errors="surrogateescape")).hexdigest()
    return state_home() / "checks" / f"{key}.json"


def _keep(note: Path, depth: "Depth", report: "Report") -> None:
    from cdpserver.check.depth import Part

    if not isinstance(depth, Part):
        return
    if report.complete:
        note.unlink(missing_ok=True)
        return
    _write_note(note, depth)


def _write_note(note: Path, part: "Part") -> None:
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    durable.write_json(note, part.as_json())


def _keeper(note: Path) -> "Callable[[Part], None]":
    """Writes now and then how far a check is, so that one that is killed can be gone on with."""
    kept_s = time.monotonic()

    def keep(part: "Part") -> None:
        nonlocal kept_s
        if time.monotonic() - kept_s >= KEEP_S:
            _write_note(note, part)
            kept_s = time.monotonic()

    return keep


# --- the answer


def _as_dict(
    disk: str, state: StateDir, report: "Report", depth: "Depth", files: list[Files] | None
) -> dict[str, Any]:
    from cdpserver.check.depth import Sample

    found = report.as_dict(disk, state.path)
    if isinstance(depth, Sample):
        found["sample"] = {"percent": depth.percent, "seed": depth.seed}
    if files is not None:
        for damage, named in zip(found["damage"], files, strict=True):
            damage.update(named.as_dict())
    return found


def _answer_report(disk: str, report: "Report", root: Path, files: list[Files] | None) -> None:
    word = "whole" if report.whole else "damaged"
    so_far = "" if report.complete else " so far"
    answer(
        f"{disk} is {word}{so_far}: {report.records:,} records in {report.segments:,} segments, "
        f"{format_bytes(report.bytes)} verified"
    )
    if report.chain is not None:
        answer(f"its hash chain has {report.chain.links:,} links; head {report.chain.digest.hex()}")
    if not report.complete:
        say(f"the time is over; to go on: cdp check {disk} --within 10m --resume")
    for number, damage in enumerate(report.damage):
        for line in _damage_lines(damage, root):
            answer(line)
        for line in files[number].lines() if files is not None else ():
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
