"""How far behind a disk's parts are, told from its files."""

from contextlib import closing
from pathlib import Path

from cdpserver.journal.log import Journal
from cdpserver.service import behind
from cdpserver.service.behind import Tail
from cdpserver.service.event_counts import EventCounts
from tests.core import INDEXER, SECOND_NS, START_NS, Line, World

BLOCK = 4096


def tail(line: Line) -> Tail:
    with closing(Journal(line.directory)) as journal:
        return behind.tail_of(journal, line.world.boot)


def complete(line: Line) -> int | None:
    with closing(Journal(line.directory)) as journal:
        return behind.complete_ns(journal)


def test_the_tail_is_what_the_index_lacks(world: World) -> None:
    disk = world.add(1 << 20)
    disk.write(0, b"a" * BLOCK)
    disk.synced()
    assert tail(disk) == Tail(disk.last_seq, START_NS)
    INDEXER.call("drain", disk.directory, world.boot)
    assert tail(disk) == Tail()
    world.now_ns += SECOND_NS
    disk.write(0, b"b" * BLOCK)
    world.now_ns += SECOND_NS
    disk.write(0, b"c" * BLOCK)
    assert tail(disk) == Tail(2, START_NS + SECOND_NS)


def test_the_tail_goes_over_intervals_that_have_no_index(world: World) -> None:
    disk = world.add(1 << 20)
    disk.write(0, b"a" * BLOCK)
    disk.synced()
    INDEXER.call("drain", disk.directory, world.boot)
    indexed = disk.last_seq
    for number in range(3):
        world.now_ns += SECOND_NS
        disk.write(0, bytes([number]) * BLOCK)
        disk.cut()
    assert tail(disk) == Tail(disk.last_seq - indexed, START_NS + SECOND_NS)


def test_a_boot_that_jumped_over_seqs_is_no_tail(world: World) -> None:
    disk = world.add(1 << 20)
    disk.write(0, b"a" * BLOCK)
    disk.synced()
    world.reboot(clean=False)
    with closing(Journal(disk.directory)) as journal:
        held = sum(journal.reader(*place).count for place in journal.places())
    assert tail(disk).records == held < 10 < disk.last_seq


def test_lag_counts_from_the_last_complete_instant(world: World) -> None:
    disk = world.add(1 << 20)
    disk.write(0, b"a" * BLOCK)
    disk.synced()
    assert complete(disk) is None
    world.now_ns += SECOND_NS
    disk.write(0, b"b" * BLOCK)
    last_ns = world.now_ns
    world.now_ns += 60 * SECOND_NS
    disk.disconnect()
    assert complete(disk) == last_ns
    world.now_ns += SECOND_NS
    disk.write(0, b"c" * BLOCK)
    assert complete(disk) == last_ns
    disk.synced()
    assert complete(disk) is None


def test_lag_in_a_gap_that_nobody_fills_yet(world: World) -> None:
    disk = world.add(1 << 20)
    disk.write(0, b"a" * BLOCK)
    disk.synced()
    world.now_ns += 60 * SECOND_NS
    world.reboot(clean=False)
    gap_ns = complete(disk)
    assert gap_ns is not None and gap_ns >= START_NS


def test_an_image_that_was_never_in_sync_and_a_fork(world: World) -> None:
    disk = world.add(1 << 20, image=b"i" * BLOCK)
    assert complete(disk) == 0
    fork = world.fork(disk, disk.last_seq)
    assert complete(fork) is None


def test_base_points(world: World) -> None:
    disk = world.add(1 << 20)
    disk.write(0, b"a" * BLOCK)
    disk.synced()
    assert behind.newest_base_point(disk.directory) is None
    world.now_ns += SECOND_NS
    disk.cut()
    disk.write(0, b"b" * BLOCK)
    for name in ("bp-0.qcow2", ".tmp-bp-7.qcow2", "bp-x.qcow2"):
        (disk.directory / name).touch()
    assert behind.newest_base_point(disk.directory) == 0
    with closing(Journal(disk.directory)) as journal:
        assert behind.cut_ns(journal, 0) == START_NS + SECOND_NS
        assert behind.cut_ns(journal, 5) is None


# --- events


def line(process: str, level: str) -> str:
    return f'{{"process": "{process}", "level": "{level}", "event": "x.y"}}\n'


def test_events_are_counted_once_from_now_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line("old", "error"))
    counts = EventCounts(path)
    with open(path, "a") as file:
        file.write(line("target", "error") + '{"cut\n\n[]\n"x"\n{}\n' + line("target", "info")[:-5])
        file.flush()
        counts.update()
        counts.update()
        assert counts.counts == {("target", "error"): 1}
        assert counts.last_error is not None and counts.last_error["process"] == "target"
        file.write(line("target", "info")[-5:])
    counts.update()
    assert counts.counts == {("target", "error"): 1, ("target", "info"): 1}


def test_events_are_counted_over_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    counts = EventCounts(path)
    counts.update()
    path.write_text(line("a", "info"))
    counts.update()
    with open(path, "a") as file:
        file.write(line("a", "info"))
    path.rename(tmp_path / "events.1.jsonl")
    path.write_text(line("b", "info"))
    counts.update()
    assert counts.counts == {("a", "info"): 2, ("b", "info"): 1}
    # Two rotations between two looks: what was in between is gone, and nothing is counted twice.
    (tmp_path / "events.1.jsonl").unlink()
    (tmp_path / "events.1.jsonl").write_text(line("c", "info"))
    path.unlink()
    counts.update()
    path.write_text(line("d", "info"))
    counts.update()
    assert counts.counts[("d", "info")] == 1 and counts.counts[("a", "info")] == 2
