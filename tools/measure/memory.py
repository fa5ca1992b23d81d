"""Memory by the number of disks: at rest, with a client that writes to each, with an export of each; qemu-nbd beside it.

Every process counts with its share of what it has in common with others (PSS).
"""

import contextlib
from collections.abc import Iterator

import nbd

from tools.kit.processes import run
from tools.kit.server import Server
from tools.measure.context import MIB, Context
from tools.measure.processes import Processes, memory
from tools.measure.result import Goal, Measure
from tools.measure.seed import SIZE, seeded
from tools.measure.servers import qemu_nbds

BLOCK = 4096
LIMIT = 1536.0
STATES = {
    "memory-rest": "nobody connected",
    "memory-busy": "a client that has written to each",
    "memory-export": "and an export of a point of each",
}


def curve(context: Context) -> list[Measure]:
    """All processes of the service together, and as many qemu-nbd."""
    measures = {key: Measure(key, f"memory, {title}", "MiB", "lower") for key, title in STATES.items()}
    peer = Measure("memory-qemu-nbd", "memory of qemu-nbd processes, each written to", "MiB", "lower")
    for count in context.sizes.memory_disks:
        subject = f"{count:,} disk{'s' * (count > 1)}"
        if count == 100:
            for measure in measures.values():
                measure.goals = (Goal(subject, "", LIMIT, "under 1.5 GiB"),)
        with seeded(context, count) as directory:
            for _ in range(context.rounds):
                with Server(directory) as server:
                    for key, value in _states(server):
                        measures[key].add(subject, value)
        if count <= context.sizes.most_peers:
            for _ in range(context.rounds):
                peer.add(subject, _peers(context, count))
        context.say(f"memory of {subject}: {measures['memory-busy'].median(subject):,.0f} MiB busy")
    return [*measures.values(), peer]


def _states(server: Server) -> Iterator[tuple[str, float]]:
    """One after the other, each with its sum in MiB."""

    def total() -> float:
        return sum(taken.memory for taken in Processes.of(server).taken().values()) / MIB

    disks = server.client.disks()
    yield "memory-rest", total()
    with _clients([disk["uri"] for disk in disks]) as clients:
        for client in clients:
            for at in range(16):
                client.pwrite(bytes(BLOCK), at * BLOCK)
        yield "memory-busy", total()
        with _clients([server.uri(f"{disk['name']}@latest") for disk in disks]) as readers:
            for reader in readers:
                reader.pread(BLOCK, 0)
            yield "memory-export", total()


@contextlib.contextmanager
def _clients(uris: list[str]) -> Iterator[list[nbd.NBD]]:
    found = []
    for uri in uris:
        client = nbd.NBD()
        client.connect_uri(uri)
        found.append(client)
    try:
        yield found
    finally:
        for client in found:
            client.shutdown()


def _peers(context: Context, count: int) -> float:
    images = [context.directory / f"peer{number}.qcow2" for number in range(count)]
    for image in images:
        run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    with qemu_nbds(images) as servers, _clients([uri for uri, _ in servers]) as clients:
        for client in clients:
            for at in range(16):
                client.pwrite(bytes(BLOCK), at * BLOCK)
        found = sum(memory(pid) for _, pid in servers) / MIB
    for image in images:
        image.unlink()
    return found
