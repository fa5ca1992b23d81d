"""4 KiB random reads of a point over chains of base points of several lengths, against qemu-nbd on QCOW2 chains just as long.

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
from cdpserver.index.store import CLOSED_NAME
from tools.kit.processes import FailedError, run, until
from tools.measure import fio
from tools.measure.context import Context
from tools.measure.result import Measure
from tools.measure.servers import INDEX_S, Ours, qemu_nbd

BLOCK = 4096
WHOLE, DROPPED = "point, all history there", "point, older history dropped"
QCOW2 = "qemu-nbd QCOW2 chain"


def read_4k(context: Context) -> list[Measure]:
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
            for subject, key in ((WHOLE, f"chain-{length}"), (DROPPED, f"chain-{length}-dropped")):
                if subject == DROPPED:
                    _drop(ours, name)
                measure = Measure(key, f"4 KiB random read, depth 1, {length} base points", "IOPS", "higher")
                context.settle()
                for _ in range(context.rounds):
                    reading = fio.Job("randread", BLOCK, 1, size, seconds=context.sizes.read_seconds)
                    for who, uri in ((subject, point), (QCOW2, other)):
                        measure.add(who, fio.read(uri, reading, context.directory).iops)
                if len(ours.client.base_points(name)) != length:
                    raise FailedError("the chain was merged while it was measured")
                context.say(f"{key}: {measure.ratio(subject, QCOW2):.2f} of qemu-nbd's rate")
                measures.append(measure)
    return measures


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
