"""Verifies what a timeline stands on and what stands on it: its base, and its published base points.

A base point is a file of QEMU's, so QEMU says whether it is whole; of its header only the backing file's name and the
size are read here, because they decide what the chain means.
"""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from cdpserver import qemu, readback, sums, timeline
from cdpserver.chain.lock import stays
from cdpserver.check.damage import Finding
from cdpserver.check.depth import BASE, BASE_POINT, CONTENT, PIECE, Depth
from cdpserver.errors import BrokenError, CdpError, CorruptError, NotFoundError, RefusedError
from cdpserver.journal.firstcopy import base_lost
from cdpserver.limits import MAX_DISK_SIZE
from cdpserver.nodes import NUMBERED, base_point_path, published, read_header, without_note
from cdpserver.repository.registered import content_of
from cdpserver.timeline import BackupBase, EmptyBase, ImageBase, PointBase, Timeline
from cdpserver.view.delta import Delta
from cdpserver.view.history import History
from cdpserver.view.view import View

_FORKED = re.compile(r"\.\./(t[0-9]{1,18})/bp-([0-9]{1,18})\.qcow2")

AGAIN = (
    "where the journal still has this instant, cdp bp rebuild DISK@bp:N makes the file anew, the oldest first"
)
CUTS = Mapping[int, tuple[int, int]]


def check_base(
    state_dir: Path, timeline_: Timeline, *, boot_id: str, first_boot_id: str
) -> Iterator[Finding]:
    """Is the timeline's base there? `first_boot_id` is that of the history's first segment."""
    directory = state_dir / "timelines" / timeline_.id
    match timeline_.base:
        case EmptyBase():
            path = directory / "base.raw"
            if not path.exists():
                yield Finding(
                    "the first copy is missing", path, 1, 0, hint="restore it, or copy the disk anew"
                )
            elif path.stat().st_size != timeline_.size:
                what = f"the first copy has {path.stat().st_size} bytes, the disk {timeline_.size}"
                yield Finding(what, path, 1, 0, hint="restore it, or copy the disk anew")
            elif base_lost(directory) and first_boot_id != boot_id:
                what = "the first copy was not durable when the host went down"
                yield Finding(what, path, 1, 0, hint="copy the disk anew")
        case ImageBase(file):
            if not (state_dir / file).exists():
                yield Finding("the base image is missing", state_dir / file, 1, 0, hint="restore it")
            elif (state_dir / file).stat().st_size == 0:
                yield Finding("the base image is empty", state_dir / file, 1, 0, hint="restore it")
        case BackupBase():
            try:
                content_of(state_dir, timeline_.base).chunks.page(0)
            except CdpError as error:
                yield Finding(error.message, directory / timeline.FILE, 1, 0, hint=error.hint or "")
        case PointBase(parent, _, _):
            try:
                below = timeline.load(state_dir / "timelines" / parent)
                yield from check_base(state_dir, below, boot_id=boot_id, first_boot_id=boot_id)
            except (NotFoundError, CorruptError) as error:
                what = f"the timeline that this is a fork of cannot be used: {error.message}"
                yield Finding(what, state_dir / "timelines" / parent, 1, 0, hint="restore it")


def check_base_content(state_dir: Path, timeline_: Timeline, depth: Depth) -> Iterator[Finding]:
    """Is the file that a timeline stands on as it was when its sums were written?"""
    path = base_file(state_dir, timeline_)
    if path is None:
        return
    try:
        for number in sums.wrong(path, takes=lambda number: depth.takes((BASE, number + 1, 0, 0))):
            depth.found((BASE, number + 1, 0, 0))
            start = number * sums.BLOCK
            end = min(start + sums.BLOCK, path.stat().st_size)
            what = f"bytes {start} to {end} of {path.name} are not what they were"
            hint = "restore the file from a backup; instants after the guest wrote there again are whole"
            yield Finding(what, path, 1, timeline_.created_ns, extents=((start, end),), hint=hint)
    except CorruptError as error:
        depth.found((BASE, 1, 0, 0))
        yield Finding(error.message, sums.sums_path(path), 0, 0, extents=(), hint=error.hint)


def base_file(state_dir: Path, timeline_: Timeline) -> Path | None:
    """The file that a timeline's history stands on, once nothing writes to it; None for a fork, and on a backup."""
    directory = state_dir / "timelines" / timeline_.id
    match timeline_.base:
        case EmptyBase():
            path = directory / "base.raw"
            begun = (directory / timeline.INTERVALS).is_dir() and (directory / "base.synced").exists()
            return path if begun and path.exists() else None
        case ImageBase(file):
            return state_dir / file if (state_dir / file).exists() else None
        case PointBase() | BackupBase():
            return None


def check_base_point(
    state_dir: Path, timeline_: Timeline, number: int, cuts: CUTS, wanted: int | None, *, deep: bool = True
) -> Iterator[Finding]:
    """What is wrong with a published base point, of a disk that had `wanted` bytes then, if anybody knows.

    Without `deep` QEMU is not asked, who reads all of its tables. BrokenError if qemu-img cannot be run.
    """
    directory = state_dir / "timelines" / timeline_.id
    path = base_point_path(directory, number)
    finding = partial(_of_base_point, directory, number, cuts)
    try:
        backing, size = read_header(path)
    except CorruptError as error:
        yield finding(error.message)
        return
    if number in cuts and number in without_note(directory):
        yield finding(
            f"the note bp-{number}.json is missing or damaged: restart cdpserver, it writes it anew"
        )
    least = wanted or timeline_.size
    if size < least or (wanted and size != wanted):
        yield finding(f"base point {number} is of a disk of {size} bytes, not {least}")
    if not _is_backing(state_dir, timeline_, number, backing):
        yield finding(f"base point {number} has the backing file {backing!r}, which it should not stand on")
        return
    if not (directory / backing).exists():
        yield finding(f"the backing file {backing} of base point {number} is missing")
        return
    if _stands_on_itself(path):
        yield finding(f"base point {number} stands on itself")
        return
    if not deep:
        return
    if shutil.which("qemu-img") is None:
        raise BrokenError(
            "qemu-img is not installed, so base points cannot be checked", hint="run tools/setup"
        )
    try:
        qemu.check(path)
    except CorruptError as error:
        yield finding(f"qemu-img does not find base point {number} whole: {error.message}")
        return


