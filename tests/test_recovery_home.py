"""Rapid recovery at home: streaming, replacing a VM's disks, protection afterwards, and what befalls any of it. Real QEMU, as in
tests/test_rapid_recovery.py; one service for all tests but those that kill it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver import images, names
from cdpserver.catalog import Catalog
from cdpserver.clock import Clock
from cdpserver.config import Config
from cdpserver.retention.facts import gather
from cdpserver.state import StateDir
from tests.test_rapid_recovery import (
    SIZE,
    Guest,
    Vm,
    at_home,
    begin,
    copying,
    job_of,
    on_export,
    protect,
    wait,
)
from tests.test_service import ApiError, Server, connected, pattern, read, write
from tools.kit.processes import listens, scratch, start
from tools.kit.processes import until as soon
from tools.kit.qmp import Qmp
from tools.kit.server import BIN
from tools.kit.source import Source

pytestmark = pytest.mark.real

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with scratch("cdp-") as directory, Server(directory / "s") as running:
        yield running


def qemu_img(*arguments: str | Path) -> Any:
    done = subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout) if "--output=json" in arguments else None


def backing_of(path: str) -> str | None:
    found: str | None = qemu_img("info", "-U", "--output=json", path).get("full-backing-filename")
    return found


def stream(server: Server, home: Path, qmp: Path, vm: str, **more: Any) -> dict[str, Any]:
    return begin(server, home, qmp, f"{vm}/vda@good", mode="stream", **more)


def vm_state(server: Server, vm: str) -> dict[str, Any]:
    return dict(server.get(f"/v1/vms/{vm}")["disks"][0])


def protected(server: Server, vm: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        with contextlib.suppress(ApiError):
            if vm_state(server, vm)["state"] == "synced":
                return vm_state(server, vm)
        return None

    return soon(look, f"{vm} in sync", seconds=90)


# --- streaming


def test_a_vm_writes_at_home_from_the_start_and_needs_the_point_no_more(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    begun = stream(shared, home, short_path / "vm.qmp", vm)
    target = begun["disks"][0]["target"]
    assert (begun["state"], begun["mode"], target) == ("running", "stream", str(home / "vda.qcow2"))
    assert read(begun["uri"], SIZE) == content and "@seq:" in begun["uri"]
    with Vm(short_path, [target]) as running:
        guest = Guest(running.uri(), content)
        shown = wait(shared, begun["id"], "done")
        assert shown["phase"] == "home" and shown["copied_bytes"] == shown["total_bytes"] > 0
        guest.stop()
        assert read(running.uri(), SIZE) == content
        shared.post(f"/v1/recoveries/{begun['id']}:commit")
        assert shared.delete(f"/v1/forks/{begun['disks'][0]['fork']}")
    assert backing_of(target) is None


def test_a_qemu_killed_when_all_is_there_has_lost_nothing_of_the_point(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    begun = stream(shared, home, short_path / "vm.qmp", vm)
    with Vm(short_path, [begun["disks"][0]["target"]]) as running:
        wait(shared, begun["id"], "done")
        running.end()  # nobody has sent a FLUSH
    assert at_home(begun["disks"][0]["target"]) == content


def test_a_stream_goes_on_after_a_kill_of_qemu_of_the_export_and_of_the_service(
    home: Path, short_path: Path, vm: str
) -> None:
    with Server(short_path / "s") as server:
        content = protect(server, vm=vm)
        begun = stream(server, home, short_path / "vm.qmp", vm)
        target = begun["disks"][0]["target"]
        with Vm(short_path, [target]) as running, copying(server, begun["id"], running):
            write(running.uri(), pattern(5), 4096)
            with connected(running.uri()) as client:
                client.flush()
            running.end()
        content[4096:8192] = pattern(5)
        shown = wait(server, begun["id"], "failed")
        assert shown["phase"] == "copying" and backing_of(target) is not None
        with pytest.raises(ApiError, match="stands on"):
            server.delete(f"/v1/forks/{begun['disks'][0]['fork']}")
        with Vm(short_path, [target]) as running:
            assert read(running.uri(), SIZE) == content
            guest = Guest(running.uri(), content)
            server.post(f"/v1/recoveries/{begun['id']}:retry")
            wait(server, begun["id"], "copying", "pivoting", "done")
            os.kill(server.pids()["export"], signal.SIGKILL)
            server.kill()
            with Server(server.state_dir) as again:
                wait(again, begun["id"], "done")
                guest.stop()
                assert read(running.uri(), SIZE) == content
                assert backing_of(target) is None


def test_an_abort_of_a_stream_keeps_what_was_written_and_what_it_stands_on(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    unused = stream(shared, home, short_path / "vm.qmp", vm, name=f"{vm}-unused")
    assert (home / "vda.qcow2").exists()
    assert shared.post(f"/v1/recoveries/{unused['id']}:abort")["state"] == "aborted"
    assert list(home.iterdir()) == []
    with pytest.raises(ApiError, match="no disk"):
        shared.get(f"/v1/disks/{unused['disks'][0]['fork']}")

    begun = stream(shared, home, short_path / "vm.qmp", vm, name=f"{vm}-used")
    target, fork = begun["disks"][0]["target"], begun["disks"][0]["fork"]
    with Vm(short_path, [target]) as running:
        with copying(shared, begun["id"], running):
            shown = shared.post(f"/v1/recoveries/{begun['id']}:abort")
        assert (shown["state"], shown["phase"], shown["disks"][0]["at"]) == ("aborted", "stopped", "home")
        write(running.uri(), pattern(7), 8192)
        content[8192:12288] = pattern(7)
        assert read(running.uri(), SIZE) == content
        with pytest.raises(ApiError, match="stands on"):
            shared.delete(f"/v1/forks/{fork}")
        with pytest.raises(ApiError, match="would see its disk change"):
            shared.post(f"/v1/recoveries/{begun['id']}:undo", discard=True)
        shared.post(f"/v1/recoveries/{begun['id']}:retry")
        wait(shared, begun["id"], "done")
        assert read(running.uri(), SIZE) == content
        # Undone, it runs on the fork, with all that it wrote; from there it moves home as in the other mode.
        shared.post(f"/v1/recoveries/{begun['id']}:undo")
        assert wait(shared, begun["id"], "aborted")["phase"] == "undone"
        assert read(running.uri(), SIZE) == content
    assert read(shared.get(f"/v1/disks/{fork}")["uri"], SIZE) == content


def test_discard_lets_go_of_a_stopped_stream(shared: Server, home: Path, short_path: Path, vm: str) -> None:
    content = protect(shared, vm=vm)
    begun = stream(shared, home, short_path / "vm.qmp", vm)
    with Vm(short_path, [begun["disks"][0]["target"]]) as running, copying(shared, begun["id"], running):
        write(running.uri(), pattern(7))
        shared.post(f"/v1/recoveries/{begun['id']}:abort")
    shown = shared.post(f"/v1/recoveries/{begun['id']}:undo", discard=True)
    assert (shown["state"], shown["phase"]) == ("aborted", "undone")
    assert list(home.iterdir()) == []
    assert read(shown["uri"], SIZE) == content
    shared.delete(f"/v1/forks/{shown['disks'][0]['fork']}")


def test_a_full_home_fails_a_stream_which_goes_on_when_there_is_room(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", home], check=True)
    try:
        begun = stream(shared, home, short_path / "vm.qmp", vm)
        with Vm(short_path, [begun["disks"][0]["target"]]) as running:
            shown = wait(shared, begun["id"], "failed")
            assert "No space left" in shown["reason"]
            assert read(running.uri(), SIZE) == content
            subprocess.run(["mount", "-o", "remount,size=200m", home], check=True)
            shared.post(f"/v1/recoveries/{begun['id']}:retry")
            wait(shared, begun["id"], "done")
            assert read(running.uri(), SIZE) == content
    finally:
        subprocess.run(["umount", home], check=True)


if os.geteuid() != 0:
    test_a_full_home_fails_a_stream_which_goes_on_when_there_is_room = pytest.mark.skip(
        reason="mounting takes root"
    )(test_a_full_home_fails_a_stream_which_goes_on_when_there_is_room)


# --- by commands


def test_every_step_by_its_command(shared: Server, home: Path, short_path: Path, vm: str) -> None:
    content = protect(shared, vm=vm)

    def cdp(*words: str | Path, fails: bool = False) -> str:
        command = [BIN / "cdp", "--state-dir", shared.state_dir, "recover", *words]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout

    def step(*words: str | Path) -> tuple[str, str]:
        found = json.loads(cdp(*words, "--json"))
        return found["state"], found["phase"]

    where = ("--to", f"{home}/", "--qmp", short_path / "vm.qmp", "--name", f"{vm}-n", "--no-protect")
    begun = json.loads(cdp("start", f"{vm}/vda@good", *where, "--json"))
    assert begun.keys() >= {"id", "state", "uri", "rto_ms"} and begun["state"] == "running"
    id = begun["id"]
    assert id in cdp("list") and id in {one["id"] for one in json.loads(cdp("list", "--json"))}
    assert step("abort", id) == ("aborted", "stopped")
    again = json.loads(cdp("retry", id, "--json"))
    assert (again["state"], again["phase"]) == ("running", "waiting")
    with Vm(short_path, [again["disks"][0]["blockdev"]]) as running:
        assert json.loads(cdp("show", id, "--follow", "--json").splitlines()[-1])["state"] == "done"
        assert step("undo", id)[1] in ("undoing", "undone")
        assert json.loads(cdp("show", id, "--follow", "--json").splitlines()[-1])["phase"] == "undone"
        cdp("retry", id)
        cdp("show", id, "--follow")
        assert step("commit", id) == ("done", "committed")
        assert "no undo now" in cdp("undo", id, fails=True)
        assert read(running.uri(), SIZE) == content
    assert at_home(begun["disks"][0]["target"]) == content


class Between:
    """Stands between the service and a monitor; while `deaf`, QEMU does not hear that a job is to be cancelled."""

    def __init__(self, path: Path, monitor: Path) -> None:
        self.deaf = threading.Event()
        self._monitor = monitor
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                service, _ = self._listener.accept()
                with service, socket.socket(socket.AF_UNIX) as qemu:
                    qemu.connect(str(self._monitor))
                    threading.Thread(target=self._answers, args=(qemu, service), daemon=True).start()
                    for line in service.makefile("rb"):
                        if not (self.deaf.is_set() and b"block-job-cancel" in line):
                            qemu.sendall(line)
                    qemu.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _answers(qemu: socket.socket, service: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := qemu.recv(1 << 16):
                service.sendall(part)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_an_undo_waits_for_the_end_of_the_protection(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    """Beside a mirror that is still there no other could begin: the undo is refused, and the VM stays protected at home."""
    content = protect(shared, vm=vm)
    begun = begin(shared, home, short_path / "between.qmp", f"{vm}/vda@good", protect=True, name=f"{vm}-n")
    with (
        Vm(short_path, [begun["uri"]]) as running,
        contextlib.closing(Between(short_path / "between.qmp", running.qmp)) as between,
    ):
        wait(shared, begun["id"], "done")
        soon(lambda: protected(shared, f"{vm}-n"), "its protection")
        between.deaf.set()
        with pytest.raises(ApiError, match="do not end"):
            shared.post(f"/v1/recoveries/{begun['id']}:undo")
        shown = shared.get(f"/v1/recoveries/{begun['id']}")
        assert (shown["phase"], shown["protected"]) == ("home", True)
        between.deaf.clear()
        assert protected(shared, f"{vm}-n")
        shared.post(f"/v1/recoveries/{begun['id']}:undo")
        assert wait(shared, begun["id"], "aborted")["phase"] == "undone"
        assert read(running.uri(), SIZE) == content


# --- replacing the old VM, and protection afterwards


def test_overwrite_of_a_protected_vm_changes_its_record_when_it_is_home_and_undo_changes_it_back(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    def monitor() -> str:
        with contextlib.suppress(ApiError):  # while its record changes
            return str(shared.get(f"/v1/vms/{vm}")["qmp"])
        return ""

    old = Source(short_path, SIZE)
    content = bytearray(SIZE)
    try:
        old.qmp.close()
        shared.request("PUT", f"/v1/vms/{vm}", {"qmp": str(old.monitor), "disks": ["disk0"]})
        protected(shared, vm)
        write(old.uri, pattern(1, MIB))
        content[:MIB] = pattern(1, MIB)
        shared.post(f"/v1/disks/{vm}/disk0:mark", name="good")
        write(old.uri, pattern(2, MIB))
    finally:
        old.close()
    disk = f"/v1/disks/{vm}/disk0"
    soon(lambda: shared.get(disk)["clients"] == 0, "the end of the mirror")
    body = {"overwrite": True, "protect": True, "force": True}
    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}/disk0@good", **body)
    assert "replaces its disks" in vm_state(shared, vm)["reason"]
    shared.post(f"/v1/recoveries/{begun['id']}:abort")
    assert monitor() == str(old.monitor) and "replaces" not in vm_state(shared, vm)["reason"]
    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}/disk0@good", **body)
    assert monitor() == str(old.monitor)
    with Vm(short_path, [begun["uri"]]) as running:
        wait(shared, begun["id"], "done")
        soon(lambda: monitor() == str(running.qmp), "the new record")
        assert protected(shared, vm)["name"] == f"{vm}/disk0"
        assert read(shared.uri(f"{vm}/disk0@latest"), SIZE) == content
        shared.post(f"/v1/recoveries/{begun['id']}:undo")
        assert wait(shared, begun["id"], "aborted")["phase"] == "undone"
        soon(lambda: monitor() == str(old.monitor), "the old record")
        assert read(running.uri(), SIZE) == content
    shared.delete(f"/v1/vms/{vm}")


def cdp(server: Server, *words: str | Path) -> str:
    command = [BIN / "cdp", "--state-dir", server.state_dir, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def repo(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository, which commands find by themselves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(short_path / "xdg"))
    monkeypatch.setenv("CDP_REPO", str(short_path / "repo"))
    subprocess.run([BIN / "cdp", "repo", "init", short_path / "repo", "--chunk-size", "64K"], check=True)
    return short_path / "repo"


@pytest.mark.parametrize("mode", ["mirror", "stream"])
def test_a_vm_is_replaced_from_its_backup(
    shared: Server, home: Path, short_path: Path, vm: str, repo: Path, mode: str
) -> None:
    """Its record names the new QEMU when it is home; its disk's history goes on, and after the commit the backup is let go."""
    content = protect(shared, vm=vm)
    cdp(shared, "repo", "add", repo)
    cdp(shared, "backup", "run", f"{vm}/vda@good")
    attached = shared.post("/v1/backups:attach", backup="backup:latest", repository=str(repo))
    before = shared.get(f"/v1/disks/{vm}/vda")["id"]
    body = {"overwrite": True, "protect": True, "mode": mode}
    begun = begin(shared, home, short_path / "vm.qmp", attached["point"], **body)
    with Vm(short_path, [begun["disks"][0]["blockdev"]]) as running:
        assert read(running.uri(), SIZE) == content
        write(running.uri(), pattern(11), 3 * MIB)
        content[3 * MIB : 3 * MIB + 4096] = pattern(11)
        shown = wait(shared, begun["id"], "done")
        assert (shown["vm"], shown["overwrites"]) == (vm, True)
        assert protected(shared, vm)["name"] == f"{vm}/vda"
        assert shared.get(f"/v1/disks/{vm}/vda")["id"] == before
        assert read(shared.uri(f"{vm}/vda@latest"), SIZE) == content
        with pytest.raises(ApiError, match="stand"):
            shared.post(f"/v1/backups/{attached['backup']}:detach")
        shared.post(f"/v1/recoveries/{begun['id']}:commit")
        shared.delete(f"/v1/forks/{begun['disks'][0]['fork']}")
        shared.post(f"/v1/backups/{attached['backup']}:detach")
        assert read(running.uri(), SIZE) == content
    shared.delete(f"/v1/vms/{vm}")


