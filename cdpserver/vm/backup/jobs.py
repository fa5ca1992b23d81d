"""QEMU's side of a backup: all disks of a VM at one instant, in one transaction.

    guest ──► filter top-N ──► the disk's own node        (before it is overwritten, what is there goes to the target)
                  └── job-N ──► quorum safe-N ──► to-N ──► our target
                                       └───────► sink-N (null-co)

QEMU's backup fails a *guest's* write when it cannot save to its target what is being overwritten. So it writes to a quorum of
which one vote suffices, as a resync does (vm/changes.py): the guest never sees an error. What our target did not take it knows
itself: an error that it answered, or a connection that ended, is the end of the backup.

In the same transaction begins a bitmap that is called after this backup. The older one, which says what is sent, stays as it is
(`bitmap-mode=never`) until the backup is in the repository.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import trio

from cdpserver.errors import BrokenError, RefusedError
from cdpserver.vm.backup.choice import LiveDisk
from cdpserver.vm.qmp import Monitor, QmpRefusedError

LOOK_S = 0.1
"""Between two looks at the jobs and the target."""

MOST_DISKS = 64
"""Of a VM, where nobody can tell."""

ENDING_S = 60.0
"""A job that is cancelled waits for what it has under way."""


class Jobs:
    """The jobs, nodes and bitmaps whose names begin with `prefix`. Methods raise what the monitor does."""

    def __init__(self, monitor: Monitor, prefix: str) -> None:
        self._monitor = monitor
        self._prefix = prefix

    def _name(self, what: str, number: int) -> str:
        return f"{self._prefix}{what}-{number}"

    async def open_target(self, number: int, disk: LiveDisk, node: dict[str, Any]) -> None:
        """Let QEMU open what disk number `number` goes to. QmpRefusedError."""
        to, sink = self._name("to", number), self._name("sink", number)
        await self._add(node | {"node-name": to})
        await self._add({"driver": "null-co", "node-name": sink, "size": disk.size})
        quorum = {"driver": "quorum", "vote-threshold": 1, "children": [to, sink]}
        await self._add(quorum | {"node-name": self._name("safe", number)})

    async def _add(self, node: dict[str, Any]) -> None:
        await self._monitor.execute("blockdev-add", node)

    async def start(self, disks: Sequence[LiveDisk], id_: str, parent: str, *, granularity: int) -> None:
        """Begin at one instant: the jobs to the targets that are open, and the bitmaps for the next backup. QmpRefusedError."""
        actions: list[dict[str, Any]] = []
        for number, disk in enumerate(disks):
            bitmap = {"node": disk.node, "name": self._prefix + id_, "granularity": granularity}
            what: dict[str, Any] = {"sync": "full"}
            if parent:
                what = {"sync": "bitmap", "bitmap": self._prefix + parent, "bitmap-mode": "never"}
            job = {
                "job-id": self._name("job", number),
                "device": disk.node,
                "target": self._name("safe", number),
                "filter-node-name": self._name("top", number),
                "auto-dismiss": False,
            }
            actions.append({"type": "block-dirty-bitmap-add", "data": bitmap})
            actions.append({"type": "blockdev-backup", "data": job | what})
        await self._monitor.execute("transaction", {"actions": actions})

    async def follow(
        self, look: Callable[[], Awaitable[bool]], progress: Callable[[int, int], None]
    ) -> list[int]:
        """Until all have ended well: how many bytes each has written. BrokenError, and what `look` raises.

        `look` says whether the target has much to do still.
        """
        paused = False
        while True:
            much = await look()  # what it has to say counts more than what QEMU says
            jobs = await self._jobs()
            for job in jobs:
                if job.get("error"):
                    raise BrokenError(
                        f"QEMU's backup job failed: {job['error']}", hint="make the backup again"
                    )
            running = [job for job in jobs if job["status"] != "concluded"]
            if not running:
                break
            if much != paused:
                paused = much
                for job in running:
                    with contextlib.suppress(QmpRefusedError):  # it has ended
                        await self._monitor.execute(
                            "job-pause" if paused else "job-resume", {"id": job["id"]}
                        )
            progress(sum(j["current-progress"] for j in jobs), sum(j["total-progress"] for j in jobs))
            await trio.sleep(LOOK_S)
        if not jobs:
            raise BrokenError("QEMU's backup jobs are gone", hint="make the backup again")
        await self._dismiss(jobs)
        totals = {str(job["id"]): int(job["total-progress"]) for job in jobs}
        return [totals[self._name("job", number)] for number in range(len(totals))]

    async def _jobs(self) -> list[dict[str, Any]]:
        said = await self._monitor.execute("query-jobs")
        return [job for job in said if str(job["id"]).startswith(self._prefix)]

    async def _dismiss(self, jobs: Iterable[dict[str, Any]]) -> None:
        for job in jobs:
            await self._monitor.execute("job-dismiss", {"id": job["id"]})

    async def clean(self) -> None:
        """End jobs and take nodes away, whoever began them. RefusedError if that takes too long."""
        for job in await self._jobs():
            with contextlib.suppress(QmpRefusedError):  # it has ended, or is ending
                await self._monitor.execute("job-cancel", {"id": job["id"]})
        deadline = trio.current_time() + ENDING_S
        while jobs := await self._jobs():
            await self._dismiss(job for job in jobs if job["status"] == "concluded")
            if trio.current_time() > deadline:
                raise RefusedError(
                    f"QEMU does not end the job {jobs[0]['id']}", hint="try again when it has ended"
                )
            await trio.sleep(0 if all(job["status"] == "concluded" for job in jobs) else LOOK_S)
        for name in await self._targets():
            with contextlib.suppress(
                QmpRefusedError
            ):  # none of that name; one in use is in the way of the next, which says so
                await self._monitor.execute("blockdev-del", {"node-name": name})

    async def _targets(self) -> list[str]:
        """Nodes that `open_target` added, in the order in which they can go."""
        kinds = ("safe", "to", "sink")
        try:
            there = {str(node["node-name"]) for node in await self.nodes()}
        except QmpRefusedError:
            # A target's image whose file is gone: QEMU lists no nodes at all until that is closed.
            return [self._name(kind, number) for kind in kinds for number in range(MOST_DISKS)]
        return [name for kind in kinds for name in there if name.startswith(f"{self._prefix}{kind}-")]

    async def forget(self, these: Callable[[str], bool]) -> None:
        """Remove the bitmaps that began with such backups, by their ids."""
        for node in await self.nodes():
            for one in node.get("dirty-bitmaps", ()):
                name = str(one.get("name", ""))
                if name.startswith(self._prefix) and these(name.removeprefix(self._prefix)):
                    named = {"node": node["node-name"], "name": name}
                    await self._monitor.execute("block-dirty-bitmap-remove", named)

    async def nodes(self) -> list[dict[str, Any]]:
        """Every node of QEMU."""
        return list(await self._monitor.execute("query-named-block-nodes", {"flat": True}))
