"""What a backup and a restore hold in memory: bounded, whatever the size of the disk, and as docs/backup.md says it."""

import contextlib
import itertools
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from cdpserver.copying.target import RawFile
from cdpserver.repository import packs, pipeline, pushed, restore, sessions
from cdpserver.repository.content import ChunkList
from cdpserver.repository.packed import RUN_BYTES
from cdpserver.repository.pipeline import runs_of
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.pushed import Intent, Pushed, Sent
from cdpserver.repository.record import FULL
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.restore import Restore
from cdpserver.repository.take import back_up
from tests.backed_up import Made

MIB = 1 << 20


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes that Python's objects had."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("chunk", [64 << 10, 4 * MIB])
def test_a_backup_holds_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """A pack that is gathered and those on their way, what is read and what is sealed; the disk is several times as large."""
    monkeypatch.setattr(packs, "PACK_BYTES", MIB)
    monkeypatch.setattr(pipeline, "IN_FLIGHT_BYTES", 4 * MIB)
    create(DirectoryPlace(tmp_path / "repo"), chunk_size=chunk)
    source = Made(60 * MIB)
    with Repository(DirectoryPlace(tmp_path / "repo"), cache=tmp_path / "cache") as repository:
        with peak() as most:
            backup = back_up(repository, [source], "made@1")
        assert backup.stored_bytes > source.size
        in_flight = max(4 * MIB, 2 * chunk)
        pack = MIB + chunk  # what is over its length when it is put
        read = max(MIB, chunk)  # as the source makes it
        assert most[0] < 2 * in_flight + (1 + packs.PUTTING) * pack * 9 // 8 + read + 2 * MIB


@pytest.mark.parametrize("chunk", [64 << 10, MIB])
def test_what_is_sent_is_held_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """A running VM's backup: what waits to be stored, and behind it as any other; the disk is several times as large."""
    monkeypatch.setattr(packs, "PACK_BYTES", MIB)
    monkeypatch.setattr(pipeline, "IN_FLIGHT_BYTES", 4 * MIB)
    for limit in ("MUCH_BYTES", "MOST_BYTES"):
        monkeypatch.setattr(pushed, limit, 4 * MIB)
    place = DirectoryPlace(tmp_path / "repo")
    create(place, chunk_size=chunk)
    source = Made(60 * MIB)
    intent = Intent(sessions.new_id(1), 1, "web", FULL, "for a test", "", (Sent("web/vda", source.size),))
    with (
        Repository(place, cache=tmp_path / "cache") as repository,
        sessions.session(place, intent.id) as check_held,
    ):
        with peak() as most, contextlib.closing(Pushed(repository, intent, check_held)) as sent:
            disk = sent.connect("web/vda")
            content = bytearray(chunk)
            for at in range(0, source.size, chunk):
                source.read_into(content, at)
                sent.write(disk, at, content)
            backup = sent.commit(1, "crash")
        assert backup.stored_bytes > source.size
        waits = 4 * MIB + pushed.CHUNKS_HELD * chunk
        in_flight = max(4 * MIB, 2 * chunk)
        pack = MIB + chunk
        assert most[0] < waits + 2 * in_flight + (1 + packs.PUTTING) * pack * 9 // 8 + 2 * chunk + 2 * MIB


@pytest.mark.parametrize("chunk", [64 << 10, 4 * MIB])
def test_a_restore_holds_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Of each worker a run and two chunks."""
    monkeypatch.setattr(restore, "IN_FLIGHT_BYTES", 8 * MIB)
    create(DirectoryPlace(tmp_path / "repo"), chunk_size=chunk)
    source = Made(60 * MIB)
    output = tmp_path / "output"
    output.touch()
    os.truncate(output, source.size)
    with Repository(DirectoryPlace(tmp_path / "repo"), cache=tmp_path / "cache") as repository:
        chunks = ChunkList(repository, back_up(repository, [source], "made@1").disks[0])
        target = RawFile(output)
        with peak() as most:
            Restore(repository, chunks, target).run()
        target.end()
        assert most[0] < max(8 * MIB, 2 * (max(RUN_BYTES, chunk) + 2 * chunk)) + MIB
    assert output.read_bytes() == blake3(b"made").digest(length=source.size)


@given(st.sets(st.integers(0, 60)), st.integers(1, 5))
def test_runs_of_chunks(numbers: set[int], most: int) -> None:
    """Each number once, in order; no run is longer than it may be, or shorter than it could be."""
    runs = list(runs_of(iter(sorted(numbers)), most))
    assert [n for first, last in runs for n in range(first, last)] == sorted(numbers)
    assert all(0 < last - first <= most for first, last in runs)
    for (first, last), (following, _) in itertools.pairwise(runs):
        assert last < following or last - first == most
