"""Backups as points: browsed, mounted and drilled; let go when nobody uses them; in a repository that is read-only, or hangs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from cdpserver.catalog import Catalog
from cdpserver.clock import fix_clock
from cdpserver.config import Config
from cdpserver.errors import NotFoundError
from cdpserver.events import EventLog
from cdpserver.repository import registered
from cdpserver.repository.configuration import Config as RepositoryConfig
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.registered import Registered
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.take import back_up
from cdpserver.service import attached
from cdpserver.service.attached import IDLE_S, Attached, Idle
from cdpserver.service.browsing import Browsing
from cdpserver.service.control import Targets
from cdpserver.service.core import Core
from cdpserver.service.disks import Disks
from cdpserver.state import StateDir
from recovery import cli
from tests import filesystems as make
from tests.backed_up import Made
from tests.core import START_NS
from tests.test_service import Server, connected, read, until
from tools.kit.bootsector import boot_sector
from tools.kit.processes import stop

needs_fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="FUSE needs /dev/fuse")

MIB = 1 << 20


def test_a_day_after_its_last_use_a_backup_is_let_go() -> None:
    """A service that was started anew counts from its start."""
    idle = Idle(1000.0)
    assert not idle.is_over("a", 1000.0 + IDLE_S)
    assert idle.is_over("a", 1001.0 + IDLE_S)
    idle.use("a", 5000.0)
    assert not idle.is_over("a", 5000.0 + IDLE_S)
    assert idle.is_over("b", 5000.0 + IDLE_S), "another one was not used"
    assert idle.is_over("a", 5001.0 + IDLE_S)
    idle.use("a", 5001.0 + IDLE_S)  # something stands on it: it is asked again a day later
    assert not idle.is_over("a", 5001.0 + 2 * IDLE_S)
    idle.forget("a")
    assert idle.is_over("a", 1001.0 + IDLE_S), "one that is attached anew is used then"


@pytest.fixture
def server(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(short_path / "xdg"))
    with Server(short_path / "s") as running:
        yield running


def cdp(server: Server, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    options = cli.parse(["--state-dir", str(server.state_dir), *map(str, arguments), "--json"])
    assert not options.run(options)
    return json.loads(capsys.readouterr().out)


def protect(server: Server, name: str, content: bytes) -> None:
    uri = str(server.post("/v1/disks", name=name, size=len(content))["uri"])
    with connected(uri) as client:
        for at in range(0, len(content), MIB):
            client.pwrite(content[at : at + MIB], at)
    server.post(f"/v1/disks/{name}:synced", write_blocking=True)


class Mount:
    """`cdp mount` in a process of its own, which can be stopped: then its file system hangs."""

    def __init__(self, server: Server, point: str, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "recovery.cli", "--state-dir", str(server.state_dir),
             "mount", "--foreground", "--", point, str(directory)],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self) -> Path:
        until(lambda: os.path.ismount(self.directory), "mount")
        return self.directory

    def __exit__(self, *_: object) -> None:
        self.go_on()
        subprocess.run(["fusermount3", "-u", "-z", self.directory], check=True)
        stop(self.process)

    def hang(self) -> None:
        """Whoever asks for anything in it waits."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """They have their answers."""
        self.process.send_signal(signal.SIGCONT)


@pytest.mark.real
@needs_fuse
def test_it_is_browsed_mounted_and_drilled(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk has a file system and a boot sector before it; the drill writes, and the backup stays what it was."""
    tree, repo = short_path / "tree", short_path / "repo"
    tree.mkdir()
    (tree / "kept").write_bytes(b"for years\n" * 9999)
    image = make.make_ext(short_path / "image", tree, size="8M").read_bytes()
    protect(server, "d", boot_sector() + image[512:])
    cdp(server, capsys, "repo", "init", repo, "--chunk-size", "64K")
    cdp(server, capsys, "repo", "add", repo)
    id_ = cdp(server, capsys, "backup", "run", "d@latest", "--repo", repo)["id"]
    rows = cdp(server, capsys, "file", "ls", f"backup:{id_}", "/")
    assert "kept" in [row["name"] for row in rows]
    cdp(server, capsys, "file", "get", "backup:latest", "/kept", "--output", short_path / "kept")
    assert (short_path / "kept" / "kept").read_bytes() == (tree / "kept").read_bytes()
    there = short_path / "there"
    there.mkdir()
    command = (sys.executable, "-m", "recovery.cli", "--state-dir", server.state_dir)
    subprocess.run([*command, "mount", "backup:latest", there], check=True)
    try:
        assert (there / "fs" / "kept").read_bytes() == (tree / "kept").read_bytes()
    finally:
        subprocess.run([*command, "umount", there], check=True)
    drilled = cdp(server, capsys, "drill", "backup:latest", "--marker", "^RW$")
    assert (drilled["state"], drilled["reason"]) == ("passed", "")
    assert [row["name"] for row in server.get("/v1/forks")] == [f"backup-{id_}/d"], "nothing of it stays"
    assert cdp(server, capsys, "backup", "verify", id_, "--repo", repo)["sound"]
    (tree / "added").touch()
    image = make.make_ext(short_path / "image", tree, size="8M").read_bytes()
    with connected(str(server.get("/v1/disks/d")["uri"])) as client:
        for at in range(0, len(image), MIB):
            client.pwrite(image[at : at + MIB], at)
    second = cdp(server, capsys, "backup", "run", "d@latest", "--repo", repo)["id"]
    for one, other, change in (
        (f"backup:{id_}", "d@latest", "added"),
        ("d@latest", f"backup:{id_}", "removed"),
        (f"backup:{id_}", f"backup:{second}", "added"),
    ):
        rows = cdp(server, capsys, "file", "diff", one, other)
        assert change in [row["change"] for row in rows if row["name"] == "added"]


