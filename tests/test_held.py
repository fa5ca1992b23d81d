"""What is read, locked or forked while history is dropped or thinned: real processes on both sides."""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import Any

import nbd
import pytest

from cdpserver import leases
from cdpserver.chain import merge
from cdpserver.check import Report, check_timeline
from cdpserver.check.depth import Everything
from cdpserver.errors import RefusedError
from cdpserver.leases import GRACE_NS
from cdpserver.nodes import nodes
from tests.core import scratch
from tests.test_prune import Kept
from tests.test_service import ApiError, Server, connected, read, until
from tests.test_thin import Busy
from tools.soaking.trend import deleted, open_files

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64 * 4096
POLICY = "[policy]\nbp_every = '20m'\nkeep_rp = '1h'\nkeep_bp = '2h'\n"
MINUTES = "[policy]\nbp_every = '10m'\nkeep_rp = '15m 10h/1m'\nkeep_bp = 'none'\n"

pytestmark = pytest.mark.real


class Host:
    """The processes of one host around a store: they share its boot, and a clock that the test sets."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.state = kept.world.state
        self.env = {**os.environ, "CDP_BOOT_ID": kept.world.boot}
        self.env.pop("CDP_STATE_DIR", None)
        self.set_clock()

    def set_clock(self, later_ns: int = 0) -> None:
        now_ns = self.kept.world.now_ns = self.kept.world.now_ns + later_ns
        offset_ns = now_ns - clock_gettime_ns(CLOCK_BOOTTIME)
        value = {"boot_id": self.kept.world.boot, "offset_ns": offset_ns, "floor_ns": now_ns}
        self.state.clock.write_text(json.dumps(value))

    def prune(self, policy: str = POLICY) -> dict[str, Any]:
        """A pass, in a process as the service starts it."""
        module = (
            "-m",
            "cdpserver.retention.prune",
            "--state-dir",
            str(self.state.path),
            "--config-text",
            policy,
        )
        done = subprocess.run(
            [sys.executable, *module],
            env=self.env,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
            cwd=ROOT,
        )
        value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return value

    def cdp(self, *words: str | Path, code: int = 0) -> str:
        """A command; there is no service."""
        command = [sys.executable, "-m", "recovery.cli", "--state-dir", self.state.path, *words]
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    @contextlib.contextmanager
    def nbdkit(self) -> Iterator[Path]:
        """An export that somebody has started by hand; its socket."""
        socket = self.state.path.parent / "by-hand"
        plugin = ROOT / "nbdplugin" / "export.py"
        command: list[str | Path] = ["nbdkit", "-f", "-r", "-t", "4", "-U", socket, "python", plugin]
        process = subprocess.Popen(
            [*command, f"state_dir={self.state.path}", "alone=1"], env=self.env, stderr=subprocess.DEVNULL
        )
        try:
            until(socket.exists, "socket of nbdkit")
            yield socket
        finally:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def reader(self, how: str, seq: int) -> Iterator[Callable[[], bytes]]:
        """A process that has an instant open: what it reads, all of the disk."""
        point = f"{self.kept.entry.name}@seq:{seq}"
        if how == "nbdkit":
            with self.nbdkit() as socket, connected(f"nbd+unix:///{point}?socket={socket}") as client:
                yield lambda: bytes(client.pread(SIZE, 0))
        elif how == "mount":
            there = self.state.path.parent / "there"
            there.mkdir()
            self.cdp("mount", point, there)
            try:
                yield (there / "disk.img").read_bytes
            finally:
                self.cdp("umount", there)
        else:
            with self._held_point(seq) as read:
                yield read

    @contextlib.contextmanager
    def _held_point(self, seq: int) -> Iterator[Callable[[], bytes]]:
        """As `cdp file` opens a point."""
        arguments = [sys.executable, "-c", HELD_POINT, str(self.state.path), self.kept.entry.name, str(seq)]
        child = subprocess.Popen(arguments, env=self.env, stdin=PIPE, stdout=PIPE, cwd=ROOT)
        assert child.stdin is not None and child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def read() -> bytes:
            stdin.write(b"\n")
            stdin.flush()
            return stdout.read(SIZE)

        try:
            read()  # it is open
            yield read
        finally:
            child.kill()
            child.wait()
            stdin.close()
            stdout.close()


HELD_POINT = """
import sys
from pathlib import Path
from cdpserver.held import HeldPoint
from cdpserver.names import Seq
from cdpserver.state import StateDir
held = HeldPoint(StateDir.open(Path(sys.argv[1])), sys.argv[2], Seq(int(sys.argv[3])))
while sys.stdin.readline():
    sys.stdout.buffer.write(held.view.read(0, held.view.size))
    sys.stdout.buffer.flush()
