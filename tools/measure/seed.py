"""Many disks with a small history each, made by the target's own code without a service: what a large host has at its start."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cdpserver import timeline
from cdpserver.catalog import Catalog
from cdpserver.clock import fix_clock
from cdpserver.state import StateDir
from cdpserver.target.disk import TargetDisk
from cdpserver.timeline import EmptyBase, Timeline
from tools.measure.context import Context

SIZE = 16 << 20
BLOCK = 4096
MAKERS = 8
"""Disks made at once: making one waits for the store's disk most of the time."""


def seed(directory: Path, count: int, *, records: int = 20, size: int = SIZE) -> None:
    """A state directory with `count` disks, closed cleanly, each with a first copy and `records` writes since *synced*."""
    state = StateDir.create_or_open(directory)
    clock, _ = fix_clock(state.clock, lambda: 0)
    Catalog.recover(state)
    made: list[Timeline] = []
    with Catalog.open(state, writable=True) as catalog:
        for number in range(count):
            id, now_ns = catalog.next_id(), clock.now_ns()
            name = f"idle{number}"
            made.append(
                timeline.create_timeline(
                    state, id=id, name=name, vm=None, size=size, base=EmptyBase(), now_ns=now_ns
                )
            )
            catalog.add(name, id, created_ns=now_ns)

    def fill(one: Timeline) -> None:
        disk = TargetDisk(
            state.path, one, clock_ns=clock.now_ns, boot_id=clock.boot_id, emit=lambda *_, **__: None
        )
        client = disk.connect()
        client.write(memoryview(bytes(BLOCK)), 0)
        disk.synced(None, write_blocking=True)
        for number in range(records):
            client.write(memoryview(number.to_bytes(4, "little") * (BLOCK // 4)), number * BLOCK)
        disk.shut(removing=False)

    with ThreadPoolExecutor(MAKERS) as makers:
        list(makers.map(fill, made))


@contextlib.contextmanager
def seeded(context: Context, count: int) -> Iterator[Path]:
    """A state directory with so many disks; removed at the end."""
    directory = context.directory / f"many{count}"
    started = time.monotonic()
    seed(directory, count)
    context.say(f"{count} disks made in {time.monotonic() - started:.0f} s")
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
