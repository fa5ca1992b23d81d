"""Files of a disk that is damaged, or made to do harm: a clear error or the right answer, and nothing outside of the target."""

import ast
import contextlib
import errno
import io
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdpserver.errors import CdpError, CorruptError, RefusedError
from cdpserver.files import browser as browsers
from cdpserver.files.browser import Browser, File
from cdpserver.files.fetch import Fetch
from cdpserver.files.mount import PointFiles
from cdpserver.files.point import SORTED, Files
from cdpserver.files.sandbox import MEMORY_BYTES
from cdpserver.files.tarball import write_tar
from tests import filesystems as make
from tests.filesystems import ImageDisk
from tests.test_tree import ROOT, imports, modules

pytestmark = pytest.mark.real

FUZZED = ("ext4", "ext2", "xfs", "btrfs", "ntfs", "fat", "exfat")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small file system of each kind."""
    work = tmp_path_factory.mktemp("hostile")
    tree = make.source_tree(work / "tree", 30, posix=False)
    (tree / "large").write_bytes(b"large" * 4000)
    files = [path for path in tree.iterdir() if path.is_file()]
    return {
        "ext4": make.make_ext(work / "ext4", tree, size="8M"),
        "ext2": make.make_ext(work / "ext2", tree, size="8M", kind="ext2"),
        "xfs": make.make_xfs(work / "xfs", tree),
        "btrfs": make.make_btrfs(work / "btrfs", tree),
        "ntfs": make.make_ntfs(work / "ntfs", files, 8 << 20),
        "fat": make.make_fat(work / "fat", tree, 16, 16 << 20),
        "exfat": make.make_exfat(work / "exfat"),
    }


def look_at_everything(browser: Browser) -> int:
    """Walks it all, and reads the head and the attributes of every file."""
    seen = 0
    volume = browser.choose(None)
    browser.open(volume)
    for file in browser.walk(volume, b"/"):
        seen += 1
        if file.type == "file":
            with contextlib.suppress(CorruptError, RefusedError):
                browser.head(file, 4096)
                browser.xattrs(file)
        if seen > 5000:
            break
    return seen


def metadata_of(path: Path) -> list[int]:
    """The 512 bytes that hold anything: in these images mostly metadata."""
    found = []
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        at = 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            held = os.pread(file.fileno(), hole - at, at)
            found += [at + part for part in range(0, len(held), 512) if held[part : part + 512].strip(b"\0")]
            at = hole
    return found


class Flipped(ImageDisk):
    """An image with other bytes in places."""

    def __init__(self, image: Path, flips: dict[int, int]) -> None:
        super().__init__(image)
        self._flips = flips

    def read(self, offset: int, length: int) -> bytes:
        held = bytearray(super().read(offset, length))
        for place, value in self._flips.items():
            if offset <= place < offset + length:
                held[place - offset] = value
        return bytes(held)


@pytest.mark.parametrize("kind", FUZZED)
def test_flipped_bytes(kind: str, images: dict[str, Path]) -> None:
    """The caller gets an answer or an error, in time, and the worker is gone."""
    image = images[kind]
    places = metadata_of(image)

    @settings(max_examples=int(os.environ.get("CDP_FUZZ", "6")), suppress_health_check=list(HealthCheck))
    @given(
        st.lists(
            st.tuples(st.sampled_from(places[:200] + places), st.integers(0, 511), st.integers(0, 255)),
            min_size=1,
            max_size=60,
        )
    )
    def flipped(flips: list[tuple[int, int, int]]) -> None:
        disk = Flipped(image, {sector + within: value for sector, within, value in flips})
        started = time.monotonic()
        with Browser(disk, answer_s=15) as browser, contextlib.suppress(CdpError):
            look_at_everything(browser)
        process = browser._process
        assert process.returncode is not None
        assert time.monotonic() - started < 60

    flipped()


def test_what_is_whole_is_read(images: dict[str, Path]) -> None:
    for kind, image in images.items():
        with Browser(ImageDisk(image)) as browser:
            assert look_at_everything(browser) >= (2 if kind == "exfat" else 7), kind


def test_a_directory_inside_itself(images: dict[str, Path], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(images["ext4"].read_bytes())
    make.run("debugfs", "-w", "-R", "ln <2> level0/level1/loop", image)
    with Browser(ImageDisk(image)) as browser:
        (loop,) = [file for file in browser.walk("", b"/") if file.type == "unreadable"]
    assert loop.path == (b"level0", b"level1", b"loop") and "inside itself" in loop.why


def test_directories_that_have_two_names(tmp_path: Path) -> None:
    """Each of a chain names the next twice: 2^24 ways lead to its end, and each directory is told once."""
    depth, tree = 24, tmp_path / "tree"
    tree.mkdir()
    for number in range(depth):
        (tree / f"d{number}").mkdir()
    (tree / f"d{depth - 1}" / "end").touch()
    image = make.make_ext(tmp_path / "image", tree, "-O", "^dir_index", size="8M")
    links = "".join(
        f"ln d{number + 1} d{number}/{name}\n" for number in range(depth - 1) for name in ("one", "two")
    )
    make.run("debugfs", "-w", "-f", "-", image, stdin=links.encode())
    with Browser(ImageDisk(image)) as browser:
        found = list(browser.walk("", b"/d0"))
        below = list(browser.find("", b"/d0", name=b"end"))
    twice = [file for file in found if file.type == "unreadable"]
    assert len(twice) == depth - 1 and all("two names" in file.why for file in twice)
    assert [file.name for file in found if file.type == "file"] == [b"end"]
    assert [file.name for file in below if file.type == "file"] == [b"end"]


def test_links_that_lead_in_circles(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    os.symlink("b", tree / "a")
    os.symlink("a", tree / "b")
    with Browser(ImageDisk(make.make_ext(tmp_path / "image", tree, size="8M"))) as browser:
        with pytest.raises(RefusedError, match="links"):
            browser.stat("", b"/a", follow=True)
        assert browser.stat("", b"/a").target == b"b"


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"LUKS\xba\xbe\x00\x01", "encrypted"),
        (b"\xeb\x58\x90-FVE-FS-", "encrypted"),
        (bytes(4086) + b"SWAPSPACE2", "swap"),
        (bytes(8), "no file system"),
    ],
)
def test_what_cannot_be_read_says_so(head: bytes, said: str) -> None:
    with Browser(ImageDisk(head.ljust(1 << 20, b"\0"))) as browser, pytest.raises(RefusedError, match=said):
        browser.open(browser.choose(None))


def test_a_superblock_that_is_damaged(images: dict[str, Path]) -> None:
    damaged = bytearray(images["ext4"].read_bytes())
    damaged[1024 + 24 : 1024 + 28] = b"\xff\xff\xff\xff"
    with Browser(ImageDisk(bytes(damaged))) as browser, pytest.raises(CorruptError):
        browser.open("")


def test_a_sparse_file_of_8_eib(images: dict[str, Path], tmp_path: Path) -> None:
    image = tmp_path / "image"
    make.run("cp", "--sparse=always", images["xfs"], image)
    with Browser(ImageDisk(image)) as browser:
        number = browser.stat("", b"/large").id
    make.run("xfs_db", "-x", "-c", f"inode {number}", "-c", f"write -d core.size {(1 << 63) - 1}", image)
    with Browser(ImageDisk(image)) as browser:
        file = browser.stat("", b"/large")
        assert file.size == (1 << 63) - 1
        assert browser.head(file, 10) == b"largelarge"
        out = io.BytesIO()
        assert not write_tar(browser, browser.walk("", b"/large"), b"large", out).problems
        assert len(out.getvalue()) < 1 << 20
        taken = Fetch(browser, tmp_path / "out", point="p").run(browser.walk("", b"/large"), b"large")
    if taken.failed:  # most file systems have no files of this size
        assert not list((tmp_path / "out").iterdir())


def blocks_of(image: Path, name: str) -> list[int]:
    return [int(block) for block in make.run("debugfs", "-R", f"blocks {name}", image).split()]


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of names, to which a million pointers lead."""
    tmp_path = tmp_path_factory.mktemp("huge")
    tree = tmp_path / "tree"
    (tree / "huge").mkdir(parents=True)
    for number in range(60):
        (tree / "huge" / f"entry-{number}").touch()
    for level in ("one", "two"):
        (tree / level).write_bytes(b"\1" * 4096)
    image = make.make_ext(tmp_path / "image", tree, "-b", "4096", "-O", "^dir_index", size="16M", kind="ext2")
    (names,), (one,), (two,) = (blocks_of(image, name) for name in ("huge", "one", "two"))
    held = bytearray(image.read_bytes())
    held[one * 4096 : (one + 1) * 4096] = struct.pack("<I", names) * 1024
    held[two * 4096 : (two + 1) * 4096] = struct.pack("<I", one) * 1024
    image.write_bytes(held)
    for field, value in (("block[IND]", one), ("block[DIND]", two), ("size", (12 + 1024 + 1024**2) * 4096)):
        make.run("debugfs", "-w", "-R", f"sif huge {field} {value}", image)
    for number in range(1, 12):
        make.run("debugfs", "-w", "-R", f"sif huge block[{number}] {names}", image)
    return image


