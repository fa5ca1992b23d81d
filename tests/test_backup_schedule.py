"""Backups by the clock: which are due, what catches up, and the service that makes, keeps and copies them."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trio

from cdpserver.catalog import Catalog
from cdpserver.clock import fix_clock
from cdpserver.config import Config
from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.events import EventLog
from cdpserver.repository import registered
from cdpserver.repository.content import Content
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.places import open_place
from cdpserver.repository.registered import Registered
from cdpserver.repository.repository import Repository, create
from cdpserver.retention.backups import parse_plan
from cdpserver.retention.policy import Policy
from cdpserver.service import backups, processes
from cdpserver.service.backup_due import copies_due, due, load
from cdpserver.service.control import Targets
from cdpserver.service.core import Core
from cdpserver.service.jobs import Jobs
from cdpserver.service.policies import Policies
from cdpserver.state import StateDir
from cdpserver.vm.backup import sources
from cdpserver.vm.trial.schedule import Planned
from recovery import cli
from tests.test_backup_live import Disks
from tests.test_service import SIZE, Server, connected, until

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "now", "last"),
    [
        ("hourly", "2026-11-27 20:14", "2026-11-27 20:00"),
        ("hourly :30", "2026-11-27 20:14", "2026-11-27 19:30"),
        ("daily 02:00 keep 7d 4w 12m", "2026-11-27 20:14", "2026-11-27 02:00"),
        ("daily 22:00", "2026-11-01 20:14", "2026-10-31 22:00"),
        ("weekly sun 02:00", "2026-11-27 20:14", "2026-11-22 02:00"),
        ("weekly fri 20:14 keep 4w", "2026-11-27 20:14", "2026-11-27 20:14"),
        ("weekly fri 20:15", "2026-11-27 20:14", "2026-11-20 20:15"),
        ("monthly 31 02:00 keep none", "2026-03-01 01:00", "2026-02-28 02:00"),
        ("monthly 1 02:00", "2026-03-01 01:00", "2026-02-01 02:00"),
    ],
)
def test_the_newest_time_that_came(text: str, now: str, last: str) -> None:
    assert f"{parse_plan(text).last(datetime.fromisoformat(now)):%Y-%m-%d %H:%M}" == last


@pytest.mark.parametrize(
    "text", ["", "daily", "daily 24:00", "daily 2:00", "weekly 02:00", "weekly day 02:00", "monthly 0 02:00",
             "monthly 32 02:00", "hourly :60", "daily 02:00 keep", "daily 02:00 keep 7x", "daily 02:00 7d", "x" * 9999],
)  # fmt: skip
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(UsageError):
        parse_plan(text)


def planned(schedule: str) -> list[Planned]:
    return [Planned("web", Policy(backup=schedule, backup_to="/repo"))]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_what_passed_is_made_up_for_once_and_clocks_may_jump() -> None:
    daily = planned("daily 02:00")
    found, noted = due({}, daily, at("2026-11-27 20:00"))
    assert (found, noted["web"]["slot"]) == ([], "2026-11-27T02:00"), "it begins with the next time"
    assert due(noted, daily, at("2026-11-28 01:59")) == ([], noted)
    found, same = due(noted, daily, at("2026-12-24 09:00"))
    assert [one.slot for one in found] == ["2026-12-24T02:00"], "one for a month that was missed"
    assert same == noted, "until it is made"
    done = {"web": noted["web"] | {"slot": found[0].slot, "state": "done"}}
    assert due(done, daily, at("2026-12-25 01:59"))[0] == []
    found, back = due(done, daily, at("2026-12-20 09:00"))
    assert (found, back["web"]["slot"]) == ([], "2026-12-20T02:00"), (
        "a clock that went back goes on from there"
    )
    assert [one.slot for one in due(back, daily, at("2026-12-21 02:00"))[0]] == ["2026-12-21T02:00"]
    found, other = due(done, planned("hourly"), at("2026-12-24 20:30"))
    assert (found, other["web"]["slot"]) == ([], "2026-12-24T20:00"), "so does another schedule"
    assert due(done, [], at("2027-01-01 00:00")) == ([], {}), "nobody asks for it any more"


@pytest.mark.parametrize(
    ("schedule", "times", "slots"),
    [
        # Summer ends: 02:00 to 03:00 comes twice, and 02:30 counts once.
        ("daily 02:30", ["10-25 02:29", "10-25 02:30", "10-25 02:59", "10-25 02:00", "10-25 02:31", "10-26 02:30"],
         ["10-25T02:30", "10-26T02:30"]),
        ("hourly :30", ["10-25 01:30", "10-25 02:30", "10-25 02:00", "10-25 02:30", "10-25 03:30"],
         ["10-25T02:30", "10-25T03:30"]),
        # Summer begins: there is no 02:30, and its backup is made when it would have been over.
        ("daily 02:30", ["03-28 02:30", "03-29 01:59", "03-29 03:00", "03-29 03:30"], ["03-29T02:30"]),
        ("hourly", ["03-29 01:00", "03-29 01:59", "03-29 03:00"], ["03-29T03:00"]),
        # A clock set back by some hours repeats nothing that was made in that day.
        ("daily 02:00", ["11-27 01:00", "11-27 02:00", "11-26 23:00", "11-27 02:00", "11-28 02:00"],
         ["11-27T02:00", "11-28T02:00"]),
        ("hourly", ["11-27 01:30", "11-27 09:00", "11-27 03:10", "11-27 04:00"], ["11-27T09:00", "11-27T04:00"]),
        # A clock that was years ahead, for one look.
        ("daily 02:00", ["11-27 01:00", "31-01-01 02:00", "11-27 01:10", "11-27 02:00"],
         ["31-01-01T02:00", "11-27T02:00"]),
        ("monthly 31 02:00", ["01-31 01:00", "02-28 01:59", "02-28 02:00", "03-01 02:00", "03-31 02:00"],
         ["01-31T02:00", "02-28T02:00", "03-31T02:00"]),
    ],
)  # fmt: skip
def test_each_time_brings_one(schedule: str, times: list[str], slots: list[str]) -> None:
    """Looked at these times, one after the other, the first being when the schedule was new."""
    noted: dict[str, dict[str, Any]] = {}
    made = []
    for text in times:
        found, noted = due(noted, planned(schedule), at(_full(text, "2026-")))
        for one in found:
            made.append(one.slot)
            noted = {"web": noted["web"] | {"slot": one.slot}}
    assert made == [_full(text, "2026-") for text in slots]


def _full(text: str, year: str) -> str:
    return f"20{text}" if text.count("-") == 2 else f"{year}{text}"


@pytest.mark.parametrize("slot", [None, 5, "", "zzz", "2026-11-27T02:00+05:00", ["x"]])
def test_what_was_noted_may_be_junk(slot: object) -> None:
    """Then it begins with its next time."""
    noted: dict[str, dict[str, Any]] = {"web": {"schedule": "daily 02:00", "slot": slot, "state": "done"}}
    found, kept = due(noted, planned("daily 02:00"), at("2026-11-27 20:00"))
    assert (found, kept["web"]["slot"], kept["web"]["state"]) == ([], "2026-11-27T02:00", "done")


# --- the service


@pytest.fixture
def server(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(short_path / "xdg"))
    with Server(short_path / "s") as running:
        with connected(running.add()) as client:
            client.pwrite(os.urandom(MIB), 0)
        running.synced("d", write_blocking=True)
        yield running


def cdp(server: Server, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    options = cli.parse(["--state-dir", str(server.state_dir), *map(str, arguments), "--json"])
    options.run(options)
    return json.loads(capsys.readouterr().out)


def noted(server: Server) -> dict[str, dict[str, Any]]:
    """What the service has noted of schedules."""
    path = server.state_dir / "backups.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def missed(server: Server, subject: str = "d") -> None:
    """The service was down while times passed."""
    found = noted(server)
    found[subject]["slot"] = "2020-01-01T00:00"
    (server.state_dir / "backups.json").write_text(json.dumps(found))


@pytest.mark.real
def test_the_service_makes_keeps_and_copies_them(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several times missed are one backup; what fails is an event, a metric, and tried again; a copy that fails is said."""
    repos = [short_path / name for name in ("repo", "second")]
    for repo in repos:
        cdp(server, capsys, "repo", "init", repo, "--chunk-size", "64K")
        cdp(server, capsys, "repo", "add", repo)
    with pytest.raises(UsageError, match="says not where to"):
        cdp(server, capsys, "policy", "set", "d", "--backup", "hourly keep none")
    cdp(
        server, capsys, "policy", "set", "d", "--backup", "hourly keep none",
        "--backup-to", repos[0], "--backup-copy", repos[1],
    )  # fmt: skip
    by_hand = cdp(server, capsys, "backup", "run", "d@latest", "--repo", repos[0])["id"]
    until((server.state_dir / "backups.json").exists, "look at the schedule")
    server.stop()
    missed(server)
    with Server(server.state_dir) as again:
        made = until(lambda: again.events("backup.done"), "backup")
        assert len(made) == 1
        assert (made[0]["what"], made[0]["kind"], made[0]["read_bytes"]) == ("d", "incremental", 0)
        first = made[0]["backup"]
        assert [b["id"] for b in cdp(again, capsys, "backup", "list", "--repo", repos[0])] == [by_hand, first]
        until(lambda: again.events("backup.copied"), "copy")
        assert [b["id"] for b in cdp(again, capsys, "backup", "list", "--repo", repos[1])] == [first]
        assert 'cdp_backup_ok{vm="d"} 1.0' in again_metrics(again)
        point = cdp(again, capsys, "uri", f"backup:{first}")
        with connected(point["uri"]) as client:
            assert client.get_size() == SIZE, "in both repositories, and the same"
        cdp(again, capsys, "backup", "detach", first)  # what is attached is kept
        again.stop()
    missed(server)
    repos[1].rename(short_path / "away")
    with Server(server.state_dir) as again:
        made = until(lambda: again.events("backup.done")[1:], "second backup")
        assert made[0]["removed"] == 1, (
            "the first one: none but the newest is kept, and what was made by hand"
        )
        assert until(lambda: again.events("backup.copy-failed"), "failed copy")[0]["what"] == "d"
        listed = [b["id"] for b in cdp(again, capsys, "backup", "list", "--repo", repos[0])]
        assert listed == [by_hand, made[0]["backup"]]
        until(lambda: "the backup of d has failed" in str(again.get("/v1/overview")["warnings"]), "warning")
        again.stop()
    missed(server)
    repos[0].rename(short_path / "gone")
    with Server(server.state_dir) as again:
        failed = until(lambda: again.events("backup.failed"), "failure")
        assert "there is no repository" in failed[0]["reason"]
        assert 'cdp_backup_ok{vm="d"} 0.0' in again_metrics(again)
        assert "2020-01-01" in (server.state_dir / "backups.json").read_text(), "it stays due"


