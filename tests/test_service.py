"""The service as a process: its children, its API, its base points, and what is left when any of them is killed."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import nbd
import pytest

from cdpserver import basepoint, messages, qemu, readback, timeline
from cdpserver.errors import CorruptError
from cdpserver.state import StateDir
from cdpserver.view.delta import Delta
from cdpserver.view.history import History
from tools.kit.processes import TooLate

pytestmark = pytest.mark.real

SIZE = 8 << 20
DEADLINE_S = 90.0

Found = TypeVar("Found")


def until(look: Callable[[], Found | None], what: str) -> Found:
    """What `look` finds, once it does."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TooLate(f"no {what} in {DEADLINE_S} s")
        time.sleep(0.02)


class UnixConnection(http.client.HTTPConnection):
    """HTTP to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("cdp", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


class ApiError(Exception):
    """An error answer."""

    def __init__(self, status: int, fields: dict[str, Any]) -> None:
        super().__init__(f"{status}: {fields}")
        self.status = status
        self.fields = fields


class Server:
    """A cdpserver process in the foreground, and its API."""

    def __init__(self, state_dir: Path, *arguments: str) -> None:
        self.state_dir = state_dir
        self.log = state_dir.with_name(f"{state_dir.name}.log")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cdpserver.service.main", "--state-dir", str(state_dir), *arguments],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        until(self._is_up, "answer of the API")

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return bool(self.get("/v1/status"))
        return False

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = UnixConnection(self.state_dir / "api.sock")
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            value = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise ApiError(answer.status, value)
        return value

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def post(self, path: str, **body: Any) -> Any:
        return self.request("POST", path, body)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", path)

    def add(self, name: str = "d", **more: Any) -> str:
        return str(self.post("/v1/disks", name=name, size=SIZE, **more)["uri"])

    def synced(self, disk: str, **more: Any) -> Any:
        """Say so once the target has seen go whoever has gone: the end of a client that wrote begins a session."""

        def alone() -> bool:
            seen = self.get(f"/v1/disks/{disk}")
            return bool(seen["clients"] <= OPEN[seen["uri"]])

        until(alone, f"end of the clients of {disk}")
        return self.post(f"/v1/disks/{disk}:synced", **more)

    def uri(self, point: str) -> str:
        return str(self.get(f"/v1/uri?point={urllib.parse.quote(point)}")["uri"])

    def events(self, name: str) -> list[dict[str, Any]]:
        """Of this name, but for a line that a full store cut."""
        lines = (self.state_dir / "events.jsonl").read_text().splitlines()
        whole = (json.loads(line) for line in lines if line.endswith("}"))
        return [event for event in whole if event["event"] == name]

    def pids(self) -> dict[str, int]:
        return {name: child["pid"] for name, child in self.get("/v1/status")["children"].items()}

    def kill(self) -> None:
        """SIGKILL the server alone: its children go on."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()
        sweep(self.state_dir)


def sweep(state_dir: Path) -> None:
    """Kill, by pid, children of a server that a test has killed."""
    for pid_file in (state_dir / "run").glob("*.pid"):
        stat = pid_file.read_text().split()
        current = Path(f"/proc/{stat[0]}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if current.read_text().rpartition(")")[2].split()[19] == stat[21]:
                os.kill(int(stat[0]), signal.SIGKILL)
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as holder:
        holder.connect(str(state_dir / "run" / "holder.sock"))
        holder.send(b'{"op": "take", "linger": 0}')


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


OPEN: Counter[str] = Counter()
"""How many clients are `connected`, by URI."""


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    client = nbd.NBD()
    client.connect_uri(uri)
    OPEN[uri] += 1
    try:
        yield client
    finally:
        OPEN[uri] -= 1
        with contextlib.suppress(nbd.Error):
            client.shutdown()


def write(uri: str, data: bytes, offset: int = 0) -> None:
    with connected(uri) as client:
        client.pwrite(data, offset)


def read(uri: str, length: int = SIZE, offset: int = 0) -> bytes:
    with connected(uri) as client:
        return bytes(client.pread(length, offset))


