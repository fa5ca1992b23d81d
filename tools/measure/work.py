"""What must grow with the work, and should grow no faster: a base point by what changed, a pass by what it drops.

By the clock, and in processor time of all processes of the service, which other work disturbs less.
"""

import time
from collections.abc import Callable
from functools import partial

import nbd

from tools.kit.processes import FailedError, until
from tools.measure.basepoints import write
from tools.measure.context import MIB, Context
from tools.measure.processes import Processes
from tools.measure.result import Measure
from tools.measure.servers import Ours

BLOCK = 4096
DISK = 1024 * MIB
POLICY = {"bp_every": "10s", "keep_rp": "10s", "keep_bp": "1h"}
AGE_S = 11.0
"""What is older than `keep_rp` goes, counted to the disk's newest record."""


class _Timed:
    """A measure by the clock, and one of processor time."""

    def __init__(self, context: Context, key: str, title: str) -> None:
        self._processes = Processes.of(context.ours.server)
        self.clock = Measure(key, title, "s", "lower")
        self.cpu = Measure(f"{key}-cpu", f"{title}, processor time", "s", "lower")

    def add(self, subject: str, do: Callable[[], object]) -> None:
        """Time what is done."""
        started, spent = time.monotonic(), self._processes.spent()
        do()
        self.clock.add(subject, time.monotonic() - started)
        self.cpu.add(subject, self._processes.spent() - spent)


def work(context: Context) -> list[Measure]:
    """A cut for each number of blocks, and a pass for each number of intervals."""
    cut = _Timed(context, "work-cut", "base point")
    prune = _Timed(context, "work-prune", "pass that drops them and merges their base points")
    ours = context.ours
    for _ in range(context.rounds):
        for blocks in context.sizes.cut_blocks:
            with ours.disk(DISK) as name:
                write(context, name, BLOCK, blocks * BLOCK)
                cut.add(f"{blocks:,} blocks changed", partial(ours.client.cut, name))
        for intervals in context.sizes.prune_intervals:
            with ours.disk(64 * MIB) as name:
                _age(context, name, intervals)
                prune.add(f"{intervals:,} intervals dropped", partial(_drop, ours, name))
    found = [cut.clock, cut.cpu, prune.clock, prune.cpu]
    context.say("work: " + ", ".join(f"{measure.name} {measure.as_dict()['medians']}" for measure in found))
    return found


def _age(context: Context, name: str, intervals: int) -> None:
    """Give a disk so many intervals that its policy does not keep."""
    ours = context.ours
    handle = nbd.NBD()
    handle.connect_uri(ours.uri(name))
    for number in range(intervals):
        handle.pwrite(number.to_bytes(8, "big") * (BLOCK // 8), number * BLOCK)
        ours.client.cut(name)
    time.sleep(AGE_S)
    handle.pwrite(bytes(BLOCK), 0)
    handle.shutdown()
    ours.client.set_policy(name, POLICY)
    # By this policy one falls due at once: its work is not the pass's.
    until(lambda: len(ours.client.base_points(name)) > intervals, "base point that fell due")


def _drop(ours: Ours, name: str) -> None:
    if not ours.client.prune(name, dry_run=False):
        raise FailedError("the pass found nothing to drop")
