"""What the journal costs where nothing new is said: a zeroed terabyte, and a mirror of an unchanged disk."""

import os
import time

from cdpserver.names import format_size
from tools.measure.context import GIB, MIB, Context
from tools.measure.load import Pipeline
from tools.measure.result import Goal, Measure

QEMU_ZERO = 32 * MIB
"""QEMU's longest request to zero."""

OPEN, CLOSED = "while its interval is open", "once its interval is closed"


def zero(context: Context) -> list[Measure]:
    """Zero a whole disk, in requests of 1 GiB and in QEMU's of 32 MiB."""
    size = context.sizes.zero_disk
    title = f"zero of {format_size(size)}"
    subjects = {"in 1 GiB requests": GIB, "in 32 MiB requests (QEMU)": QEMU_ZERO}
    large = next(iter(subjects))
    seconds = Measure("zero", title, "s", "lower", (Goal(large, "", 1.0, "under 1 s"),))
    index = Measure(
        "zero-index", "its index", "bytes", "lower", (Goal(large, "", float(MIB), "under 1 MiB"),)
    )
    journal = Measure("zero-journal", "its journal", "bytes", "lower")
    ours = context.ours
    for number in range(context.rounds):
        for subject, step in subjects.items():
            with ours.disk(size) as name:
                before = ours.journal_bytes(name), ours.index_bytes(name)
                pipeline = Pipeline(ours.uri(name))
                started = time.monotonic()
                for offset in range(0, size, step):
                    pipeline.zero(min(step, size - offset), offset)
                pipeline.drain()
                seconds.add(subject, time.monotonic() - started)
                pipeline.close()
                ours.wait_indexed(name)
                journal.add(subject, ours.journal_bytes(name) - before[0])
                index.add(subject, ours.index_bytes(name) - before[1])
            context.say(f"zero {number + 1}/{context.rounds} {subject}: {seconds.samples[subject][-1]:.2f} s")
    return [seconds, index, journal]


def remirror(context: Context) -> list[Measure]:
    """A second full mirror of a disk on which nothing changed: QEMU zeroes the target, then sends everything again."""
    size = context.sizes.remirror
    disk = f"{format_size(size)} of random bytes"
    goal = "under 0.1 %"
    title = "unchanged re-mirror: journal and index by the disk's size"
    share = Measure("remirror", title, "%", "lower")
    share.goals = tuple(Goal(subject, "", 0.1, goal) for subject in (OPEN, CLOSED))
    journal = Measure("remirror-journal", "its journal", "bytes", "lower")
    delta = Measure("remirror-delta", "its base point, a QCOW2 file", "bytes", "lower")
    speed = Measure("remirror-speed", "its speed, up to *synced* and indexed", "MB/s", "higher")
    pieces = [os.urandom(MIB) for _ in range(16)]
    ours = context.ours
    for number in range(context.rounds):
        with ours.disk(size) as name:
            _mirror(context, name, pieces, size)
            ours.cut(name)
            before = ours.journal_bytes(name), ours.index_bytes(name)
            started = time.monotonic()
            _mirror(context, name, pieces, size)
            took = time.monotonic() - started
            headers = ours.journal_bytes(name) - before[0]
            share.add(OPEN, 100 * (headers + ours.index_bytes(name) - before[1]) / size)
            delta.add(disk, os.stat(ours.cut(name)).st_blocks * 512)
            share.add(CLOSED, 100 * (headers + ours.index_bytes(name) - before[1]) / size)
        journal.add(disk, headers)
        speed.add(disk, size / 1e6 / took)
        context.say(
            f"remirror {number + 1}/{context.rounds}: {headers:,} bytes of journal, {share.samples[CLOSED][-1]:.3f} %"
        )
    return [share, journal, delta, speed]


def _mirror(context: Context, name: str, pieces: list[bytes], size: int) -> None:
    """What a mirror with `sync=full` sends, up to *synced* and its index. Each piece differs by its number."""
    pipeline = Pipeline(context.ours.uri(name))
    for offset in range(0, size, QEMU_ZERO):
        pipeline.zero(min(QEMU_ZERO, size - offset), offset)
    pipeline.drain()
    for number, offset in enumerate(range(0, size, MIB)):
        pipeline.write(number.to_bytes(8, "little") + pieces[number % len(pieces)][8:], offset)
    pipeline.drain()
    pipeline.flush()
    context.ours.declare(name)
    pipeline.close()
    context.ours.wait_indexed(name)
