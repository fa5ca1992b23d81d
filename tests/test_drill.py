"""Drills, isolated and launched VMs, lent forks and bisects with real QEMU; the guest is a boot sector (tools.kit.bootsector)."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cdpserver.catalog import Entry, Row
from cdpserver.clock import fix_clock
from cdpserver.config import Config
from cdpserver.errors import CorruptError
from cdpserver.names import format_time
from cdpserver.retention import policies
from cdpserver.retention.policy import Policy
from cdpserver.service.trials import BY_OPERATOR
from cdpserver.state import StateDir
from cdpserver.target.disk import TargetDisk
from cdpserver.timeline import EmptyBase, create_timeline
from cdpserver.vm.trial import record
from cdpserver.vm.trial.record import State, Trial, TrialDisk
from cdpserver.vm.trial.schedule import Planned, is_due, planned, slot_of
from tests.test_service import ApiError, Server, connected, is_running, read, until
from tools.kit.bootsector import boot_sector
from tools.kit.processes import listens, start, stop

real = pytest.mark.real

MIB = 1 << 20
SIZE = 8 * MIB
COMMAND = "qemu-system-x86_64 -m 32 -nodefaults -no-reboot -device virtio-blk-pci,drive={disk:vda}"


CHECK = """
import json, nbd, os, socket
disk = nbd.NBD()
disk.connect_uri(os.environ["CDP_URI_2"])
assert disk.pread(4096, 0)[510:512] == bytes([0x55, 0xAA])
monitor = socket.socket(socket.AF_UNIX)
monitor.connect(os.environ["CDP_QMP"])
assert "QMP" in json.loads(monitor.makefile().readline())
"""


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


@contextlib.contextmanager
def protected(server: Server, sector: bytes, *names: str) -> Iterator[list[Any]]:
    """Disks of a VM that boot, with the bookmark `good`; their clients, which stay."""
    with contextlib.ExitStack() as stack:
        clients = []
        for name in names or ("vda",):
            uri = server.post("/v1/disks", name=name, vm="web", size=SIZE)["uri"]
            clients.append(stack.enter_context(connected(uri)))
            clients[-1].pwrite(sector.ljust(4096, b"\0"), 0)
            server.synced(f"web/{name}", write_blocking=True)
            clients[-1].pwrite(b"\x11" * 4096, MIB)
            server.post(f"/v1/disks/web/{name}:mark", name="good")
        yield clients


def drill(server: Server, point: str = "web/vda@good", **more: Any) -> dict[str, Any]:
    shown: dict[str, Any] = server.post("/v1/drills", point=point, within=more.pop("within", "60s"), **more)
    return shown


def nothing_stays(server: Server) -> None:
    """No fork, no directory, no process file."""
    assert server.get("/v1/forks") == []
    run = server.state_dir / "run"
    assert [path.name for path in run.iterdir() if path.name.startswith(("drill-", "isolated-"))] == []


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# --- what is pure


def test_a_trial_is_what_was_written_and_fits() -> None:
    name = "n" * 60
    disks = tuple(TrialDisk(f"web/{name}{n}", f"t{n}", 7, f"drill-0/{name}{n}") for n in range(16))
    spans: dict[record.Span, int] = {"export": 3, "ready": 9}
    one = Trial(
        "drill-0", "drill", "web@latest", "/etc/x", 5, disks, 6, slot="2026-11-27 03:00:00", spans=spans
    )
    one = one.after("failed", now_ns=8, reason="x" * 9999)
    assert record.read(one.row()) == one and one.rto_ms == 9
    wrongs: list[dict[str, Any]] = [{"state": "lost"}, {"spans": {"odd": 1}}, {"disks": [{}]}, {"owner": [1]}]
    for wrong in wrongs:
        row = one.row()
        with pytest.raises(CorruptError):
            record.read(type(row)(row.id, row.schema, {**row.fields, **wrong}))


def test_the_newest_trials_of_a_vm_are_kept() -> None:
    trials = [
        Trial(f"drill-{n}", "drill", f"{vm}@latest", "", 1, (), n, "passed") for n in range(40) for vm in "ab"
    ]
    assert record.too_many(trials, "a") == [f"drill-{n}" for n in range(10)]


# --- drills


@real
def test_a_drill_measures_and_leaves_nothing_but_its_result(server: Server) -> None:
    with protected(server, boot_sector()) as (client,):
        found = drill(server, marker="^RW$")
        assert (found["state"], found["reason"]) == ("passed", "")
        spans = [found[f"{span}_ms"] for span in ("export", "process", "read", "rto")]
        assert spans == sorted(spans) and spans[0] > 0
        nothing_stays(server)
        shown = {point["name"]: point["drill"] for point in server.get("/v1/disks/web/vda:points")}
        assert shown["good"] == {key: found[key] for key in ("id", "state", "rto_ms", "created")}
        assert shown["bp:0"] is None
        assert [one["id"] for one in server.get("/v1/drills?name=web/vda")] == [found["id"]]
        assert server.get("/v1/drills?name=other") == []
        assert [event["trial"] for event in server.events("drill.passed")] == [found["id"]]
        assert client.pread(4096, 0)[512:1024] == bytes(512), "the guest wrote to a fork of its own"


@real
def test_a_drill_is_in_a_machine_like_the_vm(server: Server, short_path: Path) -> None:
    """The VM has run its machine's memory, processors, type and bus; it does not run any more when it is drilled."""
    disk, monitor, log = short_path / "sda.raw", short_path / "vm.qmp", short_path / "vm.log"
    disk.write_bytes(boot_sector().ljust(SIZE, b"\0"))
    command = [
        "qemu-system-x86_64",
        "-machine",
        "pc",
        "-accel",
        "tcg",
        "-m",
        "72",
        "-smp",
        "2",
        "-nodefaults",
    ]
    command += ["-display", "none", "-drive", f"if=none,id=own,format=raw,file={disk}"]
    command += ["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=own,id=sda"]
    process = start([*command, "-qmp", f"unix:{monitor},server=on,wait=off"], log)
    try:
        listens(process, monitor, log)
        server.request("PUT", "/v1/vms/like", {"qmp": str(monitor), "disks": []})
        until(lambda: server.get("/v1/vms/like")["disks"][0]["state"] == "synced", "mirror in sync")
        (name,) = [one["name"] for one in server.get("/v1/vms/like")["disks"]]
        server.post(f"/v1/disks/{name}:mark", name="good")
    finally:
        stop(process)
    said = short_path / "said"
    look = f"tr '\\0' ' ' </proc/$(cut -d' ' -f1 \"$(dirname \"$CDP_QMP\")/qemu.pid\")/cmdline >{said}"
    found = drill(server, f"{name}@good", marker="RW", check=script(short_path / "look", look))
    assert found["state"] == "passed", found
    words = said.read_text()
    assert re.search("-machine pc-i440fx-[0-9.]+ .*-smp 2 -m 72 ", words) and "scsi-hd,bus=" in words
    nothing_stays(server)


