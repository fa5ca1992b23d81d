"""A disk whose writes a model knows, backed up into a repository: every backup is compared with the model."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from cdpserver.repository.content import Content
from cdpserver.repository.place import DirectoryPlace, Place
from cdpserver.repository.record import BackedUpDisk, Backup
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.source import PointSource, UnknownChangeError
from cdpserver.repository.take import MAX_INCREMENTS, back_up
from cdpserver.timeline import ImageFile
from tests.core import Line, World, scratch
from tests.model import BLOCK

CHUNK = 64 << 10
SIZE = 40 * CHUNK + 5 * 512


@dataclass
class Case:
    """A disk, its model, and a repository."""

    world: World
    line: Line
    path: Path
    secret: bytes | None = None
    place: Place | None = None
    """Where it is, if not in a directory of its own."""
    taken: dict[str, int] = field(default_factory=dict)
    """Backup -> seq."""

    @contextlib.contextmanager
    def repository(self, cache: str = "cache") -> Iterator[Repository]:
        """Opened anew, as another command does."""
        place = self.place if self.place is not None else DirectoryPlace(self.path / "repo")
        with Repository(place, secret=self.secret, cache=self.path / cache) as opened:
            yield opened

    def back_up(self, *, full: bool = False, seq: int | None = None, most: int = MAX_INCREMENTS) -> Backup:
        """The disk as it is now, or at `seq`."""
        self.line.writer.commit()
        at = self.line.last_seq if seq is None else seq
        with self.repository() as repository, self.line.view(at) as view:
            source = PointSource(view, name="d1", time_ns=self.world.now_ns)
            made = back_up(repository, [source], f"d1@seq:{at}", full=full, max_increments=most)
        self.taken[made.id] = at
        return made

    def verify(self, cache: str = "cache") -> None:
        """Every backup that is there is what the disk was."""
        with self.repository(cache) as repository:
            for id_ in repository.backup_ids():
                self.compare(repository, repository.backup(id_))

    def compare(self, repository: Repository, backup: Backup) -> None:
        """One backup: content by pieces of odd sizes, and block status."""
        seq = self.taken[backup.id]
        content = Content(repository, backup.disks[0])
        size = self.line.model.size_at(seq)
        assert content.size == size
        step = 3 * CHUNK + 777
        for at in range(0, size, step):
            length = min(step, size - at)
            assert content.read(at, length) == self.line.model.read(seq, at, length)
        for start, end, zero in content.status(0, size, one=False):
            assert not zero or self.line.model.is_zero(seq, start, end)

    def write(self, seed: int, count: int = 10) -> None:
        """Some blocks, as a guest does."""
        dice = random.Random(seed)
        for _ in range(count):
            self.world.now_ns += 100_000_000
            self.line.write(dice.randrange(SIZE // BLOCK) * BLOCK, dice.randbytes(BLOCK))


def with_history(path: Path) -> tuple[World, Line]:
    """A disk of 41 chunks, some of them written."""
    world = World(path)
    line = world.add(SIZE)
    line.write(0, b"base" * 4096)
    line.synced()
    return world, line


class Made:
    """A disk whose content is computed: every block is another one, and none can be compressed."""

    name = timeline = "made"
    seq = time_ns = 1
    grade = ""
    image: ImageFile | None = None

    def __init__(self, size: int) -> None:
        self.size = size

    def used(self) -> Iterator[tuple[int, int]]:
        yield 0, self.size

    def changed_since(self, disk: BackedUpDisk) -> list[tuple[int, int]]:
        raise UnknownChangeError("it is not kept")

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        buffer[:] = blake3(b"made").digest(length=len(buffer), seek=offset)


class Written:
    """A disk in memory that is written, and knows since when."""

    grade = ""

    def __init__(self, size: int) -> None:
        self.name = self.timeline = "written"
        self.image: ImageFile | None = None
        self.content = bytearray(size)
        self.size = size
        self.seq = self.time_ns = 1
        self._changes: list[tuple[int, int, int]] = []

    def write(self, offset: int, data: bytes) -> None:
        """What is written from here on is in the next backup."""
        self.content[offset : offset + len(data)] = data
        self._changes.append((self.seq, offset, offset + len(data)))

    def back_up(self, repository: Repository) -> Backup:
        """As it is now."""
        made = back_up(repository, [self], f"{self.name}@{self.seq}")
        self.seq += 1
        return made

    def used(self) -> Iterator[tuple[int, int]]:
        yield 0, self.size

    def changed_since(self, disk: BackedUpDisk) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for start, end in sorted((low, high) for seq, low, high in self._changes if seq > disk.seq):
            if found and start <= found[-1][1]:
                found[-1] = found[-1][0], max(found[-1][1], end)
            else:
                found.append((start, end))
        return found

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


@contextlib.contextmanager
def small_case() -> Iterator[Case]:
    """A disk with some history, and an empty repository."""
    with scratch() as path:
        world, line = with_history(path)
        create(DirectoryPlace(path / "repo"), chunk_size=CHUNK)
        made = Case(world, line, path)
        made.write(1, 30)
        yield made
        world.close()
