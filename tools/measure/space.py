"""What a changed byte takes on the store: payload, headers and index, while its interval is open and once it is closed."""

import os

from tools.measure.basepoints import write
from tools.measure.context import Context
from tools.measure.result import Goal, Measure

BLOCK = 4096
OPEN, CLOSED = "interval open", "interval closed"


def space(context: Context) -> list[Measure]:
    """4 KiB writes at random places, none twice; base points come on top, and are not counted."""
    ours, total = context.ours, context.sizes.random_io
    whole = Measure("space", "bytes on disk per byte changed, 4 KiB writes", "bytes", "lower")
    whole.goals = (Goal(CLOSED, "", 1.06, "at most 1.06"),)
    index = Measure("space-index", "index per 4 KiB block", "bytes", "lower")
    index.goals = (Goal(OPEN, "", 150, "at most 150"), Goal(CLOSED, "", 60, "at most 60"))
    for _ in range(context.rounds):
        with ours.disk(context.sizes.random_disk) as name:
            write(context, name, BLOCK, total)
            _add(context, name, OPEN, whole, index)
            ours.cut(name)
            _add(context, name, CLOSED, whole, index)
    context.say(
        f"space: {whole.median(CLOSED):.3f} bytes a byte, {index.median(CLOSED):.0f} of index a block"
    )
    return [whole, index]


def _add(context: Context, name: str, subject: str, whole: Measure, index: Measure) -> None:
    total = context.sizes.random_io
    files = (context.ours.directory(name) / "intervals").glob("*/*")
    whole.add(subject, sum(os.stat(file).st_blocks * 512 for file in files) / total)
    index.add(subject, context.ours.index_bytes(name) / (total // BLOCK))
