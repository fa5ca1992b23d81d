"""File systems in use, captured through the real mirror path, at instants in the middle of their writes.

    files --kernel, FUSE or mtools--> loop --> nbdfuse --NBD--> qemu-storage-daemon --blockdev-mirror--> target
                                                                  \\--> source.raw

The writer says of each file when it is safe: written, synced, and never touched again; around these it changes others without
a pause. A point marked at any moment has every file that was safe by then, byte for byte, and all of it reads as the kernel
reads the same bytes. CDP_LONG=N takes N times as many points.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cdpserver.held import HeldPoint
from cdpserver.names import Mark
from cdpserver.state import StateDir
from tests import filesystems as make
from tests.recorded import Entry, Tree, browsed_disk, kernel_tree, mounted
from tests.test_service import Server, until
from tools.kit.mount import as_file
from tools.kit.source import Source

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK),
        reason="mounting what is captured needs root, /dev/fuse and loop devices",
    ),
]

LONG = int(os.environ.get("CDP_LONG", "1"))
POINTS = 3 * LONG
BETWEEN = 4
"""Files that became safe from one point to the next, at least."""

MIB = 1 << 20


@dataclass
class Writer:
    """Changes files until it is told to stop. `put` writes one file and makes it safe."""

    put: Callable[[str, bytes], None]
    stir: Callable[[Random, int], None]
    safe: dict[bytes, bytes] = field(default_factory=dict)
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """The thread's work."""
        dice = Random(5)
        try:
            number = 0
            while not self.done.is_set():
                self.stir(dice, number)
                content = dice.randbytes(dice.choice((10, 3000, 70_000, 400_000)))
                name = f"safe-{number}.bin"
                self.put(name, content)
                self.safe[name.encode()] = hashlib.sha1(content).digest()
                number += 1
        except (AssertionError, OSError) as error:
            self.error = error

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self.done.set()
            thread.join()
        assert self.error is None, self.error


