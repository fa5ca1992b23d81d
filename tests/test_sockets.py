"""Sockets that outlive the service, and workers: what a mirror notices when the service, or all of it, is replaced."""

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import nbd
import pytest

from cdpserver.config import Config
from cdpserver.errors import RefusedError
from cdpserver.events import EventLog
from cdpserver.service import holder, notify
from cdpserver.service.keeper import HolderProcess
from cdpserver.service.listeners import Listeners
from cdpserver.state import StateDir
from cdpserver.target.placement import worker_of
from tests.test_service import (
    DEADLINE_S,
    SIZE,
    Server,
    UnixConnection,
    connected,
    is_running,
    pattern,
    read,
    sweep,
    until,
    write,
)
from tools.kit.processes import TooLate
from tools.kit.source import Source

pytestmark = pytest.mark.real

JSON = {"Content-Type": "application/json"}

STALL_S = 1.0
"""The longest that a guest may wait while a new service takes over; tens of milliseconds, but for a machine that is busy."""


class Guest:
    """Writes through a mirror's source, one block after another, and knows how long each took. No write may fail."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.times: list[float] = []
        self.error: Exception | None = None
        self.data = bytearray(SIZE)

    def _run(self) -> None:
        dice = random.Random(7)
        try:
            with connected(self._uri) as client:
                while not self._ended.is_set():
                    offset = dice.randrange(SIZE // 4096) * 4096
                    block = pattern(len(self.times) + 1)
                    before = time.monotonic()
                    client.pwrite(block, offset)
                    self.times.append(time.monotonic() - before)
                    self.data[offset : offset + 4096] = block
        except nbd.Error as error:
            self.error = error

    def more(self, count: int = 50) -> None:
        """Return after some more writes."""
        goal = len(self.times) + count
        until(lambda: len(self.times) >= goal or self.error, "writes of the guest")
        assert self.error is None

    def __enter__(self) -> Self:
        self._thread.start()
        self.more()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(DEADLINE_S)


def mirrored(source: Source) -> None:
    """The mirror is in sync again and has met no error: with on_target_error=stop it would have paused."""
    until(source.in_sync, "mirror in sync")


@pytest.fixture
def directory(short_path: Path) -> Iterator[Path]:
    yield short_path
    sweep(short_path / "s")


# -- the holder ------------------------------------------------------------------------------------------------


@pytest.fixture
def held(short_path: Path) -> HolderProcess:
    process = HolderProcess(
        short_path / "holder.sock", linger_s=0.3, log=EventLog(short_path / "events.jsonl")
    )
    assert process.take() == {}
    return process


def test_the_holder_works_in_a_process_with_a_thousand_files(short_path: Path) -> None:
    """Its listening socket has the number that it had in the service."""
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        log = EventLog(short_path / "events.jsonl")
        process = HolderProcess(short_path / "holder.sock", linger_s=0.3, log=log)
        assert process.take() == {}
        process.put("a", socket.create_server(("127.0.0.1", 0)))
        assert list(another(process).take()) == ["a"]


def another(process: HolderProcess, *, linger_s: float = 0.3) -> HolderProcess:
    return HolderProcess(process._path, linger_s=linger_s, log=process._log)


def test_the_holder_keeps_what_it_was_given(held: HolderProcess, short_path: Path) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    for name, listener in zip("abc", listeners, strict=True):
        held.put(name, listener)
    held.put("a", listeners[1])
    held.drop("c")
    addresses = [listener.getsockname() for listener in listeners]
    for listener in listeners:
        listener.close()
    held._connection.close()  # type: ignore[union-attr]
    taken = another(held).take()
    assert {name: sock.getsockname() for name, sock in taken.items()} == {
        "a": addresses[1],
        "b": addresses[1],
    }
    assert not any(sock.get_inheritable() for sock in taken.values())
    # A client that came while nobody was there is served now.
    client = socket.create_connection(addresses[1])
    assert taken["a"].accept()[0].getpeername() == client.getsockname()


def test_a_service_that_hangs_keeps_no_other_from_the_holder(held: HolderProcess, short_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held.put("a", listener)  # and its connection stays open
        others = [
            HolderProcess(short_path / "holder.sock", linger_s=0.3, log=EventLog(short_path / "events.jsonl"))
            for _ in range(2)
        ]
        for other in others:
            [kept] = other.take().values()
            kept.close()
    assert not (short_path / "events.jsonl").exists(), "a holder that does not answer is said"


def test_the_holder_ends_when_nobody_comes_back(held: HolderProcess, short_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    held.put("a", listener)
    listener.close()
    socket.create_connection(address).close()
    held._connection.close()  # type: ignore[union-attr]

    def refused() -> bool:
        try:
            socket.create_connection(address).close()
        except ConnectionRefusedError:
            return True
        return False

    until(refused, "end of the holder")
    assert another(held).take() == {}, "a new one"


def test_a_holder_that_answers_nonsense_is_done_without(short_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(short_path / "holder.sock"))
        listener.listen()
        answers = threading.Thread(target=lambda: listener.accept()[0].send(b"what?"))
        answers.start()
        process = HolderProcess(
            short_path / "holder.sock", linger_s=1, log=EventLog(short_path / "events.jsonl")
        )
        assert process.take() == {}
        answers.join()
    assert "service.no-holder" in (short_path / "events.jsonl").read_text()


def test_the_holder_needs_nothing_but_the_standard_library() -> None:
    """It is started for each state directory and lives as long: its memory counts."""
    load = f"exec(open({holder.__file__!r}).read().split('if __name__')[0])"
    code = f"import sys; {load}; print(len(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert int(modules.stdout) < 90


# -- which sockets there are -----------------------------------------------------------------------------------


class _Memory:
    """A keeper that keeps in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, socket.socket] = {}

    def take(self) -> dict[str, socket.socket]:
        return {name: sock.dup() for name, sock in self.kept.items()}

    def put(self, name: str, listener: socket.socket) -> None:
        self.kept[name] = listener.dup()

    def drop(self, name: str) -> None:
        self.kept.pop(name, None)

    def stop(self, name: str) -> None:
        self.drop(name)

    async def stay(self) -> None: ...


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def inodes(listeners: Listeners) -> dict[str, int]:
    return {name: os.fstat(sock.fileno()).st_ino for name, sock in listeners._sockets.items()}


