"""Every system call on a file fails once, at each place: EIO, ENOSPC, EROFS, EMFILE, and a write that writes half.

The calls are seen where they are made (`tests/interposed.py`), by Python as by LMDB's library. After each failure the answer is
an error of ours or the system's own, never a hang or a wrong success: what may fail in silence is written down for each kind of
work (`SILENT`). What was promised is there, every instant that is offered is bit-exact, no file stays open, and the same work
done again succeeds. While a job hangs in the call that is about to fail, the disk is written.

Where a run is dear the gate takes every n-th place; CDP_LONG=1 takes all of
them, CDP_SEED=S begins at another one.
"""

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import count
from pathlib import Path

import lmdb
import pytest

from cdpserver import basepoint, timeline
from cdpserver.chain import merge as chain
from cdpserver.copying import work as copying
from cdpserver.errors import CdpError, NoSpaceError, RefusedError
from cdpserver.index import indexer, merging
from cdpserver.journal import segment
from cdpserver.nodes import base_point_path, note_path, published, without_note
from cdpserver.repository import packs
from cdpserver.repository.check import check as check_repository
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.repository import create
from cdpserver.retention.prune import Pass
from cdpserver.view.chain import map_path
from cdpserver.view.history import History
from cdpserver.view.live import LiveView
from cdpserver.view.view import View
from recovery import cli
from recovery.opened import alone
from tests.backed_up import CHUNK, Case, with_history
from tests.core import Line, World, forget_indexes, scratch
from tests.figures import tally
from tests.interposed import Call, interposed
from tests.model import BLOCK, equals_but
from tests.test_journal import check_numbers, content, history, requests
from tests.test_power_loss_published import DROPS, THINS, copied, readable, whole
from tests.test_prune import Kept

__all__ = ["whole"]  # a fixture

pytestmark = [pytest.mark.real]

EVERY = "CDP_LONG" in os.environ
SEED = int(os.environ.get("CDP_SEED", "0"))
SHORT = -1
"""Instead of an errno: half of it is written."""

MAKING = ("write", "allocate", "truncate", "rename", "link", "symlink", "mkdir", "copy", "punch")
"""What can find no space."""

CHANGING = ("sync", "unlink", "rmdir", "chmod", "exchange")
"""What a file system that became read-only refuses besides."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """The n-th call that can fail so does, once."""

    def __init__(self, number: int, code: int, *, reads: bool = True) -> None:
        self.left, self.code, self.reads = number, code, reads
        self.hit: Call | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        """Called before that call fails."""
        self._lock = threading.Lock()

    def _can(self, call: Call) -> bool:
        makes = call.kind == "open" and bool(call.flags & os.O_CREAT)
        match self.code:
            case errno.EMFILE:
                return call.kind in ("open", "list")
            case errno.ENOSPC:
                return makes or (call.kind in MAKING and not _shortens(call))
            case _ if self.code == SHORT:
                return call.kind == "write" and len(call.data) > 1
            case errno.EROFS:
                return call.kind in (*MAKING, *CHANGING) or (
                    call.kind == "open" and bool(call.flags & WRITING)
                )
        return call.kind != "read" or self.reads

    def before(self, call: Call) -> int | None:
        """Is it this one?"""
        with self._lock:
            if self.hit is not None or not self._can(call):
                return None
            self.left -= 1
            if self.left:
                return None
            self.hit = call
        self.meanwhile()
        return self.code

    def after(self, call: Call, result: int) -> None:
        """As it may be."""

    def poisons(self) -> bool:
        """Has it failed in a call by which a journal is written?"""
        assert self.hit is not None
        creates = self.hit.kind == "open" and bool(self.hit.flags & os.O_CREAT)
        return creates or self.hit.kind in (*MAKING, "sync")


def _shortens(call: Call) -> bool:
    """A file that is cut shorter needs no room."""
    return call.kind == "truncate" and call.fd >= 0 and os.fstat(call.fd).st_size >= call.offset


CODES = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE, SHORT)
ANSWERS = (CdpError, OSError, lmdb.Error)


def every_place(stride: int, once: Callable[[Faults], None], what: str) -> int:
    """Call `once` with a fault at every `stride`-th place, with each error until it finds no place; how many were hit."""
    hit, step = 0, 1 if EVERY else stride
    for code in CODES:
        for number in count(1 + SEED % step, step):
            faults = Faults(number, code)
            try:
                once(faults)
            except BaseException:
                print(f"replay: {what}, call {number} fails with {code}: {faults.hit}")
                raise
            if faults.hit is None:
                break
            hit += 1
    tally(f"faults: {what}", faults=hit)
    return hit


# --- the write path


@pytest.mark.parametrize("code", CODES)
def test_the_write_path(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without space it goes on, a short write is gone on with; all else poisons the writer until it is opened anew."""
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 5)
    hits = 0
    step = 1 if EVERY or code == SHORT else 3
    for number in count(1 + SEED % step, step):
        faults = Faults(number, code)
        with scratch() as path:
            world = World(path)
            line = history(world, 64 * BLOCK)
            fail_once(line, faults)
            world.close()
        if faults.hit is None:
            break
        hits += 1
    assert hits > 5
    tally("faults: write path", faults=hits)


