"""Every file of a state directory is deleted in turn, or emptied: what is lost is said, nothing else is harmed.

For each file the server's own start is done (format, inventory, clock, catalog, the target's recovery), `cdp check` looks at
every disk, and every instant is read. An instant gives the bytes that it always gave, or an error; never other bytes.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cdpserver import durable, timeline
from cdpserver.catalog import Catalog, Row
from cdpserver.check import check_timeline
from cdpserver.clock import boot_id
from cdpserver.errors import CdpError, CorruptError
from cdpserver.events import EventLog, read_events
from cdpserver.service import inventory
from cdpserver.service.prepare import bring_up_to_date, prepare
from cdpserver.state import StateDir
from cdpserver.target.disk import TargetDisk
from cdpserver.target.leftover import needs_recovery
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests import whole
from tests.core import forget_indexes
from tests.whole import IDS, Instants, read_all
from tools.kit.processes import until
from tools.kit.server import Server

LOCK = Row("k1", 1, {"disk": "t1", "seq": 9})
POLICY = Row("daily", 1, {"keep": "7d"})


MEMORY = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
"""What these tests prove doesn't depend on a device."""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """As the fixture that all tests have, but in memory where there is some."""
    with tempfile.TemporaryDirectory(prefix="cdp-", dir=MEMORY) as path:
        yield Path(path)


@dataclass(frozen=True)
class Template:
    """A directory as the service left it, and every instant of it."""

    state: StateDir
    instants: dict[str, Instants]


@cache
def template() -> Template:
    """Made once; the files of it are the cases of this module's tests, so it is made when they are collected."""
    path = Path(tempfile.mkdtemp(prefix="cdp-", dir=MEMORY))
    state = whole.build(path / "s")
    with state.lock(), Catalog.open(state, writable=True) as catalog:
        catalog.put_row("locks", LOCK)
        catalog.put_row("policies", POLICY)
    return Template(state, read_all(state))


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    shutil.rmtree(template().state.path.parent)
    template.cache_clear()


@dataclass
class After:
    """What a start of the server made of a damaged directory."""

    state: StateDir
    events: list[dict[str, Any]]
    findings: dict[str, list[tuple[str, str, int, int]]]
    instants: dict[str, Instants]
    names: dict[str, str]
    rows: dict[str, Row]

    def said(self, file: str) -> bool:
        """Does an event or a finding name the file?"""
        texts = [str(value) for event in self.events for value in event.values()]
        texts += [f"{path} {what}" for found in self.findings.values() for path, what, _, _ in found]
        return any(file in text for text in texts)

    def harmed(self, id: str) -> set[str]:
        """Seqs of a timeline that no longer read."""
        return set(template().instants[id].digests) - set(self.instants[id].digests)


def copy_of(path: Path) -> StateDir:
    """A copy to be damaged."""
    copy_tree(template().state.path, path)
    return StateDir(path)


def copy_tree(source: Path, target: Path) -> None:
    """Files, links and holes; sockets stay behind."""
    shutil.copytree(source, target, symlinks=True, ignore=_sockets)


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_socket()]


def start(state: StateDir, checked: set[str]) -> After:
    """The service's start, the target's, a check of the disks that may be harmed, and a look at everything."""
    opened = StateDir.create_or_open(state.path)
    log = EventLog(state.events)
    had = inventory.had_events(opened)
    before = len(read_events(state.events, 10_000)) if state.events.exists() else 0
    with opened.lock():
        bring_up_to_date(opened, log, allowed=True, had_events=had)
        clock, catalog = prepare(opened, log)
        with catalog:
            names = {name: entry.id for name, entry in catalog.names().items()}
            rows = {**catalog.rows("locks"), **catalog.rows("policies")}
        for name, id in names.items():
            if needs_recovery(opened.timeline(id), boot_id()):
                open_disk(opened, id, clock.now_ns, log, name)
    findings = {
        id: [
            (str(d.finding.path.relative_to(state.path)), d.finding.what, d.finding.from_seq, d.to_seq)
            for d in check_timeline(state.path, id, boot_id=boot_id()).damage
        ]
        for id in sorted(checked)
    }
    events = read_events(state.events, 10_000)[before:]
    return After(opened, events, findings, read_all(opened, wanted()), names, rows)