def test_sockets_are_made_kept_and_let_go(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    memory = _Memory()
    port, other = free_port(), free_port()
    first = Listeners(state, Config(workers=2, listen=("127.0.0.1", port)), memory)
    assert first.open() == []
    before = inodes(first)
    assert set(before) == {"api", "export", "worker-0", "worker-0-tcp", "worker-1", "worker-1-tcp"}
    first.close()
    # More workers, another address for points: what is the same stays.
    more = Config(workers=3, listen=("127.0.0.1", port), listen_export=("127.0.0.1", other))
    second = Listeners(state, more, memory)
    assert set(second.open()) == set(before) - {"api"}
    after = inodes(second)
    assert set(after) == set(before) | {"worker-2", "worker-2-tcp", "export-tcp"}
    assert all(after[name] == before[name] for name in before if name != "api")
    second.close()
    # A socket whose name is gone from the file system, and one on another port, are of no use.
    state.export_socket.unlink()
    last = free_port()
    third = Listeners(state, Config(listen=("127.0.0.1", last)), memory)
    with pytest.raises(RefusedError, match="cannot listen"), socket.create_server(("127.0.0.1", last)):
        third.open()
    assert set(third.open()) == {"api", "export", "worker-0"}, "made by the attempt before"
    assert set(memory.kept) == {"api", "export", "worker-0", "worker-0-tcp"}
    third.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a socket away")
def test_beside_a_socket_of_another_user_there_is_none(short_path: Path) -> None:
    """A socket unit's is root's, and the server is not: the kernel lets no other user share the port."""
    state = StateDir.create_or_open(short_path / "s")
    memory = _Memory()
    memory.kept["target-tcp"] = unit = socket.create_server(("127.0.0.1", 0), reuse_port=True)
    os.fchown(unit.fileno(), 65534, -1)
    listeners = Listeners(state, Config(workers=3, listen=unit.getsockname()), memory)
    assert listeners.open() == ["worker-0-tcp"]
    assert set(listeners._sockets) == {"api", "export", "worker-0", "worker-0-tcp", "worker-1", "worker-2"}
    listeners.close()
    # A configuration that does not name its address has no use for it.
    without = Listeners(state, Config(), memory)
    without.open()
    assert "worker-0-tcp" in without.dropped
    without.close()


def test_two_services_do_not_share_a_port(short_path: Path) -> None:
    port = free_port()
    states = [StateDir.create_or_open(short_path / name) for name in "ab"]
    config = Config(workers=2, listen=("127.0.0.1", port))
    first = Listeners(states[0], config, _Memory())
    first.open()
    with pytest.raises(RefusedError, match="cannot listen"):
        Listeners(states[1], config, _Memory()).open()
    first.close()


# -- a mirror while the service is replaced --------------------------------------------------------------------


def check_content(server: Server, source: Source, guest: Guest) -> None:
    mirrored(source)
    assert read(source.uri) == guest.data
    assert read(server.uri("d@latest")) == guest.data


def test_a_mirror_rides_over_a_killed_server(directory: Path) -> None:
    first = Server(directory / "s")
    with Source(directory, SIZE) as source:
        source.mirror(first.add())
        first.post("/v1/disks/d:synced", write_blocking=True)
        session = first.get("/v1/disks/d")["session"]
        with Guest(source.uri) as guest:
            orphans = first.pids()
            first.kill()
            guest.more()
            assert all(map(is_running, orphans.values())), "the mirror goes on without the service"
            with Server(directory / "s") as second:
                guest.more()
                assert max(guest.times) < STALL_S, f"stalled {max(guest.times):.3f} s"
                assert not any(map(is_running, orphans.values()))
                taken = [event["child"] for event in second.events("service.child-taken-over")]
                assert sorted(taken) == ["export", "target-0"]
                assert not second.events("target.error")
                guest.__exit__()
                check_content(second, source, guest)
                assert second.get("/v1/disks/d")["session"] <= session + 1, "QEMU connected once more"
                source.end_mirror()


def test_a_mirror_rides_over_a_new_program(directory: Path) -> None:
    """SIGHUP: the same process, a new program (an upgrade, or a changed configuration)."""
    config = directory / "c.toml"
    config.write_text("workers = 1\n")
    with Server(directory / "s", "--config", str(config)) as server, Source(directory, SIZE) as source:
        uri = server.add()
        source.mirror(uri)
        server.post("/v1/disks/d:synced", write_blocking=True)
        with Guest(source.uri) as guest:
            for workers in (1, 3, 2):
                old = server.pids()
                config.write_text(f"workers = {workers}\n")
                server.process.send_signal(signal.SIGHUP)
                until(lambda old=old: not any(map(is_running, old.values())), "end of the old children")  # type: ignore[misc]
                guest.more()
                until(server._is_up, "API")
                assert sum(name.startswith("target-") for name in server.pids()) == workers
                assert server.get("/v1/disks/d")["uri"] == uri
            assert max(guest.times) < STALL_S, f"stalled {max(guest.times):.3f} s"
            assert not server.events("service.orphan-killed"), "nothing is left that is not taken over"
            guest.__exit__()
            check_content(server, source, guest)
            source.end_mirror()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("worker = 2\n", "did you mean workers?"), ("[roles]\nadmin = 'no-such-group'\n", "no-such-group")],
)
def test_a_program_that_would_not_start_replaces_none(wrong: str, said: str, directory: Path) -> None:
    config = directory / "c.toml"
    config.write_text("workers = 1\n")
    with Server(directory / "s", "--config", str(config)) as server:
        before = server.pids()
        config.write_text(wrong)
        server.process.send_signal(signal.SIGHUP)
        [refused] = until(lambda: server.events("service.restart-refused"), "refusal")
        assert said in refused["reason"]
        assert server.pids() == before
        config.write_text("workers = 2\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: len(server.events("service.ready")) == 2, "new program")
        assert len(server.pids()) == len(before) + 1


def test_a_client_waits_through_a_stop_and_a_start(directory: Path) -> None:
    """Sockets stay for a while after a stop: who connects meanwhile waits, and is not refused."""
    with Server(directory / "s") as first:
        uri = first.add()
        write(uri, pattern(1))
        assert first.stop() == 0
    with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(directory / "s" / "api.sock"))
    got: list[bytes] = []
    waiting = threading.Thread(target=lambda: got.append(read(uri, 4096)))
    with socket.socket(socket.AF_UNIX) as client:
        # The harness ends the holder with the server; hold the sockets once more, as a stop alone does.
        second = Server(directory / "s")
        second.stop()
        client.connect(str(directory / "s" / "nbd" / "t1.sock"))
        waiting.start()
        time.sleep(0.2)
        assert not got
        with Server(directory / "s"):
            waiting.join(DEADLINE_S)
    assert got == [pattern(1)]


