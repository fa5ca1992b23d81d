"""Protected VMs end to end: a service and a real QEMU, and what befalls either of them while a guest writes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.test_cli import at_a_terminal
from tests.test_service import ApiError, Server, until
from tools.kit.processes import run, within
from tools.kit.qmp import Qmp
from tools.kit.source import Source, make_image

pytestmark = pytest.mark.real

SIZE = 8 << 20
BLOCK = 4096


@contextlib.contextmanager
def world(directory: Path) -> Iterator[tuple[Server, Source]]:
    """A service, and a QEMU whose monitor nobody holds."""
    with Server(directory / "state") as server, Source(directory, SIZE) as source:
        source.qmp.close()
        yield server, source


def protect(server: Server, source: Source, **more: Any) -> dict[str, Any]:
    body = {"qmp": str(source.monitor), "disks": ["disk0"], **more}
    return dict(server.request("PUT", "/v1/vms/web", body))


def disk(server: Server) -> dict[str, Any]:
    return dict(server.get("/v1/vms/web")["disks"][0])


def in_sync(server: Server) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        with contextlib.suppress(ApiError, OSError):
            if disk(server)["state"] == "synced":
                return disk(server)
        return None

    return until(look, "mirror in sync")


def cdp(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "recovery.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done


def graded(server: Server, grade: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        (seen,) = server.get("/v1/overview")["disks"]
        return dict(seen) if seen["grade"] == grade else None

    return until(look, f"grade {grade}")


@contextlib.contextmanager
def guest(source: Source) -> Iterator[nbd.NBD]:
    """What plays the guest."""
    handle = nbd.NBD()
    handle.connect_uri(source.uri)
    try:
        yield handle
    finally:
        handle.shutdown()


def content(uri: str) -> bytes:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        return bytes(handle.pread(SIZE, 0))
    finally:
        handle.shutdown()


def same_as_source(server: Server, source: Source) -> bool:
    return content(server.uri("web/disk0@latest")) == content(source.uri)


def all_arrives(server: Server, source: Source) -> None:
    """What the guest wrote is there in the end: on a busy machine a worker may be back later than a guest waits."""
    until(lambda: same_as_source(server, source), "the source's content")


def test_a_vm_is_shown_while_its_record_changes(short_path: Path) -> None:
    """Its controller stands while somebody else talks to QEMU, here for as long as a monitor says nothing."""
    with world(short_path) as (server, source), socket.socket(socket.AF_UNIX) as silent:
        protect(server, source)
        in_sync(server)
        silent.bind(str(short_path / "silent.qmp"))
        silent.listen()
        silent.settimeout(30)
        refused: list[ApiError] = []

        def change() -> None:
            try:
                protect(server, source, qmp=str(short_path / "silent.qmp"))
            except ApiError as error:
                refused.append(error)

        changing = threading.Thread(target=change)
        changing.start()
        talk, _ = silent.accept()
        assert disk(server)["state"] == "synced"
        assert [vm["vm"] for vm in server.get("/v1/vms")] == ["web"]
        talk.close()
        changing.join(30)
        assert refused and in_sync(server)["name"] == "web/disk0"


def test_protect_write_and_points_are_crash(short_path: Path) -> None:
    with world(short_path) as (server, source):
        with guest(source) as writes:
            writes.pwrite(b"a" * BLOCK, 0)
            shown = protect(server, source)
            assert shown["vm"] == "web"
            assert {"name", "node", "state", "uri"} <= shown["disks"][0].keys()
            assert in_sync(server)["name"] == "web/disk0"
            writes.pwrite(b"b" * BLOCK, BLOCK)
            seen = graded(server, "crash")
            assert not seen["resync"]["under_way"] and seen["rpo_ns"] < 5 * 10**9
            assert same_as_source(server, source)
        points = until(lambda: server.get("/v1/disks/web/disk0:points?kind=rp"), "recovery point")
        assert points[-1]["grade"] == "crash"
        evidence = points[-1]["evidence"]
        observed = evidence["observed"]
        assert (observed["by"], observed["ready"], observed["io_status"]) == ("qmp", True, "ok")
        began_ns = server.get("/v1/disks/web/disk0")["created_ns"]
        assert began_ns < observed["time_ns"] <= points[-1]["time_ns"]
        assert server.get("/v1/points/web@latest")["disks"][0]["evidence"] == evidence
        assert server.events("disk.protected")
        answer = server.delete("/v1/vms/web")
        assert answer == {"vm": "web", "removed": True, "left": ""}
        with Qmp(source.monitor) as qmp:
            assert qmp.call("query-block-jobs") == []
            assert not [n for n in qmp.call("query-named-block-nodes") if n["node-name"].startswith("cdp-")]
        with pytest.raises(ApiError):
            server.get("/v1/vms/web")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_target_that_is_killed_or_hangs_never_holds_the_guest_for_long(
    short_path: Path, how: signal.Signals
) -> None:
    with world(short_path) as (server, source), guest(source) as writes:
        protect(server, source)
        in_sync(server)
        os.kill(server.pids()["target-0"], how)
        with within(5, "writes that wait for two seconds on a machine with nothing else to do"):
            for number in range(20):
                writes.pwrite(bytes([number]) * BLOCK, number * BLOCK)
        assert bool(server.events("target.hung")) == (how == signal.SIGSTOP)
        graded(server, "crash")
        in_sync(server)
        all_arrives(server, source)


def test_a_restarted_service_takes_the_mirror_over(short_path: Path) -> None:
    with world(short_path) as (server, source), guest(source) as writes:
        protect(server, source)
        in_sync(server)
        server.kill()
        writes.pwrite(b"c" * BLOCK, 0)
        with Server(server.state_dir) as again:
            in_sync(again)
            writes.pwrite(b"d" * BLOCK, BLOCK)
            graded(again, "crash")
            assert same_as_source(again, source)


def test_protected_again_after_a_removal(short_path: Path) -> None:
    with world(short_path) as (server, source), guest(source) as writes:
        protect(server, source)
        in_sync(server)
        assert server.request("DELETE", "/v1/vms/web")["left"] == ""
        writes.pwrite(b"e" * BLOCK, 0)
        protect(server, source)
        in_sync(server)
        assert same_as_source(server, source)


@pytest.mark.parametrize("more", [{"drive_mirror": True}, {"wait": True}], ids=["drive-mirror", "wait"])
def test_other_ways_to_mirror(short_path: Path, more: dict[str, Any]) -> None:
    with world(short_path) as (server, source), guest(source) as writes:
        protect(server, source, **more)
        in_sync(server)
        os.kill(server.pids()["target-0"], signal.SIGKILL)
        for number in range(5):
            writes.pwrite(bytes([number]) * BLOCK, number * BLOCK)
        graded(server, "crash")
        all_arrives(server, source)
        assert server.delete("/v1/vms/web")["left"] == ""


def stopped(server: Server, writes: nbd.NBD, byte: bytes) -> threading.Thread:
    """A write of the guest, which the service does not see: it is stopped."""
    assert server.stop() == 0
    writer = threading.Thread(target=lambda: writes.pwrite(byte * BLOCK, 0), daemon=True)
    writer.start()
    return writer


def anchored(server: Server) -> dict[str, Any]:
    return until(lambda: (seen := in_sync(server))["bitmap"] and seen, "an anchored bitmap")


def test_a_mirror_that_runs_is_changed_by_protecting_again(short_path: Path) -> None:
    """How long a write waits is fixed in QEMU: the mirror begins anew, and sends only what changed."""
    with world(short_path) as (server, source), guest(source) as writes:
        protect(server, source, wait=True)
        anchored(server)
        assert protect(server, source)["wait"] is False
        assert anchored(server)["resync"]["method"] == "bitmap"
        writer = stopped(server, writes, b"i")
        writer.join(5)
        assert not writer.is_alive(), "two seconds on a machine with nothing else to do"

        with Server(server.state_dir) as again:
            anchored(again)
            assert protect(again, source, wait=True)["wait"] is True
            assert anchored(again)["resync"]["method"] == "bitmap"
            writer = stopped(again, writes, b"j")
            writer.join(3)
            assert writer.is_alive(), "longer than a guest waits that is not to"

        with Server(server.state_dir) as again:
            writer.join(30)
            assert not writer.is_alive()
            anchored(again)
            protect(again, source, wait=True, drive_mirror=True)
            assert in_sync(again)["resync"]["why"] == "drive-mirror knows no bitmaps"
            all_arrives(again, source)


def test_the_command_protects_and_waits(short_path: Path) -> None:
    """The contract of `cdp protect` as a program reads it, and what it says at a terminal."""
    with world(short_path) as (server, source):
        asked = ["protect", "web", "--qmp", str(source.monitor), "--disk", "disk0", "--wait-synced"]
        asked += ["--state-dir", str(server.state_dir)]
        code, seen_there = at_a_terminal(server.state_dir, *asked)
        assert code == 0 and "protecting web" in seen_there, "the bar"
        assert "web/disk0: " in seen_there, "the last copy in words"
        shown = json.loads(cdp(*asked, "--json").stdout)
        assert shown["vm"] == "web"
        (seen,) = shown["disks"]
        assert (seen["name"], seen["state"], seen["node"]) == ("web/disk0", "synced", disk(server)["node"])
        assert content(seen["uri"]) == content(source.uri)
        # Said again, what runs is taken over, and the table has all of it.
        (row,) = cdp(*asked).stdout.splitlines()[1:]
        assert row.split()[:4] == [seen[key] for key in ("name", "node", "state", "uri")]


def test_other_disks_said_end_the_mirrors_of_those_left_out(short_path: Path) -> None:
    other = short_path / "other.raw"
    make_image(other, SIZE, "raw")
    with Server(short_path / "state") as server, Source(short_path, SIZE) as source:
        file = {"driver": "file", "filename": str(other)}
        source.qmp.call("blockdev-add", driver="raw", node_name="disk1", file=file)
        source.qmp.close()
        protect(server, source, disks=["disk0", "disk1"])
        until(
            lambda: all(one["state"] == "synced" for one in server.get("/v1/vms/web")["disks"]),
            "both mirrors in sync",
        )
        protect(server, source, disks=["disk0"])
        assert in_sync(server)["name"] == "web/disk0"
        assert len(server.get("/v1/vms/web")["disks"]) == 1
        assert server.stop() == 0
        with Qmp(source.monitor) as qmp:
            assert len(qmp.call("query-block-jobs")) == 1
            nodes = [node["node-name"] for node in qmp.call("query-named-block-nodes")]
            assert len([name for name in nodes if name.startswith("cdp-")]) == 2, "target and filter of one"


def test_a_killed_qemu_is_waited_for_and_mirrored_again(short_path: Path) -> None:
    with world(short_path) as (server, source):
        protect(server, source)
        in_sync(server)
        source.process.kill()
        source.process.wait()
        until(lambda: disk(server)["state"] == "waiting", "the lost QEMU")
        shown = cdp("status", "--state-dir", str(server.state_dir)).stdout
        assert shown.startswith("! web/disk0 is not protected now: ") and "cdp disk synced" not in shown
        (seen,) = server.get("/v1/overview")["disks"]
        assert seen["mirror"]["state"] == "waiting" and seen["mirror"]["reason"] in shown
        assert 0 < seen["lag_ns"] <= seen["rpo_ns"], "its target alone would say 0"
        with open(source.image, "r+b") as image:
            image.write(b"f" * BLOCK)
        source.start()
        source.qmp.close()
        in_sync(server)
        graded(server, "crash")
        assert same_as_source(server, source)
        assert server.events("disk.degraded") and server.events("disk.resynced")


def test_a_disk_that_has_grown_is_mirrored_on(short_path: Path) -> None:
    """Points from before keep the size that the disk had then."""
    with world(short_path) as (server, source):
        with guest(source) as writes:
            writes.pwrite(b"s" * BLOCK, 0)
        protect(server, source)
        in_sync(server)
        server.post("/v1/disks/web/disk0:mark", name="small")
        source.process.kill()
        source.process.wait()
        until(lambda: disk(server)["state"] == "waiting", "the lost QEMU")
        os.truncate(source.image, 2 * SIZE)
        source.start()
        source.qmp.close()
        in_sync(server)
        assert server.get("/v1/disks/web/disk0")["size"] == 2 * SIZE
        with guest(source) as writes:
            assert writes.get_size() == 2 * SIZE
            writes.pwrite(b"l" * BLOCK, 2 * SIZE - BLOCK)
        assert size_and_end(server.uri("web/disk0@small")) == (SIZE, bytes(BLOCK))
        until(lambda: size_and_end(server.uri("web/disk0@latest")) == (2 * SIZE, b"l" * BLOCK), "the new end")
        assert same_as_source(server, source)


def size_and_end(uri: str) -> tuple[int, bytes]:
    """How large an export is, and its last block."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        size = handle.get_size()
        return size, bytes(handle.pread(BLOCK, size - BLOCK))
    finally:
        handle.shutdown()