def fail_once(line: Line, faults: Faults) -> None:
    """What was acknowledged is there, what was refused may be; the writer is broken where it must be."""
    expected = bytearray(content(line))
    doubt: list[tuple[int, bytes]] = []
    answers: list[CdpError] = []
    with interposed(line.world.state.path, faults):
        for request, offset, length, data in requests(line):
            try:
                request()
            except CdpError as error:
                answers.append(error)
                doubt.append((offset, data or b""))
                continue
            expected[offset : offset + length] = data or b""
            doubt = [
                (at, old) for at, old in doubt if not (offset <= at and at + len(old) <= offset + length)
            ]
    assert not (answers and faults.code == SHORT), (answers, faults.hit)
    assert all(isinstance(a, NoSpaceError) for a in answers) or faults.code != errno.ENOSPC, (
        answers,
        faults.hit,
    )
    if faults.hit is not None:
        answered = bool(answers) or bool(line.disk.broken)
        assert answered or faults.code == SHORT or silent("write", faults), faults.hit
    if faults.code in (errno.ENOSPC, SHORT):
        assert not line.disk.broken, faults.hit
    elif faults.hit is not None and faults.poisons():
        assert line.disk.broken, faults.hit
    if line.disk.broken:
        with pytest.raises(CdpError):
            line.write(0, b"refused " * 512)
        line.close(clean=False)
        line.open()
    assert equals_but(content(line), bytes(expected), doubt)
    line.write(0, b"afterwards" * 512)
    line.mark("afterwards")
    check_numbers(line)


