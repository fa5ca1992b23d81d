"""Targets that hang: known in time, killed or left by `yank`; and those that do not are left alone. On a clock that jumps."""

import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cdpserver import messages
from cdpserver.catalog import Catalog
from cdpserver.clock import fix_clock
from cdpserver.config import Config
from cdpserver.errors import NoSpaceError, RefusedError, UnreachableError
from cdpserver.events import EventLog
from cdpserver.priority import NICE
from cdpserver.service.children import Child
from cdpserver.service.control import Targets
from cdpserver.service.core import Core
from cdpserver.service.hung import KILL_AFTER_S, SLOW_S, Hung
from cdpserver.state import StateDir
from cdpserver.vm import probe
from cdpserver.vm.controller import HUNG_S, Controller
from cdpserver.vm.probe import Probe
from cdpserver.vm.qmp import Event, QmpRefusedError
from cdpserver.vm.record import ProtectedDisk, ProtectedVm, QmpSocket
from cdpserver.vm.release import release
from cdpserver.vm.target import Ago, TargetState
from recovery.agent_client import AgentClient
from recovery.agent_target import ApiTarget
from tests.test_later_qemu import NAME, URI, UUID, KeptTarget

LINE = "t1"
"""The id of a timeline whose worker is number 0."""


@asynccontextmanager
async def listener(path: Path, *, answer: bytes | None) -> AsyncIterator[trio.SocketListener]:
    """Something that takes connections at a Unix socket, and answers what comes, or hangs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = trio.socket.socket(trio.socket.AF_UNIX)
    await made.bind(str(path))
    made.listen()

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # one that has its answer is gone
            async for _ in stream:
                if answer is not None:
                    await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listening = trio.SocketListener(made)
        nursery.start_soon(trio.serve_listeners, serve, [listening])
        yield listening
        nursery.cancel_scope.cancel()


# --- the service and its workers


class Watched:
    """The watchdog of a service, and its one worker: a process that does nothing."""

    def __init__(self, state: StateDir, catalog: Catalog) -> None:
        self.state = state
        clock, _ = fix_clock(state.clock, time.time_ns)
        targets = Targets(state, 1)
        self.core = Core(self.state, Config(), clock, catalog, EventLog(self.state.events), targets)
        self.process = subprocess.Popen(["sleep", "1000"])
        self.hung = Hung(self.core, [Child("target-0", [], pid=self.process.pid)])

    @property
    def control(self) -> Path:
        return self.state.worker_control(0)

    def said(self) -> str:
        return self.state.events.read_text() if self.state.events.exists() else ""


@pytest.fixture
def watched(short_path: Path) -> Iterator[Watched]:
    state = StateDir.create_or_open(short_path / "s")
    catalog = Catalog.open(state, writable=True)
    made = Watched(state, catalog)
    yield made
    made.process.kill()
    made.process.wait()
    catalog.close()


async def test_jobs_leave_the_processor_to_guests_writes(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import json, os, subprocess as s; from cdpserver.priority import behind_writes as b; n = os.getpriority(0, 0); "
    script += "print(json.dumps({'job': n, 'qemu': int(s.check_output([*b(), 'nice']))}), end='')"
    (tmp_path / "asked.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    expected = max(NICE, os.getpriority(os.PRIO_PROCESS, 0))
    # Nor do QEMU's programs, which a job starts in the same way, go below it.
    assert await watched.core.job("asked", "asked") == {"job": expected, "qemu": expected}


async def test_a_worker_that_hangs_is_killed(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    async with listener(watched.control, answer=None), trio.open_nursery() as nursery:
        nursery.start_soon(watched.hung.watch, lambda: True)
        began = trio.current_time()
        seen: list[float] = []
        while trio.current_time() < began + KILL_AFTER_S - 0.05:
            seen.append(watched.hung.for_s(LINE))
            assert "target.hung" not in watched.said()
            await trio.sleep(0.05)
        assert seen[0] == 0 and seen[-1] > SLOW_S, "slow first, then hung"
        assert watched.process.poll() is None
        await trio.sleep(0.2)
        assert watched.process.wait(30) == -9
        assert "target.hung" in watched.said()
        nursery.cancel_scope.cancel()


async def test_a_worker_that_answers_or_is_not_there_is_left_alone(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched.hung.watch, lambda: True)
        await trio.sleep(10 * KILL_AFTER_S)
        assert watched.hung.for_s(LINE) == 0, "it is starting"
        async with listener(watched.control, answer=messages.pack({"ok": None})):
            await trio.sleep(10 * KILL_AFTER_S)
            assert watched.hung.for_s(LINE) == 0
        nursery.cancel_scope.cancel()
    assert watched.process.poll() is None and not watched.said()


async def test_nobody_is_killed_while_no_vm_waits(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    async with listener(watched.control, answer=None), trio.open_nursery() as nursery:
        nursery.start_soon(watched.hung.watch, lambda: False)
        await trio.sleep(10 * KILL_AFTER_S)
        nursery.cancel_scope.cancel()
    assert watched.process.poll() is None and not watched.said()


# --- the probe of an agent


@pytest.mark.parametrize("says", [b"", b"NBDMAGICIHAVEOPT\0\3"], ids=["nothing", "a greeting and no more"])
async def test_a_server_that_hangs_is_known_to(
    short_path: Path, autojump_clock: trio.testing.MockClock, says: bytes
) -> None:
    """Its kernel takes connections all the same; a greeting may still be in the socket."""
    path = short_path / "nbd.sock"
    made = trio.socket.socket(trio.socket.AF_UNIX)
    await made.bind(str(path))
    made.listen()
    taken: list[trio.socket.SocketType] = []
    asked = Probe(f"nbd+unix:///web/d?socket={path}")

    async def take() -> None:
        while True:
            connection, _ = await made.accept()
            taken.append(connection)
            await connection.send(says)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        nursery.start_soon(asked.run)
        await trio.sleep(probe.SLOW_S / 2)
        assert asked.hung_s() == 0
        for waited_s in (1, 3, 10):
            await trio.sleep_until(trio.current_time() // 1 + waited_s)
            assert asked.hung_s() > waited_s - 1
        assert len(taken) > 5, "a connection that leads nowhere is made anew"
        nursery.cancel_scope.cancel()


async def test_a_server_that_answers_refuses_or_goes_on_is_fine(
    short_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = short_path / "nbd.sock"
    asked = Probe(f"nbd+unix:///web/d?socket={path}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asked.run)
        await trio.sleep(5)
        assert asked.hung_s() == 0, "nobody listens: QEMU knows as well"
        async with listener(path, answer=None):
            await trio.sleep(3)
            assert asked.hung_s() > 1
        await trio.sleep(2 * probe.ATTEMPT_S)
        assert asked.hung_s() == 0
        nursery.cancel_scope.cancel()


class KnownClient(AgentClient):
    """The API, of which only the place of a disk is asked."""

    def __init__(self, nbd: Path) -> None:
        super().__init__(StateDir(nbd.parent))
        self.nbd = nbd
        self.failures = 1

    def mirror(self, disk: str) -> dict[str, Any]:
        if self.failures:
            self.failures -= 1
            raise UnreachableError("no service", hint="start it")
        return {"uuid": UUID, "uris": {"uri": f"nbd+unix:///{disk}:{UUID}?socket={self.nbd}"}}


async def test_an_agent_knows_of_its_own_that_a_disk_hangs(short_path: Path) -> None:
    """Whatever the API does; on the real clock, for it is asked in a thread."""
    path = short_path / "nbd.sock"
    target = ApiTarget(KnownClient(path), None)
    assert target.hung_s("web/d") == 0
    with trio.fail_after(60):
        async with listener(path, answer=None), trio.open_nursery() as nursery:
            nursery.start_soon(target.watch, "web/d")
            while not target.hung_s("web/d"):  # noqa: ASYNC110 - it has no event
                await trio.sleep(0.05)
            assert target.hung_s("web/other") == 0
            nursery.cancel_scope.cancel()
    assert target.hung_s("web/d") == 0, "watched no more"


class ToldClient(KnownClient):
    """It answers by the server's clock, and keeps what it is told."""

    SERVER_NS = 10**18

    def mirror(self, disk: str) -> dict[str, Any]:
        said = TargetState(session=1, synced=True, last_seq=1, place="1:1").as_dict()
        return {"uuid": UUID, "uris": {}, "said": said, "time_ns": self.SERVER_NS}

    def tell_mirror(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        self.told = verb, body
        return {}


async def test_an_agent_says_by_the_servers_clock_when_it_saw_a_mirror_whole(short_path: Path) -> None:
    """However long the word is on its way: a gap that began later than what is missing would hide it."""
    client = ToldClient(short_path / "nbd.sock")
    target = ApiTarget(client, None)
    before = trio.current_time()
    await target.state("web/d")
    whole_at = trio.current_time()
    ago = Ago.of(trio.current_time(), whole_at=whole_at, freed_at=None)
    await target.lost("web/d", 1, "test", ago=ago)
    verb, said = client.told
    assert (verb, said["freed_ns"]) == ("lost", None)
    late_ns = said["whole_ns"] - client.SERVER_NS
    assert abs(late_ns) <= (trio.current_time() - before) * 1e9


# --- the controller


class HangingTarget(KeptTarget):
    """Our side, which hangs when it is told to."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.hangs_since: float | None = None
        self.events: list[str] = []
        self.lost_said: list[tuple[str, int | None]] = []

    def hung_s(self, disk: str) -> float:
        return 0.0 if self.hangs_since is None else trio.current_time() - self.hangs_since

    async def lost(self, disk: str, session: int, reason: str, *, ago: Any) -> None:
        self.lost_said.append((reason, ago.freed_ns))

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append(event)


class MirroredQemu:
    """A monitor of a QEMU whose mirror is in sync until it is yanked and cancelled."""

    version = (7, 2, 0)

    def __init__(self, *, yanks: bool, held: bool = False) -> None:
        self.yanks, self.runs, self.objects = yanks, False, dict[str, str]()
        self.held = held
        """A write waits, and a job that is cancelled for it."""
        self.asked: list[str] = []

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked.append(command)
        more = arguments or {}
        match command:
            case "yank" if not self.yanks:
                raise QmpRefusedError(command, "CommandNotFound", "a storage daemon")
            case "yank":
                assert more == {"instances": [{"type": "block-node", "node-name": NAME}]}
                self.held = False
            case "block-job-cancel":
                self.runs = self.held
            case "blockdev-mirror":
                self.runs = True
            case "query-block-jobs":
                job = {"device": NAME, "status": "ready", "ready": True, "io-status": "ok", "type": "mirror"}
                return [job | {"offset": 1, "len": 1}] if self.runs else []
            case "query-named-block-nodes":
                image = {"virtual-size": 1 << 20}
                source = {"node-name": "d", "drv": "raw", "file": "/d.raw", "image": image}
                return [source, {"node-name": NAME, "drv": "nbd", "file": URI, "image": {}}]
            case "query-status":
                return {"status": "running", "running": True}
            case "query-block" | "query-blockstats":
                return []
            case "object-add":
                self.objects[more["id"]] = more["data"]
            case "object-del" if more["id"] not in self.objects:
                raise QmpRefusedError(command, "GenericError", "object not found")
            case "object-del":
                del self.objects[more["id"]]
            case "qom-get" if more["path"].removeprefix("/objects/") not in self.objects:
                raise QmpRefusedError(command, "DeviceNotFound", "no such object")
            case "qom-get":
                return self.objects[more["path"].removeprefix("/objects/")]
        return {}

    async def next_event(self) -> Event | None:
        await trio.sleep_forever()


@asynccontextmanager
async def followed(
    qemu: MirroredQemu, target: HangingTarget, *, wait: bool = False
) -> AsyncIterator[Controller]:
    """A controller whose one disk has been in sync for a while."""

    @asynccontextmanager
    async def connect(_: object) -> AsyncIterator[MirroredQemu]:
        yield qemu

    vm = ProtectedVm("web", QmpSocket("/x"), (ProtectedDisk("web/d", "d"),), 0, wait=wait)
    controller = Controller(vm, connect, target)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(controller.run)
        with trio.fail_after(60):
            await target.synced_said.wait()
        await trio.sleep(5)
        yield controller
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("wait", "yanks"), [(False, True), (False, False), (True, True)])
async def test_a_guest_is_freed_of_a_target_that_hangs(
    autojump_clock: trio.testing.MockClock, wait: bool, yanks: bool
) -> None:
    qemu, target = MirroredQemu(yanks=yanks), HangingTarget()

    async with followed(qemu, target, wait=wait) as controller:

        def state() -> str:
            return controller.states["web/d"].state

        target.lost_said.clear()
        target.hangs_since = trio.current_time()
        await trio.sleep(HUNG_S - 0.2)
        assert "yank" not in qemu.asked, "killing it may help yet"
        asked = len(qemu.asked)
        await trio.sleep(10)
        frees = yanks and not wait
        assert qemu.asked.count("yank") == (0 if wait else 1)
        assert set(qemu.asked[asked:]) <= {"yank", "block-job-cancel"}, "anything else might hang"
        assert ("block-job-cancel" in qemu.asked[asked:]) == frees, "without a yank that hangs, too"
        assert ("disk.guest-freed" in target.events) == frees
        assert state() == "degraded"
        hung_s, target.hangs_since = trio.current_time() - target.hangs_since, None
        await trio.sleep(5)
        if frees:
            ((reason, freed_ns),) = target.lost_said
            assert "went on without" in reason and freed_ns is not None
            assert abs(hung_s - freed_ns / 1e9 - HUNG_S) < 1.5, "from the yank on"
            assert qemu.runs, "mirrored anew"
        else:
            assert not target.lost_said, "it waited"
        assert state() == "synced"


class StandingQemu(MirroredQemu):
    """Its mirror could not write, and stands until it is resumed."""

    failed = False

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        answer = await super().execute(command, arguments)
        if command == "block-job-resume":
            self.failed = False
        elif command == "query-block-jobs" and self.failed:
            answer = [job | {"status": "paused", "io-status": "nospace"} for job in answer]
        return answer


class FullTarget(HangingTarget):
    """Our side, which has had no room, not even for what it is told once: that writes are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.full: trio.Event | None = None
        """Set when it was told."""
        self.whole_at: list[float] = []

    async def lost(self, disk: str, session: int, reason: str, *, ago: Any) -> None:
        if self.full is not None and not self.full.is_set():
            self.full.set()
            raise NoSpaceError("the store's file system is full", hint="free space")
        if not self.said.synced:
            return
        self.whole_at.append(trio.current_time() - ago.whole_ns / 1e9)
        self.said = TargetState(session=session + 1, synced=False, last_seq=1, place="1:1")
        self.synced_said = trio.Event()


async def test_what_is_missing_is_on_record_before_a_mirror_counts_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The store was full: QEMU could not write, and the gap could not be said. Then there is room, before anybody writes."""
    qemu, target = StandingQemu(yanks=True), FullTarget()

    async with followed(qemu, target) as controller:
        assert not target.whole_at
        failed_at, qemu.failed, target.full = trio.current_time(), True, trio.Event()
        with trio.fail_after(60):
            await target.full.wait()
        await trio.sleep(5)
        (whole_at,) = target.whole_at
        assert whole_at <= failed_at, "a gap from when it was seen whole, not from when that could be said"
        assert controller.states["web/d"].state == "synced" and target.synced_said.is_set(), "said anew"


class SlowTarget(HangingTarget):
    """Our side, which hangs while it is told that the mirror is in sync."""

    def __init__(self) -> None:
        super().__init__()
        self.told = trio.Event()
        self.goes_on = trio.Event()
        self.goes_on.set()

    async def synced(self, disk: str, session: int, bitmap: str = "", *, seen: Any = None) -> None:
        self.told.set()
        await self.goes_on.wait()
        await super().synced(disk, session, bitmap, seen=seen)


async def test_a_guest_that_was_freed_while_its_mirror_was_said_to_be_in_sync(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What was seen before is older than the yank: the gap begins there at the latest, whatever still arrives."""
    qemu, target = MirroredQemu(yanks=True), SlowTarget()

    async with followed(qemu, target):
        target.lost_said.clear()
        target.told, target.goes_on = trio.Event(), trio.Event()
        target.said = TargetState(session=2, synced=False, last_seq=1, place="1:1")
        with trio.fail_after(60):
            await target.told.wait()
        target.hangs_since = trio.current_time()
        await trio.sleep(HUNG_S + 1)
        assert "yank" in qemu.asked
        target.hangs_since = None
        target.goes_on.set()
        await trio.sleep(5)
        ((reason, freed_ns),) = target.lost_said
        assert "went on without" in reason and freed_ns is not None


@pytest.mark.parametrize("yanks", [True, False])
async def test_an_operator_ends_a_mirror_that_a_write_waits_in(
    autojump_clock: trio.testing.MockClock, yanks: bool
) -> None:
    """A guest that is to wait waits for room, or for a target that hangs; to take its protection back lets it go on."""
    qemu = MirroredQemu(yanks=yanks, held=True)
    qemu.runs = True
    with contextlib.nullcontext() if yanks else pytest.raises(RefusedError, match="does not end the job"):
        await release(qemu, [UUID])
    assert qemu.runs != yanks