@pytest.mark.parametrize("mode", ["mirror", "stream"])
def test_overwrite_keeps_the_old_disk_until_the_commit_and_goes_on_with_its_history(
    shared: Server, home: Path, short_path: Path, vm: str, mode: str
) -> None:
    content = protect(shared, vm=vm)
    before = shared.get(f"/v1/disks/{vm}/vda")
    old = home / "vda.qcow2"
    old.write_bytes(b"the old disk")
    body: dict[str, Any] = {"overwrite": True, "protect": True, "mode": mode}
    with pytest.raises(ApiError, match="--overwrite"):
        begin(shared, home, short_path / "vm.qmp", f"{vm}/vda@good")
    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}/vda@good", **body)
    aside = home / f"vda.qcow2.before-{begun['id']}"
    assert aside.exists() == (mode == "stream"), "a stream's VM starts in its place"
    with Vm(short_path, [begun["disks"][0]["blockdev"]]) as running:
        shown = wait(shared, begun["id"], "done")
        assert (shown["vm"], shown["overwrites"]) == (vm, True)
        assert aside.read_bytes() == b"the old disk"
        assert protected(shared, vm)["name"] == f"{vm}/vda"
        write(running.uri(), pattern(11), 3 * MIB)
        content[3 * MIB : 3 * MIB + 4096] = pattern(11)
        after = shared.get(f"/v1/disks/{vm}/vda")
        assert (after["id"], after["grade"]) == (before["id"], "crash")
        assert read(shared.uri(f"{vm}/vda@latest"), SIZE) == content
        # What the copy of the whole disk cost: the MiB that differed, half of it zeroes, and what the guest wrote.
        grown = after["journal_bytes"] - before["journal_bytes"]
        assert MIB // 2 < grown < MIB

        shared.post(f"/v1/recoveries/{begun['id']}:undo")
        assert wait(shared, begun["id"], "aborted")["phase"] == "undone"
        soon(lambda: old.exists() and old.read_bytes() == b"the old disk", "the old disk in its place")
        with pytest.raises(ApiError, match="not protected"):
            shared.get(f"/v1/vms/{vm}")
        assert read(running.uri(), SIZE) == content

        shared.post(f"/v1/recoveries/{begun['id']}:retry")
        wait(shared, begun["id"], "done")
        protected(shared, vm)
        shared.post(f"/v1/recoveries/{begun['id']}:commit")
        assert not aside.exists()
        assert read(running.uri(), SIZE) == content
        shared.delete(f"/v1/vms/{vm}")


