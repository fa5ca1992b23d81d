"""Moving one disk of a running VM from a fork's export to a file at home, or back, over QMP.

Every node and job has a name that follows from the recovery and the number of the disk, and finished jobs stay until they are
dismissed: whoever comes later finds what was begun, and how it ended.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import trio

from cdpserver.errors import BrokenError, RefusedError
from cdpserver.vm.qmp import Monitor, QmpRefusedError
from cdpserver.vm.recovery.graph import read_graph
from cdpserver.vm.recovery.record import RecoveredDisk

LOOK_S = 0.02
"""Between two looks at a job that is about to end."""

RECONNECT_S = 30
"""How long QEMU holds writes to a fork while its server is away, on the way back."""

DEFAULT_PORT = 10809


class MoveFailedError(BrokenError):
    """The copy ended with an error; the VM goes on where it was."""

    usual_hint = "look at the reason, then: cdp recover retry"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is."""

    copied: int
    total: int
    ready: bool


class Move:
    """One disk in one QEMU. `number` is the disk's in the recovery."""

    def __init__(self, monitor: Monitor, id: str, number: int, disk: RecoveredDisk, fork_uri: str) -> None:
        stem = f"cdp-{id.rpartition('-')[2]}-{number}"
        self.disk = disk
        self._monitor = monitor
        self._fork_uri = fork_uri
        self._job = stem
        self._file, self._home, self._fork = f"{stem}-file", f"{stem}-home", f"{stem}-fork"

    # -- where the VM is -------------------------------------------------------------------------------------

    async def is_on_fork(self) -> bool:
        """Does the VM's disk stand on the fork's export?"""
        graph = await read_graph(self._monitor)
        return any(graph.is_used(node) for node in graph.on_export(self.disk.fork))

    async def is_home(self) -> bool:
        """Does the VM's disk stand on the file at home, and no copy is under way?"""
        return await self._status() is None and (await read_graph(self._monitor)).is_used(self._home)

    async def is_under_way(self) -> bool:
        """Is there a copy, also one that has just ended?"""
        return await self._status() is not None

    # -- copying ---------------------------------------------------------------------------------------------

    async def begin_home(self) -> None:
        """Make the file and begin to copy to it. What an earlier try left in QEMU goes first."""
        await self.clear()
        file = {"driver": "file", "filename": self.disk.target}
        size = self.disk.size if self.disk.format == "raw" else 0
        await self._make({**file, "size": size})
        await self._monitor.execute("blockdev-add", {**file, "node-name": self._file, "discard": "unmap"})
        if self.disk.format == "qcow2":
            await self._make({"driver": "qcow2", "file": self._file, "size": self.disk.size})
        # With discard=unmap QEMU zeroes the file first, which costs nothing in a new one, and then copies what is no zero.
        over = {"driver": self.disk.format, "file": self._file, "discard": "unmap"}
        await self._monitor.execute("blockdev-add", {**over, "node-name": self._home})
        graph = await read_graph(self._monitor)
        used = [node for node in graph.on_export(self.disk.fork) if graph.is_used(node)]
        if not used:
            raise MoveFailedError(f"the VM has left {self.disk.fork}")
        await self._mirror(graph.top(used[0]), self._home)

    async def begin_back(self) -> None:
        """Begin to copy from home to the fork. Without discard=unmap: the fork is not zeroed before it is filled again."""
        await self.clear(keep_home=True)
        server, export = nbd_server(self._fork_uri)
        node = {"driver": "nbd", "node-name": self._fork, "server": server, "export": export}
        await self._monitor.execute("blockdev-add", {**node, "reconnect-delay": RECONNECT_S})
        graph = await read_graph(self._monitor)
        if not graph.is_used(self._home):
            raise MoveFailedError(f"the VM does not run on {self.disk.target}")
        await self._mirror(graph.top(self._home), self._fork)

    async def _mirror(self, device: str, target: str) -> None:
        arguments = {
            "job-id": self._job,
            "device": device,
            "target": target,
            "sync": "full",
            "copy-mode": "write-blocking",
            "on-source-error": "report",
            "on-target-error": "report",
            "auto-dismiss": False,
        }
        await self._monitor.execute("blockdev-mirror", arguments)

    async def _make(self, options: dict[str, Any]) -> None:
        """`blockdev-create`, to its end."""
        job = f"{self._job}-make"
        await self._monitor.execute("blockdev-create", {"job-id": job, "options": options})
        await self._ended(job)

    async def progress(self) -> Progress:
        """How far it is. MoveFailedError if it has ended."""
        found = await self._status()
        if found is None:
            raise MoveFailedError(
                "QEMU knows nothing of the copy any more: it was started anew, or somebody ended it"
            )
        if found["status"] in ("concluded", "aborting", "null"):
            await self._ended(self._job)
            raise MoveFailedError("the copy was ended by somebody else")
        shown = await self._monitor.execute("query-block-jobs")
        of_it = [job for job in shown if job["device"] == self._job]
        ready = bool(of_it and of_it[0]["ready"] and of_it[0]["io-status"] == "ok")
        return Progress(int(found["current-progress"]), int(found["total-progress"]), ready)

    async def pivot(self) -> None:
        """Let the VM's disk stand on the copy; returns when it does. MoveFailedError: it stands where it stood."""
        found = await self._status()
        if found is not None and found["status"] == "ready":
            await self._monitor.execute("job-complete", {"id": self._job})
        if found is not None:
            await self._ended(self._job)

    async def let_go_of_fork(self) -> None:
        """Close the connections to the fork's export. RefusedError if the VM still has one."""
        graph = await read_graph(self._monitor)
        said = ""
        for node in graph.on_export(self.disk.fork):
            for above in graph.way_up(node):
                said = await self._delete(above) or said
        if (await read_graph(self._monitor)).on_export(self.disk.fork):
            raise RefusedError(
                f"the VM keeps a connection to {self.disk.fork}: {said}", hint="look at its block nodes"
            )

    # -- ending ----------------------------------------------------------------------------------------------

    async def clear(self, *, keep_home: bool = False) -> None:
        """Cancel the copy and take away its nodes; the VM stays where it is."""
        await self._end_of(f"{self._job}-make")  # the one who began it may have been cancelled
        if (found := await self._status()) is not None:
            if found["status"] not in ("concluded", "null"):
                await self._monitor.execute("job-cancel", {"id": self._job})
            await self._end_of(self._job)
        nodes = [self._fork] if keep_home else [self._home, self._file]
        graph = await read_graph(self._monitor)
        for node in nodes:
            if node in graph.names and (said := await self._delete(node)):
                raise RefusedError(f"QEMU keeps {node}: {said}", hint="look at its block nodes")

    async def _delete(self, node: str) -> str:
        """Delete a node; why QEMU would not, or an empty text. Nodes that QEMU made for itself go by themselves."""
        try:
            await self._monitor.execute("blockdev-del", {"node-name": node})
        except QmpRefusedError as error:
            return error.desc
        return ""

    # -- jobs ------------------------------------------------------------------------------------------------

    async def _status(self) -> dict[str, Any] | None:
        return await self._job_of(self._job)

    async def _job_of(self, id: str) -> dict[str, Any] | None:
        jobs: list[dict[str, Any]] = await self._monitor.execute("query-jobs")
        return next((job for job in jobs if job["id"] == id), None)

    async def _ended(self, id: str) -> None:
        """Wait for the end of a job and dismiss it. MoveFailedError with its error."""
        if reason := await self._end_of(id):
            raise MoveFailedError(f"QEMU could not copy {self.disk.disk}: {reason}")

    async def _end_of(self, id: str) -> str:
        """Wait for the end of a job and dismiss it; its error, or an empty text."""
        while True:
            found = await self._job_of(id)
            if found is None:
                return ""
            if found["status"] == "concluded":
                break
            await trio.sleep(LOOK_S)
        await self._monitor.execute("job-dismiss", {"id": id})
        return str(found.get("error", ""))


def nbd_server(uri: str) -> tuple[dict[str, Any], str]:
    """The `server` and `export` of QEMU's NBD driver for one of our URIs."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd":
        return {"type": "inet", "host": parts.hostname, "port": str(parts.port or DEFAULT_PORT)}, export
    return {"type": "unix", "path": parse_qs(parts.query)["socket"][0]}, export
