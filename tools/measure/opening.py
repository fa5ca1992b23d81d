"""How long it takes to open an instant, with journals of very different lengths."""

import contextlib
import os
import random
import subprocess
import time

import nbd

from cdpserver.names import parse_size
from tools.kit.processes import FailedError
from tools.kit.server import BIN
from tools.measure import fio
from tools.measure.context import Context
from tools.measure.result import Goal, Measure

DISK_BYTES = parse_size("1G")


def first_byte(context: Context) -> list[Measure]:
    """From the start of the process `cdp uri DISK@seq:N` (N anywhere in the history) to 4 KiB read over NBD."""
    sizes = context.sizes
    subjects = {records: f"{records:,} records" for records in sizes.records}
    shortest, longest = subjects[sizes.records[0]], subjects[sizes.records[-1]]
    measure = Measure(
        "open",
        "`cdp uri` to the first bytes, indexed",
        "s",
        "lower",
        (
            *(Goal(subject, "", 0.3, "under 0.3 s") for subject in subjects.values()),
            Goal(longest, shortest, 1.5, "flat: at most 1.5x the shortest"),
        ),
    )
    nbd_only = Measure("open-nbd", "of that: connect and read", "s", "lower")
    with contextlib.ExitStack() as stack:
        names = {}
        for records, subject in subjects.items():
            names[subject] = stack.enter_context(context.ours.disk(DISK_BYTES))
            started = time.monotonic()
            fill(context, names[subject], records)
            context.say(f"open: {subject} written and indexed in {time.monotonic() - started:.0f} s")
        context.settle()
        chance = random.Random(1)
        for _ in range(context.rounds):
            for subject, name in names.items():
                last = int(context.ours.client.disk(name)["last_seq"])
                for _ in range(sizes.openings):
                    point = f"{name}@seq:{chance.randint(max(1, last // 2), last)}"
                    whole, after = open_point(context, point, chance.randrange(DISK_BYTES // 4096) * 4096)
                    measure.add(subject, whole)
                    nbd_only.add(subject, after)
        for subject in names:
            context.say(f"open {subject}: {measure.median(subject):.3f} s")
    return [measure, nbd_only]


def fill(context: Context, name: str, records: int) -> None:
    """4 KiB writes at random places, some blocks many times and some never; then the index."""
    ours = context.ours
    job = fio.Job("randwrite", 4096, 16, DISK_BYTES, io_bytes=records * 4096, again=True)
    fio.write(
        ours.uri(name),
        job,
        context.directory,
        wrote=lambda: ours.session(name) > 0,
        declare=lambda: ours.declare(name),
    )
    ours.wait_indexed(name)


def open_point(context: Context, point: str, offset: int) -> tuple[float, float]:
    """(seconds from the start of the process to the bytes, seconds of that for NBD)."""
    environment = {**os.environ, "CDP_STATE_DIR": str(context.ours.server.path)}
    started = time.perf_counter()
    done = subprocess.run(
        [BIN / "cdp", "uri", point], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise FailedError(f"cdp uri {point}: {done.stderr.strip()}")
    named = time.perf_counter()
    handle = nbd.NBD()
    handle.connect_uri(done.stdout.strip())
    handle.pread(4096, offset)
    ended = time.perf_counter()
    handle.shutdown()
    return ended - started, ended - named
