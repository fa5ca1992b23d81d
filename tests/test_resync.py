"""What a resync, a zero and a closed index cost: the figures that the design promises."""

import random
import time
from contextlib import closing

import numpy as np
import pytest

from cdpserver.errors import RefusedError
from cdpserver.index.pieces import KIND_BITS
from cdpserver.index.store import CLOSED_NAME, open_name
from cdpserver.journal.control import Grade
from cdpserver.journal.log import interval_path
from cdpserver.journal.record import CHANGES, Kind
from cdpserver.nodes import ROTTED
from cdpserver.view.delta import Delta
from cdpserver.view.extent import Files
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.core import INDEXER, Line, World

MIB = 1 << 20


def kinds(history: History, after: int) -> dict[Kind, int]:
    """How many records of each kind came after a seq."""
    found: dict[Kind, int] = {}
    for run in history.journal.runs(after, history.journal.last_seq()):
        for kind, count in zip(*np.unique(run.records["kind"], return_counts=True), strict=True):
            found[Kind(kind)] = found.get(Kind(kind), 0) + int(count)
    return found


def mirror_again(line: Line, content: bytes) -> None:
    """A new connection zeroes the disk, as QEMU does first, and writes it again, 1 MiB at a time."""
    connection = line.disk.connect()
    for at in range(0, len(content), 32 * MIB):
        connection.zero(at, min(32 * MIB, len(content) - at))
    for at in range(0, len(content), MIB):
        connection.write(memoryview(content[at : at + MIB]), at)
    connection.close()


def filled(world: World, size: int) -> tuple[Line, bytes]:
    """A synced disk whose content is random, and that content."""
    line = world.add(size)
    content = random.Random(1).randbytes(size)
    connection = line.disk.connect()
    for at in range(0, size, MIB):
        connection.write(memoryview(content[at : at + MIB]), at)
    line.disk.synced(None, write_blocking=True)
    connection.close()
    return line, content


def index_bytes(line: Line, world: World, interval: int) -> int:
    """Size of an interval's index, open or closed."""
    directory = interval_path(line.directory, interval)
    path = directory / CLOSED_NAME
    return (path if path.exists() else directory / open_name(world.boot)).stat().st_size