def wanted() -> dict[str, list[int]]:
    """The instants that there were."""
    return {id: [int(seq) for seq in found.digests] for id, found in template().instants.items()}


def open_disk(state: StateDir, id: str, clock_ns: Any, log: EventLog, name: str) -> None:
    """As the target opens a disk, and closes it."""
    try:
        made = timeline.load(state.timeline(id))
        disk = TargetDisk(state.path, made, clock_ns=clock_ns, boot_id=boot_id(), emit=log.emit)
    except CdpError as error:
        log.emit("target.open-failed", level="error", disk=name, reason=str(error))
        return
    disk.shut(removing=False)


def files() -> list[str]:
    """Every file of a state directory, by its path inside; whatever the boot is called."""
    root = template().state.path
    found = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(str(path.relative_to(root)) for path in found)


def cases() -> list[str]:
    """Every file, but of locks, indexes and samples, which are alike, only those of one timeline."""
    alike = (".lock", "lease", ".mdb-lock", ".mdb", "/rpo")
    return [
        f
        for f in files()
        if not f.endswith(alike) or not f.startswith(("timelines/t2", "timelines/t3", "timelines/t4"))
    ]


NOTHING_LOST = (
    "server.lock",
    "catalog/lock.mdb",
    "writer.lock",
    "run/target-0.lock",
    "run/export.lock",
    "base.synced",
    ".mdb",
    ".mdb-lock",
    ".map",
    "sums/bp-0.qcow2",
    "sums/bp-1.qcow2",
    "boots.json",
    "chain.lock",
    "manual.json",
    "/rpo",
    "timelines/t1/bp-1.qcow2",
    "timelines/t2/bp-0.qcow2",
    "timelines/t3/bp-0.qcow2",
    "timelines/t4/base.raw",
    "timelines/t4/first-copy.json",
)
"""Made anew without a word worth saying: locks, indexes, maps, sums, a base point that nothing stands on, which base points were
asked for (their notes say it too), what could have been lost when.

What befalls a first copy is said when its disk is opened, see below."""


def dependants(file: str) -> set[str]:
    """Timelines whose instants may no longer read without this file."""
    parts = file.split("/")
    if parts[0] == "bases" and file.endswith(".raw"):
        return {"t2"}
    if parts[0] != "timelines" or file.endswith(
        (".mdb", ".mdb-lock", ".map", ".qcow2", ".lock", "lease", ".synced", "/rpo")
    ):
        return set()
    return {"t1", "t3"} if parts[1] == "t1" else {parts[1]}


def owners(file: str) -> set[str]:
    """The timelines that `cdp check` is asked about."""
    parts = file.split("/")
    return dependants(file) | ({parts[1]} if parts[0] == "timelines" else set())


def check_after(after: After, file: str, *, emptied: bool) -> None:
    """What must hold whatever the file was."""
    assert after.names == dict(sorted(IDS.items()))
    assert after.rows == {"k1": LOCK, "daily": POLICY}
    for id, before in template().instants.items():
        now = after.instants[id].digests
        wrong = [seq for seq in before.digests.keys() & now.keys() if before.digests[seq] != now[seq]]
        assert not wrong, f"{id}: instants {wrong} read as something else"
        if after.harmed(id):
            assert id in dependants(file), f"{id} is harmed: {after.instants[id].errors}"
            lowest = min(int(seq) for seq in after.harmed(id))
            told = [low for _, _, low, _ in after.findings[id]]
            if id == "t3" and after.findings.get("t1"):
                continue  # what harms a fork from below is a finding of its parent
            assert (told and min(told) <= lowest) or after.said("unclean"), (lowest, after.findings[id])
    if not file.endswith(NOTHING_LOST) and not (emptied and is_made_empty(file)):
        # A base point is missed by the one that stands on it, which knows it by its name beside it.
        parts = file.split("/")[-1 if file.endswith(".qcow2") else -2 :]
        name = "catalog" if parts[0] == "catalog" else "/".join(parts)
        assert after.said(name), (file, after.events, after.findings)