def test_a_job_that_somebody_ends_is_started_again(short_path: Path) -> None:
    """An operator's command comes between two of ours: the monitor is free while the service does not run."""
    with world(short_path) as (server, source), guest(source) as writes:
        protect(server, source)
        in_sync(server)
        server.kill()
        with Qmp(source.monitor) as qmp:
            (job,) = qmp.call("query-block-jobs")
            qmp.call("block-job-cancel", device=job["device"], force=True)
            qmp.wait("BLOCK_JOB_CANCELLED")
        writes.pwrite(b"g" * BLOCK, 0)
        with Server(server.state_dir) as again:
            graded(again, "crash")
            in_sync(again)
            assert same_as_source(again, source)


def test_a_monitor_that_another_program_holds(short_path: Path) -> None:
    with (
        world(short_path) as (server, source),
        Qmp(source.monitor),
        pytest.raises(ApiError, match="another program holds this monitor"),
    ):
        protect(server, source)


def test_a_guest_that_is_to_wait_waits_for_room(short_path: Path) -> None:
    """Also where the worker dies meanwhile: QEMU sends the write again, and it waits again."""
    store = short_path / "store"
    store.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=100m,mode=700", "cdp-room", store)
    try:
        with Server(store / "s") as server, Source(short_path, SIZE) as source, guest(source) as writes:
            source.qmp.close()
            protect(server, source, wait=True)
            in_sync(server)
            filler = store / "filler"
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
            enough = threading.Event()
            done_at = [time.monotonic()]

            def write() -> None:
                while not enough.is_set():
                    writes.pwrite(os.urandom(1 << 20), len(done_at) % 8 << 20)
                    done_at.append(time.monotonic())

            def waits() -> bool:
                """Longer than a guest waits that is not to."""
                return time.monotonic() - done_at[-1] > 3

            writer = threading.Thread(target=write)
            writer.start()
            try:
                until(waits, "write without room")
                os.kill(server.pids()["target-0"], signal.SIGKILL)
                before = len(done_at)
                writer.join(3)
                assert len(done_at) == before, "it waits for the next worker, too"
            finally:
                enough.set()
                filler.unlink()
                writer.join(60)
            assert not writer.is_alive()
            in_sync(server)
            all_arrives(server, source)
            assert not server.events("disk.gap")
            print(
                server.events("target.hung"), server.events("disk.degraded"), server.events("target.no-space")
            )
            assert server.delete("/v1/vms/web")["left"] == ""
    finally:
        run("umount", "--lazy", store)


def test_a_guest_that_is_to_wait_leaves_no_gap(short_path: Path) -> None:
    with world(short_path) as (server, source), guest(source) as writes:
        protect(server, source, wait=True)
        in_sync(server)
        assert server.stop() == 0
        writer = threading.Thread(target=lambda: writes.pwrite(b"h" * BLOCK, 0))
        writer.start()
        writer.join(3)
        assert writer.is_alive(), "longer than a guest waits that is not to"
        with Server(server.state_dir) as again:
            writer.join(30)
            assert not writer.is_alive()
            graded(again, "crash")
            in_sync(again)
            assert same_as_source(again, source)
            assert not again.events("disk.gap")