def test_a_directory_of_hundreds_of_millions(huge: Path) -> None:
    """Its list begins at once, and is never whole in memory."""
    with Browser(ImageDisk(huge)) as browser:
        started = time.monotonic()
        files = Files(browser)
        found = files.listing("", b"/huge")
        first = [row["name"] for row in islice(found, SORTED + 5000)]
        assert len(first) == SORTED + 5000 and set(first) == {f"entry-{number}" for number in range(60)}
        status = Path(f"/proc/{browser._process.pid}/status").read_text()
        assert time.monotonic() - started < 60
        assert int(status.partition("VmHWM:")[2].split()[0]) < 300_000
        # The one that asked for no more is no burden for the next.
        assert {row["name"] for row in files.listing("", b"/")} >= {"huge", "one", "two"}


def test_who_needs_all_of_it_has_a_limit(huge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsers, "MOST_HELD", 5000)
    told: list[tuple[str, str]] = []
    with contextlib.closing(PointFiles(ImageDisk(huge), lambda path, why: told.append((path, why)))) as files:
        with pytest.raises(OSError, match="Input/output") as caught:
            list(files.readdir("/fs/huge", 0))
        assert caught.value.errno == errno.EIO and told[0][0] == "/fs/huge" and "5000 entries" in told[0][1]
        assert {"huge", "one"} <= set(files.readdir("/fs", 0)), "the next question is answered"
    monkeypatch.setattr(browsers, "MOST_HELD", 0)
    with contextlib.closing(PointFiles(ImageDisk(huge), lambda path, why: told.append((path, why)))) as files:
        with pytest.raises(OSError, match="Input/output"):
            files.open("/fs/one", os.O_RDONLY)
        assert told[1][0] == "/fs/one"


