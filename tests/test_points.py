"""Points as the index and the header log tell them: names that look like something else, and how dense they are listed."""

import time
from pathlib import Path

import pytest

from cdpserver import names
from cdpserver.errors import RefusedError
from cdpserver.journal import control
from cdpserver.journal.control import Grade
from tests.core import INDEXER, SECOND_NS, World, scratch
from tests.test_service import Server, pattern, write


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("name", ["now", "m", "four", "cut-1", "a" * 64])
def test_a_bookmark_of_any_length_is_listed_and_found(name: str, indexed: bool) -> None:
    """Filed under `mark/NAME`, a name of three letters has a key as long as that of a seq."""
    with scratch() as path:
        world = World(path)
        disk = world.add(1 << 20)
        disk.write(0, b"x" * 4096)
        disk.synced()
        disk.mark(name)
        if indexed:
            INDEXER.call("drain", disk.directory, world.boot)
        with disk.points() as points:
            found = points.points(now_ns=world.now_ns + SECOND_NS, kind="bookmark")
            assert [(point.name, point.seq) for point in found] == [(name, disk.marks[name])]
            position = points.bookmark(name)
            assert position is not None and position.seq == disk.marks[name]
        world.close()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_bookmark_may_name_an_earlier_record_and_its_grade(indexed: bool) -> None:
    """As those of a VM do: what came between it and its record is not in it."""
    with scratch() as path:
        world = World(path)
        disk = world.add(1 << 20)
        disk.write(0, b"x" * 4096)
        disk.synced()
        disk.write(0, b"y" * 4096)
        at = disk.last_seq, disk.writer.last_time_ns
        world.now_ns += SECOND_NS
        disk.write(0, b"z" * 4096)
        interval = disk.writer.interval
        disk.writer.mark(control.mark("frozen", at=at, grade=Grade.APP), interval=interval)
        if indexed:
            INDEXER.call("drain", disk.directory, world.boot)
        with disk.points() as points:
            (found,) = points.points(now_ns=world.now_ns + SECOND_NS, kind="bookmark")
            assert (found.seq, found.time_ns, found.grade) == (*at, Grade.APP)
            place = points.resolve(names.Mark("frozen"), now_ns=world.now_ns)
            assert (place.seq, place.time_ns) == at
        with disk.view(at[0]) as view:
            assert view.read(0, 1) == b"y"
        disk.cut()
        with pytest.raises(RefusedError, match="meanwhile"):
            disk.writer.mark(control.mark("late", at=at), interval=interval)
        world.close()


@pytest.mark.parametrize("indexed", [True, False])
def test_recovery_points_are_listed_no_denser_than_asked(indexed: bool) -> None:
    """One a slot, its newest second, with what happened in all of it; over a cut and in windows as well."""
    with scratch() as path:
        world = World(path)
        disk = world.add(1 << 20)
        disk.write(0, b"x" * 4096)
        disk.synced()
        start_ns = world.now_ns // (60 * SECOND_NS) * 60 * SECOND_NS + 60 * SECOND_NS
        for second in range(25):
            world.now_ns = start_ns + second * SECOND_NS + 7
            disk.write(0, second.to_bytes(2, "big") * 2048)
            if second == 12:
                disk.cut()
        if indexed:
            INDEXER.call("drain", disk.directory, world.boot)
        every_ns = 10 * SECOND_NS
        now_ns = start_ns + 25 * SECOND_NS
        with disk.points() as points:

            def listed(**more: int) -> list[tuple[int, int]]:
                found = points.points(now_ns=now_ns, kind="rp", every_ns=every_ns, **more)
                return [((point.time_ns - start_ns) // SECOND_NS, point.records) for point in found]

            # The slot that begins at 20 s is not over.
            assert listed() == [(9, 10), (19, 10)]
            assert listed(limit=1) == listed(since_ns=start_ns + 10 * SECOND_NS) == [(19, 10)]
            assert listed(until_ns=start_ns + 12 * SECOND_NS) == [(9, 10)]
            assert listed(since_ns=start_ns + 9 * SECOND_NS, until_ns=start_ns + 9 * SECOND_NS + 7) == [
                (9, 10)
            ]
            assert points.count(now_ns=now_ns, every_ns=every_ns) == 2
            # Not a whole number of seconds: never denser than that.
            assert len(points.points(now_ns=now_ns, kind="rp", every_ns=every_ns - 1)) == 2
            assert points.count(now_ns=now_ns) == len(points.points(now_ns=now_ns, kind="rp")) == 25
        world.close()


@pytest.mark.real
def test_the_policy_says_how_dense_recovery_points_are_listed(short_path: Path) -> None:
    """Over the API, whole and in pages, and as a disk's figure."""
    with Server(short_path / "s") as server:
        uri = server.add()
        server.synced("d", write_blocking=True)
        for number in range(4):
            write(uri, pattern(number))
            time.sleep(0.8)

        def counts() -> list[int]:
            paged = server.get("/v1/disks/d:points?kind=rp&page_size=100")["items"]
            listed = server.get("/v1/disks/d:points?kind=rp")
            return [len(paged), len(listed), server.get("/v1/disks/d")["points"]]

        assert min(counts()) >= 3
        server.request("PATCH", "/v1/policies/d", {"rp_every": "1h", "bp_every": "1h"})
        assert max(counts()) <= 1, "one an hour, once that is over"


@pytest.mark.parametrize("indexed", [True, False])
def test_each_point_shows_what_its_synced_rests_on(indexed: bool) -> None:
    """Across sessions and intervals, also when the listing begins in the middle; an `app` bookmark shows that it was frozen."""
    with scratch() as path:
        world = World(path)
        disk = world.add(1 << 20)

        def write() -> None:
            world.now_ns += 2 * SECOND_NS
            disk.write(0, b"x" * 4096)

        write()
        disk.synced(observed={"by": "operator", "ago_ns": 0})
        said_ns = world.now_ns
        write()
        disk.cut()
        write()
        disk.disconnect()
        write()
        disk.synced(observed={"by": "qmp", "ready": True, "io_status": "ok", "ago_ns": 3})
        seen_ns = world.now_ns - 3
        write()
        disk.writer.mark(control.mark("quiet", grade=Grade.APP))
        if indexed:
            INDEXER.call("drain", disk.directory, world.boot)
        with disk.points() as points:
            found = points.points(now_ns=world.now_ns + 2 * SECOND_NS)
            evidence = [point.as_dict()["evidence"] for point in found if point.kind == "rp"]
            times = [one["observed"] and one["observed"]["time_ns"] for one in evidence]
            assert times == [said_ns, said_ns, None, seen_ns]
            assert [one["observed"]["by"] for one in evidence if one["observed"]] == ["operator"] * 2 + [
                "qmp"
            ]
            newest = points.points(now_ns=world.now_ns + 2 * SECOND_NS, kind="rp", limit=1)
            assert [point.observed.time_ns for point in newest] == [seen_ns]
            (mark,) = (point.as_dict()["evidence"] for point in found if point.kind == "bookmark")
            assert mark["frozen"] and mark["observed"]["ready"] and not evidence[-1]["frozen"]
        world.close()
