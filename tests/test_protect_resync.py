"""What a resync of a running VM costs, and what it must not trust: real QEMU, its QCOW2 files and their dirty bitmaps."""

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.test_protect import disk, guest, in_sync, protect
from tests.test_service import ApiError, Server, until
from tools.kit.qmp import Qmp
from tools.kit.source import Machine, Source

pytestmark = pytest.mark.real

MIB = 1 << 20
SIZE = 64 * MIB
CLUSTER = 64 << 10


@contextlib.contextmanager
def source(directory: Path, format: str = "qcow2") -> Iterator[Source]:
    """A storage daemon whose disk holds what does not compress, and whose monitor nobody holds."""
    with Source(directory, SIZE, format=format) as made:
        made.qmp.close()
        with guest(made) as writes:
            for at in range(0, SIZE, MIB):
                writes.pwrite(random.Random(at).randbytes(MIB), at)
            writes.flush()
        yield made


def anchored(server: Server) -> dict[str, Any]:
    """The disk, once the target is in sync and anchored to a bitmap."""

    def look() -> dict[str, Any] | None:
        with contextlib.suppress(ApiError, OSError):
            seen = disk(server)
            if seen["state"] == "synced" and seen["bitmap"]:
                return seen
        return None

    return until(look, "an anchored bitmap")


def write_one_percent(writes: nbd.NBD) -> int:
    """Ten clusters in a thousand, here and there; how many bytes."""
    places = range(0, SIZE, 100 * CLUSTER)
    for place in places:
        writes.pwrite(random.Random(-place - 1).randbytes(CLUSTER), place)
    return len(places) * CLUSTER


def quits(made: Source) -> None:
    """QEMU ends cleanly."""
    with Qmp(made.monitor) as qmp:
        qmp.call("quit")
    made.process.wait(30)


def starts(made: Source) -> None:
    made.start()
    made.qmp.close()


def same(server: Server, made: Source) -> bool:
    return read(server.uri("web/disk0@latest")) == read(made.uri)


def read(uri: str) -> bytes:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        return b"".join(bytes(handle.pread(MIB, at)) for at in range(0, SIZE, MIB))
    finally:
        handle.shutdown()


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_one_percent_changed_while_disconnected(short_path: Path, format: str) -> None:
    """With a dirty bitmap about that is sent; without one everything is, and about that is journalled."""
    with source(short_path, format) as made:
        with Server(short_path / "state") as server:
            protect(server, made)
            assert anchored(server)["resync"]["why"] == "the first copy"
            assert server.stop() == 0
        with guest(made) as writes:
            changed = write_one_percent(writes)
            writes.flush()
        quits(made)
        starts(made)
        with Server(short_path / "state") as server:
            resync = in_sync(server)["resync"]
            assert not resync["under_way"]
            if format == "qcow2":
                assert resync["method"] == "bitmap", resync
                assert changed <= resync["sent_bytes"] <= 1.5 * changed
            else:
                assert resync["method"] == "full", resync
                assert resync["why"].startswith("the source has no dirty bitmap")
                assert resync["sent_bytes"] == SIZE
            assert changed <= resync["journalled_bytes"] <= 1.5 * changed
            assert same(server, made)
            anchored(server)
            (event,) = server.events("disk.protected")[-1:]
            assert event["method"] == resync["method"] and event["sent_bytes"] == resync["sent_bytes"]


def test_a_killed_qemu_leaves_no_bitmap_that_counts(short_path: Path) -> None:
    with source(short_path) as made, Server(short_path / "state") as server:
        protect(server, made)
        anchored(server)
        made.process.kill()
        made.process.wait()
        starts(made)
        until(lambda: server.events("disk.resynced"), "end of the resync")
        resync = in_sync(server)["resync"]
        assert (resync["method"], resync["sent_bytes"]) == ("full", SIZE)
        assert resync["why"] == "the source has no dirty bitmap: it is no QCOW2 file, or its QEMU was killed"
        assert same(server, made)


@pytest.mark.parametrize("qemu", ["restarts", "goes on"])
def test_a_store_put_back_from_an_older_copy_is_noticed(short_path: Path, qemu: str) -> None:
    """Its journal is sound, its disk has the same identity, and QEMU sees no difference: the anchor tells."""
    state, copy = short_path / "state", short_path / "copy"
    with source(short_path) as made:
        with Server(state) as server:
            protect(server, made)
            before = anchored(server)["bitmap"]
            server.stop()
        shutil.copytree(state, copy, ignore=shutil.ignore_patterns("*.sock", "*.ctl"))
        with Server(state) as server:
            until(lambda: anchored(server)["bitmap"] != before, "the anchor of this run")
            with guest(made) as writes:
                write_one_percent(writes)
            until(lambda: same(server, made), "the guest's writes")
            server.stop()
        shutil.rmtree(state)
        copy.rename(state)
        if qemu == "restarts":
            quits(made)
            starts(made)
        with Server(state) as server:
            resync = until(lambda: in_sync(server)["resync"], "a resync")
            assert resync["method"] == "full", resync
            assert same(server, made)


