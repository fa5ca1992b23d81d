"""What differs between two points below a path.

Of one disk the journal says what changed. Where none of that was read in walking one point, the other's walk would find the same,
and is left out; a file whose content lies where nothing changed is not read. Between other points everything is compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from cdpserver.errors import NotFoundError
from cdpserver.files.browser import Browser, File, bounded
from cdpserver.files.fetch import show_path
from cdpserver.files.formats.base import HOLE
from cdpserver.files.versions import LARGEST_DIGEST, changed_fields, digest_of
from cdpserver.files.watched import Watched, as_ranges, meet
from cdpserver.view.delta import Ranges

Path: TypeAlias = tuple[bytes, ...]


class Side(Protocol):
    """One of the two points."""

    browser: Browser
    disk: Watched
    volume: str
    path: bytes


@dataclass(frozen=True, slots=True)
class Difference:
    """A file that is `added`, `removed` or `changed`, and for the latter what of it. The path is from where one looked."""

    path: Path
    change: str
    fields: tuple[str, ...]
    before: File | None
    after: File | None


def differences(old: Side, new: Side, changed: Ranges | None) -> Iterator[Difference]:
    """By path, what was removed at the end; `changed` is what the journal says, None if it cannot.

    NotFoundError if the path is in neither.
    """
    before = _walk(old)
    # Also what was read before the walk counts: where the volumes are.
    same = changed is not None and not meet(old.disk.ranges(), changed)
    after = before if same else _walk(new)
    if not before and not after:
        raise NotFoundError(f"there is no {old.path!r} in either", hint="cdp file ls shows what is there")
    for path in sorted(after):
        file, was = after[path], before.get(path)
        if was is None:
            yield Difference(path, "added", (), None, file)
            continue
        fields = changed_fields(was, file)
        if not same and _attributes(old, was) != _attributes(new, file):
            fields.append("xattrs")
        if file.type == was.type == "file" and _differ(old, new, was, file, changed):
            fields.append("content")
        if fields:
            yield Difference(path, "changed", tuple(fields), was, file)
    for path in sorted(before.keys() - after.keys()):
        yield Difference(path, "removed", (), before[path], None)


def _walk(side: Side) -> dict[Path, File]:
    try:
        found = side.browser.walk(side.volume, side.path, full=True)
        return {file.path: file for file in bounded(found, show_path((side.path,)))}
    except NotFoundError:
        return {}


def _differ(old: Side, new: Side, was: File, file: File, changed: Ranges | None) -> bool:
    """Has the content changed?"""
    if was.size != file.size:
        return True
    if changed is not None and was.runs is not None and was.runs == file.runs:
        places = [(place, place + end - start) for start, end, place in file.runs or () if place >= 0]
        if all(place >= 0 or place == HOLE for _, _, place in was.runs) and not meet(
            as_ranges(places), changed
        ):
            return False
    if file.size > LARGEST_DIGEST:
        return was.runs != file.runs
    return _digest(old, was) != _digest(new, file)


def _attributes(side: Side, file: File) -> dict[str, bytes]:
    """Of a file with many the walk did not tell them."""
    if file.attributes is not None or file.type not in ("file", "dir"):
        return file.attributes or {}
    return side.browser.xattrs(_again(side, file))


def _again(side: Side, file: File) -> File:
    """What a walk has numbered is forgotten after so many files."""
    return side.browser.stat(side.volume, b"/".join([side.path, *file.path]))


def _digest(side: Side, file: File) -> str:
    return digest_of(side.browser, _again(side, file))
