"""`cdp export`: a point as an image file, on a device, or to an NBD server; goes on where it was interrupted."""

import contextlib
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from cdpserver import durable, qemu
from cdpserver.copying.nbdend import CutError
from cdpserver.copying.origin import NbdOrigin, Origin
from cdpserver.copying.plan import Extents, chunks, sample
from cdpserver.copying.target import NbdTarget, RawFile
from cdpserver.errors import CorruptError, NoSpaceError, RefusedError, UsageError
from cdpserver.names import format_bytes, parse_point
from recovery.bar import Bar, moving
from recovery.export_several import export_several
from recovery.opened import opened
from recovery.output import answer, answer_json, say
from recovery.together import several
from recovery.unfinished import Output, Partial, Unfinished, load, save

PATIENCE_S = 60.0
"""How long a lost connection is tried anew without a byte copied."""

PAUSE_S = 0.5

CHECKED_LAST, CHECKED_SPREAD = 64, 64
"""Chunks of what was done before that a resumed export compares: the last ones, which an unclean stop of the host could have
hurt, and some of the others."""

CLIENTS = 16
"""More connections than any copy or comparison makes to an image."""

Opening: TypeAlias = Callable[["Unfinished | None"], AbstractContextManager["Exported"]]
"""Opens what is written out; it is told of an interrupted export of it that goes on."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What is written out, and what it is an instant of."""

    disk: str
    timeline: str
    seq: int
    time_ns: int
    origin: Origin


def export(options: Namespace) -> None:
    """Copy, and verify if asked. NoSpaceError, RefusedError, CorruptError; the same command goes on."""
    found = several(options, options.point)
    tell(options, _one(options) if found is None else export_several(options, found, _one))


def _one(options: Namespace) -> dict[str, Any]:
    """The export of one disk."""

    @contextlib.contextmanager
    def opening(left: Unfinished | None) -> Iterator[Exported]:
        point = options.point
        if left is not None and left.point == point:
            # An interrupted `latest` goes on with the instant that it began with.
            point = f"{parse_point(point)[0]}@seq:{left.seq}"
        with opened(options, point) as found, NbdOrigin(found.uri) as origin:
            yield Exported(found.disk, found.timeline, found.seq, found.time_ns, origin)

    return written(options, opening)


def tell(options: Namespace, result: dict[str, Any]) -> None:
    """The answer of an export."""
    if options.json:
        answer_json(result)
        return
    for one in result.get("disks", [result]):
        answer(_told(one))


def written(options: Namespace, opening: Opening) -> dict[str, Any]:
    """What `opening` opens, at `options.output`: copied, gone on with or compared."""
    output = Output.parse(options.output)
    if options.format != "raw" and output.kind != "file":
        raise UsageError("a device or an NBD server takes raw content", hint="leave --format out")
    work = _Export(options, output, opening)
    if output.kind != "nbd" and output.path.exists() and not options.force and not work.resumes:
        if not options.verify:
            raise RefusedError(
                f"{output.text} is there already",
                hint="--force replaces it, --verify compares it with the point",
            )
        return work.compare_only()
    return work.run()


def _told(result: dict[str, Any]) -> str:
    if result["action"] == "finished before":
        return f"{result['output']}: {result['point']}, finished before"
    same = "compared: no difference"
    if result["action"] == "compared":
        return f"{result['output']} holds {result['point']}; {same}"
    rate = f"{format_bytes(result['bytes_per_second'])}/s"
    amount = f"{format_bytes(result['copied_bytes'])} of {format_bytes(result['size'])} copied"
    told = f"{result['output']}: {result['point']}, {amount}, {rate}"
    return f"{told}; {same}" if result["verified"] else told