def test_a_holder_that_is_killed_is_replaced(directory: Path) -> None:
    with Server(directory / "s") as server:
        uri = server.add()
        kill_holder(directory / "s")
        until(lambda: server.events("service.holder-replaced"), "new holder")
        server.kill()
        with Server(directory / "s") as second:
            kept = second.events("service.sockets-kept")
            assert set(kept[-1]["sockets"]) == {"api", "export", "worker-0"}
            write(uri, pattern(1))


def kill_holder(state_dir: Path) -> None:
    """SIGKILL to whoever listens at run/holder.sock."""
    [pid] = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and _holds(entry, state_dir)
    ]
    os.kill(pid, signal.SIGKILL)


def _holds(process: Path, state_dir: Path) -> bool:
    with contextlib.suppress(OSError):
        if Path(holder.__file__).name in (process / "cmdline").read_text():
            table = Path("/proc/net/unix").read_text()
            [inode] = re.findall(rf"(\d+) {state_dir}/run/holder.sock\n", table)[:1]
            return any(os.readlink(fd) == f"socket:[{inode}]" for fd in (process / "fd").iterdir())
    return False


def _answers(state_dir: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(state_dir / "run" / "holder.sock"))
        return True
    return False


# -- workers ---------------------------------------------------------------------------------------------------


