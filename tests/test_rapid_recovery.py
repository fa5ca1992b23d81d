"""Rapid recovery with real QEMU: qemu-storage-daemon is the VM, whose guest writes over NBD while its disk moves."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import nbd
import pytest

from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.vm.recovery import record, states
from cdpserver.vm.recovery.graph import export_of
from cdpserver.vm.recovery.record import RecoveredDisk, Recovery
from recovery import cli
from recovery.recover import places
from tests.test_service import ApiError, Server, connected, pattern, read, until, write
from tools.kit.processes import TooLate, listens, start
from tools.kit.processes import until as soon
from tools.kit.qmp import Qmp, QmpError
from tools.kit.source import nbd_server

real = pytest.mark.real

MIB = 1 << 20
SIZE = 32 * MIB
CLUSTER = 1 << 16


def on_export(number: int, uri: str) -> list[str]:
    """The nodes of a disk on an NBD export."""
    server, export = nbd_server(uri)
    nbd_node = f"nbd,node-name=n{number},server.type=unix,server.path={server['path']},export={export}"
    return [
        *("--blockdev", f"{nbd_node},reconnect-delay=30"),
        *("--blockdev", f"raw,node-name=disk{number},file=n{number}"),
    ]


def on_file(number: int, path: str) -> list[str]:
    """The nodes of a disk on a QCOW2 file, which says itself what it stands on."""
    return [
        "--blockdev",
        f"qcow2,node-name=disk{number},discard=unmap,file.driver=file,file.filename={path},file.discard=unmap",
    ]


class Vm:
    """A qemu-storage-daemon on a fork's export, a file, or what `blockdev` of an answer says.

    Its one monitor is the service's once it is started.
    """

    def __init__(self, directory: Path, disks: Sequence[str | list[str]], name: str = "vm") -> None:
        self.qmp = directory / f"{name}.qmp"
        self.other = directory / f"{name}.other"
        """A monitor for the test."""
        self.socket = directory / f"{name}.nbd"
        for left in (self.qmp, self.other, self.socket):
            left.unlink(missing_ok=True)  # of one that was killed
        command = ["qemu-storage-daemon"]
        command += ["--nbd-server", f"addr.type=unix,addr.path={self.socket},max-connections=0"]
        for number, disk in enumerate(disks):
            node = f"disk{number}"
            if isinstance(disk, list):
                node = f"recovered{number}"
                command += [word.replace("-blockdev", "--blockdev") for word in disk]
            else:
                command += on_file(number, disk) if disk.startswith("/") else on_export(number, disk)
            command += ["--export", f"nbd,id=e{number},node-name={node},name=disk{number},writable=on"]
        log = directory / f"{name}.log"
        self.process = start(
            [
                *command,
                *("--chardev", f"socket,id=m,path={self.qmp},server=on,wait=off", "--monitor", "chardev=m"),
                *("--chardev", f"socket,id=o,path={self.other},server=on,wait=off", "--monitor", "chardev=o"),
            ],
            log,
        )
        for socket in (self.qmp, self.other):
            listens(self.process, socket, log)

    def uri(self, number: int = 0) -> str:
        return f"nbd+unix:///disk{number}?socket={self.socket}"

    def end(self) -> None:
        """As a power cut."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Guest:
    """Writes one block after the other until it is stopped, each with its number."""

    def __init__(self, uri: str, content: bytearray) -> None:
        self.content = content
        self.written = 0
        self._client = nbd.NBD()
        self._client.connect_uri(uri)
        self._stop = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                place = (self.written * 5 * 4096) % SIZE
                block = pattern(1 << 40 | self.written)
                self._client.pwrite(block, place)
                self.content[place : place + 4096] = block
                self.written += 1
        except nbd.Error as error:
            self._failed.append(error)

    def stop(self) -> None:
        """Stop writing; every write until here was acknowledged."""
        self._stop.set()
        self._thread.join(30)
        assert not self._failed, self._failed
        with contextlib.suppress(nbd.Error):
            self._client.shutdown()


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


