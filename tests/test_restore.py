"""Restoring a disk of a backup: in whatever order chunks are read, what is written is the disk, and the mark never lies."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver.copying import work
from cdpserver.copying.target import Writer
from cdpserver.errors import BrokenError, CorruptError
from cdpserver.repository import restore
from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import Entry, Kind
from cdpserver.repository.packed import RUN_BYTES, runs
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.record import Backup
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.restore import Restore
from tests.backed_up import CHUNK, SIZE, Case, with_history
from tests.core import scratch


class Memory:
    """A disk in memory; it fails with its n-th write, as a device that is pulled out."""

    def __init__(self, content: bytes, *, fresh: bool, writes: int = 1 << 30) -> None:
        self.content = bytearray(content)
        self.fresh = fresh
        self.writes = writes

    def writer(self) -> Writer:
        return self

    def write(self, data: memoryview, offset: int) -> None:
        self.writes -= 1
        if self.writes < 0:
            raise BrokenError("it was pulled out")
        assert offset + len(data) <= len(self.content)
        self.content[offset : offset + len(data)] = data

    def zero(self, start: int, end: int) -> None:
        self.write(memoryview(bytes(end - start)), start)

    def flush(self) -> None:
        """What is in memory is as durable as it gets."""

    def close(self) -> None:
        """It stays."""


@pytest.fixture
def case() -> Iterator[Case]:
    """Three backups, so that the chunks of the last one are in three packs, in no order; one of them is there twice."""
    with scratch() as path:
        world, line = with_history(path)
        create(DirectoryPlace(path / "repo"), chunk_size=CHUNK)
        made = Case(world, line, path)
        for seed in range(3):
            made.write(seed, 12)
            made.line.write(30 * CHUNK, b"twice" * (CHUNK // 5) + b"12345"[: CHUNK % 5])
            made.line.write((32 + seed) * CHUNK, b"twice" * (CHUNK // 5) + b"12345"[: CHUNK % 5])
            made.back_up()
        yield made
        world.close()


def newest(case: Case, repository: Repository) -> tuple[Backup, ChunkList, bytes]:
    backup = repository.backup(repository.backup_ids()[-1])
    return (
        backup,
        ChunkList(repository, backup.disks[0]),
        case.line.model.read(case.taken[backup.id], 0, SIZE),
    )


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_what_is_written_is_the_disk(case: Case, fresh: bool, sparse: bool) -> None:
    """A fresh target gets data only; another one every byte."""
    with case.repository() as repository:
        _, chunks, content = newest(case, repository)
        target = Memory(bytes(SIZE) if fresh else os.urandom(SIZE), fresh=fresh)
        done = Restore(repository, chunks, target, sparse=sparse).run()
        assert target.content == content
        used = sum(chunks.length(number) for number in chunks.used())
        assert (done.read, done.zeroed) == (used, 0 if fresh else SIZE - used)


def test_it_goes_on_wherever_it_ended(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the mark everything was written, whatever the order: a run from there on makes it whole."""
    monkeypatch.setattr(work, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(restore, "STRETCH_BYTES", 4 * CHUNK)
    with case.repository() as repository:
        _, chunks, content = newest(case, repository)
        for writes in range(0, 60, 7):
            marks = [0]
            target = Memory(bytes(SIZE), fresh=True, writes=writes)
            try:
                Restore(repository, chunks, target, checkpoint=marks.append).run()
                break
            except BrokenError:
                mark = marks[-1]
            assert marks == sorted(marks)
            assert target.content[:mark] == content[:mark]
            target.writes = 1 << 30
            Restore(repository, chunks, target, start=mark, checkpoint=marks.append).run()
            assert marks[-1] == SIZE
            assert target.content == content
        else:
            raise AssertionError("it never came to its end")


def test_it_begins_wherever_it_is_told_to(case: Case) -> None:
    """With the chunk that this lies in; what is before is left alone."""
    with case.repository() as repository:
        _, chunks, content = newest(case, repository)
        for start in (0, CHUNK - 1, CHUNK, 7 * CHUNK + 512, 33 * CHUNK, SIZE - 1, SIZE):
            first = start // CHUNK * CHUNK if start < SIZE else SIZE
            target = Memory(b"\x17" * SIZE, fresh=False)
            Restore(repository, chunks, target, start=start).run()
            assert target.content == b"\x17" * first + content[first:]


def test_a_damaged_chunk_is_read_from_another_pack(case: Case) -> None:
    """Of one that is stored once, nothing is written, and the place in the repository is said."""
    with case.repository() as repository:
        backup, chunks, content = newest(case, repository)
        number = next(iter(chunks.used()))
        pack, entry = repository.index.find(chunks.id(number))[0]
        path = case.path / "repo" / pack
        whole = path.read_bytes()
        path.write_bytes(whole[: entry.place] + bytes(entry.stored) + whole[entry.place + entry.stored :])
        target = Memory(bytes(SIZE), fresh=True)
        with pytest.raises(CorruptError, match=f"chunk {entry.id.hex()[:16]} .*{pack}"):
            Restore(repository, chunks, target).run()
        assert not any(target.content[number * CHUNK : (number + 1) * CHUNK])
        (path.parent / f"{backup.id}-900000").write_bytes(whole)
        target = Memory(bytes(SIZE), fresh=True)
        Restore(repository, chunks, target).run()
        assert target.content == content


def entries() -> st.SearchStrategy[dict[bytes, tuple[str, Entry]]]:
    """Chunks by id: in which pack they are, and where. Those of a pack lie one after the other, with gaps."""

    def placed(rows: list[tuple[str, int, int]]) -> dict[bytes, tuple[str, Entry]]:
        ends: dict[str, int] = {}
        found = {}
        for number, (pack, gap, stored) in enumerate(rows):
            at = ends.get(pack, 100) + gap
            ends[pack] = at + stored
            id_ = number.to_bytes(32, "big")
            found[id_] = (pack, Entry(id_, at, stored, 1 << 20, Kind.DATA, 0))
        return found

    row = st.tuples(st.sampled_from("AB"), st.integers(52, 200_000), st.integers(1, 1 << 20))
    return st.lists(row, min_size=1, max_size=30).map(placed)


@given(entries(), st.lists(st.integers(0, 35), max_size=40))
def test_every_chunk_is_read_once(known: dict[bytes, tuple[str, Entry]], ids: list[int]) -> None:
    """For all of its numbers, in a run that has it whole; runs are no longer than they may be."""
    wanted = [(number, id_.to_bytes(32, "big")) for number, id_ in enumerate(ids)]
    found = list(runs(wanted, lambda id_: [known[id_]] if id_ in known else []))
    read = [(number, one.id) for run in found for one in run.wanted for number in one.numbers]
    assert sorted(read) == sorted(wanted)
    seen = [one.id for run in found for one in run.wanted]
    assert len(seen) == len(set(seen))
    for run in found:
        assert run.end - run.start <= RUN_BYTES
        for one in run.wanted:
            assert (run.pack != "") == (one.id in known)
            if one.entry is not None:
                assert run.start <= one.entry.place and one.entry.place + one.entry.stored <= run.end
