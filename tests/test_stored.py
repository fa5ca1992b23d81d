"""What the show commands print of a small world whose clock, boots and ids are the test's own, held against tests/golden/.

A change of a golden file is a change of a stored format, or of how one is shown. After one that is meant, write them anew and
look at the difference: `CDP_UPDATE_GOLDEN=1 python -m pytest tests/test_stored.py && git diff tests/golden`.
"""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
import pytest

from cdpserver import durable
from cdpserver.catalog import Catalog, Row
from cdpserver.index.store import SEQ, IndexFile
from cdpserver.state import StateDir
from recovery.index_text import BATCH, items
from recovery.item import Item
from recovery.state_text import catalog_items
from tests.core import INDEXER, ROOT, SECOND_NS, START_NS, World, scratch

GOLDEN = ROOT / "tests" / "golden"
UPDATE = os.environ.get("CDP_UPDATE_GOLDEN") == "1"
BLOCK = 4096
BOOT = "00000001-boot"


@dataclass(frozen=True)
class Stored:
    """A state directory that nobody has open."""

    state: StateDir

    def cdp(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "recovery.cli", "--state-dir", str(self.state.path), *arguments],
            cwd=ROOT,
            env={**os.environ, "CDP_BOOT_ID": BOOT},
            text=True,
            capture_output=True,
            check=False,
        )

    def interval(self, number: int, file: str) -> str:
        return str(self.state.timeline("t1") / "intervals" / f"{number:06d}" / file)