def is_made_empty(file: str) -> bool:
    return (template().state.path / file).stat().st_size == 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_a_deleted_file:
        metafunc.parametrize("file", cases())
    elif metafunc.function is test_an_emptied_file:
        # What an emptied segment or index does is the same in every disk and interval.
        alike = ("/t2/intervals/", "/t3/intervals/", "/t1/intervals/000002/index")
        metafunc.parametrize(
            "file", [f for f in cases() if not is_made_empty(f) and not any(a in f for a in alike)]
        )


def test_a_deleted_file(file: str, short_path: Path) -> None:
    state = copy_of(short_path / "s")
    (state.path / file).unlink()
    check_after(start(state, owners(file)), file, emptied=False)


def test_an_emptied_file(file: str, short_path: Path) -> None:
    state = copy_of(short_path / "s")
    (state.path / file).chmod(0o600)
    os.truncate(state.path / file, 0)
    check_after(start(state, owners(file)), file, emptied=True)


# --- more than one file, and what only shows when somebody goes on


def test_every_file_is_a_case_or_like_one() -> None:
    """A new kind of file needs its place here."""
    left = {file.rpartition("/")[2] for file in files()} - {file.rpartition("/")[2] for file in cases()}
    assert left <= {"first-copy.json"} and len(cases()) > 30
    assert {Path(file).suffix for file in files()} >= {
        ".log",
        ".data",
        ".mdb",
        ".qcow2",
        ".raw",
        ".json",
        ".lock",
    }


@pytest.mark.parametrize(
    "name", ["catalog/data.mdb", "catalog.json", "clock.json", "timelines/t1/timeline.json"]
)
def test_a_file_that_is_a_directory(name: str, short_path: Path) -> None:
    state = copy_of(short_path / "s")
    (state.path / name).unlink()
    (state.path / name).mkdir()
    check_after(start(state, owners(name)), name, emptied=False)


def test_a_format_that_is_a_directory_is_left_alone(short_path: Path) -> None:
    state = copy_of(short_path / "s")
    state.format.unlink()
    state.format.mkdir()
    with pytest.raises((CdpError, OSError)):
        start(state, set())
    state.format.rmdir()
    after = start(state, set())
    assert not any(after.harmed(id) for id in IDS.values())


def test_both_files_of_the_catalog(short_path: Path) -> None:
    """Names come from the timelines; locks and policies are said to be lost."""
    state = copy_of(short_path / "s")
    shutil.rmtree(state.catalog)
    state.catalog_copy.unlink()
    after = start(state, set())
    assert after.names == dict(sorted(IDS.items()))
    assert after.rows == {}
    assert after.said("Locks and policies are lost")
    assert not any(after.harmed(id) for id in IDS.values())


def test_the_plain_copy_alone(short_path: Path) -> None:
    state = copy_of(short_path / "s")
    right = state.catalog_copy.read_bytes()
    state.catalog_copy.unlink()
    after = start(state, set())
    assert after.said("catalog.json, was missing. Nothing is lost")
    assert state.catalog_copy.read_bytes() == right
    assert after.rows == {"k1": LOCK, "daily": POLICY}


