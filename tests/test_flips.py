"""Bits that flip in what no digest of a record covers: indexes, base points with their maps and notes, the catalog.

Each flip is found, harms nothing beyond what it touches, and is not served by who verifies. CDP_LONG=N flips N times as many,
CDP_SEED=S replays one.
"""

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdpserver import sums
from cdpserver.basepoint import publish
from cdpserver.catalog import Catalog, Row
from cdpserver.catalog.recovery import is_readable
from cdpserver.check import check_timeline, repair
from cdpserver.check.depth import BASE_POINT, Everything, Place
from cdpserver.check.index import check_interval
from cdpserver.check.repair import Step
from cdpserver.errors import CdpError, CorruptError
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal.log import interval_path
from cdpserver.nodes import base_point_path, note_path, read_note
from cdpserver.view.chain import map_path
from cdpserver.view.extent import Files
from cdpserver.view.history import History
from cdpserver.view.view import View
from recovery.opened import alone
from tests.figures import tally
from tests.test_check import BOOT, SEQS, SIZE, Disk, disk, flip, template
from tests.test_check_depth import named
from tests.test_repair import plan

__all__ = ["disk", "named", "template"]  # fixtures

LONG = int(os.environ.get("CDP_LONG", "1"))


def seeds(count: int) -> list[int]:
    """Which flips."""
    return [int(os.environ["CDP_SEED"])] if "CDP_SEED" in os.environ else list(range(count * LONG))


def flipped(path: Path, seed: int) -> tuple[int, int]:
    """Flip a bit of a file, whose times stay: (where, mask). Of LMDB's not in the zeros that most of a small one is."""
    dice = random.Random(f"{path.name} {seed}")
    stat = path.stat()
    held = path.read_bytes()
    places = [at for at, byte in enumerate(held) if byte] if path.suffix == ".mdb" else range(len(held))
    at, mask = dice.choice(places), 1 << dice.randrange(8)
    flip(path, at, mask)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return at, mask


def back(path: Path, at: int, mask: int) -> None:
    """Flip it back."""
    stat = path.stat()
    flip(path, at, mask)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def reads(disk: Disk, seq: int, *, verify: bool) -> bytes:
    """The disk at an instant."""
    with (
        contextlib.closing(History(disk.state.path, disk.timeline, BOOT)) as history,
        contextlib.closing(View(history, seq, Files(verify=verify))) as view,
    ):
        return view.read(0, SIZE)


