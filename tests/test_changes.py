"""A resync that cannot come to its end is given up in time, and nothing of it is left: a QEMU whose guest writes as it is told.

Of a real one the writes between two commands cannot be had at will; what it does is in tests/test_protect_resync.py.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
import trio
import trio.testing

from cdpserver.vm.changes import HELD_BYTES, HELD_S, MOST_ROUNDS, SMALL, TRIES, CannotError, Changes
from cdpserver.vm.mirror import Mirror
from cdpserver.vm.qmp import Event, QmpRefusedError

UUID = "0123456789abcdef" * 2
NAME = f"cdp-{UUID[:16]}"
URI = f"nbd+unix:///web/d:{UUID}?socket=/x"
SIZE = 1 << 40
ANCHOR = "cdp-anchor"


class Qemu:
    """The monitor of a QEMU with one disk; while a round is sent the guest writes `writes` bytes, unless it is held."""

    version = (7, 2, 0)

    def __init__(self, *, marked: int, writes: int, status: str = "running", round_s: float = 0.01) -> None:
        self.marks = {ANCHOR: marked}
        self.writes, self.status, self.round_s = writes, status, round_s
        self.nodes: list[str] = []
        self.jobs: dict[str, str] = {}
        self.changes: Changes | None = None
        self.rounds = 0
        self.held_at: list[float] = []
        self.let_go_at: list[float] = []

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        await trio.lowlevel.checkpoint()
        more = arguments or {}
        match command:
            case "query-named-block-nodes":
                bitmaps = [{"name": name, "count": count} for name, count in self.marks.items()]
                ours = [{"node-name": name} for name in self.nodes]
                return [{"node-name": "d", "drv": "raw", "file": "/d", "dirty-bitmaps": bitmaps}, *ours]
            case "query-block-jobs":
                return [
                    {"device": name, "len": 1, "offset": 0, "status": "running", "ready": False}
                    | {"io-status": "ok"}
                    for name in self.jobs
                ]
            case "query-status" | "object-del" if command == "object-del" or not self.status:
                raise QmpRefusedError(command, "GenericError", "a storage daemon, and no credential in it")
            case "query-status":
                return {"status": self.status}
            case "stop":
                self.status = "paused"
                self.held_at.append(trio.current_time())
            case "cont":
                self.status = "running"
                self.let_go_at.append(trio.current_time())
            case "blockdev-add":
                self.nodes.append(more["node-name"])
            case "blockdev-del":
                self.nodes.remove(more["node-name"])
            case "block-dirty-bitmap-remove":
                del self.marks[more["name"]]
            case "transaction":
                for action in more["actions"]:
                    self._act(action["type"], action["data"])
            case "blockdev-mirror":
                assert more["sync"] == "none"
                self.jobs[more["job-id"]] = "mirror"
                self._write()
            case "block-job-cancel":
                if self.jobs.pop(more["device"], "") == "backup":
                    self._ends("BLOCK_JOB_CANCELLED", more["device"])
            case _:
                raise AssertionError(command)
        return {}

    def _act(self, what: str, data: Mapping[str, Any]) -> None:
        match what:
            case "block-dirty-bitmap-add":
                self.marks[data["name"]] = 0
            case "block-dirty-bitmap-merge":
                self.marks[data["target"]] = sum(self.marks[name] for name in data["bitmaps"])
            case "blockdev-backup":
                self.rounds += 1
                self.jobs[data["job-id"]] = "backup"
                trio.lowlevel.spawn_system_task(self._back_up, data["job-id"])

    async def _back_up(self, job: str) -> None:
        await trio.sleep(self.round_s)
        if self.jobs.pop(job, "") == "backup":
            self._write()
            self._ends("BLOCK_JOB_COMPLETED", job)

    def _write(self) -> None:
        """Into the newest of the bitmaps of rounds."""
        if self.status != "paused":
            newest = [name for name in self.marks if "-round-" in name][-1]
            self.marks[newest] += self.writes

    def _ends(self, event: str, job: str) -> None:
        assert self.changes is not None
        self.changes.heard(Event(event, {"device": job}, 0))

    async def next_event(self) -> Event | None:
        await trio.sleep_forever()

    async def send(self) -> Any:
        mirror = Mirror(self, UUID)
        self.changes = Changes(self, mirror, trio.Lock())
        return await self.changes.send("d", SIZE, URI, ANCHOR, wait=False, progress=lambda done, total: None)

    def left(self) -> list[str]:
        """What an attempt must not leave."""
        return [*self.nodes, *self.jobs, *(name for name in self.marks if name != ANCHOR)]


def on_a_clock(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def gives_up(qemu: Qemu, why: str) -> None:
    async def run() -> None:
        with pytest.raises(CannotError, match=why) as error:
            await qemu.send()
        assert not error.value.again, "the whole disk is compared next"

    on_a_clock(run)
    assert qemu.left() == [], "the guest's writes go nowhere but to its disk"
    assert ANCHOR in qemu.marks, "what was sent is marked still"
    assert qemu.status != "paused"


@pytest.mark.parametrize("writes", [0, SMALL, HELD_BYTES])
def test_a_guest_that_leaves_little_is_held_for_the_rest(writes: int) -> None:
    qemu = Qemu(marked=1 << 30, writes=writes)

    async def run() -> None:
        sent = await qemu.send()
        assert sent.sent == (1 << 30) + writes * (qemu.rounds - 1)
        assert sent.pause_ns > 0

    on_a_clock(run)
    assert qemu.rounds <= MOST_ROUNDS + 1
    assert qemu.left() == [NAME, NAME], "the target's node, and the mirror on it"
    assert len(qemu.held_at) == len(qemu.let_go_at) == 1 and qemu.status == "running"


def test_a_guest_that_writes_faster_than_it_is_sent_is_never_held() -> None:
    qemu = Qemu(marked=1 << 30, writes=HELD_BYTES + 1)
    gives_up(qemu, "writes faster than the target takes it")
    assert qemu.rounds == MOST_ROUNDS and not qemu.held_at


def test_a_guest_is_held_no_longer_than_a_second() -> None:
    """The last round hangs: the target does, or its store."""
    qemu = Qemu(marked=SMALL, writes=SMALL)
    usual = qemu._back_up

    async def slow_when_held(job: str) -> None:
        qemu.round_s = 3600 if qemu.status == "paused" else 0.01
        await usual(job)

    qemu._back_up = slow_when_held  # type: ignore[method-assign]
    gives_up(qemu, "what is left took longer than 1 s")
    ((held_at,), (let_go_at,)) = qemu.held_at, qemu.let_go_at
    assert HELD_S <= let_go_at - held_at < HELD_S + 0.1


def test_another_program_lets_the_guest_go() -> None:
    """Then it writes between the last round and the mirror's start, which the last bitmap shows."""
    qemu = Qemu(marked=SMALL, writes=1)
    usual = qemu.execute

    async def goes_on(command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        if command == "blockdev-mirror":
            qemu.status = "running"
        return await usual(command, arguments)

    qemu.execute = goes_on  # type: ignore[method-assign]
    gives_up(qemu, "another program let the guest go")


def test_where_nothing_can_be_held_it_is_tried_some_times() -> None:
    qemu = Qemu(marked=1 << 20, writes=1, status="")
    gives_up(qemu, "the guest never stopped writing")
    assert qemu.rounds == 1 + TRIES and not qemu.held_at