def protect(server: Server, name: str = "vda", vm: str = "web", number: int = 1) -> bytearray:
    """A disk with a `crash` point; what it holds then. Something else is written after it."""
    uri = server.post("/v1/disks", name=name, vm=vm, size=SIZE)["uri"]
    content = bytearray(SIZE)
    with connected(uri) as client:
        for place in range(0, SIZE // 2, MIB):
            block = pattern(number * 1000 + place, MIB // 2)
            client.pwrite(block, place)
            content[place : place + len(block)] = block
        server.synced(f"{vm}/{name}", write_blocking=True)
        server.post(f"/v1/disks/{vm}/{name}:mark", name="good")
        client.pwrite(b"\xee" * MIB, 0)
    return content


def begin(server: Server, home: Path, qmp: Path, point: str = "web/vda@good", **more: Any) -> dict[str, Any]:
    body = {"to": str(home), "protect": False, **more}
    shown: dict[str, Any] = server.post("/v1/recoveries", point=point, qmp=str(qmp), **body)
    return shown


def wait(server: Server, id: str, *states: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        shown: dict[str, Any] = server.get(f"/v1/recoveries/{id}")
        assert shown["state"] in states or shown["state"] != "failed", shown["reason"]
        return shown if shown["state"] in states else None

    # QEMU asks an export with many small extents for one after the other before it copies anything.
    try:
        return soon(look, f"{id} in {states}", seconds=90)
    except TooLate as error:
        raise TooLate(f"{error}: {server.get(f'/v1/recoveries/{id}')}") from None


@contextlib.contextmanager
def copying(
    server: Server, id: str, vm: Vm, process: str = "export", monitor: Path | None = None
) -> Iterator[None]:
    """A copy is under way for as long as this is open, and hardly moves.

    It reads from `process`, which stands until the copy's speed is set. A VM whose monitor only gets the name that the service
    knows, `monitor`, by this has copied nothing before.
    """
    pid = server.pids()[process]
    os.kill(pid, signal.SIGSTOP)
    try:
        if monitor is not None:
            vm.qmp.rename(monitor)
        wait(server, id, "copying")
        with Qmp(vm.other) as qmp:
            job = job_of(id)
            soon(lambda: [found for found in qmp.call("query-block-jobs") if found["device"] == job], job)
            qmp.call("block-job-set-speed", device=job, speed=CLUSTER)
    finally:
        os.kill(pid, signal.SIGCONT)
    yield


def job_of(id: str, number: int = 0) -> str:
    """The job in QEMU that copies a disk."""
    return f"cdp-{id.rpartition('-')[2]}-{number}"


def at_home(target: str) -> bytes:
    """What stock qemu-img reads."""
    out = Path(target).with_suffix(".out")
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", target, out], check=True)
    return out.read_bytes()


# --- what is pure


def test_every_stage_is_reached_and_every_way_ends_in_one() -> None:
    reached = {states.BEGIN} | {after for ways in states.NEXT.values() for after in ways.values()}
    assert reached == set(states.NEXT)
    assert {stage.state for stage in reached} == {
        "running",
        "copying",
        "pivoting",
        "done",
        "failed",
        "aborted",
    }
    for stage in states.ACTIVE:
        assert {"fail"} <= set(states.NEXT[stage])
    with pytest.raises(RefusedError, match=r"r is pivoting \(pivoting\): no abort now .*cdp recover undo"):
        states.follow(states.PIVOTING, "abort", "r")


def test_a_record_is_what_was_written_and_fits() -> None:
    name = "n" * 60
    disk = RecoveredDisk(f"web/{name}", 7, 8, SIZE, f"r/{name}", f"/srv/{name}.qcow2", "qcow2")
    one = Recovery("recovery-1", "r", "web@good", "/run/q", (disk,), states.BEGIN, 5)
    for _ in range(30):
        one = (
            one.after("connected", now_ns=9)
            .after("fail", now_ns=10, reason="x" * 999)
            .after("retry", now_ns=1)
        )
    one = one.with_disk(0, at="home", made=True)
    assert record.read(one.row()) == one
    assert len(one.events) == record.KEPT_EVENTS
    wrongs: list[dict[str, Any]] = [{"phase": "lost"}, {"disks": [{}]}, {"events": 3}]
    for wrong in wrongs:
        row = one.row()
        with pytest.raises(CorruptError):
            record.read(type(row)(row.id, row.schema, {**row.fields, **wrong}))


def test_exports_in_the_names_that_qemu_gives() -> None:
    assert export_of("nbd+unix:///r/vda?socket=/s") == "r/vda"
    assert export_of("nbd://[::1]:10809/r/vda") == "r/vda"
    assert export_of('json:{"driver": "nbd", "export": "r/vda", "tls-creds": "t"}') == "r/vda"
    assert export_of("json:{") == export_of("json:3") == ""


def test_places_on_the_command_line() -> None:
    assert places(["/srv/vms/"]) == {"targets": {}, "to": "/srv/vms/"}
    assert places(["vda=/dev/x", "vdb=y", "z"]) == {
        "targets": {"vda": "/dev/x", "vdb": os.path.abspath("y")},
        "to": os.path.abspath("z"),
    }
    assert places(["/a/b=c"]) == {"targets": {}, "to": "/a/b=c"}
    for twice in (["/a", "/b"], ["vda=/a", "vda=/b"]):
        with pytest.raises(UsageError, match="two places for"):
            places(twice)


# --- moving home


@real
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_vm_runs_from_the_point_and_moves_home_while_it_writes(
    server: Server, home: Path, short_path: Path, format: str
) -> None:
    content = protect(server)
    begun = begin(server, home, short_path / "vm.qmp", format=format)
    assert begun["state"] == "running" and begun["rto_ms"] >= 0
    with Vm(short_path, [begun["uri"]]) as vm:
        guest = Guest(vm.uri(), content)
        shown = wait(server, begun["id"], "done")
        moved = guest.written
        until(lambda: guest.written > moved + 50, "writes after the pivot")
        guest.stop()
        assert shown["phase"] == "home" and shown["copied_bytes"] == shown["total_bytes"] > 0
        assert [event["event"] for event in shown["events"]] == ["started", "connected", "ready", "pivoted"]
        assert server.get(f"/v1/disks/{shown['disks'][0]['fork']}")["clients"] == 0
        assert read(vm.uri(), SIZE) == content
        server.post(f"/v1/recoveries/{begun['id']}:commit")
        with pytest.raises(ApiError, match="no undo now"):
            server.post(f"/v1/recoveries/{begun['id']}:undo")
        with connected(vm.uri()) as client:
            client.flush()
    assert at_home(str(home / f"vda.{format}")) == content


@real
def test_two_disks_of_a_vm_from_one_instant(server: Server, home: Path, short_path: Path) -> None:
    contents = [protect(server, name, number=number) for number, name in enumerate(("vda", "vdb"))]
    for content in contents:
        content[:MIB] = b"\xee" * MIB
    begun = begin(server, home, short_path / "vm.qmp", point="web@latest", name="again", force=True)
    assert [disk["fork"] for disk in begun["disks"]] == ["again/vda", "again/vdb"]
    with Vm(short_path, [disk["uri"] for disk in begun["disks"]]) as vm:
        wait(server, "again", "done")
        assert [read(vm.uri(number), SIZE) for number in (0, 1)] == contents
    with pytest.raises(ApiError, match="an instant of one"):
        begin(server, home, short_path / "vm.qmp", point="web@good", force=True)


@real
def test_undo_takes_along_what_was_written_at_home(server: Server, home: Path, short_path: Path) -> None:
    content = protect(server)
    begun = begin(server, home, short_path / "vm.qmp", format="raw")
    with Vm(short_path, [begun["uri"]]) as vm:
        wait(server, begun["id"], "done")
        guest = Guest(vm.uri(), content)
        with pytest.raises(ApiError, match="would see its disk change"):
            server.post(f"/v1/recoveries/{begun['id']}:undo", discard=True)
        server.post(f"/v1/recoveries/{begun['id']}:undo")
        assert wait(server, begun["id"], "aborted")["phase"] == "undone"
        guest.stop()
        assert read(vm.uri(), SIZE) == content
    assert read(begun["uri"], SIZE) == content
    with Vm(short_path, [begun["uri"]], "new"):
        pass


@real
def test_undo_of_a_vm_that_is_gone_lets_go_of_what_it_wrote_at_home(
    server: Server, home: Path, short_path: Path
) -> None:
    content = protect(server)
    begun = begin(server, home, short_path / "vm.qmp")
    with Vm(short_path, [begun["uri"]]) as vm:
        wait(server, begun["id"], "done")
        write(vm.uri(), pattern(9))
    shown = server.post(f"/v1/recoveries/{begun['id']}:undo", discard=True)
    assert (shown["state"], shown["phase"], shown["disks"][0]["at"]) == ("aborted", "undone", "fork")
    assert read(begun["uri"], SIZE) == content


@contextlib.contextmanager
def undoing(server: Server, id: str, vm: Vm) -> Iterator[None]:
    """An undo is under way for as long as this is open, and hardly moves."""
    job = f"cdp-{id.rpartition('-')[2]}-0"
    with Qmp(vm.other) as qmp:
        server.post(f"/v1/recoveries/{id}:undo")

        def slow() -> bool:
            with contextlib.suppress(QmpError):  # it is not there yet
                qmp.call("block-job-set-speed", device=job, speed=1 << 16)
                return True
            return False

        soon(slow, "the copy back", every_s=0.001)
    shown = server.get(f"/v1/recoveries/{id}")
    assert (shown["state"], shown["phase"]) == ("copying", "undoing")
    yield


@real
def test_an_undo_that_is_aborted_leaves_the_vm_at_home(server: Server, home: Path, short_path: Path) -> None:
    content = protect(server)
    begun = begin(server, home, short_path / "vm.qmp")
    with Vm(short_path, [begun["uri"]]) as vm:
        target = wait(server, begun["id"], "done")["disks"][0]["target"]
        guest = Guest(vm.uri(), content)
        with undoing(server, begun["id"], vm):
            shown = server.post(f"/v1/recoveries/{begun['id']}:abort")
        assert (shown["state"], shown["phase"], shown["disks"][0]["at"]) == ("done", "home", "home")
        server.post(f"/v1/recoveries/{begun['id']}:undo")
        assert wait(server, begun["id"], "aborted")["phase"] == "undone"
        guest.stop()
        assert read(vm.uri(), SIZE) == content
    assert read(begun["uri"], SIZE) == content and Path(target).exists()


@real
def test_a_service_killed_in_an_undo_goes_on_with_it(server: Server, home: Path, short_path: Path) -> None:
    content = protect(server)
    begun = begin(server, home, short_path / "vm.qmp")
    with Vm(short_path, [begun["uri"]]) as vm:
        wait(server, begun["id"], "done")
        guest = Guest(vm.uri(), content)
        with undoing(server, begun["id"], vm):
            server.kill()
            with Qmp(vm.other) as qmp:
                job = f"cdp-{begun['id'].rpartition('-')[2]}-0"
                qmp.call("block-job-set-speed", device=job, speed=0)
        with Server(server.state_dir) as again:
            assert wait(again, begun["id"], "aborted")["phase"] == "undone"
            guest.stop()
            assert read(vm.uri(), SIZE) == content
            assert read(begun["uri"], SIZE) == content


# --- faults


@real
def test_a_full_target_leaves_the_vm_on_its_fork(server: Server, home: Path, short_path: Path) -> None:
    content = protect(server)
    begun = begin(server, home, short_path / "vm.qmp")
    # A file system of a few MiB: the copy meets ENOSPC.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", home], check=True)
    try:
        with Vm(short_path, [begun["uri"]]) as vm:
            guest = Guest(vm.uri(), content)
            shown = wait(server, begun["id"], "failed")
            assert "No space left" in shown["reason"]
            assert list(home.iterdir()) == []
            mark = guest.written
            until(lambda: guest.written > mark + 20, "writes after the failure")
            subprocess.run(["mount", "-o", "remount,size=200m", home], check=True)
            server.post(f"/v1/recoveries/{begun['id']}:retry")
            wait(server, begun["id"], "done")
            guest.stop()
            assert read(vm.uri(), SIZE) == content
    finally:
        subprocess.run(["umount", home], check=True)


if os.geteuid() != 0:
    test_a_full_target_leaves_the_vm_on_its_fork = pytest.mark.skip(reason="mounting takes root")(
        test_a_full_target_leaves_the_vm_on_its_fork
    )


@real
def test_a_service_killed_in_the_pivot_lets_the_guest_go_on_when_it_is_back(
    server: Server, home: Path, short_path: Path
) -> None:
    content = protect(server)
    begun = begin(server, home, short_path / "vm.qmp")
    with Vm(short_path, [begun["uri"]], "early") as vm:
        with Qmp(vm.other) as qmp:
            vm.qmp.rename(short_path / "vm.qmp")
            guest = Guest(vm.uri(), content)
            job = job_of(begun["id"])
            qmp.wait("JOB_STATUS_CHANGE", lambda job_is: job_is == {"id": job, "status": "pending"})
            server.kill()
        with Server(server.state_dir) as again:
            wait(again, begun["id"], "done")
            guest.stop()
            assert read(vm.uri(), SIZE) == content


@real
def test_a_killed_qemu_loses_nothing_and_the_recovery_begins_again(
    server: Server, home: Path, short_path: Path
) -> None:
    content = protect(server)
    begun = begin(server, home, short_path / "vm.qmp")
    early = Vm(short_path, [begun["uri"]], "early")
    with early as vm, copying(server, begun["id"], vm, "target-0", short_path / "vm.qmp"):
        write(vm.uri(), pattern(5), 4096)
        content[4096:8192] = pattern(5)
        vm.end()
    assert wait(server, begun["id"], "failed")["phase"] == "copying"
    with Vm(short_path, [begun["uri"]]) as vm:
        server.post(f"/v1/recoveries/{begun['id']}:retry")
        wait(server, begun["id"], "done")
        assert read(vm.uri(), SIZE) == content


@real
def test_abort_before_and_after_the_vm_is_there(server: Server, home: Path, short_path: Path) -> None:
    content = protect(server)
    unused = begin(server, home, short_path / "none.qmp", name="unused")
    assert server.post("/v1/recoveries/unused:abort")["state"] == "aborted"
    with pytest.raises(ApiError, match="no disk unused/vda"):
        server.get(f"/v1/disks/{unused['disks'][0]['fork']}")
    begun = begin(server, home, short_path / "vm.qmp", name="used")
    with Vm(short_path, [begun["uri"]], "early") as vm:
        with copying(server, begun["id"], vm, "target-0", short_path / "vm.qmp"):
            shown = server.post("/v1/recoveries/used:abort")
        assert (shown["state"], shown["phase"]) == ("aborted", "stopped")
        assert list(home.iterdir()) == []
        server.post("/v1/recoveries/used:retry")
        wait(server, "used", "done")
        assert read(vm.uri(), SIZE) == content


@real
def test_why_it_waits_is_said(
    server: Server, home: Path, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens, a QEMU on something else, a monitor that another program holds; nothing once it goes on."""
    protect(server)
    qmp = short_path / "vm.qmp"
    begun = begin(server, home, qmp, name="slow")

    def waits(what: str) -> bool:
        shown = server.get("/v1/recoveries/slow")
        assert (shown["state"], shown["reason"]) == ("running", "")
        return what in shown["waits"]

    soon(lambda: waits(f"no QEMU listens at {qmp}"), "no QEMU", seconds=90)
    options = cli.parse(["--state-dir", str(server.state_dir), "recover", "show", "slow"])
    options.run(options)
    assert f"no QEMU listens at {qmp}" in capsys.readouterr().out
    other = short_path / "other.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", other, "1M"], check=True)
    with Vm(short_path, [str(other)]):
        fork = begun["disks"][0]["fork"]
        soon(lambda: waits(f"has no disk on the export {fork}"), "QEMU on something else", seconds=90)
    with Vm(short_path, [begun["uri"]], "early") as vm:
        with Qmp(vm.qmp):
            vm.qmp.rename(qmp)
            soon(lambda: waits("another program holds this monitor"), "a monitor that is held", seconds=90)
        assert wait(server, "slow", "done")["waits"] == ""


# --- refusals


@real
def test_what_is_refused(server: Server, home: Path, short_path: Path) -> None:
    protect(server)
    qmp = short_path / "vm.qmp"
    one = begin(server, home, qmp, name="one")
    with pytest.raises(ApiError, match=f"one/vda is what {one['id']} stands on"):
        server.delete("/v1/forks/one/vda")
    (home / "a").mkdir()
    refusals: dict[str, dict[str, Any]] = {
        "uses the monitor": {"qmp": qmp, "home": home / "a"},
        "there is a disk one/vda": {"qmp": short_path / "b", "name": "one"},
        "no directory here": {"qmp": short_path / "b", "home": short_path / "none"},
        "in the state directory": {"qmp": short_path / "b", "home": server.state_dir},
    }
    for match, more in refusals.items():
        with pytest.raises(ApiError, match=match):
            begin(server, more.pop("home", home), more.pop("qmp"), **more)
    # Two recoveries of one point have each their own fork, and place.
    with pytest.raises(ApiError, match=f"taken by {one['id']}"):
        begin(server, home, short_path / "b", name="two")
    (home / "b").mkdir()
    other = begin(server, home / "b", short_path / "b", name="two")
    write(other["uri"], pattern(3))
    assert read(server.get("/v1/recoveries/one")["uri"], 4096) != pattern(3)
    (home / "vda.qcow2").touch()
    with pytest.raises(ApiError, match=r"vda\.qcow2 already"):
        begin(server, home, short_path / "c")
    assert [one["name"] for one in server.get("/v1/recoveries")] == ["one", "two"]
    server.post("/v1/recoveries/one:abort")
    write(server.get("/v1/disks/web/vda")["uri"], pattern(4))
    (home / "vda.qcow2").unlink()
    with pytest.raises(ApiError, match=r"is unordered.*--force"):
        begin(server, home, short_path / "c", point="web/vda@latest")
    assert begin(server, home, short_path / "c", point="web/vda@latest", force=True)["state"] == "running"
    with pytest.raises(NotFoundError):
        record.find(_Empty(), "three")  # type: ignore[arg-type]


class _Empty:
    @staticmethod
    def rows(_: str) -> dict[str, Any]:
        return {}
