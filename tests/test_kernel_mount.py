"""`cdp mount --kernel`: this host's kernel mounts a point, and whatever ends first, nothing of it is left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from recovery import cli, files_get, kernel_mount
from recovery.kernel_mount import WORK_PARENT, WORK_PREFIX
from tests import filesystems as make
from tests.test_mount import cdp
from tests.test_service import Server, until
from tests.test_volume_export import protect

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK),
        reason="needs root, /dev/fuse and loop devices",
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with a small disk, `small`."""
    directory = tmp_path_factory.mktemp("kernel")
    (directory / "tree").mkdir()
    (directory / "tree" / "file").write_bytes(b"x" * 100_000)
    with tempfile.TemporaryDirectory(prefix="cdp-") as path, Server(Path(path) / "s") as running:
        protect(
            running, "small", make.make_ext(directory / "ext4", directory / "tree", size="8M").read_bytes()
        )
        yield running


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "over there, 日本"
    directory.mkdir()
    before = works()
    yield directory
    for work in works() - before:
        kernel_mount.undo(work)
    assert not os.path.ismount(directory)


def works() -> set[Path]:
    return set(WORK_PARENT.glob(f"{WORK_PREFIX}*"))


def processes(*words: str | Path) -> list[int]:
    """Those whose command lines hold all of these."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            held = path.read_bytes()
            if all(os.fsencode(word) in held for word in words):
                found.append(int(path.parent.name))
    return found


def nothing_left(directory: Path, work: Path) -> bool:
    return (
        not os.path.ismount(directory)
        and not work.exists()
        and not kernel_mount.loops_of(work)
        and not processes(work)
        and not processes("--kernel", directory)
    )


@contextlib.contextmanager
def looped(image: Path, directory: Path, kind: str) -> Iterator[Path]:
    """The image, mounted to be written to."""
    directory.mkdir()
    make.run("mount", "-t", kind, "-o", "loop", image, directory)
    try:
        yield directory
    finally:
        make.run("umount", directory)


def test_the_kernel_mounts_a_partition(server: Server, there: Path, tmp_path: Path) -> None:
    tree = make.source_tree(tmp_path / "tree", 50)
    os.setxattr(tree / "large", "user.note", b"kept")
    ext4 = make.make_ext(tmp_path / "ext4", tree, size="32M").read_bytes()
    protect(server, "vm0", make.disk_with(b"\x17" * (1 << 20), ext4))
    said = cdp(server, "mount", "vm0@latest/p2", there, "--kernel")
    assert b"could take the host over" in said
    (work,) = [work for work in works() if work == kernel_mount.work_of(there)]
    same = subprocess.run(
        ["diff", "-r", "--no-dereference", "-x", "lost+found", "-x", "pipe", tree, there],
        capture_output=True,
        check=False,
    )
    assert same.returncode == 0, same.stdout
    assert os.getxattr(there / "large", "user.note") == b"kept"
    with pytest.raises(OSError, match="Read-only"):
        (there / "new").touch()
    flags = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
    assert os.statvfs(there).f_flag & flags == flags
    (event,) = server.events("mount.kernel")
    assert (event["volume"], event["directory"]) == ("p2", str(there)) and event["user"]
    with open(there / "empty", "rb"):
        assert b"busy" in cdp(server, "umount", there, code=3)
    cdp(server, "umount", there)
    until(lambda: nothing_left(there, work), "end of the mount")


def test_what_is_not_mounted_leaves_nothing(server: Server, there: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    ext4 = bytearray(make.make_ext(tmp_path / "ext4", tmp_path / "tree", size="8M").read_bytes())
    ext4[1024 + 24] = 0x77  # a size of blocks that no kernel takes
    protect(server, "bad", make.disk_with(b"\x17" * (1 << 20), bytes(ext4)))
    before = works()
    assert b"this holds no file system" in cdp(server, "mount", "bad@latest/p1", there, "--kernel", code=5)
    assert b"the disk has no p7" in cdp(server, "mount", "bad@latest/p7", there, "--kernel", code=5)
    assert b"mount: " in cdp(server, "mount", "bad@latest/p2", there, "--kernel", code=5)
    assert b"all volumes are shown" in cdp(server, "mount", "bad@latest/p2", there, code=2)
    until(lambda: works() <= before and not processes("--kernel", there), "end of what was begun")


@pytest.mark.parametrize("victim", ["serving", "fuse", "watcher", "all but the watcher", "told to end"])
def test_nothing_is_left_whatever_is_killed(victim: str, server: Server, there: Path) -> None:
    cdp(server, "mount", "small@latest", there, "--kernel")
    work = kernel_mount.work_of(there)
    assert work is not None
    (serving,) = processes("--foreground", "--kernel", there)
    (fuse,) = processes("nbdfuse", work)
    (watcher,) = processes("recovery.kernel_mount", work)
    killed = {"serving": [serving], "fuse": [fuse], "watcher": [watcher], "told to end": []}.get(
        victim, [serving, fuse]
    )
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    if victim == "told to end":
        os.kill(serving, signal.SIGTERM)
    if victim == "watcher":
        assert (there / "file").read_bytes() == b"x" * 100_000
        cdp(server, "umount", there)
    until(lambda: nothing_left(there, work), "end of all of it")


def test_a_log_tree_is_said_and_the_kernel_replays_it(
    server: Server,
    there: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Btrfs keeps what was fsynced in a log until its next commit: browsing says how old it shows things, the mount has it."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "old").write_text("old")
    image = make.make_btrfs(tmp_path / "btrfs", tmp_path / "tree")
    with open(image, "r+b") as file:
        file.truncate(160 << 20)
    with looped(image, tmp_path / "live", "btrfs") as live:
        (live / "committed").write_text("committed")
        make.run("sync", "--file-system", live)
        with open(live / "fsynced", "wb") as synced:
            synced.write(b"fsynced")
            synced.flush()
            os.fsync(synced.fileno())
        held = image.read_bytes()
    protect(server, "d", held)
    command = [sys.executable, "-m", "recovery.cli", "--state-dir", str(server.state_dir)]

    def said(*arguments: str) -> bytes:
        """The answer; what is to be known is said once."""
        done = subprocess.run([*command, *arguments], capture_output=True, check=True)
        assert done.stderr.count(b"last commit") == done.stderr.count(b"cdp mount --kernel") == 1, arguments
        return done.stdout

    assert {row["name"] for row in json.loads(said("file", "ls", "d@latest", "--json"))} == {
        "old",
        "committed",
    }
    assert said("file", "cat", "d@latest", "/old") == b"old"
    said("file", "get", "d@latest", "/old", "--output", str(tmp_path / "out"))
    said("file", "history", "d", "/old")
    said("file", "find", "d@latest", "--name", "old")
    monkeypatch.setattr(files_get, "may_read", lambda path: False)
    options = cli.parse([*command[3:], "file", "get", "d@latest", "/", "--tar", str(tmp_path / "tar")])
    capsys.readouterr()
    options.run(options)
    assert capsys.readouterr().err.count("last commit") == 1
    said("mount", "d@latest", str(there))
    assert sorted(os.listdir(there / "fs")) == ["committed", "old"]
    cdp(server, "umount", there)
    cdp(server, "mount", "d@latest", there, "--kernel")
    assert (there / "fsynced").read_text() == "fsynced"
    cdp(server, "umount", there)


def test_xfs_twice_and_without_the_service(server: Server, there: Path, tmp_path: Path) -> None:
    """Two points of one disk have one UUID. Last: it ends the service."""
    other, tree = tmp_path / "other", tmp_path / "tree"
    other.mkdir()
    tree.mkdir()
    (tree / "file").write_text("there")
    protect(server, "xfs", make.make_xfs(tmp_path / "xfs", tree).read_bytes())
    cdp(server, "mount", "xfs@latest", there, "--kernel")
    server.stop()
    cdp(server, "mount", "xfs@latest", other, "--kernel")
    assert (other / "file").read_text() == "there"
    for directory in (there, other):
        cdp(server, "umount", directory)
