"""Do two QCOW2 files with different chains below them hold the same? Read through QEMU, not through us.

Both end in the same older file, so only what lies above it in either chain can differ; QEMU says where that is
(`qemu:allocation-depth` of the NBD protocol), and nothing else is read.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cdpserver import qemu
from cdpserver.errors import BrokenError, CorruptError
from cdpserver.progress import Progress, nobody

WINDOW = 1 << 30
"""Bytes of the disk whose block status is held at a time."""

READ_BYTES = 4 << 20

DEPTH = "qemu:allocation-depth"


def check_same(new: Path, old: Path, *, layers: int, progress: Progress = nobody) -> None:
    """CorruptError unless `new` reads as `old`. `layers` files of `old`'s chain lie above the file that `new` stands on."""
    import nbd

    # A socket's path is short.
    with (
        TemporaryDirectory(prefix="cdp-") as room,
        qemu.serve(new, Path(room) / "new", depth=True) as new_uri,
        qemu.serve(old, Path(room) / "old", depth=True) as old_uri,
    ):
        try:
            images = [_connect(uri) for uri in (new_uri, old_uri)]
            size = images[0].get_size()
            if size != images[1].get_size():
                raise CorruptError(f"{new.name} has {size} bytes, its original {images[1].get_size()}")
            for start in range(0, size, WINDOW):
                end = min(start + WINDOW, size)
                for low, high in _suspects(images, start, end, layers):
                    _compare(images, low, high, old.name)
                progress(end / size)
            for image in images:
                image.shutdown()
        except nbd.Error as error:
            raise BrokenError(f"comparing {old.name} failed: {error}", hint="try again") from None


def _connect(uri: str) -> Any:
    import nbd

    image = nbd.NBD()
    for context in (nbd.CONTEXT_BASE_ALLOCATION, DEPTH):
        image.add_meta_context(context)
    image.connect_uri(uri)
    if not image.can_meta_context(DEPTH):
        raise BrokenError("qemu-nbd does not tell the allocation depth", hint="install QEMU 5.2 or newer")
    return image


def _suspects(images: list[Any], start: int, end: int, layers: int) -> Iterator[tuple[int, int]]:
    """Ranges where either image has something above the file that both stand on, and that are not zero in both."""
    import nbd

    new, old = images
    zero = nbd.CONTEXT_BASE_ALLOCATION
    marks = (
        _runs(new, start, end, DEPTH, lambda depth: depth == 1),
        _runs(old, start, end, DEPTH, lambda depth: 1 <= depth <= layers),
        _runs(new, start, end, zero, lambda flags: bool(flags & nbd.STATE_ZERO)),
        _runs(old, start, end, zero, lambda flags: bool(flags & nbd.STATE_ZERO)),
    )
    edges = sorted({edge for runs in marks for edge in runs})
    states = [False] * len(marks)
    for edge, after in zip(edges, [*edges[1:], end], strict=True):
        for which, runs in enumerate(marks):
            states[which] = runs.get(edge, states[which])
        new_above, old_above, new_zero, old_zero = states
        if (new_above or old_above) and not (new_zero and old_zero):
            yield edge, after


def _runs(image: Any, start: int, end: int, context: str, is_so: Any) -> dict[int, bool]:
    """Where a property begins to hold or not, by offset."""
    runs: dict[int, bool] = {}
    at, before = start, None
    while at < end:
        found: list[int] = []

        def keep(name: str, _offset: int, entries: list[int], _error: int, into: list[int] = found) -> int:
            if name == context:
                into.extend(entries)
            return 0

        image.block_status(end - at, at, keep)
        if not found:
            raise BrokenError(f"qemu-nbd does not tell {context}", hint="try again")
        for length, value in zip(found[::2], found[1::2], strict=True):
            now = is_so(value)
            if now != before and at < end:
                runs[at] = before = now
            at += length
    return runs


def _compare(images: list[Any], start: int, end: int, name: str) -> None:
    for at in range(start, end, READ_BYTES):
        step = min(READ_BYTES, end - at)
        if images[0].pread(step, at) != images[1].pread(step, at):
            raise CorruptError(
                f"the merged {name} differs from its original in bytes {at} to {at + step}",
                hint="it is thrown away, and nothing has changed; run: cdp check DISK --full",
            )
