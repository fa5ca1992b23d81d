"""The versions of one file through time: looked at only where something changed that decides what it is.

    look at a point -> the ranges that were read -> the first record that touches them -> the next point to look at

Between two looks the file is the same, whatever else was written: what a parser reads decides what it answers.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from blake3 import blake3

from cdpserver.errors import CorruptError, NotFoundError, RefusedError
from cdpserver.files.browser import Browser, File
from cdpserver.files.watched import Watched, first_touch, is_unbroken
from cdpserver.point import Point
from cdpserver.view.delta import Ranges
from cdpserver.view.history import History

FIELDS = ("type", "size", "mtime_ns", "mode", "uid", "gid", "target")
"""What is compared of two versions, with the content, the attributes and which file it is."""

LARGEST_DIGEST = 64 << 30
"""Of a larger file the digest is left out: a sparse one may pretend to be of exabytes."""

ZEROS = bytes(1 << 20)

Viewed = Callable[[int], AbstractContextManager[Watched]]
"""The disk at a seq, held as long as the context; RefusedError if the instant is gone."""


@dataclass(frozen=True, slots=True)
class Version:
    """A file from one point to another. Without a `file` it was not there, or could not be read (`why`)."""

    first: Point
    last: Point
    file: File | None
    digest: str | None
    xattrs: dict[str, bytes]
    why: str
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Look:
    """What one point says, and the ranges of the disk that decide it."""

    file: File | None
    digest: str | None
    xattrs: dict[str, bytes]
    why: str
    decided_by: Ranges


def versions(
    history: History,
    points: Sequence[Point],
    viewed: Viewed,
    volume: str | None,
    path: bytes,
    remark: Callable[[int, str], None],
) -> Iterator[Version]:
    """The versions over these points, oldest first. Points that are dropped meanwhile are passed over.

    `remark` is told what is to be known of the file system at a seq.
    """
    current: Version | None = None
    for before, point, look in _looks(history, points, viewed, volume, path, remark):
        found = Version(point, point, look.file, look.digest, look.xattrs, look.why, ("first",))
        changes = found.changes if current is None else _changes(current, found)
        if changes:
            if current is not None and not _is_nothing(current):
                yield replace(current, last=before)
            current = replace(found, changes=changes)
    if current is not None and not _is_nothing(current):
        yield replace(current, last=points[-1])


def _is_nothing(version: Version) -> bool:
    """It had not been there yet."""
    return version.file is None and not version.why and version.changes == ("first",)


def _looks(
    history: History,
    points: Sequence[Point],
    viewed: Viewed,
    volume: str | None,
    path: bytes,
    remark: Callable[[int, str], None],
) -> Iterator[tuple[Point, Point, Look]]:
    """(the point before, the point, what it says) of every point that has to be looked at."""
    browser: Browser | None = None
    seqs = [point.seq for point in points]
    number = 0
    try:
        while number < len(points):
            try:
                with viewed(points[number].seq) as disk:
                    if browser is None:
                        browser = Browser(disk)
                    browser.turn(disk)
                    try:
                        known = _look(browser, disk, volume, path, partial(remark, points[number].seq))
                    except CorruptError as error:
                        # Its process may be gone: the next look has another one.
                        browser.close()
                        browser = None
                        known = Look(None, None, {}, error.message, disk.ranges())
            except RefusedError:
                number += 1  # dropped since it was listed
                continue
            yield points[max(number - 1, 0)], points[number], known
            number = _next(history, seqs, number, known.decided_by)
    finally:
        if browser is not None:
            browser.close()


def _look(
    browser: Browser, disk: Watched, volume: str | None, path: bytes, remark: Callable[[str], None]
) -> Look:
    try:
        chosen = browser.choose(volume)
        for said in browser.open(chosen):
            remark(said)
        file = browser.stat(chosen, path)
    except NotFoundError:
        return Look(None, None, {}, "", disk.ranges())
    except RefusedError as error:
        return Look(None, None, {}, error.message, disk.ranges())
    if file.type == "unreadable":
        return Look(None, None, {}, file.why, disk.ranges())
    xattrs = browser.xattrs(file)
    digest = digest_of(browser, file) if file.type == "file" and file.size <= LARGEST_DIGEST else None
    return Look(file, digest, xattrs, "", disk.ranges())


def _next(history: History, seqs: Sequence[int], number: int, decided_by: Ranges) -> int:
    """The next point whose changes can touch what was read; len(seqs) if none."""
    seq = seqs[number]
    last = number
    low, high = number + 1, len(seqs)
    # The journal's stretch around this point: what is behind it, and what is of another size, is looked at anyway.
    if low < high and is_unbroken(history, seq, seqs[-1]):
        last = high - 1
    else:
        while low < high:
            middle = (low + high) // 2
            if is_unbroken(history, seq, seqs[middle]):
                last, low = middle, middle + 1
            else:
                high = middle
    hit = first_touch(history, seq, seqs[last], decided_by)
    return last + 1 if hit is None else bisect_left(seqs, hit, number + 1)


def _changes(old: Version, new: Version) -> tuple[str, ...]:
    if old.file is None or new.file is None:
        if new.file is not None:
            return ("created",) if not old.why else ("readable",)
        if new.why:
            return ("unreadable",) if new.why != old.why else ()
        return ("removed",) if old.file is not None or old.why else ()
    found = changed_fields(old.file, new.file)
    if old.digest != new.digest:
        found.append("content")
    if old.xattrs != new.xattrs:
        found.append("xattrs")
    if old.file.id != new.file.id:
        found.append("replaced")
    return tuple(found)


def changed_fields(old: File, new: File) -> list[str]:
    """The names of what is known of both and is not equal."""
    return [name for name in FIELDS if getattr(old, name) != getattr(new, name)]


def digest_of(browser: Browser, file: File) -> str:
    """BLAKE3 of the content, in hex."""
    digest = blake3()
    for start, end, data in browser.content(file):
        if data is not None:
            digest.update(data)
            continue
        for at in range(start, end, len(ZEROS)):
            digest.update(ZEROS[: min(len(ZEROS), end - at)])
    return digest.hexdigest()
