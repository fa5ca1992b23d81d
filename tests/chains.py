"""Chains of base points without a server: files that stock QEMU tools wrote, beside what each must read as."""

import os
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import nbd

from cdpserver import locks, nodes, qemu
from cdpserver.catalog import Catalog
from cdpserver.journal.control import Grade
from cdpserver.journal.log import interval_path
from cdpserver.locks import Lock
from cdpserver.state import StateDir
from cdpserver.timeline import EmptyBase, PointBase, create_timeline

BLOCK = 4096
START_NS = 1_800_000_000_000_000_000


@dataclass
class Line:
    """A timeline: the content of each base point by number."""

    id: str
    name: str
    directory: Path
    content: dict[int, bytes] = field(default_factory=dict)

    def path(self, number: int) -> Path:
        """A base point's file."""
        return nodes.base_point_path(self.directory, number)


class Forest:
    """A state directory of disks and forks with base points and empty intervals. Base point N is cut at seq 10 * (N + 1)."""

    def __init__(self, path: Path, seed: int = 0, size: int = 1 << 20) -> None:
        self.state = StateDir.create_or_open(path)
        self.catalog = Catalog.open(self.state, writable=True)
        self.dice = random.Random(seed)
        self.size = size
        self.lines: dict[str, Line] = {}

    def disk(self, name: str, base_points: int) -> Line:
        """A disk whose first copy is random blocks."""
        line = self._line(name, None)
        first = bytearray(self.size)
        self._paint(first)
        (line.directory / "base.raw").write_bytes(first)
        (line.directory / "base.synced").touch()
        for _ in range(base_points):
            self.cut(line, Path("base.raw"), bytes(first))
        return line

    def fork(self, name: str, parent: Line, number: int, base_points: int) -> Line:
        """A fork of a base point."""
        line = self._line(name, PointBase(parent.id, 10 * (number + 1), START_NS + number))
        for _ in range(base_points):
            self.cut(line, Path(f"../{parent.id}/bp-{number}.qcow2"), parent.content[number])
        return line

    def _line(self, name: str, base: PointBase | None) -> Line:
        id = self.catalog.next_id()
        create_timeline(
            self.state, id=id, name=name, vm=None, size=self.size, base=base or EmptyBase(), now_ns=START_NS
        )
        self.catalog.add(name, id)
        line = self.lines[name] = Line(id, name, self.state.timeline(id))
        interval_path(line.directory, 1).mkdir()
        return line

    def _paint(self, content: bytearray) -> list[tuple[int, int, bool]]:
        """Change some of it: (start, end, is it a zeroing)."""
        changes = []
        for _ in range(self.dice.randrange(1, 8)):
            start = self.dice.randrange(0, self.size // BLOCK) * BLOCK
            end = min(start + self.dice.choice((1, 1, 2, 31, 64)) * BLOCK, self.size)
            zero = self.dice.random() < 0.4
            content[start:end] = bytes(end - start) if zero else self.dice.randbytes(end - start)
            changes.append((start, end, zero))
        return changes

    def cut(self, line: Line, root: Path, first: bytes) -> int:
        """The next base point."""
        below = max(line.content, default=-1)
        number = max(line.content, default=-1) + 1
        backing = line.path(below) if line.content else line.directory / root
        content = bytearray(line.content[below] if line.content else first)
        path = line.path(number)
        format = "qcow2" if backing.suffix == ".qcow2" else "raw"
        qemu.create_overlay(path, backing=backing, format=format, size=self.size)
        changes = self._paint(content)
        with TemporaryDirectory(prefix="cdp-") as room:
            self._write(path, changes, content, f"{room}/s")
        path.chmod(0o444)
        note = nodes.Node(number, 10 * (number + 1), START_NS + number, number + 1, Grade.CRASH, 1, 3)
        nodes.write_note(line.directory, note)
        interval_path(line.directory, number + 2).mkdir()
        line.content[number] = bytes(content)
        return number

    def _write(
        self, path: Path, changes: list[tuple[int, int, bool]], content: bytearray, socket: str
    ) -> None:
        server = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", "-k", socket, str(path)])
        try:
            client = nbd.NBD()
            while True:
                try:
                    client.connect_unix(socket)
                    break
                except nbd.Error:
                    assert server.poll() is None
                    client = nbd.NBD()
            for start, end, zero in changes:
                if zero:
                    client.zero(end - start, start)
                else:
                    client.pwrite(content[start:end], start)
            client.shutdown()
        finally:
            server.terminate()
            server.wait()

    def lock(self, line: Line, seq: int, until_ns: int | None = None) -> Lock:
        """An operator's lock on an instant."""
        id = locks.new_id(self.catalog.rows("locks"))
        made = Lock(id, line.id, seq, START_NS, until_ns, immutable=False, reason="", created_ns=START_NS)
        self.catalog.put_row("locks", made.row())
        return made

    # -- what must hold

    def check(self) -> None:
        """Every base point that is to exist is whole and bit-exact for stock tools; nothing else is in the directories."""
        for line in self.lines.values():
            assert nodes.published(line.directory) == sorted(line.content), line.name
            assert [node.number for node in nodes.nodes(line.directory)] == sorted(line.content)
            for number, content in line.content.items():
                qemu.check(line.path(number))
                assert raw(line.path(number)) == content, f"bp:{number} of {line.name}"
            known = {"timeline.json", "intervals", "base.raw", "base.synced", "chain.lock"}
            known |= {"manual.json", "writer.lock", "index.lock", "lease", "leases", "sums", "links"}
            known |= {f"bp-{n}.{suffix}" for n in line.content for suffix in ("qcow2", "json", "map")}
            assert set(os.listdir(line.directory)) <= known

    def close(self) -> None:
        """End of the test."""
        self.catalog.close()


def raw(path: Path) -> bytes:
    """What stock qemu-img reads."""
    with TemporaryDirectory(prefix="cdp-") as room:
        subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), f"{room}/raw"], check=True
        )
        return Path(room, "raw").read_bytes()