@pytest.mark.parametrize("code", CODES)
def test_the_first_copy(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes, zeros, reads and the switch: what was acknowledged is there, and *synced* said again does what was not done."""
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    hits = 0
    for number in count(1):
        faults = Faults(number, code)
        with scratch() as path:
            world = World(path)
            opened = open_files(path)
            line = world.add(16 * BLOCK)
            line.write(0, b"base" * 1024)
            copy_once(line, faults)
            line.close(clean=True)
            forget_indexes(path)
            assert open_files(path) <= opened, faults.hit
            world.close()
        if faults.hit is None:
            break
        hits += 1
    assert hits > 2
    tally("faults: first copy", faults=hits)


def copy_once(line: Line, faults: Faults) -> None:
    """With a fault in it; whoever hears of one asks again, with the writer opened anew if it is broken."""
    expected = bytearray(line.model.size)
    expected[: 4 * BLOCK] = (b"base" * 1024).ljust(4 * BLOCK, b"\0")
    read = bytearray(4 * BLOCK)
    said: list[str] = []

    def until_done(request: Callable[[], object]) -> None:
        for _ in range(3):
            try:
                request()
            except ANSWERS as error:
                said.append(repr(error))
                if line.disk.broken:
                    line.close(clean=False)
                    line.open()
                continue
            return
        raise AssertionError(f"asked again it fails again: {said}")

    with interposed(line.world.state.path, faults):
        for at in (2, 5, 9):
            until_done(lambda at=at: line.connection().write(memoryview(bytes([at]) * 2 * BLOCK), at * BLOCK))  # type: ignore[misc]
            expected[at * BLOCK : (at + 2) * BLOCK] = bytes([at]) * 2 * BLOCK
        until_done(lambda: line.connection().zero(5 * BLOCK, BLOCK))
        expected[5 * BLOCK : 6 * BLOCK] = bytes(BLOCK)
        until_done(lambda: line.connection().read_into(memoryview(read), 2 * BLOCK))
        until_done(lambda: line.connection().flush())
        until_done(line.synced)
        until_done(lambda: line.connection().read_into(memoryview(read), 2 * BLOCK))
    assert read == expected[2 * BLOCK : 6 * BLOCK], (faults.hit, said)
    assert said or faults.hit is None or silent("first copy", faults), faults.hit
    assert (line.directory / "base.synced").exists(), faults.hit
    assert content(line) == expected, (faults.hit, said)
    assert stat.S_IMODE((line.directory / "base.raw").stat().st_mode) == 0o400


def test_a_view_that_could_not_be_opened_reads_nothing_else() -> None:
    """Each file that it opens and reads fails once: the request is refused, and the next one reads what it must."""
    for live in (False, True):
        for code in (errno.EIO, errno.EMFILE):
            with scratch() as path:
                world = World(path)
                line = history(world, 64 * BLOCK)
                for number in count(1 + SEED % 5, 1 if EVERY else 5):
                    line.cut()
                    line.write(number % 60 * BLOCK, bytes([number % 256]) * BLOCK)
                    opened = History(path / "s", line.timeline, world.boot)
                    with (
                        contextlib.closing(opened),
                        contextlib.closing(LiveView(opened) if live else View(opened, line.last_seq)) as view,
                    ):
                        line.write((number + 1) % 60 * BLOCK, b"later" * 100 + bytes(BLOCK - 500))
                        faults = Faults(number, code)
                        with interposed(path, faults), contextlib.suppress(*ANSWERS):
                            view.read(0, line.model.size)
                        seq = line.last_seq if live else view.seq
                        assert view.read(0, line.model.size) == line.model.read(seq, 0, line.model.size)
                    if faults.hit is None:
                        break
                world.close()


# --- what is done beside it


def seqs(kept: Kept) -> list[int]:
    """Every instant of its disk."""
    return list(range(1, kept.line.model.latest + 1))


class Beside:
    """The disk of a job is open, and written by another thread at the moment of the fault: nothing of the job holds it up."""

    def __init__(self, kept: Kept, faults: Faults) -> None:
        kept.line.open()
        self._line = kept.line
        self._wrote = threading.Event()
        faults.meanwhile = self.write

    def write(self) -> None:
        """One block, and its commit."""
        threading.Thread(target=self._write).start()
        assert self._wrote.wait(60), "a write waits for a job"

    def _write(self) -> None:
        self._line.write(0, b"beside" * 600 + bytes(BLOCK - 3600))
        self._line.writer.commit()
        self._wrote.set()

    def close(self) -> None:
        """What was written is there."""
        line = self._line
        if self._wrote.is_set():
            assert content(line) == line.model.read(line.last_seq, 0, line.model.size)
        line.close(clean=True)


def passes(
    kept: Kept, job: str, work: Callable[[Kept], None], before: set[int], after: set[int], faults: Faults
) -> None:
    """Do it with a fault; it is said; what stays is offered and exact; done again it succeeds."""
    root = kept.world.state.path
    opened = open_files(root)
    with contextlib.closing(Beside(kept, faults)):
        answer = answered(root, faults, lambda: work(kept))
    forget_indexes(root)
    assert open_files(root) <= opened, (faults.hit, answer)
    assert answer or faults.hit is None or silent(job, faults), f"nothing is said of {faults.hit}"
    if faults.hit is None:
        return
    offered = readable(kept, sorted(before))
    assert before & after <= offered, f"{before & after - offered} are not offered"
    work(kept)
    assert readable(kept, sorted(before)) >= before & after


def answered(root: Path, faults: Faults, work: Callable[[], object]) -> str:
    """What was said of the fault; nothing if the work was done."""
    with interposed(root, faults):
        try:
            work()
        except ANSWERS as error:
            return repr(error)
    return ""


def open_files(root: Path) -> Counter[str]:
    """Files below `root` that this process has open."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return Counter(link for link in links if link.startswith(str(root)))


def silent(job: str, faults: Faults) -> bool:
    """May this fault go by in silence?"""
    hit = faults.hit
    assert hit is not None
    if faults.code == errno.EMFILE and hit.kind == "open" and hit.path.name.endswith((".data", "base.raw")):
        return True  # another file is closed for one that is read
    return faults.code == SHORT or any(
        hit.kind in kinds and fnmatch(str(hit.path), name) for kinds, name in SILENT.get(job, ())
    )


ANY = (*MAKING, *CHANGING, "open", "read", "list", "lock", "map")

SILENT: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    # A session that cannot end for want of room ends with the next write.
    "write": ((("write", "allocate"), "*.data"),),
    # What is kept only to be quicker the next time; and a backup that is not listed is not missed should it get lost.
    "backup": ((ANY, "*/cache*"), (ANY, "*/listed*")),
    # Who may not write holds its lock open for reading.
    "drop": ((("open",), "*.lock"),),
    "merge": ((("open",), "*.lock"),),
    "thin": ((("open",), "*.lock"),),
}
"""What may fail in each kind of work without a word: kinds of calls, names of files."""


