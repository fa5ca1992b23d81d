"""Which chunk size a repository should have: the history of a live file system, stored with each size.

An ext4 file system is filled with this machine's own files, and used as a server uses one: logs grow, a database is written,
files are edited and replaced. Each state of its image is backed up into one repository of each size, the first in full.
"""

import contextlib
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np

from cdpserver.durable import used_bytes
from cdpserver.names import format_size
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.record import BackedUpDisk, Backup
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.take import back_up
from cdpserver.timeline import ImageFile
from tools.kit.mount import as_loop, mounted
from tools.kit.processes import run, why_no_mount
from tools.measure.context import MIB, Context
from tools.measure.result import Measure

BLOCK = 4096
FROM = (Path("/usr/lib/python3"), Path("/usr/share/doc"), Path("/usr/lib/python3.11"), Path("/usr/bin"))
FILLED = 0.6


class ImageSource:
    """A raw image as the source of a backup; what changed is found by comparing it with its last state."""

    def __init__(self, image: Path, before: Path) -> None:
        self._fd = os.open(image, os.O_RDONLY)
        self._before = before
        self._image = image
        self.name = self.timeline = "image"
        self.size = image.stat().st_size
        self.seq = self.time_ns = time.time_ns()
        self.grade = ""
        self.image: ImageFile | None = None

    def used(self) -> Iterator[tuple[int, int]]:
        """What the host's file system has."""
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield start, at

    def changed_since(self, disk: BackedUpDisk) -> list[tuple[int, int]]:
        """In blocks of 4 KiB, as a journal would say it."""
        one, other = (np.memmap(path, mode="r").reshape(-1, BLOCK) for path in (self._image, self._before))
        found: list[tuple[int, int]] = []
        for first in range(0, len(one), 4096):
            differ = (one[first : first + 4096] != other[first : first + 4096]).any(axis=1)
            found += [
                ((first + int(n)) * BLOCK, (first + int(n) + 1) * BLOCK) for n in np.flatnonzero(differ)
            ]
        return found

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """From the image."""
        assert os.preadv(self._fd, [buffer], offset) == len(buffer)

    def close(self) -> None:
        """The image is the caller's."""
        os.close(self._fd)


def chunks(context: Context) -> list[Measure]:
    """Stored bytes, index and speed for each size."""
    if reason := why_no_mount():
        context.say(f"chunks: not measured, since {reason}")
        return []
    size, steps = context.sizes.chunk_disk, context.sizes.chunk_steps
    full = Measure("chunk-full", f"stored by a full backup of {size // MIB} MiB", "MiB", "lower")
    more = Measure("chunk-incremental", "stored by an incremental one of it", "MiB", "lower")
    index = Measure("chunk-index", "index on this machine", "KiB", "lower")
    speed = Measure("chunk-speed", "full backup", "MB/s", "higher")
    quick = Measure("chunk-time", "incremental one", "ms", "lower")
    names = [format_size(chunk) for chunk in context.sizes.chunk_sizes]
    image, before, place = (context.directory / name for name in ("image", "before", "chunks"))
    place.mkdir()
    with contextlib.closing(_history(context, image, size, steps)) as history:
        for step, _ in enumerate(history):
            for chunk, name in zip(context.sizes.chunk_sizes, names, strict=True):
                path = place / name
                if not step:
                    create(DirectoryPlace(path), chunk_size=chunk)
                made, seconds = _back_up(path, image, before)
                if not step:
                    full.add(name, made.stored_bytes / MIB)
                    speed.add(name, made.read_bytes / seconds / 1e6)
                else:
                    more.add(name, made.stored_bytes / MIB)
                    quick.add(name, seconds * 1e3)
                if step == steps - 1:
                    index.add(name, sum(map(used_bytes, (path / "cache").glob("*.mdb"))) / 1024)
            shutil.copyfile(image, before)
    for path in (image, before):
        path.unlink()
    shutil.rmtree(place)
    return [full, more, index, speed, quick]


def _back_up(path: Path, image: Path, before: Path) -> tuple[Backup, float]:
    """The backup and its seconds."""
    with (
        contextlib.closing(ImageSource(image, before)) as source,
        Repository(DirectoryPlace(path), cache=path / "cache") as repository,
    ):
        began = time.monotonic()
        made = back_up(repository, [source], "image@x")
        return made, time.monotonic() - began


def _history(context: Context, image: Path, size: int, steps: int) -> Generator[None, None, None]:
    """The image after each step of use, the file system mounted all the time."""
    with open(image, "wb") as made:
        made.truncate(size)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", image)
    dice = random.Random(7)
    there = context.directory / "mounted"
    with as_loop(image) as device, mounted(device, there):
        files = _fill(there, int(size * FILLED))
        database = sqlite3.connect(there / "database")
        database.execute("create table t (id integer primary key, a text, b blob)")
        for step in range(steps):
            if step:
                _use(there, files, database, dice, scale=size / (512 * MIB))
            run("sync", "--file-system", there)
            yield
        database.close()


def _fill(there: Path, size: int) -> list[Path]:
    files: list[Path] = []
    for top in FROM:
        for folder, _, names in os.walk(top):
            for name in names:
                source = Path(folder) / name
                if source.is_symlink() or not source.is_file():
                    continue
                target = there / source.relative_to("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                files.append(target)
                size -= source.stat().st_size
                if size <= 0:
                    return files
    return files


def _use(
    there: Path, files: list[Path], database: sqlite3.Connection, dice: random.Random, *, scale: float
) -> None:
    """An hour of a small server."""
    for number in range(20):
        with open(there / f"log.{number}", "a", encoding="utf-8") as log:
            for _ in range(int(300 * scale) + 1):
                log.write(
                    f"{time.time():.6f} request {dice.getrandbits(64):x} took {dice.randrange(1000)} ms\n"
                )
    for _ in range(int(1500 * scale) + 1):
        row = (dice.randrange(1 << 30), f"name {dice.random()}", dice.randbytes(200))
        database.execute("insert or replace into t values (?, ?, ?)", row)
        if dice.random() < 0.02:
            database.commit()
    database.commit()
    for path in dice.sample(files, max(1, len(files) // 100)):  # edited: written anew beside, and renamed
        data = path.read_bytes()
        path.with_name("new").write_bytes(data + dice.randbytes(100))
        path.with_name("new").rename(path)
    for path in dice.sample(files, max(1, len(files) // 500)):  # replaced by a new version
        path.write_bytes(dice.randbytes(path.stat().st_size))
