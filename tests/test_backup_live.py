"""Backups of running VMs that CDP does not protect: a real QEMU's backup job into a repository, killed on the way, and back."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from cdpserver.errors import BrokenError, CdpError, NoSpaceError, RefusedError, UnreachableError, UsageError
from cdpserver.repository.content import Content
from cdpserver.repository.places import open_place
from cdpserver.repository.repository import Repository
from cdpserver.vm.backup.choice import LiveDisk, prefix_of
from cdpserver.vm.backup.jobs import Jobs
from cdpserver.vm.chain.command import over
from cdpserver.vm.qmp import Monitor
from cdpserver.vm.virt import user_of
from recovery import cli
from tools.kit.libvirtd import Libvirtd
from tools.kit.processes import listens, start, stop, until
from tools.kit.source import Machine, first, make_image

pytestmark = pytest.mark.real

MIB = 1 << 20
SIZE = 8 * MIB
CHUNK = 64 << 10


class Disks:
    """A qemu-storage-daemon with two disks that a guest has, and two monitors, of which the test holds one.

    The storage of vda is an NBD server of its own, which can be made to stand still: a job that reads it is met on its way.
    """

    def __init__(self, directory: Path, *plugin: str | Path) -> None:
        """That server is nbdkit with `plugin`; without one vda is an empty file."""
        self.directory = directory
        for name in "ab" if not plugin else "b":
            (directory / f"{name}.raw").touch()
            os.truncate(directory / f"{name}.raw", SIZE)
        plugin = plugin or ("file", directory / "a.raw")
        socket, log = directory / "storage.sock", directory / "storage.log"
        self.storage = start(["nbdkit", "-f", "-U", socket, *plugin], log)
        listens(self.storage, socket, log)
        self.monitor = directory / "qsd.qmp"
        self.start()

    def start(self) -> None:
        """The daemon; again after its end."""
        d, log = self.directory, self.directory / "qsd.log"
        storage = f"driver=nbd,server.type=unix,server.path={d}/storage.sock"
        self.process = start(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"{storage},node-name=vda,discard=unmap"),
                *("--blockdev", f"driver=file,node-name=vdb,filename={d}/b.raw,discard=unmap"),
                *("--nbd-server", f"addr.type=unix,addr.path={d}/guest.sock,max-connections=0"),
                *("--export", "type=nbd,id=a,node-name=vda,name=vda,writable=on"),
                *("--export", "type=nbd,id=b,node-name=vdb,name=vdb,writable=on"),
                *("--chardev", f"socket,id=m1,path={self.monitor},server=on,wait=off", "--monitor", "chardev=m1"),
                *("--chardev", f"socket,id=m2,path={d}/own.qmp,server=on,wait=off", "--monitor", "chardev=m2"),
            ],
            log,
        )  # fmt: skip
        listens(self.process, d / "own.qmp", log)
        self.qmp = until(lambda: first(d / "own.qmp"), "the daemon's monitor")

    def end(self) -> None:
        """All of it."""
        self.stand_still(False)
        self.close()
        stop(self.storage)

    def stand_still(self, still: bool) -> None:
        """The storage of vda answers no more, or goes on."""
        self.storage.send_signal(signal.SIGSTOP if still else signal.SIGCONT)

    def close(self) -> None:
        """The daemon ends, and leaves no sockets."""
        self.qmp.close()
        stop(self.process)
        for name in ("qsd.qmp", "own.qmp", "guest.sock"):
            (self.directory / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def guest(self, disk: str = "vda") -> Iterator[nbd.NBD]:
        """What plays the guest."""
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///{disk}?socket={self.directory}/guest.sock")
        try:
            yield handle
        finally:
            handle.shutdown()

    def write(self, data: bytes, offset: int, disk: str = "vda") -> None:
        with self.guest(disk) as handle:
            handle.pwrite(data, offset)

    def content(self, disk: str = "vda") -> bytes:
        with self.guest(disk) as handle:
            return bytes(handle.pread(handle.get_size(), 0))

    def job(self) -> dict[str, Any] | None:
        """A job of ours."""
        jobs = [dict(job) for job in self.qmp.call("query-jobs") if job["id"].startswith("cdp-")]
        return jobs[0] if jobs else None

    def ours(self) -> list[str]:
        """Jobs and nodes of ours that QEMU has."""
        names = [job["id"] for job in self.qmp.call("query-jobs")]
        names += [node["node-name"] for node in self.qmp.call("query-named-block-nodes")]
        return [name for name in names if name.startswith("cdp-")]

    def bitmaps(self, node: str = "vda") -> list[str]:
        nodes = self.qmp.call("query-named-block-nodes")
        return sorted(b["name"] for n in nodes if n["node-name"] == node for b in n.get("dirty-bitmaps", []))


@pytest.fixture
def qemu(short_path: Path) -> Iterator[Disks]:
    running = Disks(short_path)
    try:
        yield running
    finally:
        running.end()


@pytest.fixture(autouse=True)
def place(short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Sockets and caches of ours in the test's own directory, and a repository."""
    in_its_own(short_path, monkeypatch)
    cdp(capsys, "repo", "init", short_path / "repo", "--chunk-size", "64K")