def test_disks_spread_over_workers_and_keep_their_uris(directory: Path) -> None:
    uris: dict[str, str] = {}
    with Server(directory / "s", "--workers", "3") as server:
        for number in range(4):
            name = f"d{number}"
            uris[name] = server.add(name)
            write(uris[name], pattern(number + 1))
        served = {worker_of(server.get(f"/v1/disks/{name}")["id"], 3) for name in uris}
        assert served == {0, 1, 2}
        for number, name in enumerate(uris):
            link = os.readlink(directory / "s" / "nbd" / f"{server.get(f'/v1/disks/{name}')['id']}.sock")
            assert link == f"../run/worker-{worker_of(f't{number + 1}', 3)}.sock"
    with Server(directory / "s", "--workers", "2") as server:
        assert {name: server.get(f"/v1/disks/{name}")["uri"] for name in uris} == uris
        for number, (name, uri) in enumerate(uris.items()):
            assert read(uri, 4096) == pattern(number + 1)
            write(uri, pattern(number + 1), 4096)
            server.synced(name)
            assert read(server.uri(f"{name}@latest"), 8192) == pattern(number + 1) * 2
        assert {disk["clients"] for disk in server.get("/v1/disks")} == {0}
        assert not list((directory / "s" / "run").glob("worker-2*")) or not _connects(
            directory / "s" / "run" / "worker-2.sock"
        )