def check_base_point_content(directory: Path, number: int, cuts: CUTS, depth: Depth) -> Iterator[Finding]:
    """Is the file of a published base point as it was when its sums were written, also while nobody merges?"""
    path = base_point_path(directory, number)
    with contextlib.suppress(FileNotFoundError):  # merged away meanwhile
        try:
            wrong = set(sums.wrong(path, takes=lambda block: depth.takes((BASE_POINT, number, block + 1, 0))))
            if not wrong:
                return
            with stays(directory):
                blocks = list(sums.wrong(path, takes=wrong.__contains__))
        except CorruptError as error:
            depth.found((BASE_POINT, number, 1, 0))
            yield Finding(error.message, sums.sums_path(path), 0, 0, extents=(), hint=error.hint)
            return
        for block in blocks:
            depth.found((BASE_POINT, number, block + 1, 0))
        if blocks:
            what = f"{len(blocks)} MiB of the file of base point {number} are not what was written"
            yield _of_base_point(directory, number, cuts, what)


def _of_base_point(directory: Path, number: int, cuts: CUTS, what: str) -> Finding:
    """What stands on it is no better."""
    named = tuple(f"bp:{later}" for later in published(directory) if later >= number)
    cut = cuts.get(number, (0, 0))
    return Finding(what, base_point_path(directory, number), *cut, *cut, named=named, hint=AGAIN)


def _is_backing(state_dir: Path, timeline_: Timeline, number: int, backing: str) -> bool:
    """May base point `number` stand on this file?"""
    match = NUMBERED.fullmatch(backing)
    if match:
        return int(match[1]) < number
    root = timeline_
    while isinstance(root.base, PointBase):
        # Which of its ancestors' base points was the newest depends on when this one was written.
        match = _FORKED.fullmatch(backing)
        if match and match[1] == root.base.timeline:
            return True
        try:
            root = timeline.load(state_dir / "timelines" / root.base.timeline)
        except (NotFoundError, CorruptError):
            return True  # nobody can tell, and check_base says why
    if isinstance(root.base, ImageBase):
        return backing == f"../../{root.base.file}"
    return backing == ("base.raw" if root is timeline_ else f"../{root.id}/base.raw")


def _stands_on_itself(path: Path) -> bool:
    """Does the chain of a QCOW2 file lead back into itself? A file that cannot be read ends it."""
    seen = set()
    with contextlib.suppress(OSError, CorruptError):
        while path.suffix == ".qcow2" and path not in seen:
            seen.add(path)
            path = path.parent.joinpath(read_header(path)[0]).resolve()
        return path in seen
    return False


class _Pieces(Delta):
    """Pieces of a view, as a delta from nothing. They are asked for one by one."""

    def __init__(self, view: View, pieces: Iterable[int]) -> None:
        self.new = view
        self.size = view.size
        self.ranges = _ranges(pieces, view.size)  # type: ignore[assignment]


def _ranges(pieces: Iterable[int], size: int) -> Iterator[tuple[int, int]]:
    for piece in pieces:
        yield piece * PIECE, min((piece + 1) * PIECE, size)


def compare_base_point(
    history: History, number: int, cut: tuple[int, int], depth: Depth
) -> Iterator[Finding]:
    """Read a base point with all that it stands on, and compare it with the journal's view of the same instant.

    Up to the first piece that differs. What is wrong is still so while nobody merges.
    """
    asked: list[int] = []

    def wanted() -> Iterator[int]:
        for piece in range(-(-_size(history, number) // PIECE)):
            if depth.takes((CONTENT, number, piece + 1, 0)):
                asked.append(piece)
                yield piece

    pieces = wanted()
    for first in pieces:  # once; and again, where a merge replaced the file under it
        if not _compare(history, number, cut, chain([first], pieces)):
            return
        with stays(history.directory):
            found = _compare(history, number, cut, asked[-1:])
        if found:
            depth.found((CONTENT, number, asked[-1] + 1, 0))
            yield from found
            return


def _size(history: History, number: int) -> int:
    """Bytes of the disk in a base point."""
    with contextlib.suppress(CorruptError, FileNotFoundError):
        return min(read_header(base_point_path(history.directory, number))[1], MAX_DISK_SIZE)
    return history.timeline.size


def _compare(history: History, number: int, cut: tuple[int, int], pieces: Iterable[int]) -> list[Finding]:
    path = base_point_path(history.directory, number)
    if _stands_on_itself(path):
        return []  # QEMU would open it for ever; said already
    view = None
    try:
        view = View(history, cut[0])
        # A socket's path is short, and this one must not meet that of another check.
        with tempfile.TemporaryDirectory(prefix="cdp-") as room, qemu.serve(path, Path(room) / "nbd") as uri:
            readback.compare(uri, _Pieces(view, pieces), apart=True)
    except RefusedError:
        return []  # its note is lost, and with it the name of its instant: said already
    except (CorruptError, BrokenError) as error:
        # Not to be read at all: something below it is damaged.
        what = error.message.replace("the new base point", f"base point {number}")
        return [Finding(what, path, *cut, *cut, named=(f"bp:{number}",), hint=AGAIN)]
    finally:
        if view is not None:
            view.close()
    return []
