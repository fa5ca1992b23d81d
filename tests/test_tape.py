"""A repository as one stream: out and back in one pass; cut or damaged, what is whole comes out, the rest is named."""

import errno
import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.repository import gc, seal, tape
from cdpserver.repository.check import check
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.repository import Repository, create
from cdpserver.repository.tape import RECORD_SIZE, Record, What, pack_record, parse_record
from cdpserver.repository.untape import Imported, Reader, import_
from tests.backed_up import CHUNK, Case, with_history
from tests.core import scratch

KEY = b"a key that is long enough"


@pytest.fixture(params=["plain", "encrypted"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """Four backups of one disk."""
    monkeypatch.setattr(seal, "SCRYPT_N", 1 << 8)
    with scratch() as path:
        world, line = with_history(path)
        secret = KEY if request.param == "encrypted" else None
        made = Case(world, line, path, secret)
        create(DirectoryPlace(path / "repo"), chunk_size=CHUNK, secret=secret)
        for number in range(4):
            made.write(number, 8)
            made.back_up()
        yield made
        world.close()


def exported(case: Case, *ids: str) -> bytes:
    """The stream of all backups, or of these."""
    out = io.BytesIO()
    with case.repository() as repository:
        wanted = ids or repository.backup_ids()
        done = tape.export(repository, [repository.backup(id_) for id_ in wanted], out.write, created_ns=1)
        assert not list(repository.place.names("sessions"))
    assert (done.backups, done.bytes) == (len(wanted), len(out.getvalue()))
    return out.getvalue()


class Tape(io.RawIOBase):
    """Goes forwards only, and gives what it likes."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        assert size > 0
        return self._data.read(min(size, 10_000))


def imported(case: Case, data: bytes, name: str) -> Imported:
    """Into a place of that name, and everything in it is what the disk was."""
    place = DirectoryPlace(case.path / name)
    found = import_(place, Tape(data), secret=case.secret, cache=case.path / f"{name}-cache")
    there = Case(case.world, case.line, case.path, case.secret, place, case.taken)
    there.verify(f"{name}-cache")
    with there.repository(f"{name}-cache") as repository:
        assert sorted(repository.backup_ids()) == sorted(found.backups)
        assert check(repository).sound
    return found


def test_out_and_in_again(case: Case) -> None:
    """Everything, into an empty place; once more, and it is stored once."""
    data = exported(case)
    found = imported(case, data, "there")
    assert found.sound
    assert found.backups == sorted(case.taken)
    packs = sorted(path.name for path in (case.path / "there/packs").rglob("*"))
    assert imported(case, data, "there").sound
    assert packs == sorted(path.name for path in (case.path / "there/packs").rglob("*"))


def test_some_of_them(case: Case) -> None:
    """What only the others need is not in the stream."""
    last = max(case.taken)
    data = exported(case, last)
    assert len(data.rstrip(b"\0")) < len(exported(case).rstrip(b"\0"))
    assert imported(case, data, "there").backups == [last]


def test_cut_anywhere(case: Case) -> None:
    """The backups whose record came are whole; that there is more is said."""
    data = exported(case)
    reader = Reader(io.BytesIO(data))
    ends = []
    for record, _ in reader.records():
        if record.what == What.BACKUP:
            ends.append(reader.bytes)
    assert reader.ended
    assert reader.intact
    end = reader.bytes + RECORD_SIZE
    cuts = [ends[0] - 1, ends[0], ends[1] + 7, ends[3] - 1, ends[3], end - 1]
    for cut in cuts:
        found = imported(case, data[:cut], f"cut-{cut}")
        assert len(found.backups) == sum(end <= cut for end in ends)
        assert not found.ended
        assert not found.sound


def test_flipped_anywhere(case: Case) -> None:
    """Never taken for whole, nothing wrong comes out, the rest does; a second copy fills what was lost."""
    data = exported(case)
    dice = random.Random(3)
    reader = Reader(io.BytesIO(data))
    head = len(tape.pack_head(reader.config))
    list(reader.records())
    end = reader.bytes + RECORD_SIZE
    for number in range(8):
        damaged = bytearray(data)
        damaged[dice.randrange(head, end)] ^= 1 << dice.randrange(8)
        name = f"flip-{number}"
        found = imported(case, bytes(damaged), name)
        assert not found.sound
        assert len(found.backups) + len({damage.backup for damage in found.damage}) >= 3
        assert imported(case, data, name).sound


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_a_lost_chunk_is_named_by_disk_and_range(case: Case) -> None:
    """The newest chunk of the third backup: the first two are whole, and the fourth needs it too."""
    ids = sorted(case.taken)
    case.line.write(7 * CHUNK, bytes([9]) * CHUNK)
    only = case.back_up()
    data = bytearray(exported(case))
    reader = Reader(io.BytesIO(bytes(data)))
    at = 0
    for record, _ in reader.records():
        if record.what == What.DATA:
            at = reader.bytes - record.stored
    data[at] ^= 1
    found = imported(case, bytes(data), "there")
    assert found.backups == ids
    assert [(d.backup, d.disk, d.start, d.end) for d in found.damage] == [
        (only.id, "d1", 7 * CHUNK, 8 * CHUNK)
    ]
    assert (found.lost_chunks, found.lost_bytes, found.ended, found.intact) == (1, 0, True, False)


def test_not_into_another_repository(case: Case) -> None:
    data = exported(case)
    other = DirectoryPlace(case.path / "other")
    create(other)
    with pytest.raises(RefusedError, match="another repository"):
        import_(other, io.BytesIO(data), secret=case.secret, cache=case.path / "c")
    if case.secret is not None:
        with pytest.raises(RefusedError, match="not the key"):
            import_(DirectoryPlace(case.path / "new"), io.BytesIO(data), secret=b"x", cache=case.path / "c")


@pytest.mark.parametrize("case", ["plain"], indirect=True)
def test_a_damaged_repository_has_no_whole_stream(case: Case) -> None:
    """The export ends with the error, and what was written has no end."""
    case.line.write(0, random.Random(8).randbytes(9 * CHUNK))
    case.back_up()
    case.line.write(9 * CHUNK, b"lost" * 1024)
    lost = case.back_up()
    next((case.path / "repo/packs").rglob(f"{lost.id}-000001")).unlink()
    out = io.BytesIO()
    with case.repository("new") as repository:
        backups = [repository.backup(id_) for id_ in repository.backup_ids()]
        with pytest.raises(CorruptError, match="missing"):
            tape.export(repository, backups, out.write, created_ns=1)
    assert not imported(case, out.getvalue(), "there").ended


class Drive(io.RawIOBase):
    """As Linux' st drives a tape (st(4)): each write is a block, and a read that is too small for one gives nothing of it.

    With fixed blocks each request is a multiple of them; a read has as many as there are.
    """

    def __init__(self, fixed: int = 0) -> None:
        self._fixed = fixed
        self._blocks: list[bytes] = []
        self._at = 0

    def write(self, data: Any, /) -> int:
        if self._fixed and len(data) % self._fixed:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        step = self._fixed or len(data)
        self._blocks += [bytes(data[at : at + step]) for at in range(0, len(data), step)]
        return len(data)

    def read(self, size: int = -1, /) -> bytes:
        if self._fixed and size % self._fixed:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self._at == len(self._blocks):
            return b""
        if size < len(self._blocks[self._at]):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        count = min(size // self._fixed, len(self._blocks) - self._at) if self._fixed else 1
        self._at += count
        return b"".join(self._blocks[self._at - count : self._at])

    def readable(self) -> bool:
        return True

    @property
    def sizes(self) -> set[int]:
        return set(map(len, self._blocks))


@pytest.mark.parametrize("case", ["plain"], indirect=True)
@pytest.mark.parametrize("fixed", [0, 512, 64 << 10, tape.BLOCK])
def test_to_a_drive_and_back(case: Case, fixed: int) -> None:
    """More than a block, and a last one that is full of zeros; whatever blocks the drive has."""
    case.line.write(0, random.Random(8).randbytes(9 * CHUNK))
    case.back_up()
    drive = Drive(fixed)
    with case.repository() as repository:
        done = tape.export(repository, list(repository.backups()), drive.write, created_ns=1)
    assert done.bytes % tape.BLOCK == 0 and done.bytes > 2 * tape.BLOCK
    assert drive.sizes == {fixed or tape.BLOCK}
    found = import_(DirectoryPlace(case.path / "there"), drive, cache=case.path / "there-cache")
    assert found.sound and found.backups == sorted(case.taken)
    assert drive.read(tape.BLOCK) == b"", "to its end, so that the writer of a pipe is not cut off"


@settings(max_examples=60)
@given(
    data=st.binary(max_size=300), junk=st.binary(max_size=100), payload=st.binary(min_size=1, max_size=200)
)
def test_junk_between_records_is_passed_over(data: bytes, junk: bytes, payload: bytes) -> None:
    """No bytes at all can do more than be passed over, or be no stream."""
    with pytest.raises(CorruptError):
        Reader(io.BytesIO(data))
    with scratch() as path:
        config = create(DirectoryPlace(path))
    record = pack_record(Record(What.DATA, 0, len(payload), len(payload), 0, bytes(32))) + payload
    assert parse_record(record[:RECORD_SIZE]) is not None
    stream = tape.pack_head(config) + junk + record + junk
    reader = Reader(io.BytesIO(stream))
    found = [body for _, body in reader.records()]
    assert payload in found
    assert reader.lost_bytes >= 2 * len(junk) - RECORD_SIZE
    assert not reader.ended


def packets() -> tuple[socket.socket, socket.socket]:
    """Each takes a block as one."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for one in pair:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, tape.BLOCK)
    return pair


@pytest.mark.real
@pytest.mark.parametrize("case", ["encrypted"], indirect=True)
def test_through_a_pipe(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """By command, from one process to the other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(case.path / "xdg"))
    # The repository was made with a cheap key derivation, which a process of its own does not know.
    (case.path / "repo/repo.json").unlink()
    monkeypatch.setattr(seal, "SCRYPT_N", 1 << 15)
    key = case.path / "key"
    key.write_bytes(KEY)
    made = DirectoryPlace(case.path / "real")
    create(made, chunk_size=CHUNK, secret=KEY)
    case.place = made
    case.taken.clear()
    with case.repository("real-cache"):
        pass
    first = case.back_up()

    def cdp(*words: object) -> list[str]:
        return [sys.executable, "-m", "recovery.cli", *map(str, words), "--key-file", str(key)]

    # A socket of packets does as a drive does: each write is one, and what a read that is too small leaves of one is lost.
    mine, its = packets()
    with (
        mine,
        its,
        subprocess.Popen(
            cdp("repo", "export", case.path / "real", "--json"), stdout=its.fileno(), stderr=subprocess.PIPE
        ) as export,
    ):
        its.close()
        blocks = list(iter(lambda: mine.recv(4 * tape.BLOCK), b""))
        told = json.loads(export.communicate()[1])
    assert {len(block) for block in blocks} == {tape.BLOCK}
    assert (told["backups"], told["bytes"]) == (1, len(blocks) * tape.BLOCK)
    mine, its = packets()
    with (
        mine,
        its,
        subprocess.Popen(
            cdp("repo", "import", case.path / "new", "--json"), stdin=its.fileno(), stdout=subprocess.PIPE
        ) as importing,
    ):
        its.close()
        for block in blocks:
            mine.sendall(block)
        mine.close()
        assert json.loads(importing.communicate()[0])["backups"] == [first.id]
    cut = subprocess.run(
        cdp("repo", "import", case.path / "cut", "--json"),
        input=blocks[0][:10_000], stdout=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert cut.returncode == 4
    assert json.loads(cut.stdout)["ended"] is False
    with Repository(DirectoryPlace(case.path / "new"), secret=KEY, cache=case.path / "c") as repository:
        case.compare(repository, repository.backup(first.id))
        assert gc.sweep(repository).deleted == 0