def _connects(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return True
    return False


def test_every_name_in_run_is_in_the_document(directory: Path) -> None:
    document = (Path(__file__).resolve().parent.parent / "docs/format.md").read_text()
    [block] = re.findall(r"^    run/\n((?:      .*\n)+)", document, re.MULTILINE)
    named = {name for line in block.splitlines() for name in re.match(r" +((?:\S+ )+)", line)[1].split()}  # type: ignore[index]
    with Server(directory / "s", "--workers", "2") as server:
        server.add()
        job = UnixConnection(directory / "s" / "api.sock")
        job.request("POST", "/v1/disks", '{"name": "e", "size": 4096}', JSON | {"Prefer": "respond-async"})
        assert json.loads(job.getresponse().read())["name"] == "jobs/1"
        found = {path.name for path in (directory / "s" / "run").iterdir()}
    known = {re.sub(r"-\d+", "-K", name) for name in found}
    known = {re.sub(r"^[a-zK-]+\.\d+\.pid$", "NAME.N.pid", name) for name in known}
    assert {"NAME.N.pid", "target-K.ctl", "jobs.json"} <= known
    assert known - named == set() and named - known <= {"NAME.pid"}


def test_any_worker_takes_any_disk_over_tcp(directory: Path) -> None:
    port = free_port()
    with Server(directory / "s", "--workers", "3", "--listen", f"127.0.0.1:{port}") as server:
        names = [f"d{number}" for number in range(4)]
        for number, name in enumerate(names):
            uri = server.add(name)
            assert uri == f"nbd://127.0.0.1:{port}/{name}"
            # The kernel chooses the worker: many connections meet all of them.
            for turn in range(8):
                write(uri, pattern(10 * number + turn + 1), turn * 4096)
            server.synced(name)
            whole = b"".join(pattern(10 * number + turn + 1) for turn in range(8))
            assert read(server.uri(f"{name}@latest"), len(whole)) == whole
            through_all = f"nbd+unix:///{name}?socket={directory}/s/target.sock"
            assert read(through_all, len(whole)) == whole
        with pytest.raises(nbd.Error):
            read(f"nbd://127.0.0.1:{port}/nobody")


@pytest.fixture
def forwarded(directory: Path) -> Iterator[tuple[Server, str]]:
    """A disk of worker 1, and a URI at which worker 0 takes it."""
    with Server(directory / "s", "--workers", "2") as server:
        uri = server.add()
        assert worker_of(server.get("/v1/disks/d")["id"], 2) == 1
        write(uri, pattern(1))
        server.synced("d")
        yield server, f"nbd+unix:///d?socket={directory}/s/target.sock"


def test_a_forwarded_disk_does_all_that_a_disk_does(forwarded: tuple[Server, str]) -> None:
    server, uri = forwarded
    client = nbd.NBD()
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.connect_uri(uri)
    assert client.get_size() == SIZE
    client.pwrite(pattern(2, 1 << 20), 1 << 20)
    client.pwrite(pattern(3), 4096, nbd.CMD_FLAG_FUA)
    assert server.get("/v1/disks/d")["lag_ns"] == 0, "FUA reached the owner"
    client.zero(8192, 1 << 20)
    client.trim(4096, (1 << 20) + 8192)
    client.flush()
    expected = bytearray(SIZE)
    expected[:8192] = pattern(1) + pattern(3)
    expected[1 << 20 : 2 << 20] = pattern(2, 1 << 20)
    expected[1 << 20 : (1 << 20) + 12288] = bytes(12288)
    assert client.pread(SIZE, 0) == expected
    runs: list[int] = []
    client.block_status(SIZE, 0, lambda _c, _o, entries, _e: len(runs.__iadd__(entries)) * 0)
    with connected(server.get("/v1/disks/d")["uri"]) as owner:
        assert owner.pread(SIZE, 0) == expected
    assert sum(runs[::2]) == SIZE
    assert runs[1::2][0] == 0
    assert runs[-1] & nbd.STATE_ZERO
    assert server.get("/v1/disks/d")["clients"] == 1
    client.shutdown()
    until(lambda: server.get("/v1/disks/d")["clients"] == 0, "end of the forwarded connection")


def test_a_forwarded_client_does_not_notice_that_the_owner_was_killed(
    forwarded: tuple[Server, str],
) -> None:
    server, uri = forwarded
    expected = bytearray(pattern(1) + bytes(SIZE - 4096))
    with connected(uri) as client:
        for turn in range(3):
            os.kill(server.pids()["target-1"], signal.SIGKILL)
            for number in range(20):
                block = pattern(100 * turn + number + 2)
                client.pwrite(block, number * 4096)
                expected[number * 4096 : (number + 1) * 4096] = block
        assert client.pread(SIZE, 0) == expected
    assert read(server.uri("d@latest")) == expected


def test_what_the_owner_refuses_is_refused(forwarded: tuple[Server, str]) -> None:
    server, uri = forwarded
    server.delete("/v1/disks/d")
    with pytest.raises(nbd.Error):
        read(uri)
    # Passed on twice it would go in circles, so nobody passes on what was passed on.
    server.add("e")
    [found] = [disk for disk in server.get("/v1/disks") if disk["name"] == "e"]
    other = 1 - worker_of(found["id"], 2)
    with pytest.raises(nbd.Error):
        read(f"nbd+unix:///direct:e?socket={server.state_dir}/run/worker-{other}.sock")
    assert read(f"nbd+unix:///direct:e?socket={server.state_dir}/run/worker-{1 - other}.sock") == bytes(SIZE)


def test_a_port_that_orphans_hold_is_taken_from_them(directory: Path) -> None:
    """The service and the holder are killed: only the children still have the sockets."""
    port = free_port()
    arguments = ("--workers", "2", "--listen", f"127.0.0.1:{port}")
    server = Server(directory / "s", *arguments)
    uri = server.add()
    write(uri, pattern(1))
    orphans = server.pids()
    server.kill()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(directory / "s" / "run" / "holder.sock"))
        client.send(b'{"op": "take", "linger": 0}')
    until(lambda: not _answers(directory / "s"), "end of the holder")
    with Server(directory / "s", *arguments) as second:
        assert not any(map(is_running, orphans.values()))
        assert {event["child"] for event in second.events("service.orphan-killed")} == {
            "target-0",
            "target-1",
            "export",
            "indexer",
        }
        assert not second.events("service.no-holder")
        assert read(uri, 4096) == pattern(1)