def pattern(number: int, length: int = 4096) -> bytes:
    return number.to_bytes(8, "big") * (length // 8)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def qemu_raw(path: Path, work: Path) -> bytes:
    """What stock qemu-img reads from an image, without our server."""
    raw = work / "out.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()


def test_the_way_of_a_disk(server: Server, short_path: Path) -> None:
    uri = server.add(vm="web")
    shown = server.get("/v1/disks/web/d")
    assert (shown["name"], shown["vm"], shown["size"], shown["state"]) == ("web/d", "web", SIZE, "empty")

    content = bytearray(SIZE)
    with connected(uri) as client:
        for number in range(16):
            client.pwrite(pattern(number), number << 16)
            content[number << 16 : (number << 16) + 4096] = pattern(number)
        assert server.get("/v1/disks/web/d")["state"] == "first-copy"
        synced = server.synced("web/d", write_blocking=True)
        assert (synced["state"], synced["grade"]) == ("synced", "crash")
        [zero] = server.get("/v1/disks/web/d:basepoints")
        assert zero["number"] == 0
        assert qemu_raw(Path(zero["path"]), short_path) == content

        before = bytes(content)
        bookmark = server.post("/v1/disks/web/d:mark", name="before-loss")
        assert (bookmark["kind"], bookmark["name"], bookmark["grade"]) == ("bookmark", "before-loss", "crash")
        client.pwrite(pattern(99, 65536), 0)
        content[:65536] = pattern(99, 65536)
        client.zero(65536, 1 << 20)
        content[1 << 20 : (1 << 20) + 65536] = bytes(65536)

    cut = server.post("/v1/disks/web/d:cut")
    assert cut["number"] == 1
    assert qemu_raw(Path(cut["path"]), short_path) == content
    with open(cut["path"], "rb") as image:
        assert b"bp-0.qcow2" in image.read(65536)

    assert read(server.uri("web/d@before-loss")) == before
    assert read(server.uri("web/d@bp:0")) == before
    assert read(server.uri("web/d@latest")) == content
    kinds = {point["kind"] for point in server.get("/v1/disks/web/d:points?since=-1h")}
    assert {"bp", "bookmark"} <= kinds
    assert len(server.get("/v1/disks/web/d:points?limit=1")) == 1
    with pytest.raises(ApiError) as refused:
        server.post("/v1/disks/web/d:mark", name="before-loss")
    assert (refused.value.status, refused.value.fields["error"]) == (409, "refused")


def test_forks_of_forks_and_their_base_points(server: Server, short_path: Path) -> None:
    uri = server.add()
    write(uri, pattern(1, 1 << 20))
    server.synced("d")
    fork = server.post("/v1/forks", point="d@latest", name="f")
    assert fork["state"] == "fork"
    assert fork["base"].startswith("d@seq:")
    assert read(fork["uri"])[:4096] == pattern(1)
    write(fork["uri"], pattern(2), 4096)
    inner = server.post("/v1/forks", point="f@latest", name="g")
    write(inner["uri"], pattern(3), 8192)
    write(uri, pattern(4), 0)

    content = bytearray(SIZE)
    content[: 1 << 20] = pattern(1, 1 << 20)
    content[4096:8192] = pattern(2)
    assert read(server.uri("f@latest")) == content
    content[8192:12288] = pattern(3)
    assert read(server.uri("g@latest")) == content
    cut = server.post("/v1/disks/g:cut")
    assert qemu_raw(Path(cut["path"]), short_path) == content
    assert [shown["name"] for shown in server.get("/v1/forks")] == ["f", "g"]

    for name in ("d", "f"):
        with pytest.raises(ApiError) as refused:
            server.delete(f"/v1/disks/{name}")
        assert refused.value.status == 409
        assert {"d": "f", "f": "g"}[name] in refused.value.fields["message"]
    with pytest.raises(ApiError) as wrong:
        server.delete("/v1/forks/d")
    assert wrong.value.status == 400
    for name in ("g", "f"):
        server.delete(f"/v1/forks/{name}")
    server.delete("/v1/disks/d")
    assert server.get("/v1/disks") == []
    assert list((server.state_dir / "timelines").iterdir()) == []
    assert list((server.state_dir / "nbd").iterdir()) == []


def test_disks_share_a_base_image(server: Server, short_path: Path) -> None:
    image = short_path / "template.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE // 2)], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 1M 1M", image], check=True)
    content = bytearray(SIZE)
    content[1 << 20 : 2 << 20] = b"\7" * (1 << 20)
    first, second = (server.add(name, base=str(image)) for name in ("a", "b"))
    assert [path.name for path in (server.state_dir / "bases").glob("*.raw")] == ["b1.raw"]
    assert read(first) == read(second) == content
    write(first, pattern(1))
    write(first, bytes(content[1 << 20 : 2 << 20]), 1 << 20)
    server.synced("a", write_blocking=True)
    [zero] = server.get("/v1/disks/a:basepoints")
    assert read(second) == content
    content[:4096] = pattern(1)
    assert qemu_raw(Path(zero["path"]), short_path) == content

    with pytest.raises(ApiError) as too_large:
        server.post("/v1/disks", name="c", size="1M", base=str(image))
    assert too_large.value.status == 400
    for name in ("a", "b"):
        server.delete(f"/v1/disks/{name}")
    assert list((server.state_dir / "bases").iterdir()) == []


