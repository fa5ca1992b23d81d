"""File systems in use, captured through the real mirror path, at instants in the middle of their writes.

    files --kernel, FUSE or mtools--> loop --> nbdfuse --NBD--> qemu-storage-daemon --blockdev-mirror--> target
                                                                  \\--> source.raw

The writer says of each file when it is safe: written, synced, and never touched again; around these it changes others without
a pause. A point marked at any moment has every file that was safe by then, byte for byte, and all of it reads as the kernel
reads the same bytes. ext4 and XFS also hold a tree of thousands of files that stands there all the time, with links, holes,
owners and attributes. CDP_LONG=N takes N times as many points.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cdpserver.files.browser import Browser, Disk
from cdpserver.files.formats.base import HOLE
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


# --- what is there all the time


@dataclass(frozen=True)
class Known:
    """All that must be kept of a file; `twins` are the names of one with hard links."""

    type: str
    size: int
    content: bytes
    mode: int
    mtime_ns: int
    owner: tuple[int, int]
    xattrs: dict[str, bytes]
    twins: frozenset[bytes] = frozenset()


STANDING = {"ext4": 2000, "xfs": 2000}
"""Small files of the tree that is there before the first point, with all that a source tree has."""


def standing_tree(path: Path, files: int) -> Path:
    """With owners, and attributes that fit an inode and that do not, on files and on a directory."""
    make.source_tree(path, files)
    (path / "pipe").unlink()
    for number in range(0, files, 10):
        file = path / "many" / f"file-{number}"
        os.chown(file, 7, 8 + number % 3)
        os.setxattr(file, "user.note", b"%d" % number)
    os.setxattr(path / "large", "user.long", bytes(range(250)) * 2)
    os.setxattr(path / "many", "user.note", b"of a directory")
    os.lchown(path / "outside", 7, 8)
    return path


def standing(top: Path) -> dict[bytes, Known]:
    """Of a tree on this host."""
    seen: dict[bytes, tuple[int, Known]] = {}
    for folder, folders, files in os.walk(os.fsencode(top)):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            known, short = os.lstat(path), os.path.relpath(path, os.fsencode(top))
            kind, size, content = "dir", 0, b""
            if os.path.islink(path):
                kind, content = "link", os.readlink(path)
            elif os.path.isfile(path):
                kind, size, content = "file", known.st_size, digest_of_file(path)
            xattrs = {n: os.getxattr(path, n) for n in os.listxattr(path, follow_symlinks=False)}
            owner = (known.st_uid, known.st_gid)
            mode = known.st_mode & 0o7777
            found = Known(kind, size, content, mode, known.st_mtime_ns, owner, xattrs)
            seen[short] = (known.st_ino, found)
    return with_twins(seen)


def with_twins(seen: dict[bytes, tuple[int, Known]]) -> dict[bytes, Known]:
    names: dict[int, set[bytes]] = {}
    for path, (number, _) in seen.items():
        names.setdefault(number, set()).add(path)
    return {path: replace(known, twins=frozenset(names[number])) for path, (number, known) in seen.items()}


def digest_of_file(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").digest()


def standing_at(disk: Disk) -> dict[bytes, Known]:
    """The same tree, of a point."""
    seen: dict[bytes, tuple[int, Known]] = {}
    with Browser(disk) as browser:
        volume = browser.choose(None)
        for file in browser.walk(volume, b"/standing", full=True):
            if not file.path:
                continue
            path, size, content = b"/".join(file.path), 0, file.target or b""
            if file.type == "file":
                size, digest = file.size, hashlib.sha1()
                for start, end, data in browser.content(file):
                    digest.update(bytes(end - start) if data is None else data)
                content = digest.digest()
            if file.name == b"sparse":
                assert sum(end - start for start, end, place in browser.extents(file) if place != HOLE) < MIB
            xattrs = {} if file.type == "link" else browser.xattrs(file)
            owner = (file.uid, file.gid)
            known = Known(file.type, size, content, file.mode, file.mtime_ns, owner, xattrs)
            seen[path] = (file.id, known)
    return with_twins(seen)


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
            tree: dict[bytes, Known] = {}
            if kind in STANDING:
                held = standing_tree(tmp_path / "standing", STANDING[kind])
                make.run("cp", "-a", "--sparse=always", held, short_path / "top")
                make.run("sync", "--file-system", short_path / "top")
                tree = standing(held)
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
            check(kind, StateDir(server.state_dir), name, safe, tree, tmp_path / f"{name}.img")


def check(
    kind: str, state: StateDir, name: str, safe: dict[bytes, bytes], tree: dict[bytes, Known], image: Path
) -> None:
    """The point has what was safe, and the tree that stood there; and is the same to the kernel."""
    with contextlib.closing(HeldPoint(state, kind, Mark(name))) as held:
        found, _ = browsed_disk(held.view)
        missing = {path for path, digest in safe.items() if held_as(found, path) != digest}
        assert len(safe) >= BETWEEN and not missing, (kind, name, missing)
        if tree:
            there = standing_at(held.view)
            assert {p: (k, there.get(p)) for p, k in tree.items() if there.get(p) != k} == {}, (kind, name)
            assert there.keys() == tree.keys()
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