@real
def test_a_drill_that_fails_is_a_result(server: Server, short_path: Path) -> None:
    hangs = script(short_path / "hangs", f"sleep 600 & echo $! >{short_path}/pid; wait")
    fails = script(short_path / "fails", 'echo "$CDP_DISKS $CDP_POINT: no answer" >&2; exit 3')
    command, wrong = short_path / "vm", short_path / "wrong"
    command.write_text(COMMAND)
    wrong.write_text(f"{COMMAND} -machine nothing")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"marker": "login:", "within": "2s"}, "no marker 'login:' in 2s; the serial line ends: RW"),
        ({"agent": True, "within": "2s"}, "no guest agent in 2s"),
        ({"marker": "RW", "check": fails}, "exit status 3: vda web/vda@good: no answer"),
        ({"marker": "RW", "check": hangs, "within": "3s"}, f"no check {hangs} in 3s"),
        ({"vm_command": str(wrong)}, "QEMU did not start: qemu-system-x86_64: unsupported machine type"),
    ]
    with protected(server, boot_sector()):
        for asked, reason in cases:
            found = drill(server, **asked)
            assert found["state"] == "failed"
            assert reason in found["reason"]
        assert not is_running(int((short_path / "pid").read_text())), (
            "what a check leaves running goes with it"
        )
        nothing_stays(server)
    with pytest.raises(ApiError, match="not a marker"):
        drill(server, marker="(")
    with pytest.raises(ApiError, match="cannot be run"):
        drill(server, check=str(command))


