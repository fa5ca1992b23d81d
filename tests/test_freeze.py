"""Bookmarks of a real guest that is frozen by its agent for an instant, and thawed whatever befalls."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cdpserver.errors import RefusedError
from cdpserver.service.marks import SETTLE_S
from cdpserver.vm.agent import Agent
from recovery import cli
from tests.guest_image import guest_image
from tests.guest_vm import Guest, booted, file_disk
from tests.test_service import ApiError, Server, until
from tools.kit.processes import within

pytestmark = pytest.mark.real

LATE_S = 10.0
"""What a machine with much else to do may add."""


@dataclass
class World:
    guest: Guest
    server: Server

    def mark(self, name: str, **more: Any) -> dict[str, Any]:
        return dict(self.server.post("/v1/disks/web:mark", name=name, freeze=True, **more))

    def in_sync(self) -> None:
        def look() -> bool:
            with contextlib.suppress(ApiError, OSError):
                return bool(self.server.get("/v1/vms/web")["disks"][0]["state"] == "synced")
            return False

        until(look, "mirror in sync")

    def restart(self) -> None:
        """Another service, after the first was killed."""
        self.server = Server(self.server.state_dir)
        self.in_sync()

    @property
    def notes(self) -> list[Path]:
        return list((self.server.state_dir / "run").glob("frozen-*.json"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A protected guest that counts."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        path = Path(directory)
        (path / "s.toml").write_text(f'[freeze]\nbefore = "{path}/before"\nafter = "{path}/after"\n')
        for name in ("before", "after"):
            (path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{path}/hooks\n[ ! -e {path}/fail ]\n')
            (path / name).chmod(0o755)
        root = guest_image().copy_root(path / "root.img")
        with booted(path / "vm", file_disk("root", root)) as guest:
            server = Server(path / "s", "--config", str(path / "s.toml"))
            found = World(guest, server)
            try:
                body = {"qmp": str(guest.qmp), "agent": str(guest.agent)}
                assert server.request("PUT", "/v1/vms/web", body)["agent"] == str(guest.agent)
                found.in_sync()
                guest.start("counter")
                guest.wait_acks(3)
                yield found
            finally:
                found.server.stop()


def fsck(world: World, point: str, work: Path) -> tuple[str, Path]:
    """What e2fsck says of a point, without touching it, and the point as a file."""
    image = work / "point.img"
    found = world.server.get(f"/v1/uri?point={point}")
    (disk,) = found.get("disks", [found])
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk["uri"], str(image)], check=True)
    return said_by_e2fsck(image), image


def said_by_e2fsck(image: Path) -> str:
    """Without touching it; a file system that is clean."""
    done = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout + done.stderr


def test_a_file_that_nobody_synced_is_in_an_app_point(world: World, tmp_path: Path) -> None:
    """The file system is clean without a replay of its journal, holds what was only written, and the guest goes on."""
    guest, since = world.guest, len(world.guest.console)
    guest.run("echo precious > /data/unsynced")
    acked = guest.acks
    made = world.mark("quiet")
    assert (made["grade"], made["reason"]) == ("app", "")
    guest.wait_for("GUEST freeze", since=since)
    guest.wait_for("GUEST thaw", since=since)
    guest.wait_acks(3)
    said, image = fsck(world, "web@quiet", tmp_path)
    assert "recover" not in said and "replay" not in said
    for file, least in (("/data/unsynced", "precious"), ("/data/counter", "")):
        held = subprocess.run(
            ["debugfs", "-R", f"cat {file}", str(image)], capture_output=True, text=True, check=True
        ).stdout
        assert held.startswith(least)
    assert int(held.split()[-1]) >= acked, "every number that was said to be durable before"
    (point,) = world.server.get("/v1/vms/web:points?kind=bookmark")
    assert (point["name"], point["grade"]) == ("quiet", "app")
    (evidence,) = point["evidence"].values()
    assert evidence["frozen"] and evidence["observed"]["by"] == "qmp"
    assert made["evidence"] == point["evidence"]
    shown = world.server.get("/v1/points/web@quiet")
    assert shown["grade"] == "app" and shown["disks"][0]["evidence"]["synced"]
    assert shown["disks"][0]["evidence"]["frozen"]
    listed = (world.server.state_dir.parent / "hooks").read_text().splitlines()
    assert listed == ["before web quiet", "after web quiet"]
    assert world.notes == []


def test_an_agent_that_hangs_holds_nobody_up(world: World) -> None:
    """A hook in the guest hangs: the mark is refused, or less; when the hook lets go the guest is thawed at once."""
    guest, since = world.guest, len(world.guest.console)
    guest.run("touch /data/hang")
    with within(60, "a mark that waits for ten seconds on a machine with nothing else to do"):
        made = world.mark("despite", or_crash=True)
    assert made["grade"] == "crash" and "did not answer guest-fsfreeze-freeze" in made["reason"]
    guest.wait_acks(3)
    with pytest.raises(ApiError, match="is being frozen or thawed"):
        world.mark("refused")
    guest.run("rm /data/hang; killall sleep")
    guest.wait_for("GUEST thaw", since=since)
    until(lambda: not world.notes, "a guest that is known to be thawed")
    guest.wait_acks(3)
    assert world.mark("afterwards")["grade"] == "app"


def test_a_hook_of_the_host_that_fails(world: World) -> None:
    fail = world.server.state_dir.parent / "fail"
    fail.touch()
    try:
        with pytest.raises(ApiError, match=r"no bookmark was set: .*before web unready failed with 1"):
            world.mark("unready")
    finally:
        fail.unlink()
    with pytest.raises(ApiError, match="guests are frozen whole"):
        world.server.post("/v1/disks/web/root:mark", name="disk", freeze=True)


@contextlib.contextmanager
def mid_freeze(world: World) -> Iterator[int]:
    """The guest is frozen, and the service waits for its target, which is stopped; the pid of who holds the freeze."""
    since, server = len(world.guest.console), world.server
    target = server.pids()["target-0"]
    os.kill(target, signal.SIGSTOP)
    mark = ("point", "mark", "web", "--name", "never", "--freeze")
    request = subprocess.Popen(
        [sys.executable, "-m", "recovery.cli", "--state-dir", str(server.state_dir), *mark],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        world.guest.wait_for("GUEST freeze", since=since)
        (holder,) = until(lambda: holders(world), "process that holds the freeze")
        yield holder
        world.guest.wait_for("GUEST thaw", since=since)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGCONT)
        request.kill()
        request.wait()


def holders(world: World) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"cdpserver.vm.freeze" in words and os.fsencode(world.guest.agent) in words:
                found.append(int(path.parent.name))
    return found


def test_a_service_killed_in_mid_freeze_leaves_no_guest_frozen(world: World) -> None:
    with mid_freeze(world):
        world.server.kill()
    world.restart()
    world.guest.wait_acks(3)
    until(lambda: not world.notes, "a guest that is known to be thawed")


def test_the_next_service_thaws_what_nobody_else_could(world: World) -> None:
    """Service and holder are killed at once, as when a host's unit is."""
    with mid_freeze(world) as holder:
        world.server.kill()
        os.kill(holder, signal.SIGKILL)
        assert world.notes
        world.server = Server(world.server.state_dir)
    world.in_sync()
    world.guest.wait_acks(3)
    until(lambda: not world.notes, "a guest that is known to be thawed")
    assert world.server.events("vm.thawed")


