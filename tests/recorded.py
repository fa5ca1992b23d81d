"""A file system in use, recorded write by write: what a disk holds when the power goes, and what the kernel makes of that.

    workload -> kernel's file system -> loop -> nbdfuse -> nbdkit with recorder.py -> image, log of all writes

Any prefix of the log is such a disk. Needs root, for the kernel's mounts.
"""

import hashlib
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from cdpserver.files.browser import Browser, Disk
from cdpserver.files.source import Reader
from tests.filesystems import ImageDisk, run

RECORD = struct.Struct("<QI")
WAIT_S = 20
JOURNAL_MAGIC = bytes.fromhex("c03b3998")
"""Of ext4: a block that begins so is escaped where content goes through the journal."""
PLUGIN = Path(__file__).with_name("recorder.py")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file is, as far as any reader must agree; `content` is a digest, or a link's target."""

    type: str
    size: int
    content: bytes
    mode: int
    mtime_ns: int


Tree = dict[bytes, Entry]


class Refused(Exception):
    """The kernel doesn't mount an image."""


def record(image: Path, workload: Callable[[Path], None], *options: str) -> Path:
    """Lets a workload loose on a mount of `image` (mount `options`); the log of its writes. The image is used up."""
    log, folder, point = (image.with_suffix(end) for end in (".log", ".fuse", ".mnt"))
    folder.mkdir()
    point.mkdir()
    with ExitStack() as stack:
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cdp-")))
        socket, listening = short / "nbd.sock", short / "pid"
        options_of = ("-f", "-U", str(socket), "-P", str(listening))
        _start(
            stack,
            ("nbdkit", *options_of, "python", str(PLUGIN), f"image={image}", f"log={log}"),
            listening.exists,
        )
        device_file = folder / "nbd"
        bridge = ("nbdfuse", str(device_file), f"nbd+unix:///?socket={socket}")
        _start(stack, bridge, device_file.exists)
        stack.callback(_run_quietly, "fusermount3", "-u", str(folder))
        with mounted(device_file, point, *options):
            workload(point)
    return log


def _start(stack: ExitStack, command: tuple[str, ...], is_up: Callable[[], bool]) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    deadline = time.monotonic() + WAIT_S
    while not is_up():
        assert process.poll() is None and time.monotonic() < deadline, command
        time.sleep(0.01)


def _run_quietly(*command: str) -> None:
    subprocess.run(command, check=False, capture_output=True)


@contextmanager
def mounted(image: Path, point: Path, *options: str) -> Iterator[None]:
    """The kernel's mount of an image, through a writable loop device: also a read-only mount replays the journal."""
    device = run("losetup", "-f", "--show", image).decode().strip()
    try:
        try:
            run("mount", *(["-o", ",".join(options)] if options else []), device, point)
        except AssertionError as error:
            raise Refused from error
        try:
            yield
        finally:
            run("umount", point)
    finally:
        run("losetup", "-d", device)


def writes(log: Path) -> list[tuple[int, bytes]]:
    """(offset, bytes) of all writes, in order."""
    data = log.read_bytes()
    found, at = [], 0
    while at < len(data):
        offset, length = RECORD.unpack_from(data, at)
        at += RECORD.size
        found.append((offset, data[at : at + length]))
        at += length
    return found


def disks(image: Path, log: Path, cuts: list[int]) -> Iterator[tuple[int, Path]]:
    """(cut, image) after the first `cut` writes of the log, for ascending cuts; always the same file, `image` going on."""
    done = 0
    changes = writes(log)
    for cut in cuts:
        with open(image, "r+b") as file:
            for offset, data in changes[done:cut]:
                file.seek(offset)
                file.write(data)
        done = cut
        yield cut, image