# -- systemd ---------------------------------------------------------------------------------------------------


class Manager:
    """What systemd does for a unit of Type=notify with FileDescriptorStoreMax= and WatchdogSec=."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = directory / "notify"
        self._socket.bind(str(self._path))
        self._socket.settimeout(DEADLINE_S)
        self.units: dict[str, int] = {}
        self.store: dict[str, int] = {}
        self.said: list[str] = []
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, state_dir: Path, *arguments: str) -> subprocess.Popen[bytes]:
        names, fds = [*self.units, *self.store], [*self.units.values(), *self.store.values()]
        # Out of the way of the numbers that they get in the child.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds]

        def place() -> None:
            for number, fd in enumerate(high):
                os.dup2(fd, 3 + number)

        command = [sys.executable, "-m", "cdpserver.service.main", "--state-dir", str(state_dir), *arguments]
        process = subprocess.Popen(
            ["/bin/sh", "-c", 'LISTEN_PID=$$ WATCHDOG_PID=$$ exec "$@"', "sh", *command],
            env=os.environ
            | {
                "NOTIFY_SOCKET": str(self._path),
                "WATCHDOG_USEC": "400000",
                "LISTEN_FDS": str(len(fds)),
                "LISTEN_FDNAMES": ":".join(names),
            },
            preexec_fn=place,  # noqa: PLW1509 (no thread of ours holds a lock here)
            pass_fds=range(3, 3 + len(fds)),
        )
        for fd in high:
            os.close(fd)
        self.started.append(process)
        return process

    def hear(self, wanted: str) -> None:
        """Listen until it is said."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 4)
            lines = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTORE" in lines:
                self.store[lines["FDNAME"]] = fds[0]
            elif "FDSTOREREMOVE" in lines:
                self.store.pop(lines["FDNAME"], None)
            self.said += data.decode().splitlines()
            if wanted in lines:
                return
        raise TooLate(f"{wanted} was not said: {self.said}")


