r"""A resync that sends what a dirty bitmap marks, and no more, and ends in a mirror that is in sync.

    round 0    what the bitmap marks           guest runs     marks of round 1 begin at the same instant
    round 1    what was written meanwhile      guest runs     marks of round 2 begin ...
    last       the little that is left         guest held     mirror with sync=none starts, the guest goes on

Each round is a `blockdev-backup` of a bitmap, begun in one transaction with the bitmap for the next, so that no write falls
between. QEMU's backup fails a *guest's* write when it cannot save to its target what is being overwritten. So it writes to a
quorum of which one vote suffices: our target, and a node that takes everything. The guest never sees an error; what our target
did not take QEMU reports as `QUORUM_REPORT_BAD`, and the resync is given up.

          guest ──► backup's filter ──► source
                          └──► quorum ──► NBD node of the mirror ──► our target
                                   └────► null-co

A mirror cannot be started in a transaction. The guest is held (`stop`, `cont`) from before the last round until the mirror runs,
and then the last bitmap must be empty: that, not the holding, is the proof that no write fell between. So where nothing can be
held (a qemu-storage-daemon, a guest that another program lets go) the same is tried without, and counts only if nothing was
written.

A guest that we hold goes on whatever becomes of us: a node tells whoever comes next that it is we who hold it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from cdpserver.errors import RefusedError
from cdpserver.vm.mirror import Mirror
from cdpserver.vm.qmp import Event, Monitor, QmpRefusedError

SMALL = 4 << 20
"""So little is left to the last round: it takes some ten milliseconds."""

MOST_ROUNDS = 8
HELD_BYTES = 64 << 20
"""After so many rounds the last one may be of so much, else the guest writes faster than we can send."""

HELD_S = 1.0
"""A guest is held no longer, whatever is missing: the resync is given up then."""

TRIES = 5
"""Starts of a mirror where the guest cannot be held."""

ENDS = frozenset({"BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"})

LOOK_S = 0.2
ENDING_S = 15.0
ENDING_LOOK_S = 0.05


class CannotError(RefusedError):
    """What changed cannot be sent alone; `again`: it may be in a moment."""

    usual_hint = "if that stays so, the whole disk is compared"

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


@dataclass(frozen=True, slots=True)
class Sent:
    """What it cost: bytes sent, and for how long the guest was held."""

    sent: int
    pause_ns: int


class Changes:
    """For one disk and its mirror. `one_at_a_time` is shared by all disks of a VM: whoever has it may hold the guest."""

    def __init__(self, monitor: Monitor, mirror: Mirror, one_at_a_time: trio.Lock) -> None:
        self._monitor = monitor
        self._mirror = mirror
        self._one_at_a_time = one_at_a_time
        name = mirror.name
        self._job, self._rounds = f"{name}-copy", f"{name}-round-"
        self._safe, self._sink, self._held = f"{name}-safe", f"{name}-sink", f"{name}-held"
        self._node = ""
        self._number = 0
        self._sent = 0
        self._missed = ""
        self._ended = trio.Event()
        self._error = ""

    def heard(self, event: Event | None) -> None:
        """Every event of the monitor, in order; None for some that were lost."""
        if event is None:
            self._missed = "events of QEMU were lost"
            self._ended.set()
        elif event.name == "QUORUM_REPORT_BAD" and event.data.get("node-name") == self._mirror.name:
            self._missed = f"the target did not take a write: {event.data.get('error', 'no reason given')}"
        elif event.name in ENDS and event.data.get("device") == self._job:
            cancelled = event.name == "BLOCK_JOB_CANCELLED"
            self._error = "somebody cancelled it" if cancelled else str(event.data.get("error", ""))
            self._ended.set()

    async def send(
        self, node: str, size: int, uri: str, bitmap: str, *, wait: bool, progress: Callable[[int, int], None]
    ) -> Sent:
        """Send what `bitmap` of `node` marks; on return the mirror runs, and nothing but its own writes is missing.

        CannotError if that is not possible; then nothing of it runs. What was sent does no harm: it is marked still.
        """
        await self.clean()
        self._node, self._number, self._sent, self._missed = node, 0, 0, ""
        try:
            await self._mirror.open_target(uri, wait=wait)
            await self._open_safe(size)
            first = f"{self._rounds}0"
            marks = {"node": node, "name": first, "disabled": True}
            merge = {"node": node, "target": first, "bitmaps": [bitmap]}
            await self._round(
                progress,
                {"type": "block-dirty-bitmap-add", "data": marks},
                {"type": "block-dirty-bitmap-merge", "data": merge},
            )
            while (left := await self._left()) > SMALL and self._number < MOST_ROUNDS:
                await self._round(progress)
            if left > HELD_BYTES:
                raise CannotError("the guest writes faster than the target takes it")
            pause_ns = await self._finish(size, progress)
        except QmpRefusedError as error:
            await self._give_up()
            raise CannotError(error.message) from None
        except BaseException:
            await self._give_up()
            raise
        await self._remove_rounds()
        return Sent(self._sent, pause_ns)

    # -- rounds ----------------------------------------------------------------------------------------------

    async def _round(self, progress: Callable[[int, int], None], *before: dict[str, Any]) -> None:
        """Send what the current bitmap marks, while the next one marks what is written from now on."""
        marked, following = (f"{self._rounds}{number}" for number in (self._number, self._number + 1))
        backup = {
            "job-id": self._job,
            "device": self._node,
            "target": self._safe,
            "sync": "bitmap",
            "bitmap": marked,
            "bitmap-mode": "never",
        }
        actions = [
            *before,
            {"type": "block-dirty-bitmap-add", "data": {"node": self._node, "name": following}},
            {"type": "blockdev-backup", "data": backup},
        ]
        self._ended, self._error = trio.Event(), ""
        await self._monitor.execute("transaction", {"actions": actions})
        total = 0
        while not self._ended.is_set():
            with trio.move_on_after(LOOK_S):
                await self._ended.wait()
                break
            for job in await self._monitor.execute("query-block-jobs"):
                if job["device"] == self._job:
                    total = int(job["len"])
                    progress(self._sent + int(job["offset"]), self._sent + total)
        # Events come in order: what failed in this round has been heard before its end.
        if self._error or self._missed:
            raise CannotError(self._error or self._missed, again=True)
        self._sent += await self._marked(marked)
        progress(self._sent, self._sent)
        await self._monitor.execute("block-dirty-bitmap-remove", {"node": self._node, "name": marked})
        self._number += 1

    async def _left(self) -> int:
        return await self._marked(f"{self._rounds}{self._number}")

    async def _marked(self, bitmap: str) -> int:
        for node in await self._nodes():
            for one in node.get("dirty-bitmaps", ()):
                if one.get("name") == bitmap:
                    return int(one["count"])
        raise CannotError(f"the dirty bitmap {bitmap} is gone")

    # -- the last round --------------------------------------------------------------------------------------

    async def _finish(self, size: int, progress: Callable[[int, int], None]) -> int:
        async with self._one_at_a_time:
            held = await self._hold()
            began = time.monotonic_ns()
            try:
                done = False
                if held:
                    with trio.move_on_after(HELD_S):
                        done = await self._begin_mirror(progress)
                else:
                    for _ in range(TRIES):
                        done = await self._begin_mirror(progress)
                        if done:
                            break
                        await self._mirror.stop(force=True)
                        await self._open_safe(size)
            finally:
                if held:
                    with trio.CancelScope(shield=True):
                        await self._let_go()
            pause_ns = time.monotonic_ns() - began if held else 0
        if not done:
            raise CannotError(
                f"what is left took longer than {HELD_S:.0f} s, or another program let the guest go"
                if held
                else "the guest never stopped writing"
            )
        return pause_ns

    async def _begin_mirror(self, progress: Callable[[int, int], None]) -> bool:
        """The last round and the mirror's start; was nothing written in between?"""
        if await self._left():
            await self._round(progress)
        await self._close_safe()
        await self._mirror.begin(self._node, "none")
        return await self._left() == 0

    async def _hold(self) -> bool:
        """Hold the guest, if it runs and this QEMU has one."""
        if await self._status() != "running":
            return False
        await self._monitor.execute(
            "blockdev-add", {"driver": "null-co", "node-name": self._held, "size": 512}
        )
        try:
            await self._monitor.execute("stop")
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._let_go()
            raise
        return True

    async def _let_go(self) -> None:
        if await self._status() == "paused":
            await self._monitor.execute("cont")
        await self._monitor.execute("blockdev-del", {"node-name": self._held})

    async def _status(self) -> str:
        try:
            return str((await self._monitor.execute("query-status"))["status"])
        except QmpRefusedError:
            return ""  # a storage daemon has no guest

    # -- what is left behind ---------------------------------------------------------------------------------

    async def _give_up(self) -> None:
        """As far as the monitor still answers; the rest is for who comes next."""
        with trio.move_on_after(ENDING_S) as scope:
            scope.shield = True
            await self.clean()
            await self._mirror.end(force=True)

    async def clean(self) -> None:
        """Take away what an attempt left, of whoever made it. A guest that was held goes on, first of all."""
        there = {node["node-name"] for node in await self._nodes()}
        if self._held in there:
            await self._let_go()
        if self._job in await self._jobs():
            await self._end_job()
            there = {node["node-name"] for node in await self._nodes()}
        for name in (self._safe, self._sink):
            if name in there:
                await self._monitor.execute("blockdev-del", {"node-name": name})
        await self._remove_rounds()

    async def _end_job(self) -> None:
        await self._monitor.execute("block-job-cancel", {"device": self._job, "force": True})
        deadline = trio.current_time() + ENDING_S
        while trio.current_time() < deadline:
            if self._job not in await self._jobs():
                return
            await trio.sleep(ENDING_LOOK_S)
        raise RefusedError(f"QEMU does not end the job {self._job}", hint="it is asked again by itself")

    async def _jobs(self) -> set[str]:
        return {str(job["device"]) for job in await self._monitor.execute("query-block-jobs")}

    async def _remove_rounds(self) -> None:
        for node in await self._nodes():
            for one in node.get("dirty-bitmaps", ()):
                if str(one.get("name", "")).startswith(self._rounds):
                    named = {"node": node["node-name"], "name": one["name"]}
                    await self._monitor.execute("block-dirty-bitmap-remove", named)

    async def _nodes(self) -> list[dict[str, Any]]:
        return list(await self._monitor.execute("query-named-block-nodes", {"flat": True}))

    async def _open_safe(self, size: int) -> None:
        sink = {"driver": "null-co", "node-name": self._sink, "size": size}
        await self._monitor.execute("blockdev-add", sink)
        children = [self._mirror.name, self._sink]
        safe = {"driver": "quorum", "node-name": self._safe, "vote-threshold": 1, "children": children}
        await self._monitor.execute("blockdev-add", safe)

    async def _close_safe(self) -> None:
        for name in (self._safe, self._sink):
            await self._monitor.execute("blockdev-del", {"node-name": name})