def fill(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four timelines: a journal over two boots and two intervals, one on an image, a fork, one in its first copy."""
    numbers = iter(range(1, 10))
    monkeypatch.setattr("cdpserver.timeline.uuids.uuid4", lambda: uuid.UUID(int=next(numbers)))
    disk = world.add(64 << 20)
    disk.write(0, b"a" * BLOCK)
    disk.synced()
    world.now_ns += SECOND_NS // 4
    disk.write(2 * BLOCK, b"b" * (2 * BLOCK))
    world.now_ns += SECOND_NS
    disk.zero(1 << 20, 33 << 20)
    disk.zero(BLOCK, BLOCK, trim=True)
    disk.mark("now")
    disk.cut()
    world.now_ns += 60 * SECOND_NS
    disk.write(0, b"c" * BLOCK)
    INDEXER.call("drain", disk.directory, world.boot)
    world.reboot(clean=False)
    world.now_ns += SECOND_NS
    # A resync: what is the same as before costs no payload.
    disk.write(2 * BLOCK, b"b" * (2 * BLOCK))
    disk.disconnect()
    INDEXER.call("drain", disk.directory, world.boot)
    world.add(1 << 20, image=b"i" * BLOCK).write(0, b"i" * BLOCK)
    durable.write_json(
        world.state.bases / "b1.json",
        {"path": "/images/debian.qcow2", "size": 1 << 20, "mtime_ns": START_NS, "inode": 7},
    )
    world.fork(disk, disk.last_seq).write(0, b"f" * BLOCK)
    world.add(1 << 20).write(0, b"n" * BLOCK)
    Catalog.recover(world.state)
    with Catalog.open(world.state, writable=True) as catalog:
        catalog.set_state("d4", "removing")
        catalog.put_row("locks", Row("k1", 1, {"disk": "t1", "seqs": [3, 9], "until": None}))
        catalog.put_row("policies", Row("daily", 2, {"keep": {"days": 7}}))
    durable.write_json(world.state.clock, {"boot_id": BOOT, "offset_ns": -5, "floor_ns": START_NS})
    (disk.directory / "bp-0.qcow2").touch()


@pytest.fixture(scope="module")
def world() -> Iterator[Stored]:
    with scratch() as path, pytest.MonkeyPatch.context() as monkeypatch:
        made = World(path)
        fill(made, monkeypatch)
        made.close()
        yield Stored(made.state)


@pytest.fixture
def copied(world: Stored, tmp_path: Path) -> Stored:
    """The world once more, to be damaged."""
    shutil.copytree(world.state.path, tmp_path / "s", symlinks=True)
    return Stored(StateDir(tmp_path / "s"))


COMMANDS: dict[str, Callable[[Stored], list[str]]] = {
    "timeline": lambda _: ["timeline", "show", "d1"],
    "timeline-image": lambda _: ["timeline", "show", "d2"],
    "timeline-fork": lambda w: ["timeline", "show", str(w.state.timeline("t3"))],
    "timeline-first-copy": lambda _: ["timeline", "show", "d4"],
    "segment": lambda w: ["segment", "show", "--verify", w.interval(1, "00000001.log")],
    "index-closed": lambda w: ["index", "show", w.interval(1, "index.mdb")],
    "index-open": lambda w: ["index", "show", w.interval(2, "open-00000001.mdb")],
    "catalog": lambda _: ["catalog", "show"],
    "clock": lambda _: ["clock", "show"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_stored_is_shown_as_ever(world: Stored, name: str) -> None:
    done = world.cdp(*COMMANDS[name](world))
    assert (done.returncode, done.stderr) == (0, "")
    path = GOLDEN / f"{name}.txt"
    if UPDATE:
        path.write_text(done.stdout)
    assert done.stdout == path.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "segment"])
def test_json_says_the_same(world: Stored, name: str) -> None:
    done = world.cdp(*COMMANDS[name](world), "--json")
    assert done.returncode == 0
    lines = []
    for value in json.loads(done.stdout):
        fields = {key: field for key, field in value.items() if f"{key}_ns" not in value}
        lines.append(Item(fields.pop("what"), fields).as_line())
    assert "".join(f"{line}\n" for line in lines) == (GOLDEN / f"{name}.txt").read_text()


def test_showing_writes_nothing(copied: Stored) -> None:
    def files() -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in copied.state.path.rglob("*")
            if not path.name.endswith((".lock", "lock.mdb", "-lock"))  # LMDB's notes of who reads
        }

    before = files()
    for arguments in COMMANDS.values():
        assert copied.cdp(*arguments(copied)).returncode == 0
    assert files() == before


# --- damage and what cannot be meant


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["timeline", "show", "nobody"], 2, "there is no disk 'nobody'"),
        (["timeline", "show", "a/b/c"], 2, "not a disk name"),
        (["timeline", "show", "/nowhere"], 2, "/nowhere is not a directory"),
        (["timeline", "show", "/"], 4, "timeline.json is damaged: it is missing"),
        (["index", "show", "/nowhere"], 2, "there is no file /nowhere"),
        (["index", "show", "/"], 2, "/ is not a file"),
        (["index", "show", __file__], 4, "is no index, or a damaged one"),
        (["index", "show", os.devnull], 2, "is not a file"),
        (["catalog", "show", "--state-dir", "/nowhere"], 2, "there is no state directory"),
    ],
)
def test_what_cannot_be_shown(world: Stored, arguments: list[str], code: int, said: str) -> None:
    done = world.cdp(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and done.stderr.count("\n") == 1 and "(" in done.stderr


def test_what_is_no_index_is_left_alone(tmp_path: Path, world: Stored) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert world.cdp("index", "show", str(tmp_path / "notes.txt")).returncode == 4
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_damaged_segment_hides_no_other(copied: Stored) -> None:
    log = Path(copied.interval(1, "00000001.log"))
    log.write_bytes(b"?" + log.read_bytes()[1:])
    done = copied.cdp("timeline", "show", "d1")
    whole = (GOLDEN / "timeline.txt").read_text().splitlines()
    assert done.returncode == 4 and "cdp check DISK" in done.stderr
    assert "segment file=intervals/000001/00000001.log DAMAGED: " in done.stdout
    assert done.stdout.splitlines()[-5:] == whole[-5:]


def test_a_segment_in_the_wrong_place(copied: Stored) -> None:
    shutil.copy(copied.interval(1, "00000001.log"), copied.interval(2, "00000009.log"))
    done = copied.cdp("timeline", "show", "d1")
    assert done.returncode == 4 and "DAMAGED: it is segment 1 of interval 1" in done.stdout


def test_damaged_notes_of_a_timeline(copied: Stored) -> None:
    (copied.state.timeline("t4") / "first-copy.json").write_text("[]")
    (copied.state.bases / "b1.json").write_text("{")
    for disk, line in (("d4", "first-copy DAMAGED"), ("d2", "base kind=image file=bases/b1.raw DAMAGED")):
        done = copied.cdp("timeline", "show", disk)
        assert done.returncode == 4 and line in done.stdout


def test_an_index_that_is_cut_short_ends_no_command(copied: Stored) -> None:
    """LMDB gets SIGBUS from a page that the file does not have; the operator gets a sentence."""
    path = Path(copied.interval(1, "index.mdb"))
    os.truncate(path, 2 * os.sysconf("SC_PAGESIZE"))
    done = copied.cdp("index", "show", str(path))
    assert done.returncode == 4 and "it is cut short" in done.stderr and "cdp index rebuild" in done.stderr


def test_entries_that_mean_nothing(copied: Stored) -> None:
    path = Path(copied.interval(1, "index.mdb"))
    file = IndexFile(path, writable=True)
    with file.env.begin(write=True) as txn:
        txn.put(b"\x07" + bytes(13), bytes(8), db=file.pieces)  # level 7
        txn.put(bytes(14), (7 << 61).to_bytes(8, "little"), db=file.pieces)  # kind 7
        txn.put(bytes(13) + b"\1", (2 << 61 | 9).to_bytes(8, "little"), db=file.pieces)  # a zero in a place
        txn.put(b"short", b"", db=file.pieces)
        txn.put(bytes(8), b"\0" * 42, db=file.points)
        txn.put(b"\xff" * 8, b"\0" * 40 + b"\x09\0", db=file.points)
        txn.put(bytes(8), b"?", db=file.control)
        txn.put(bytes(7) + b"\3", SEQ.pack(1) + b"\xc1", db=file.control)
        txn.put(b"mark/\xff", SEQ.pack(1), db=file.control)
        txn.put(b"levels", b"", db=file.meta)
        txn.put(b"state", b"\xc1", db=file.meta)
        txn.put(b"what", b"?", db=file.meta)
    file.env.close()
    done = copied.cdp("index", "show", str(path))
    damaged = [line for line in done.stdout.splitlines() if "DAMAGED: " in line]
    assert done.returncode == 4 and "11 lines say where" in done.stderr, (done.stdout, done.stderr)
    assert [line.split()[0] for line in damaged] == [
        *("index", "state", "meta"),
        *("point", "control", "control", "named"),
        *("piece",) * 4,
    ]
    # What is whole is still shown.
    whole = (GOLDEN / "index-closed.txt").read_text().splitlines()
    assert set(whole[2:]) <= set(done.stdout.splitlines())


def test_a_catalog_whose_copy_differs(copied: Stored) -> None:
    copy = durable.read_json(copied.state.catalog_copy)
    disks = copy["disks"]
    disks["gone"] = disks.pop("d3")
    disks["d1"]["created_ns"] = 5
    copy["locks"] = {"k2": {"schema": 1, "fields": {}}}
    copy["policies"]["daily"]["schema"] = 3
    durable.write_json(copied.state.catalog_copy, copy | {"next_id": 77})
    (copied.state.timelines / "t9").mkdir()
    durable.remove_tree(copied.state.timeline("t2"))
    done = copied.cdp("catalog", "show")
    assert done.returncode == 4 and "restart cdpserver" in done.stderr
    said = dict(line.split(" DAMAGED: ") for line in done.stdout.splitlines() if " DAMAGED: " in line)
    assert list(said.values()) == [
        "its next id is not the catalog's",
        "the copy differs",
        "there is no such timeline",
        "the copy lacks it",
        "only the copy has it",
        "the copy lacks it",
        "only the copy has it",
        "the copy differs",
    ]
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("lock", "policy"))] == [
        ["lock", "id=k1"],
        ["lock", "id=k2"],
        ["policy", "id=daily"],
    ]
    assert "unnamed timeline=t9 whole=false" in done.stdout


@pytest.mark.parametrize("lost", ["catalog", "catalog.json"])
def test_a_catalog_of_which_one_half_is_lost(copied: Stored, lost: str) -> None:
    durable.remove_tree(copied.state.path / lost) if lost == "catalog" else copied.state.catalog_copy.unlink()
    done = copied.cdp("catalog", "show")
    assert done.returncode == 4 and done.stdout.count("DAMAGED") == 1
    assert done.stdout.count("\ndisk ") == 4


def test_a_copy_that_is_one_change_ahead_is_looked_at_again(
    copied: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service replaces the copy before a change commits: seen in between, it is no damage."""
    script = f"""\
from pathlib import Path
from cdpserver import durable
from cdpserver.catalog.content import Entry
from cdpserver.catalog.store import Store
store = Store(Path({str(copied.state.catalog)!r}), writable=True)
with store.changing() as txn:
    store.put(txn, Entry("d1", "t1", "removing", 5))
    content = store.content_in(txn)
    store.put_digest(txn, content)
    durable.write_json(Path({str(copied.state.catalog_copy)!r}), content.to_json())
    print("ahead", flush=True)
    input()
"""
    service = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None and service.stdout.readline() == "ahead\n"
    waits = []

    def commit(seconds: float) -> None:
        waits.append(seconds)
        service.communicate("go on\n")

    monkeypatch.setattr("recovery.state_text.time.sleep", commit)
    shown = list(catalog_items(copied.state))
    assert len(waits) == 1 and not [item for item in shown if item.damage]
    assert next(item.fields["state"] for item in shown if item.what == "disk") == "removing"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "clock DAMAGED: "),
        (b'{"boot_id": "b"}', "clock boot_id=b this_boot=false DAMAGED: it has not the fields of a clock"),
        (b'{"boot_id": "b", "offset_ns": 1.5, "floor_ns": 0}', "DAMAGED: offset_ns cannot be read"),
    ],
)
def test_a_damaged_clock(copied: Stored, content: bytes, said: str) -> None:
    copied.state.clock.write_bytes(content)
    done = copied.cdp("clock", "show")
    assert done.returncode == 4 and said in done.stdout and "clock.json away" in done.stderr


