"""What a mirror costs the guest: 4 KiB writes to a disk of QEMU that is mirrored, write-blocking, or not.

fio --NBD--> qemu-storage-daemon --> raw file
                    \\--mirror--> cdpserver, or qemu-nbd on a QCOW2 file, or nowhere
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.kit.processes import run
from tools.kit.source import Source
from tools.measure import fio
from tools.measure.context import Context
from tools.measure.result import Goal, Measure
from tools.measure.servers import qemu_nbd

DEPTHS = (1, 16)
OURS, QCOW2, NONE = "mirrored to cdpserver", "mirrored to qemu-nbd QCOW2", "not mirrored"

Mirrored = Callable[[Source, Path], contextlib.AbstractContextManager[None]]


def writes(context: Context) -> list[Measure]:
    """The guest's IOPS at depth 1 and 16; the median latencies as notes."""
    subjects: dict[str, Mirrored] = {
        OURS: lambda source, _: _to_ours(context, source),
        QCOW2: lambda source, directory: _to_qcow2(source, directory, context.sizes.random_disk),
        NONE: lambda *_: contextlib.nullcontext(),
    }
    measures = []
    for depth in DEPTHS:
        goal = Goal(OURS, QCOW2, 1.0, "no worse than qemu-nbd")
        title = f"guest's 4 KiB random write, depth {depth}"
        measures.append(Measure(f"mirror-{depth}", title, "IOPS", "higher", (goal,)))
    latencies: dict[str, dict[str, list[float]]] = {measure.name: {} for measure in measures}
    for number in range(context.rounds):
        for subject, mirrored in subjects.items():
            for depth, measure in zip(DEPTHS, measures, strict=True):
                figures = _speed(context, mirrored, depth)
                measure.add(subject, figures.iops)
                latencies[measure.name].setdefault(subject, []).append(figures.latency_us)
                context.say(
                    f"{measure.name} {number + 1}/{context.rounds} {subject}: {figures.iops:,.0f} IOPS"
                )
    for measure in measures:
        measure.notes["median latency, us"] = {
            name: round(sorted(found)[len(found) // 2]) for name, found in latencies[measure.name].items()
        }
    return measures


def _speed(context: Context, mirrored: Mirrored, depth: int) -> fio.Figures:
    directory = context.directory / "mirror"
    directory.mkdir()
    size = context.sizes.random_disk
    job = fio.Job("randwrite", 4096, depth, size, seconds=context.sizes.read_seconds)
    with Source(directory, size) as source, mirrored(source, directory):
        context.settle()
        figures = fio.write_for(source.uri, job, directory)
    run("rm", "-r", directory)
    return figures


@contextlib.contextmanager
def _to_ours(context: Context, source: Source) -> Iterator[None]:
    with context.ours.disk(context.sizes.random_disk, declared=False) as name:
        source.mirror(context.ours.uri(name))
        context.ours.declare(name)
        yield
        source.end_mirror()


@contextlib.contextmanager
def _to_qcow2(source: Source, directory: Path, size: int) -> Iterator[None]:
    image = directory / "target.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(size))
    with qemu_nbd(image, directory / "target.sock") as uri:
        source.mirror(uri)
        yield
        source.end_mirror()
