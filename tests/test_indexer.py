"""The indexer's pace: what is written is found, what rests costs nothing, and what is open is bounded."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdpserver.index import indexer
from cdpserver.index.indexer import BUSY_S, CALM_S, FEW, IDLE_S, REST_S, TimelineIndexer
from cdpserver.journal import control
from cdpserver.limits import INDEX_BATCH
from tests.test_check import BOOT, Disk, empty_disk


def open_files(directory: Path) -> list[str]:
    """The names of the indexes of a timeline that this process has open."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists
            found.append(os.readlink(fd))
    return [name for name in found if name.startswith(f"{directory}/") and ".mdb" in name]


def synced_disk(tmp_path: Path) -> Disk:
    """A disk with its writer, whose content counts."""
    disk = empty_disk(tmp_path)
    disk.open().synced(control.synced(1, write_blocking=True))
    return disk


def rested(one: TimelineIndexer) -> float:
    """Step until the timeline is at rest; the time then."""
    now = 0.0
    while one.is_open or not now:
        one.step(now)
        now = one.due
        assert now < 60
    return now


def test_at_rest_nothing_is_open_and_a_record_wakes_it(tmp_path: Path) -> None:
    disk = synced_disk(tmp_path)
    one = TimelineIndexer(disk.directory, BOOT)
    disk.write(1, 1)
    one.step(0.0)
    assert open_files(disk.directory)
    now = rested(one)
    assert open_files(disk.directory) == []
    assert one.step(now) == 0 and not one.is_open
    disk.write(2, 2)
    assert one.step(one.due) == 1
    one.close()


def test_the_pause_grows_while_nothing_comes_and_is_short_when_much_does(tmp_path: Path) -> None:
    disk = synced_disk(tmp_path)
    one = TimelineIndexer(disk.directory, BOOT)
    now = rested(one)
    for _ in range(5):
        one.step(now)
        now = one.due
    one.step(now)
    assert one.due - now == pytest.approx(REST_S)
    assert [one._next_pause(added) for added in (FEW, 1)] == [BUSY_S, BUSY_S]
    one._pause = BUSY_S
    pauses = []
    for _ in range(20):
        one._pause = one._next_pause(1)
        pauses.append(one._pause)
    assert pauses == sorted(pauses) and pauses[-1] == CALM_S < IDLE_S
    assert one._next_pause(INDEX_BATCH) == BUSY_S
    one.close()


def test_a_cut_wakes_it_and_the_interval_is_closed(tmp_path: Path) -> None:
    disk = synced_disk(tmp_path)
    one = TimelineIndexer(disk.directory, BOOT)
    disk.write(1, 1)
    now = rested(one)
    assert disk.writer is not None
    disk.writer.cut()
    assert one.step(now) > 0
    assert (disk.directory / "intervals" / "000001" / "index.mdb").exists()
    rested(one)
    disk.write(1, 2)
    assert one.step(one.due) == 1
    one.close()


def test_indexes_removed_while_it_rests_are_made_again(tmp_path: Path) -> None:
    disk = synced_disk(tmp_path)
    one = TimelineIndexer(disk.directory, BOOT)
    disk.write(1, 1)
    assert disk.writer is not None
    disk.writer.cut()
    disk.write(1, 2)
    now = rested(one)
    held = list(disk.directory.glob("intervals/*/*.mdb"))
    assert len(held) == 2
    for path in disk.directory.glob("intervals/*/*.mdb*"):
        path.unlink()
    assert one.step(now) > 0
    rested(one)
    assert sorted(disk.directory.glob("intervals/*/*.mdb")) == sorted(held)
    one.close()


def test_only_so_many_timelines_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "OPEN_TIMELINES", 2)
    disks = [synced_disk(tmp_path / str(number)) for number in range(4)]
    timelines = {str(number): TimelineIndexer(disk.directory, BOOT) for number, disk in enumerate(disks)}
    for now, one in enumerate(timelines.values()):
        one.step(float(now))
    indexer._close_some(timelines)
    assert [name for name, one in timelines.items() if one.is_open] == ["2", "3"]
    disks[0].write(1, 1)
    assert timelines["0"].step(9.0) == 1
    for one in timelines.values():
        one.close()


MANY_ENVIRONMENTS = """
import sys
from pathlib import Path
from cdpserver.index import indexer
from cdpserver.index.store import IndexFile

def touched():
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Private_Dirty:"))

indexer._return_memory()
one = IndexFile(Path(sys.argv[1]) / "first.mdb", writable=True)
one.env.close()
before = touched()
held = [IndexFile(Path(sys.argv[1]) / f"{n}.mdb", writable=True) for n in range(40)]
print((touched() - before) // 40)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages as Linux does")
def test_an_open_index_takes_little_memory_after_others_were_closed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MANY_ENVIRONMENTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # KiB; without the setting it is more than 2000.
    assert int(done.stdout) < 300
