"""Moving one disk of a running VM from a fork's export to its place at home, or back, over QMP.

Every node and job has a name that follows from the recovery and the number of the disk, and finished jobs stay until they are
dismissed: whoever comes later finds what was begun, and how it ended. A VM that is at home is found by the name of its file,
since it may have been started anew.
"""

import os
import stat
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cdpserver.errors import RefusedError
from cdpserver.vm.qmp import Monitor, QmpRefusedError
from cdpserver.vm.recovery import jobs
from cdpserver.vm.recovery.graph import Graph, read_graph
from cdpserver.vm.recovery.jobs import MoveFailedError, Progress
from cdpserver.vm.recovery.record import RecoveredDisk

RECONNECT_S = 30
"""How long QEMU holds requests while the server is away."""

DEFAULT_PORT = 10809


class Move:
    """One disk in one QEMU. `number` is the disk's in the recovery."""

    sync = "full"
    """What the mirror home copies (QMP's `MirrorSyncMode`)."""

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
        return bool(self._on_fork(await self._graph()))

    def _on_fork(self, graph: Graph) -> list[str]:
        return graph.used_on_export(self.disk.fork)

    @property
    def expected(self) -> str:
        """What the VM is to run on, in words: where its newest content is."""
        return f"the export {self.disk.fork}" if self.disk.at == "fork" else self.disk.target

    async def is_there(self) -> bool:
        """Does the VM run where its newest content is? MoveFailedError if it runs where that is not any more."""
        if self.disk.at == "fork":
            return await self.is_on_fork()
        if await self.is_on_fork() and not await self.is_under_way():
            raise MoveFailedError(
                f"the VM runs on {self.disk.fork}, and its newest content is in {self.disk.target}",
                hint="end that QEMU, start one on what cdp recover show says, then: cdp recover retry",
            )
        return self._at_home(await self._graph()) is not None

    async def is_home(self) -> bool:
        """Does the VM's disk stand on what is at home, and no copy is under way?"""
        return not await self.is_under_way() and self._at_home(await self._graph()) is not None

    async def is_under_way(self) -> bool:
        """Is there a copy, also one that has just ended?"""
        return await jobs.find(self._monitor, self._job) is not None

    async def _graph(self) -> Graph:
        return await read_graph(self._monitor)

    def _at_home(self, graph: Graph) -> str | None:
        """The node of the image at home that the VM stands on."""
        return graph.image(self.disk.target, self.disk.format)

    async def home_node(self) -> str:
        """The same, asked of QEMU now. MoveFailedError."""
        if (found := self._at_home(await self._graph())) is None:
            raise MoveFailedError(f"the VM does not run on {self.disk.target}")
        return found

    # -- copying ---------------------------------------------------------------------------------------------

    async def begin_home(self) -> None:
        """Make what is to be at home and begin to copy to it. What an earlier try left in QEMU goes first."""
        await self.clear()
        await self._make_home()
        used = self._on_fork(graph := await self._graph())
        if not used:
            raise MoveFailedError(f"the VM has left {self.disk.fork}")
        await self._mirror(graph.top(used[0]), self._home, self.sync)

    async def _make_home(self) -> None:
        disk = self.disk
        device = _is_device(disk.target)
        file = {"driver": "host_device" if device else "file", "filename": disk.target}
        if not device:
            await self._make({**file, "size": disk.size if disk.format == "raw" else 0})
        await self._monitor.execute("blockdev-add", {**file, "node-name": self._file, "discard": "unmap"})
        if disk.format == "qcow2":
            await self._make({"driver": "qcow2", "file": self._file, "size": disk.size})
        # With discard=unmap QEMU zeroes the file first, which costs nothing in a new one, and then copies what is no zero.
        over: dict[str, Any] = {"driver": disk.format, "file": self._file, "discard": "unmap"}
        if device and disk.format == "raw":
            over["size"] = disk.size  # the device may be larger
        await self._monitor.execute("blockdev-add", {**over, "node-name": self._home})

    async def begin_back(self) -> None:
        """Begin to copy from home to the fork. Without discard=unmap: the fork is not zeroed before it is filled again."""
        await self.clear(keep_home=True)
        server, export = nbd_server(self._fork_uri)
        node = {"driver": "nbd", "node-name": self._fork, "server": server, "export": export}
        await self._monitor.execute("blockdev-add", {**node, "reconnect-delay": RECONNECT_S})
        home = await self.home_node()
        await self._mirror((await self._graph()).top(home), self._fork, "full")

    async def _mirror(self, device: str, target: str, sync: str) -> None:
        arguments = {
            "job-id": self._job,
            "device": device,
            "target": target,
            "sync": sync,
            "copy-mode": "write-blocking",
            "on-source-error": "report",
            "on-target-error": "report",
            "auto-finalize": False,
            "auto-dismiss": False,
        }
        await self._monitor.execute("blockdev-mirror", arguments)

    async def _make(self, options: dict[str, Any]) -> None:
        """`blockdev-create`, to its end."""
        job = f"{self._job}-make"
        await self._monitor.execute("blockdev-create", {"job-id": job, "options": options})
        await jobs.ended(self._monitor, job, self.disk.disk)

    async def progress(self) -> Progress:
        """How far it is. MoveFailedError if it has ended."""
        found = await jobs.find(self._monitor, self._job)
        if found is None:
            raise MoveFailedError(jobs.UNKNOWN)
        if found["status"] in jobs.OVER:
            await jobs.ended(self._monitor, self._job, self.disk.disk)
            raise MoveFailedError("the copy was ended by somebody else")
        shown = await jobs.find_block_job(self._monitor, self._job)
        ready = shown is not None and shown["ready"] and shown["io-status"] == "ok"
        ready = ready or found["status"] == "pending"
        return Progress(int(found["current-progress"]), int(found["total-progress"]), bool(ready))

    async def hold(self) -> None:
        """Let the copy be whole and durable; what the guest asks of the disk waits from here on. MoveFailedError.

        QEMU drains the source, flushes the target, and stays so until the job is finalized or cancelled.
        """
        found = await jobs.find(self._monitor, self._job)
        if found is not None and found["status"] == "ready":
            await self._monitor.execute("job-complete", {"id": self._job})
        if found is not None and not await jobs.is_pending(self._monitor, self._job):
            await jobs.ended(self._monitor, self._job, self.disk.disk)

    async def pivot(self) -> None:
        """Let the VM's disk stand on the copy, and go on. MoveFailedError: it goes on where it stood."""
        if await jobs.find(self._monitor, self._job) is not None:
            if await jobs.is_pending(self._monitor, self._job):
                await self._monitor.execute("job-finalize", {"id": self._job})
            await jobs.ended(self._monitor, self._job, self.disk.disk)

    async def settle(self) -> None:
        """What the VM has at home is durable there. MoveFailedError."""
        await jobs.flush(self._monitor, await self.home_node())

    async def let_go(self) -> None:
        """Close the connections to what the VM was started from. RefusedError if it still has one."""
        await self._close(self.disk.fork)

    async def _close(self, export: str) -> None:
        graph = await self._graph()
        said = ""
        for node in graph.on_export(export):
            for above in graph.way_up(node):
                said = await self._delete(above) or said
        if (await self._graph()).on_export(export):
            raise RefusedError(
                f"the VM keeps a connection to {export}: {said}", hint="look at its block nodes"
            )

    # -- ending ----------------------------------------------------------------------------------------------

    async def clear(self, *, keep_home: bool = False) -> None:
        """Cancel the copy and take away its nodes; the VM stays where it is."""
        await jobs.end_of(self._monitor, f"{self._job}-make")  # the one who began it may have been cancelled
        await jobs.cancel(self._monitor, self._job)
        nodes = [self._fork] if keep_home else [self._home, self._file]
        graph = await self._graph()
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


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def nbd_server(uri: str) -> tuple[dict[str, Any], str]:
    """The `server` and `export` of QEMU's NBD driver for one of our URIs."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd":
        return {"type": "inet", "host": parts.hostname, "port": str(parts.port or DEFAULT_PORT)}, export
    return {"type": "unix", "path": parse_qs(parts.query)["socket"][0]}, export