@pytest.mark.real
def test_running_vms_that_have_no_points_here(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named, scheduled, made up for, made by hand and forgotten; one that hangs keeps no other repository from its backups."""
    qemu = Disks(short_path)
    try:
        live, points = short_path / "live", short_path / "points"
        for repo in (live, points):
            cdp(server, capsys, "repo", "init", repo, "--chunk-size", "64K")
            cdp(server, capsys, "repo", "add", repo)
        source = ("backup", "source", "add", "mail", "--qmp", qemu.monitor, "--disk", "vda")
        with pytest.raises(NotFoundError):
            cdp(server, capsys, "policy", "set", "mail", "--backup", "hourly", "--backup-to", live)
        assert cdp(server, capsys, *source)["disks"] == ["vda"]
        assert [one["vm"] for one in cdp(server, capsys, "backup", "source", "list")] == ["mail"]
        with pytest.raises(RefusedError, match="has points here"):
            cdp(server, capsys, "backup", "source", "add", "d", "--qmp", qemu.monitor)
        with pytest.raises(UsageError, match="only its backups have a policy"):
            cdp(server, capsys, "policy", "set", "mail", "--size-cap", "1G")
        with pytest.raises(RefusedError, match="no policy asks for backups of mail"):
            cdp(server, capsys, "backup", "now", "mail")
        for name, repo in (("mail", live), ("d", points)):
            cdp(server, capsys, "policy", "set", name, "--backup", "hourly keep none", "--backup-to", repo)
        qemu.write(os.urandom(MIB), 0)
        first = cdp(server, capsys, "backup", "now", "mail")
        assert (first["kind"], first["removed"]) == ("full", 0)
        until(lambda: {"mail", "d"} <= noted(server).keys(), "look at the schedule")
        server.stop()
        missed(server)
        missed(server, "mail")
        qemu.write(os.urandom(MIB), MIB)
        qemu.stand_still(True)
        with Server(server.state_dir) as again:
            until(qemu.job, "its job")
            made = until(
                lambda: [e for e in again.events("backup.done") if e["what"] == "d"], "the other's backup"
            )
            assert made[0]["kind"] == "full"
            with pytest.raises(RefusedError, match="is busy with mail"):
                cdp(again, capsys, "backup", "now", "mail")
            qemu.stand_still(False)
            made = until(
                lambda: [e for e in again.events("backup.done") if e["what"] == "mail"][1:], "its backup"
            )
            assert (made[0]["kind"], made[0]["read_bytes"], made[0]["removed"]) == ("incremental", MIB, 1)
            assert 'cdp_backup_ok{vm="mail"} 1.0' in again_metrics(again)
            with Repository(open_place(str(live))) as repository:
                found = repository.backup(made[0]["backup"]).disk("mail/vda")
                assert found is not None
                assert Content(repository, found).read(0, found.size) == qemu.content()
            cdp(again, capsys, "backup", "source", "remove", "mail")
            with pytest.raises(NotFoundError):
                cdp(again, capsys, "policy", "show", "mail")
        assert qemu.ours() == []
    finally:
        qemu.end()


async def _waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two VMs whose backups go to one repository; the monitor of the first one says nothing."""
    monkeypatch.setattr(backups, "WAITS_S", 0.0)
    monkeypatch.setattr(backups, "LOOK_S", 0.05)
    state = StateDir.create_or_open(path / "state")
    config = create(DirectoryPlace(path / "repo"), chunk_size=64 << 10)
    registered.save(state.path, {config.id.hex(): Registered(config.id.hex(), str(path / "repo"), "")})
    sources.save(state.path, {vm: sources.checked(vm, {"qmp": str(path / "qmp")}) for vm in ("a", "b")})
    note = {"schedule": "hourly", "slot": "2020-01-01T00:00"}
    (state.path / "backups.json").write_text(json.dumps({"a": note, "b": note}))
    with Catalog.open(state, writable=True) as catalog, socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path / "qmp"))
        silent.listen()
        clock, _ = fix_clock(state.clock, time.time_ns)
        core = Core(state, Config(), clock, catalog, EventLog(state.events), Targets(state, 1))
        for vm in ("a", "b"):
            await Policies(core, lambda: None).set(vm, {"backup": "hourly", "backup_to": str(path / "repo")})
        jobs = Jobs(state.run / "jobs.json", clock, core.log)

        def waits() -> bool:
            return "backup.waits" in state.events.read_text()

        async with trio.open_nursery() as nursery:
            await nursery.start(jobs.keep_running)
            nursery.start_soon(backups.Backups(core, jobs).keep_backing_up)
            await trio.to_thread.run_sync(until, waits, "word that it waits")
            await trio.to_thread.run_sync(until, lambda: load(state)["b"].get("waits"), "note of that")
            nursery.cancel_scope.cancel()
        event = next(e for e in map(json.loads, state.events.open()) if e["event"] == "backup.waits")
        assert (event["what"], event["behind"], event["repository"]) == ("b", "a", str(path / "repo"))
        assert load(state)["b"]["waits"].startswith("for a, which")
        assert "waits" not in load(state)["a"]


