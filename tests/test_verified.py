"""What is read is verified, where that is asked for: what rotted is refused and everything else is served."""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from cdpserver import sums
from cdpserver.basepoint import publish
from cdpserver.check.repair import Step
from cdpserver.config import parse_config
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.index.store import IndexFile
from cdpserver.journal import segment
from cdpserver.journal.log import interval_path
from cdpserver.nodes import LEFT_OUT, ROTTED, left_out, published, read_header
from cdpserver.service.children import export_command
from cdpserver.view.extent import Files
from cdpserver.view.history import History
from cdpserver.view.view import View
from recovery.opened import alone
from tests.chains import raw
from tests.core import INDEXER, World, scratch
from tests.model import BLOCK
from tests.test_check import BOOT, SEQS, Disk, disk, flip, record_at, template
from tests.test_check_depth import WROTE_A, named
from tests.test_repair import carry_out, plan

__all__ = ["disk", "named", "template"]  # fixtures


@contextlib.contextmanager
def view_of(disk: Disk, seq: int, *, verify: bool = True) -> Iterator[View]:
    with (
        contextlib.closing(History(disk.state.path, disk.timeline, BOOT)) as history,
        contextlib.closing(View(history, seq, Files(verify=verify))) as view,
    ):
        yield view


def test_a_payload_that_rotted_is_refused_and_no_other(disk: Disk) -> None:
    flip(disk.data(1), WROTE_A + 1000)
    with view_of(disk, SEQS["b"], verify=False) as view:
        assert view.read(0, BLOCK) != bytes([1]) * BLOCK
    with view_of(disk, SEQS["b"]) as view:
        for _ in range(2):
            with pytest.raises(CorruptError, match=f"payload of record {SEQS['a']} does not match"):
                view.read(1000, 8)
        with pytest.raises(CorruptError):
            view.read(0, 2 * BLOCK)
        assert view.read(BLOCK, BLOCK) == bytes([2]) * BLOCK
    with view_of(disk, SEQS["a2"]) as view:
        assert view.read(0, BLOCK) == bytes([3]) * BLOCK


def test_a_damaged_header_vouches_for_nothing_and_harms_no_other(disk: Disk) -> None:
    flip(disk.log(1), record_at(1, SEQS["a"]) + 20)
    with view_of(disk, SEQS["b"]) as view:
        assert view.read(BLOCK, BLOCK) == bytes([2]) * BLOCK
        with pytest.raises(CorruptError, match="no record"):
            view.read(0, BLOCK)


def test_an_index_that_leads_elsewhere_is_not_believed(disk: Disk) -> None:
    """To another record of whole payload, or to none."""
    index = IndexFile(interval_path(disk.directory, 1) / "index.mdb", writable=True)
    with index.env.begin(write=True) as txn:
        first, second = (
            (block).to_bytes(6, "big") + SEQS[name].to_bytes(8, "big") for block, name in ((0, "a"), (1, "b"))
        )
        held = [bytes(txn.get(key, db=index.pieces) or b"") for key in (first, second)]
        txn.put(first, held[1], db=index.pieces)
        txn.put(second, (int.from_bytes(held[1], "little") + 500).to_bytes(8, "little"), db=index.pieces)
    index.env.close()
    with view_of(disk, SEQS["b"], verify=False) as view:
        assert view.read(0, BLOCK) == bytes([2]) * BLOCK
    with view_of(disk, SEQS["b"]) as view:
        with pytest.raises(CorruptError, match="index is damaged"):
            view.read(0, BLOCK)
        with pytest.raises(CorruptError):
            view.read(BLOCK, BLOCK)