def test_what_unpacks_to_a_thousand_times_its_size(tmp_path: Path) -> None:
    """A compressed extent that says it is small, and is 256 MiB of zeros: an error or the right bytes, and no memory for it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    content = os.urandom(1 << 20)
    (tree / "bomb").write_bytes(content)
    (tree / "other").write_bytes(b"other" * 1000)
    held = bytearray(make.make_btrfs(tmp_path / "image", tree).read_bytes())
    place = held.index(content[:4096])
    packed = zlib.compress(bytes(1 << 28), 9)[: 1 << 20]
    held[place : place + len(packed)] = packed
    extents = [
        found.start()
        for found in re.finditer(re.escape(struct.pack("<Q", 1 << 20)) + b"\0\0\0\0\1", bytes(held))
    ]
    assert extents
    for at in extents:  # the item's size when unpacked, and how it is packed: zlib
        held[at : at + 9] = struct.pack("<QB", 1 << 28, 1)
    with Browser(ImageDisk(bytes(held))) as browser:
        file = browser.stat("", b"/bomb")
        with contextlib.suppress(CorruptError):
            assert not any(browser.head(file, 1 << 20))
        status = Path(f"/proc/{browser._process.pid}/status").read_text()
        assert int(status.partition("VmHWM:")[2].split()[0]) < MEMORY_BYTES >> 10
        assert make.content_of(browser, "", b"/other") == b"other" * 1000


# --- the process


class Slow(ImageDisk):
    """A disk that takes its time."""

    def read(self, offset: int, length: int) -> bytes:
        time.sleep(0.05)
        return super().read(offset, length)


class Dropped(ImageDisk):
    """A point that is dropped while it is read."""

    def read(self, offset: int, length: int) -> bytes:
        if offset:
            raise RefusedError("it is not kept any more", hint="cdp point list d")
        return super().read(offset, length)


def test_a_worker_that_takes_too_long_is_ended(images: dict[str, Path]) -> None:
    with Browser(Slow(images["ext4"]), answer_s=2) as browser:
        browser._answer_s = 0.06
        with pytest.raises(CorruptError, match="longer than"):
            list(browser.walk("", b"/"))
        with pytest.raises(CorruptError, match="ended"):
            browser.volumes()


def test_a_point_that_is_dropped_while_it_is_browsed(images: dict[str, Path]) -> None:
    with Browser(Dropped(images["btrfs"])) as browser, pytest.raises(RefusedError, match="not kept"):
        list(browser.walk("", b"/"))


def test_a_worker_that_dies_is_an_error(images: dict[str, Path]) -> None:
    with Browser(ImageDisk(images["ext4"])) as browser:
        browser._process.kill()
        browser._process.wait()
        with pytest.raises(CorruptError, match="ended"):
            browser.volumes()


TRIES = """
import os, socket, sys
from cdpserver.files import sandbox
os.pipe  # loaded
restrained = sandbox.enter(int(sys.argv[1]))
def refused(work):
    try:
        work()
    except (OSError, MemoryError):
        return True
    return False