def rewritten_while_nobody_looked(made: Source, state: Path) -> None:
    """A disk whose bitmap has all of it, and whose QEMU was started anew: the next service resyncs it by that."""
    with Server(state) as server:
        protect(server, made)
        anchored(server)
        server.stop()
    with guest(made) as writes:
        for at in range(0, SIZE, MIB):
            writes.pwrite(random.Random(-at - 1).randbytes(MIB), at)
    quits(made)
    starts(made)


@pytest.mark.parametrize("dies", ["target", "service", "target again and again"])
def test_what_dies_while_changes_are_sent(short_path: Path, dies: str) -> None:
    """Whatever was sent by then: in the end everything is there, also what the guest wrote meanwhile."""
    state = short_path / "state"
    with source(short_path) as made:
        rewritten_while_nobody_looked(made, state)
        with Server(state) as server, guest(made) as writes:
            until(lambda: (disk(server)["resync"] or {}).get("method") == "bitmap", "a resync by bitmap")
            if dies == "service":
                server.kill()
                writes.pwrite(b"s" * CLUSTER, 0)
            else:
                for _ in range(3 if dies == "target again and again" else 1):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(until(lambda: server.pids()["target-0"], "a target"), signal.SIGKILL)
                    writes.pwrite(b"t" * CLUSTER, 3 * CLUSTER)
            with Server(state) if dies == "service" else contextlib.nullcontext(server) as now:
                writes.pwrite(b"u" * CLUSTER, 5 * CLUSTER)
                anchored(now)
                until(lambda: same(now, made), "all content")
                anchored(now)


def test_removing_a_vm_leaves_nothing_in_qemu(short_path: Path) -> None:
    with source(short_path) as made, Server(short_path / "state") as server:
        protect(server, made)
        anchored(server)
        assert server.delete("/v1/vms/web")["left"] == ""
        with Qmp(made.monitor) as qmp:
            assert ours(qmp) == []


def ours(qmp: Qmp) -> list[str]:
    """Nodes, jobs and bitmaps of ours in a QEMU, but for those of a mirror in sync."""
    nodes = qmp.call("query-named-block-nodes", flat=True)
    names = [node["node-name"] for node in nodes]
    names += [bitmap.get("name", "") for node in nodes for bitmap in node.get("dirty-bitmaps", [])]
    names += [job["device"] for job in qmp.call("query-block-jobs")]
    return [name for name in names if name.startswith("cdp-")]


def test_a_running_guest_is_held_for_an_instant(short_path: Path) -> None:
    """And goes on, also when who held it has died: then it is let go by who comes next."""
    state = short_path / "state"
    with Machine(short_path, SIZE, format="qcow2", runs=True) as machine:
        machine.io(f"write -P 1 0 {SIZE}")
        machine.qmp.close()
        with Server(state) as server:
            server.request("PUT", "/v1/vms/web", {"qmp": str(machine.monitor)})
            anchored(server)
            server.stop()
        uuid = json.loads(next((state / "timelines").glob("*/timeline.json")).read_text())["uuid"]
        machine.qmp = Qmp(machine.monitor)
        machine.qmp.call("block-job-cancel", device=f"cdp-{uuid[:16]}", force=True)
        machine.qmp.wait("BLOCK_JOB_CANCELLED")
        machine.io("write -P 2 8M 640k")
        # As a service leaves it that is killed while it holds the guest.
        machine.qmp.call("blockdev-add", driver="null-co", node_name=f"cdp-{uuid[:16]}-held", size=512)
        machine.qmp.call("stop")
        machine.qmp.close()
        with Server(state) as server:
            resync = anchored(server)["resync"]
            assert resync["method"] == "bitmap", resync
            assert 640 << 10 <= resync["sent_bytes"] <= 2 * (640 << 10)
            assert 0 < resync["pause_ns"] < 2 * 10**9
            server.stop()
        machine.qmp = Qmp(machine.monitor)
        assert machine.qmp.call("query-status")["status"] == "running"
        assert not [name for name in ours(machine.qmp) if name.endswith(("-held", "-safe", "-sink", "-copy"))]
