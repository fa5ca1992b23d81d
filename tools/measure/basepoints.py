"""A base point against `qemu-img convert` of the same content from one local file to another.

Ours ends when the file is checked, compared with the journal, on stable storage and published. The peer copies the file that
came out of it, alone as `qemu-img` does by itself, which waits for nothing, and with the file on stable storage at its end.
"""

import time
from pathlib import Path

from cdpserver.names import format_size
from cdpserver.nodes import read_header
from tools.kit.processes import run
from tools.measure import fio
from tools.measure.context import Context
from tools.measure.result import Goal, Measure

OURS, CONVERT, DURABLE = "base point", "qemu-img convert", "the same and durable"
PIECE = 64 << 10


def base_points(context: Context) -> list[Measure]:
    """MB/s of what changed: pieces of 64 KiB at random places, none twice, all indexed."""
    ours, changed = context.ours, context.sizes.changed
    title = f"base point from {format_size(changed)} changed"
    goals = (Goal(OURS, CONVERT, 0.8, "0.8x convert"),)
    measure = Measure("base-point", title, "MB/s", "higher", goals)
    for number in range(context.rounds):
        with ours.disk(2 * changed) as name:
            write(context, name, PIECE, changed)
            context.settle()
            started = time.monotonic()
            image = Path(ours.client.cut(name)["path"])
            measure.add(OURS, changed / 1e6 / (time.monotonic() - started))
            for subject, durable in ((CONVERT, False), (DURABLE, True)):
                context.settle()
                measure.add(subject, changed / 1e6 / _convert(image, context.directory, durable=durable))
        context.say(
            f"base-point {number + 1}/{context.rounds}: {measure.samples[OURS][-1]:,.0f} MB/s, "
            f"{measure.samples[CONVERT][-1]:,.0f} by qemu-img"
        )
    return [measure]


def write(context: Context, name: str, piece: int, total: int) -> None:
    """Random writes of `piece` bytes to a disk, `total` bytes, no place twice; indexed on return."""
    ours = context.ours
    size = int(ours.client.disk(name)["size"])
    ours.fill(name, fio.Job("randwrite", piece, 16, size, io_bytes=total), context.directory)


def _convert(image: Path, directory: Path, *, durable: bool) -> float:
    """Seconds to copy what a QCOW2 file itself holds."""
    copy = directory / "copy.qcow2"
    backing = (image.parent / read_header(image)[0]).resolve()
    started = time.monotonic()
    run(
        *("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", *(("-t", "writeback") if durable else ())),
        *("-B", backing, "-F", backing.suffix.removeprefix("."), image, copy),
    )
    if durable:
        run("sync", copy)
    seconds = time.monotonic() - started
    copy.unlink()
    return seconds
