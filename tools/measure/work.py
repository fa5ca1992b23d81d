"""What must grow with the work, and should grow no faster: a base point by what changed, a pass by what it drops."""

import time

import nbd

from tools.measure.basepoints import write
from tools.measure.context import MIB, Context
from tools.measure.result import Measure

BLOCK = 4096
DISK = 1024 * MIB
POLICY = {"bp_every": "10s", "keep_rp": "10s", "keep_bp": "1h"}
AGE_S = 11.0
"""What is older than `keep_rp` goes, counted to the disk's newest record."""


def work(context: Context) -> list[Measure]:
    """Seconds of a cut for each number of blocks, and of a pass for each number of intervals."""
    cut = Measure("work-cut", "base point", "s", "lower")
    prune = Measure("work-prune", "pass that drops them and merges their base points", "s", "lower")
    ours = context.ours
    for _ in range(context.rounds):
        for blocks in context.sizes.cut_blocks:
            with ours.disk(DISK) as name:
                write(context, name, BLOCK, blocks * BLOCK)
                started = time.monotonic()
                ours.client.cut(name)
                cut.add(f"{blocks:,} blocks changed", time.monotonic() - started)
        for intervals in context.sizes.prune_intervals:
            prune.add(f"{intervals:,} intervals dropped", _prune(context, intervals))
    context.say(f"work: cuts {cut.as_dict()['medians']}, passes {prune.as_dict()['medians']}")
    return [cut, prune]


def _prune(context: Context, intervals: int) -> float:
    ours = context.ours
    with ours.disk(64 * MIB) as name:
        handle = nbd.NBD()
        handle.connect_uri(ours.uri(name))
        for number in range(intervals):
            handle.pwrite(number.to_bytes(8, "big") * (BLOCK // 8), number * BLOCK)
            ours.client.cut(name)
        time.sleep(AGE_S)
        handle.pwrite(bytes(BLOCK), 0)
        handle.shutdown()
        ours.client.set_policy(name, POLICY)
        started = time.monotonic()
        ours.client.prune(name, dry_run=False)
        return time.monotonic() - started
