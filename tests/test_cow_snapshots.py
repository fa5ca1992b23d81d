"""COW snapshots of a running QEMU's raw disks: what they hold while the guest writes on, what is left when something fails."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from cdpserver.vm.chain import cownodes
from recovery import cli
from tools.kit.processes import listens, run, start, stop, until, why_no_mount
from tools.kit.qmp import Qmp, QmpError

MIB = 1 << 20
SIZE = 16 * MIB


class Daemon:
    """A qemu-storage-daemon that exports two raw disks, each from a raw node on a file without a name of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.monitor, self.socket = directory / "q", directory / "n"
        self.monitor.unlink(missing_ok=True)
        command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={self.socket}"]
        for disk in ("vda", "vdb"):
            path = directory / disk / "root.raw"
            if not path.exists():
                path.parent.mkdir()
                run("truncate", "-s", str(SIZE), path)
            file = {"driver": "file", "filename": str(path), "discard": "unmap"}
            node = {"driver": "raw", "node-name": f"{disk}-0", "discard": "unmap", "file": file}
            command += ["--blockdev", json.dumps(node)]
            command += ["--export", f"type=nbd,id={disk},node-name={disk}-0,name={disk},writable=on"]
        command += [
            "--chardev",
            f"socket,id=m,path={self.monitor},server=on,wait=off",
            "--monitor",
            "chardev=m",
        ]
        self.process = start(command, directory / "log")
        listens(self.process, self.monitor, directory / "log")

    def uri(self, disk: str) -> str:
        """What the guest has open."""
        return f"nbd+unix:///{disk}?socket={self.socket}"

    def write(self, disk: str, *parts: str) -> None:
        """As the guest does: `0x11 0 1M`."""
        commands = [word for part in parts for word in ("-c", f"write -P {part}")]
        run("qemu-io", "-f", "raw", *commands, "-c", "flush", self.uri(disk))

    @property
    def at(self) -> list[str]:
        """Arguments of every command."""
        return ["--qmp", str(self.monitor), "--nbd-socket", str(self.socket)]

    def nodes(self) -> set[str]:
        """Names of QEMU's nodes, those that it named itself left out."""
        with Qmp(self.monitor) as qmp:
            found = qmp.call("query-named-block-nodes", flat=True)
        return {node["node-name"] for node in found if not node["node-name"].startswith("#")}


@pytest.fixture
def daemon(short_path: Path) -> Iterator[Daemon]:
    """Both disks in a running daemon."""
    made = Daemon(short_path)
    yield made
    stop(made.process)


