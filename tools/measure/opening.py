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

WITH_PAYLOAD = 250_000
"""The newest records are writes; what is older than that are trims of 4 KiB, so that ten million records fit on the store."""


def first_byte(context: Context) -> list[Measure]:
    """From the start of `cdp uri DISK@seq:N` (N anywhere in the history) to 4 KiB read over NBD; and reads after that."""
    sizes = context.sizes
    subjects = {records: f"{records:,} records" for records in sizes.records}
    shortest, longest = subjects[sizes.records[0]], subjects[sizes.records[-1]]
    measure = Measure(
        "open",
        "`cdp uri` to the first bytes, indexed",
        "s",
        "lower",
        (
            *(Goal(subject, "", 0.2, "under 0.2 s") for subject in subjects.values()),
            Goal(longest, shortest, 1.2, "flat: at most 1.2x the shortest"),
        ),
    )
    nbd_only = Measure("open-nbd", "of that: connect and read", "s", "lower")
    reading = Measure("open-read", "4 KiB random read of a point, depth 1", "IOPS", "higher")
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
                uri = context.ours.server.uri(f"{name}@seq:{last - 1}")
                job = fio.Job("randread", 4096, 1, DISK_BYTES, seconds=sizes.read_seconds)
                reading.add(subject, fio.read(uri, job, context.directory).iops)
        for subject in names:
            context.say(f"open {subject}: {measure.median(subject):.3f} s")
    return [measure, nbd_only, reading]


def fill(context: Context, name: str, records: int) -> None:
    """Trims, then writes, of 4 KiB at random places, some blocks many times and some never; then the index."""
    written = min(records, WITH_PAYLOAD)
    for kind, count in (("randtrim", records - written), ("randwrite", written)):
        if count:
            job = fio.Job(kind, 4096, 16, DISK_BYTES, io_bytes=count * 4096, again=True)
            context.ours.fill(name, job, context.directory)


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