def said(done: Pass) -> None:
    """A pass says what failed, and does not fail itself."""
    if done.failed:
        raise CdpError(str(done.failed))


def index(kept: Kept) -> None:
    """Indexes are made anew, merged, and what was sealed is linked."""
    indexer.rebuild(kept.line.directory, kept.world.boot)
    one = indexer.TimelineIndexer(kept.line.directory, kept.world.boot)
    try:
        one.step(0.0)
        assert not one.unproven or "link" in one.unproven or "Errno" in one.unproven, one.unproven
    finally:
        one.close()
    merging.merge(kept.line.directory)


def merge(kept: Kept) -> None:
    """Two base points are merged into the one above."""
    try:
        chain.merge(kept.world.state, kept.catalog, kept.entry.id, "pull", 4, base=1)
    except RefusedError:
        # One that had failed in its last steps was ended by this one.
        if published(kept.line.directory) != [0, 1, 4, 5]:
            raise


JOBS: dict[str, tuple[Callable[[Kept], None], int]] = {
    "index": (index, 131),
    "thin": (lambda kept: said(kept.prune(THINS)), 401),
    "drop": (lambda kept: said(kept.prune(DROPS)), 131),
    "merge": (merge, 31),
}


@pytest.mark.parametrize("job", list(JOBS))
def test_a_job(whole: Kept, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    monkeypatch.setattr(merging, "MOST", 2)
    work, stride = JOBS[job]
    with scratch() as path:
        kept = copied(whole, path / "first")
        before = readable(kept, seqs(kept))
        work(kept)
        after = readable(kept, seqs(kept))
        kept.catalog.close()
        number = count()

        def once(faults: Faults) -> None:
            one = copied(whole, path / f"{next(number)}")
            try:
                passes(one, job, work, before, after, faults)
            finally:
                one.catalog.close()

        assert every_place(stride, once, job) > 5


def test_publishing_a_base_point(whole: Kept) -> None:
    """It is not there, or it is whole; what was left of it does not keep the next one from being made."""
    with scratch() as path, contextlib.ExitStack() as stack:
        kept = copied(whole, path / "live")
        stack.callback(kept.catalog.close)
        state, directory = kept.world.state, kept.line.directory
        stack.enter_context(alone("export", [f"state_dir={state.path}", "alone=1"], path / "nbd"))
        image = base_point_path(directory, 5)

        def publish() -> None:
            with contextlib.closing(History(state.path, timeline.load(directory))) as found:
                basepoint.publish(state, found, 5, export=kept.entry.name, socket=path / "nbd")

        def once(faults: Faults) -> None:
            for old in (image, note_path(directory, 5), map_path(image)):
                old.unlink(missing_ok=True)
            failed = False
            with interposed(state.path, faults):
                try:
                    publish()
                except ANSWERS:
                    failed = True
            assert (5 in published(directory)) or failed
            assert not list(directory.glob(".tmp-bp-*")), faults.hit
            if 5 in published(directory):
                assert not without_note(directory)

        assert every_place(9, once, "base point") > 5
        publish()
        assert 5 in published(directory) and readable(kept, seqs(kept)) == set(seqs(kept))


def test_a_backup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fails with a word, or is there; what was there before stays whole."""
    monkeypatch.setattr(packs, "PACK_BYTES", 3 * CHUNK)
    with scratch() as path:
        world, line = with_history(path)
        create(DirectoryPlace(path / "repo"), chunk_size=CHUNK)
        case = Case(world, line, path)
        case.back_up()
        seed = count()

        def once(faults: Faults) -> None:
            case.write(next(seed))
            line.writer.commit()
            answer = answered(path, faults, case.back_up)
            assert answer or faults.hit is None or silent("backup", faults), faults.hit
            with case.repository() as repository:
                for id_ in repository.backup_ids():
                    case.taken.setdefault(id_, repository.backup(id_).disks[0].seq)

        assert every_place(23, once, "backup") > 5
        case.back_up()
        case.verify("anew")
        with case.repository() as repository:
            assert check_repository(repository, read_data=False).sound
        world.close()


def test_an_export(whole: Kept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says what failed, and nothing that is there is called an image; said again it ends it."""
    with scratch() as path:
        kept = copied(whole, path / "live")
        seq, out = kept.line.model.latest, path / "out"
        out.mkdir()
        expected = kept.read(seq)
        kept.catalog.close()
        monkeypatch.setenv("XDG_STATE_HOME", str(out / "notes"))
        monkeypatch.setattr(copying, "CHECKPOINT_S", 0.0)
        place = ("--state-dir", str(kept.world.state.path), "--output", str(out / "disk.raw"))
        monkeypatch.setattr("sys.argv", ["cdp", "export", f"{kept.entry.name}@seq:{seq}", *place])

        def once(faults: Faults) -> None:
            shutil.rmtree(out)
            out.mkdir()
            with interposed(path, faults):
                code = cli.main()
            said = capsys.readouterr().err
            if code != 0:
                assert said and cli.main() == 0, (faults.hit, said, capsys.readouterr().err)
            assert (out / "disk.raw").read_bytes() == expected, faults.hit

        assert every_place(97, once, "export") > 2


def test_every_way_to_change_a_file_is_seen(tmp_path: Path) -> None:
    """The kernel's own count of write calls of this process is that of those seen here (proc_pid_io(5))."""
    seen: list[str] = []

    class Count:
        def before(self, call: Call) -> None:
            if call.kind == "write":
                seen.append(call.name)

        def after(self, call: Call, result: int) -> None:
            pass

    def syscw() -> int:
        text = Path("/proc/self/io").read_text()
        return int(text.split("syscw: ")[1].split()[0])

    with scratch() as path:
        world = World(path)
        line = history(world, 64 * BLOCK)
        with interposed(path, Count()):
            started = syscw()
            for request, *_ in requests(line):
                request()
            env = lmdb.open(str(path / "m"), map_size=1 << 20)
            with env.begin(write=True) as txn:
                txn.put(b"key", b"value" * 900)
            env.close()
            (path / "text").write_text("x" * 100_000)
            assert syscw() - started == len(seen)
        world.close()
    assert {"pwrite64", "pwrite", "write"} <= set(seen)
