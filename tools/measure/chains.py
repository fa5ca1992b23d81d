"""Reads of a point over chains of base points of several lengths, against qemu-nbd on QCOW2 chains just as long.

4 KiB at random, 1 MiB in sequence, and without a peer the time from `cdp uri` to the first byte.

The disk is written whole once, in random order, in as many parts as the chain has files and one more: the first lies in the raw
base, one in each base point but the first, and the last in the interval behind the newest: the point is in its middle. So every
file of the chain, and every interval, holds its share of what is read: the worst case for both sides.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbd

from cdpserver import durable, qemu
from cdpserver.index import merging
from cdpserver.index.store import CLOSED_NAME
from tools.kit.processes import FailedError, run, until
from tools.measure import fio
from tools.measure.context import MIB, Context
from tools.measure.opening import open_point
from tools.measure.result import Goal, Measure
from tools.measure.servers import INDEX_S, Ours, qemu_nbd

BLOCK = 4096
WHOLE, DROPPED = "point, all history there", "point, older history dropped"
QCOW2 = "qemu-nbd QCOW2 chain"


def reads(context: Context) -> list[Measure]:
    """For each length: the point read through all intervals, then with the older ones dropped, through the base points."""
    return [measure for length in context.sizes.chains for measure in _of_length(context, length)]


def _of_length(context: Context, length: int) -> list[Measure]:
    ours, size = context.ours, context.sizes.chain_disk
    measures = []
    blocks = list(range(size // BLOCK))
    random.Random(length).shuffle(blocks)
    parts = [blocks[number :: length + 1] for number in range(length + 1)]
    with ours.disk(size, declared=False) as name:
        newest = _fill(ours, name, parts)
        point = ours.server.uri(f"{name}@latest")
        _write(ours.uri(name), parts[0], turn=2)  # from here on the point is not the newest instant
        with _twin(context, newest, parts[-1], size) as other:
            if run("qemu-img", "compare", "-f", "raw", "-F", "raw", point, other, accept=(0, 1)).returncode:
                raise FailedError("the point and the QCOW2 chain differ")
            measures.append(_opening(context, name, length))
            for subject, key in ((WHOLE, f"chain-{length}"), (DROPPED, f"chain-{length}-dropped")):
                if subject == DROPPED:
                    _drop(ours, name)
                measures += _compared(context, key, subject, point, other, length)
                if len(ours.client.base_points(name)) != length:
                    raise FailedError("the chain was merged while it was measured")
    return measures


def _compared(context: Context, key: str, subject: str, point: str, other: str, length: int) -> list[Measure]:
    """Random and sequential reads of both, in turn."""
    size, seconds = context.sizes.chain_disk, context.sizes.read_seconds
    chain = f"{length} base points"
    goal = (Goal(subject, QCOW2, 1.0, "1.0x the chain"),)
    random_4k = Measure(key, f"4 KiB random read, depth 1, {chain}", "IOPS", "higher", goal)
    sequential = Measure(f"{key}-1m", f"1 MiB sequential read, depth 1, {chain}", "MB/s", "higher", goal)
    context.settle()
    for _ in range(context.rounds):
        for who, uri in ((subject, point), (QCOW2, other)):
            job = fio.Job("randread", BLOCK, 1, size, seconds=seconds)
            random_4k.add(who, fio.read(uri, job, context.directory).iops)
        for who, uri in ((subject, point), (QCOW2, other)):
            job = fio.Job("read", MIB, 1, size, seconds=seconds)
            sequential.add(who, fio.read(uri, job, context.directory).mb_s)
    for measure in (random_4k, sequential):
        context.say(f"{measure.name}: {measure.ratio(subject, QCOW2):.2f} of qemu-nbd's rate")
    return [random_4k, sequential]


def _opening(context: Context, name: str, length: int) -> Measure:
    """From the start of `cdp uri` to 4 KiB read over NBD, of a point with all its intervals there."""
    chance = random.Random(length)
    goal = Goal(WHOLE, "", 0.2, "under 0.2 s")
    measure = Measure(
        f"chain-{length}-open", f"`cdp uri` to the first bytes, {length} base points", "s", "lower", (goal,)
    )
    last = int(context.ours.client.disk(name)["last_seq"])
    for _ in range(context.rounds * context.sizes.openings):
        offset = chance.randrange(context.sizes.chain_disk // BLOCK) * BLOCK
        measure.add(WHOLE, open_point(context, f"{name}@seq:{last}", offset)[0])
    context.say(f"{measure.name}: {measure.median(WHOLE):.3f} s")
    return measure


def _fill(ours: Ours, name: str, parts: Sequence[Sequence[int]]) -> Path:
    """The parts in order: first copy, base points, mid-interval, all indexed; the file of the newest base point."""
    _write(ours.uri(name), parts[0])
    ours.declare(name)
    for part in parts[1:-1]:
        _write(ours.uri(name), part)
        ours.client.cut(name)
    _write(ours.uri(name), parts[-1])
    ours.wait_indexed(name)
    intervals = sorted((ours.directory(name) / "intervals").iterdir())
    until(
        lambda: all((path / CLOSED_NAME).exists() for path in intervals[:-1]),
        "closed indexes",
        seconds=INDEX_S,
    )
    until(lambda: not merging.due(ours.directory(name)), "merged indexes", seconds=INDEX_S)
    base_points = ours.client.base_points(name)
    if len(base_points) != len(parts) - 1:
        raise FailedError(f"the chain has {len(base_points)} base points, not {len(parts) - 1}")
    return Path(base_points[-1]["path"])


def _write(uri: str, blocks: Sequence[int], *, turn: int = 1) -> None:
    client = nbd.NBD()
    client.connect_uri(uri)
    for block in blocks:
        client.pwrite(_content(block, turn), block * BLOCK)
    client.shutdown()


def _content(block: int, turn: int) -> bytes:
    return (turn << 56 | block + 1).to_bytes(8, "big") * (BLOCK // 8)


@contextlib.contextmanager
def _twin(context: Context, newest: Path, last: Sequence[int], size: int) -> Iterator[Any]:
    """The point's content as a plain QCOW2 overlay on the same chain, behind qemu-nbd; its URI."""
    image, socket = context.directory / "chain.qcow2", context.directory / "qemu-nbd.sock"
    qemu.create_overlay(image, backing=newest, format="qcow2", size=size)
    try:
        with qemu_nbd(image, socket) as uri:
            _write(uri, last)
        with qemu_nbd(image, socket, "-r") as uri:
            yield uri
    finally:
        image.unlink()


def _drop(ours: Ours, name: str) -> None:
    """Take all but the newest interval away, as retention does when they are too old."""
    for path in sorted((ours.directory(name) / "intervals").iterdir())[:-1]:
        durable.remove_tree(path)
