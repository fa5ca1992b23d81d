"""Random histories over the real sockets, against plain copies of the disk taken after each step."""

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.test_service import Server, connected, qemu_raw, until

pytestmark = pytest.mark.real

STEPS = 120


@dataclass
class Line:
    """A timeline: its URI, what it holds, and what it held at some seqs."""

    name: str
    uri: str
    content: bytearray
    instants: dict[int, bytes] = field(default_factory=dict)


class Histories:
    """Steps at random; after each one the newest seq of the line stands for its content."""

    def __init__(self, server: Server, seed: int, size: int) -> None:
        self.server, self.size = server, size
        self.dice = random.Random(seed)
        uri = server.post("/v1/disks", name="d", size=size)["uri"]
        self.lines = [Line("d", uri, bytearray(size))]
        self.clients: dict[tuple[str, int], Any] = {}
        server.synced("d")
        self.note(self.lines[0])

    def note(self, line: Line) -> None:
        shown = self.server.get(f"/v1/disks/{line.name}")
        line.instants[shown["last_seq"]] = bytes(line.content)

    def client(self, line: Line) -> Any:
        key = (line.name, self.dice.randrange(2))
        if key not in self.clients:
            self.clients[key] = handle = nbd.NBD()
            handle.set_strict_mode(0)  # any alignment
            until(lambda: self.connects(handle, line.uri), "target")
        return self.clients[key]

    def connects(self, handle: Any, uri: str) -> bool:
        try:
            handle.connect_uri(uri)
        except nbd.Error:
            return False
        return True

    def hang_up(self) -> None:
        for handle in self.clients.values():
            handle.shutdown()
        self.clients.clear()

    def step(self) -> None:
        line = self.dice.choice(self.lines)
        moves = (
            [self.write] * 10
            + [self.zero] * 3
            + [self.mirror, self.cut, self.fork, self.kill]
            + [self.read] * 4
        )
        self.dice.choice(moves)(line)
        self.note(line)

    def extent(self) -> tuple[int, int]:
        unit = self.dice.choice((1, 512, 4096, 4096, 65536))
        offset = self.dice.randrange(self.size // unit) * unit
        length = self.dice.choice((unit, 4096, 12288, 100_000, 262_144))
        return offset, min(length, self.size - offset)

    def write(self, line: Line) -> None:
        offset, length = self.extent()
        data = self.dice.randbytes(8) * (length // 8 + 1)
        flags = nbd.CMD_FLAG_FUA if self.dice.random() < 0.1 else 0
        self.client(line).pwrite(data[:length], offset, flags)
        line.content[offset : offset + length] = data[:length]

    def zero(self, line: Line) -> None:
        offset, length = self.extent()
        if self.dice.random() < 0.5:
            self.client(line).zero(length, offset)
        else:
            self.client(line).trim(length, offset)
        line.content[offset : offset + length] = bytes(length)

    def mirror(self, line: Line) -> None:
        """A new connection zeroes everything and writes it again."""
        before = bytes(line.content)
        with connected(line.uri) as client:
            client.zero(self.size, 0)
            for at in range(0, self.size, 1 << 18):
                client.pwrite(before[at : at + (1 << 18)], at)
            client.flush()

    def cut(self, line: Line) -> None:
        made = self.server.post(f"/v1/disks/{line.name}:cut")
        assert qemu_raw(Path(made["path"]), self.server.state_dir.parent) == line.content

    def fork(self, line: Line) -> None:
        if len(self.lines) < 4:
            seq, content = self.dice.choice(list(line.instants.items()))
            name = f"f{len(self.lines)}"
            made = self.server.post("/v1/forks", point=f"{line.name}@seq:{seq}", name=name)
            fork = Line(name, made["uri"], bytearray(content))
            self.lines.append(fork)
            self.note(fork)

    def kill(self, _: Line) -> None:
        child = self.dice.choice(("target-0", "export", "indexer"))
        pid = self.server.pids()[child]
        if child == "target-0":
            self.hang_up()
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.server.pids()[child] not in (None, pid), child)

    def read(self, line: Line) -> None:
        offset, length = self.extent()
        assert self.client(line).pread(length, offset) == line.content[offset : offset + length]
        self.check(line, self.dice.choice(list(line.instants)))

    def check(self, line: Line, seq: int) -> None:
        """An instant through the export: content, and block status that never calls data zero."""
        expected = line.instants[seq]
        handle = nbd.NBD()
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        uri = self.server.uri(f"{line.name}@seq:{seq}")
        until(lambda: self.connects(handle, uri), "export")
        assert handle.pread(self.size, 0) == expected, (line.name, seq)
        at = 0

        def found(_context: str, offset: int, entries: list[int], _error: int) -> int:
            nonlocal at
            assert offset == at
            for length, kind in zip(entries[::2], entries[1::2], strict=True):
                assert kind in (0, 2, 3), "a hole is always a zero"
                assert kind == 0 or not any(expected[at : at + length]), (line.name, seq, at, length)
                at += length
            return 0

        while at < self.size:
            handle.block_status(self.size - at, at, found)
        handle.shutdown()


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


@pytest.mark.parametrize(("seed", "size"), [(1, 2 << 20), (2, (2 << 20) + 512), (3, 1 << 20)])
def test_random_histories(server: Server, seed: int, size: int) -> None:
    world = Histories(server, seed, size)
    for _ in range(STEPS):
        world.step()
    world.hang_up()
    for line in world.lines:
        for seq in list(line.instants)[::7]:
            world.check(line, seq)
