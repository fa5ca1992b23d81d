"""Backups whose content is sent: pieces in any order become whole chunks, and nothing is published that is not whole."""

import contextlib
import random
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import qemu
from cdpserver.errors import BrokenError, CdpError, RefusedError, UsageError
from cdpserver.repository import packs, sessions
from cdpserver.repository import pushed as pushed_module
from cdpserver.repository.assembly import UNIT, Assembly
from cdpserver.repository.content import Content
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.pushed import Intent, Pushed, Sent
from cdpserver.repository.record import FULL, INCREMENTAL, Backup
from cdpserver.repository.repository import Repository, create
from cdpserver.vm.backup.choice import LiveDisk, Marks, choose, prefix_of
from cdpserver.vm.backup.staged import Staged
from tools.kit.processes import until

STEP = 64 << 10
SIZE = 5 * STEP + 3 * UNIT
DISK = "web/vda"


@given(st.integers(0, 1 << 32), st.sampled_from([0, STEP, 1 << 30]))
def test_pieces_in_any_order(seed: int, memory: int) -> None:
    """Data and zeros, in memory or in the file: each chunk comes out once, when its last piece is there, as it was sent."""
    dice, content = random.Random(seed), bytearray(SIZE)
    pieces: list[tuple[int, int, bool]] = []
    at = 0
    while at < SIZE:
        end = min(SIZE, at + UNIT * dice.choice([1, 3, 64, 128, 300]))
        if data := dice.random() < 0.6:
            content[at:end] = dice.randbytes(end - at)
        pieces.append((at, end, data))
        at = end
    dice.shuffle(pieces)
    assembly = Assembly(SIZE, STEP, memory=memory)
    seen: dict[int, bytes] = {}
    with contextlib.closing(assembly):
        for start, end, data in pieces:
            whole = assembly.write(start, content[start:end]) if data else assembly.zero(start, end - start)
            for chunk, got in whole:
                assert chunk not in seen
                seen[chunk] = bytes(got) if got is not None else bytes(min(STEP, SIZE - chunk * STEP))
            assert assembly.held <= memory + SIZE
        assert (assembly.unfinished, assembly.held) == (0, 0)
    assert b"".join(seen[chunk] for chunk in sorted(seen)) == content


def test_what_is_sent_twice_counts_once() -> None:
    with contextlib.closing(Assembly(2 * STEP, STEP)) as assembly:
        assert assembly.write(0, b"a" * 4096) == []
        assert assembly.write(0, b"b" * 4096) == []
        assert assembly.zero(0, UNIT) == []
        ((chunk, content),) = assembly.zero(4096, STEP - 4096)
        assert (chunk, bytes(content or b"")[:4096]) == (0, bytes(UNIT) + b"b" * (4096 - UNIT))
    with pytest.raises(UsageError, match="no multiple of 512"):
        Assembly(1000, STEP)


# -- into a repository


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    place = DirectoryPlace(tmp_path / "repo")
    create(place, chunk_size=STEP)
    with Repository(place, cache=tmp_path / "cache") as opened:
        yield opened


@contextlib.contextmanager
def sending(repository: Repository, parent: Backup | None = None, size: int = SIZE) -> Iterator[Pushed]:
    kind = INCREMENTAL if parent is not None else FULL
    number = len(repository.backup_ids()) + 1
    id_ = sessions.new_id(number * 10**9)
    intent = Intent(
        id_, 1, "web", kind, "for a test", parent.id if parent is not None else "", (Sent(DISK, size),)
    )
    with sessions.session(repository.place, id_) as check_held:
        pushed = Pushed(repository, intent, check_held)
        try:
            yield pushed
        finally:
            pushed.close()


def full(repository: Repository, content: bytes) -> Backup:
    with sending(repository, size=len(content)) as pushed:
        disk = pushed.connect(DISK)
        pushed.write(disk, 0, content)
        return pushed.commit(1000, "crash")


def read(repository: Repository, backup: Backup) -> bytes:
    return Content(repository, backup.disks[0]).read(0, backup.disks[0].size)


def test_full_and_incremental(repository: Repository) -> None:
    """What is sent of an incremental one replaces what was, zeros too; the rest is as in the backup before."""
    content = bytearray(random.Random(1).randbytes(SIZE))
    first = full(repository, bytes(content))
    assert (first.kind, first.read_bytes, first.new_bytes, read(repository, first)) == (
        "full", SIZE, SIZE, bytes(content),
    )  # fmt: skip
    with sending(repository, first) as pushed:
        disk = pushed.connect(DISK)
        content[STEP : 2 * STEP] = b"n" * STEP
        pushed.write(disk, STEP, content[STEP : 2 * STEP])
        content[3 * STEP : 4 * STEP] = bytes(STEP)
        pushed.zero(disk, 3 * STEP, STEP)
        second = pushed.commit(2000, "app")
    assert (second.read_bytes, second.new_bytes, second.increments) == (STEP, STEP, 1)
    assert read(repository, second) == content
    assert (second.disks[0].grade, second.disks[0].time_ns, second.name.partition("@")[0]) == (
        "app",
        2000,
        "web",
    )


