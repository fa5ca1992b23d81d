"""Writes on fresh space: ours against QCOW2 overlays behind qemu-nbd and a raw file behind nbdkit.

Two kinds of overlay: as `qemu-img create` makes them, where a first write of 4 KiB copies a cluster of 64 KiB from the backing
file, and with `extended_l2=on`, where it copies nothing.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.measure import fio
from tools.measure.context import MIB, Context
from tools.measure.result import Goal, Measure
from tools.measure.servers import Fresh, nbdkit_file, overlay

DEPTH = 16
"""What QEMU keeps in flight on a connection."""

OURS, OVERLAY, EXTENDED, FILE = "cdpserver", "qemu-nbd QCOW2 overlay", "the same, extended_l2", "nbdkit file"

Opener = Callable[[], contextlib.AbstractContextManager[Fresh]]
Figure = Callable[[fio.Figures], float]


def random_4k(context: Context) -> list[Measure]:
    """4 KiB random writes, no block twice."""
    sizes = context.sizes
    goals = (Goal(OURS, OVERLAY, 2.0, "2x the overlay"), Goal(OURS, FILE, 0.5, "0.5x the file"))
    title = f"4 KiB random write, depth {DEPTH}"
    measure = Measure("write-4k", title, "IOPS", "higher", goals)
    job = fio.Job("randwrite", 4096, DEPTH, sizes.random_disk, io_bytes=sizes.random_io)
    _rounds(context, job, [(measure, lambda figures: figures.iops)])
    return [measure]


def latency_4k(context: Context) -> list[Measure]:
    """The latency of 4 KiB random writes that come one after the other."""
    sizes = context.sizes
    goal = Goal(OURS, OVERLAY, 1.0, "no worse than the overlay")
    title = "4 KiB random write, depth 1"
    p50 = Measure("write-4k-p50", f"{title}, median latency", "us", "lower", (goal,))
    p99 = Measure("write-4k-p99", f"{title}, p99", "us", "lower", (goal,))
    job = fio.Job("randwrite", 4096, 1, sizes.random_disk, io_bytes=sizes.latency_io)
    _rounds(context, job, [(p50, lambda figures: figures.latency_us), (p99, lambda figures: figures.p99_us)])
    return [p50, p99]


def sequential_1m(context: Context) -> list[Measure]:
    """1 MiB writes from the start to the end."""
    size = context.sizes.sequential
    goals = (Goal(OURS, OVERLAY, 1.2, "1.2x the overlay"), Goal(OURS, FILE, 0.7, "0.7x the file"))
    title = f"1 MiB sequential write, depth {DEPTH}"
    measure = Measure("write-1m", title, "MB/s", "higher", goals)
    job = fio.Job("write", MIB, DEPTH, size, io_bytes=size)
    _rounds(context, job, [(measure, lambda figures: figures.mb_s)])
    return [measure]


def _rounds(context: Context, job: fio.Job, measures: Sequence[tuple[Measure, Figure]]) -> None:
    """The subjects in turn; what each measure takes of fio's figures."""
    directory = context.directory
    backing = directory / "backing.raw"
    fill(backing, job.size)
    subjects: dict[str, Opener] = {
        OURS: lambda: context.ours.fresh(job.size),
        OVERLAY: lambda: overlay(backing, directory),
        EXTENDED: lambda: overlay(backing, directory, "extended_l2=on"),
        FILE: lambda: nbdkit_file(job.size, directory),
    }
    for number in range(context.rounds):
        for subject, opened in subjects.items():
            with opened() as fresh:
                context.settle()
                figures = fio.write(fresh.uri, job, directory, wrote=fresh.wrote, declare=fresh.declare)
                fresh.verify(job.io_bytes)
            for measure, figure in measures:
                measure.add(subject, figure(figures))
                context.say(
                    f"{measure.name} {number + 1}/{context.rounds} {subject}: {figure(figures):,.0f} {measure.unit}"
                )
    backing.unlink()


def fill(path: Path, size: int) -> None:
    """A file full of bytes that no server can compress or skip."""
    piece = os.urandom(4 * MIB)
    with open(path, "wb") as file:
        for at in range(0, size, len(piece)):
            file.write(piece[: min(len(piece), size - at)])