def test_a_holder_that_is_killed_alone(world: World) -> None:
    """The service thaws what the process that held the freeze did not, and the mark is refused."""
    before = len(world.server.events("vm.thawed"))
    with mid_freeze(world) as holder:
        os.kill(holder, signal.SIGKILL)
    until(lambda: world.server.events("vm.thawed")[before:], "a thaw by the service")
    until(lambda: not world.notes, "a guest that is known to be thawed")
    world.guest.wait_acks(3)
    assert "never" not in names(world)


def test_a_worker_that_goes_silent_in_mid_freeze(world: World) -> None:
    """The guest is thawed in seconds, whatever becomes of the worker."""
    since = len(world.guest.console)
    with mid_freeze(world):
        pass  # its end is that of the freeze
    guest = world.guest
    began, ended = (
        next(at for at, line in said if word in line)
        for said in [list(zip(guest.heard_ns[since:], guest.console[since:], strict=False))]
        for word in ("GUEST freeze", "GUEST thaw")
    )
    assert ended - began < (SETTLE_S + LATE_S) * 1e9
    guest.wait_acks(3)
    until(lambda: not world.notes, "a guest that is known to be thawed")
    world.in_sync()


def test_somebody_else_has_frozen_the_guest(world: World) -> None:
    """It is left as it is: refused, or of the lesser grade."""
    with Agent(world.guest.agent) as agent:
        agent.sync(within_s=30)
        agent.call("guest-fsfreeze-freeze", within_s=30)
    try:
        made = world.mark("theirs-less", or_crash=True)
        assert made["grade"] == "crash" and "somebody else has frozen the guest" in made["reason"]

        def refused() -> bool:
            with pytest.raises(ApiError) as refusal:
                world.mark("theirs")
            return "somebody else has frozen the guest" in str(refusal.value)

        until(refused, "the refusal, once the process of the mark before has ended")
        until(lambda: not world.notes, "no thaw of ours to come")
        with Agent(world.guest.agent) as agent:
            agent.sync(within_s=30)
            assert agent.call("guest-fsfreeze-status", within_s=30) == "frozen"
    finally:
        with Agent(world.guest.agent) as agent:
            agent.sync(within_s=30)
            agent.call("guest-fsfreeze-thaw", within_s=30)
    world.guest.wait_acks(3)