@real
def test_a_guest_that_ends_too_early_has_failed_and_one_that_says_its_marker_first_has_not(
    server: Server, short_path: Path
) -> None:
    command = short_path / "vm"
    command.write_text(COMMAND)
    with protected(server, boot_sector(resets=True)):
        assert drill(server, vm_command=str(command), marker="RW")["state"] == "passed"
        found = drill(server, vm_command=str(command), marker="login:")
        assert "QEMU ended" in found["reason"] and "the serial line ends: RW" in found["reason"]


@real
def test_a_check_meets_the_running_guest(server: Server, short_path: Path) -> None:
    """The script sees what the guest wrote, and has the VM's monitor for itself."""
    program = short_path / "check.py"
    program.write_text(CHECK)
    check = script(short_path / "check", f'exec "{sys.executable}" {program}')
    with protected(server, boot_sector(), "vda", "vdb"):
        at = server.get("/v1/disks/web/vdb:points?kind=bookmark")[0]["time"]
        found = drill(server, f"web@{at}", marker="RW", check=check)
        assert found["state"] == "passed", found["reason"]
        assert [disk["fork"].rpartition("/")[2] for disk in found["disks"]] == ["vda", "vdb"]


@real
def test_the_drill_of_a_night_that_a_kill_of_the_service_cut_short_is_done_again_and_the_rest_of_it_goes(
    server: Server, short_path: Path
) -> None:
    begun, go = short_path / "begun", short_path / "go"
    check = script(short_path / "check", f"touch {begun}; until [ -e {go} ]; do sleep 0.1; done")
    with protected(server, boot_sector()):
        soon = datetime.now(UTC).astimezone() + timedelta(seconds=1)
        server.request("PATCH", "/v1/policies/web", {"drill": f"{soon:%H:%M:%S}", "drill_check": check})
        until(begun.exists, "the drill's check")
        pid_file = next((server.state_dir / "run").glob("drill-*/qemu.pid"))
        qemu = int(pid_file.read_text().split()[0])
        server.kill()
        assert is_running(qemu)
    go.touch()
    with Server(server.state_dir) as again:
        assert not is_running(qemu)
        until(lambda: len([one for one in again.get("/v1/drills") if one["ended"]]) == 2, "both drills")
        first, second = again.get("/v1/drills")
        assert (first["state"], first["reason"]) == ("failed", "cdpserver was ended during it")
        assert (second["state"], second["scheduled"]) == ("passed", True)
        nothing_stays(again)


# --- by the clock


def test_what_comes_due_and_of_whom() -> None:
    def came_due(at: str, now: datetime) -> bool:
        one = Planned("web", Policy(drill=at))
        return is_due(one, [], after=now - timedelta(seconds=5), now=now)

    now = datetime.fromisoformat("2026-11-27T03:00:02")
    assert came_due("03:00", now) and came_due("02:59:58", now)
    assert not came_due("03:00:03", now) and not came_due("02:59", now)
    assert came_due("23:59:59", datetime.fromisoformat("2026-11-28T00:00:01"))
    names = ("web/a", "web/b", "lone", "again/a", "trial/a")
    entries = [Entry(name, f"t{number}", "live", 1) for number, name in enumerate(names)]
    rows: dict[str, Row] = {}
    for about, texts in (("web", {"drill": "03:00"}), ("again", {"drill": "04:00"})):
        row = policies.row(policies.vm_row(about), {"vm": about}, texts)
        rows[row.id] = row
    forks = {"again/a", "trial/a"}
    found = {one.subject: one.policy.drill for one in planned(rows, Config(), entries, forks)}
    assert found == {"web": "03:00", "again": "04:00"}
    everywhere = planned(rows, Config(policy_drill="05:00"), entries, forks)
    assert {one.subject for one in everywhere} == {"web", "again", "lone"}