def test_an_unchanged_disk_mirrored_ten_times_costs_no_payload(world: World) -> None:
    size = 64 * MIB
    line, content = filled(world, size)
    history = History(world.state.path, line.timeline, world.boot)
    cut = line.writer.cut()[1]
    before = line.last_seq
    for _ in range(10):
        mirror_again(line, content)
    found = kinds(history, before)
    assert Kind.DATA not in found
    assert found[Kind.SAME] == 10 * 64
    headers = 64 * sum(found[kind] for kind in CHANGES if kind in found)
    # 1 MiB in one header and one piece of the index each; 60 bytes a piece is what an index may cost.
    assert headers + 60 * (found[Kind.SAME] + 2 * 10) < 10 * size * 0.001
    with closing(View(history, line.last_seq)) as new, closing(View(history, cut)) as old:
        assert Delta(new, old).ranges == []
        assert new.read(0, size) == content
        for _, _, ref in new.refs(0, size // 4096):
            pieces = new.at(ref).pieces(0, size // 4096)
            assert not any(piece[3] >> KIND_BITS == Kind.SAME for _, piece in pieces), "one step"
    INDEXER.call("drain", line.directory, world.boot)
    with closing(View(history, line.last_seq)) as new:
        assert new.read(0, size) == content
    history.close()


def test_a_resync_costs_what_changed(world: World) -> None:
    size = 16 * MIB
    line, content = filled(world, size)
    history = History(world.state.path, line.timeline, world.boot)
    cut = line.writer.cut()[1]
    changed = bytearray(content)
    for block in range(100, 4000, 400):
        changed[block * 4096 : block * 4096 + 4096] = bytes([block % 251]) * 4096
    mirror_again(line, bytes(changed))
    with closing(View(history, line.last_seq)) as new, closing(View(history, cut)) as old:
        assert Delta(new, old).bytes == 10 * 4096
        assert new.read(0, size) == changed
    assert line.disk.status()["grade"] == "unordered"
    line.disk.synced(None, write_blocking=True)
    assert line.writer.state.grade is Grade.CRASH
    history.close()


def test_a_session_that_is_over_cannot_be_synced(world: World) -> None:
    line, content = filled(world, MIB)
    over = line.disk.status()["session"]
    mirror_again(line, content)
    with pytest.raises(RefusedError, match="is over"):
        line.disk.synced(over, write_blocking=True)
    line.disk.synced(line.disk.status()["session"], write_blocking=False)
    assert line.writer.state.grade is Grade.UNORDERED, "nobody said write-blocking"


def test_a_mirror_that_nobody_declares_gets_a_history_by_its_flush(world: World) -> None:
    line = world.add(MIB)
    connection = line.disk.connect()
    connection.write(memoryview(b"a" * 4096), 0, fua=True)  # FUA says nothing of a mirror being ready
    assert line.disk.status()["mode"] == "first-copy"
    connection.flush()
    assert (
        line.disk.status() | {"mode": "journal", "grade": "unordered", "synced": False} == line.disk.status()
    )
    connection.write(memoryview(b"b" * 4096), 4096)
    history = History(world.state.path, line.timeline, world.boot)
    with closing(View(history, line.last_seq)) as view:
        assert view.read(0, 8192) == b"a" * 4096 + b"b" * 4096
    assert (line.directory / "base.synced").exists()
    connection.close()
    history.close()


@pytest.mark.parametrize("request_bytes", [1 << 30, 32 * MIB])
def test_a_terabyte_of_zeros(world: World, request_bytes: int) -> None:
    line = world.add(1 << 40)
    line.disk.synced(None, write_blocking=True)
    connection = line.disk.connect()
    started = time.process_time()
    for at in range(0, 1 << 40, request_bytes):
        connection.zero(at, request_bytes)
    assert time.process_time() - started < 5, "well under a second where nobody else computes"
    line.writer.cut()
    INDEXER.call("drain", line.directory, world.boot)
    # In QEMU's requests of 32 MiB: 32,768 pieces of 33 bytes.
    assert index_bytes(line, world, 1) < (1 << 20 if request_bytes == 1 << 30 else 5 << 18)
    history = History(world.state.path, line.timeline, world.boot)
    with closing(View(history, line.last_seq)) as view:
        assert view.status(0, 1 << 40, one=True) == [(0, 1 << 40, True)]
    connection.close()
    history.close()


def test_bytes_of_index_for_each_block(world: World) -> None:
    blocks = 40_000
    line = world.add(1 << 30)
    line.disk.synced(None, write_blocking=True)
    connection = line.disk.connect()
    line.disk.synced(None, write_blocking=True)
    places = random.Random(5).sample(range(1 << 18), blocks)
    for place in places:
        connection.write(memoryview(b"x" * 4096), place * 4096)
    INDEXER.call("drain", line.directory, world.boot)
    assert index_bytes(line, world, 1) / blocks < 150
    line.writer.cut()
    INDEXER.call("drain", line.directory, world.boot)
    assert (interval_path(line.directory, 1) / CLOSED_NAME).exists()
    assert index_bytes(line, world, 1) / blocks < 60
    connection.close()


def test_what_rotted_is_written_anew_whole(world: World) -> None:
    """The other blocks of its payload have only a digest that no longer matches, so nothing may go on naming them."""
    size = 4 * MIB
    line, content = filled(world, size)
    line.writer.cut()
    line.disk.connect().write(memoryview(content[::-1][:MIB]), 0)
    line.writer.commit()
    content = content[::-1][:MIB] + content[MIB:]
    with closing(History(world.state.path, line.timeline, world.boot)) as history:
        with closing(View(history, line.last_seq)) as view:
            ((_, _, path, place),) = view.resolve(0, MIB)
        assert path is not None
        with open(path, "r+b") as file:
            file.seek(place + 5 * 4096)
            byte = file.read(1)[0]
            file.seek(place + 5 * 4096)
            file.write(bytes([byte ^ 1]))
        (line.directory / ROTTED).touch()
        before = line.last_seq
        mirror_again(line, content)
        assert kinds(history, before)[Kind.DATA] == 1
        with closing(View(history, line.last_seq, Files(verify=True))) as view:
            assert view.read(0, size) == content
