"""Writes that are no whole blocks, onto what has rotted: what would be kept of it gets no digest of its own."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cdpserver import sums, timeline
from cdpserver.errors import CorruptError
from cdpserver.journal import segment
from cdpserver.journal.record import RECORD_SIZE, Kind
from cdpserver.journal.segment import PAGE
from cdpserver.nodes import ROTTED
from cdpserver.state import StateDir
from cdpserver.view.extent import Files
from cdpserver.view.history import History
from cdpserver.view.verified import Anew
from cdpserver.view.view import View
from tests.core import INDEXER, Line, World
from tests.model import BLOCK
from tests.test_check import flip
from tests.test_protect import all_arrives, guest, in_sync, protect
from tests.test_protect import world as protected
from tests.test_resync import mirror_again
from tests.test_service import Server, until

SIZE = 1 << 20


@pytest.fixture
def line(world: World) -> Line:
    """A disk in sync whose history holds two payloads of 64 KiB, at its start and at 512 KiB."""
    made = world.add(SIZE)
    made.write(0, b"base" * 1024)
    made.synced()
    for at in (0, SIZE // 2):
        made.write(at, os.urandom(16 * BLOCK))
    made.writer.commit()
    return made


@contextlib.contextmanager
def looking(line: Line, *, verify: bool = False) -> Iterator[View]:
    """The disk as it is."""
    world = line.world
    with (
        contextlib.closing(History(world.state.path, line.timeline, world.boot)) as history,
        contextlib.closing(View(history, line.last_seq, Files(verify=verify))) as view,
    ):
        yield view


def rot(line: Line, offset: int) -> None:
    """Flip a bit of what the disk holds at an offset."""
    with looking(line) as view:
        ((_, _, path, place),) = view.resolve(offset, offset + 1)
    assert path is not None
    stat = os.stat(path)
    flip(Path(path), place)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def verified(line: Line) -> None:
    """All of the disk agrees with its digests, and is what was written."""
    with looking(line, verify=True) as view:
        assert view.read(0, SIZE) == line.model.read(line.last_seq, 0, SIZE)


def small(line: Line) -> None:
    line.write(3 * BLOCK + 512, b"small" * 10)


def begin(line: Line) -> None:
    line.write(3 * BLOCK + 512, bytes(2 * BLOCK - 512))


def end(line: Line) -> None:
    line.write(2 * BLOCK, bytes(BLOCK + 512))


def zero(line: Line) -> None:
    line.zero(3 * BLOCK + 512, 4 * BLOCK)


@pytest.mark.parametrize("change", [small, begin, end, zero])
@pytest.mark.parametrize("indexed", [True, False])
def test_what_would_keep_rotten_bytes_is_refused(
    line: Line, change: Callable[[Line], None], indexed: bool
) -> None:
    rot(line, 3 * BLOCK + 3000)
    if indexed:
        INDEXER.call("drain", line.directory, line.world.boot)
    held = line.writer.payload_bytes
    for _ in range(2):
        with pytest.raises(CorruptError, match="does not match its digest"):
            change(line)
    assert line.writer.payload_bytes == held and not line.writer.broken
    line.write(SIZE // 2 + 100, b"other payloads are whole")
    line.write(0, os.urandom(16 * BLOCK))  # whole blocks: nothing is kept of it
    change(line)
    verified(line)


def test_what_is_written_over_may_have_rotted(line: Line) -> None:
    """Only the first and the last block are kept in part."""
    line.write(2 * BLOCK, os.urandom(2 * BLOCK))
    rot(line, 2 * BLOCK)
    line.write(BLOCK, os.urandom(BLOCK))
    line.write(4 * BLOCK, os.urandom(BLOCK))
    line.write(BLOCK + 512, os.urandom(3 * BLOCK))
    line.write(5 * BLOCK, os.urandom(11 * BLOCK))
    line.write(0, os.urandom(BLOCK))
    verified(line)


@pytest.mark.parametrize("known", [True, False])
def test_a_base_image_that_rotted(world: World, known: bool) -> None:
    """It is known by its sums: of what has none nothing can be said."""
    line = world.add(SIZE, image=os.urandom(SIZE // 2))
    base = world.state.bases / "b1.raw"
    if known:
        sums.write(base)
    rot(line, 7 * BLOCK)
    if known:
        with pytest.raises(CorruptError, match="not what was written at 0"):
            line.write(100 * BLOCK + 1, b"in the same MiB")
        line.write(7 * BLOCK, os.urandom(BLOCK))
        line.write(7 * BLOCK + 1, b"whole again")
    else:
        line.write(100 * BLOCK + 1, b"not known")
    line.write(SIZE - 512, bytes(512))  # beyond the image


def test_sums_that_rotted_say_nothing(world: World) -> None:
    line = world.add(SIZE, image=os.urandom(SIZE // 2))
    sums.write(world.state.bases / "b1.raw")
    flip(sums.sums_path(world.state.bases / "b1.raw"), sums.HEAD.size)
    line.write(100 * BLOCK + 1, b"goes on")
    assert sums.read_one(world.state.bases / "b1.raw", 1) is None
    verified(line)


def test_a_fork_of_what_rotted(line: Line) -> None:
    """Its guest has no other copy: it hears of it, as of a bad sector, until it writes the whole block."""
    fork = line.world.fork(line, line.last_seq)
    rot(line, 3 * BLOCK)
    with pytest.raises(CorruptError, match="does not match its digest"):
        fork.write(3 * BLOCK + 512, bytes(512))
    fork.write(3 * BLOCK, os.urandom(BLOCK))
    fork.write(3 * BLOCK + 512, bytes(512))
    with looking(fork, verify=True) as view:
        assert view.read(3 * BLOCK, BLOCK) == fork.model.read(fork.last_seq, 3 * BLOCK, BLOCK)


def test_the_copy_that_follows_writes_all_of_it_anew(line: Line) -> None:
    """Nothing that has only a digest which does not match is named again, so the same write is not refused again."""
    content = line.model.read(line.last_seq, 0, SIZE)
    rot(line, 3 * BLOCK)
    with pytest.raises(CorruptError):
        line.write(5 * BLOCK + 512, bytes(512))
    assert not (line.directory / ROTTED).exists(), "no base point waits"
    assert not line.writer.state.synced, "a write of its guest is missing"
    mirror_again(line, content)
    line.write(5 * BLOCK + 512, bytes(512))
    verified(line)


def test_the_record_of_a_payload_is_found_beside_damaged_ones(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among records of all kinds; one whose header does not hold together leads nowhere, and vouches for nothing."""
    monkeypatch.setattr("cdpserver.view.verified.CHUNK", 4)
    for number in range(40):
        line.write(number * BLOCK, os.urandom(BLOCK))
        if number % 3 == 0:
            line.zero(200 * BLOCK, BLOCK * (1 + number))
    line.writer.commit()
    for number in range(40):
        line.write(number * BLOCK + 8, b"each of them")
    INDEXER.call("drain", line.directory, line.world.boot)
    log = line.writer._segment.directory / f"{line.writer._segment.header.segment:08d}.log"
    with contextlib.closing(segment.SegmentReader(log.parent, int(log.stem))) as reader:
        newest = np.flatnonzero(reader.records(0, reader.count)["kind"] == Kind.DATA)[-40:].tolist()
    flip(log, PAGE + newest[7] * RECORD_SIZE + 20)
    flip(log, PAGE + newest[20] * RECORD_SIZE + 38, 0x7F)  # says that it is far away
    with looking(line) as view:
        view.files.verifier = Anew()
        for number in range(40):
            if number in (7, 20):
                with pytest.raises(CorruptError, match="no record at"):
                    view.read(number * BLOCK, BLOCK)
            else:
                assert view.read(number * BLOCK, BLOCK) == line.model.read(
                    line.last_seq, number * BLOCK, BLOCK
                )