def test_a_night_is_drilled_once_and_again_when_the_service_cut_it_short() -> None:
    one = Planned("web", Policy(drill="03:00"))
    started = datetime.fromisoformat("2026-11-27T03:04:00")
    back = started - timedelta(minutes=10)

    def due(*trials: Trial, now: datetime = started, after: datetime = back) -> bool:
        return is_due(one, trials, after=after, now=now)

    def trial(
        state: State, reason: str = "", what: str = "web@latest", slot: str = slot_of(one, started)
    ) -> Trial:
        return Trial(
            "drill-0", "drill", what, "", 1, (), 1, state, 2, scheduled=True, slot=slot, reason=reason
        )

    killed, passed = trial("failed", record.KILLED), trial("passed")
    assert due()
    for over in (passed, trial("running"), trial("failed", "no marker"), trial("failed", BY_OPERATOR)):
        assert not due(over)
        assert not due(killed, over)
    for other in (
        trial("passed", what="db@latest"),
        trial("passed", slot="2026-11-26 03:00"),
        trial("passed", slot=""),
    ):
        assert due(other)
    later = started + timedelta(hours=5)
    assert due(killed, now=later, after=later) and due(trial("failed", record.CANCELLED))
    assert not due(now=later, after=later), "a service that was down all the while"
    assert not due(killed, killed), "it may be the drill that ends the service"
    # The clock goes back from 3:00 to 2:00, or on from 2:00 to 3:00.
    early = Planned("web", Policy(drill="02:30"))
    night = datetime.fromisoformat("2026-10-25T02:30:03")
    assert not is_due(
        early, [trial("passed", slot=slot_of(early, night))], after=night - timedelta(seconds=5), now=night
    )
    spring = datetime.fromisoformat("2027-03-28T03:00:01")
    assert is_due(early, [], after=datetime.fromisoformat("2027-03-28T01:59:58"), now=spring)


@real
def test_the_newest_point_is_drilled_at_its_time(server: Server, short_path: Path) -> None:
    with protected(server, boot_sector()):
        soon = datetime.now(UTC).astimezone() + timedelta(seconds=2)
        asked = {"drill": f"{soon:%H:%M:%S}", "drill_marker": "^RW$"}
        server.request("PATCH", "/v1/policies/web", asked)
        assert server.get("/v1/policies/web")["drill_marker"] == "^RW$"
        (found,) = until(lambda: [one for one in server.get("/v1/drills") if one["ended"]], "the drill")
        assert (found["state"], found["scheduled"]) == ("passed", True)
        assert found["what"].startswith("web@2")
        shown_drills = [point["drill"] for point in server.get("/v1/disks/web:points") if point["drill"]]
        assert shown_drills == [{key: found[key] for key in ("id", "state", "rto_ms", "created")}]
        table = cdp(server, "point", "list", "--vm", "web").stdout
        assert f"passed {found['rto_ms'] / 1000:.1f}s" in table
        (shown,) = server.get("/v1/overview")["drills"]
        assert (shown["what"], shown["rto_ms"]) == ("web", found["rto_ms"])
        metrics = cdp(server, "metrics").stdout
        assert 'cdp_drill_passed{vm="web"} 1.0' in metrics
        assert f'cdp_drill_rto_seconds{{vm="web"}} {found["rto_ms"] / 1000}' in metrics


# --- isolated VMs, launched VMs


@real
def test_an_isolated_vm_is_discarded(server: Server) -> None:
    with protected(server, boot_sector()):
        shown = server.post("/v1/recoveries", point="web/vda@good", isolated=True)
        assert (shown["state"], shown["phase"]) == ("running", "isolated") and shown["rto_ms"] > 0
        until(lambda: read(shown["uri"], 4096)[512:1024] != bytes(512), "the guest's write")
        ended = server.post(f"/v1/recoveries/{shown['id']}:abort")
        assert (ended["state"], ended["phase"]) == ("aborted", "discarded")
        nothing_stays(server)
        assert read(server.uri("web/vda@good"), 4096)[512:1024] == bytes(512)
        assert [one["id"] for one in server.get("/v1/recoveries")] == [shown["id"]]
        useless: dict[str, Any] = {
            "to": "/srv",
            "qmp": "/run/x",
            "name": "again",
            "mode": "stream",
            "overwrite": True,
        }
        with pytest.raises(ApiError, match="no --to, --qmp, --name, --mode stream, --overwrite"):
            server.post("/v1/recoveries", point="web/vda@good", isolated=True, **useless)