def test_a_lost_end_of_the_history_is_not_written_over(short_path: Path) -> None:
    """The newest header log is gone: the payload is kept, seqs are not given again, and a fork from there says so."""
    state = copy_of(short_path / "s")
    last = max(wanted()["t1"])
    made = timeline.load(state.timeline("t1"))
    base = timeline.PointBase("t1", last, 1)
    timeline.create_timeline(state, id="t9", name="late", vm=None, size=made.size, base=base, now_ns=1)
    interval = state.timeline("t1") / "intervals" / "000003"
    payload = (interval / "00000001.data").read_bytes()
    with contextlib.closing(History(state.path, made)) as history:
        # A slow machine commits more often on the way, and each commit is a record.
        kept_seq = history.journal.reader(3, 1).first_seq - 1
    (interval / "00000001.log").unlink()
    after = start(state, {"t1"})
    [event] = [event for event in after.events if event["event"] == "target.unclean-boot"]
    assert event["empty_or_missing"] == ["intervals/000003/00000001.log"] and event["kept_seq"] == kept_seq
    assert (interval / "00000001.data.cut").read_bytes() == payload
    assert after.harmed("t1") == {str(seq) for seq in range(kept_seq + 1, last + 1)}
    with contextlib.closing(History(state.path, made)) as history:
        assert history.journal.last_seq() > 1 << 32
    with contextlib.closing(History(state.path, timeline.load(state.timeline("t9")))) as late:
        view = View(late, 0)
        with pytest.raises(CorruptError, match=f"has lost seq {last}"):
            view.read(0, 4096)
        view.close()
    forget_indexes(state.path)
    again = start(state, set())
    assert [event["event"] for event in again.events] == []


@pytest.mark.parametrize("file", ["base.raw", "first-copy.json"])
@pytest.mark.parametrize("emptied", [True, False], ids=["emptied", "deleted"])
def test_a_first_copy_that_lost_a_file_starts_again(file: str, emptied: bool, short_path: Path) -> None:
    """Its mirror wrote blocks that are not there any more: going on would give zeros for them one day."""
    state = copy_of(short_path / "s")
    path = state.timeline("t4") / file
    os.truncate(path, 0) if emptied else path.unlink()
    start(state, set())
    log = EventLog(state.events)
    open_disk(state, "t4", lambda: 1, log, "copying")
    events = [event["event"] for event in read_events(state.events, 100)]
    assert "target.first-copy-restarted" in events
    assert durable.read_json(state.timeline("t4") / "first-copy.json")["wrote"] is False
    assert not (state.timeline("t4") / "base.raw").read_bytes().strip(b"\0")


def test_a_lost_mark_of_a_durable_base_costs_no_history(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`base.synced` is gone, and the host boots: base point 0 says that the base was durable."""
    state = copy_of(short_path / "s")
    (state.timeline("t1") / "base.synced").unlink()
    monkeypatch.setenv("CDP_BOOT_ID", "another-boot")
    after = start(state, {"t1"})
    open_disk(state, "t1", lambda: 1 << 61, EventLog(state.events), "web/root")
    assert (state.timeline("t1") / "base.synced").exists()
    assert after.findings["t1"] == []
    assert read_all(state, wanted())["t1"] == template().instants["t1"]


@pytest.mark.real
def test_a_service_goes_on(short_path: Path) -> None:
    """Catalog, clock, format, locks and a base point gone at once: the real service has all of it back."""
    state = copy_of(short_path / "s")
    for name in ("catalog/data.mdb", "clock.json", "format", "events.jsonl", "server.lock"):
        (state.path / name).unlink()
    for name in ("lease", "writer.lock", "index.lock", "bp-1.qcow2", "base.synced"):
        (state.timeline("t1") / name).unlink()
    with Server(state.path) as server:
        assert sorted(disk["name"] for disk in server.client.disks()) == sorted(IDS)
        until((state.timeline("t1") / "bp-1.qcow2").exists, "base point 1")
        assert server.client.place("web/root@before")["uri"]
    said = {event.get("file") for event in read_events(state.events, 1000)}
    assert said >= {"clock.json", "events.jsonl", "timelines/t1/lease"}
    with Catalog.open(state, writable=False) as catalog:
        assert catalog.row("locks", "k1") == LOCK
    assert check_timeline(state.path, "t1", boot_id=boot_id()).whole
    assert read_all(state, wanted()) == template().instants