@pytest.fixture
def manager(directory: Path) -> Iterator[Manager]:
    running = Manager(directory)
    yield running
    for process in running.started:
        process.kill()
        process.wait()


def test_systemd_hears_of_the_service_and_keeps_its_sockets(directory: Path, manager: Manager) -> None:
    first = manager.start(directory / "s")
    manager.hear("READY")
    for _ in range(3):
        manager.hear("WATCHDOG")
    assert set(manager.store) == {"api", "export", "worker-0"}
    assert not (directory / "s" / "run" / "holder.sock").exists()
    first.kill()
    first.wait()
    with Source(directory, SIZE) as source:
        second = manager.start(directory / "s")
        manager.hear("READY")
        [kept] = [
            event
            for line in (directory / "s" / "events.jsonl").read_text().splitlines()
            if (event := json.loads(line))["event"] == "service.sockets-kept"
        ]
        assert kept["sockets"] == ["api", "export", "worker-0"]
        # And at a reload: the same process says that it is at it, and that it is done.
        second.send_signal(signal.SIGHUP)
        manager.hear("RELOADING")
        assert "WATCHDOG_USEC=600000000" in manager.said, "a program that starts has no event loop that turns"
        manager.hear("READY")
        assert manager.said[-1] == "WATCHDOG_USEC=400000"
        assert second.poll() is None
        assert source.process.poll() is None
        second.terminate()
        manager.hear("STOPPING")
        assert second.wait(DEADLINE_S) == 0


def test_a_manager_that_is_busy_for_a_moment_hears_everything(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(directory / "notify"))
        queued = 0
        while notify.notify("WATCHDOG=1", within_s=0):
            queued += 1
        empty = threading.Timer(0.2, lambda: [manager.recv(64) for _ in range(queued)])
        empty.start()
        assert notify.notify("READY=1")
        empty.join()
        assert manager.recv(64) == b"READY=1"


def unit_socket(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_sockets_of_units_are_served_and_go_before_stored_ones(directory: Path, manager: Manager) -> None:
    """The API's unit listens before the server ever runs; when it is started anew, its new socket counts."""
    state_dir = directory / "s"
    state_dir.mkdir(mode=0o700)
    api = unit_socket(state_dir / "api.sock")
    tcp = socket.create_server(("127.0.0.1", 0), reuse_port=True)
    address = f"127.0.0.1:{tcp.getsockname()[1]}"
    manager.units = {"api": api.fileno(), "target-tcp": tcp.fileno()}
    waiting = UnixConnection(state_dir / "api.sock")
    waiting.request("GET", "/v1/status")
    first = manager.start(state_dir, "--listen", address)
    manager.hear("READY")
    assert waiting.getresponse().status == 200, "it waited from before the start"
    first.kill()
    first.wait()
    api.close()
    with unit_socket(state_dir / "api.sock") as new:
        manager.units["api"] = new.fileno()
        assert {"api", "worker-0-tcp"} <= set(manager.store)
        second = manager.start(state_dir, "--listen", address)
        manager.hear("READY")
        again = UnixConnection(state_dir / "api.sock")
        again.request("POST", "/v1/disks", json.dumps({"name": "d", "size": SIZE}), JSON)
        uri = json.loads(again.getresponse().read())["uri"]
        assert uri == f"nbd://{address}/d"
        write(uri, pattern(1))
        assert read(uri, 4096) == pattern(1)
        second.terminate()
        assert second.wait(DEADLINE_S) == 0
    tcp.close()
