"""SIGKILL at random instants under load: nothing acknowledged is lost, points and index agree with the segments."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from cdpserver.errors import RefusedError
from cdpserver.journal.begin import lock_timeline
from tests.test_service import SIZE, ApiError, Server, connected, pattern, qemu_raw, read, until

pytestmark = pytest.mark.real

BLOCKS = SIZE // 4096


class Load:
    """A client that writes blocks for ever, connects again when it is cut off, and knows what was acknowledged.

    A write that was not answered is sent again first, as QEMU does, so that nothing stays uncertain.
    """

    def __init__(self, uri: str, *, seed: int, stride: int = 1, first: int = 0) -> None:
        self.acknowledged: dict[int, bytes] = {}
        self.count = 0
        self._uri = uri
        self._random = random.Random(seed)
        self._blocks = range(first, BLOCKS, stride)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        pending: tuple[int, bytes] | None = None
        while not self._ending.is_set() or pending:
            with contextlib.suppress(nbd.Error), connected(self._uri) as client:
                while not self._ending.is_set() or pending:
                    if pending is None:
                        pending = (self._random.choice(self._blocks), pattern(self.count + 1))
                    client.pwrite(pending[1], pending[0] * 4096)
                    self.acknowledged[pending[0]] = pending[1]
                    self.count += 1
                    pending = None
            time.sleep(0.01)

    def wait_for(self, more: int) -> None:
        """Until so many further writes are acknowledged."""
        wanted = self.count + more
        until(lambda: self.count >= wanted, "progress")

    def end(self) -> bytes:
        """Stop; what the disk must hold now."""
        self._ending.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        disk = bytearray(SIZE)
        for block, data in self.acknowledged.items():
            disk[block * 4096 : block * 4096 + 4096] = data
        return bytes(disk)


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


def cdp(server: Server, *arguments: str) -> None:
    """A `cdp` command that must succeed."""
    done = subprocess.run(
        [Path(sys.prefix) / "bin" / "cdp", "--state-dir", server.state_dir, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def is_exact(server: Server, expected: bytes, uri: str) -> None:
    """The disk, its newest point, the check, and the newest point through a new index all say the same."""
    assert read(uri) == expected
    assert read(server.uri("d@latest")) == expected
    cdp(server, "check", "d")
    cdp(server, "index", "rebuild", "d")
    assert read(server.uri("d@latest")) == expected
    cdp(server, "check", "d")


@pytest.mark.parametrize("seed", range(2))
def test_the_target_killed_under_load(server: Server, seed: int) -> None:
    uri = server.add()
    server.synced("d")
    dice = random.Random(seed)
    one, two = Load(uri, seed=seed, stride=2), Load(uri, seed=seed + 1, stride=2, first=1)
    for _ in range(6):
        one.wait_for(dice.randrange(1, 200))
        os.kill(server.pids()["target-0"], signal.SIGKILL)
        one.wait_for(1)
    held, other = one.end(), two.end()
    parts = [
        (held if block % 2 == 0 else other)[block * 4096 : block * 4096 + 4096] for block in range(BLOCKS)
    ]
    is_exact(server, b"".join(parts), uri)


def test_indexer_and_export_killed_under_load(server: Server) -> None:
    uri = server.add()
    server.synced("d")
    load = Load(uri, seed=7)
    for turn in range(6):
        load.wait_for(150)
        server.post(
            "/v1/disks/d:cut"
        )  # an interval to close for the indexer, a delta to read from the export
        os.kill(server.pids()["indexer" if turn % 2 else "export"], signal.SIGKILL)
    is_exact(server, load.end(), uri)
    for base in server.get("/v1/disks/d:basepoints"):
        held = qemu_raw(Path(base["path"]), server.state_dir.parent)
        assert held == read(server.uri(f"d@bp:{base['number']}"))


def test_everything_killed_at_once_and_a_new_server(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        uri = server.add()
        server.synced("d")
        load = Load(uri, seed=11)
        load.wait_for(200)
        for pid in server.pids().values():
            os.kill(pid, signal.SIGKILL)
        server.kill()
        with Server(short_path / "s") as again:
            load.wait_for(200)
            again.kill()
            with Server(short_path / "s") as last:
                load.wait_for(50)
                is_exact(last, load.end(), uri)


def test_killed_between_a_zero_and_its_rewrite(server: Server) -> None:
    uri = server.add()
    with connected(uri) as client:
        for block in range(0, BLOCKS, 16):
            client.pwrite(pattern(block + 1, 65536), block * 4096)
        client.flush()
    server.synced("d")
    before = read(server.uri("d@latest"))
    with connected(uri) as client:  # a re-mirror: everything zeroed, half of it rewritten
        client.zero(SIZE, 0)
        client.pwrite(before[: SIZE // 2], 0)
        os.kill(server.pids()["target-0"], signal.SIGKILL)
    until(lambda: reads(uri), "target")
    assert read(uri) == before[: SIZE // 2] + bytes(SIZE // 2)
    with connected(uri) as client:
        client.pwrite(before[SIZE // 2 :], SIZE // 2)
    is_exact(server, before, uri)
    cut = server.post("/v1/disks/d:cut")
    assert Path(cut["path"]).stat().st_size < 1 << 20, "an unchanged re-mirror leaves an empty delta"
    assert server.get("/v1/disks/d")["journal_bytes"] < 1 << 20, "and no payload"


def reads(uri: str) -> bool:
    """Does the target serve again?"""
    with contextlib.suppress(nbd.Error):
        return bool(read(uri, 4096) is not None)
    return False


def test_the_target_killed_during_cuts(server: Server) -> None:
    uri = server.add()
    server.synced("d")
    load = Load(uri, seed=3)
    for turn in range(5):
        load.wait_for(40)
        pid = server.pids()["target-0"]
        killer = threading.Timer(0.002 * turn, os.kill, (pid, signal.SIGKILL))
        killer.start()
        with contextlib.suppress(ApiError):  # the target died in the middle: the cut is there or it is not
            server.post("/v1/disks/d:cut")
        killer.join()
        load.wait_for(1)
    last = until(lambda: cut(server), "base point")
    is_exact(server, load.end(), uri)
    bases = server.get("/v1/disks/d:basepoints")
    assert [base["number"] for base in bases] == list(range(last + 1))
    for base in bases:
        held = qemu_raw(Path(base["path"]), server.state_dir.parent)
        assert held == read(server.uri(f"d@bp:{base['number']}"))


def cut(server: Server) -> int | None:
    """The number of a base point cut now, once that works."""
    with contextlib.suppress(ApiError):
        return int(server.post("/v1/disks/d:cut")["number"])
    return None


def test_nobody_else_can_write(server: Server) -> None:
    server.add()
    server.synced("d")
    with pytest.raises(RefusedError, match="another process"):
        lock_timeline(server.state_dir / "timelines" / server.get("/v1/disks/d")["id"])