@pytest.mark.parametrize("what", ["unfinished", "not all", "lost", "second", "space"])
def test_nothing_is_published_that_is_not_whole(repository: Repository, what: str) -> None:
    before = full(repository, b"x" * SIZE)
    parent = before if what == "unfinished" else None
    failed: type[CdpError] = BrokenError
    with sending(repository, parent) as pushed:
        disk = pushed.connect(DISK)
        if what == "unfinished":
            pushed.write(disk, 0, b"y" * 4096)
        elif what == "not all":
            pushed.zero(disk, STEP, SIZE - STEP)
        else:
            pushed.zero(disk, 0, SIZE)
        if what == "lost":
            pushed.lost(disk)
        if what == "second":
            failed = RefusedError
            with pytest.raises(RefusedError, match="has a client already"):
                pushed.connect(DISK)
        if what == "space":
            (repository.place.path / "packs").rename(repository.place.path / "away")  # type: ignore[attr-defined]
            (repository.place.path / "packs").touch()  # type: ignore[attr-defined]
            pushed.close()
            failed = CdpError
        else:
            assert ("error" in pushed.status()) == (what in ("lost", "second"))
        with pytest.raises(failed):
            pushed.commit(1, "crash")
        with pytest.raises(CdpError):
            pushed.write(disk, 0, b"z" * 4096)
    assert repository.backup_ids() == [before.id]


class SlowPlace(DirectoryPlace):
    """A directory on storage that takes packs when it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.goes_on = threading.Event()

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        if name.startswith("packs/"):
            assert self.goes_on.wait(60)
        super().put(name, data, until_ns)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowPlace:
    """A repository's, that has much to do with its first pack."""
    monkeypatch.setattr(packs, "PACK_BYTES", STEP)
    for limit in ("MUCH_BYTES", "MOST_BYTES"):
        monkeypatch.setattr(pushed_module, limit, 0)
    made = SlowPlace(tmp_path / "repo")
    create(made, chunk_size=STEP)
    return made


def test_who_sends_waits_for_a_slow_repository(place: SlowPlace, tmp_path: Path) -> None:
    """It says that it has much to do, takes some more, and then lets requests wait until there is room."""
    size = 64 * STEP
    content = random.Random(3).randbytes(size)
    with (
        Repository(place, cache=tmp_path / "cache") as opened,
        sending(opened, size=size) as pushed,
        ThreadPoolExecutor(1) as guest,
    ):
        disk = pushed.connect(DISK)

        def send() -> None:
            for at in range(0, size, STEP):
                pushed.write(disk, at, content[at : at + STEP])

        sent = guest.submit(send)
        until(lambda: pushed.status()["much"], "much to do")
        assert not sent.done() and pushed.status()["read_bytes"] < size
        place.goes_on.set()
        sent.result(60)
        until(lambda: not pushed.status()["much"], "less to do")
        assert read(opened, pushed.commit(1, "crash")) == content


