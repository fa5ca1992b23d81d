"""docs/runbooks: every block marked `sh` is run as it stands, and ends as it says; the others can at least be typed."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from recovery import cli
from tests.test_check import flip
from tests.test_service import connected
from tools.kit.processes import until
from tools.kit.server import Server

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.name for path in (ROOT / "docs/runbooks").glob("*.md") if path.name != "README.md")
BLOCK = re.compile(r"^```(sh|console)(?: (\d+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent

STOPPED = {"host-lost.md", "moving-the-store.md", "upgrade-and-downgrade.md"}
"""Pages of which the later part, or all of it, is done while no service runs."""

SERVED_FIRST = {"host-lost.md": 3}
"""Blocks that come before the service is gone."""


def blocks(page: str) -> list[tuple[str, int, str]]:
    """(sh or console, exit status, lines) of a page."""
    text = (ROOT / "docs/runbooks" / page).read_text()
    return [(kind, int(status or 0), lines) for kind, status, lines in BLOCK.findall(text)]


@dataclass
class Store:
    """A store with a disk web1/root, which has a bookmark and some history."""

    path: Path
    room: Path
    server: Server

    def run(self, lines: str) -> subprocess.CompletedProcess[str]:
        """A block, as somebody types it into a shell."""
        environment = {
            **os.environ,
            "CDP_STATE_DIR": str(self.path),
            "TMPDIR": str(self.room),
            "XDG_STATE_HOME": str(self.room),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin",
        }
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", lines],
            text=True,
            capture_output=True,
            check=False,
            timeout=180,
            env=environment,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def store(short_path: Path) -> Iterator[Store]:
    room = short_path / "room"
    room.mkdir()
    with Server(short_path / "s") as server:
        client = server.client
        disk = client.add_disk("root", size=1 << 20, vm="web1", base=None)
        with connected(disk["uri"]) as writer:
            writer.pwrite(bytes([1]) * 4096, 0)
            client.synced("web1/root", session=None, write_blocking=True)
            client.mark("web1/root", "before-upgrade")
            writer.pwrite(bytes([7]) * 4096, 8192)
        with contextlib.suppress(ProcessLookupError):
            yield Store(short_path / "s", room, server)


def damage(store: Store) -> None:
    """A block of history that the guest has not written again."""
    logs = (store.path / "timelines/t1").glob("intervals/*/*.data")
    (data,) = [path for path in logs if bytes([7]) * 4096 in path.read_bytes()]
    flip(data, data.read_bytes().index(bytes([7]) * 4096))


@pytest.mark.real
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_do_what_it_says(page: str, store: Store) -> None:
    if page == "damaged-segment.md":
        damage(store)
    if page in STOPPED and page not in SERVED_FIRST:
        store.server.stop()
    done = 0
    for kind, status, lines in blocks(page):
        if kind != "sh":
            continue
        if done == SERVED_FIRST.get(page, -1):
            store.server.stop()
        ended = store.run(lines)
        assert ended.returncode == status, f"{page}: {lines}{ended.stdout}{ended.stderr}"
        done += 1
    assert done > 0
    until(
        lambda: not any(Path(name).name.startswith("cdp-") for name in sockets(store.room)), "end of exports"
    )


@pytest.mark.real
def test_a_store_that_was_changed_is_refused_by_the_command_of_the_ransomware_page(store: Store) -> None:
    """The first block writes the anchor, the same command compares with it later."""
    commands = [lines for kind, _, lines in blocks("ransomware.md") if kind == "sh" and "--anchor" in lines]
    before, after = commands
    assert store.run(before).returncode == 0
    anchor = store.room / "anchor.json"
    kept = anchor.read_bytes()
    assert store.run(after).returncode == 0
    damage(store)
    ended = store.run(after)
    assert ended.returncode == 4 and "is damaged" in ended.stderr
    assert json.loads(anchor.read_bytes())["disks"].keys() == json.loads(kept)["disks"].keys()


def sockets(room: Path) -> list[str]:
    """Exports that a page has left to their clients, and that none came to; they are ended here."""
    for ready in room.glob("cdp-*/nbd.pid"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.kill(int(ready.read_text()), 9)
    return [str(path) for path in room.glob("cdp-*")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_ours_can_be_typed(page: str) -> None:
    for _, _, lines in blocks(page):
        for line in lines.splitlines():
            if line.startswith("cdp "):
                words = shlex.split(line.partition(" | ")[0])[1:]
                assert callable(cli.parse(words).run), line


def test_the_list_names_every_page() -> None:
    index = (ROOT / "docs/runbooks/README.md").read_text()
    assert sorted(re.findall(r"\]\(([a-z-]+\.md)\)", index)) == PAGES