def in_its_own(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets, caches and the repository are in that directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "xdg"))
    monkeypatch.setenv("CDP_REPO", str(directory / "repo"))


def cdp(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command answers in JSON."""
    options = cli.parse([*map(str, arguments), "--json"])
    assert not options.run(options)
    return json.loads(capsys.readouterr().out)


def command(qemu: Disks, *more: object) -> list[object]:
    return ["backup", "run", "web", "--qmp", qemu.monitor, "--disk", "vda", *more]


@contextlib.contextmanager
def started(qemu: Disks, *more: object) -> Iterator["subprocess.Popen[str]"]:
    """A run in a process of its own."""
    words = [sys.executable, "-m", "recovery.cli", *map(str, command(qemu, *more))]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def backed_up(disk: str, id_: str = "") -> bytes:
    """What a backup has of a disk; of the newest one, if none is named."""
    with Repository(open_place(os.environ["CDP_REPO"])) as repository:
        found = repository.backup(id_ or repository.backup_ids()[-1]).disk(disk)
        assert found is not None
        return Content(repository, found).read(0, found.size)


def test_full_then_what_changed(qemu: Disks, capsys: pytest.CaptureFixture[str]) -> None:
    """Only used data is sent; a block that was overwritten, one that was discarded, and nothing at all."""
    qemu.write(os.urandom(3 * MIB), MIB)
    contents = {}
    made = cdp(capsys, *command(qemu))
    contents[made["id"]] = qemu.content()
    assert (made["kind"], made["reason"]) == ("full", "there is no backup of it in this repository")
    assert (made["read_bytes"], made["new_bytes"], made["disks"][0]["name"]) == (3 * MIB, 3 * MIB, "web/vda")
    assert made["stored_bytes"] >= 3 * MIB
    qemu.write(os.urandom(4096), 6 * MIB)
    with qemu.guest() as guest:
        guest.trim(MIB, 2 * MIB)
    again = cdp(capsys, *command(qemu))
    contents[again["id"]] = qemu.content()
    assert (again["kind"], again["parent"], again["read_bytes"], again["new_bytes"]) == (
        "incremental", made["id"], CHUNK, CHUNK,
    )  # fmt: skip
    assert made["id"] in again["reason"]
    assert cdp(capsys, *command(qemu))["read_bytes"] == 0
    for id_, content in contents.items():
        assert backed_up("vda", id_) == content
    assert backed_up("vda") == qemu.content()
    assert qemu.ours() == []
    assert len(qemu.bitmaps()) == 1
    assert cdp(capsys, "repo", "check", os.environ["CDP_REPO"])["sound"]


def test_all_disks_are_of_one_instant(qemu: Disks, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest numbers its writes, on one disk and then on the other, while the jobs run."""
    both = ("--disk", "vdb")
    for disk in ("vda", "vdb"):
        qemu.write(os.urandom(2 * MIB), MIB, disk)
    ended = threading.Event()
    numbers = [0]

    def write() -> None:
        with qemu.guest("vda") as first_disk, qemu.guest("vdb") as second_disk:
            dice = random.Random(5)
            while not ended.is_set():
                numbers[0] += 1
                for disk in (first_disk, second_disk):
                    disk.pwrite(numbers[0].to_bytes(8, "little") * 512, 0)
                    disk.pwrite(dice.randbytes(4096), MIB + dice.randrange(64) * 4096)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until(lambda: numbers[0], "the guest's first write")
        for kind in ("full", "incremental"):
            assert cdp(capsys, *command(qemu, *both))["kind"] == kind
            one, other = (int.from_bytes(backed_up(disk)[:8], "little") for disk in ("vda", "vdb"))
            assert other <= one <= other + 1
    finally:
        ended.set()
        thread.join()
    assert cdp(capsys, *command(qemu, *both))["kind"] == "incremental"
    for disk in ("vda", "vdb"):
        assert backed_up(disk) == qemu.content(disk)


def test_a_qemu_that_was_started_anew(qemu: Disks, capsys: pytest.CaptureFixture[str]) -> None:
    """Its bitmaps are lost: a full one, and incremental ones from there on."""
    qemu.write(os.urandom(3 * MIB), MIB)
    cdp(capsys, *command(qemu))
    qemu.close()
    qemu.start()
    qemu.write(os.urandom(4096), 5 * MIB)
    made = cdp(capsys, *command(qemu))
    assert (made["kind"], backed_up("vda")) == ("full", qemu.content())
    assert "was started anew" in made["reason"]
    assert made["new_bytes"] == CHUNK
    qemu.write(os.urandom(4096), 6 * MIB)
    assert cdp(capsys, *command(qemu))["parent"] == made["id"]
    assert backed_up("vda") == qemu.content()


def test_what_a_killed_run_left_counts_for_nothing(qemu: Disks, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed between QEMU's end and the commit, and after the commit: the repository says which bitmap counts."""
    prefix = prefix_of(bytes.fromhex(cdp(capsys, "repo", "show", os.environ["CDP_REPO"])["id"]))
    qemu.write(os.urandom(2 * MIB), 0)
    made = cdp(capsys, *command(qemu))
    qemu.write(b"a" * 4096, 4 * MIB)
    qemu.qmp.call("block-dirty-bitmap-add", node="vda", name=f"{prefix}20991122T201805.250000Z-0badcafe")
    qemu.qmp.call("block-dirty-bitmap-add", node="vda", name="somebody-else")
    qemu.write(b"b" * 4096, 5 * MIB)
    again = cdp(capsys, *command(qemu))
    assert (again["parent"], backed_up("vda")) == (made["id"], qemu.content())
    qemu.qmp.call("block-dirty-bitmap-add", node="vda", name=prefix + made["id"])
    qemu.write(b"c" * 4096, 6 * MIB)
    third = cdp(capsys, *command(qemu))
    assert (third["parent"], backed_up("vda")) == (again["id"], qemu.content())
    assert qemu.bitmaps() == [prefix + third["id"], "somebody-else"]


def child(parent: int, name: str) -> int:
    """The pid of a process's child, whichever of its threads started it."""
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return int(pid)
    raise LookupError(name)


@pytest.mark.parametrize("victim", ["cdp", "target", "job", "hung"])
def test_killed_on_the_way(qemu: Disks, capsys: pytest.CaptureFixture[str], victim: str) -> None:
    """No half backup, no error for the guest; the next one is incremental, and right. A target that hangs is killed."""
    qemu.write(os.urandom(3 * MIB), 0)
    before = cdp(capsys, *command(qemu))["id"]
    qemu.write(os.urandom(MIB), 4 * MIB)
    qemu.stand_still(True)
    with started(qemu) as process:
        job = until(qemu.job, "its job")
        if victim == "job":
            qemu.qmp.call("job-cancel", id=job["id"])
        else:
            number = signal.SIGSTOP if victim == "hung" else signal.SIGKILL
            os.kill(process.pid if victim == "cdp" else child(process.pid, "nbdkit"), number)
        qemu.stand_still(False)
        # What is marked, and not sent yet: what is there must be sent before it is overwritten.
        guest = threading.Thread(target=qemu.write, args=(os.urandom(CHUNK), 5 * MIB - CHUNK), daemon=True)
        guest.start()
        guest.join(300)
        assert not guest.is_alive(), "the guest is held up"
        said = process.communicate(timeout=120)[1]
    assert process.returncode == (-signal.SIGKILL if victim == "cdp" else BrokenError.exit_code), said
    if victim != "cdp":
        assert qemu.ours() == []
        assert [name.endswith(before) for name in qemu.bitmaps()] == [True]
    if victim == "hung":
        assert "said nothing for" in said
    assert [row["id"] for row in cdp(capsys, "backup", "list")] == [before]
    made = cdp(capsys, *command(qemu))
    assert (made["kind"], made["parent"]) == ("incremental", before)
    assert backed_up("vda") == qemu.content()
    assert backed_up("vda", before) != qemu.content()
    assert qemu.ours() == []
    assert cdp(capsys, "repo", "check", os.environ["CDP_REPO"])["sound"]


def test_who_runs_it_stands_still(qemu: Disks, capsys: pytest.CaptureFixture[str]) -> None:
    """The guest does not wait for that: its writes are taken, and the backup is what there was when it began."""
    qemu.write(os.urandom(3 * MIB), 0)
    content = qemu.content()
    qemu.stand_still(True)
    with started(qemu) as process:
        until(qemu.job, "its job")
        process.send_signal(signal.SIGSTOP)
        qemu.stand_still(False)
        guest = threading.Thread(target=qemu.write, args=(os.urandom(3 * MIB), 0), daemon=True)
        guest.start()
        guest.join(300)
        assert not guest.is_alive(), "the guest is held up"
        with pytest.raises(RefusedError, match="another process backs up this VM"):
            cdp(capsys, *command(qemu))
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert backed_up("vda") == content
    assert cdp(capsys, *command(qemu))["kind"] == "incremental"
    assert backed_up("vda") == qemu.content()
    assert qemu.ours() == []


def test_a_repository_that_is_full(qemu: Disks, short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No half backup, and the guest sees nothing; with room the next one is incremental, and right."""
    qemu.write(os.urandom(MIB), 0)
    repo = short_path / "small"
    repo.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", repo], check=True)
    try:
        cdp(capsys, "repo", "init", repo, "--chunk-size", "64K")
        before = cdp(capsys, *command(qemu, "--repo", repo))["id"]
        qemu.write(os.urandom(5 * MIB), MIB)
        with pytest.raises(NoSpaceError):
            cdp(capsys, *command(qemu, "--repo", repo))
        assert qemu.ours() == []
        assert [row["id"] for row in cdp(capsys, "backup", "list", "--repo", repo)] == [before]
        subprocess.run(["mount", "-o", "remount,size=32m", repo], check=True)
        made = cdp(capsys, *command(qemu, "--repo", repo))
        assert (made["kind"], made["parent"]) == ("incremental", before)
        assert [name.endswith(made["id"]) for name in qemu.bitmaps()] == [True]
        with Repository(open_place(str(repo))) as repository:
            found = repository.backup(made["id"]).disk("vda")
            assert found is not None
            assert Content(repository, found).read(0, found.size) == qemu.content()
        assert cdp(capsys, "repo", "check", repo)["sound"]
    finally:
        subprocess.run(["umount", repo], check=True)


@contextlib.contextmanager
def far_away(directory: Path, mount: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`directory` at `mount`, through a file server that can be made to stand still: whoever asks is held in the kernel then."""
    mount.mkdir()
    server = subprocess.Popen(
        ["/usr/lib/openssh/sftp-server", "-d", directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdin is not None and server.stdout is not None
    client = subprocess.Popen(
        ["sshfs", "-f", "-o", "passive", ":", mount], stdin=server.stdout, stdout=server.stdin
    )
    for pipe in (server.stdin, server.stdout):
        pipe.close()
    try:
        until(lambda: client.poll() is not None or mount.is_mount(), "mount")
        yield server
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "-l", mount], check=True)
        for process in (client, server):
            process.kill()
            process.wait()


def test_a_repository_that_hangs(qemu: Disks, short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The guest goes on, and QEMU is rid of it when the command is told to end, though the target cannot even be killed."""
    (short_path / "nas").mkdir()
    repo = short_path / "there" / "repo"
    with far_away(short_path / "nas", short_path / "there") as server:
        cdp(capsys, "repo", "init", repo, "--chunk-size", "64K")
        qemu.write(os.urandom(MIB), 0)
        before = cdp(capsys, *command(qemu, "--repo", repo))["id"]
        qemu.write(os.urandom(3 * MIB), MIB)
        qemu.stand_still(True)
        with started(qemu, "--repo", repo) as process:
            until(qemu.job, "its job")
            server.send_signal(signal.SIGSTOP)
            qemu.stand_still(False)
            guest = threading.Thread(target=qemu.write, args=(os.urandom(MIB), 2 * MIB), daemon=True)
            guest.start()
            guest.join(300)
            assert not guest.is_alive(), "the guest is held up"
            until(lambda: qemu.job() is None, "all that is sent", seconds=120)
            process.send_signal(signal.SIGINT)
            until(lambda: qemu.ours() == [], "the end of it in QEMU", seconds=120)
            server.send_signal(signal.SIGCONT)
            process.communicate(timeout=120)
        assert process.returncode not in (0, None)
        assert [row["id"] for row in cdp(capsys, "backup", "list", "--repo", repo)] == [before]
        made = cdp(capsys, *command(qemu, "--repo", repo))
        assert (made["kind"], made["parent"]) == ("incremental", before)
        with Repository(open_place(str(repo))) as repository:
            found = repository.backup(made["id"]).disk("vda")
            assert found is not None
            assert Content(repository, found).read(0, found.size) == qemu.content()


def test_jobs_pause_while_the_target_has_much_to_do(qemu: Disks) -> None:
    """Asked to pause before they can have ended, and seen paused before they may go on."""
    qemu.write(os.urandom(MIB), 0)
    qemu.stand_still(True)
    seen: list[str] = []

    async def look() -> bool:
        seen.append(qemu.qmp.call("query-jobs")[0]["status"])
        if len(seen) == 2:  # the first answer was that there is much
            qemu.stand_still(False)
        return seen[-1] != "paused"

    async def follow(monitor: Monitor) -> list[int]:
        jobs, disk = Jobs(monitor, "cdp-backup-0-"), LiveDisk("web/vda", "vda", SIZE, 0, {})
        await jobs.open_target(0, disk, {"driver": "null-co", "size": SIZE})
        await jobs.start([disk], "this", "", granularity=CHUNK)
        sent = await jobs.follow(look, lambda done, total: None)
        await jobs.clean()
        await jobs.forget(lambda backup: backup == "this")
        return sent

    assert over(qemu.monitor, follow) == [SIZE]
    assert "paused" in seen
    assert qemu.ours() == [] and qemu.bitmaps() == []


def test_qemu_killed_on_the_way(qemu: Disks, capsys: pytest.CaptureFixture[str]) -> None:
    qemu.write(os.urandom(3 * MIB), 0)
    qemu.stand_still(True)
    with started(qemu) as process:
        until(qemu.job, "its job")
        qemu.process.kill()
        said = process.communicate(timeout=120)[1]
    assert process.returncode in (BrokenError.exit_code, UnreachableError.exit_code), said
    qemu.close()
    qemu.stand_still(False)
    assert cdp(capsys, "backup", "list") == []
    with pytest.raises(UnreachableError, match="no QEMU listens"):
        cdp(capsys, *command(qemu))
    qemu.start()
    assert cdp(capsys, *command(qemu))["kind"] == "full"
    assert backed_up("vda") == qemu.content()


def test_what_is_refused(qemu: Disks, short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> CdpError:
        with pytest.raises(CdpError) as caught:
            cdp(capsys, *words)
        return caught.value

    run = ("backup", "run", "web", "--qmp", qemu.monitor)
    assert "choose with --disk" not in str(refused(*run, "--disk", "vdx"))
    assert "choose with --disk: " in refused(*run).hint
    assert isinstance(refused("backup", "run", "web"), UsageError)
    assert "as it is now" in str(refused("backup", "run", "web@latest", "--qmp", qemu.monitor))
    assert "two monitors" in str(refused(*run, "--libvirt", "qemu:///system"))
    assert "which guest agent" in str(refused(*run, "--disk", "vda", "--freeze"))
    assert "--freeze goes with --qmp" in str(refused("backup", "run", "d@latest", "--freeze"))
    agent = ("--disk", "vda", "--freeze", "--agent", short_path / "nobody")
    assert "no guest agent" in str(refused(*run, *agent))
    made = cdp(capsys, *run, *agent, "--or-crash")
    assert made["grade"] == "crash" and "no guest agent" in made["not_frozen"]
    assert qemu.ours() == []
    assert len(cdp(capsys, "backup", "list")) == 1


def test_a_machine(short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its disks are known without being named; a guest's own reboot keeps the bitmap, a disk that grew makes a full one."""
    with Machine(short_path, SIZE, format="qcow2") as machine:
        run = ("backup", "run", "vm", "--qmp", machine.monitor2)
        machine.io("write -P 1 0 2M")
        assert cdp(capsys, *run)["disks"][0]["name"] == "vm/drive0"
        machine.io("write -P 2 4M 64k")
        machine.qmp.call("system_reset")
        made = cdp(capsys, *run)
        assert (made["kind"], made["read_bytes"]) == ("incremental", CHUNK)
        content = b"\1" * 2 * MIB + bytes(2 * MIB) + b"\2" * CHUNK + bytes(4 * MIB - CHUNK)
        assert backed_up("drive0") == content
        machine.qmp.call("block_resize", device="drive0", size=SIZE + MIB)
        made = cdp(capsys, *run)
        assert (made["kind"], made["new_bytes"]) == ("full", 0)
        assert "was resized" in made["reason"]
        assert backed_up("drive0") == content + bytes(MIB)


class Sshd:
    """A host to log in to on loopback, by a key of its own: this machine, as whoever runs the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for key in ("host", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.log = directory / "sshd.log"
        self._listen()
        # A port that was free may be another program's by now.
        while until(self._up_or_ended, "the ssh server") == "ended":
            assert b"Address already in use" in self.log.read_bytes(), self.log.read_text()
            self._listen()

    def _listen(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        d = self.directory
        (d / "sshd.conf").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {d}/host\nPidFile none\n"
            f"AuthorizedKeysFile {d}/key.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        )
        self.log.write_bytes(b"")
        self.process = start(["/usr/sbin/sshd", "-D", "-e", "-f", d / "sshd.conf"], self.log)

    def _up_or_ended(self) -> str:
        if self.process.poll() is not None:
            return "ended"
        with socket.socket() as client:
            return "up" if client.connect_ex(("127.0.0.1", self.port)) == 0 else ""

    @property
    def ssh(self) -> str:
        return (
            f"ssh -F none -p {self.port} -i {self.directory}/key -o BatchMode=yes -o StrictHostKeyChecking=no"
            f" -o UserKnownHostsFile={self.directory}/known"
        )


@pytest.fixture
def sshd(short_path: Path) -> Iterator[Sshd]:
    (short_path / "ssh").mkdir()
    running = Sshd(short_path / "ssh")
    try:
        yield running
    finally:
        stop(running.process)


def mounts() -> list[str]:
    return [line for line in Path("/proc/mounts").read_text().splitlines() if "/cdp-sshfs-" in line]


def test_over_sshfs(qemu: Disks, sshd: Sshd, short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU's jobs write QCOW2 files on a mount; a link that is cut costs the backup, and nobody else anything."""
    before = mounts()
    over = ("--sshfs", "127.0.0.1", "--ssh", sshd.ssh, "--staging", short_path / "staging", "--disk", "vdb")
    qemu.write(os.urandom(2 * MIB), MIB)
    qemu.write(os.urandom(MIB), 3 * MIB, "vdb")
    made = cdp(capsys, *command(qemu, *over))
    assert (made["kind"], made["read_bytes"], len(made["disks"])) == ("full", 3 * MIB, 2)
    qemu.write(os.urandom(4096), 6 * MIB, "vdb")
    with qemu.guest() as guest:
        guest.trim(MIB, MIB)
    made = cdp(capsys, *command(qemu, *over))
    assert (made["kind"], made["read_bytes"]) == ("incremental", CHUNK)
    for disk in ("vda", "vdb"):
        assert backed_up(disk) == qemu.content(disk)
    qemu.write(os.urandom(4096), 4 * MIB)
    qemu.stand_still(True)
    with started(qemu, *over) as process:
        until(qemu.job, "its job")
        assert len(mounts()) == len(before) + 2, "one for each disk"
        os.kill(child(process.pid, "ssh"), signal.SIGKILL)
        qemu.stand_still(False)
        qemu.write(os.urandom(CHUNK), MIB)
        said = process.communicate(timeout=120)[1]
    assert "sshfs link" in said
    assert process.returncode == BrokenError.exit_code
    assert cdp(capsys, *command(qemu, *over))["parent"] == made["id"]
    for disk in ("vda", "vdb"):
        assert backed_up(disk) == qemu.content(disk)
    assert qemu.ours() == [] and list((short_path / "staging").iterdir()) == []
    until(lambda: mounts() == before, "the end of the mounts")


def test_a_domain_of_libvirt(short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through libvirt's monitor; its disk goes by its target's name."""
    make_image(short_path / "web.qcow2", SIZE, "qcow2")
    with Libvirtd(short_path) as daemon:
        daemon.define("web", short_path / "web.qcow2")
        daemon.io("web", "write -P 1 0 2M")
        run = ("backup", "run", "mail", "--libvirt", daemon.uri, "--domain", "web")
        made = cdp(capsys, *run)
        assert (made["kind"], made["disks"][0]["name"]) == ("full", "mail/vda")
        daemon.io("web", "write -P 2 4M 64k")
        made = cdp(capsys, *run)
        assert (made["kind"], made["read_bytes"]) == ("incremental", CHUNK)
        said = daemon.virsh("qemu-monitor-command", "web", '{"execute":"query-named-block-nodes"}')
        assert not [n for n in json.loads(said)["return"] if n["node-name"].startswith("cdp-")]
    assert backed_up("vda") == b"\1" * 2 * MIB + bytes(2 * MIB) + b"\2" * CHUNK + bytes(4 * MIB - CHUNK)


def test_whose_a_domain_is() -> None:
    label = "<domain><seclabel type='dynamic' model='{}'><label>{}</label></seclabel></domain>"
    assert user_of(label.format("dac", "+64055:+108")) == 64055
    assert user_of(label.format("dac", "qemu:kvm")) is None
    assert user_of(label.format("apparmor", "+1:+1")) is None