@pytest.fixture
def cdp(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`cdp snapshot live`: its answer, or with `fails` what it says on stderr."""

    def call(*arguments: str, fails: int = 0) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["cdp", "snapshot", "live", *arguments, "--json"])
            status = cli.main()
        said = capsys.readouterr()
        assert status == fails, said.err
        return said.err if fails else json.loads(said.out)

    return call


def holds(image: str | Path, *parts: str, format: str = "raw") -> None:
    """What is read there by a stock tool: `0x11 0 1M`."""
    commands = [word for part in parts for word in ("-c", f"read -P {part}")]
    done = run("qemu-io", "-r", "-f", format, *commands, str(image))
    assert "verification failed" not in done.stdout


def of_active(value: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, name) of what stands on the disk."""
    (active,) = value["children"]
    assert active["kind"] == "active" and active["name"] == "root.raw"
    return [(child["kind"], child["name"]) for child in active["children"]]


def test_snapshots_hold_what_was_there_in_whatever_order_they_go(
    daemon: Daemon, cdp: Callable[..., Any]
) -> None:
    disk = daemon.directory / "vda"
    before = daemon.nodes()
    daemon.write("vda", "1 0 4M")
    made = [cdp("create", "web", "--cow", "--disk", "vda", "--name", "a", *daemon.at)[0]]
    daemon.write("vda", "2 0 3M")
    made.append(cdp("create", "web", "--cow", "--disk", "vda", "--name", "b", *daemon.at)[0])
    daemon.write("vda", "3 0 2M")
    made.append(cdp("create", "web", "--cow", "--disk", "vda-0", "--name", "c", *daemon.at)[0])
    daemon.write("vda", "4 0 1M")
    assert [one["snapshots"] for one in made] == [1, 2, 3]
    held = {
        "a": ("1 0 4M", "0 4M 12M"),
        "b": ("2 0 3M", "1 3M 1M", "0 4M 12M"),
        "c": ("3 0 2M", "2 2M 1M", "1 3M 1M"),
    }
    for one in made:
        holds(one["uri"], *held[one["snapshot"]])
    value = cdp("tree", "web", "--disk", "vda", *daemon.at)
    assert of_active(value) == [("cow", "c"), ("cow", "b"), ("cow", "a")]
    shown = value["children"][0]["children"]
    assert [child["time_ns"] for child in reversed(shown)] == [one["time_ns"] for one in made]
    assert value["size_bytes"] > sum(child["size_bytes"] for child in shown) >= 6 * MIB
    # A reader keeps it; the middle one goes first, then the outermost.
    reader = nbd.NBD()
    reader.connect_uri(made[1]["uri"])
    assert "b is being read" in cdp("delete", "web", "b", "--disk", "vda", "--yes", *daemon.at, fails=3)
    reader.shutdown()
    until(lambda: _clients_gone(daemon.monitor, made), "end of the reader")
    for name in ("b", "c"):
        said = cdp("delete", "web", name, "--disk", "vda", "--yes", *daemon.at)
        assert said["removed"] == [name] and said["freed_bytes"] > 0
    daemon.write("vda", "5 0 4M")
    holds(made[0]["uri"], *held["a"])
    # As files of their own, which stay.
    for format in ("raw", "qcow2"):
        output = daemon.directory / f"saved.{format}"
        said = cdp(
            "save", "web", "a", "--disk", "vda", "--output", str(output), "--format", format, *daemon.at
        )
        assert said["time_ns"] == made[0]["time_ns"] and said["size"] == SIZE
    assert "exists" in cdp("save", "web", "a", "--disk", "vda", "--output", str(output), *daemon.at, fails=2)
    assert "no COW snapshot 'x' (it has a)" in cdp(
        "save", "web", "x", "--disk", "vda", "--output", "y", *daemon.at, fails=2
    )
    cdp("delete", "web", "a", "--disk", "vda", "--yes", *daemon.at)
    assert daemon.nodes() == before and sorted(path.name for path in disk.iterdir()) == ["root.raw"]
    daemon.write("vda", "6 0 64k")
    holds(daemon.uri("vda"), "6 0 64k", "5 64k 4032k")
    for format in ("raw", "qcow2"):
        holds(daemon.directory / f"saved.{format}", *held["a"], format=format)


def _clients_gone(monitor: Path, made: list[dict[str, Any]]) -> bool:
    """QEMU has seen that nobody reads these exports: by its own answer to an end of each, which is then begun anew."""
    with Qmp(monitor) as qmp:
        there = {export["id"] for export in qmp.call("query-block-exports")}
        for name in (one["uri"].removeprefix("nbd+unix:///").partition("?")[0] for one in made):
            if name not in there:
                continue
            try:
                qmp.call("block-export-del", id=name)
            except QmpError:
                return False
            qmp.wait("BLOCK_EXPORT_DELETED")
            node = name.replace("cow", "snap")
            qmp.call("block-export-add", type="nbd", id=name, node_name=node, name=name)
    return True


def test_two_disks_are_cut_at_one_instant(daemon: Daemon, cdp: Callable[..., Any]) -> None:
    """A guest writes each number to the one disk and then to the other."""
    ends, started, over = [nbd.NBD(), nbd.NBD()], threading.Event(), threading.Event()
    for end, disk in zip(ends, ("vda", "vdb"), strict=True):
        end.connect_uri(daemon.uri(disk))
    failed: list[BaseException] = []

    def write() -> None:
        try:
            number = 0
            while not over.is_set():
                number += 1
                for end in ends:
                    end.pwrite(number.to_bytes(8, "big") * 64, 0)
                started.set()
        except BaseException as error:  # noqa: BLE001 - the test says it
            failed.append(error)

    guest = threading.Thread(target=write)
    guest.start()
    try:
        assert started.wait(60)
        for name in ("a", "b", "c"):
            made = cdp("create", "web", "--cow", "--disk", "vda", "--disk", "vdb", "--name", name, *daemon.at)
            numbers = [_number(one["uri"]) for one in made]
            assert numbers[0] - 1 <= numbers[1] <= numbers[0] and numbers[1] > 0
            assert [_number(one["uri"]) for one in made] == numbers
    finally:
        over.set()
        guest.join()
    assert not failed


def _number(uri: str) -> int:
    end = nbd.NBD()
    end.connect_uri(uri)
    data = end.pread(512, 0)
    end.shutdown()
    assert data == data[:8] * 64
    return int.from_bytes(data[:8], "big")


def test_what_cannot_be_is_refused_and_leaves_nothing(
    daemon: Daemon, cdp: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, at = daemon.nodes(), daemon.at
    qmp = ["--qmp", str(daemon.monitor)]
    assert "say it: --nbd-socket" in cdp("create", "web", "--cow", "--disk", "vda", *qmp, fails=3)
    # A socket beside the monitor that a killed QEMU has left is nobody's.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(daemon.directory / "q.nbd"))
    assert "say it: --nbd-socket" in cdp("create", "web", "--cow", "--disk", "vda", *qmp, fails=3)
    assert "is of COW snapshots" in cdp("create", "web", "--disk", "vda", *at, fails=2)
    assert "named twice" in cdp("create", "web", "--cow", "--disk", "vda", "--disk", "vda-0", *at, fails=2)
    (daemon.directory / "vdb" / "root.cow-x.qcow2").touch()
    assert "root.cow-x.qcow2 exists" in cdp(
        "create", "web", "--cow", "--disk", "vda", "--disk", "vdb", "--name", "x", *at, fails=2
    )
    # The export of its disk lies directly on a file.
    with Qmp(daemon.monitor) as monitor:
        bare = str(daemon.directory / "bare")
        run("truncate", "-s", "1M", bare)
        monitor.call("blockdev-add", driver="file", node_name="bare", filename=bare)
        monitor.call("block-export-add", type="nbd", id="bare", node_name="bare", writable=True)
        image = daemon.directory / "image.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
        monitor.call(
            "blockdev-add", driver="qcow2", node_name="image", file={"driver": "file", "filename": str(image)}
        )
    assert "driver=raw,node-name=N" in cdp("create", "web", "--cow", "--disk", "bare", *at, fails=3)
    assert "snapshots of its own (leave --cow out" in cdp(
        "create", "web", "--cow", "--disk", "image", *at, fails=3
    )
    # QEMU refuses half-way: what it had been given by then goes.
    with Qmp(daemon.monitor) as monitor:
        for export in ("bare", "vda", "vdb"):
            monitor.call("block-export-del", id=export)
            monitor.wait("BLOCK_EXPORT_DELETED")
        monitor.call("nbd-server-stop")
    assert "NBD server" in cdp("create", "web", "--cow", "--disk", "vda-0", *at, fails=3)
    assert daemon.nodes() == before | {"bare", "image"}
    assert sorted(path.name for path in (daemon.directory / "vda").iterdir()) == ["root.raw"]
    # Without one, QEMU gets a server beside its monitor, which ends with the last snapshot.
    own = daemon.directory / "q.nbd"
    monkeypatch.setattr(cownodes, "MAX_COW", 2)
    for name in ("m", "n"):
        (one,) = cdp("create", "web", "--cow", "--disk", "vda-0", "--name", name, *qmp)
        assert one["uri"].endswith(f"?socket={own}")
    assert "has 2 COW snapshots, of 2 at most" in cdp(
        "create", "web", "--cow", "--disk", "vda-0", *qmp, fails=3
    )
    for name in ("m", "n"):
        assert own.exists()
        cdp("delete", "web", name, "--disk", "vda-0", "--yes", *qmp)
    assert not own.exists()


def test_a_killed_qemu_leaves_files_that_the_tree_shows(
    daemon: Daemon, cdp: Callable[..., Any], short_path: Path
) -> None:
    daemon.write("vda", "1 0 1M")
    cdp("create", "web", "--cow", "--disk", "vda", "--name", "a", *daemon.at)
    daemon.write("vda", "2 0 1M")
    daemon.process.kill()
    assert daemon.process.wait() == -signal.SIGKILL
    again = Daemon(short_path)
    try:
        holds(again.uri("vda"), "2 0 1M")
        assert of_active(cdp("tree", "web", "--disk", "vda", *again.at)) == [("left", "a")]
        assert "root.cow-a.qcow2 exists" in cdp(
            "create", "web", "--cow", "--disk", "vda", "--name", "a", *again.at, fails=2
        )
        cdp("delete", "web", "a", "--disk", "vda", "--yes", *again.at)
        assert of_active(cdp("tree", "web", "--disk", "vda", *again.at)) == []
        # A command that was killed before the filter was in.
        half = again.directory / "vda" / "root.cow-h.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", half, str(SIZE))
        with Qmp(again.monitor) as qmp:
            file = {"driver": "file", "filename": str(half)}
            node = f"cdp-tmp-{cownodes.new_token(1)}"
            qmp.call("blockdev-add", driver="qcow2", node_name=node, file=file)
        assert of_active(cdp("tree", "web", "--disk", "vda", *again.at)) == [("left", "h")]
        cdp("delete", "web", "h", "--disk", "vda", "--yes", *again.at)
        assert not half.exists() and not [node for node in again.nodes() if node.startswith("cdp-")]
        assert "no image 'a'" in cdp("delete", "web", "a", "--disk", "vda", "--yes", *again.at, fails=2)
    finally:
        stop(again.process)


@pytest.mark.skipif(bool(why_no_mount()), reason=why_no_mount())
def test_a_block_device_needs_a_directory(short_path: Path, cdp: Callable[..., Any]) -> None:
    """As a logical volume is one."""
    image, aside = short_path / "image", short_path / "aside"
    run("truncate", "-s", str(SIZE), image)
    aside.mkdir()
    device = run("losetup", "--find", "--show", image).stdout.strip()
    try:
        drive = f"driver=raw,node-name=d0,file.driver=host_device,file.filename={device}"
        with machine(short_path, "-blockdev", drive, "-device", "virtio-blk-pci,drive=d0,id=vd0") as monitor:
            at = ["--qmp", str(monitor), "--disk", "vd0", "--name", "a"]
            assert "name one with --directory" in cdp("create", "web", "--cow", *at, fails=2)
            (one,) = cdp("create", "web", "--cow", *at, "--directory", str(aside))
            with Qmp(monitor) as qmp:
                qdev = qmp.call("query-block")[0]["qdev"]
                qmp.call("human-monitor-command", command_line=f'qemu-io -d {qdev} "write -P 7 0 64k"')
            holds(one["uri"], "0 0 1M")
            until(lambda: _clients_gone(monitor, [one]), "end of the reader")
            cdp("delete", "web", "a", "--yes", *at[:4])
            assert os.listdir(aside) == []
        holds(device, "7 0 64k")
    finally:
        run("losetup", "-d", device)


@contextlib.contextmanager
def machine(directory: Path, *arguments: str) -> Iterator[Path]:
    """A VM; its monitor's socket."""
    monitor, log = directory / "m", directory / "log"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-qmp", f"unix:{monitor},server=on,wait=off", *arguments]
    process = start(command, log)
    try:
        listens(process, monitor, log)
        yield monitor
    finally:
        stop(process)


FILE = "driver=file,filename={disk}"
RAW = "driver=raw,node-name=d0,file.driver=file,file.filename={disk}"


@pytest.mark.parametrize(
    ("drive", "mirrored"),
    [
        (("-blockdev", RAW), True),
        (("-blockdev", f"{FILE},node-name=d0"), False),
        (("-drive", "file={disk},format=raw,if=none,id=d0"), False),
    ],
)
def test_a_vm(short_path: Path, cdp: Callable[..., Any], drive: tuple[str, str], mirrored: bool) -> None:
    """Through its raw node, also while a mirror runs, or else by an exchange of what the device has open."""
    disk = short_path / "root.raw"
    run("truncate", "-s", str(SIZE), disk)
    arguments = [part.format(disk=disk) for part in drive]
    with machine(short_path, *arguments, "-device", "virtio-blk-pci,drive=d0,id=vd0") as monitor:
        at = ["--qmp", str(monitor), "--disk", "vd0"]

        def write(part: str) -> None:
            with Qmp(monitor) as qmp:
                device = qmp.call("query-block")[0]["qdev"]
                said = qmp.call(
                    "human-monitor-command", command_line=f'qemu-io -d {device} "write -P {part}"'
                )
                assert "error" not in said.lower(), said

        def mirror() -> None:
            with Qmp(monitor) as qmp:
                qmp.call("blockdev-add", driver="null-co", node_name="far", size=SIZE)
                node = qmp.call("query-block")[0]["inserted"]["node-name"]
                qmp.call("blockdev-mirror", job_id="cdp0", device=node, target="far", sync="full")
                qmp.wait("BLOCK_JOB_READY")

        write("1 0 1M")
        if mirrored:
            mirror()
        made = []
        for number, name in enumerate(("a", "b"), start=2):
            made += cdp("create", "web", "--cow", "--name", name, *at)
            write(f"{number} 0 {4 - number}00k")
        holds(made[0]["uri"], "1 0 1M")
        holds(made[1]["uri"], "2 0 200k", "1 200k 824k")
        assert of_active(cdp("tree", "web", *at)) == [("cow", "b"), ("cow", "a")]
        for name in ("a", "b"):
            until(lambda: _clients_gone(monitor, made), "end of the readers")
            cdp("delete", "web", name, "--yes", *at)
        write("9 512k 64k")
        with Qmp(monitor) as qmp:
            nodes = qmp.call("query-named-block-nodes", flat=True)
        assert not [node for node in nodes if node["node-name"].startswith("cdp-")]
        if not mirrored:
            mirror()
            assert "a job or filter works on it" in cdp("create", "web", "--cow", *at, fails=3)
    holds(disk, "3 0 100k", "2 100k 100k", "1 200k 312k", "9 512k 64k")


@pytest.mark.parametrize(
    "devices",
    [
        ("virtio-blk-pci,drive=d0,id=vd0,iothread=io",),
        ("virtio-scsi-pci,id=sc,iothread=io", "scsi-hd,drive=d0,id=vd0"),
    ],
)
def test_a_vm_that_would_die_of_it_is_refused(
    short_path: Path, cdp: Callable[..., Any], devices: tuple[str, ...]
) -> None:
    """QEMU 7.2 ends by an assertion when a reader of an export ends whose disk is in an iothread."""
    disk = short_path / "root.raw"
    run("truncate", "-s", str(SIZE), disk)
    arguments = ["-object", "iothread,id=io", "-blockdev", RAW.format(disk=disk)]
    with machine(short_path, *arguments, *(word for one in devices for word in ("-device", one))) as monitor:
        with Qmp(monitor) as qmp:
            old = qmp.call("query-version")["qemu"]["major"] < 9
        at = ["--qmp", str(monitor), "--disk", "vd0"]
        said = cdp("create", "web", "--cow", *at, fails=3 if old else 0)
        assert not old or "vd0 is in an iothread" in said


def test_a_full_directory_breaks_the_snapshot_and_not_the_guest(
    daemon: Daemon, cdp: Callable[..., Any], short_path: Path
) -> None:
    small = short_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small)
    try:
        daemon.write("vda", "1 0 8M")
        cdp("create", "web", "--cow", "--disk", "vda", "--name", "a", "--directory", str(small), *daemon.at)
        daemon.write("vda", "2 0 8M")
        holds(daemon.uri("vda"), "2 0 8M")
        assert of_active(cdp("tree", "web", "--disk", "vda", *daemon.at)) == [("broken", "a")]
        output = daemon.directory / "saved"
        assert "the snapshot a is broken" in cdp(
            "save", "web", "a", "--disk", "vda", "--output", str(output), *daemon.at, fails=5
        )
        assert not [path for path in daemon.directory.iterdir() if "saved" in path.name]
        cdp("delete", "web", "a", "--disk", "vda", "--yes", *daemon.at)
        assert os.listdir(small) == []
    finally:
        run("umount", "-l", small)
