"""What a mirror costs: the first copy of a disk, and 4 KiB writes of its guest while it is mirrored, write-blocking, or not.

fio --NBD--> qemu-storage-daemon --> raw file
                    \\--mirror--> cdpserver, or qemu-nbd on a QCOW2 file, or nowhere
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cdpserver.names import format_size
from tools.kit.processes import run
from tools.kit.source import Source
from tools.measure import fio
from tools.measure.context import MIB, Context
from tools.measure.result import Goal, Measure
from tools.measure.servers import qemu_nbd

DEPTHS = (1, 16)
OURS, QCOW2, NONE = "mirrored to cdpserver", "mirrored to qemu-nbd QCOW2", "not mirrored"

STRETCH = 16 * MIB
"""Data and holes take turns in a half-empty disk."""

Declare = Callable[[], object]
Target = Callable[[], contextlib.AbstractContextManager[tuple[str, Declare]]]


def first_copy(context: Context) -> list[Measure]:
    """From the start of a mirror until it is READY, of a disk of which every other stretch was never written."""
    size = context.sizes.first_copy
    title = f"first copy of a half-empty disk of {format_size(size)}"
    measure = Measure("first-copy", title, "MB/s", "higher", (Goal(OURS, QCOW2, 1.0, "1.0x qemu-nbd"),))
    directory = context.directory / "mirror"
    directory.mkdir()
    targets = _targets(context, directory, size)
    with Source(directory, size) as source:
        _half_fill(source.image, size)
        for number in range(context.rounds):
            for subject, opened in targets.items():
                with opened() as (uri, _):
                    context.settle()
                    started = time.monotonic()
                    source.mirror(uri)
                    measure.add(subject, size / 1e6 / (time.monotonic() - started))
                    source.end_mirror()
                context.say(
                    f"first-copy {number + 1}/{context.rounds} {subject}: {measure.samples[subject][-1]:,.0f} MB/s"
                )
    run("rm", "-r", directory)
    return [measure]


def _half_fill(image: Path, size: int) -> None:
    piece = os.urandom(STRETCH)
    with open(image, "r+b") as file:
        for at in range(0, size, 2 * STRETCH):
            file.seek(at)
            file.write(piece[: min(STRETCH, size - at)])


def writes(context: Context) -> list[Measure]:
    """The guest's IOPS and latencies at depth 1 and 16."""
    size = context.sizes.random_disk
    measures = [each for depth in DEPTHS for each in _measures(depth)]
    for number in range(context.rounds):
        for subject in (OURS, QCOW2, NONE):
            for depth in DEPTHS:
                figures = _speed(context, subject, size, depth)
                values = (figures.iops, figures.latency_us, figures.p99_us)
                at = DEPTHS.index(depth) * len(values)
                for measure, value in zip(measures[at : at + len(values)], values, strict=True):
                    measure.add(subject, value)
                context.say(
                    f"mirror-{depth} {number + 1}/{context.rounds} {subject}: {figures.iops:,.0f} IOPS"
                )
    return measures


def _measures(depth: int) -> list[Measure]:
    """IOPS, median and 99th percentile."""
    title, goal = (
        f"guest's 4 KiB random write, depth {depth}",
        Goal(OURS, QCOW2, 1.0, "no worse than qemu-nbd"),
    )
    return [
        Measure(f"mirror-{depth}", title, "IOPS", "higher", (goal,)),
        Measure(f"mirror-{depth}-p50", f"{title}, median latency", "us", "lower", (goal,)),
        Measure(f"mirror-{depth}-p99", f"{title}, p99", "us", "lower", (goal,)),
    ]


def _speed(context: Context, subject: str, size: int, depth: int) -> fio.Figures:
    directory = context.directory / "mirror"
    directory.mkdir()
    job = fio.Job("randwrite", 4096, depth, size, seconds=context.sizes.read_seconds)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(Source(directory, size))
        if subject != NONE:
            uri, declare = stack.enter_context(_targets(context, directory, size)[subject]())
            source.mirror(uri)
            declare()
            stack.callback(source.end_mirror)
        context.settle()
        figures = fio.write_for(source.uri, job, directory)
    run("rm", "-r", directory)
    return figures


def _targets(context: Context, directory: Path, size: int) -> dict[str, Target]:
    """A fresh target of each kind: its URI, and what says that it is in sync."""
    return {OURS: lambda: _ours(context, size), QCOW2: lambda: _qcow2(directory, size)}


@contextlib.contextmanager
def _ours(context: Context, size: int) -> Iterator[tuple[str, Declare]]:
    with context.ours.disk(size, declared=False) as name:
        yield context.ours.uri(name), lambda: context.ours.declare(name)


@contextlib.contextmanager
def _qcow2(directory: Path, size: int) -> Iterator[tuple[str, Declare]]:
    image = directory / "target.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
    with qemu_nbd(image, directory / "target.sock") as uri:
        yield uri, lambda: None
    image.unlink()