def test_what_rotted_in_a_base_is_refused(disk: Disk) -> None:
    base = disk.directory / "base.raw"
    stat = base.stat()
    sums.write(base)
    flip(base, 40 * BLOCK)
    os.utime(base, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with view_of(disk, SEQS["a"]) as view:
        assert view.read(0, BLOCK) == bytes([1]) * BLOCK
        with pytest.raises(CorruptError, match="not what was written"):
            view.read(50 * BLOCK, BLOCK)


@pytest.mark.real
def test_no_base_point_is_made_of_what_rotted(named: Disk, short_path: Path) -> None:
    """It would have sums of its own, and the journal below it could go."""
    flip(named.data(1), WROTE_A + 2 * BLOCK)  # block 0 as it is at the cut
    with (
        contextlib.closing(History(named.state.path, named.timeline, BOOT)) as history,
        alone("export", [f"state_dir={named.state.path}", "alone=1"], short_path / "nbd"),
    ):
        with pytest.raises(CorruptError, match=f"payload of record {SEQS['a2']} does not match"):
            publish(named.state, history, 0, export="d", socket=short_path / "nbd")
        assert published(named.directory) == [] and not list(named.directory.glob(".tmp-*"))
        flip(named.data(1), WROTE_A + 2 * BLOCK)
        publish(named.state, history, 0, export="d", socket=short_path / "nbd")
        assert published(named.directory) == [0]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_whole_is_served(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of every kind and alignment, while the writer goes on, indexed or not, and of a fork."""
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 24)
    dice = random.Random(seed)
    with scratch() as path:
        world = World(path)
        line = world.add(64 * BLOCK + 512 * dice.randrange(8))
        line.synced()
        fork = None
        for number in range(60):
            one = fork if fork is not None and dice.random() < 0.4 else line
            size = one.model.size
            at, length = dice.randrange(size // 512) * 512, dice.choice((512, BLOCK, 3 * BLOCK, 17 * BLOCK))
            if dice.random() < 0.2:
                one.zero(at, min(length, size - at))
            else:
                one.write(at, dice.randbytes(min(length, size - at)))
            if number == 20:
                INDEXER.call("drain", line.directory, world.boot)
            if number == 30:
                fork = world.fork(line, line.last_seq - 3)
            if number % 6 == 0:
                with contextlib.closing(History(world.state.path, one.timeline, world.boot)) as history:
                    seq = dice.randrange(1, one.last_seq + 1)
                    with contextlib.closing(View(history, seq, Files(verify=True))) as view:
                        for _ in range(8):
                            start = dice.randrange(one.model.size_at(seq))
                            length = min(
                                dice.choice((1, 700, BLOCK, 9 * BLOCK)), one.model.size_at(seq) - start
                            )
                            assert view.read(start, length) == one.model.read(seq, start, length)
        world.close()


@pytest.mark.real
def test_an_export_that_verifies_answers_EIO(named: Disk, short_path: Path) -> None:
    flip(named.data(1), WROTE_A)
    point = f"d@seq:{SEQS['b']}"
    with alone("export", [f"state_dir={named.state.path}", "alone=1", "verify=reads"], short_path / "nbd"):
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///{point}?socket={short_path / 'nbd'}")
        with pytest.raises(nbd.Error) as refused:
            client.pread(BLOCK, 0)
        assert refused.value.errno == "EIO"
        assert client.pread(BLOCK, BLOCK) == bytes([2]) * BLOCK
        client.shutdown()


@pytest.mark.parametrize(
    ("text", "asked"), [("", "verify=nothing"), ('[export]\nverify = "reads"\n', "verify=reads")]
)
def test_the_service_asks_for_what_is_configured(named: Disk, text: str, asked: str) -> None:
    assert asked in export_command(named.state, parse_config(text))


@pytest.mark.real
def test_a_base_point_that_rotted_is_left_out_by_a_repair(named: Disk, short_path: Path) -> None:
    """Once later ones can do without it: the next one stands on the one before it, and holds what both intervals changed."""
    flip(named.data(1), WROTE_A + 2 * BLOCK)  # block 0 as it is at the cut, and since
    writer = named.open()
    writer.cut()
    INDEXER.call("drain", named.directory, BOOT)
    with alone("export", [f"state_dir={named.state.path}", "alone=1"], short_path / "nbd"):

        def make(number: int) -> None:
            with contextlib.closing(History(named.state.path, named.timeline, BOOT)) as history:
                publish(named.state, history, number, export="d", socket=short_path / "nbd")

        with pytest.raises(CorruptError):
            make(0)
        assert (named.directory / ROTTED).exists()
        with pytest.raises(RefusedError, match="base point 0 of d is not published yet"):
            make(1)
        found = plan(named)
        assert found.steps == () and any("bp:0 and those after it wait" in what for what in found.left)
        named.write(0, 9)
        writer.cut()
        INDEXER.call("drain", named.directory, BOOT)
        found = plan(named)
        assert found.steps == (Step("leave-out", 0), Step("leave-out", 1))
        carry_out(named, found)
        writer.close()
        make(2)
    path = named.directory / "bp-2.qcow2"
    assert published(named.directory) == [2] and read_header(path)[0] == "base.raw"
    assert not (named.directory / ROTTED).exists()
    with view_of(named, SEQS["b2"] + 20) as view:
        content = view.read(0, view.size)
    assert content[:BLOCK] == bytes([9]) * BLOCK
    assert raw(path) == content
    # The instants of those that were left out are the journal's, and what did not rot of them can be read.
    with view_of(named, SEQS["cut"]) as view:
        assert view.read(BLOCK, BLOCK) == bytes([2]) * BLOCK
    (named.directory / LEFT_OUT).write_text('{"numbers": [7]}')
    assert left_out(named.directory) == set()