class _Export:
    def __init__(self, options: Namespace, output: Output, opening: Opening) -> None:
        self._options = options
        self._opening = opening
        self._output = output
        self._left = None if options.force else load(output.side)
        self._copied = 0
        self._progressed = time.monotonic()

    @property
    def resumes(self) -> bool:
        """Was an export to this place interrupted?"""
        return self._left is not None

    def compare_only(self) -> dict[str, Any]:
        """Compare what is there."""
        path = self._output.path
        with self._opening(self._left) as point, moving(f"comparing {path.name}") as bar:
            with serving(path, self._options.format) as uri:
                compared = verify_same(point.origin, uri, self._output.text, bar)
            return self._result(point, "compared") | {"compared_bytes": compared, "verified": True}

    def run(self) -> dict[str, Any]:
        """Copy until it is done. A connection that is lost is tried anew for a while."""
        with contextlib.ExitStack() as stack:
            partial = None
            if self._output.kind == "file":
                partial = Partial(self._output.partial)
                stack.callback(partial.close)
                if self._left is None and not partial.empty and not self._options.force:
                    raise RefusedError(
                        f"{partial.path} is not of an export that could go on",
                        hint="remove it, or use --force to write over it",
                    )
                if partial.empty:
                    self._left = None
            self._progressed = time.monotonic()
            while True:
                try:
                    return self._attempt(partial)
                except CutError as error:
                    if time.monotonic() - self._progressed > PATIENCE_S:
                        raise
                    say(f"{error.message}; trying again")
                    time.sleep(PAUSE_S)

    def _attempt(self, partial: Partial | None) -> dict[str, Any]:
        started = time.monotonic()
        with self._opening(self._left) as point:
            extents = point.origin.data()
            begin = self._begin(point, point.origin.size, partial)
            with self._image(partial, begin) as uri:
                start = self._checked(point, extents, uri, begin, partial)
                copied = self._copy(point, extents, uri, partial, start)
                seconds = time.monotonic() - started
                verified = self._options.verify and self._compare(point, uri, partial)
            if partial is not None:
                if begin.format == "qcow2":
                    qemu.check(partial.path)
                durable.publish(partial.path, self._output.path)
            self._output.side.unlink(missing_ok=True)
        return self._result(point, "copied") | {
            "size": begin.size,
            "copied_bytes": copied,
            "resumed_at": start,
            "seconds": round(seconds, 3),
            "bytes_per_second": round(copied / seconds),
            "verified": bool(verified),
        }

    def _result(self, point: Exported, action: str) -> dict[str, Any]:
        return {
            "point": f"{point.disk}@seq:{point.seq}",
            "timeline": point.timeline,
            "seq": point.seq,
            "time_ns": point.time_ns,
            "output": self._output.text,
            "format": self._options.format,
            "action": action,
        }

    def _begin(self, point: Exported, size: int, partial: Partial | None) -> Unfinished:
        """The side file of this export: a new one, or the one that is there."""
        options = self._options
        mine = Unfinished(
            options.point, point.disk, point.timeline, point.seq, size, options.format, options.sparse,
            self._output.text, 0,
        )  # fmt: skip
        if self._left is not None:
            if not self._left.is_of(mine):
                raise RefusedError(
                    f"{self._output.text}: another export was interrupted, of {self._left.disk}@seq:{self._left.seq}",
                    hint=f"give its command again ({self._left.point}, with its options), or --force to begin anew",
                )
            mine = self._left
        if not mine.copied:
            self._fresh(mine, partial)
        return mine

    def _fresh(self, mine: Unfinished, partial: Partial | None) -> None:
        # It comes first, so that a new image is never taken for somebody else's, nor for one that is half done.
        save(self._output.side, mine)
        if partial is not None:
            partial.begin(mine.size)
            if mine.format == "qcow2":
                qemu.create_image(partial.path, size=mine.size)
        self._left = mine

    @contextlib.contextmanager
    def _image(self, partial: Partial | None, begin: Unfinished) -> Iterator[str | None]:
        """The URI that is written to; None for a raw file, which is written without a server."""
        if self._output.kind == "nbd":
            yield self._output.text
        elif self._output.kind == "device":
            with serving(self._output.path, "raw", writable=True) as uri:
                yield uri
        elif begin.format == "qcow2":
            assert partial is not None
            if begin.copied:
                qemu.drop_leaks(partial.path)
            with serving(partial.path, "qcow2", writable=True) as uri:
                yield uri
        else:
            yield None

    def _checked(
        self, point: Exported, extents: Extents, uri: str | None, begin: Unfinished, partial: Partial | None
    ) -> int:
        """Where to go on: what was done before is looked at."""
        if not begin.copied:
            return 0
        steps = [step for step in chunks(extents, zeros=False) if step.end <= begin.copied]
        looked = sample(steps, last=CHECKED_LAST, spread=CHECKED_SPREAD)
        with contextlib.ExitStack() as stack:
            if uri is None:
                assert partial is not None
                uri = stack.enter_context(serving(partial.path, "raw"))
            different = point.origin.compare(uri, looked, lambda _: None, upto=begin.copied).different
        if not different:
            say(
                f"{begin.disk}@seq:{begin.seq}: going on at {format_bytes(begin.copied)} of {format_bytes(begin.size)}"
            )
            return begin.copied
        say(f"{self._output.text} was changed since the interruption, at {different[0][0]}: beginning anew")
        if begin.format == "raw":
            self._fresh(replace(begin, copied=0), partial)
            return 0
        raise CorruptError(
            f"{self._output.partial} was changed since the interruption",
            hint="--force begins the export anew",
        )

    def _copy(
        self, point: Exported, extents: Extents, uri: str | None, partial: Partial | None, start: int
    ) -> int:
        assert self._left is not None
        left = self._left
        total = sum(step.bytes for step in chunks(extents, zeros=False, start=start))
        target: RawFile | NbdTarget
        if uri is None:
            assert partial is not None
            target = RawFile(partial.path)
        else:
            target = NbdTarget(uri, fresh=partial is not None)
        try:
            if isinstance(target, NbdTarget) and target.size < left.size:
                raise RefusedError(
                    f"{self._output.text} has {target.size} bytes, and the point {left.size}",
                    hint="name an output that is large enough",
                )

            def checkpoint(at: int) -> None:
                nonlocal left
                left = self._left = replace(left, copied=at)
                save(self._output.side, left)

            with moving(f"exporting {point.disk}@seq:{point.seq}", total) as bar:

                def progress(done: int) -> None:
                    if done != self._copied:
                        self._copied, self._progressed = done, time.monotonic()
                    bar(done, total)

                done = point.origin.copy(
                    target, extents, start=start, sparse=left.sparse, checkpoint=checkpoint, progress=progress
                )
                return done.read
        except NoSpaceError as error:
            raise self._full(error, extents) from error
        finally:
            target.end()

    def _full(self, error: NoSpaceError, extents: Extents) -> NoSpaceError:
        """How much is missing."""
        assert self._left is not None
        rest = sum(step.bytes for step in chunks(extents, zeros=False, start=self._left.copied))
        hint = "make room there, then give the same command again: it goes on"
        if self._output.kind != "file":
            return NoSpaceError(f"{error.message}; {format_bytes(rest)} are still to be written", hint=hint)
        free = os.statvfs(self._output.path.parent)
        # What was written behind the last checkpoint has its room already.
        used = self._output.partial.stat().st_blocks * 512
        done = extents.bytes - rest
        missing = max(rest - max(0, used - done) - free.f_bavail * free.f_frsize, 0)
        return NoSpaceError(
            f"no space left for {self._output.text}: about {format_bytes(missing)} are missing", hint=hint
        )

    def _compare(self, point: Exported, uri: str | None, partial: Partial | None) -> bool:
        with contextlib.ExitStack() as stack:
            if uri is None:
                assert partial is not None
                partial.forget_pages()
                uri = stack.enter_context(serving(partial.path, "raw"))
            bar = stack.enter_context(moving(f"comparing {self._output.text}"))
            verify_same(point.origin, uri, self._output.text, bar)
        return True


@contextlib.contextmanager
def serving(path: Path, format: str, *, writable: bool = False) -> Iterator[str]:
    """An image over NBD, on a socket that nobody else finds."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        at = Path(directory) / "nbd"
        with qemu.serve(path, at, format=format, clients=CLIENTS, writable=writable) as uri:
            yield uri


def verify_same(origin: Origin, other: str, name: str, bar: Bar) -> int:
    """Bytes compared; CorruptError unless everything is the same."""
    there = data_of(other)
    if there.size < origin.size:
        raise CorruptError(
            f"{name} has {there.size} bytes, and the point {origin.size}", hint="--force writes it anew"
        )
    every = origin.data().union(there)
    compared = origin.compare(
        other,
        chunks(every, zeros=False),
        lambda done: bar(min(done, every.bytes), every.bytes),
        upto=origin.size,
    )
    if compared.different:
        more = len(compared.different) - 1
        raise CorruptError(
            f"{name} differs from the point at {compared.different[0][0]}"
            + (f" and in {more} more places" if more else ""),
            hint="--force writes it anew",
        )
    return compared.bytes


def data_of(uri: str) -> Extents:
    """What of an export is not known to read as zeros."""
    with NbdOrigin(uri) as end:
        return end.data()
