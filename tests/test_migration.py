"""A protected VM moves to another QEMU while it runs; `cdp protect` is told the new monitor, before or after.

Whichever it is, every `crash` point from before, between and after holds what it must.
"""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest_image import guest_image
from tests.guest_vm import Guest
from tests.judged import BOUND_S, FEWEST, Judged, Lateness, longest_wait_s, make_disks, measure_waits
from tests.test_service import Server, until
from tools.kit.qmp import Qmp

pytestmark = pytest.mark.real


class Moving(Judged):
    """A VM under load, protected and in sync, and `there`, a QEMU that waits for it; both have its disks."""

    def __init__(self, directory: Path, server: Server, here: Guest, there: Guest) -> None:
        super().__init__(directory, server, here)
        self.there = there

    def move(self) -> None:
        with Qmp(self.guest.qmp2) as qmp:
            qmp.call("migrate", uri=f"unix:{self.directory}/migration")

            def done() -> bool:
                status = qmp.call("query-migrate").get("status")
                assert status not in ("failed", "cancelled"), status
                return bool(status == "completed")

            until(done, "end of the migration")
        self.guests.append(self.there)
        measure_waits(self.there)
        self.goes_on()

    def moves_to(self) -> dict[str, Any]:
        return dict(self.server.get("/v1/vms/web")["moves_to"] or {})

    def told(self, what: str) -> None:
        """The first disk's mirror is not, for this reason."""
        until(lambda: what in self.server.get("/v1/vms/web")["disks"][0]["reason"], what)

    def some_points(self) -> None:
        for _ in range(FEWEST):
            self.points_go_on()

    def judge(self) -> None:
        self.some_points()
        self.saw_no_error()
        self.check_points(random.Random(os.environ.get("CDP_SEED")))


@contextlib.contextmanager
def two_hosts(path: Path) -> Iterator[Moving]:
    image = guest_image()
    disks = make_disks(path, image)
    here = Guest(path / "here", disks, image=image)
    there = Guest(path / "there", disks, image=image, more=["-incoming", f"unix:{path}/migration"])
    with Server(path / "s") as server:
        vm = Moving(path, server, here, there)
        try:
            here.boot()
            vm.protect()
            vm.in_sync()
            vm.note_clock()
            vm.load()
            vm.some_points()
            there.launch()
            until(lambda: there.qmp.exists() and (path / "migration").exists(), "QEMU that waits for the VM")
            yield vm
        finally:
            here.close()
            there.close()


@pytest.mark.timeout(300)
def test_the_new_monitor_is_told_before_the_vm_moves(short_path: Path) -> None:
    with two_hosts(short_path) as vm, Lateness() as late:
        vm.server.request("PUT", "/v1/vms/web", {"qmp": str(vm.there.qmp)})
        until(lambda: "on its way" in vm.moves_to().get("reason", ""), "wait for the VM")
        before = vm.server.get("/v1/disks/web/root-device")["last_seq"]
        vm.goes_on()
        shown = vm.server.get("/v1/disks/web/root-device")
        assert shown["last_seq"] > before and shown["grade"] == "crash", "the mirror of the old QEMU goes on"
        assert set(vm.states()) == {"synced"}, "and is looked after"
        vm.move()
        until(lambda: not vm.moves_to(), "hand-over")
        vm.in_sync()
        assert longest_wait_s(vm.guest) <= BOUND_S + late.worst_s
        vm.guests[0].close()  # the end of its connection is no news: its place was taken
        vm.goes_on()
        assert set(vm.states()) == {"synced"}
        vm.judge()


@pytest.mark.timeout(300)
def test_a_vm_that_moved_without_a_word_is_said_to_have_moved(short_path: Path) -> None:
    with two_hosts(short_path) as vm:
        vm.move()
        vm.told("has moved")
        with Qmp(vm.guests[0].qmp2) as qmp:
            assert qmp.call("query-block-jobs") == []
        vm.protect()
        vm.in_sync()
        assert vm.server.events("disk.gap"), "it wrote before its new QEMU was named"
        vm.judge()