def tear(image: Path, late: list[tuple[int, bytes]], dice: Random) -> None:
    """Of the writes that were in flight at the end some came, and of some a part."""
    with open(image, "r+b") as file:
        for offset, data in late:
            sectors = dice.choice((0, dice.randrange(len(data) // 512 + 1), len(data) // 512))
            file.seek(offset)
            file.write(data[: sectors * 512])


def churn(point: Path, seed: int, *, operations: int) -> None:
    """Everything that a file system logs, at random, now and then made durable."""
    dice = Random(seed)
    folders, files = [point], list[Path]()
    for number in range(operations):
        act = dice.choice(ACTS)
        folder = dice.choice(folders)
        fresh = folder / f"{number}-{'n' * dice.randrange(40)}"
        if act == "create" or not files:
            start = JOURNAL_MAGIC if dice.random() < 0.2 else b""
            fresh.write_bytes(start + dice.randbytes(dice.choice((0, 30, 3000, 20_000, 200_000))))
            files.append(fresh)
            continue
        if act == "remove" and len(folders) > 5:
            gone = folders.pop(dice.randrange(1, len(folders)))
            shutil.rmtree(gone)
            folders = [one for one in folders if not one.is_relative_to(gone)]
            files = [one for one in files if not one.is_relative_to(gone)]
            continue
        at = dice.randrange(len(files))
        _act(act, files[at], fresh, dice)
        if act == "directory":
            folders.append(fresh)
        elif act in ("link", "symlink"):
            files.append(fresh)
        elif act == "rename":
            files[at] = fresh
        elif act == "unlink":
            del files[at]


ACTS = (
    *("create",) * 5,
    *("append", "overwrite", "truncate", "rename", "unlink", "symlink", "link", "directory", "xattr"),
    *("fsync",) * 3,
    *("chmod", "holes", "unlink", "unlink", "sync", "directory", "remove"),
)


def _act(act: str, path: Path, fresh: Path, dice: Random) -> None:
    is_file = path.is_file() and not path.is_symlink()
    if act == "directory":
        fresh.mkdir()
        for number in range(dice.choice((0, 3, 80))):
            (fresh / f"e{number}-{'x' * dice.randrange(60)}").touch()
    elif act == "rename":
        path.rename(fresh)
    elif act == "unlink":
        path.unlink()
    elif act == "symlink":
        fresh.symlink_to("t" * dice.choice((5, 200)))
    elif act == "link":
        os.link(path, fresh, follow_symlinks=False)
    elif act == "sync":
        run("sync", "-f", path.parent)
    elif is_file:
        _change(act, path, dice)


def _change(act: str, path: Path, dice: Random) -> None:
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if act == "append":
            file.seek(size)
            file.write(dice.randbytes(dice.choice((10, 5000, 100_000))))
        elif act == "overwrite":
            file.seek(dice.randrange(size + 1))
            file.write(dice.randbytes(6000))
        elif act == "truncate":
            file.truncate(dice.randrange(size + 1))
        elif act == "holes":
            for _ in range(dice.choice((1, 30))):
                file.seek(dice.randrange(1 << 22))
                file.write(dice.randbytes(100))
        elif act == "xattr":
            os.setxattr(file.fileno(), "user.note", dice.randbytes(dice.choice((10, 300, 800))))
        elif act == "chmod":
            os.fchmod(file.fileno(), dice.choice((0o600, 0o644, 0o755)))
        file.flush()
        if act == "fsync":
            os.fsync(file.fileno())


def kernel_tree(image: Path, *options: str) -> Tree | None:
    """What the kernel shows of an image; None if it refuses to mount. The image is changed: its journal is replayed."""
    point = image.with_suffix(".ro")
    point.mkdir(exist_ok=True)
    try:
        with mounted(image, point, "ro", *options):
            return dict(_walk(os.fsencode(point)))
    except Refused:
        return None


def _walk(top: bytes) -> Iterator[tuple[bytes, Entry]]:
    for folder, folders, files in os.walk(top):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            known = os.lstat(path)
            if stat.S_ISLNK(known.st_mode):
                kind, size, content = "link", 0, os.readlink(path)
            elif stat.S_ISREG(known.st_mode):
                with open(path, "rb") as file:
                    kind, size, content = "file", known.st_size, hashlib.file_digest(file, "sha1").digest()
            else:
                kind, size, content = "dir", 0, b""
            yield (
                os.path.relpath(path, top),
                Entry(kind, size, content, stat.S_IMODE(known.st_mode), known.st_mtime_ns),
            )


def browsed_tree(image: Path) -> tuple[Tree, list[str]]:
    """What we show of it, and what we say."""
    return browsed_disk(ImageDisk(image))


def browsed_disk(disk: Disk) -> tuple[Tree, list[str]]:
    """The same of anything that a browser reads."""
    found: Tree = {}
    with Browser(disk) as browser:
        volume = browser.choose(None)
        remarks = browser.open(volume)
        for file in browser.walk(volume, b"/", full=True):
            assert not file.why, file
            if not file.path:
                continue
            size, content = 0, file.target or b""
            if file.type == "file":
                size, digest = file.size, hashlib.sha1()
                for start, end, data in browser.content(file):
                    digest.update(bytes(end - start) if data is None else data)
                content = digest.digest()
            found[b"/".join(file.path)] = Entry(file.type, size, content, file.mode, file.mtime_ns)
    return found, remarks


class Image(Reader):
    """An image as a volume to replay, with some of its bytes flipped."""

    def __init__(self, image: Path | bytes, flips: dict[int, int] | None = None) -> None:
        self._disk = ImageDisk(image)
        self._flips = flips or {}
        self.size = self._disk.size
        self.reads = 0

    def read(self, offset: int, length: int) -> bytes:
        """As `Reader.read`; `reads` counts bytes."""
        data = self._disk.read(offset, max(min(length, self.size - offset), 0))
        self.reads += len(data)
        touched = [at for at in self._flips if offset <= at < offset + len(data)]
        if not touched:
            return data
        changed = bytearray(data)
        for at in touched:
            changed[at - offset] ^= self._flips[at]
        return bytes(changed)

    def places(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """It is the disk."""
        yield offset, end, offset