@pytest.mark.real
def test_a_guest_never_hears_of_it_and_a_mirror_mends_it(short_path: Path) -> None:
    """QEMU sends a sector as a sector, hears that it was not taken, and copies what is around it from the source again."""
    with protected(short_path) as (server, source), guest(source) as handle:
        protect(server, source)
        in_sync(server)
        handle.pwrite(os.urandom(16 * BLOCK), 0)
        all_arrives(server, source)
        data = newest_data(server)
        assert data.stat().st_size == 16 * BLOCK
        flip(data, 3 * BLOCK + 3000)
        handle.pwrite(b"a guest's".ljust(512), 3 * BLOCK + 512)
        until(lambda: server.events("target.damaged"), "event")
        assert "does not match its digest" in server.events("target.damaged")[0]["reason"]
        until(lambda: server.events("disk.gap"), "gap")
        all_arrives(server, source)
        in_sync(server)
        handle.pwrite(b"another".ljust(512), 5 * BLOCK + 512)
        all_arrives(server, source)
        assert len(server.events("target.damaged")) == 1
        (found,) = server.state_dir.glob("timelines/t*")
        state = StateDir.open(server.state_dir)
        with (
            contextlib.closing(History(state.path, timeline.load(found))) as history,
            contextlib.closing(View(history, history.journal.last_seq(), Files(verify=True))) as view,
        ):
            assert view.read(0, view.size) == source.image.read_bytes()


def newest_data(server: Server) -> Path:
    """The data file that is written to."""
    return max(server.state_dir.glob("timelines/t*/intervals/*/*.data"))