def test_a_new_vm_is_protected_as_a_disk_of_its_own_on_the_fork(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    name = f"{vm}-again"
    begun = stream(shared, home, short_path / "vm.qmp", vm, name=name, protect=True)
    with Vm(short_path, [begun["disks"][0]["target"]]) as running:
        wait(shared, begun["id"], "done")
        assert protected(shared, name)["name"] == f"{name}/vda"
        write(running.uri(), pattern(12), MIB)
        content[MIB : MIB + 4096] = pattern(12)
        shown = shared.get(f"/v1/disks/{name}/vda")
        assert shown["grade"] == "crash" and shown["base"].startswith(f"{vm}/vda@seq:")
        assert read(shared.uri(f"{name}/vda@latest"), SIZE) == content
        shared.delete(f"/v1/vms/{name}")


def test_a_vm_whose_protection_fails_is_home_and_protected_once_it_can_be(
    home: Path, short_path: Path, vm: str
) -> None:
    """The fork's directory is away for a while: the service does not mind, and the next one protects the VM."""
    with Server(short_path / "s") as server:
        content = protect(server, vm=vm)
        name = f"{vm}-again"
        begun = stream(server, home, short_path / "vm.qmp", vm, name=name, protect=True)
        fork = server.state_dir / "timelines" / server.get(f"/v1/disks/{name}/vda")["id"]
        fork.rename(short_path / "away")
        with Vm(short_path, [begun["disks"][0]["target"]]) as running:
            assert wait(server, begun["id"], "done")["protected"] is False
            said = soon(lambda: server.events("recovery.unprotected"), "the event")
            assert said[0]["recovery"] == begun["id"] and said[0]["reason"]
            assert server.post(f"/v1/recoveries/{begun['id']}:commit")["phase"] == "committed"
            server.kill()
            (short_path / "away").rename(fork)
            with Server(server.state_dir) as again:
                assert protected(again, name)["name"] == f"{name}/vda"
                assert again.get(f"/v1/recoveries/{begun['id']}")["protected"] is True
                assert read(running.uri(), SIZE) == content


def test_the_record_of_a_vm_in_qemu_system_names_its_device(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}/vda@good", name=f"{vm}-n", protect=True)
    qmp, log = short_path / "vm.qmp", short_path / "vm.log"
    command = ["qemu-system-x86_64", "-S", "-accel", "tcg", "-M", "q35", "-m", "64", "-nodefaults"]
    command += [
        "-display",
        "none",
        *(part.replace("--blockdev", "-blockdev") for part in on_export(0, begun["uri"])),
    ]
    command += ["-device", "virtio-blk-pci,id=root,drive=disk0", "-qmp", f"unix:{qmp},server=on,wait=off"]
    process = start(command, log)
    try:
        listens(process, qmp, log)
        wait(shared, begun["id"], "done")
        assert protected(shared, f"{vm}-n")["device"] == "root"
    finally:
        process.kill()
        process.wait()
    assert at_home(begun["disks"][0]["target"]) == content
    shared.delete(f"/v1/vms/{vm}-n")


# --- places


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="no loop devices")
def test_a_file_and_a_block_device_for_two_disks(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    contents = [protect(shared, name, vm=vm, number=number) for number, name in enumerate(("vda", "vdb"))]
    for content in contents:
        content[:MIB] = b"\xee" * MIB
    image = short_path / "device.img"
    image.write_bytes(b"\x55" * (SIZE + MIB))
    device = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        places = {"vda": str(home / "root.raw"), "vdb": device}
        body: dict[str, Any] = {"to": None, "targets": places, "point": f"{vm}@latest"}
        with pytest.raises(ApiError, match="would be lost"):
            begin(shared, home, short_path / "vm.qmp", f"{vm}/vdb@good", targets={"vdb": device})
        begun = begin(shared, home, short_path / "vm.qmp", **body, force=True)
        assert [disk["format"] for disk in begun["disks"]] == ["raw", "raw"]
        with Vm(short_path, [disk["uri"] for disk in begun["disks"]]) as running:
            wait(shared, begun["id"], "done")
            assert [read(running.uri(number), SIZE) for number in (0, 1)] == contents
            write(running.uri(1), pattern(3))
            contents[1][:4096] = pattern(3)
            with connected(running.uri(1)) as client:
                client.flush()
        assert (home / "root.raw").read_bytes() == contents[0]
        assert image.read_bytes()[:SIZE] == contents[1]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize(("mode", "on_base"), [("stream", True), ("stream", False), ("mirror", True)])
def test_a_chain_holds_what_differs_from_the_base_image(
    shared: Server, home: Path, short_path: Path, vm: str, mode: str, on_base: bool
) -> None:
    base = short_path / "template.qcow2"
    raw = bytearray(b"".join(pattern(number, MIB) for number in range(SIZE // MIB)))
    (short_path / "template.raw").write_bytes(raw)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", short_path / "template.raw", base)
    made_on = {"base": str(base)} if on_base else {}
    uri = shared.post("/v1/disks", name="vda", vm=vm, size=SIZE, **made_on)["uri"]
    with connected(uri) as client:
        client.pwrite(bytes(raw), 0)
        client.pwrite(b"\x77" * MIB, 5 * MIB)
        raw[5 * MIB : 6 * MIB] = b"\x77" * MIB
        shared.synced(f"{vm}/vda", write_blocking=True)
        shared.post(f"/v1/disks/{vm}/vda:mark", name="good")
    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}/vda@good", mode=mode, shape="chain")
    target = begun["disks"][0]["target"]
    with Vm(short_path, [target if mode == "stream" else begun["uri"]]) as running:
        write(running.uri(), b"\x78" * 4096)
        raw[:4096] = b"\x78" * 4096
        soon(lambda: any("point" in path.name for path in home.iterdir()), "its image of the point, begun")
        guest = Guest(running.uri(), raw)
        shown = wait(shared, begun["id"], "done")
        assert shown["copied_bytes"] == shown["total_bytes"] == SIZE
        guest.stop()
        assert read(running.uri(), SIZE) == raw
        with connected(running.uri()) as client:
            client.flush()
        chain = qemu_img("info", "-U", "--backing-chain", "--output=json", target)
        files = [os.path.realpath(one["filename"]) for one in chain]
        assert files == [target, str(home / "vda.point.qcow2"), *([str(base)] if on_base else [])]
        assert (chain[1]["actual-size"] < 4 * MIB) == on_base
        shared.post(f"/v1/recoveries/{begun['id']}:undo")
        assert wait(shared, begun["id"], "aborted")["phase"] == "undone"
        assert read(running.uri(), SIZE) == raw
    assert at_home(target) == raw


@pytest.mark.parametrize("named", [False, True])
def test_a_backup_comes_home_onto_the_base_image_where_its_disk_was_never(
    shared: Server, home: Path, short_path: Path, vm: str, repo: Path, named: bool
) -> None:
    """The backup says which image that was; one that changed since is not taken, unless it is named."""
    base = short_path / "template.raw"
    content = bytearray(pattern(7, SIZE))
    base.write_bytes(content)
    uri = shared.post("/v1/disks", name="vda", vm=vm, size=SIZE, base=str(base))["uri"]
    content[5 * MIB : 6 * MIB] = b"\x77" * MIB
    with connected(uri) as client:
        client.pwrite(b"\x77" * MIB, 5 * MIB)
        shared.synced(f"{vm}/vda", write_blocking=True)
        shared.post(f"/v1/disks/{vm}/vda:mark", name="good")
    made = json.loads(cdp(shared, "backup", "run", f"{vm}/vda@good", "--json"))
    assert made["disks"][0]["image"] == {"path": str(base), "digest": images.digest_of(base)}
    shared.delete(f"/v1/disks/{vm}/vda")

    def start(*words: str | Path) -> dict[str, Any]:
        where = ("--to", home, "--qmp", short_path / "vm.qmp", "--mode", "stream", "--as", "chain")
        begun = cdp(
            shared, "recover", "start", f"backup:{made['id']}", *where, "--no-protect", *words, "--json"
        )
        return dict(json.loads(begun))

    image: Path = base
    if named:
        image = short_path / "cache.raw"
        image.write_bytes(base.read_bytes())
        with open(base, "r+b") as file:
            file.write(b"a later release")
        refused = start()
        assert refused["disks"][0]["base"] == ""
        assert any(base.name in event["reason"] for event in shared.events("recovery.base-not-used"))
        shared.post(f"/v1/recoveries/{refused['id']}:abort")
    begun = start(*(("--base", image) if named else ()))
    target = begun["disks"][0]["target"]
    assert begun["disks"][0]["base"] == str(image)
    with Vm(short_path, [begun["disks"][0]["blockdev"]]) as running:
        write(running.uri(), b"\x78" * 4096)
        content[:4096] = b"\x78" * 4096
        wait(shared, begun["id"], "done")
        assert read(running.uri(), SIZE) == content
    chain = qemu_img("info", "-U", "--backing-chain", "--output=json", target)
    files = [os.path.realpath(one["filename"]) for one in chain]
    assert files == [target, str(home / "vda.point.qcow2"), str(image)]
    assert chain[1]["actual-size"] < 4 * MIB, "it holds what differs from the image"


def test_an_aborted_chain_leaves_the_vm_on_the_point(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    begun = stream(shared, home, short_path / "vm.qmp", vm, shape="chain")
    with Vm(short_path, [begun["disks"][0]["target"]]) as running:
        pid = shared.pids()["export"]
        os.kill(pid, signal.SIGSTOP)
        try:
            wait(shared, begun["id"], "copying")
            assert shared.post(f"/v1/recoveries/{begun['id']}:abort")["phase"] == "stopped"
        finally:
            os.kill(pid, signal.SIGCONT)
        assert read(running.uri(), SIZE) == content
        assert not (home / "vda.point.qcow2").exists()
        shared.post(f"/v1/recoveries/{begun['id']}:retry")
        wait(shared, begun["id"], "done")
        assert read(running.uri(), SIZE) == content


def test_the_point_before_a_gap_takes_force_and_what_that_means_is_said(home: Path, short_path: Path) -> None:
    """The guest writes while no server is there, and is told that it is kept: no point has it, until a resync."""
    with contextlib.closing(Source(short_path, SIZE)) as source:
        source.qmp.close()
        with Server(short_path / "g") as server:
            server.request("PUT", "/v1/vms/web", {"qmp": str(source.monitor), "disks": ["disk0"]})
            protected(server, "web")
            write(source.uri, pattern(1, MIB))
        write(source.uri, pattern(2, MIB), MIB)
        with Server(short_path / "g") as server:
            (gap,) = soon(lambda: server.events("disk.gap"), "the gap")
            protected(server, "web")
            points = server.get("/v1/disks/web/disk0:points?kind=rp")
            before = max(point["time_ns"] for point in points if point["time_ns"] <= gap["from_ns"])
            point = f"web/disk0@{names.format_time(before)}"
            qmp = short_path / "again.qmp"
            with pytest.raises(ApiError, match="before a gap"):
                begin(server, home, qmp, point)
            assert server.get("/v1/forks") == [] == server.get("/v1/recoveries")
            begun = begin(server, home, qmp, point, force=True, name="again")
            (event,) = server.events("recovery.forced")
            assert event["reason"] == begun["disks"][0]["warning"] != ""
            command = [BIN / "cdp", "--state-dir", server.state_dir, "recover", "show", begun["id"]]
            assert (
                event["reason"] in subprocess.run(command, check=True, capture_output=True, text=True).stderr
            )
            with Vm(short_path, [begun["uri"]], "again") as running:
                wait(server, begun["id"], "done")
                assert server.get(f"/v1/recoveries/{begun['id']}")["disks"][0]["warning"] == event["reason"]
                found = read(running.uri(), SIZE)
            assert found[:MIB] == pattern(1, MIB) and not any(found[MIB:])


# --- what else befalls it


def test_a_mirror_waits_for_a_target_that_was_killed(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}/vda@good")
    with Vm(short_path, [begun["uri"]], "early") as running:
        with copying(shared, begun["id"], running, "target-0", short_path / "vm.qmp"):
            guest = Guest(running.uri(), content)
            os.kill(shared.pids()["target-0"], signal.SIGKILL)
            before = guest.written
            soon(lambda: guest.written > before + 20, "writes after the kill")
        with Qmp(running.other) as qmp:
            qmp.call("block-job-set-speed", device=job_of(begun["id"]), speed=0)
        wait(shared, begun["id"], "done")
        guest.stop()
        assert read(running.uri(), SIZE) == content


def holds(server: Server, point: str) -> list[str]:
    """Why a pass of retention takes a point to be held, `DISK@seq:N`."""
    disk, _, seq = point.partition("@seq:")
    state = StateDir.open(server.state_dir)
    with Catalog.open(state, writable=False) as catalog:
        entry = catalog.get(disk)
        assert entry is not None
        found = gather(state, catalog, Config(), entry, now_ns=Clock.load(state.clock).now_ns())
    return [hold.why for hold in found.holds if hold.seq == int(seq)]


def test_retention_keeps_what_a_recovery_stands_on(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    content = protect(shared, vm=vm)
    disk = f"{vm}/vda"
    for number in range(3):
        write(shared.get(f"/v1/disks/{disk}")["uri"], pattern(number, 24 * MIB))
        shared.post(f"/v1/disks/{disk}:cut")
    shared.request("PATCH", f"/v1/policies/{disk}", {"size_cap": "64M", "keep_bp": "none"})
    for mode in ("mirror", "stream"):
        (home / mode).mkdir()
        body = {"mode": mode, "name": f"{vm}-{mode}"}
        begun = begin(shared, home / mode, short_path / f"{mode}.qmp", f"{disk}@good", **body)
        assert f"the fork {vm}-{mode}/vda stands on it" in holds(shared, begun["disks"][0]["point"])
        shared.post("/v1/prune", disk=disk)
        place = begun["disks"][0]["target"] if mode == "stream" else begun["uri"]
        with Vm(short_path, [place], mode) as running:
            wait(shared, begun["id"], "done")
            assert read(running.uri(), SIZE) == content
    # By that request, or by the service's own pass a moment before.
    went = [event for event in shared.events("retention.dropped") if event["disk"] == disk]
    assert went, "retention took what it could"


def test_every_step_that_is_not_possible_is_refused_by_name(
    shared: Server, home: Path, short_path: Path, vm: str
) -> None:
    protect(shared, vm=vm)
    begun = begin(shared, home, short_path / "vm.qmp", f"{vm}/vda@good")
    steps = f"/v1/recoveries/{begun['id']}"
    for verb in ("commit", "undo", "retry"):
        with pytest.raises(ApiError, match=f"running .waiting.: no {verb} now"):
            shared.post(f"{steps}:{verb}")
    with Vm(short_path, [begun["uri"]]):
        wait(shared, begun["id"], "done")
        with pytest.raises(ApiError, match=r"no abort now.*cdp recover undo"):
            shared.post(f"{steps}:abort")
        shared.post(f"{steps}:undo")
        wait(shared, begun["id"], "aborted")
        with pytest.raises(ApiError, match="no abort now"):
            shared.post(f"{steps}:abort")
        with pytest.raises(ApiError, match="no discard now"):
            shared.post(f"{steps}:undo", discard=True)


def test_what_is_refused_of_modes_and_places(shared: Server, home: Path, short_path: Path, vm: str) -> None:
    protect(shared, vm=vm)
    protect(shared, "vdb", vm=vm)
    qmp, point = short_path / "vm.qmp", f"{vm}/vda@good"
    refusals: dict[str, dict[str, Any]] = {
        "cannot be filled while a VM writes": {"mode": "stream", "format": "raw"},
        "nothing says where vda goes": {"to": None},
        "a chain is QCOW2": {"shape": "chain", "format": "raw"},
        "a base image is for a chain": {"base": str(home / "base.qcow2")},
        "there is no disk vdc to place": {"targets": {"vdc": str(home)}},
        f"{vm} also has {vm}/vdb": {"overwrite": True},
        "no directory here": {"to": str(home / "none")},
    }
    for match, more in refusals.items():
        with pytest.raises(ApiError, match=match):
            begin(shared, home, qmp, point, **more)
    with connected(shared.get(f"/v1/disks/{vm}/vda")["uri"]) as client:
        client.pwrite(pattern(1), 0)
        for disk in ("vda", "vdb"):
            shared.synced(f"{vm}/{disk}", write_blocking=True)
        with pytest.raises(ApiError, match=f"{vm} runs"):
            begin(shared, home, qmp, f"{vm}@latest", overwrite=True)
    assert begin(shared, home, qmp, point, overwrite=False)["disks"][0]["warning"] == ""