@pytest.mark.parametrize("child", ["target-0", "export", "indexer"])
def test_a_killed_child_comes_back(server: Server, child: str) -> None:
    uri = server.add()
    write(uri, pattern(1))
    server.synced("d")
    point = server.uri("d@latest")
    pid = server.pids()[child]
    os.kill(pid, signal.SIGKILL)
    # Clients find the socket there all the time: who connects meanwhile waits.
    write(uri, pattern(2), 4096)
    assert read(point, 8192) == pattern(1) + bytes(4096)
    assert read(server.uri("d@latest"), 8192) == pattern(1) + pattern(2)
    assert until(lambda: server.pids()[child], "new child") != pid
    [died] = [event for event in server.events("service.child-died") if event["child"] == child]
    assert died["status"] == -signal.SIGKILL
    assert not is_running(pid)


def test_a_killed_server_leaves_orphans_that_the_next_one_ends(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        uri = server.add()
        write(uri, pattern(1))
        server.synced("d")
        orphans = server.pids()
        client = nbd.NBD()
        client.connect_uri(uri)
        client.pwrite(pattern(2), 4096)
        server.kill()
        # Writes go on without the service, and nothing of them is lost.
        client.pwrite(pattern(3), 8192)
        assert all(map(is_running, orphans.values()))
        with Server(short_path / "s") as second:
            assert not any(map(is_running, orphans.values()))
            [killed] = second.events("service.orphan-killed")
            assert killed["child"] == "indexer"
            taken = {event["child"] for event in second.events("service.child-taken-over")}
            assert taken == {"target-0", "export"}
            with pytest.raises(nbd.Error):
                client.pwrite(pattern(4), 12288)
            expected = pattern(1) + pattern(2) + pattern(3) + bytes(4096)
            assert read(second.uri("d@latest"), 16384) == expected
            write(uri, pattern(5), 12288)
            assert read(second.uri("d@latest"), 4096, 12288) == pattern(5)
            assert second.stop() == 0


def test_a_clean_stop_leaves_nothing_running_and_nothing_to_recover(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        uri = server.add()
        write(uri, pattern(1))
        server.synced("d", write_blocking=True)
        write(uri, pattern(2))
        session = server.get("/v1/disks/d")["session"]
        children = server.pids()
        assert server.stop() == 0
        assert not any(map(is_running, children.values()))
        assert not list(server.state_dir.rglob("*.pid"))
    with Server(short_path / "s") as server:
        shown = server.get("/v1/disks/d")
        assert shown["session"] >= session
        assert shown["durable_seq"] > 0
        assert not server.events("service.orphan-killed")
        assert not server.events("target.unclean-boot")
        assert read(server.uri("d@latest"), 4096) == pattern(2)


def test_a_clean_stop_gives_a_live_mirror_no_error(server: Server) -> None:
    """Between the closing of the journals and the kill its writes wait: with a reconnect delay a mirror then goes on."""
    uri = server.add()
    write(uri, pattern(1))
    server.synced("d")
    target = server.pids()["target-0"]
    client = nbd.NBD()
    client.connect_uri(uri)
    client.pwrite(pattern(2), 0)
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(str(server.state_dir / "run" / "target-0.ctl"))
        control.sendall(messages.pack({"op": "shut-all"}))
        assert messages.receive(control) == {"ok": 1}
    ended: list[nbd.Error] = []

    def write_on() -> None:
        with pytest.raises(nbd.Error) as error:
            client.pwrite(pattern(3), 4096)
        ended.append(error.value)

    writer = threading.Thread(target=write_on)
    writer.start()
    writer.join(0.3)
    assert not ended
    os.kill(target, signal.SIGKILL)
    writer.join(DEADLINE_S)
    assert ended[0].errno not in ("ESHUTDOWN", "EIO", "EPERM"), ended[0]
    assert read(server.uri("d@latest"), 8192) == pattern(2) + bytes(4096)


def test_what_a_killed_target_left_becomes_durable(server: Server) -> None:
    uri = server.add()
    write(uri, pattern(1))
    server.synced("d")
    with connected(uri) as client:
        client.pwrite(pattern(2), 0)
        last = server.get("/v1/disks/d")["last_seq"]
        os.kill(server.pids()["target-0"], signal.SIGKILL)
    until(lambda: server.get("/v1/disks/d")["durable_seq"] >= last, "durable tail without a client")


def test_a_child_that_never_starts_keeps_nobody_from_stopping(short_path: Path) -> None:
    state_dir = short_path / "s"
    command = [sys.executable, "-m", "cdpserver.service.main", "--state-dir", str(state_dir)]
    # Without the directory of nbdkit on PATH the shell in front of it finds nothing to run.
    service = subprocess.Popen(command, env={**os.environ, "PATH": ""}, stderr=subprocess.DEVNULL)

    def deaths() -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            lines = (state_dir / "events.jsonl").read_text().splitlines()
            return [event for event in map(json.loads, lines) if event["event"] == "service.child-died"]
        return []

    try:
        until(lambda: len(deaths()) >= 4, "deaths")
        service.terminate()
        assert service.wait(DEADLINE_S) == 0
    finally:
        service.kill()
        service.wait()
    assert {(event["child"], event["status"]) for event in deaths()} == {("target-0", 127)}
    pauses = [event["restart_in_s"] for event in deaths()]
    assert pauses[:4] == sorted(pauses[:4])
    assert pauses[0] == 0
    assert pauses[3] > pauses[1]


def test_one_server_per_state_directory(server: Server) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "cdpserver.service.main", "--state-dir", server.state_dir],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert second.returncode == 3
    assert second.stderr.splitlines()[-1].startswith(
        f"cdpserver: another cdpserver runs (pid {server.process.pid})"
    )
    assert server.get("/v1/status")["state_dir"] == str(server.state_dir)


def test_a_disk_in_use_is_not_removed(server: Server) -> None:
    uri = server.add()
    write(uri, pattern(1))
    server.synced("d")
    for held in (uri, server.uri("d@latest")):
        with connected(held), pytest.raises(ApiError) as refused:
            server.delete("/v1/disks/d")
        assert (refused.value.status, refused.value.fields["exit_code"]) == (409, 3)
        assert server.get("/v1/disks/d")["state"] in ("synced", "unordered")
    until(lambda: server.get("/v1/disks/d")["clients"] == 0, "end of the client")
    assert server.delete("/v1/disks/d") == {"removed": "d"}
    with pytest.raises(ApiError) as gone:
        server.get("/v1/disks/d")
    assert gone.value.status == 404
    with pytest.raises(nbd.Error):
        read(uri)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/disks", {"name": "a/b/c", "size": "1M"}, 400),
        ("POST", "/v1/disks", {"name": "a@b", "size": "1M"}, 400),
        ("POST", "/v1/disks", {"name": "a\0b", "size": "1M"}, 400),
        ("POST", "/v1/disks", {"name": "..", "size": "1M"}, 400),
        ("POST", "/v1/disks", {"name": "a" * 300, "size": "1M"}, 400),
        ("POST", "/v1/disks", {"name": "a", "size": 0}, 400),
        ("POST", "/v1/disks", {"name": "a", "size": -1}, 400),
        ("POST", "/v1/disks", {"name": "a", "size": 1}, 400),
        ("POST", "/v1/disks", {"name": "a", "size": "1P"}, 400),
        ("POST", "/v1/disks", {"name": "a", "size": 1000}, 400),
        ("POST", "/v1/disks", {"name": "a", "size": True}, 400),
        ("POST", "/v1/disks", {"name": "a"}, 400),
        ("POST", "/v1/disks", {"name": "d", "size": "1M"}, 409),
        ("POST", "/v1/disks", {"name": "d", "vm": "d", "size": "1M"}, 409),
        ("POST", "/v1/disks", {"name": "a", "size": "1M", "base": "relative.raw"}, 400),
        ("POST", "/v1/disks", {"name": "a", "size": "1M", "base": "/nowhere.raw"}, 404),
        ("POST", "/v1/disks/nobody:cut", None, 404),
        ("POST", "/v1/disks/d:cut", None, 409),
        ("POST", "/v1/disks/d:mark", {"name": "a b"}, 400),
        ("POST", "/v1/disks/d:mark", {"name": "latest"}, 400),
        ("GET", "/v1/disks/d:points?kind=x", None, 400),
        ("GET", "/v1/disks/d:points?limit=x", None, 400),
        ("GET", "/v1/disks/d:points?since=soon-ish!", None, 400),
        ("GET", "/v1/uri?point=d", None, 400),
        ("GET", "/v1/uri?point=d@latest", None, 409),
        ("GET", "/v1/uri", None, 400),
        ("POST", "/v1/forks", {"point": "d@latest", "name": "f@x"}, 400),
        ("DELETE", "/v1/disks/nobody", None, 404),
        ("GET", "/v2/nothing", None, 404),
        ("PUT", "/v1/disks", None, 405),
    ],
)
def test_bad_requests_say_what_to_do(
    shared_server: Server, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    before = sorted(shared_server.state_dir.joinpath("timelines").iterdir())
    with pytest.raises(ApiError) as refused:
        shared_server.request(method, path, body)
    assert refused.value.status == status
    fields = refused.value.fields
    assert fields["message"]
    assert "\n" not in fields["message"]
    assert fields["exit_code"] in range(1, 7)
    assert sorted(shared_server.state_dir.joinpath("timelines").iterdir()) == before


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    """One server, with an empty disk `d`, for requests that change nothing."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="cdp-") as path, Server(Path(path) / "s") as running:
        running.add()
        yield running


def test_requests_wait_for_a_target_that_restarts(server: Server) -> None:
    uri = server.add()
    write(uri, pattern(1))
    server.synced("d")
    stop = threading.Event()

    def keep_killing() -> None:
        while not stop.wait(0.5):
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(server.pids()["target-0"], signal.SIGKILL)

    killer = threading.Thread(target=keep_killing)
    killer.start()
    try:
        for _ in range(20):
            assert server.get("/v1/disks/d")["state"] in ("synced", "unordered")
            server.uri("d@latest")
    finally:
        stop.set()
        killer.join()


def test_base_points_are_cut_by_themselves_when_data_changed(short_path: Path) -> None:
    config = short_path / "cdp.toml"
    config.write_text("[policy]\nbp_every = '10s'\n")
    with Server(short_path / "s", "--config", str(config)) as server:
        uri = server.add()
        write(uri, pattern(1))
        server.synced("d")
        write(uri, pattern(2))
        until(lambda: len(server.get("/v1/disks/d:basepoints")) == 2, "second base point")
        # Nothing was written since: the next looks cut none.
        looks = len(server.events("basepoint.cut"))
        assert looks == 2


def test_a_failed_base_point_leaves_no_file_and_is_written_later(server: Server) -> None:
    uri = server.add()
    write(uri, pattern(1))
    server.synced("d")
    write(uri, pattern(2))
    timeline = server.state_dir / "timelines" / "t1"
    hidden = timeline / "hidden"
    (timeline / "bp-0.qcow2").rename(hidden)
    (timeline / "bp-0.qcow2").mkdir()
    with pytest.raises(ApiError) as failed:
        server.post("/v1/disks/d:cut")
    assert failed.value.status == 500
    assert server.events("basepoint.failed")
    assert not (timeline / "bp-1.qcow2").exists()
    assert not list(timeline.glob(".tmp-*"))
    assert read(server.uri("d@bp:1"), 4096) == pattern(2)
    (timeline / "bp-0.qcow2").rmdir()
    hidden.rename(timeline / "bp-0.qcow2")
    # The next cut publishes what was left before it.
    server.post("/v1/disks/d:cut")
    assert [point["number"] for point in server.get("/v1/disks/d:basepoints")] == [0, 1, 2]


def test_reading_back_finds_what_differs(server: Server, short_path: Path) -> None:
    uri = server.add()
    write(uri, pattern(1, 1 << 20))
    server.synced("d")
    with connected(uri) as client:
        client.pwrite(pattern(2, 65536), 65536)
        client.zero(262144, 131072)
    published = Path(server.post("/v1/disks/d:cut")["path"])
    state = StateDir.open(server.state_dir)
    history = History(state.path, timeline.load(state.timeline("t1")))
    views = basepoint.delta_views(state.path, history, 1)
    delta = Delta(views.new, views.old)
    assert delta.ranges == [(65536, 393216)]
    for command in ("", "write -q -P 7 70000 1", "write -q -P 7 393215 1", "write -q -P 7 500000 1"):
        # Only what changed is compared: the last of these lies in the backing file's part.
        copy = published.with_name("copy.qcow2")
        shutil.copy(published, copy)
        if command:
            copy.chmod(0o600)
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, copy], check=True)
        damaged = command and "500000" not in command
        with qemu.serve(copy, short_path / "q") as served:
            if damaged:
                with pytest.raises(CorruptError, match="differs from the journal"):
                    readback.compare(served, delta)
            else:
                readback.compare(served, delta)
        copy.unlink()
    views.close()
    history.close()


def test_images_of_every_kind_are_imported(server: Server, short_path: Path) -> None:
    content = bytearray(SIZE)
    content[4096:8192] = b"\7" * 4096
    for format in ("raw", "qcow2", "vmdk", "vdi", "vhdx"):
        image = short_path / f"template.{format}"
        subprocess.run(["qemu-img", "create", "-q", "-f", format, image, str(SIZE)], check=True)
        subprocess.run(["qemu-io", "-f", format, "-c", "write -q -P 7 4096 4096", image], check=True)
        uri = server.add(format, base=str(image))
        assert read(uri) == content
    overlay = short_path / "overlay"
    qemu.create_overlay(overlay, backing=short_path / "template.qcow2", format="qcow2", size=SIZE)
    assert read(server.add("overlay", base=str(overlay))) == content
    odd = short_path / "odd"
    odd.write_bytes(b"no image, just text" * 100)
    assert read(server.add("odd", base=str(odd)))[:2000] == odd.read_bytes().ljust(2000, b"\0")
    outside = short_path / "outside.qcow2"
    options = f"data_file={short_path / 'template.raw'},data_file_raw=on"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, outside, str(SIZE)], check=True)
    lost = short_path / "lost.qcow2"
    qemu.create_overlay(lost, backing=short_path / "template.vdi", format="vdi", size=SIZE)
    (short_path / "template.vdi").unlink()
    for image in (outside, lost):
        with pytest.raises(ApiError):
            server.add("x", base=str(image))
    assert "x" not in [shown["name"] for shown in server.get("/v1/disks")]
    assert len(list((server.state_dir / "bases").glob("*.raw"))) == 7
    assert not list((server.state_dir / "bases").glob(".tmp-*"))


def test_a_server_killed_while_a_base_point_is_written(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        uri = server.add()
        write(uri, pattern(1))
        server.synced("d")
        write(uri, pattern(2, SIZE))
        writing = server.state_dir / "run" / "basepoint-t1.pid"

        def cut() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.post("/v1/disks/d:cut")

        request = threading.Thread(target=cut)
        request.start()
        until(lambda: writing.exists() and writing.stat().st_size, "worker")
        worker = int(writing.read_text().split()[0])
        server.kill()
        request.join()
        with Server(short_path / "s") as second:
            assert not is_running(worker)
            timeline_path = server.state_dir / "timelines" / "t1"
            until((timeline_path / "bp-1.qcow2").exists, "base point of the cut")
            assert qemu_raw(timeline_path / "bp-1.qcow2", short_path) == pattern(2, SIZE)
            until(lambda: not list(timeline_path.glob(".tmp-*")), "end of the writing")
            assert len(second.get("/v1/disks/d:basepoints")) == 2


def test_tcp_beside_the_unix_sockets(short_path: Path) -> None:
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    addresses = [f"127.0.0.1:{port}" for port in ports]
    with Server(short_path / "s", "--listen", addresses[0], "--listen-export", addresses[1]) as server:
        uri = server.add()
        assert uri == f"nbd://{addresses[0]}/d"
        write(uri, pattern(1))
        unix = server.get("/v1/disks/d")["uri_unix"]
        write(unix, pattern(2), 4096)
        server.synced("d")
        assert server.uri("d@latest").startswith(f"nbd://{addresses[1]}/d@seq:")
        assert read(server.uri("d@latest"), 8192) == pattern(1) + pattern(2)
