"""The committer of a worker: which disks it commits, when it looks at an index, and that a late round is followed at once."""

import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from cdpserver import limits, messages
from cdpserver.index.indexer import TimelineIndexer
from cdpserver.state import StateDir
from cdpserver.target.connection import Connection
from cdpserver.target.disk import TargetDisk
from cdpserver.target.registry import Registry
from tests.core import forget_indexes
from tools.kit.processes import until
from tools.measure.seed import seed

BLOCK = bytes(4096)


@pytest.fixture
def registry(short_path: Path) -> Iterator[Registry]:
    """Two disks, not open."""
    seed(short_path / "s", 2, records=1)
    made = Registry(StateDir.open(short_path / "s"))
    yield made
    made._shut_all({})
    forget_indexes(short_path)


def written(registry: Registry, name: str, count: int) -> tuple[TargetDisk, Connection]:
    disk = registry.disk(name)
    client = disk.connect()
    for number in range(count):
        client.write(memoryview(number.to_bytes(2, "big") * 2048), number * 4096)
    return disk, client


def index(disk: TargetDisk) -> None:
    """What the indexer's process does."""
    one = TimelineIndexer(disk.directory, disk._boot_id)
    for number in range(3):
        one.step(float(number))
    one.close()


def test_an_index_that_is_near_enough_is_not_looked_at(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    look = registry._indexed

    def counted(directory: Path, interval: int) -> int:
        looks.append(directory)
        return look(directory, interval)

    monkeypatch.setattr(registry, "_indexed", counted)
    monkeypatch.setattr(limits, "TAIL_RECORDS", 100)
    disk, client = written(registry, "idle0", 20)
    journal = disk.journal
    assert journal is not None
    registry._commit_one(disk)
    assert looks == [] and not journal.slow_s
    for _ in range(100):
        client.write(memoryview(BLOCK), 0)
    registry._commit_one(disk)
    assert len(looks) == 1 and journal.slow_s == limits.TAIL_DELAY_S
    index(disk)
    client.write(memoryview(BLOCK), 0)
    registry._commit_one(disk)
    assert len(looks) == 2 and not journal.slow_s
    client.write(memoryview(BLOCK), 0)
    registry._commit_one(disk)
    assert len(looks) == 2


def test_only_what_lags_is_committed(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, _ = written(registry, "idle0", 3)
    quiet = registry.disk("idle1")
    assert busy.journal is not None and quiet.journal is not None
    assert busy.journal.behind and not quiet.journal.behind
    asked: list[str] = []
    commit_one = registry._commit_one

    def noted(disk: TargetDisk) -> None:
        asked.append(disk.timeline.full_name)
        commit_one(disk)

    monkeypatch.setattr(registry, "_commit_one", noted)
    threading.Thread(target=registry._commit_loop, daemon=True).start()
    until(lambda: busy.journal is not None and not busy.journal.behind, "commit")
    assert set(asked) == {"idle0"}


def test_a_round_begins_half_a_second_after_the_last_one_began(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = written(registry, "idle0", 1)
    began: list[float] = []
    enough = threading.Event()

    def slow(_: TargetDisk) -> None:
        began.append(time.monotonic())
        if len(began) == 4:
            enough.set()
        time.sleep(0.15)

    monkeypatch.setattr(limits, "COMMIT_INTERVAL_S", 0.2)
    monkeypatch.setattr(registry, "_commit_one", slow)
    threading.Thread(target=registry._commit_loop, daemon=True).start()
    assert enough.wait(20)
    # Were the pause counted from the end of a round, it would be 0.35 s at least.
    assert min(later - earlier for earlier, later in pairwise(began)) < 0.3
    client.close()


def test_a_status_of_very_many_disks_fits_into_a_message(registry: Registry) -> None:
    status = written(registry, "idle0", 1)[0].status()
    many = {f"{number:060d}": status for number in range(20_000)}
    assert messages.check_length(messages.pack({"ok": many})[: messages.LENGTH.size]) > 1 << 20
