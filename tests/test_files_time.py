"""Files through time: the versions of one, and what differs between two points."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdpserver.errors import NotFoundError, RefusedError
from cdpserver.files import browser as browsers
from cdpserver.files import through
from cdpserver.files.watched import as_ranges, touches
from cdpserver.state import StateDir
from recovery import cli
from tests import filesystems as make
from tests.test_files_api import pages
from tests.test_service import Server, connected, until

pytestmark = pytest.mark.real

BLOCK = 4096
BEHIND = 1 << 20
"""Bytes of the disk behind the file system."""


class Disk:
    """A disk whose file system is changed by debugfs in a file here, from which changed blocks are written."""

    def __init__(self, server: Server, directory: Path) -> None:
        tree = directory / "tree"
        (tree / "sub").mkdir(parents=True)
        (tree / "hello").write_bytes(b"hello, world\n" * 10_000 + b"middle\n" + b"hello, world\n" * 10_000)
        (tree / "sub" / "other").write_text("other\n")
        for number in range(300):
            (tree / "sub" / f"more-{number}").write_bytes(os.urandom(500))
        self.image = make.make_ext(directory / "image", tree, "-O", "^has_journal", size="8M")
        self._server, self._held = server, bytearray((8 << 20) + BEHIND)
        self.uri = str(server.post("/v1/disks", name="d", size=len(self._held))["uri"])
        self.write()
        server.synced("d")
        self.mark("a")

    def debugfs(self, command: str) -> None:
        make.run("debugfs", "-w", "-R", command, self.image)

    def write(self, behind: bytes = b"") -> None:
        """What changed in the image, and something behind it."""
        held = bytearray(self.image.read_bytes()) + behind.ljust(BEHIND, b"\0")
        with connected(self.uri) as client:
            for at in range(0, len(held), BLOCK):
                if held[at : at + BLOCK] != self._held[at : at + BLOCK]:
                    client.pwrite(bytes(held[at : at + BLOCK]), at)
        self._held = held

    def mark(self, name: str) -> None:
        self._server.post("/v1/disks/d:mark", name=name)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("time")
    with Server(directory / "s") as running:
        disk = Disk(running, directory)
        disk.write(b"something else")
        disk.mark("b")
        # In its place, with the same time, and far from metadata: only the bytes tell.
        held = disk.image.read_bytes()
        assert held.count(b"middle\n") == 1
        disk.image.write_bytes(held.replace(b"middle\n", b"Middle\n"))
        disk.write(b"something else")
        disk.mark("c")
        disk.debugfs("sif hello mode 0100600")
        disk.write(b"more of it")
        disk.mark("d4")
        disk.write(b"and again")
        disk.mark("e5")
        disk.debugfs("rm hello")
        disk.write(b"and again")
        disk.mark("f6")
        disk.debugfs("ea_set sub user.note of-a-directory")
        disk.write(b"and again")
        disk.mark("g7")
        # Until its second is over there may be one more point.
        newest = running.get("/v1/disks/d:points?kind=bookmark")[-1]["time_ns"] // 10**9
        until(lambda: running.get("/v1/status")["time_ns"] // 10**9 > newest, "the next second")
        yield running


def history(server: Server, path: str, **span: str | None) -> list[dict[str, Any]]:
    """The versions, looked for in this process; asked of the service they are the same."""
    known: Any = {"volume": None, "since": None, "until": None} | span
    found = list(through.history(StateDir(server.state_dir), "d", path.encode(), **known, remark=print))
    asked: Any = {key: value for key, value in known.items() if value is not None}
    assert found == pages(server, "files:history", 2, disk="d", path=path, **asked)
    return found


def diff(server: Server, old: str, new: str, path: str = "/") -> list[dict[str, Any]]:
    """The differences, looked for in this process."""
    points = (f"d@{old}", f"d@{new}")
    return list(through.diff(StateDir(server.state_dir), *points, path.encode(), remark=print))


def answer(server: Server, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    options = cli.parse(["--state-dir", str(server.state_dir), "file", *arguments, "--json"])
    options.run(options)
    return json.loads(capsys.readouterr().out)


def seq(server: Server, mark: str) -> int:
    (found,) = [p for p in server.get("/v1/disks/d:points?kind=bookmark") if p["name"] == mark]
    return int(found["seq"])


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An item for every point that is looked at."""
    counted: list[None] = []
    real = browsers.Browser.turn

    def turn(self: browsers.Browser, disk: browsers.Disk) -> None:
        counted.append(None)
        real(self, disk)

    monkeypatch.setattr(browsers.Browser, "turn", turn)
    return counted


