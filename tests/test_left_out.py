"""A damaged header keeps the base point of its interval from being made, and none after it: a repair leaves it out, as shown."""

import contextlib
from pathlib import Path

import pytest

from cdpserver.basepoint import pending, publish
from cdpserver.check.repair import Step
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.nodes import ROTTED, published, read_header
from cdpserver.target.reads import LiveReads
from cdpserver.view.history import History
from recovery.opened import alone
from tests.chains import raw
from tests.core import INDEXER
from tests.test_check import BLOCK, BOOT, SEQS, SIZE, Disk, disk, flip, record_at, template
from tests.test_check_depth import named
from tests.test_repair import carry_out, plan
from tests.test_verified import view_of

__all__ = ["disk", "named", "template"]  # fixtures

pytestmark = pytest.mark.real


def rewrite(disk: Disk, blocks: range) -> None:
    for block in blocks:
        disk.write(block, 9, after_s=0.01)


@pytest.mark.parametrize(
    ("record", "indexed", "blocks"),
    [("a2", True, range(1)), ("a2", False, range(SIZE // BLOCK)), ("zero", False, range(SIZE // BLOCK))],
)
def test_a_record_that_changed_the_disk(
    named: Disk, short_path: Path, record: str, indexed: bool, blocks: range
) -> None:
    """With an index it is known what it changed; without, all of the disk has to be written again."""
    left_out(named, short_path, record, indexed=indexed, blocks=blocks)


@pytest.mark.parametrize("record", ["cut", "mark"])
def test_a_control_record(named: Disk, short_path: Path, record: str) -> None:
    """What counts at the cut is not known; at the next one it is."""
    left_out(named, short_path, record, indexed=True, blocks=range(0))


def left_out(disk: Disk, short_path: Path, record: str, *, indexed: bool, blocks: range) -> None:
    flip(disk.log(1), record_at(1, SEQS[record]) + 20)
    if not indexed:
        for path in disk.directory.glob("intervals/*/*.mdb*"):
            path.unlink()
    writer = disk.open()
    writer.cut()
    with alone("export", [f"state_dir={disk.state.path}", "alone=1"], short_path / "nbd"):

        def make(number: int) -> None:
            with contextlib.closing(History(disk.state.path, disk.timeline, BOOT)) as history:
                assert next(cut.number for cut in pending(history)) <= number
                publish(disk.state, history, number, export="d", socket=short_path / "nbd")

        with pytest.raises(CorruptError):
            make(0)
        assert (disk.directory / ROTTED).exists()
        with pytest.raises(RefusedError, match="base point 0 of d is not published yet"):
            make(1)
        wanted = [Step("leave-out", 0)]
        if len(blocks):
            found = plan(disk)
            assert not {step for step in found.steps if step.kind == "leave-out"}
            assert any("bp:0 and those after it wait" in what for what in found.left), found
            rewrite(disk, blocks)
            writer.cut()
            wanted.append(Step("leave-out", 1))
        found = plan(disk)
        assert [step for step in found.steps if step.kind == "leave-out"] == wanted, found
        carry_out(disk, found)
        writer.close()
        make(len(wanted))
    path = disk.directory / f"bp-{len(wanted)}.qcow2"
    assert published(disk.directory) == [len(wanted)] and read_header(path)[0] == "base.raw"
    assert not (disk.directory / ROTTED).exists()
    with view_of(disk, writer.last_seq) as view:
        content = view.read(0, view.size)
    assert content[: len(blocks) * BLOCK] == bytes([9]) * BLOCK * len(blocks)
    assert raw(path) == content


def test_a_copy_of_the_disk_is_taken_whatever_is_damaged(named: Disk) -> None:
    """It compares with what cannot be read, and so is written: a mirror ends the damage."""
    flip(named.log(1), record_at(1, SEQS["a2"]) + 20)
    for path in named.directory.glob("intervals/*/*.mdb*"):
        path.unlink()
    with contextlib.closing(LiveReads(History(named.state.path, named.timeline, BOOT))) as reads:
        assert reads.changed_from(SEQS["b2"], 0, memoryview(bytes(4 * BLOCK))) == [(0, 4 * BLOCK, -1)]


def test_indexing_is_not_needed(named: Disk) -> None:
    """The indexer stops at the record; what is read goes by the header logs."""
    flip(named.log(1), record_at(1, SEQS["a2"]) + 20)
    for path in named.directory.glob("intervals/*/*.mdb*"):
        path.unlink()
    with pytest.raises(AssertionError, match="is damaged"):
        INDEXER.call("drain", named.directory, BOOT)
    INDEXER.call("close", named.directory, BOOT)
    named.open()
    rewrite(named, range(SIZE // BLOCK))
    with view_of(named, named.writer.last_seq if named.writer else 0) as view:
        assert view.read(0, SIZE) == bytes([9]) * SIZE