class Hasty(Server):
    """A service whose days are short."""

    PROGRAM = "from cdpserver.service import attached, main; attached.IDLE_S, attached.LOOK_S = 0.0, 0.1; main.main()"

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.log = state_dir.with_name(f"{state_dir.name}.log")
        with open(self.log, "ab") as log:
            command = [sys.executable, "-c", self.PROGRAM, "--state-dir", str(state_dir)]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        until(self._is_up, "answer of the API")


@pytest.mark.real
def test_what_nobody_uses_is_let_go_by_itself(short_path: Path) -> None:
    """Attached by a service before, and asked for by nobody since."""
    place = DirectoryPlace(short_path / "repo")
    create(place, chunk_size=64 << 10)
    with Repository(place, cache=short_path / "cache") as opened:
        id_ = back_up(opened, [Made(MIB)], "made@1").id
    with Server(short_path / "s") as server:
        server.request("PUT", "/v1/repositories", {"path": str(short_path / "repo")})
        server.post("/v1/backups:attach", backup=f"backup:{id_}")
        server.stop()
    with Hasty(short_path / "s") as server:
        until(lambda: server.events("backup.detached"), "end of what nobody uses")
        assert server.get("/v1/forks") == []
        assert list(place.names("locks")) == [], "its lock in the repository went with it"
        assert server.get("/v1/repositories")


@pytest.mark.real
@needs_fuse
def test_a_repository_that_is_read_only_and_hangs(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read without a lock; who reads it while it hangs waits, nobody else does, and it goes on where it was."""
    tree = short_path / "tree"
    tree.mkdir()
    source = Made(2 * MIB)
    repository = create(DirectoryPlace(tree / "repo"), chunk_size=64 << 10)
    with Repository(DirectoryPlace(tree / "repo"), cache=short_path / "cache") as opened:
        id_ = back_up(opened, [source], "made@1").id
    protect(server, "nas", make.make_ext(short_path / "image", tree, size="8M").read_bytes())
    server.add("other")
    mount = Mount(server, "nas@latest", short_path / "there")
    with mount as there:
        path = there / "fs" / "repo"
        cdp(server, capsys, "repo", "add", path)
        uri = cdp(server, capsys, "uri", f"backup:{id_}")["uri"]
        assert "Read-only" in server.events("backup.not-held")[0]["reason"]
        content = read(uri, MIB)
        mount.hang()
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(read(uri, 2 * MIB)))
        reader.start()
        with connected(str(server.get("/v1/disks/other")["uri"])) as client:
            client.pwrite(b"goes on ".ljust(4096), 0)
        assert read(str(server.get("/v1/disks/other")["uri"]), 4096).startswith(b"goes on ")
        trio.run(_not_of_the_service, short_path, monkeypatch, path, repository)
        capsys.readouterr()  # its log
        assert server.get("/v1/overview")
        assert not found
        mount.go_on()
        reader.join(60)
        assert found and found[0][:MIB] == content
        expected = bytearray(2 * MIB)
        source.read_into(expected, 0)
        assert found[0] == expected
        cdp(server, capsys, "backup", "detach", id_)
        assert server.events("backup.detached")


@contextlib.contextmanager
def knowing(path: Path, *known: Registered) -> Iterator[tuple[Core, Attached]]:
    """What a service has to do with repositories, without the service."""
    state = StateDir.create_or_open(path / "second")
    with Catalog.open(state, writable=True) as catalog:
        clock, _ = fix_clock(state.clock, lambda: START_NS)
        core = Core(state, Config(), clock, catalog, EventLog(state.events), Targets(state, 1))
        registered.save(state.path, {one.id: one for one in known})
        yield core, Attached(core, Disks(core, Browsing(core)))


def test_the_newest_of_several_repositories(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own time: one that a clock dated years ahead is not the latest, wherever it is."""
    places = [DirectoryPlace(short_path / name) for name in "ab"]
    known = [Registered(create(place, chunk_size=64 << 10).id.hex(), place.where, "") for place in places]
    made: list[str] = []
    real = time.time_ns
    for place, ahead_ns in ((places[0], 0), (places[1], 1 << 60), (places[0], 0)):
        with monkeypatch.context() as patch, Repository(place, cache=short_path / "cache") as opened:
            patch.setattr(time, "time_ns", lambda ahead_ns=ahead_ns: real() + ahead_ns)
            made.append(back_up(opened, [Made(64 << 10)], "made@1").id)

    async def asked() -> None:
        with knowing(short_path, *known) as (_, service):
            assert [row["id"] for row in await service.backups(None, None)] == made
            assert [row["id"] for row in await service.backups("made", known[1].path)] == made[1:2]
            assert (await service.find("latest", None))[1] == made[-1]
            assert (await service.find(made[1][:8], None)) == (known[1], made[1])

    trio.run(asked)


async def _not_of_the_service(
    path: Path, monkeypatch: pytest.MonkeyPatch, hangs: Path, config: RepositoryConfig
) -> None:
    """A service whose repository hangs: that is said after a while, and no thread of the service's own waits meanwhile."""
    with knowing(path, Registered(config.id.hex(), str(hangs), "")) as (core, service):
        with monkeypatch.context() as patch:
            patch.setattr(attached, "ANSWER_S", 0.5)  # it never answers, however long
            for _ in range(3):
                assert await service.backups(None, None) == []
            assert f"{hangs} has not answered" in core.state.events.read_text()
            with pytest.raises(NotFoundError, match="has not answered"):
                await service.attach("backup:1999", None)
        assert core.threads.borrowed_tokens == 0