def test_what_waits_for_its_repository_is_said(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio.run(_waiting, short_path, monkeypatch)


def test_a_copy_is_due_until_it_is_made() -> None:
    copied = [Planned("web", Policy(backup="daily 02:00", backup_to="/repo", backup_copy="/second"))]
    noted: dict[str, dict[str, Any]] = {"web": {"copy": "due", "slot": "2026-11-27T02:00"}}
    assert [(one.what, one.to) for one in copies_due(noted, copied)] == [("copies of web", "/second")]
    assert copies_due({"web": {"copy": "done"}}, copied) == copies_due({}, copied) == []
    assert copies_due(noted, planned("daily 02:00")) == [], "nobody asks for it any more"


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({}, "one way to its QEMU"),
        ({"qmp": "/q", "libvirt": "qemu:///system"}, "one way to its QEMU"),
        ({"qmp": "q"}, "not an absolute path"),
        ({"qmp": "/q", "domain": "x"}, "--domain goes with"),
        ({"qmp": "/q", "freeze": True}, "which guest agent"),
        ({"qmp": "/q", "or_crash": True}, "go with --freeze"),
        ({"qmp": "/q", "freeze": True, "agent": "a"}, "not an absolute path"),
        ({"libvirt": "qemu+ssh://root@hv1/system"}, "another host"),
    ],
)
def test_what_is_no_source(said: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        sources.checked("web", said)


def test_sources_are_kept_and_junk_is_corrupt(tmp_path: Path) -> None:
    one = sources.checked("web", {"libvirt": "qemu:///system", "freeze": True, "disks": ["vda"]})
    assert one.agent_address == "qemu:///system#web"
    sources.save(tmp_path, {"web": one})
    assert sources.load(tmp_path) == {"web": one}
    for junk in ("[]", "{", '{"web": 1}', '{"web": {}}', '{"web": {"qmp": 5}}', '{"../x": {"qmp": "/q"}}'):
        (tmp_path / "sources.json").write_text(junk)
        with pytest.raises(CorruptError):
            sources.load(tmp_path)


ENDS_ITSELF = """
import pathlib, signal, sys
def end(*_):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("here", flush=True)
while True:
    signal.pause()
"""


def test_a_process_that_is_cancelled_may_end_by_itself(tmp_path: Path) -> None:
    """A backup takes its jobs out of QEMU then."""

    async def cancelled() -> None:
        with trio.CancelScope() as scope:
            command = [sys.executable, "-c", ENDS_ITSELF, str(tmp_path / "ended")]
            await processes.run(tmp_path / "pid", command, lambda _: scope.cancel(), let_end_s=120)

    trio.run(cancelled)
    assert (tmp_path / "ended").exists()


def again_metrics(server: Server) -> str:
    from cdpserver.state import StateDir
    from recovery.client import Client

    return Client(StateDir(server.state_dir)).metrics()
