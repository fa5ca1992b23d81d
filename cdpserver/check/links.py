"""Verifies the hash chain: its links follow from each other, and what is there is what they say; so history was not rewritten."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver.check.damage import Finding
from cdpserver.errors import CorruptError
from cdpserver.journal.links import (
    FILE,
    NONE,
    Kind,
    Link,
    current,
    head_digest,
    interval_digest,
    is_stamped,
    is_torn,
    known_digest,
    last_place,
    read,
    sealed_link,
    segment_digest,
    stamped,
)
from cdpserver.journal.log import interval_path, intervals, segments
from cdpserver.journal.segment import SEALED, SegmentReader, log_path

REWRITTEN = (
    "history was rewritten, or is damaged: compare it with a copy of the state directory, or with a backup"
)


@dataclass(frozen=True, slots=True)
class Head:
    """How far a chain reaches, and the digest that stands for all of it."""

    uuid: bytes
    links: int
    digest: bytes

    def as_dict(self) -> dict[str, Any]:
        """For programs, and for an anchor."""
        return {"uuid": self.uuid.hex(), "links": self.links, "head": self.digest.hex()}


def check_links(directory: Path, uuid: bytes) -> tuple[Head | None, list[Finding]]:
    """The head of a timeline's chain, and what does not agree with it. None where no segment was ever linked."""
    path = directory / FILE
    try:
        held, found = read(directory)
    except FileNotFoundError:
        return None, list(_missing(directory))
    except CorruptError as error:
        return None, [Finding(error.message, path, 0, 0, extents=(), hint=error.hint)]
    head = Head(held, len(found), head_digest(held, found))
    if held != uuid:
        return head, [Finding("the chain is of another timeline", path, 0, 0, extents=(), hint=REWRITTEN)]
    return head, [*_thinnings(found, path), *_present(directory, found), *_beyond(directory, found)]


def broken_links(directory: Path) -> Iterator[Finding]:
    """Is the chain lost, or damaged itself? What it says of history is not looked at."""
    try:
        read(directory)
    except FileNotFoundError:
        yield from _missing(directory)
    except CorruptError as error:
        yield Finding(error.message, directory / FILE, 0, 0, extents=(), hint=error.hint)


def _missing(directory: Path) -> Iterator[Finding]:
    """Segments say whether there was one."""
    for interval in intervals(directory) if (directory / "intervals").is_dir() else ():
        for number in segments(directory, interval):
            with (
                contextlib.suppress(CorruptError, FileNotFoundError),
                contextlib.closing(SegmentReader(interval_path(directory, interval), number)) as reader,
            ):
                if stamped(reader.page()) is not None:
                    what = "the hash chain is missing"
                    hint = "restore the file links from a copy; the indexer begins another one, which proves nothing of before"
                    yield Finding(what, directory / FILE, 0, 0, extents=(), hint=hint)
                return


def _thinnings(found: list[Link], path: Path) -> Iterator[Finding]:
    """Did each link that replaces an interval replace what there was?"""
    for number, link in enumerate(found):
        if link.kind != Kind.SEALED and link.old != known_digest(found[:number], link.interval):
            what = f"link {number + 1} replaces something else than interval {link.interval} held"
            yield Finding(what, path, link.first_seq, link.time_ns, extents=(), hint=REWRITTEN)


def _before(found: list[Link]) -> dict[tuple[int, int], bytes]:
    """The digest of the segment that each linked one follows."""
    before, known = NONE, {}
    for link in found:
        if link.kind == Kind.SEALED:
            known[link.interval, link.segment] = before
            before = link.new
    return known


def _present(directory: Path, found: list[Link]) -> Iterator[Finding]:
    """Is what there is what the links say, and nothing else?"""
    there, before = set(intervals(directory)), _before(found)
    for interval in sorted({link.interval for link in found} | there):
        last = current(found, interval)
        path = interval_path(directory, interval)
        if last is None:
            if (interval, 0) < last_place(found):
                yield Finding(f"interval {interval} came in later", path, 0, 0, hint=REWRITTEN)
        elif interval not in there:
            if last.kind != Kind.DROPPED:
                what = f"interval {interval} is gone, and no link says that it was dropped"
                yield Finding(what, path, last.first_seq, last.time_ns, hint=REWRITTEN)
        elif last.kind == Kind.SEALED:
            links = [link for link in found if link.interval == interval]
            yield from _segments(path, links, last_place(found), before)
        elif last.kind == Kind.THINNED:
            yield from _thinned(directory, interval, last)


