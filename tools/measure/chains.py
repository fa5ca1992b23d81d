"""Reads of a point over chains of base points of several lengths, against qemu-nbd on QCOW2 chains just as long.

Two kinds of them: our own base points with an overlay like them (`extended_l2`, clusters of 128 KiB), and files as
`qemu-img create` makes them, where what is near a written block is copied with it and is then found higher up.

4 KiB at random, 1 MiB in sequence, and without a peer the time from `cdp uri` to the first byte.

The disk is written whole once, in random order, in as many parts as the chain has files and one more: the first lies in the raw
base, one in each base point but the first, and the last in the interval behind the newest: the point is in its middle. So every
file of the chain, and every interval, holds its share of what is read: the worst case for both sides.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
EXTENDED, PLAIN = "qemu-nbd, our base points", "qemu-nbd, plain QCOW2 chain"
FLAT = 1 / 1.2


@dataclass(frozen=True, slots=True)
class Chain:
    """A disk with so many base points, a point of it, and the same content as QCOW2 chains behind qemu-nbd."""

    length: int
    name: str
    point: str
    others: dict[str, str]


def reads(context: Context) -> list[Measure]:
    """Points read through all intervals, then with the older ones dropped, through the base points. All lengths in each round."""
    with contextlib.ExitStack() as stack:
        chains = [stack.enter_context(_chain(context, length)) for length in context.sizes.chains]
        measures = [_opening(context, chain.name, chain.length) for chain in chains]
        for subject, suffix in ((WHOLE, ""), (DROPPED, "-dropped")):
            if subject == DROPPED:
                for chain in chains:
                    _drop(context.ours, chain.name)
            measures += _compared(context, chains, subject, suffix)
        if any(len(context.ours.client.base_points(chain.name)) != chain.length for chain in chains):
            raise FailedError("a chain was merged while it was measured")
    return measures


@contextlib.contextmanager
def _chain(context: Context, length: int) -> Iterator[Chain]:
    ours, size = context.ours, context.sizes.chain_disk
    blocks = list(range(size // BLOCK))
    random.Random(length).shuffle(blocks)
    parts = [blocks[number :: length + 1] for number in range(length + 1)]
    with ours.disk(size, declared=False) as name:
        newest = _fill(ours, name, parts)
        point = ours.server.uri(f"{name}@latest")
        _write(ours.uri(name), parts[0], turn=2)  # from here on the point is not the newest instant
        with (
            _twin(context, newest, parts[-1], size, length) as extended,
            _plain(context, parts, size, length) as plain,
        ):
            others = {EXTENDED: extended, PLAIN: plain}
            for other in others.values():
                same = run("qemu-img", "compare", "-f", "raw", "-F", "raw", point, other, accept=(0, 1))
                if same.returncode:
                    raise FailedError("the point and the QCOW2 chain differ")
            yield Chain(length, name, point, others)


def _compared(context: Context, chains: Sequence[Chain], subject: str, suffix: str) -> list[Measure]:
    """Random and sequential reads of all, in turn; and the random ones of ours by the length of the chain."""
    size, seconds = context.sizes.chain_disk, context.sizes.read_seconds
    goals = tuple(Goal(subject, other, 1.0, f"1.0x: {other}") for other in (EXTENDED, PLAIN))
    random_4k, sequential = [], []
    for chain in chains:
        key, title = f"chain-{chain.length}{suffix}", f"{chain.length} base points"
        random_4k.append(Measure(key, f"4 KiB random read, depth 1, {title}", "IOPS", "higher", goals))
        title = f"1 MiB sequential read, depth 1, {title}"
        sequential.append(Measure(f"{key}-1m", title, "MB/s", "higher", goals))
    shortest, longest = f"{chains[0].length} base points", f"{chains[-1].length} base points"
    flat_goal = (Goal(longest, shortest, FLAT, "flat: 1 / 1.2 of the shortest"),)
    flat = Measure(
        f"chain-flat{suffix}", f"4 KiB random read, depth 1, {subject}", "IOPS", "higher", flat_goal
    )
    context.settle()
    for number in range(context.rounds):
        for chain, by_4k, by_1m in zip(chains, random_4k, sequential, strict=True):
            turns = list({subject: chain.point, **chain.others}.items())
            turns = turns[number % len(turns) :] + turns[: number % len(turns)]
            for who, uri in turns:
                job = fio.Job("randread", BLOCK, 1, size, seconds=seconds)
                by_4k.add(who, fio.read(uri, job, context.directory).iops)
            for who, uri in turns:
                job = fio.Job("read", MIB, 1, size, seconds=seconds)
                by_1m.add(who, fio.read(uri, job, context.directory).mb_s)
            flat.add(f"{chain.length} base points", by_4k.samples[subject][-1])
    for measure in (*random_4k, *sequential):
        ratios = ", ".join(f"{measure.ratio(subject, other):.2f}" for other in (EXTENDED, PLAIN))
        context.say(f"{measure.name}: {ratios} of qemu-nbd's rate ({EXTENDED}, {PLAIN})")
    return [*random_4k, *sequential, flat]


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
def _twin(context: Context, newest: Path, last: Sequence[int], size: int, length: int) -> Iterator[str]:
    """The point's content as an overlay on our own base points (`extended_l2`), behind qemu-nbd; its URI."""
    with _overlay(context.directory / f"twin-{length}.qcow2", newest, "qcow2", size, last) as image:
        yield from _served(image)


@contextlib.contextmanager
def _plain(context: Context, parts: Sequence[Sequence[int]], size: int, length: int) -> Iterator[str]:
    """The same content, each part in a file of its own, as `qemu-img create` makes them; its URI.

    A cluster of 64 KiB is copied whole when the first of its blocks is written.
    """
    base = context.directory / f"plain-{length}-0.raw"
    with open(base, "wb") as file, contextlib.ExitStack() as stack:
        stack.callback(base.unlink)
        file.truncate(size)
        for block in parts[0]:
            file.seek(block * BLOCK)
            file.write(_content(block, 1))
        file.flush()
        image = base
        for number, part in enumerate(parts[1:], 1):
            above, format = (
                base.with_name(f"plain-{length}-{number}.qcow2"),
                "raw" if image is base else "qcow2",
            )
            image = stack.enter_context(_overlay(above, image, format, size, part, subclusters=False))
        yield from _served(image)


@contextlib.contextmanager
def _overlay(
    image: Path, backing: Path, format: str, size: int, blocks: Sequence[int], *, subclusters: bool = True
) -> Iterator[Path]:
    qemu.create_overlay(image, backing=backing, format=format, size=size, subclusters=subclusters)
    try:
        with qemu_nbd(image, image.with_suffix(".sock")) as uri:
            _write(uri, blocks)
        yield image
    finally:
        image.unlink()


def _served(image: Path) -> Iterator[str]:
    with qemu_nbd(image, image.with_suffix(".sock"), "-r") as uri:
        yield uri


def _drop(ours: Ours, name: str) -> None:
    """Take all but the newest interval away, as retention does when they are too old."""
    for path in sorted((ours.directory(name) / "intervals").iterdir())[:-1]:
        durable.remove_tree(path)