@pytest.mark.parametrize("given_up", [False, True])
def test_no_request_waits_for_a_repository_that_hangs(
    place: SlowPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    """One waits for so long at most; then, or when the backup is given up, all are answered at once, and there is no backup."""
    if not given_up:
        monkeypatch.setattr(pushed_module, "ROOM_S", 0.1)
    size = 64 * STEP
    with (
        Repository(place, cache=tmp_path / "cache") as opened,
        sending(opened, size=size) as pushed,
        ThreadPoolExecutor(1) as guest,
    ):
        disk = pushed.connect(DISK)

        def send() -> None:
            for at in range(0, size, STEP):
                pushed.write(disk, at, random.Random(at).randbytes(STEP))

        sent = guest.submit(send)
        if given_up:
            until(lambda: pushed.status()["much"], "much to do")
            pushed.give_up()
        with pytest.raises(CdpError, match="given up" if given_up else "took nothing"):
            sent.result(60)
        with pytest.raises(CdpError):
            pushed.zero(disk, 0, STEP)
        with pytest.raises(CdpError):
            pushed.commit(1, "crash")
        place.goes_on.set()
    assert list(DirectoryPlace(tmp_path / "repo").names("backups")) == []


# -- by files


def staged(
    repository: Repository, directory: Path, writes: list[str], parent: Backup | None = None
) -> Staged:
    """A QCOW2 file that a job wrote."""
    file = directory / "link-0" / "disk-0.qcow2"
    file.parent.mkdir(exist_ok=True, parents=True)
    qemu.create_image(file, size=SIZE)
    subprocess.run(
        [
            "qemu-io",
            "-f",
            "qcow2",
            *(part for write in writes for part in ("-c", write)),
            file,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    kind = INCREMENTAL if parent is not None else FULL
    intent = Intent(
        sessions.new_id(len(repository.backup_ids()) + 1), 1, "web", kind, "for a test",
        parent.id if parent is not None else "", (Sent(DISK, SIZE),),
    )  # fmt: skip
    return Staged(repository, intent, directory)


def test_files_are_taken_in_if_nothing_is_missing(repository: Repository, tmp_path: Path) -> None:
    """A write that failed on the way is a hole in the file; one that is cut short, and one that is no image."""
    directory = tmp_path / "staging"
    whole = ["write -P 1 0 128k", f"write -z 128k {SIZE - 2 * STEP}"]
    with pytest.raises(BrokenError, match="4 chunks of web/vda did not come whole"):
        staged(repository, directory, whole[:1]).take_in(1, "crash", [2 * STEP])
    made = staged(repository, directory, whole).take_in(1000, "crash", [SIZE])
    assert (made["kind"], made["read_bytes"], made["new_bytes"]) == ("full", 2 * STEP, STEP)
    first = repository.backup(made["id"])
    assert read(repository, first) == b"\1" * 2 * STEP + bytes(SIZE - 2 * STEP)
    with pytest.raises(BrokenError, match=f"{STEP} bytes came of {2 * STEP}"):
        staged(repository, directory, ["write -P 2 64k 64k"], first).take_in(2000, "crash", [2 * STEP])
    made = staged(repository, directory, ["write -P 2 64k 64k", "write -z 0 64k"], first).take_in(
        2000, "crash", [2 * STEP]
    )
    assert read(repository, repository.backup(made["id"])) == bytes(STEP) + b"\2" * STEP + bytes(
        SIZE - 2 * STEP
    )
    short = staged(repository, directory, ["write -P 2 64k 64k"], first)
    (directory / "link-0" / "disk-0.qcow2").write_bytes(b"no image")
    with pytest.raises(CdpError):
        short.take_in(3000, "crash", [STEP])
    assert len(repository.backup_ids()) == 2


# -- full or incremental


def live(repository: Repository, backup: Backup | None = None, **more: object) -> LiveDisk:
    """The disk as QEMU has it, with a bitmap since that backup."""
    marks = {}
    if backup is not None:
        name = prefix_of(repository.config.id) + backup.id
        given = {"marked": STEP, "inconsistent": False, "recording": True} | more
        marks[name] = Marks(name=name, granularity=STEP, **given)  # type: ignore[arg-type]
    return LiveDisk(DISK, "node", SIZE, SIZE, marks)


def why(repository: Repository, disk: LiveDisk, *, full: bool = False, most: int = 63) -> tuple[str, str]:
    found = choose(repository, "web", [disk], full=full, max_increments=most)
    assert (found.parent is not None) == (found.kind == INCREMENTAL)
    return found.kind, found.reason


def test_full_or_incremental_and_why(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", STEP)  # the list is in a pack of its own
    assert why(repository, live(repository))[1] == "there is no backup of it in this repository"
    first = full(repository, random.Random(1).randbytes(SIZE))
    second = full(repository, random.Random(2).randbytes(SIZE))
    kind, reason = why(repository, live(repository, second))
    assert kind == INCREMENTAL and second.id in reason
    assert first.id in why(repository, live(repository, first))[1], "an older one will do"
    for disk, expected in (
        (live(repository), "was started anew"),
        (live(repository, second, inconsistent=True), "is not consistent"),
        (live(repository, second, recording=False), "is not consistent"),
        (live(repository, second, marked=SIZE), "as much changed"),
        (LiveDisk("web/vdb", "node", SIZE, SIZE, {}), "has no web/vdb"),
        (LiveDisk(DISK, "node", 2 * SIZE, SIZE, live(repository, second).marks), "was resized"),
    ):
        assert why(repository, disk)[0] == FULL
        assert expected in why(repository, disk)[1]
    assert why(repository, live(repository, second), full=True)[1] == "a full one was asked for"
    assert "0 incremental ones followed" in why(repository, live(repository, second), most=0)[1]
    repository.remove(second.id)
    assert "a backup that is not in the repository" in why(repository, live(repository, second))[1]
    for expected in ("some of its chunks are gone", "its list is not all there"):
        for pack, _ in list(repository.place.names("packs")):
            if expected != "some of its chunks are gone" or pack.endswith("-000001"):
                repository.place.delete(pack)
        repository.refresh()
        assert expected in why(repository, live(repository, first))[1]