def apart(look: Callable[[], int]) -> int:
    """What `look` returns in a process of its own, or minus the signal that ended it: LMDB dies of damaged pages."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(look())
        except BaseException:  # noqa: BLE001 - the rim of a process
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- indexes


def test_a_bit_of_an_index(disk: Disk) -> None:
    """What the check passes reads as before; with verified reads nothing else is served at all, whatever the check says."""
    path = interval_path(disk.directory, 1) / CLOSED_NAME
    instants = [SEQS[name] for name in ("b", "b2")]
    whole = {seq: reads_apart(disk, seq) for seq in instants}
    found = 0
    for seed in seeds(30):
        at, mask = flipped(path, seed)
        wrong = apart(lambda: int(bool(check_interval(disk.directory, 1, BOOT, whole=True))))
        found += wrong != 0
        for seq in instants:
            held = reads_apart(disk, seq, verify=wrong != 0)
            assert held in (whole[seq], None), (seed, at, mask, seq, wrong)
            assert wrong or held is not None, (seed, at, mask, seq)
        back(path, at, mask)
    assert found or len(seeds(30)) < 30
    tally("flips: index", flips=len(seeds(30)), found=found)


def reads_apart(disk: Disk, seq: int, *, verify: bool = False) -> bytes | None:
    """The same in a process of its own; None where it is refused, or the process dies."""
    out = disk.state.path / "out"
    out.unlink(missing_ok=True)

    def look() -> int:
        out.write_bytes(reads(disk, seq, verify=verify))
        return 0

    return out.read_bytes() if apart(look) == 0 else None


# --- base points


class Only(Everything):
    """Base points, and headers, which are always verified."""

    def takes(self, place: Place) -> bool:
        return place[0] == BASE_POINT


@pytest.fixture
def standing(named: Disk, short_path: Path) -> Disk:
    """A disk with a base point, made as the service makes it."""
    with (
        contextlib.closing(History(named.state.path, named.timeline, BOOT)) as history,
        alone("export", [f"state_dir={named.state.path}", "alone=1"], short_path / "nbd"),
    ):
        publish(named.state, history, 0, export="d", socket=short_path / "nbd")
    return named


@pytest.mark.real
def test_a_bit_of_a_base_point(standing: Disk) -> None:
    """Found each time, wherever it is. Once history below it is gone it is what is read: refused there, and only there."""
    path, last = base_point_path(standing.directory, 0), SEQS["b2"]
    sums.write(standing.directory / "base.raw")
    whole = reads(standing, last, verify=True)
    for seed in seeds(8):
        at, mask = flipped(path, seed)
        report = check_timeline(standing.state.path, "t1", boot_id=BOOT, depth=Only())
        assert [damage.named for damage in report.damage] == [("bp:0",)], (seed, at, mask)
        assert reads(standing, last, verify=True) == whole
        back(path, at, mask)
    shutil.rmtree(interval_path(standing.directory, 1))
    assert reads(standing, last, verify=True) == whole
    refused = 0
    for seed in seeds(8):
        at, mask = flipped(path, 1000 + seed)
        try:
            assert reads(standing, last, verify=True) == whole, (seed, at, mask)
        except CdpError:
            refused += 1
        back(path, at, mask)
    tally("flips: base point", flips=2 * len(seeds(8)), found=len(seeds(8)) + refused)


@pytest.mark.real
def test_a_bit_of_a_note_or_a_map(standing: Disk) -> None:
    """A note names the instant that a file holds: one that says something else is no note. A map is made anew."""
    note, map_ = note_path(standing.directory, 0), map_path(base_point_path(standing.directory, 0))
    held = read_note(standing.directory, 0)
    refused = 0
    for seed in seeds(40):
        at, mask = flipped(note, seed)
        try:
            assert read_note(standing.directory, 0) == held, (seed, at, mask)
        except CorruptError:
            refused += 1
        back(note, at, mask)
    tally("flips: note", flips=len(seeds(40)), found=refused)
    flip(note, note.read_bytes().index(b'"seq": ') + 8)
    with pytest.raises(CorruptError):
        read_note(standing.directory, 0)
    report = check_timeline(standing.state.path, "t1", boot_id=BOOT, depth=Only())
    assert [damage.named for damage in report.damage] == [("bp:0",)]
    assert plan(standing).steps == (Step("note", 0),)
    shutil.rmtree(interval_path(standing.directory, 1))
    flip(note, note.read_bytes().index(b'"seq": ') + 8)
    whole = reads(standing, SEQS["b2"], verify=False)
    for seed in seeds(10):
        at, mask = flipped(map_, seed)
        assert reads(standing, SEQS["b2"], verify=False) == whole, (seed, at, mask)
        back(map_, at, mask)
    tally("flips: map", flips=len(seeds(10)))


@pytest.mark.real
def test_a_damaged_base_point_is_made_anew_by_a_repair(standing: Disk, short_path: Path) -> None:
    """From the journal, in the place of the damaged file; what it holds is what it held."""
    path = base_point_path(standing.directory, 0)
    before = reads(standing, SEQS["b2"], verify=True)
    at = path.stat().st_size - 100
    stat = path.stat()
    flip(path, at)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = plan(standing)
    assert found.steps == (Step("base-point", 0),) and found.left == ()

    @contextlib.contextmanager
    def serve() -> Iterator[Path]:
        socket = short_path / "repair"
        with alone("export", [f"state_dir={standing.state.path}", "alone=1"], socket):
            yield socket

    repair.apply(standing.state, found, "t1", boot_id=BOOT, serve=serve)
    assert plan(standing).steps == () and standing.check(full=True).whole
    shutil.rmtree(interval_path(standing.directory, 1))
    assert reads(standing, SEQS["b2"], verify=True) == before


# --- the catalog


def test_a_bit_of_the_catalog(named: Disk) -> None:
    """Whatever it changes of what the catalog says is found when it is read whole, as at each start; the copy gives it back."""
    state = named.state
    Catalog.recover(state)
    with Catalog.open(state, writable=True) as catalog:
        for number in range(20):
            fields = {"why": "an audit " * number, "n": number}
            catalog.put_row("locks", Row(f"lock-{number}", 1, fields))
        names, rows = catalog.names(), catalog.rows("locks")
    data = state.catalog / "data.mdb"
    found = 0
    for seed in seeds(60):
        at, mask = flipped(data, seed)
        state_of = apart(lambda: whole_or_not(named, names, rows))
        assert state_of != 7, (seed, at, mask, "it says something else, and is taken for whole")
        found += state_of != 0
        back(data, at, mask)
    flip(data, data.read_bytes().index(b"an audit an audit") + 2)
    assert not is_readable(state.catalog)
    said = Catalog.recover(state)
    assert "unreadable" in said[0]
    with Catalog.open(state, writable=True) as catalog:
        assert (catalog.names(), catalog.rows("locks")) == (names, rows)
    copy = state.catalog_copy
    for seed in seeds(10):
        flipped(copy, seed)
        with Catalog.open(state, writable=True) as catalog:
            assert (catalog.names(), catalog.rows("locks")) == (names, rows)
        assert b"lock-19" in copy.read_bytes()
    tally("flips: catalog", flips=len(seeds(70)), found=found + len(seeds(10)))


def whole_or_not(disk: Disk, names: object, rows: object) -> int:
    """0: as it was; 3: refused; 7: it says something else."""
    try:
        with Catalog.open(disk.state, writable=True) as catalog:
            return 0 if (catalog.names(), catalog.rows("locks")) == (names, rows) else 7
    except CdpError:
        return 3