def in_directory(top: Path, *, whole: bool) -> Writer:
    """Files of a mounted file system; `whole` syncs all of it, where one file's sync is kept in a log."""

    def put(name: str, content: bytes) -> None:
        with open(top / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if whole:
            make.run("sync", "--file-system", top)
        else:
            fd = os.open(top, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def stir(dice: Random, number: int) -> None:
        folder = top / f"stir-{number % 5}"
        if number >= 5 and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        for other in range(dice.randrange(12)):
            (folder / f"{other}-{'x' * dice.randrange(40)}").write_bytes(dice.randbytes(dice.randrange(9000)))
        with open(top / "log", "ab") as log:
            log.write(dice.randbytes(dice.randrange(20_000)))
        (top / "log").rename(top / "log.1") if number % 7 == 6 else None

    return Writer(put, stir)


def in_image(image: Path) -> Writer:
    """Files of a FAT that mtools write, each command whole."""
    work = image.parent.with_name("mtools")
    work.mkdir()

    def put(name: str, content: bytes) -> None:
        (work / name).write_bytes(content)
        make.run("mcopy", "-i", image, work / name, "::/")
        make.run("sync", image)

    def stir(dice: Random, number: int) -> None:
        name = f"stir-{number % 4}"
        (work / name).write_bytes(dice.randbytes(dice.randrange(60_000)))
        make.run("mcopy", "-D", "o", "-i", image, work / name, "::/")

    return Writer(put, stir)


@contextlib.contextmanager
def written_to(kind: str, device_file: Path, top: Path) -> Iterator[Writer]:
    """A file system of the kind on the disk, open to be written to."""
    top.mkdir()
    if kind == "fat":
        make.run("mkfs.vfat", "-F", "16", device_file)
        yield in_image(device_file)
        return
    maker = {
        "ext4": ("mke2fs", "-q", "-F", "-t", "ext4", "-J", "size=4"),
        "xfs": ("mkfs.xfs", "-q", "-f"),
        "btrfs": ("mkfs.btrfs", "-q", "-f"),
        "ntfs": ("mkntfs", "-q", "-F", "-Q", "-p", "0", "-H", "1", "-S", "1", "-s", "512"),
    }.get(kind)
    if maker is not None:
        make.run(*maker, device_file)
    if kind == "ntfs":
        make.run("ntfs-3g", device_file, top)
        try:
            yield in_directory(top, whole=True)
        finally:
            make.run("umount", top)
    elif kind == "exfat":
        with looped(device_file) as device:
            make.run("mkfs.exfat", device)
            make.run("mount.exfat-fuse", device, top)
            try:
                yield in_directory(top, whole=True)
            finally:
                make.run("umount", top)
    else:
        with mounted(device_file, top):
            yield in_directory(top, whole=kind == "btrfs")


@contextlib.contextmanager
def looped(file: Path) -> Iterator[str]:
    device = make.run("losetup", "-f", "--show", file).decode().strip()
    try:
        yield device
    finally:
        make.run("losetup", "-d", device)


def oracle(kind: str, image: Path) -> Tree | None:
    """What the driver that wrote it shows of an image, where it is in this kernel; None elsewhere."""
    if kind in ("ext4", "xfs"):
        return kernel_tree(image)
    if kind == "btrfs":
        return kernel_tree(image, "rescue=nologreplay")
    return None


def comparable(tree: Tree) -> dict[bytes, Any]:
    """Without a directory's time: what is put into it later is not in the log's last transaction."""
    return {path: known for path, known in tree.items() if path != b"lost+found"}


SIZES = {"xfs": 320, "btrfs": 128}
KINDS = ("ext4", "xfs", "btrfs", "ntfs", "fat", "exfat")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="cdp-") as path, Server(Path(path) / "s") as running:
        yield running


@pytest.mark.parametrize("kind", KINDS)
def test_points_in_the_middle_of_writes(kind: str, server: Server, short_path: Path, tmp_path: Path) -> None:
    size = SIZES.get(kind, 64) * MIB
    marks: dict[str, dict[bytes, bytes]] = {}
    with Source(short_path, size) as source:
        server.post("/v1/disks", name=kind, size=size)
        with (
            as_file(source.uri, short_path / "nf") as file,
            written_to(kind, file, short_path / "top") as writer,
        ):
            source.mirror(str(server.get(f"/v1/disks/{kind}")["uri"]))
            server.post(f"/v1/disks/{kind}:synced", write_blocking=True)
            with writer.running():
                for number in range(POINTS):
                    least = len(writer.safe) + BETWEEN
                    until(lambda: len(writer.safe) >= least or writer.error, "files that are safe")  # noqa: B023
                    marks[f"m{number}"] = dict(writer.safe)
                    server.post(f"/v1/disks/{kind}:mark", name=f"m{number}")
        source.end_mirror()
        points = {p["name"]: p for p in server.get(f"/v1/disks/{kind}:points?kind=bookmark")}
        assert {points[name]["grade"] for name in marks} == {"crash"}
        for name, safe in marks.items():
            check(kind, StateDir(server.state_dir), name, safe, tmp_path / f"{name}.img")


def check(kind: str, state: StateDir, name: str, safe: dict[bytes, bytes], image: Path) -> None:
    """The point has what was safe; and is the same to the kernel."""
    with contextlib.closing(HeldPoint(state, kind, Mark(name))) as held:
        found, _ = browsed_disk(held.view)
        missing = {path for path, digest in safe.items() if held_as(found, path) != digest}
        assert len(safe) >= BETWEEN and not missing, (kind, name, missing)
        with open(image, "wb") as file:
            file.truncate(held.view.size)
            for at in range(0, held.view.size, MIB):
                data = held.view.read(at, min(MIB, held.view.size - at))
                if any(data):
                    os.pwrite(file.fileno(), data, at)
    known = oracle(kind, image)
    if known is not None:
        assert comparable(found) == comparable(known)
    image.unlink()


def held_as(tree: Tree, path: bytes) -> bytes | None:
    """The digest of a file; FAT may have written its name in capitals."""
    entry: Entry | None = tree.get(path) or tree.get(path.upper())
    return None if entry is None else entry.content
