"""The disk's own snapshots of a running QEMU: what each image holds after it, and what is left of a merge that fails."""

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cdpserver.errors import BrokenError, CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.vm.chain import files, plan, snapshots
from cdpserver.vm.chain.command import over
from cdpserver.vm.chain.graph import Layer, LiveChain
from cdpserver.vm.qmp import Qmp as Monitor
from cdpserver.vm.qmp import QmpClosedError
from recovery import cli
from tools.kit.processes import listens, run, start, stop, until
from tools.kit.qmp import Qmp

MIB = 1 << 20
SIZE = 16 * MIB


class Daemon:
    """A qemu-storage-daemon with disks that a guest has open over NBD, each on a chain in a directory of its own."""

    def __init__(self, directory: Path, disks: Mapping[str, Path], throttle: int = 0) -> None:
        self.directory = directory
        self.monitor = directory / "q"
        self.monitor.unlink(missing_ok=True)
        self.disks = tuple(disks)
        command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={directory}/n"]
        for disk, path in disks.items():
            image = {"driver": "qcow2", "node-name": f"{disk}-0", "discard": "unmap"}
            image["file"] = {"driver": "file", "filename": str(path), "discard": "unmap"}  # type: ignore[assignment]
            command += ["--blockdev", json.dumps(image)]
            command += ["--export", f"type=nbd,id={disk},node-name={disk}-0,name={disk},writable=on"]
        command += [
            "--chardev",
            f"socket,id=m,path={self.monitor},server=on,wait=off",
            "--monitor",
            "chardev=m",
        ]
        self.process = start(command, directory / "log")
        listens(self.process, self.monitor, directory / "log")

    def write(self, disk: str, *parts: str) -> None:
        """As the guest does: `0x11 0 1M`."""
        commands = [word for part in parts for word in ("-c", f"write -P {part}")]
        uri = f"nbd+unix:///{disk}?socket={self.directory}/n"
        run("qemu-io", "-f", "raw", *commands, "-c", "flush", uri)

    def do(self, work: Callable[[Monitor], Any]) -> Any:
        """One verb over a connection of its own."""
        return over(self.monitor, work)

    def create(self, name: str, *disks: str) -> list[dict[str, Any]]:
        """A snapshot of all disks, or of these."""
        made: list[dict[str, Any]] = self.do(
            lambda monitor: snapshots.create(monitor, "web", disks or self.disks, name=name)
        )
        return made

    def tree(self, disk: str = "vda") -> dict[str, Any]:
        """The tree."""
        value: dict[str, Any] = self.do(lambda monitor: snapshots.tree(monitor, "web", disk))
        return value

    def call(self, command: str, **arguments: Any) -> Any:
        """One command of QMP."""
        with Qmp(self.monitor) as qmp:
            return qmp.call(command, **arguments)


