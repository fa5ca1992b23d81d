"""File systems for tests, made by Debian's tools from a source tree, without mounting anything."""

import io
import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

from cdpserver.files.browser import Browser

SBIN = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
MTIME_NS = 1_700_000_000_000_000_000
"""mke2fs and mkfs.btrfs keep seconds."""
SECTOR = 512
PIECE = 1 << 20
STAMP = (2023 - 1980) << 25 | 11 << 21 | 14 << 16 | 12 << 11
"""2023-11-14 12:00 as exFAT has it."""


class ImageDisk:
    """An image as a disk that a browser reads."""

    def __init__(self, image: Path | bytes) -> None:
        self._file = io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb")  # noqa: SIM115
        self.size = self._file.seek(0, io.SEEK_END)
        self.reads = 0

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        self._file.seek(offset)
        return self._file.read(length)


def run(*command: str | Path, stdin: bytes | None = None) -> bytes:
    """The output of a tool that may be in /usr/sbin."""
    done = subprocess.run(
        list(map(str, command)),
        input=stdin,
        capture_output=True,
        env={**os.environ, "PATH": SBIN},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def source_tree(path: Path, files: int = 400, *, posix: bool = True) -> Path:
    """Many small files, a large one, deep and strange names; with `posix` links, holes, and names that are no UTF-8."""
    dice = Random(1)
    names = ["empty", "with space", "日本語", "ü" * 60, "x" * 200, *(["emoji 🙂"] if posix else [])]
    (path / "many").mkdir(parents=True)
    for number in range(files):
        (path / "many" / f"file-{number}").write_bytes(dice.randbytes(dice.choice((0, 5, 60, 700, 5000))))
    for number, name in enumerate(names):
        (path / name).write_bytes(bytes([number]) * (number * 1000))
    deep = path.joinpath(*(f"level{number}" for number in range(30)))
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("deep down\n")
    (path / "large").write_bytes(dice.randbytes(2_000_000))
    if posix:
        with open(path / "sparse", "wb") as file:
            file.seek(40 << 20)
            file.write(b"end")
        os.symlink("many/file-1", path / "relative")
        os.symlink("/../../../etc/passwd", path / "outside")
        os.symlink("t" * 200, path / "long-target")
        os.link(path / "large", path / "hard")
        (path / "line\nbreak\x1b[31m").write_text("control")
        Path(os.fsdecode(bytes(path) + b"/latin-\xe9")).write_text("not UTF-8")
        os.chmod(path / "empty", 0o4751)
        os.mkfifo(path / "pipe")
    for folder, folders, found in os.walk(path, topdown=False):
        for name in [*found, *folders]:
            os.utime(Path(folder, name), ns=(MTIME_NS, MTIME_NS), follow_symlinks=False)
    return path


def make_ext(image: Path, tree: Path, *options: str, size: str = "64M", kind: str = "ext4") -> Path:
    """ext2, ext3 or ext4."""
    run("mke2fs", "-q", "-F", "-t", kind, *options, "-d", tree, image, size)
    return image


def make_btrfs(image: Path, tree: Path) -> Path:
    """Btrfs; mkfs writes holes out."""
    run("mkfs.btrfs", "-q", "-r", tree, image)
    return image


def make_xfs(image: Path, tree: Path, *options: str, size: int = 320 << 20) -> Path:
    """XFS from a prototype file, whose names are words: others are left out."""
    lines = ["boot", "0 0", "d--755 0 0"]

    def add(folder: Path) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            text = entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if not text.isascii() or not text.isprintable() or " " in text:
                continue
            bits = f"{stat.S_IMODE(mode) & 0o777:03o}"
            if stat.S_ISDIR(mode):
                lines.append(f"{text} d--{bits} 7 8")
                add(folder / text)
                lines.append("$")
            elif stat.S_ISLNK(mode):
                lines.append(f"{text} l--777 7 8 {os.readlink(folder / text)}")
            elif stat.S_ISREG(mode) and text != "sparse":
                lines.append(f"{text} ---{bits} 7 8 {folder / text}")

    add(tree)
    prototype = image.with_suffix(".proto")
    prototype.write_text("\n".join([*lines, "$", ""]))
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkfs.xfs", "-q", "-p", prototype, *options, image)
    return image


def make_fat(image: Path, tree: Path, bits: int = 32, size: int = 64 << 20) -> Path:
    """FAT."""
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkfs.vfat", "-F", str(bits), image)
    run("mcopy", "-s", "-m", "-Q", "-i", image, *sorted(tree.iterdir()), "::/")
    return image


def make_ntfs(image: Path, files: list[Path], size: int = 48 << 20) -> Path:
    """NTFS with files in its root."""
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkntfs", "-q", "-F", "-p", "0", "-H", "1", "-S", "1", "-s", "512", image)
    for path in files:
        run("ntfscp", "-q", image, path, path.name)
    return image


def make_exfat(image: Path, size: int = 16 << 20, *, empty: bool = False) -> Path:
    """exFAT with nothing in it but a file, `file`, whose second half was never written; no tool writes files without a mount."""
    with open(image, "wb") as file:
        file.truncate(size)
    run("mkfs.exfat", image)
    if empty:
        return image
    held = bytearray(image.read_bytes())
    _, _, heap, _, root = struct.unpack_from("<IIIII", held, 80)
    cluster = 1 << (held[108] + held[109])
    start = (heap << held[108]) + (root - 2) * cluster
    at = next(place for place in range(start, start + cluster, 32) if held[place] == 0)
    data = root + 8
    held[at : at + 96] = (
        struct.pack("<BBHHHIIIBBBBB7x", 0x85, 2, 0, 0x20, 0, STAMP, STAMP, STAMP, 0, 0, 0x80, 0x80, 0x80)
        + struct.pack("<BBxBHHQ4xIQ", 0xC0, 3, 4, 0, 0, 1000, data, 2000)
        + struct.pack("<BB30s", 0xC1, 0, "file".encode("utf-16-le"))
    )
    place = (heap << held[108]) + (data - 2) * cluster
    held[place : place + 2000] = b"e" * 2000
    image.write_bytes(held)
    return image


def is_same(chunks: Iterator[tuple[int, int, bytes | None]], path: Path) -> bool:
    """Is content, in pieces, that of a file here, holes being zeros?"""
    at = 0
    with open(path, "rb") as file:
        for start, end, data in chunks:
            assert start == at < end, "the pieces are in order and leave nothing out"
            at = end
            for low in range(start, end, PIECE):
                length = min(PIECE, end - low)
                wanted = os.pread(file.fileno(), length, low)
                if wanted != (bytes(length) if data is None else data[low - start : low - start + length]):
                    return False
        return at == os.fstat(file.fileno()).st_size


def content_of(browser: Browser, volume: str, path: bytes) -> bytes:
    """A whole file."""
    file = browser.stat(volume, path, follow=True)
    parts = [bytes(end - start) if data is None else data for start, end, data in browser.content(file)]
    return b"".join(parts)


def disk_with(*parts: bytes, label: str = "gpt") -> bytes:
    """A disk with a partition for each of these."""
    first = 2048
    size = (first + sum(-(-len(part) // (1 << 20)) * 2048 for part in parts) + 2048) * SECTOR
    script, at, places = [f"label: {label}"], first, []
    for part in parts:
        sectors = -(-len(part) // (1 << 20)) * 2048
        script.append(f"start={at}, size={sectors}, type=linux")
        places.append(at * SECTOR)
        at += sectors
    image = Path(os.environ.get("TMPDIR", "/tmp")) / f"cdp-parts-{os.getpid()}.img"
    try:
        with open(image, "wb") as file:
            file.truncate(size)
        run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", image, stdin="\n".join(script).encode())
        held = bytearray(image.read_bytes())
    finally:
        image.unlink()
    for place, part in zip(places, parts, strict=True):
        held[place : place + len(part)] = part
    return bytes(held)


def disk_with_lvm(image: Path, root: bytes) -> bytes:
    """A disk of 400 MiB that is a physical volume, as root: `root` of 96 MiB in two pieces that are not neighbours, and `other`.

    Devices are only ever made of the test's own file.
    """
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    device = run("losetup", "-f", "--show", image).decode().strip()
    options = (
        "--driverloaded",
        "n",
        "--config",
        f'devices {{ filter=["a|^{device}$|","r|.*|"] scan_lvs=0 use_devicesfile=0 }}',
    )
    create = ("lvcreate", *options, "-an", "-Zn", "-Wn")
    try:
        run("pvcreate", *options, "-q", device)
        run("vgcreate", *options, "-q", "cdpfiles", device)
        run(*create, "-L", "32M", "-n", "root", "cdpfiles")
        run(*create, "-L", "16M", "-n", "other", "cdpfiles")
        run("lvextend", *options, "-L", "+64M", "cdpfiles/root")
        run("sync")
    finally:
        run("losetup", "-d", device)
    held = bytearray(image.read_bytes())
    held[(1 << 20) : (33 << 20)] = root[: 32 << 20].ljust(32 << 20, b"\0")
    held[(49 << 20) : (113 << 20)] = root[32 << 20 :].ljust(64 << 20, b"\0")
    return bytes(held)
