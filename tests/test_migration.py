"""A protected VM moves to another QEMU while it runs; `cdp protect` is told the new monitor, before or after."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest_image import guest_image
from tests.guest_vm import Guest, file_disk
from tests.storm import BOUND_S, Lateness, longest_wait_s, measure_waits
from tests.test_service import Server, read, until
from tools.kit.qmp import Qmp

pytestmark = pytest.mark.real


def protect(server: Server, guest: Guest) -> None:
    server.request("PUT", "/v1/vms/web", {"qmp": str(guest.qmp)})


def disk(server: Server) -> dict[str, Any]:
    return dict(server.get("/v1/vms/web")["disks"][0])


def moves_to(server: Server) -> dict[str, Any]:
    return dict(server.get("/v1/vms/web")["moves_to"] or {})


def in_sync(server: Server) -> None:
    until(lambda: disk(server)["state"] == "synced", "mirror in sync")


@contextlib.contextmanager
def two_hosts(path: Path) -> Iterator[tuple[Server, Guest, Guest, Path]]:
    """A guest that counts, protected and in sync, and a QEMU that waits for it; both have its disk."""
    root = guest_image().copy_root(path / "root.raw")
    here = Guest(path / "here", file_disk("root", root))
    there = Guest(path / "there", file_disk("root", root), more=["-incoming", f"unix:{path}/migration"])
    with Server(path / "s") as server:
        try:
            here.boot()
            protect(server, here)
            in_sync(server)
            here.start("counter")
            here.wait_acks(5)
            there.launch()
            until(lambda: there.qmp.exists() and (path / "migration").exists(), "QEMU that waits for the VM")
            yield server, here, there, root
        finally:
            here.close()
            there.close()


def move(here: Guest, there: Guest) -> None:
    with Qmp(here.qmp2) as qmp:
        qmp.call("migrate", uri=f"unix:{there.directory.parent}/migration")

        def done() -> bool:
            status = qmp.call("query-migrate").get("status")
            assert status not in ("failed", "cancelled"), status
            return bool(status == "completed")

        until(done, "end of the migration")
    measure_waits(there)
    there.wait_acks(5)


def same(server: Server, root: Path) -> bool:
    return read(server.uri("web/root-device@latest"), root.stat().st_size) == root.read_bytes()


def test_the_new_monitor_is_told_before_the_vm_moves(short_path: Path) -> None:
    with two_hosts(short_path) as (server, here, there, root), Lateness() as late:
        protect(server, there)
        until(lambda: "on its way" in moves_to(server).get("reason", ""), "wait for the VM")
        before = server.get("/v1/disks/web/root-device")["last_seq"]
        here.wait_acks(5)
        shown = server.get("/v1/disks/web/root-device")
        assert shown["last_seq"] > before and shown["grade"] == "crash", "the mirror of the old QEMU goes on"
        assert disk(server)["state"] == "synced", "and is looked after"
        move(here, there)
        until(lambda: not moves_to(server), "hand-over")
        in_sync(server)
        assert longest_wait_s(there) <= BOUND_S + late.worst_s
        here.close()  # the end of its connection is no news: its place was taken
        there.wait_acks(5)
        assert disk(server)["state"] == "synced"
        there.open_shell()
        there.stop()
        until(lambda: same(server, root), "same content here and there")
        assert not [line for line in here.console + there.console if "failed" in line]


def test_a_vm_that_moved_without_a_word_is_said_to_have_moved(short_path: Path) -> None:
    with two_hosts(short_path) as (server, here, there, root):
        move(here, there)
        until(lambda: "has moved" in disk(server)["reason"], "notice of the move")
        with Qmp(here.qmp2) as qmp:
            assert qmp.call("query-block-jobs") == []
        protect(server, there)
        in_sync(server)
        assert server.events("disk.gap"), "it wrote before its new QEMU was named"
        there.open_shell()
        there.stop()
        until(lambda: same(server, root), "same content here and there")
