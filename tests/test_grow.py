"""A disk that grows: points before have the old size and points after it the new one, in views, forks, files and checks."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from cdpserver import durable, qemu
from cdpserver.catalog import Catalog
from cdpserver.chain import merge
from cdpserver.chain.plan import Verb
from cdpserver.check import check_timeline
from cdpserver.check.depth import Everything
from cdpserver.errors import CorruptError, RefusedError, UsageError
from cdpserver.journal import control
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.segment import SegmentWriter
from cdpserver.nodes import base_point_path, read_header
from tests.chains import raw
from tests.core import INDEXER, SECOND_NS, Line, World, scratch
from tests.dying import Step, dies_at
from tests.islands import drop, publish
from tests.model import BLOCK
from tests.test_service import Server, connected, pattern

pytestmark = pytest.mark.real

KIB = 1024
ODD = 100 * KIB + 512
"""A disk that ends in the middle of a block."""


@pytest.fixture
def world() -> Iterator[World]:
    with scratch() as path:
        made = World(path)
        yield made
        made.close()


def churn(line: Line, dice: random.Random, count: int = 12) -> None:
    for _ in range(count):
        line.world.now_ns += SECOND_NS
        offset = dice.randrange(line.model.size // 512) * 512
        length = min(dice.choice((512, BLOCK, 5 * BLOCK)), line.model.size - offset)
        if dice.random() < 0.25:
            line.zero(offset, length)
        else:
            line.write(offset, dice.randbytes(length))
    # Its last bytes are where growing could go wrong.
    line.write(line.model.size - 512, dice.randbytes(512))


def check_everything(line: Line) -> None:
    for seq in line.model.instants:
        line.check(seq)
    line.check_live(0, line.model.size)
    report = check_timeline(
        line.world.state.path, line.timeline.id, boot_id=line.world.boot, depth=Everything(content=True)
    )
    assert report.whole, report


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("size", [ODD, 64 * KIB])
def test_points_keep_the_size_of_their_time(world: World, size: int, image: bool) -> None:
    dice = random.Random(size)
    line = world.add(size, image=dice.randbytes(size) if image else None)
    churn(line, dice)
    line.synced()
    for more in (512, 3 * BLOCK, BLOCK - 512, 1 << 20):
        churn(line, dice)
        line.grow(line.model.size + more)
        line.check_live(0, line.model.size)
        churn(line, dice)
        INDEXER.call("drain", line.directory, world.boot)
    old, new = line.model.instants[3], line.model.instants[-1]
    line.check_delta(new, line, old)
    check_everything(line)
    for clean in (True, False):
        world.reboot(clean=clean)
        assert line.disk.size == line.model.size
        churn(line, dice, 3)
        check_everything(line)
    assert INDEXER.call("rebuild", line.directory, world.boot)
    check_everything(line)


def test_a_fork_has_the_size_of_its_point(world: World) -> None:
    dice = random.Random(2)
    line = world.add(ODD)
    churn(line, dice)
    line.synced()
    churn(line, dice)
    before = line.last_seq
    line.grow(2 * ODD)
    churn(line, dice)
    small, large = world.fork(line, before), world.fork(line, line.last_seq)
    assert (small.disk.size, large.disk.size) == (ODD, 2 * ODD)
    # What its parent wrote there later is not the fork's.
    small.grow(3 * ODD)
    small.check_live(0, 3 * ODD)
    for fork in (small, large):
        churn(fork, dice)
        check_everything(fork)


def test_a_first_copy_grows(world: World) -> None:
    line = world.add(ODD)
    line.write(0, b"a" * ODD)
    line.grow(200 * KIB)
    line.write(100 * KIB, b"b" * (100 * KIB))
    line.check_live(0, 200 * KIB)
    line.close(clean=False)
    line.open()
    line.check_live(0, 200 * KIB)
    line.synced()
    check_everything(line)


def test_a_first_copy_that_was_killed_while_growing_goes_on(world: World) -> None:
    line = world.add(ODD)
    line.write(0, b"a" * ODD)
    steps = 0

    def grow() -> None:
        line.disk.grow(200 * KIB)

    def prepare(dying: Callable[[Step], Step]) -> None:
        os.ftruncate = dying(os.ftruncate)
        durable.write_json = dying(durable.write_json)
        os.replace = dying(os.replace)
        os.rename = dying(os.rename)

    while dies_at(steps + 1, grow, prepare):
        steps += 1
        line.close(clean=False)
        line.open()
        assert line.disk.size == ODD
        assert not line.disk.first_copy or not line.disk.first_copy.restarted
        line.check_live(0, ODD)
    assert steps >= 3


def test_shrinking_is_refused(world: World) -> None:
    line = world.add(ODD)
    line.write(0, b"a" * BLOCK)
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"has 100\.5K and cannot shrink to 4K"):
            line.disk.grow(BLOCK)
        line.synced()
    seq = line.last_seq
    assert line.disk.grow(ODD) == {"before": ODD, "size": ODD}
    assert line.last_seq == seq
    with pytest.raises(UsageError):
        line.connection().write(memoryview(bytes(512)), ODD)


def test_growth_that_was_killed_happened_or_did_not(world: World) -> None:
    """SIGKILL before each step of it; and once it was acknowledged it stays."""
    line = world.add(ODD)
    dice = random.Random(3)
    churn(line, dice)
    line.synced()
    churn(line, dice)
    size, steps, seen = ODD, 0, set()

    def grow() -> None:
        line.disk.grow(size + BLOCK)

    def prepare(dying: Callable[[Step], Step]) -> None:
        for name in ("create", "append_payload", "put", "set_state", "sync", "seal"):
            setattr(SegmentWriter, name, dying(getattr(SegmentWriter, name)))

    while True:
        died = dies_at(steps + 1, grow, prepare)
        steps += 1
        line.close(clean=False)
        line.open()
        seen.add(line.disk.size - size)
        assert line.disk.size in (size, size + BLOCK)
        if line.disk.size > size:
            line.model.grow(seq=line.last_seq, size=line.disk.size)
            size = line.disk.size
            line._note()
        elif not died:
            raise AssertionError("an acknowledged growth is gone")
        churn(line, dice, 2)
        line.writer.commit()
        if not died:
            break
    assert seen == {0, BLOCK} and steps > 5
    check_everything(line)


def test_a_size_that_no_disk_has_is_damage(world: World) -> None:
    line = world.add(ODD)
    line.synced()
    for size in (0, 513, -512, 1 << 60, "1G"):
        with pytest.raises(CorruptError):
            control.decode(control.encode({"type": "grow", "size": size}))
    line.writer._put_control(control.grow(64 * KIB))
    report = check_timeline(world.state.path, line.timeline.id, boot_id=world.boot)
    said = " ".join(str(damage.finding.what) for damage in report.damage)
    assert "shrink from 102912 to 65536" in said and "in the middle of a segment" in said


def grown_chain(world: World) -> Line:
    """Base points 0 to 4; the disk grew before 2, at an odd size, and before 4."""
    dice = random.Random(7)
    line = world.add(ODD)
    churn(line, dice)
    line.synced()
    for number in range(5):
        if number in (2, 4):
            line.grow(line.model.size + 70 * KIB)
        churn(line, dice)
        line.cut()
        publish(line, number)
        world.now_ns += SECOND_NS
    churn(line, dice)
    return line


def sizes(line: Line) -> list[int]:
    return [read_header(base_point_path(line.directory, number))[1] for number in range(5)]


def check_chain(line: Line, numbers: list[int]) -> None:
    """Stock tools, our views and the model say the same of each base point."""
    for number in numbers:
        path, seq = base_point_path(line.directory, number), line.cuts[number]
        qemu.check(path)
        expected = line.model.read(seq, 0, line.model.size_at(seq))
        assert raw(path) == expected
        line.check(seq)


def test_base_points_have_the_size_of_their_cut(world: World) -> None:
    line = grown_chain(world)
    first, second, third = ODD, ODD + 70 * KIB, ODD + 140 * KIB
    assert sizes(line) == [first, first, second, second, third]
    check_chain(line, [0, 1, 2, 3, 4])
    check_everything(line)
    # Without the journal they are all there is; what is left stands on them.
    for interval in (1, 2, 3, 4):
        drop(line, interval)
        check_chain(line, [0, 1, 2, 3, 4])
    for seq in line.model.instants:
        if seq > line.cuts[3]:
            line.check(seq)


@pytest.mark.parametrize(
    ("verb", "number", "left"),
    [
        ("delete", 1, [0, 2, 3, 4]),
        ("pull", 3, [3, 4]),
        ("commit", 2, [0, 2, 3, 4]),
        ("delete", 2, [0, 1, 3, 4]),
    ],
)
def test_merges_over_a_growth(world: World, verb: Verb, number: int, left: list[int]) -> None:
    with Catalog.open(world.state, writable=True) as catalog:
        line = grown_chain(world)
        catalog.add(line.timeline.full_name, line.timeline.id)
        for interval in (1, 2, 3, 4):
            drop(line, interval)
        merge.merge(world.state, catalog, line.timeline.id, verb, number)
    check_chain(line, left)
    line.check(line.last_seq)


def test_a_damaged_growth_is_found(world: World) -> None:
    line = grown_chain(world)
    line.close(clean=True)
    journal = Journal(line.directory)
    [interval] = [n for n in journal.intervals if journal.first_reader(n).first_seq == line.cuts[1] + 1]
    segment = journal.segments(interval)[0]
    journal.close()
    log = next(interval_path(line.directory, interval).glob(f"{segment:08d}.log"))
    log.chmod(0o600)
    with open(log, "r+b") as file:
        file.seek(4096 + 8)
        file.write(b"\xff")
    report = check_timeline(
        world.state.path, line.timeline.id, boot_id=world.boot, depth=Everything(content=True)
    )
    assert not report.whole
    with pytest.raises(CorruptError):
        line.check(line.cuts[2] - 1)


# --- the service


def cdp(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.prefix) / "bin" / "cdp"), "--state-dir", str(server.state_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def size_of(uri: str) -> int:
    with connected(uri) as client:
        return int(client.get_size())


def test_a_disk_grows_under_its_mirror(short_path: Path) -> None:
    with Server(short_path / "s", "--workers", "2") as server:
        uri = server.post("/v1/disks", name="d", size="1M")["uri"]
        with connected(uri) as client, connected(uri) as other:
            client.pwrite(pattern(1), 0)
            server.synced("d", write_blocking=True)
            client.pwrite(pattern(2), 4096)
            before = server.get("/v1/disks/d")["last_seq"]
            held = server.uri(f"d@seq:{before}")
            with connected(server.uri("d@latest")) as point:
                done = cdp(server, "disk", "resize", "d", "3M", "--json")
                assert done.returncode == 0 and '"size": 3145728' in done.stdout, done
                # Who is connected keeps the size that it was told, and may go on.
                assert client.get_size() == other.get_size() == point.get_size() == 1 << 20
                client.pwrite(pattern(3), (1 << 20) - 4096)
                with pytest.raises(nbd.Error):
                    other.pwrite(pattern(3), 1 << 20)
        os.kill(server.pids()["target-0"], signal.SIGKILL)
        os.kill(server.pids()["target-1"], signal.SIGKILL)
        with connected(uri) as again:
            assert again.get_size() == 3 << 20
            again.pwrite(pattern(4), 2 << 20)
            assert again.pread(4096, 2 << 20) == pattern(4)
        # The worker that passes it on sees it as well.
        shared = server.get("/v1/disks/d")
        assert shared["size"] == 3 << 20
        assert (size_of(held), size_of(server.uri("d@latest"))) == (1 << 20, 3 << 20)

        refused = cdp(server, "disk", "resize", "d", "2M")
        assert refused.returncode == 3
        assert "cannot shrink to 2M" in refused.stderr and "cdp disk add" in refused.stderr

        made = server.post("/v1/disks/d:cut")
        assert read_header(Path(made["path"]))[1] == 3 << 20
        assert len(raw(Path(made["path"]))) == 3 << 20
        fork = server.post("/v1/forks", point=f"d@seq:{before}", name="f")
        assert fork["size"] == size_of(fork["uri"]) == 1 << 20
        assert cdp(server, "check", "d", "--full").returncode == 0