@real
def test_an_isolated_vm_goes_when_its_guest_ends_or_the_service_does(
    server: Server, short_path: Path
) -> None:
    command = short_path / "vm"
    command.write_text(COMMAND)
    with protected(server, boot_sector(resets=True)):
        shown = server.post("/v1/recoveries", point="web/vda@good", isolated=True, vm_command=str(command))
        until(lambda: server.get(f"/v1/recoveries/{shown['id']}")["state"] == "done", "its end")
        nothing_stays(server)
        command.write_text(COMMAND.replace("-no-reboot", ""))
        shown = server.post("/v1/recoveries", point="web/vda@good", isolated=True, vm_command=str(command))
        server.kill()
    with Server(server.state_dir) as again:
        assert again.get(f"/v1/recoveries/{shown['id']}")["state"] == "failed"
        nothing_stays(again)


@real
def test_the_service_starts_the_vm_and_finds_it_again(server: Server, short_path: Path) -> None:
    """It runs on through a kill of the service, moves home, and is the operator's from then on."""
    command, home = short_path / "vm", short_path / "home"
    command.write_text(COMMAND)
    home.mkdir()
    with protected(server, boot_sector()):
        asked = {"point": "web/vda@good", "to": str(home), "vm_command": str(command), "name": "again"}
        shown = server.post("/v1/recoveries", **asked)
        assert shown["launched"]["running"]
        server.kill()
    with Server(server.state_dir) as again:
        until(lambda: again.get("/v1/recoveries/again")["state"] == "done", "the pivot")
        found = again.get("/v1/recoveries/again")
        assert found["launched"]["running"] and found["phase"] == "home"
        again.post("/v1/recoveries/again:commit")
        pid = int((Path(found["launched"]["qmp"]).parent / "qemu.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        until(lambda: not again.get("/v1/recoveries/again")["launched"]["running"], "the end of the VM")
    content = subprocess.run(
        ["qemu-img", "dd", "-O", "raw", "bs=512", "count=2", f"if={home}/vda.qcow2", f"of={short_path}/two"],
        check=False, capture_output=True,
    )  # fmt: skip
    assert content.returncode == 0, content.stderr
    assert (short_path / "two").read_bytes() == boot_sector() * 2


@real
def test_a_retry_starts_the_vm_as_it_was_started(server: Server, short_path: Path) -> None:
    command, home = short_path / "vm", short_path / "home"
    command.write_text(f"{COMMAND} -accel kvm")
    home.mkdir()

    def accels() -> list[bytes]:
        said = (server.state_dir / "run" / shown["id"] / "qemu.pid").read_text()
        words = Path(f"/proc/{said.split()[0]}/cmdline").read_bytes().split(b"\0")
        return [value for word, value in itertools.pairwise(words) if word == b"-accel"]

    with protected(server, boot_sector()):
        asked = {"point": "web/vda@good", "to": str(home), "vm_command": str(command), "accel": "tcg"}
        shown = server.post("/v1/recoveries", **asked)
        steps = f"/v1/recoveries/{shown['id']}"
        assert accels()[0] == b"tcg"
        until(lambda: server.get(steps)["state"] == "done", "the pivot")
        server.post(f"{steps}:undo")
        until(lambda: server.get(steps)["phase"] == "undone", "the way back")
        os.kill(
            int((server.state_dir / "run" / shown["id"] / "qemu.pid").read_text().split()[0]), signal.SIGKILL
        )
        until(lambda: not server.get(steps)["launched"]["running"], "the end of the VM")
        server.post(f"{steps}:retry")
        assert accels()[0] == b"tcg"
        server.post(f"{steps}:abort")
        os.kill(
            int((server.state_dir / "run" / shown["id"] / "qemu.pid").read_text().split()[0]), signal.SIGKILL
        )


@real
def test_a_vm_that_does_not_start_or_ends_early_is_said(server: Server, short_path: Path) -> None:
    command, home = short_path / "vm", short_path / "home"
    home.mkdir()
    with protected(server, boot_sector(resets=True)):
        asked = {"point": "web/vda@good", "to": str(home), "vm_command": str(command), "name": "again"}
        with pytest.raises(ApiError, match="cannot be read"):
            server.post("/v1/recoveries", **asked)
        command.write_text(f"{COMMAND} -machine nothing")
        with pytest.raises(ApiError, match="QEMU did not start"):
            server.post("/v1/recoveries", **asked)
        assert server.get("/v1/recoveries") == [] and server.get("/v1/forks") == []
        with pytest.raises(ApiError, match="either you start the VM"):
            server.post("/v1/recoveries", **asked, qmp="/run/x")
        command.write_text(COMMAND)
        server.post("/v1/recoveries", **asked)
        until(lambda: server.get("/v1/recoveries/again")["state"] in ("failed", "done"), "an end")
        if server.get("/v1/recoveries/again")["state"] == "failed":
            assert "QEMU" in server.get("/v1/recoveries/again")["reason"]
            command.write_text(COMMAND.replace("-no-reboot", "-no-shutdown"))
            server.post("/v1/recoveries/again:retry")
            until(lambda: server.get("/v1/recoveries/again")["state"] == "done", "the pivot")
        pid = int(
            (Path(server.get("/v1/recoveries/again")["launched"]["qmp"]).parent / "qemu.pid")
            .read_text()
            .split()[0]
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- lending, bisect


def cdp(server: Server, *arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [Path(sys.executable).parent / "cdp", *arguments],
        env={**os.environ, "CDP_STATE_DIR": str(server.state_dir), "XDG_STATE_HOME": str(server.state_dir.parent)},
        capture_output=True, text=True, check=False, **more,
    )  # fmt: skip


@real
def test_lent_forks_go_with_their_owner(server: Server) -> None:
    with protected(server, boot_sector()):
        owners = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
        lent = [server.post("/v1/probes", point="web/vda@good", pid=owner.pid) for owner in owners]
        assert read(lent[0]["disks"][0]["uri"], 4096)[:512] == boot_sector()
        assert len(server.get("/v1/forks")) == 2
        owners[0].kill()
        owners[0].wait()
        until(lambda: len(server.get("/v1/forks")) == 1, "the end of what was lent")
        with pytest.raises(ApiError, match="no process"):
            server.post("/v1/probes", point="web/vda@good", pid=owners[0].pid)
        server.kill()
    with Server(server.state_dir) as again:
        assert len(again.get("/v1/forks")) == 1, "its owner lives"
        owners[1].kill()
        owners[1].wait()
        until(lambda: again.get("/v1/forks") == [], "the end of what was lent")


SECONDS = 200
FIRST_BAD = 137


def history(state_dir: Path, *disks: str, vm: str | None = None) -> int:
    """Disks with a point a second; what they hold at 0 is the number of the second, and from FIRST_BAD on it is bad.

    The time of the first point.
    """
    state = StateDir.create_or_open(state_dir)
    clock, _ = fix_clock(state.clock, lambda: 0)
    begun_ns = clock.now_ns() - (SECONDS + 60) * 10**9
    for number, name in enumerate(disks, start=1):
        _history(state, clock.boot_id, f"t{number}", name, vm, begun_ns)
    return begun_ns


def _history(state: StateDir, boot_id: str, id: str, name: str, vm: str | None, begun_ns: int) -> None:
    now = [begun_ns]
    made = create_timeline(state, id=id, name=name, vm=vm, size=SIZE, base=EmptyBase(), now_ns=now[0])

    def tick() -> int:
        return now[0]

    disk = TargetDisk(state.path, made, clock_ns=tick, boot_id=boot_id, emit=lambda *_, **__: None)
    client = disk.connect()
    client.write(memoryview(bytes(4096)), 0)
    disk.synced(None, write_blocking=True)
    for second in range(SECONDS):
        now[0] += 10**9
        word = (b"bad" if second >= FIRST_BAD else b"fine") + str(second).encode()
        client.write(memoryview(word.ljust(4096, b"\0")), 0)
    disk.shut(removing=False)


@real
def test_bisect_finds_the_last_good_second_and_goes_on_where_it_was(short_path: Path) -> None:
    state_dir = short_path / "s"
    history(state_dir, "d")
    log = short_path / "seen"
    judge = script(
        short_path / "judge",
        f'echo x >>{log}\n[ -e {short_path}/stop ] && [ "$(wc -l <{log})" -ge 3 ] && kill -9 $PPID\n'
        'word=$(nbdsh -u "$CDP_URI" -c "import sys; sys.stdout.write(h.pread(4096, 0)[:4].decode())")\n'
        '[ "$word" = fine ]',
    )
    (short_path / "stop").touch()
    with Server(state_dir) as server:
        asked = ("bisect", "d", "--good", "seq:10", "--bad", "latest", "--run", judge, "--json")
        assert cdp(server, *asked).returncode == -signal.SIGKILL
        until(lambda: server.get("/v1/forks") == [], "the end of what was lent")
        (short_path / "stop").unlink()
        done = cdp(server, *asked)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert "going on after 2 probes" in done.stderr
        for point, word in ((found["good"], b"fine136"), (found["bad"], b"bad137")):
            assert read(server.uri(point), 4096).rstrip(b"\0") == word
        assert found["probes"] <= 8 and found["skipped"] == 0
        assert len(log.read_text().splitlines()) == found["probes"] + 1
        nothing_stays(server)
        wrong = cdp(server, "bisect", "d", "--good", "latest", "--bad", "seq:10", "--run", judge)
        assert wrong.returncode == 2 and "is not before" in wrong.stderr
        _ctrl_c_and_points_that_cannot_be_judged(server, short_path)


def _ctrl_c_and_points_that_cannot_be_judged(server: Server, short_path: Path) -> None:
    seen, hang, log = short_path / "seen2", short_path / "hang", short_path / "log"
    judge = script(
        short_path / "judge2",
        f"[ -e {hang} ] && [ -s {seen} ] && rm {hang} && exec sleep 600\n"
        f"echo ${{CDP_POINT##*:}} >>{seen}\nn=${{CDP_POINT##*:}}\n"
        "[ $n -ge 98 ] && [ $n -lt 102 ] && exit 125\n[ $n -lt 100 ]",
    )
    asked = (
        "bisect",
        "d",
        "--good",
        "seq:10",
        "--bad",
        "seq:190",
        "--run",
        judge,
        "--log",
        str(log),
        "--json",
    )
    hang.touch()
    process = subprocess.Popen(
        [Path(sys.executable).parent / "cdp", *asked],
        env={**os.environ, "CDP_STATE_DIR": str(server.state_dir)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(lambda: not hang.exists(), "the second probe")
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    assert process.wait(60) == 130
    nothing_stays(server)
    kept = log.read_bytes()
    for again in (False, True):
        log.write_bytes(kept)
        done = cdp(server, *asked, *(["--again"] if again else []))
        assert done.returncode == 0, done.stderr
        assert ("going on after 1 probes" in done.stderr) != again
        found = json.loads(done.stdout)
        assert (found["good"], found["bad"], found["skipped"]) == ("d@seq:97", "d@seq:102", 4)
        assert not log.exists()
    nothing_stays(server)


@real
def test_bisect_of_a_vm_asks_for_all_disks_at_one_instant(short_path: Path) -> None:
    begun_ns = history(short_path / "s", "vda", "vdb", vm="web")
    log = short_path / "seen"
    reading = "import sys; sys.stdout.write(h.pread(4096, 0).rstrip(bytes(1)).decode())"
    judge = script(
        short_path / "judge",
        f'for uri in "$CDP_URI_1" "$CDP_URI_2"; do nbdsh -u "$uri" -c \'{reading}\'; echo; done >{log}.now\n'
        f'echo "$CDP_DISKS" $(cat {log}.now) >>{log}\n! grep -q bad {log}.now',
    )
    with Server(short_path / "s") as server:
        first = format_time(begun_ns + 5 * 10**9)
        last = format_time(begun_ns + (SECONDS - 5) * 10**9)
        done = cdp(server, "bisect", "web", "--good", first, "--bad", last, "--run", judge, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        for point, word in ((found["good"], b"fine136"), (found["bad"], b"bad137")):
            for disk in ("vda", "vdb"):
                at = point.replace("web@", f"web/{disk}@")
                assert read(server.uri(at), 4096).rstrip(b"\0") == word
        assert found["probes"] <= 8 and found["skipped"] == 0
        probes = [line.split() for line in log.read_text().splitlines()]
        assert len(probes) == found["probes"]
        assert all(words[:2] == ["vda", "vdb"] and words[2] == words[3] for words in probes)
        nothing_stays(server)