def names(world: World) -> set[str]:
    return {point["name"] for point in world.server.get("/v1/vms/web:points?kind=bookmark")}


@pytest.fixture
def second(world: World) -> Iterator[Guest]:
    """Another protected guest, and a group `both` of the two."""
    path = world.server.state_dir.parent
    root = guest_image().copy_root(path / "second.img")
    with booted(path / "vm2", file_disk("root", root)) as guest:
        body = {"qmp": str(guest.qmp), "agent": str(guest.agent)}
        world.server.request("PUT", "/v1/vms/second", body)
        until(
            lambda: world.server.get("/v1/vms/second")["disks"][0]["state"] == "synced",
            "second mirror in sync",
        )
        world.server.request("PUT", "/v1/groups/both", {"members": ["web", "second"]})
        yield guest
        world.server.delete("/v1/vms/second")


def test_two_guests_are_frozen_at_one_instant(world: World, second: Guest) -> None:
    """A group's point is `app` where all its guests were frozen; one that does not answer holds nobody up."""
    guests, server = [world.guest, second], world.server
    since = [len(guest.console) for guest in guests]
    second.run("echo precious > /data/unsynced")
    made = server.post("/v1/disks/both:mark", name="still", freeze=True)
    assert (made["grade"], made["reason"]) == ("app", "")
    assert set(made["disks"].values()) == {"app"} and len(made["disks"]) == 2
    for guest, start in zip(guests, since, strict=True):
        guest.wait_for("GUEST freeze", since=start)
        guest.wait_for("GUEST thaw", since=start)
    assert server.get("/v1/points/both@still")["grade"] == "app"

    # The second one's hook hangs: the first is thawed in time, and is no worse for it.
    since = [len(guest.console) for guest in guests]
    second.run("touch /data/hang")
    made = server.post("/v1/disks/both:mark", name="half", freeze=True, or_crash=True)
    assert made["grade"] == "crash" and made["reason"] == "second was not frozen within 3 s after others"
    assert made["disks"] == {"web/root-device": "app", "second/root-device": "crash"}
    world.guest.wait_for("GUEST thaw", since=since[0])
    world.guest.wait_acks(3)
    second.run("rm /data/hang; killall sleep")
    second.wait_for("GUEST thaw", since=since[1])
    until(lambda: not world.notes, "guests that are known to be thawed")


def test_marks_by_the_clock(world: World) -> None:
    """`mark_every` and `freeze` of the VM's policy."""
    server = world.server
    with pytest.raises(ApiError, match="marked with its VM"):
        server.request("PATCH", "/v1/policies/web/root", {"mark_every": "10s"})
    server.request("PATCH", "/v1/policies/web", {"mark_every": "10s", "freeze": "yes"})

    def look() -> list[dict[str, Any]]:
        listed = server.get("/v1/vms/web:points?kind=bookmark")
        return [point for point in listed if point["name"].startswith("auto-")]

    assert until(look, "bookmark by the clock")[0]["grade"] == "app"
    server.request("PATCH", "/v1/policies/web", {"mark_every": "none"})
    assert json.loads(json.dumps(server.get("/v1/policies/web")))["mark_every"] == "none"
    world.guest.wait_acks(3)


def test_a_backup_of_a_guest_that_is_not_protected(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By QEMU's backup job, frozen for its beginning: nothing is to be replayed. The last one: its protection ends here."""
    guest, server = world.guest, world.server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CDP_REPO", str(tmp_path / "repo"))

    def cdp(*arguments: object) -> Any:
        options = cli.parse([*map(str, arguments), "--json"])
        assert not options.run(options)
        return json.loads(capsys.readouterr().out)

    cdp("repo", "init", tmp_path / "repo")
    run = ("backup", "run", "web", "--qmp", guest.qmp2, "--freeze", "--agent", guest.agent)
    with pytest.raises(RefusedError, match="is protected here"):
        cdp(*run)
    server.delete("/v1/vms/web")
    guest.run("echo precious > /data/unsynced")
    since = len(guest.console)
    made = cdp(*run)
    assert (made["grade"], made["not_frozen"], made["disks"][0]["name"]) == ("app", "", "web/root-device")
    guest.wait_for("GUEST freeze", since=since)
    guest.wait_for("GUEST thaw", since=since)
    guest.wait_acks(3)
    output = tmp_path / "out.raw"
    cdp("backup", "restore", "latest", "--output", output)
    assert "recover" not in said_by_e2fsck(output)
    said = subprocess.run(
        ["debugfs", "-R", "cat /data/unsynced", str(output)], capture_output=True, text=True, check=True
    )
    assert said.stdout == "precious\n"
