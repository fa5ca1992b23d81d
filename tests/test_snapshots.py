"""`cdp snapshot` with a real server: histories at random whose base points are deleted, pulled and committed.

Whatever is merged, every base point that stays is bit-exact through stock qemu-img, and every instant through our export.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdpserver import nodes, qemu
from cdpserver.chain import lock, room
from cdpserver.events import read_events
from cdpserver.state import StateDir
from tests.chains import raw
from tests.test_service import ApiError, Server, connected, until
from tools.kit.server import BIN

SIZE = 2 << 20
BLOCK = 4096


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="cdp-") as path, Server(Path(path) / "s") as running:
        yield running


class History:
    """A disk with base points, and what each of them holds."""

    def __init__(self, server: Server, name: str, seed: int, base_points: int) -> None:
        self.server, self.name = server, name
        self.dice = random.Random(seed)
        self.uri = server.post("/v1/disks", name=name, size=SIZE)["uri"]
        self.content = bytearray(SIZE)
        self.held: dict[int, bytes] = {}
        self.paths: dict[int, Path] = {}
        self.write()
        server.synced(name)
        self._keep(server.get(f"/v1/disks/{name}:basepoints")[-1])
        for _ in range(base_points - 1):
            self.cut()

    def write(self) -> None:
        """A few changes."""
        with connected(self.uri) as client:
            for _ in range(self.dice.randrange(2, 12)):
                start = self.dice.randrange(SIZE // BLOCK) * BLOCK
                end = min(start + self.dice.choice((1, 1, 3, 40)) * BLOCK, SIZE)
                data = bytes(end - start) if self.dice.random() < 0.3 else self.dice.randbytes(end - start)
                if any(data):
                    client.pwrite(data, start)
                else:
                    client.zero(end - start, start)
                self.content[start:end] = data

    def cut(self) -> None:
        """The next base point."""
        self.write()
        self._keep(self.server.post(f"/v1/disks/{self.name}:cut"))

    def _keep(self, made: dict[str, Any]) -> None:
        self.held[made["number"]] = bytes(self.content)
        self.paths[made["number"]] = Path(made["path"])

    def left(self) -> list[int]:
        """The base points that the server has."""
        return [found["number"] for found in self.server.get(f"/v1/disks/{self.name}:basepoints")]

    def check(self) -> None:
        """Those that are left are whole and bit-exact, for stock tools and through the export; so is every cut of the journal."""
        left = self.left()
        assert left == sorted(left) and set(left) <= set(self.held)
        directory = self.paths[0].parent
        assert {path.name for path in directory.glob("bp-*.qcow2")} == {f"bp-{n}.qcow2" for n in left}
        assert not [name for name in os.listdir(directory) if name.startswith((".", "chain.json"))]
        for number in left:
            qemu.check(self.paths[number])
            assert raw(self.paths[number]) == self.held[number]
        for number, content in self.held.items():
            if number in left or number % 2:
                with connected(self.server.uri(f"{self.name}@bp:{number}")) as client:
                    assert client.pread(SIZE, 0) == content, number


def cdp(server: Server, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "CDP_STATE_DIR": str(server.state_dir)}
    return subprocess.run(
        [BIN / "cdp", *arguments], capture_output=True, text=True, check=False, env=environment, timeout=60
    )


def tree_names(branch: dict[str, Any]) -> list[Any]:
    return [branch["name"], *(tree_names(child) for child in branch["children"])]


@pytest.mark.parametrize("seed", range(2))
def test_random_histories(server: Server, seed: int) -> None:
    history = History(server, f"d{seed}", seed, 6)
    forked = history.dice.choice((1, 2, 3))
    fork = server.post("/v1/forks", point=f"d{seed}@bp:{forked}", name=f"f{seed}")
    with connected(fork["uri"]) as client:
        client.pwrite(b"fork" * 1024, 0)
    fork_point = server.post(f"/v1/disks/f{seed}:cut")
    fork_content = b"fork" * 1024 + history.held[forked][4096:]
    merged = 0
    for _ in range(5):
        verb = history.dice.choice(("delete", "pull", "commit"))
        arguments = [f"d{seed}@bp:{history.dice.choice(history.left())}"]
        if verb != "delete" and history.dice.random() < 0.6:
            arguments += ["--base", f"bp:{history.dice.choice(history.left())}"]
        before = history.left()
        done = cdp(server, "snapshot", verb, *arguments, "--json")
        if done.returncode == 0:
            said = json.loads(done.stdout)
            assert [n for n in before if f"bp:{n}" not in said["removed"]] == history.left()
            merged += 1
        else:
            assert done.returncode in (2, 3) and history.left() == before, done.stderr
        assert forked in history.left()
        if history.dice.random() < 0.3:
            history.cut()
        history.check()
        assert raw(Path(fork_point["path"])) == fork_content
    assert merged


def test_the_tree_with_the_service_and_without(server: Server) -> None:
    history = History(server, "tree", 1, 3)
    server.post("/v1/forks", point="tree@bp:1", name="branch")
    with_service = cdp(server, "snapshot", "tree", "tree", "--json")
    value = json.loads(with_service.stdout)
    assert tree_names(value) == ["tree", ["bp:0", ["bp:1", ["branch"], ["bp:2"]]]]
    assert value["children"][0]["size_bytes"] == history.paths[0].stat().st_blocks * 512
    lines = cdp(server, "snapshot", "tree", "tree").stdout.splitlines()
    assert lines[0].startswith("disk tree  ") and lines[3].lstrip("│├└─ ").startswith("fork branch  ")
    assert lines[1].index("bp:0") == lines[2].index("bp:1") == lines[4].index("bp:2")
    socket = server.state_dir / "api.sock"
    socket.rename(f"{socket}.away")
    try:
        offline = cdp(server, "snapshot", "tree", "tree", "--json")
    finally:
        Path(f"{socket}.away").rename(socket)
    assert tree_names(json.loads(offline.stdout)) == tree_names(value)


def test_what_is_refused_says_why(server: Server) -> None:
    History(server, "why", 2, 3)
    server.post("/v1/disks/why:mark", name="here")
    for arguments, code, says in (
        (("delete", "why@bp:2"), 3, "the next base point will stand on it"),
        (("delete", "why@bp:9"), 2, "why has no base point 9"),
        (("delete", "why@here"), 2, "why@here is not the instant of a base point"),
        (("pull", "why@bp:1", "--base", "bp:2"), 2, "bp:2 is not below bp:1"),
        (("delete", "none@bp:1"), 2, "there is no disk none"),
    ):
        done = cdp(server, "snapshot", *arguments)
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr
        assert "(" in done.stderr and not done.stdout


def test_any_name_of_a_base_points_instant_will_do(server: Server) -> None:
    history = History(server, "named", 4, 3)
    seq = server.get("/v1/disks/named:basepoints")[1]["seq"]
    done = cdp(server, "snapshot", "delete", f"named@seq:{seq}")
    assert done.stdout.startswith("bp:1 of named removed; bp:2 stays; "), done.stderr
    history.check()


def _pid(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (FileNotFoundError, IndexError):
        return None


@contextlib.contextmanager
def stopped_merge(history: History, **body: str) -> Iterator[tuple[int, str]]:
    """A merge whose process does not go on: its pid, and the job. At the end somebody must have let it go on, or end."""
    server = history.server

    def ask() -> None:
        with contextlib.suppress(ApiError):
            server.post(f"/v1/disks/{history.name}:merge", **body)

    pid_file = server.state_dir / "run" / f"merge-{history.paths[0].parent.name}.pid"
    thread = threading.Thread(target=ask)
    thread.start()
    pid = until(lambda: _pid(pid_file), "its process")
    os.kill(pid, signal.SIGSTOP)
    try:
        running = [found for found in server.get("/v1/jobs") if found["state"] == "running"]
        assert [found["target"] for found in running] == [history.name]
        yield pid, running[0]["name"]
    finally:
        thread.join()


def test_a_second_merge_is_told_the_job_of_the_first(server: Server) -> None:
    history = History(server, "two", 3, 4)
    with stopped_merge(history, verb="pull", point="bp:3", base="bp:0") as (pid, job):
        refused = cdp(server, "snapshot", "delete", "two@bp:1")
        os.kill(pid, signal.SIGCONT)
    assert refused.returncode == 3
    assert f"{job} is merging base points of two" in refused.stderr
    assert server.get(f"/v1/{job}")["result"]["removed"] == ["bp:1", "bp:2"]
    history.check()


def test_a_damaged_or_lost_base_point_is_rebuilt(server: Server) -> None:
    """`cdp check` names it with what stands on it; rebuilt, all of them read as before."""
    history = History(server, "hurt", 8, 5)
    assert cdp(server, "snapshot", "delete", "hurt@bp:1").returncode == 0
    for hurt in ("damaged", "lost", "replaced", "circular"):
        path = history.paths[2]
        path.chmod(0o644)
        if hurt == "damaged":
            with path.open("r+b") as file:
                file.write(b"not a QCOW2 file")
        elif hurt == "lost":
            path.unlink()
        else:
            path.write_bytes(history.paths[{"replaced": 0, "circular": 4}[hurt]].read_bytes())
        checked = cdp(server, "check", "hurt", "--full", "--json")
        assert checked.returncode == 4
        assert all(f"bp:{n}" in checked.stdout for n in (3, 4)), (hurt, checked.stdout)
        assert "cdp bp rebuild DISK@bp:N" in checked.stdout
        done = cdp(server, "bp", "rebuild", "hurt@bp:2")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"hurt@bp:2 is whole again: {path}\n"
        history.check()
        assert cdp(server, "check", "hurt", "--full").returncode == 0
    assert cdp(server, "bp", "rebuild", "hurt@latest").returncode == 2
    assert "the journal does not have bp:9" in cdp(server, "bp", "rebuild", "hurt@bp:9").stderr


def test_chains_stay_below_their_limit(server: Server) -> None:
    """Automatic base points make room; manual ones are refused, and cost nothing."""
    history = History(server, "short", 7, 3)
    chain = history.paths[0].parent / "manual.json"
    assert json.loads(chain.read_text()) == {"numbers": [1, 2]}
    chain.unlink()  # their notes say the same
    assert room.manual(chain.parent) == {1, 2}
    for number in (1, 2):  # as if the clock had cut them
        note = nodes.read_note(chain.parent, number)
        nodes.write_note(chain.parent, replace(note, manual=False))
    server.request("PATCH", "/v1/policies/short", {"max_chain": "4"})
    history.cut()
    seq = server.get("/v1/disks/short")["last_seq"]
    with pytest.raises(ApiError) as refused:
        server.post("/v1/disks/short:cut")
    assert (refused.value.status, refused.value.fields["error"]) == (409, "refused")
    assert "has 4 base points, and max_chain is 4" in refused.value.fields["message"]
    assert server.get("/v1/disks/short")["last_seq"] == seq and history.left() == [0, 1, 2, 3]
    history.write()
    server.request("PATCH", "/v1/policies/short", {"bp_every": "10s"})
    until(lambda: 4 in history.left(), "the clock's base point")
    server.request("PATCH", "/v1/policies/short", {"bp_every": "1h"})
    assert history.left() in ([0, 1, 3, 4], [0, 2, 3, 4])  # by their times
    history.held[4], history.paths[4] = bytes(history.content), chain.with_name("bp-4.qcow2")
    history.check()


def test_a_merge_by_others_is_not_disturbed(server: Server) -> None:
    history = History(server, "held", 5, 3)
    with lock.alone(history.paths[0].parent):
        done = cdp(server, "snapshot", "delete", "held@bp:1")
    assert done.returncode == 3 and "is being merged, dropped or locked" in done.stderr
    assert cdp(server, "snapshot", "delete", "held@bp:1").returncode == 0
    history.check()


def test_a_killed_or_cancelled_merge_leaves_the_chain_whole(server: Server) -> None:
    history = History(server, "killed", 6, 4)
    for how in ("kill", "cancel"):
        with stopped_merge(history, verb="delete", point="bp:1") as (pid, job):
            if how == "kill":
                os.kill(pid, signal.SIGKILL)
            else:
                server.delete(f"/v1/{job}")
        assert server.get(f"/v1/{job}")["state"] == {"kill": "failed", "cancel": "cancelled"}[how]
        assert history.left() == [0, 1, 2, 3]
        history.check()
    assert cdp(server, "snapshot", "delete", "killed@bp:1").returncode == 0
    history.check()
    events = [event["event"] for event in read_events(StateDir(server.state_dir).events, 1000)]
    assert "snapshot.merged" in events and "snapshot.unfinished" not in events