def test_the_versions_of_a_file(
    server: Server, capsys: pytest.CaptureFixture[str], turns: list[None]
) -> None:
    found = history(server, "/hello")
    assert found == answer(server, capsys, "history", "d", "/hello")
    assert [version["changes"] for version in found] == [["first"], ["content"], ["mode"], ["removed"]]
    assert [version["mode"] for version in found] == [0o644, 0o644, 0o600, None]
    assert found[1]["point"] == f"d@seq:{seq(server, 'c')}"
    assert found[0]["last_point"] == f"d@seq:{seq(server, 'b')}"
    assert found[2]["last_point"] == f"d@seq:{seq(server, 'e5')}"
    assert len({version["digest"] for version in found}) == 3
    points = {point["seq"] for point in server.get("/v1/disks/d:points")}
    assert len(turns) < len(points), "not every point is looked at"
    after = answer(server, capsys, "history", "d", "/hello", "--since", "d4", "--until", "e5")
    assert [version["changes"] for version in after] == [["first"]]
    assert after == history(server, "/hello", since="d4", until="e5")
    assert answer(server, capsys, "history", "d", "/nothing") == history(server, "/nothing") == []


def test_a_file_that_nothing_touches_is_looked_at_once(server: Server, turns: list[None]) -> None:
    found = history(server, "/sub/other", until="b")
    assert [version["changes"] for version in found] == [["first"]] and len(turns) == 1


def test_what_differs(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[None] = []
    real = browsers.Browser.walk

    def walk(self: browsers.Browser, *arguments: Any, **more: Any) -> Any:
        walks.append(None)
        return real(self, *arguments, **more)

    def differ(old: str, new: str) -> list[tuple[str, str, list[str]]]:
        walks.clear()
        return [(row["name"], row["change"], row["fields"]) for row in diff(server, old, new)]

    monkeypatch.setattr(browsers.Browser, "walk", walk)
    assert differ("a", "b") == [] and len(walks) == 1
    assert differ("a", "c") == [("hello", "changed", ["content"])] and len(walks) == 1
    quick = {pair: differ(*pair) for pair in (("a", "c"), ("c", "d4"), ("a", "d4"), ("a", "f6"), ("f6", "a"))}
    assert quick["c", "d4"] == [("hello", "changed", ["mode"])] and quick["a", "d4"][0][2] == [
        "mode",
        "content",
    ]
    assert differ("f6", "g7") == [("sub", "changed", ["xattrs"])]
    assert ("hello", "removed", []) in quick["a", "f6"] and ("hello", "added", []) in quick["f6", "a"]
    # The same without the journal's word.
    monkeypatch.setattr(through, "_changed", lambda old, new: None)
    for pair in (("a", "c"), ("a", "f6")):
        assert quick[pair] == differ(*pair)
    found = answer(server, capsys, "diff", "d@a", "d@f6")
    assert found == diff(server, "a", "f6")
    assert found == pages(server, "files:diff", 1, point="d@a", other="d@f6")
    with pytest.raises(NotFoundError):
        diff(server, "a", "c", "/nothing")
    with pytest.raises(NotFoundError):
        answer(server, capsys, "diff", "d@a", "d@c", "/nothing")


def test_what_is_compared_has_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsers, "MOST_HELD", 100)
    with pytest.raises(RefusedError, match="more than 100 entries"):
        diff(server, "a", "c")


def test_ranges_that_touch() -> None:
    ranges = as_ranges([(10, 20), (30, 40), (15, 22)])
    assert ranges.tolist() == [[10, 22], [30, 40]]
    pairs = [(0, 10), (0, 11), (21, 22), (22, 30), (39, 50), (40, 50), (5, 60), (12, 12)]
    starts, ends = np.array(pairs, dtype=np.int64).T
    assert touches(ranges, starts, ends).tolist() == [False, True, True, False, True, False, True, False]
    assert not touches(as_ranges([]), starts, ends).any()