"""


@pytest.fixture
def host() -> Iterator[Host]:
    """A disk with four hours of history, of which a pass would drop three."""
    with scratch() as path, contextlib.closing(Kept(path)) as kept:
        yield Host(kept)


@pytest.fixture
def thinning() -> Iterator[Host]:
    """A disk whose older intervals a pass would thin to an instant a minute."""
    with scratch() as path, contextlib.closing(Busy(path)) as busy:
        yield Host(busy)


@pytest.mark.parametrize("how", ["nbdkit", "mount", "file"])
def test_what_somebody_reads_without_the_service_stays(host: Host, how: str) -> None:
    kept = host.kept
    seq, other = kept.inside(4), kept.inside(2)
    with host.reader(how, seq) as read:
        dropped = host.prune()["dropped"]
        assert dropped and "interval:4" not in [gone["what"] for gone in dropped]
        assert read() == kept.line.model.read(seq, 0, SIZE) == kept.read(seq)
        with pytest.raises(RefusedError):
            kept.read(other)
    until(lambda: not _is_held(kept.line.directory, seq), "end of the reader")
    # A grace later it goes: one pass sees that nobody reads, one that nobody came back.
    host.prune()
    host.set_clock(2 * GRACE_NS)
    assert "interval:4" in [gone["what"] for gone in host.prune()["dropped"]]
    with pytest.raises(RefusedError):
        kept.read(seq)


def _is_held(directory: Path, seq: int) -> bool:
    """Does a process hold this lease?"""
    with open(directory / leases.DIRECTORY / str(seq), "rb") as lease:
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_an_export_without_the_service_is_whole_beside_a_pass(host: Host) -> None:
    kept, seq = host.kept, host.kept.inside(4)
    output = host.state.path.parent / "saved.raw"
    point = f"{kept.entry.name}@seq:{seq}"
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "recovery.cli",
        "--state-dir",
        host.state.path,
        "export",
        point,
        "--output",
        output,
    ]
    exporting = subprocess.Popen(
        command, env=host.env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lease = kept.line.directory / leases.DIRECTORY / str(seq)
    until(lambda: lease.exists() or exporting.poll() is not None, "lease")
    assert host.prune()["dropped"]
    assert exporting.wait(120) == 0 and output.read_bytes() == kept.line.model.read(seq, 0, SIZE)


def test_a_check_finds_nothing_wrong_and_holds_what_it_reads(host: Host) -> None:
    kept = host.kept
    before, said = kept.intervals(), list[tuple[str, dict[str, Any]]]()

    def beside(stage: str, done: int, total: int) -> None:
        if stage not in [stage for stage, _ in said]:
            said.append((stage, host.prune()))

    report = check_timeline(
        host.state.path,
        kept.entry.id,
        boot_id=kept.world.boot,
        depth=Everything(content=True),
        progress=beside,
    )
    assert report.damage == () and kept.intervals() == before
    assert [stage for stage, _ in said] == ["journal", "index", "base points", "content of base points"]
    for _, done in said:
        assert done["dropped"] == [] and "being verified or thinned" in done["failed"][kept.entry.name]
    assert host.prune()["dropped"] and kept.intervals() != before


def test_base_points_are_merged_beside_a_check(host: Host) -> None:
    kept = host.kept
    merged: list[int] = []

    def beside(stage: str, done: int, total: int) -> None:
        numbers = [node.number for node in nodes(kept.line.directory)]
        if stage in ("base points", "content of base points") and len(merged) < 4 and len(numbers) > 3:
            merge.merge(host.state, kept.catalog, kept.entry.id, "delete", numbers[2], base=None)
            merged.append(numbers[2])

    report = check_timeline(
        host.state.path,
        kept.entry.id,
        boot_id=kept.world.boot,
        depth=Everything(content=True),
        progress=beside,
    )
    assert report.damage == () and merged


def test_clients_read_on_while_their_interval_is_thinned(thinning: Host) -> None:
    """Over nbdkit, several requests at a time; what is gone is refused with the nearest on both sides."""
    kept, name = thinning.kept, thinning.kept.entry.name
    held = kept.inside(2) + 31
    wrong: list[str] = []
    over = threading.Event()

    def read_on(uri: str, wanted: bytes) -> None:
        try:
            with connected(uri) as client:
                rounds = 0
                while not over.is_set() or rounds < 3:
                    rounds += 1
                    if bytes(client.pread(SIZE, 0)) != wanted:
                        wrong.append(uri)
        except nbd.Error as error:
            wrong.append(f"{uri}: {error}")

    with thinning.nbdkit() as socket:

        def uri(seq: int) -> str:
            return f"nbd+unix:///{name}@seq:{seq}?socket={socket}"

        threads = [
            threading.Thread(target=read_on, args=(uri(seq), kept.line.model.read(seq, 0, SIZE)))
            for seq in (held, held, kept.line.last_seq)
        ]
        for thread in threads:
            thread.start()
        until((kept.line.directory / leases.DIRECTORY / str(held)).exists, "lease")
        reports: list[Report] = []
        checking = threading.Thread(
            target=lambda: reports.append(
                check_timeline(thinning.state.path, kept.entry.id, boot_id=kept.world.boot)
            )
        )
        checking.start()
        thinned: list[str] = []
        while not thinned:  # a check that reads lets a pass do nothing
            thinned = [done["what"] for done in thinning.prune(MINUTES)["dropped"]]
        over.set()
        for thread in (*threads, checking):
            thread.join()
        assert wrong == [] and "thin:2" in thinned and reports[0].damage == ()
        gone = next(seq for seq in range(held - 20, held + 20) if _refused(uri(seq)))
        with connected(uri(held)) as client:
            assert bytes(client.pread(SIZE, 0)) == kept.line.model.read(held, 0, SIZE)
    event = [
        event
        for event in map(json.loads, thinning.state.events.read_text().splitlines())
        if event["event"].startswith("export.") and event.get("export") == f"{name}@seq:{gone}"
    ][-1]
    said = thinning.cdp("export", f"{name}@seq:{gone}", "--output", thinning.state.path.parent / "x", code=2)
    for text in (event["reason"], said):
        before, after = map(int, re.findall(r"seq:(\d+)", text.replace(f"seq:{gone}", ""))[:2])
        assert before < gone < after
        for seq in (before, after):
            assert kept.read(seq) == kept.line.model.read(seq, 0, SIZE)


def _refused(uri: str) -> bool:
    try:
        with connected(uri):
            return False
    except nbd.Error:
        return True


@pytest.mark.parametrize("late", [False, True])
def test_what_is_asked_for_while_history_is_dropped_is_there_or_refused(host: Host, late: bool) -> None:
    """Locks, forks and clients, by the service, against its own pass: as it starts, or when it has dropped something."""
    kept, name = host.kept, host.kept.entry.name
    before = kept.intervals()
    wanted = list(zip(before[1:7], ("lock", "fork", "open") * 2, strict=True))
    seqs = {number: kept.inside(number) for number, _ in wanted}
    content = {seq: kept.line.model.read(seq, 0, SIZE) for seq in seqs.values()}
    kept.line.close(clean=True)
    kept.catalog.close()
    (config := host.state.path.parent / "c.toml").write_text(POLICY)
    good: list[tuple[str, str, int]] = []
    refused: list[ApiError | nbd.Error] = []
    with Server(host.state.path, "--config", str(config)) as server, contextlib.ExitStack() as clients:
        go, dropped, listed, states = threading.Event(), list[str](), list[int](), set[str]()

        def ask(seq: int, kind: str) -> None:
            point = f"{name}@seq:{seq}"
            uri = f"nbd+unix:///{point}?socket={host.state.export_socket}"
            go.wait()
            try:
                if kind == "lock":
                    server.post("/v1/locks", point=point)
                elif kind == "fork":
                    uri = server.post("/v1/forks", point=point, name=f"f{seq}")["uri"]
                else:
                    clients.enter_context(connected(uri))
                good.append((kind, uri, seq))
            except (ApiError, nbd.Error) as error:
                refused.append(error)

        def prune() -> None:
            dropped.extend(gone["what"] for gone in server.post("/v1/prune"))

        def list_on() -> None:
            """Whatever goes meanwhile, there is an answer."""
            go.wait()
            while not listed or threads[-1].is_alive():
                listed.append(len(server.get(f"/v1/disks/{name}:points")))
                states.add(server.get(f"/v1/disks/{name}")["state"])
            states.add("listed to the end")

        threads = [threading.Thread(target=ask, args=(seqs[number], kind)) for number, kind in wanted]
        threads += [threading.Thread(target=list_on), threading.Thread(target=prune)]
        for thread in threads:
            thread.start()
        if late:
            until(
                lambda: kept.intervals() != before or not threads[-1].is_alive(), "something that is dropped"
            )
        go.set()
        for thread in threads:
            thread.join()
        assert len(good) + len(refused) == len(wanted) and (not late or dropped)
        assert all(listed) and "listed to the end" in states and "damaged" not in states
        for error in refused:
            if isinstance(error, ApiError):
                assert "is not kept any more" in str(error) or "being dropped" in str(error), error
        prune()
        for kind, uri, seq in good:
            with connected(uri) as client:
                assert bytes(client.pread(SIZE, 0)) == content[seq], (kind, seq)


def test_who_reads_a_disk_keeps_nothing_of_what_was_dropped(host: Host) -> None:
    """Its room would not come back: neither a worker that was read nor the export, when its client has gone."""
    kept, name = host.kept, host.kept.entry.name
    kept.line.close(clean=True)
    kept.catalog.close()
    (config := host.state.path.parent / "c.toml").write_text(POLICY)
    with Server(host.state.path, "--config", str(config)) as server:
        pids = server.pids()
        readers = [pids["target-0"], pids["export"]]

        def gone(pid: int) -> list[str]:
            return deleted(open_files(pid), host.state.path)

        content = read(server.get(f"/v1/disks/{name}")["uri"], SIZE)
        with connected(f"nbd+unix:///{name}@latest?socket={host.state.export_socket}") as client:
            assert bytes(client.pread(SIZE, 0)) == content
            assert len(server.get(f"/v1/disks/{name}:points")) > 20
            before = [path for pid in readers for path in open_files(pid) if "/intervals/" in path]
            server.post("/v1/prune")
            assert [path for path in before if not Path(path).exists()], "what the test is about"
            assert gone(pids["export"]) and bytes(client.pread(SIZE, 0)) == content
        for pid in (server.process.pid, *readers):
            until(lambda pid=pid: not gone(pid), f"end of dropped files in process {pid}")  # type: ignore[misc]
        assert read(server.get(f"/v1/disks/{name}")["uri"], SIZE) == content
