"""Files of a point on their way out: into a directory, as a tar stream, and by the commands of `cdp file`."""

import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver.errors import ForbiddenError
from cdpserver.files.browser import Browser, File
from cdpserver.files.fetch import Fetch
from cdpserver.files.tarball import write_tar
from recovery import cli, files_get
from tests import filesystems as make
from tests.filesystems import ImageDisk
from tests.test_service import Server, until, write

pytestmark = pytest.mark.real


CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
"""cap_net_bind_service=ep, as setcap has it."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.source_tree(tmp_path_factory.mktemp("files") / "tree")


@pytest.fixture(scope="module")
def ext4(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.setxattr(tree / "large", "user.note", b"kept")
    os.setxattr(tree / "many", "user.note", b"of a directory")
    if os.geteuid() == 0:
        os.setxattr(tree / "large", "security.capability", CAPABILITY)
        for name in ("relative", "many/file-5", "level0"):
            os.lchown(tree / name, 7, 8)
    return make.make_ext(tmp_path_factory.mktemp("image") / "ext4.img", tree)


@pytest.fixture
def browser(ext4: Path) -> Iterator[Browser]:
    with Browser(ImageDisk(ext4)) as opened:
        yield opened


def assert_attributes(out: Path) -> None:
    assert os.getxattr(out / "large", "user.note") == b"kept"
    assert os.getxattr(out / "many", "user.note") == b"of a directory"
    if os.geteuid() == 0:
        assert os.getxattr(out / "large", "security.capability") == CAPABILITY
        for name in ("relative", "many/file-5", "level0"):
            known = (out / name).lstat()
            assert (known.st_uid, known.st_gid) == (7, 8), name
        known = (out / "many/file-6").lstat()
        assert (known.st_uid, known.st_gid) == (0, 0)


# --- fetching


def test_a_tree_is_fetched_and_goes_on(browser: Browser, tree: Path, tmp_path: Path) -> None:
    def fetch() -> Any:
        return Fetch(browser, tmp_path / "out", point="p").run(browser.walk("", b"/", full=True), b"")

    taken = fetch()
    assert not taken.problems and taken.files > 400
    same = subprocess.run(
        ["diff", "-r", "--no-dereference", "-x", "lost+found", "-x", "pipe", tree, tmp_path / "out"],
        capture_output=True,
        check=False,
    )
    assert same.returncode == 0, same.stdout
    out = tmp_path / "out"
    assert (out / "hard").stat().st_ino == (out / "large").stat().st_ino
    assert (out / "sparse").stat().st_blocks < 100
    assert (out / "many").stat().st_mtime_ns == make.MTIME_NS
    assert_attributes(out)
    assert stat.S_ISFIFO((out / "pipe").lstat().st_mode)
    assert stat.S_IMODE((out / "empty").stat().st_mode) == (0o4751 if os.geteuid() == 0 else 0o751)
    again = fetch()
    assert (again.files, again.problems) == (0, []) and again.kept == taken.files
    (out / "many" / "file-3").write_text("changed here")
    assert [problem.split(":")[0] for problem in fetch().problems] == ["'many/file-3'"]


class Breaks:
    """A browser whose file ends in an interrupt after so many pieces."""

    def __init__(self, browser: Browser, pieces: int) -> None:
        self._browser, self._left, self.asked = browser, pieces, -1
        self.told: Callable[[bytes], None] = lambda name: None

    def content(self, file: File, offset: int = 0) -> Iterator[tuple[int, int, bytes | None]]:
        self.asked = offset
        for piece in self._browser.content(file, offset):
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            yield piece

    def xattrs(self, file: File) -> dict[str, bytes]:
        self.told(file.name)
        return self._browser.xattrs(file)


@pytest.mark.parametrize("full", [False, True])
def test_attributes_of_a_directory_are_asked_for_when_it_is_entered(
    full: bool, browser: Browser, tmp_path: Path
) -> None:
    """The worker forgets which file a number was; a directory is left after all that is in it."""
    asked: list[bytes] = []
    inside = 0

    def found() -> Iterator[File]:
        nonlocal inside
        for file in browser.walk("", b"/many", full=full):
            inside += len(file.path)
            assert not file.path or asked[:1] == [b""]
            yield file

    source = Breaks(browser, 1 << 20)
    source.told = asked.append
    assert not Fetch(source, tmp_path, point="p").run(found(), b"many").problems and inside == 400
    assert os.getxattr(tmp_path / "many", "user.note") == b"of a directory"


def test_a_file_goes_on_where_it_ended(browser: Browser, tree: Path, tmp_path: Path) -> None:
    for point, begun in (("p", 0), ("p", 1 << 20), ("q", 0)):
        source = Breaks(browser, 1)
        if begun:
            source = Breaks(browser, 99)
            Fetch(source, tmp_path, point=point).run(browser.walk("", b"/large"), b"large")
            assert (tmp_path / "large").read_bytes() == (tree / "large").read_bytes()
            (tmp_path / "large").unlink()
        else:
            with pytest.raises(KeyboardInterrupt):
                Fetch(source, tmp_path, point=point).run(browser.walk("", b"/large"), b"large")
        assert source.asked == begun, "another point does not go on with it"


def test_a_tar_stream(browser: Browser, tree: Path, tmp_path: Path) -> None:
    out = io.BytesIO()
    taken = write_tar(browser, browser.walk("", b"/"), b"top", out)
    assert not taken.problems
    assert len(out.getvalue()) < 20 << 20, "holes are left out"
    make.run("tar", "-x", "-f", "-", "-C", tmp_path, "--xattrs", "--xattrs-include=*", stdin=out.getvalue())
    same = subprocess.run(
        ["diff", "-r", "--no-dereference", "-x", "lost+found", "-x", "pipe", tree, tmp_path / "top"],
        capture_output=True,
        check=False,
    )
    assert same.returncode == 0, same.stdout
    assert (tmp_path / "top/hard").stat().st_ino == (tmp_path / "top/large").stat().st_ino
    assert (tmp_path / "top/sparse").stat().st_blocks < 100
    assert_attributes(tmp_path / "top")
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        assert tar.getmember("top/large").mtime == pytest.approx(make.MTIME_NS / 1e9)


# --- the commands


def cdp(state_dir: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "recovery.cli", "--state-dir", state_dir, "file", *arguments],
        capture_output=True,
        check=False,
    )
    assert done.returncode == code, done.stderr.decode()
    return done


def small_image(path: Path) -> bytes:
    tree = path / "small"
    (tree / "sub").mkdir(parents=True)
    (tree / "hello").write_text("hello, world\n")
    (tree / "sub" / "data").write_bytes(bytes(range(256)))
    Path(os.fsdecode(bytes(tree) + b"/latin-\xe9")).write_text("x")
    os.symlink("hello", tree / "link")
    os.utime(tree / "hello", ns=(make.MTIME_NS, make.MTIME_NS))
    return make.make_ext(path / "small.img", tree, size="8M").read_bytes()


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


def test_the_commands_with_the_service_and_without(server: Server, short_path: Path) -> None:
    uri = server.add()
    write(uri, small_image(short_path))
    server.synced("d")
    state = server.state_dir
    rows = {row["name"]: row for row in json.loads(cdp(state, "ls", "d@latest", "/", "--json").stdout)}
    assert rows["hello"] == {
        "name": "hello", "type": "file", "size": 13, "mtime_ns": make.MTIME_NS, "mode": 0o644,
        "uid": os.getuid(), "gid": os.getgid(), "target": None,
    }  # fmt: skip
    assert rows["link"]["target"] == "hello" and rows["link"]["type"] == "link"
    assert rows["latin-�"]["name_hex"] == b"latin-\xe9".hex()
    assert cdp(state, "cat", "d@latest", "/link").stdout == b"hello, world\n"
    out = short_path / "out"
    cdp(state, "get", "d@latest", "/sub", "--output", str(out))
    assert (out / "sub" / "data").read_bytes() == bytes(range(256))
    event = server.events("file.taken")[-1]
    assert (event["disk"], event["path"], event["files"]) == ("d", "/sub", 1)
    assert event["point"].startswith("d@seq:") and event["user"]
    for looking in (("ls",), ("find", "--name", "hello"), ("preview", "/hello")):
        server.post("/v1/disks/d:mark", name=f"before-{looking[0]}")
        done = cdp(state, looking[0], f"d@before-{looking[0]}", *looking[1:], "--lock")
        assert b"cdp point unlock" in done.stderr
    marks = [point["seq"] for point in server.get("/v1/disks/d:points?kind=bookmark")]
    assert [lock["seq"] for lock in server.get("/v1/locks")] == marks
    server.stop()
    assert b"does not answer" in cdp(state, "ls", "d@latest", "--lock", code=6).stderr
    assert cdp(state, "cat", "d@latest", "/hello").stdout == b"hello, world\n"
    found = json.loads(cdp(state, "stat", "d@latest", "/hello", "--json").stdout)
    assert (found["links"], found["size"], found["name"], found["path"]) == (1, 13, "hello", "/hello")
    (one,) = json.loads(cdp(state, "ls", "d@latest", "/sub/data", "--json").stdout)
    assert (one["name"], one["size"]) == ("data", 256)
    assert cdp(state, "find", "d@latest", "--name", "d*").stdout == b"sub/data\n"
    assert cdp(state, "preview", "d@latest", "/sub/data").stdout.startswith(b"00000000  00 01 02")
    tar = cdp(state, "get", "d@latest", "/", "--tar", "-").stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as read:
        assert "root/sub/data" in read.getnames()
    assert b"not a volume" in cdp(state, "ls", "d@latest/x", code=2).stderr
    assert b"there is no '/nothing'" in cdp(state, "cat", "d@latest", "/nothing", code=2).stderr
    assert b"there is no disk" in cdp(state, "ls", "other@latest", code=2).stderr


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_get_that_is_broken_off_is_on_record(
    signal_number: signal.Signals, server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(server.add(), small_image(short_path))
    server.synced("d")
    real = Browser.content

    def content(self: Browser, file: File, offset: int = 0) -> Iterator[tuple[int, int, bytes | None]]:
        if file.name == b"data":
            os.kill(os.getpid(), signal_number)
        return real(self, file, offset)

    monkeypatch.setattr(Browser, "content", content)
    for target in (("--output", str(short_path / "out")), ("--tar", str(short_path / "tar"))):
        options = cli.parse(["--state-dir", str(server.state_dir), "file", "get", "d@latest", "/", *target])
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            options.run(options)
    first, second = server.events("file.taken")
    for event in (first, second):
        assert (event["disk"], event["path"], event["whole"]) == ("d", "/", False) and event["user"]
    assert second["files"] > 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("vm", "disk", "point"), [(None, "d", "d@latest"), ("web", "web/d", "web@latest/d")])
def test_who_may_not_read_the_directory_gets_a_stream(
    vm: str | None,
    disk: str,
    point: str,
    server: Server,
    short_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(server.add(vm=vm), small_image(short_path))
    server.synced(disk, write_blocking=True)
    monkeypatch.setattr(files_get, "may_read", lambda path: False)

    def get(*arguments: str) -> None:
        options = cli.parse(["--state-dir", str(server.state_dir), "file", "get", point, *arguments])
        options.run(options)

    tar = short_path / "out.tar"
    get("/", "--tar", str(tar))
    with tarfile.open(tar) as read:
        assert "root/sub/data" in read.getnames()
    event = until(lambda: server.events("file.taken"), "event of it")[-1]
    assert event["files"] > 2
    with pytest.raises(ForbiddenError, match="state directory"):
        get("/", "--output", str(short_path / "out"))