def test_no_clock(copied: Stored) -> None:
    copied.state.clock.unlink()
    done = copied.cdp("clock", "show")
    assert (done.returncode, done.stdout) == (2, "") and "start cdpserver once" in done.stderr


# --- much of it


def test_a_great_index_needs_no_more_memory(tmp_path: Path) -> None:
    path = tmp_path / "index.mdb"
    file = IndexFile(path, writable=True)
    rows = 12 * BATCH + 1
    with file.env.begin(write=True) as txn:
        pieces = ((block.to_bytes(6, "big") + SEQ.pack(7)[::-1], bytes(7) + b"\x40") for block in range(rows))
        txn.cursor(db=file.pieces).putmulti(pieces, append=True)
        txn.put(b"indexed", SEQ.pack(7), db=file.meta)
    file.env.close()
    tracemalloc.start()
    try:
        shown = sum(item.what == "piece" and not item.damage for item in items(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shown == rows
    assert peak < 4 << 20, f"{peak} bytes for {rows} rows"


def test_what_is_indexed_while_it_is_shown_is_left_out(copied: Stored) -> None:
    """A look at an open index is one of its start: the indexer goes on."""
    path = Path(copied.interval(2, "open-00000001.mdb"))
    going = items(path)
    head = next(going)
    seq = head.fields["indexed"]
    script = f"""\
import lmdb
env = lmdb.open({str(path)!r}, subdir=False, max_dbs=4, map_size=1 << 30)
with env.begin(write=True) as txn:
    txn.put(bytes(6) + ({seq} + 1).to_bytes(8, "big"), (2 << 61).to_bytes(8, "little"), db=env.open_db(b"pieces", txn))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert max(item.fields.get("seq", 0) for item in going) <= seq
    with lmdb.open(str(path), subdir=False, max_dbs=4, readonly=True) as env:
        pieces = env.open_db(b"pieces", create=False)
        with env.begin() as txn:
            assert txn.stat(pieces)["entries"] > head.fields["pieces"]