@pytest.fixture
def images(short_path: Path) -> dict[str, Path]:
    """Two empty disks."""
    paths = {disk: short_path / disk / "root.qcow2" for disk in ("vda", "vdb")}
    for path in paths.values():
        path.parent.mkdir()
        run("qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE))
    return paths


@pytest.fixture
def daemon(short_path: Path, images: dict[str, Path]) -> Iterator[Daemon]:
    """Both disks in a running daemon."""
    made = Daemon(short_path, images)
    yield made
    stop(made.process)


def holds(path: Path, *parts: str) -> None:
    """An image, read by stock tools with what is below it: `0x11 0 1M`. It is whole."""
    commands = [word for part in parts for word in ("-c", f"read -P {part}")]
    done = run("qemu-io", "-r", "-U", "-f", "qcow2", *commands, path)
    assert "verification failed" not in done.stdout


def whole(*paths: Path) -> None:
    """Each file passes qemu-img's check; a killed writer may have left room unused."""
    for path in paths:
        run("qemu-img", "check", "-q", "-U", "-f", "qcow2", path, accept=(0, 3))


def line(value: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, name) along the chain, from the disk up."""
    found = [(value["kind"], value["name"])]
    while chain := [child for child in value["children"] if child["kind"] != "branch"]:
        (value,) = chain
        found.append((value["kind"], value["name"]))
    return found


def cdp(*arguments: str) -> int:
    """A command of `cdp`, its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cdp", "snapshot", "live", *arguments])
        return cli.main()


def three(daemon: Daemon) -> Path:
    """Three snapshots of vda, and the active image; each has a MiB of its own, and a part of MiB 8. The directory."""
    for number, name in enumerate(("a", "b", "c"), start=1):
        daemon.write("vda", f"{number} {number}M 1M", f"{number} 8M {5 - number}00k")
        daemon.create(name, "vda")
    daemon.write("vda", "4 4M 1M", "4 8M 100k")
    return daemon.directory / "vda"


NEWEST = ("1 1M 1M", "2 2M 1M", "3 3M 1M", "4 4M 1M", "4 8M 100k", "3 8294k 80k", "0 5M 1M")


def test_snapshots_of_two_disks_at_one_instant_hold_what_was_written_before(daemon: Daemon) -> None:
    daemon.write("vda", "0x11 0 1M")
    daemon.write("vdb", "0x12 0 1M")
    said = daemon.create("monday")
    assert [(one["disk"], one["snapshot"], one["active"]) for one in said] == [
        ("vda", "root.qcow2", "root.monday.qcow2"),
        ("vdb", "root.qcow2", "root.monday.qcow2"),
    ]
    assert all(one["warning"] is None and one["snapshots"] == 1 for one in said)
    daemon.write("vda", "0x21 0 1M")
    directory = daemon.directory
    holds(directory / "vda/root.qcow2", "0x11 0 1M")
    holds(directory / "vda/root.monday.qcow2", "0x21 0 1M")
    holds(directory / "vdb/root.monday.qcow2", "0x12 0 1M")
    value = daemon.tree()
    assert line(value) == [("disk", "web"), ("base", "root.qcow2"), ("active", "root.monday.qcow2")]
    base = value["children"][0]
    assert set(base) == {"kind", "name", "time_ns", "size_bytes", "locked", "children"}
    assert value["size_bytes"] == base["size_bytes"] + base["children"][0]["size_bytes"] > 2 * MIB
    # Any node of the chain, and a name that nobody has.
    assert daemon.tree("vda-0") == value
    with pytest.raises(NotFoundError, match=r"QEMU has no disk 'nope' .*vda"):
        daemon.tree("nope")


def test_a_snapshot_that_is_refused_for_one_disk_is_made_of_none(daemon: Daemon) -> None:
    (daemon.directory / "vdb/root.x.qcow2").touch()
    with pytest.raises(UsageError, match=r"root.x.qcow2 exists"):
        daemon.create("x")
    assert sorted(path.name for path in (daemon.directory / "vda").iterdir()) == ["root.qcow2"]
    assert line(daemon.tree()) == [("disk", "web"), ("active", "root.qcow2")]
    with pytest.raises(UsageError, match="named twice"):
        daemon.create("y", "vda", "vda-0")


@pytest.mark.parametrize(
    ("verb", "node", "base", "left", "stays"),
    [
        ("pull", "root.c.qcow2", "root.qcow2", ["", "c"], "root.c.qcow2"),
        ("pull", "root.b.qcow2", "root.qcow2", ["", "b", "c"], "root.b.qcow2"),
        ("pull", "root.c.qcow2", None, ["c"], "root.c.qcow2"),
        ("commit", "root.b.qcow2", None, ["", "a", "c"], "root.a.qcow2"),
        ("commit", "root.b.qcow2", "root.qcow2", ["", "c"], "root.qcow2"),
        ("commit", "root.c.qcow2", "root.a.qcow2", ["", "a"], "root.a.qcow2"),
        ("commit", "root.c.qcow2", "root.qcow2", [""], "root.qcow2"),
        ("delete", "root.b.qcow2", None, ["", "a", "c"], "root.c.qcow2"),
        ("delete", "root.qcow2", None, ["a", "b", "c"], "root.a.qcow2"),
    ],
)
def test_merges_under_writes(
    daemon: Daemon,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    node: str,
    base: str | None,
    left: list[str],
    stays: str,
) -> None:
    directory = three(daemon)
    writes = [word for number in range(300) for word in ("-c", f"write -P 7 {(9 << 20) + (number << 12)} 4k")]
    guest = subprocess.Popen(
        ["qemu-io", "-f", "raw", *writes, f"nbd+unix:///vda?socket={daemon.directory}/n"],
        stdout=subprocess.DEVNULL,
    )
    at = ["--qmp", str(daemon.monitor), "--disk", "vda", *(["--base", base] if base else [])]
    assert cdp(verb, "web", node, *at, "--yes", "--json") == 0
    assert guest.wait() == 0
    said = json.loads(capsys.readouterr().out)
    names = [f"root.{name}.qcow2" if name else "root.qcow2" for name in left]
    assert said["stays"] == stays and said["snapshots"] == len(left) - 1 and said["active"] == names[-1]
    assert [name for _, name in line(daemon.tree())[1:]] == names
    # The chain's last image may be a template: it stays where it is.
    assert sorted(path.name for path in directory.iterdir()) == sorted({*names, "root.qcow2"})
    assert said["kept"] == ([] if "" in left else ["root.qcow2"])
    daemon.write("vda", "9 15M 64k")
    whole(*(directory / name for name in names))
    stop(daemon.process)
    holds(directory / names[-1], *NEWEST, "7 9M 1200k", "9 15M 64k")
    if "a" in left and stays != "root.a.qcow2":
        holds(directory / "root.a.qcow2", "1 1M 1M", "2 2M 1M", "0 3M 1M")
    if "b" in left:
        holds(directory / "root.b.qcow2", "1 1M 1M", "2 2M 1M", "3 3M 1M", "0 4M 1M", "3 8M 200k")


def test_what_makes_no_sense_is_refused(daemon: Daemon) -> None:
    three(daemon)

    def refused(kind: type[Exception], match: str, work: Callable[[Monitor], Any]) -> None:
        with pytest.raises(kind, match=match):
            daemon.do(work)

    before = daemon.tree()
    refused(NotFoundError, "no image 'x' in", lambda m: snapshots.pull(m, "vda", "x", base=None))
    refused(RefusedError, "nothing lies below", lambda m: snapshots.pull(m, "vda", "root.qcow2", base=None))
    refused(
        UsageError, "not below", lambda m: snapshots.commit(m, "vda", "root.a.qcow2", base="root.b.qcow2")
    )
    refused(
        RefusedError,
        "nothing lies between",
        lambda m: snapshots.pull(m, "vda", "root.b.qcow2", base="root.a.qcow2"),
    )
    refused(RefusedError, "no snapshot yet", lambda m: snapshots.delete(m, "vda", "root.c.qcow2"))
    assert daemon.tree() == before


def test_what_stands_beside_the_chain_is_seen_kept_and_deleted(daemon: Daemon) -> None:
    directory = three(daemon)
    side = directory / "side.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "root.a.qcow2", side)
    seen = daemon.tree()["children"][0]["children"][0]
    assert [(child["kind"], child["name"]) for child in seen["children"]] == [
        ("branch", "side.qcow2"),
        ("snapshot", "root.b.qcow2"),
    ]
    with pytest.raises(RefusedError, match=r"side.qcow2 stands on what a commit would change"):
        daemon.do(lambda m: snapshots.commit(m, "vda", "root.b.qcow2", base=None))
    said = daemon.do(lambda m: snapshots.pull(m, "vda", "root.b.qcow2", base="root.qcow2"))
    assert said["removed"] == [] and said["kept"] == ["root.a.qcow2"]
    holds(side, "1 1M 1M", "2 2M 1M", "0 3M 1M")
    # What is in use anywhere is not deleted.
    server = subprocess.Popen(
        ["qemu-nbd", "-t", "-f", "qcow2", "-k", str(daemon.directory / "side"), str(side)]
    )
    until((daemon.directory / "side").exists, "socket")
    with pytest.raises(RefusedError, match="another process using"):
        daemon.do(lambda m: snapshots.delete(m, "vda", "side.qcow2"))
    server.kill()
    server.wait()
    with pytest.raises(RefusedError, match=r"side.qcow2 stands on root.a.qcow2"):
        daemon.do(lambda m: snapshots.delete(m, "vda", "root.a.qcow2"))
    for name in ("side.qcow2", "root.a.qcow2"):
        at = ["--qmp", str(daemon.monitor), "--disk", "vda", "--yes"]
        assert cdp("delete", "web", name, *at) == 0
        assert not (directory / name).exists()


def test_no_snapshot_under_a_mirror_but_pulls_below_it(daemon: Daemon) -> None:
    directory = three(daemon)
    with Qmp(daemon.monitor) as qmp:
        qmp.call("blockdev-add", driver="null-co", node_name="far", size=SIZE)
        active = next(one for one in qmp.call("query-block-exports") if one["id"] == "vda")["node-name"]
        qmp.call("blockdev-mirror", job_id="cdp0", device=active, target="far", sync="full")
        qmp.wait("BLOCK_JOB_READY")
    assert daemon.tree()["children"][0]["children"][0]["children"][0]["children"][0]["kind"] == "active"
    for work in (
        lambda m: snapshots.create(m, "web", ["vda"], name="d"),
        lambda m: snapshots.commit(m, "vda", "root.b.qcow2", base=None),
        lambda m: snapshots.pull(m, "vda", "root.c.qcow2", base=None),
    ):
        with pytest.raises(RefusedError, match="the job cdp0 works on vda"):
            daemon.do(work)
    said = daemon.do(lambda m: snapshots.pull(m, "vda", "root.b.qcow2", base="root.qcow2"))
    assert said["removed"] == ["root.a.qcow2"]
    holds(directory / "root.c.qcow2", *NEWEST)


def test_qemu_killed_in_the_middle_of_a_commit(
    daemon: Daemon, images: dict[str, Path], short_path: Path
) -> None:
    directory = three(daemon)
    every = [directory / name for name in ("root.qcow2", "root.a.qcow2", "root.b.qcow2", "root.c.qcow2")]

    async def commit(monitor: Monitor) -> None:
        def kill(done: float) -> None:
            daemon.process.kill()

        await snapshots.commit(monitor, "vda", "root.c.qcow2", base="root.qcow2", progress=kill)

    with pytest.raises(QmpClosedError):
        daemon.do(commit)
    assert daemon.process.wait() == -signal.SIGKILL
    whole(*every)
    holds(every[-1], *NEWEST)
    again = Daemon(short_path, {"vda": every[-1]})
    assert len(line(again.tree())) == 5
    again.do(lambda m: snapshots.commit(m, "vda", "root.c.qcow2", base="root.qcow2"))
    stop(again.process)
    holds(every[0], *NEWEST)
    assert [path for path in every if path.exists()] == every[:1]


def test_a_damaged_image_below_fails_the_job_and_leaves_the_chain(
    daemon: Daemon, images: dict[str, Path], short_path: Path
) -> None:
    directory = three(daemon)
    stop(daemon.process)
    damage(directory / "root.a.qcow2")
    again = Daemon(short_path, {"vda": directory / "root.c.qcow2"})
    before = line(again.tree())
    with pytest.raises(BrokenError, match=r"job failed: .*; the chain is as it was"):
        again.do(lambda m: snapshots.pull(m, "vda", "root.c.qcow2", base="root.qcow2"))
    with pytest.raises(BrokenError, match=r"the chain is as it was, but root.qcow2 alone may hold some"):
        again.do(lambda m: snapshots.commit(m, "vda", "root.b.qcow2", base="root.qcow2"))
    assert line(again.tree()) == before and again.call("query-jobs") == []
    again.write("vda", "5 4M 64k")
    stop(again.process)
    holds(directory / "root.c.qcow2", "5 4M 64k", "4 4160k 64k")


def test_a_pull_that_would_kill_qemu_is_refused(daemon: Daemon, short_path: Path) -> None:
    daemon.create("a", "vda")
    stop(daemon.process)
    top = short_path / "vda/root.x.qcow2"
    options = ["-o", "extended_l2=on", "-F", "qcow2", "-b", "root.a.qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, top)
    again = Daemon(short_path, {"vda": top})
    with pytest.raises(RefusedError, match="has subclusters"):
        again.do(lambda m: snapshots.pull(m, "vda", top.name, base=None))
    stop(again.process)


def damage(path: Path) -> None:
    """The active L1 table's first entry is no place where a table can be."""
    with open(path, "r+b") as file:
        table = struct.unpack(">Q", file.read(48)[40:48])[0]
        file.seek(table)
        file.write(struct.pack(">Q", 1 << 63 | 1 << 40 | 512))


def test_a_file_that_was_deleted_by_hand_is_said_and_a_pull_saves_the_disk(daemon: Daemon) -> None:
    directory = three(daemon)
    (directory / "root.a.qcow2").unlink()
    with pytest.raises(
        CorruptError, match=r"root.a.qcow2, on which vda stands, cannot be read.*live pull VM root.c"
    ):
        daemon.create("d", "vda")
    daemon.do(lambda m: snapshots.pull(m, "vda", "root.c.qcow2", base=None))
    stop(daemon.process)
    holds(directory / "root.c.qcow2", *NEWEST)
    assert files.backing_of(directory / "root.c.qcow2") is None


def chain(count: int, protocol: str = "file") -> LiveChain:
    """A chain of so many images."""
    layers = [Layer(f"n{n}", "qcow2", protocol, f"/x/{n}", SIZE, 0) for n in reversed(range(count))]
    return LiveChain("vda", "vda", f"n{count - 1}", None, (), tuple(layers), {})


def test_limits() -> None:
    assert plan.check_room(chain(5)) is None
    assert "6 snapshots" in (plan.check_room(chain(6)) or "")
    assert plan.check_room(chain(127)) is not None
    with pytest.raises(RefusedError, match="has 128 images, of 128 at most"):
        plan.check_room(chain(128))
    assert plan.check_room(chain(32, "rbd")) is not None
    with pytest.raises(RefusedError, match="lies on Ceph and has 32 snapshots, of 32 at most"):
        plan.check_room(chain(33, "rbd"))


def test_the_limit_is_reached_in_a_running_qemu(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_CHAIN", 8)
    at = ["web", "--qmp", str(daemon.monitor), "--disk", "vdb"]
    for number in range(7):
        assert cdp("create", *at, "--name", f"n{number}") == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and warnings[0].startswith("warning: vdb now has 6 snapshots")
    assert cdp("create", *at) == 3
    assert "has 8 images, of 8 at most (make room" in capsys.readouterr().err
    assert cdp("tree", *at) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 9 and "active root.n6.qcow2" in shown[-1]


@pytest.mark.parametrize("running", [False, True])
def test_a_stopped_vm_goes_back_and_forth(
    short_path: Path, images: dict[str, Path], capsys: pytest.CaptureFixture[str], running: bool
) -> None:
    monitor, log = short_path / "m", short_path / "log"
    machine = start(
        [
            *("qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-qmp", f"unix:{monitor},server=on,wait=off", *([] if running else ["-S"])),
            *("-blockdev", f"driver=qcow2,node-name=d0,file.driver=file,file.filename={images['vda']}"),
            *("-device", "virtio-blk-pci,drive=d0,id=vd0"),
        ],
        log,
    )
    listens(machine, monitor, log)
    at = ["--qmp", str(monitor), "--disk", "vd0"]

    def write(part: str) -> None:
        with Qmp(monitor) as qmp:
            device = qmp.call("query-block")[0]["qdev"]
            qmp.call("human-monitor-command", command_line=f'qemu-io -d {device} "write -P {part}"')

    write("1 0 64k")
    assert cdp("create", "web", *at, "--name", "a") == 0
    write("2 0 64k")
    if running:
        assert cdp("revert", "web", "root.qcow2", *at, "--name", "b") == 3
        assert "web is running, and its memory belongs" in capsys.readouterr().err
        stop(machine)
        return
    assert cdp("revert", "web", "root.a.qcow2", *at, "--name", "b") == 3
    for node, name in (("root.qcow2", "b"), ("root.a.qcow2", "c")):
        assert cdp("revert", "web", node, *at, "--name", name) == 0
        write(f"{ord(name)} 64k 64k")
    capsys.readouterr()
    assert cdp("tree", "web", *at, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert [name for _, name in line(value)[1:]] == ["root.qcow2", "root.a.qcow2", "root.c.qcow2"]
    assert [child["name"] for child in value["children"][0]["children"]] == ["root.b.qcow2", "root.a.qcow2"]
    stop(machine)
    directory = images["vda"].parent
    holds(directory / "root.qcow2", "1 0 64k", "0 64k 64k")
    holds(directory / "root.b.qcow2", "1 0 64k", "98 64k 64k")
    holds(directory / "root.c.qcow2", "2 0 64k", "99 64k 64k")
