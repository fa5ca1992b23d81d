"""Writes on fresh space: ours against a QCOW2 overlay behind qemu-nbd and a raw file behind nbdkit."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from tools.measure import fio
from tools.measure.context import MIB, Context
from tools.measure.result import Goal, Measure
from tools.measure.servers import Fresh, nbdkit_file, overlay

DEPTH = 16
"""What QEMU keeps in flight on a connection."""

OURS, OVERLAY, FILE = "cdpserver", "qemu-nbd QCOW2 overlay", "nbdkit file"

Opener = Callable[[], contextlib.AbstractContextManager[Fresh]]


def random_4k(context: Context) -> list[Measure]:
    """4 KiB random writes, no block twice."""
    sizes = context.sizes
    measure = Measure(
        "write-4k",
        f"4 KiB random write, depth {DEPTH}",
        "IOPS",
        "higher",
        (Goal(OURS, OVERLAY, 1.5, "1.5x the overlay"),),
    )
    job = fio.Job("randwrite", 4096, DEPTH, sizes.random_disk, io_bytes=sizes.random_io)
    _rounds(context, measure, job, lambda figures: figures.iops)
    return [measure]


def sequential_1m(context: Context) -> list[Measure]:
    """1 MiB writes from the start to the end."""
    size = context.sizes.sequential
    measure = Measure(
        "write-1m",
        f"1 MiB sequential write, depth {DEPTH}",
        "MB/s",
        "higher",
        (Goal(OURS, OVERLAY, 0.8, "0.8x the overlay"),),
    )
    job = fio.Job("write", MIB, DEPTH, size, io_bytes=size)
    _rounds(context, measure, job, lambda figures: figures.mb_s)
    return [measure]


def _rounds(context: Context, measure: Measure, job: fio.Job, figure: Callable[[fio.Figures], float]) -> None:
    directory = context.directory
    backing = directory / "backing.raw"
    fill(backing, job.size)
    subjects: dict[str, Opener] = {
        OURS: lambda: context.ours.fresh(job.size),
        OVERLAY: lambda: overlay(backing, directory),
        FILE: lambda: nbdkit_file(job.size, directory),
    }
    latencies: dict[str, list[float]] = {}
    for number in range(context.rounds):
        for subject, opened in subjects.items():
            with opened() as fresh:
                context.settle()
                figures = fio.write(fresh.uri, job, directory, wrote=fresh.wrote, declare=fresh.declare)
                fresh.verify(job.io_bytes)
            measure.add(subject, figure(figures))
            latencies.setdefault(subject, []).append(figures.latency_us)
            context.say(
                f"{measure.name} {number + 1}/{context.rounds} {subject}: {figure(figures):,.0f} {measure.unit}"
            )
    measure.notes["median latency, us"] = {
        name: round(sorted(found)[len(found) // 2]) for name, found in latencies.items()
    }
    backing.unlink()


def fill(path: Path, size: int) -> None:
    """A file full of bytes that no server can compress or skip."""
    piece = os.urandom(4 * MIB)
    with open(path, "wb") as file:
        for at in range(0, size, len(piece)):
            file.write(piece[: min(len(piece), size - at)])