found = {
    "open": refused(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "make": refused(lambda: os.mkdir("/tmp/cdp-should-not-be")),
    "network": refused(lambda: socket.socket()),
    "fork": refused(os.fork),
    "memory": refused(lambda: bytearray(2 << 30)),
    "root": os.geteuid is None,
}
os.write(1, repr((restrained, found)).encode())
"""


def test_the_worker_can_do_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRIES, str(os.getpid())],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    restrained, found = ast.literal_eval(done.stdout.decode())
    assert restrained == "seccomp", done.stderr
    assert [name for name, refused in found.items() if not refused] == ["root"]


def test_the_worker_is_nobody(images: dict[str, Path]) -> None:
    with Browser(ImageDisk(images["ext4"])) as browser:
        status = Path(f"/proc/{browser._process.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert (
        fields["Uid"].split()[0] != "0"
        and fields["NoNewPrivs"].strip() == "1"
        and fields["Seccomp"].strip() == "2"
    )
    assert int(fields["CapEff"], 16) == 0


def test_only_the_worker_knows_the_parsers() -> None:
    """Whoever imports dissect is imported by the worker's side alone."""
    theirs = {f"cdpserver.files.{name}" for name in ("replay", "volumes", "tree", "worker")}
    for name, module in modules().items():
        inside = name in theirs or name.startswith(("cdpserver.files.formats.", "cdpserver.files.replay."))
        for _, target in imports(module):
            assert inside or target.split(".")[0] != "dissect", name
            assert inside or target not in theirs, name


# --- what is written


class Lies:
    """A browser that tells of whatever names and types it is given."""

    def content(self, file: File, offset: int = 0) -> Iterator[tuple[int, int, bytes | None]]:
        if offset < file.size:
            yield offset, file.size, b"x" * (file.size - offset) if file.size < 100 else None

    def xattrs(self, file: File) -> dict[str, bytes]:
        return {}


def told(
    path: tuple[bytes, ...], type: str = "file", target: bytes | None = None, size: int = 1, **more: int
) -> File:
    known: dict[str, Any] = {
        "mtime_ns": 1,
        "atime_ns": 1,
        "mode": 0o6777,
        "uid": os.getuid(),
        "gid": os.getgid(),
        "links": 1,
        "id": 1,
        "number": 1,
    }
    return File(path=path, type=type, target=target, size=size, why="", **{**known, **more})


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    found = [
        told((), "dir"),
        told((b"..",)),
        told((b"../x",)),
        told((b"",)),
        told((b"a\0b",)),
        told((b"n" * 300,)),
        told((b"door",), "link", os.fsencode(outside)),
        told((b"door",), "dir"),
        told((b"door", b"kept")),
        told((b"door", b"new")),
        told((b"key",), "link", os.fsencode(outside / "kept")),
        told((b"key",)),
        told((b"disk",), "block"),
        told((b"endless",), size=1 << 62, id=7),
        told((b"fine\n\x1b",), id=8),
        told((b"again",), id=9, links=2),
        told((b"again2",), id=9, links=2),
    ]
    for force in (False, True):
        taken = Fetch(Lies(), target, point="p", force=force).run(iter(found), b"")
        assert taken.failed >= 8 and taken.skipped == 1
        assert [path.name for path in outside.iterdir()] == ["kept"]
        assert (outside / "kept").read_text() == "kept"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "target"]
        assert (target / "fine\n\x1b").read_text() == "x"
        assert (target / "again").stat().st_ino == (target / "again2").stat().st_ino


def test_a_target_that_is_prepared_is_not_written_through(tmp_path: Path) -> None:
    """Links that stand in the target already are not followed either."""
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    os.symlink(outside, target / "sub")
    found = [told((), "dir"), told((b"sub",), "dir"), told((b"sub", b"file"))]
    taken = Fetch(Lies(), target, point="p", force=True).run(iter(found), b"")
    assert taken.failed == 2 and not list(outside.iterdir())
