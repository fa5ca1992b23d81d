"""Points that the disks of a VM have in common: writes in dependent order, sessions, gaps, and what was dropped."""

import random
import time
from pathlib import Path

import pytest

from cdpserver.errors import CdpError
from cdpserver.journal import control
from cdpserver.journal.control import Grade
from cdpserver.journal.observed import NOT_WRITTEN
from cdpserver.names import At
from cdpserver.point import Point
from cdpserver.stretches import Stretch, grade_at, stretch_at, stretches
from cdpserver.vm.together import Member, common_points
from tests.core import INDEXER, SECOND_NS, Line, World, scratch
from tests.test_service import ApiError, Server, connected, pattern, read

SECONDS = 12
BLOCK = 4096


def member(name: str, disk: Line, now_ns: int) -> Member:
    with disk.points() as points:
        return Member(name, points.points(now_ns=now_ns, kind="rp"), stretches(points, now_ns=now_ns))


def at_time(disk: Line, time_ns: int, now_ns: int) -> int:
    with disk.points() as points:
        return points.resolve(At(time_ns), now_ns=now_ns).seq


def counter(disk: Line, seq: int) -> int:
    with disk.view(seq) as view:
        return int.from_bytes(view.read(0, 8), "big")


@pytest.mark.parametrize("seed", range(3))
def test_dependent_writes_never_disagree_at_a_point_of_the_vm(seed: int) -> None:
    """A counter on one disk, then the same on the other; sessions and reboots come in between."""
    dice = random.Random(seed)
    with scratch() as path:
        world = World(path)
        disks = [world.add(1 << 20), world.add(1 << 20)]
        for disk in disks:
            disk.write(0, bytes(BLOCK))
            disk.synced()
        for number in range(1, 120):
            for disk in disks:
                world.now_ns += dice.randrange(SECOND_NS // 4)
                disk.write(0, number.to_bytes(8, "big") + bytes(BLOCK - 8))
            chance = dice.random()
            if chance < 0.05:
                disk = dice.choice(disks)
                disk.disconnect(0)
                disk.write(BLOCK, b"n" * BLOCK)
            elif chance < 0.15:
                for disk in disks:
                    disk.synced()
            elif chance < 0.18:
                dice.choice(disks).cut()
            elif chance < 0.2:
                world.reboot(clean=False)
            elif chance < 0.25:
                # QEMU gave its mirror up, and the guest wrote on; it is said at once, or when the next has begun.
                disk = dice.choice(disks)
                session, seen_ns = disk.writer.state.session, world.now_ns
                world.now_ns += dice.randrange(1, SECOND_NS)
                disk.disconnect(0)
                if dice.random() < 0.5:
                    disk.write(2 * BLOCK, b"m" * BLOCK)
                world.now_ns += dice.randrange(1, SECOND_NS)
                disk.disk.lost(session, "test", whole_ns=seen_ns, freed_ns=None)
                world.now_ns += dice.randrange(1, SECOND_NS)
            elif chance < 0.35:
                INDEXER.call("drain", dice.choice(disks).directory, world.boot)
        now_ns = world.now_ns + SECOND_NS
        members = [member(f"d{n}", disk, now_ns) for n, disk in enumerate(disks)]
        found = common_points(members, slot_ns=SECOND_NS, now_ns=now_ns)
        assert found
        for point in found:
            first, second = (counter(disk, at_time(disk, point.time_ns, now_ns)) for disk in disks)
            assert first - second in (0, 1)
            assert min(point.grades.values()) > Grade.UNORDERED
        start_ns = min(one.stretches[0].start_ns for one in members) - SECOND_NS
        for disk, one in zip(disks, members, strict=True):
            for time_ns in [dice.randrange(start_ns, now_ns) for _ in range(100)]:
                check_stretch(disk, one.stretches, time_ns, now_ns)
        world.close()


def check_stretch(disk: Line, found: list[Stretch], time_ns: int, now_ns: int) -> None:
    """The stretches say of an instant what opening it says."""
    with disk.points() as points:
        try:
            position = points.resolve(At(time_ns), now_ns=now_ns)
        except CdpError:
            assert grade_at(found, time_ns) is None
            return
        state = points.journal.state_at(position.seq)
        part = stretch_at(found, time_ns)
        assert part is not None and (part.grade, part.evidence) == (state.grade, control.shown(state))


def test_a_vm_is_as_good_as_its_worst_disk() -> None:
    """The newest instant of a slot at which all are good; none where one is unordered or cannot be opened."""

    def rp(second: float) -> Point:
        return Point("rp", int(second * SECOND_NS), 1, 1, 4096, Grade.CRASH, None, 1, 3, NOT_WRITTEN)

    def stretch(start: float, end: float, grade: Grade = Grade.CRASH) -> Stretch:
        return Stretch(int(start * SECOND_NS), int(end * SECOND_NS), grade)

    a = Member("a", [rp(0.5), rp(1.5), rp(2.5), rp(4.5)], [stretch(0, 9, Grade.APP)])
    b = Member(
        "b", [rp(0.7), rp(1.7), rp(3.5)], [stretch(0, 1.6), stretch(1.6, 3, Grade.UNORDERED), stretch(3.2, 9)]
    )
    found = common_points([a, b], slot_ns=SECOND_NS, now_ns=5 * SECOND_NS)
    assert [(p.time_ns / SECOND_NS, p.records) for p in found] == [(0.7, 2), (1.5, 1), (3.5, 1), (4.5, 1)]
    assert {p.as_dict()["grade"] for p in found} == {"crash"}
    assert found[0].as_dict()["disks"] == {"a": "app", "b": "crash"}
    wide = common_points([a, b], slot_ns=2 * SECOND_NS, now_ns=5 * SECOND_NS)
    assert [p.time_ns / SECOND_NS for p in wide] == [1.5, 3.5], "the slot from 4 s on is not over"


@pytest.mark.real
def test_points_of_a_vm_over_nbd(short_path: Path) -> None:
    """Listed over the API; both disks open at that time, and agree. A fork of a disk of the VM is beside it."""
    with Server(short_path / "s") as server:
        uris = [server.add(name, vm="web") for name in ("a", "b")]
        with connected(uris[0]) as first, connected(uris[1]) as second:
            for number in range(200):
                for client in (first, second):
                    client.pwrite(pattern(number), 0)
                if number == 20:
                    server.synced("web/a", write_blocking=True)
                    assert server.get("/v1/vms/web:points") == []
                    server.synced("web/b", write_blocking=True)
                time.sleep(0.01)
            server.post("/v1/forks", point="web/a@latest", name="web/fork")
            time.sleep(1)
            found = server.get("/v1/vms/web:points")
        assert found and {point["grade"] for point in found} == {"crash"}
        assert server.get("/v1/vms/web:points?limit=1") == found[-1:]
        for point in found:
            assert set(point["disks"]) == {"web/a", "web/b"}
            a, b = (
                int.from_bytes(read(server.uri(f"web/{d}@{point['time']}"), 8), "big") for d in ("a", "b")
            )
            assert a - b in (0, 1)
        with pytest.raises(ApiError, match="no VM"):
            server.get("/v1/vms/nothing:points")