def _beyond(directory: Path, found: list[Link]) -> Iterator[Finding]:
    """Segments after the last link. One that carries digests was linked, but for the one that is being linked just now."""
    carrying = []
    for interval in intervals(directory):
        path = interval_path(directory, interval)
        for number in segments(directory, interval):
            if (interval, number) <= last_place(found):
                continue
            with (
                contextlib.suppress(CorruptError, FileNotFoundError),  # said by who verifies segments
                contextlib.closing(SegmentReader(path, number)) as reader,
            ):
                carried = stamped(reader.page())
                if carried is None or reader.state != SEALED:
                    continue
                if segment_digest(reader) != carried[0]:
                    what = f"segment {number} is not what it was when it was sealed"
                    time_ns = reader.header.first_time_ns
                    yield Finding(what, reader.path, reader.first_seq, time_ns, hint=REWRITTEN)
                carrying.append((interval, number, sealed_link(reader, interval, carried[0])))
    if not carrying:
        return
    now = read(directory)[1]  # links may have been made meanwhile
    missing = [link for interval, number, link in carrying if (interval, number) > last_place(now)]
    if len(missing) > 1 or any(not is_torn(directory, now, link) for link in missing):
        link = missing[0]
        what = f"link {len(now) + 1} is lost or damaged: segment {link.segment} of interval {link.interval} carries its digest"
        yield Finding(what, directory / FILE, link.first_seq, link.time_ns, extents=(), hint=REWRITTEN)


def _segments(
    path: Path, links: list[Link], newest: tuple[int, int], before: dict[tuple[int, int], bytes]
) -> Iterator[Finding]:
    known = {link.segment: link for link in links}
    there = {int(log.stem) for log in path.glob("*.log") if log.stem.isdigit()}
    for number in sorted(known.keys() | there):
        log, link = log_path(path, number), known.get(number)
        if link is None:
            if (int(path.name), number) < newest:
                yield Finding(f"segment {number} came in later", log, 0, 0, hint=REWRITTEN)
            continue
        if number not in there:
            what = f"segment {number} is gone, and no link says that it was dropped"
            yield Finding(what, log, link.first_seq, link.time_ns, hint=REWRITTEN)
            continue
        wrong = _wrong(path, number, link, before[link.interval, number])
        if wrong:
            yield Finding(wrong, log, link.first_seq, link.time_ns, hint=REWRITTEN)


def _wrong(path: Path, number: int, link: Link, before: bytes) -> str:
    """What is wrong with a segment that a link is about, or nothing."""
    try:
        with contextlib.closing(SegmentReader(path, number)) as reader:
            if reader.state != SEALED or segment_digest(reader) != link.new:
                return f"segment {number} is not what it was when it was sealed"
            page = reader.page()
            carried = stamped(page)
            if carried is None and is_stamped(
                page
            ):  # nothing at all: one that an older version lost with the power
                return f"the digests that the header page of segment {number} carries are damaged"
            if carried is not None and carried[0] != link.new:
                return f"the header page of segment {number} carries another digest than its link"
            if carried is not None and carried[1] != before:
                return f"the header page of segment {number} carries another predecessor than the chain has"
    except CorruptError as error:
        return error.message
    except FileNotFoundError:
        return f"segment {number} is gone"
    return ""


def _thinned(directory: Path, interval: int, last: Link) -> Iterator[Finding]:
    """A thinned interval; or still the whole one, where the pass ended between the link and the exchange."""
    path = interval_path(directory, interval)
    digests = []
    try:
        for number in segments(directory, interval):
            with contextlib.closing(SegmentReader(path, number)) as reader:
                digests.append(segment_digest(reader))
    except CorruptError as error:
        yield Finding(error.message, path, last.first_seq, last.time_ns, hint=REWRITTEN)
        return
    if interval_digest(path, digests) not in (last.new, last.old) or NONE in digests:
        what = f"interval {interval} is not what it was when it was thinned"
        yield Finding(what, path, last.first_seq, last.time_ns, hint=REWRITTEN)
