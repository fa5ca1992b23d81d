"""The mirror of one disk: QEMU's job that sends every write of a guest to us, before the guest hears that it is done.

    guest ──► filter PREFIX-top ──► the disk's own node
                     └── job PREFIX ──► node PREFIX (NBD) ──► our target

Job and nodes are named after the timeline's uuid, so that whoever looks finds them again, and nobody takes another disk's for it.
`on-target-error=stop`: a write that we did not take is remembered by QEMU as a dirty place, the guest never hears of it, and the
job stands until it is resumed. From QEMU 8.2 on the copy runs in the background, which spares the guest, and is made
write-blocking before it counts as in sync.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import trio

from cdpserver.errors import RefusedError
from cdpserver.vm import tls
from cdpserver.vm.disks import OURS
from cdpserver.vm.qmp import Monitor, QmpRefusedError
from cdpserver.vm.record import Method

Sync: TypeAlias = Literal["full", "none"]

RECONNECT_S = 1
"""How long a guest's write waits for a target that is gone: it is back in 0.1 s, and with the time that it takes to notice a hung
one that stays within the two seconds that a guest may wait."""

WAIT_S = 600
"""The same where the guest is to wait rather than leave a gap."""

LATER_WRITE_BLOCKING = (8, 2, 0)
"""The first QEMU with `block-job-change`."""

FILTER = "-top"
CREDENTIAL = "-tls"

ENDING_S = 5.0
ENDING_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """What `query-block-jobs` says of a mirror."""

    status: str
    ready: bool
    io_status: str
    done: int
    total: int

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "Job":
        """From one entry of the answer."""
        return cls(
            status=str(said["status"]),
            ready=bool(said["ready"]),
            io_status=str(said["io-status"]),
            done=int(said["offset"]),
            total=int(said["len"]),
        )

    @property
    def ok(self) -> bool:
        """No error that is not resumed."""
        return self.io_status == "ok"

    @property
    def stands(self) -> bool:
        """It was stopped by an error, or paused by somebody."""
        return not self.ok or self.status in ("paused", "standby")

    @property
    def in_sync(self) -> bool:
        """Everything copied, and no error that is not resumed: all that QEMU shows before 8.2."""
        return self.ready and self.status == "ready" and self.ok and self.done == self.total


def nbd_node(uri: str, *, reconnect_s: int) -> dict[str, Any]:
    """The arguments of `blockdev-add` for a disk's URI (`nbd+unix`, `nbd`, `nbds`), but for node and credential."""
    parts = urlsplit(uri)
    server: dict[str, Any]
    if parts.scheme in ("nbd", "nbds"):
        server = {
            "type": "inet",
            "host": parts.hostname,
            "port": str(parts.port or 10809),
            "keep-alive": True,
        }
    else:
        server = {"type": "unix", "path": parse_qs(parts.query)["socket"][0]}
    return {
        "driver": "nbd",
        "server": server,
        "export": unquote(parts.path.removeprefix("/")),
        "discard": "unmap",
        "reconnect-delay": reconnect_s,
    }


def mirror_uri(uri: str, uuid: str) -> str:
    """The URI of a disk as its mirror opens it: only if its timeline is the one with this uuid, and in the place of any other."""
    place, query, rest = uri.partition("?")
    return f"{place}:{uuid}{query}{rest}"


def waiting_uri(uri: str, uuid: str) -> str:
    """Of such a URI the one of a mirror whose guest waits for room rather than leave a gap."""
    return uri.replace(f":{uuid}", f":{uuid}:wait", 1)


def disk_uri(uri: str, uuid: str) -> str:
    """Of such a URI the disk's own, which may be opened beside its mirror."""
    return uri.replace(f":{uuid}", "", 1)


class Mirror:
    """The mirror of the disk with this uuid, by way of a monitor. Its methods raise what the monitor does."""

    def __init__(self, monitor: Monitor, uuid: str) -> None:
        self.name = uuid if uuid.startswith(OURS) else OURS + uuid.replace("-", "")[:16]
        self.filter = self.name + FILTER
        self._credential = self.name + CREDENTIAL
        self._monitor = monitor

    async def look(self) -> Job | None:
        """The job as it is; None without one."""
        for said in await self._monitor.execute("query-block-jobs"):
            if said["device"] == self.name:
                return Job.read(said)
        return None

    async def leads_to(self, uri: str) -> bool:
        """Is the node that the job writes to at this URI?"""
        wanted = tls.name_in_node(uri)
        for node in await self._nodes():
            if node["node-name"] == self.name:
                return unquote(str(node["file"])) == wanted
        return False

    async def _nodes(self) -> list[Any]:
        return list(await self._monitor.execute("query-named-block-nodes", {"flat": True}))

    async def start(self, node: str, uri: str, *, method: Method, wait: bool) -> None:
        """Start the job on a node of QEMU, for the whole disk. QmpRefusedError; then nothing of it is left."""
        if method == "drive-mirror":
            await self._delete_node()
            whole = {"driver": "raw", "file": await self._target(uri, wait=wait)}
            drive = {"format": "raw", "mode": "existing", "target": f"json:{json.dumps(whole)}"}
            await self._monitor.execute("drive-mirror", self._arguments(node, "full") | drive)
            return
        await self.open_target(uri, wait=wait)
        try:
            await self.begin(node, "full")
        except QmpRefusedError:
            await self._delete_node()
            raise

    async def _target(self, uri: str, *, wait: bool) -> dict[str, Any]:
        node = nbd_node(uri, reconnect_s=WAIT_S if wait else RECONNECT_S) | {"node-name": self.name}
        if (credential := tls.Credential.of(uri)) is None:
            return node
        await tls.hand_over(self._monitor, self._credential, credential)
        return node | {"tls-creds": self._credential}

    def _arguments(self, node: str, sync: Sync) -> dict[str, Any]:
        return {
            "job-id": self.name,
            "device": node,
            "sync": sync,
            "copy-mode": "background" if self._changes_later else "write-blocking",
            "on-target-error": "stop",
        }

    async def open_target(self, uri: str, *, wait: bool) -> None:
        """Let QEMU connect to the target, anew if it is connected. QmpRefusedError."""
        await self._delete_node()
        await self._monitor.execute("blockdev-add", await self._target(uri, wait=wait))

    async def begin(self, node: str, sync: Sync) -> None:
        """Start the job from a node of QEMU to the target that is open; `none`: of what comes from now on. QmpRefusedError."""
        names = {"target": self.name, "filter-node-name": self.filter}
        await self._monitor.execute("blockdev-mirror", self._arguments(node, sync) | names)

    @property
    def _changes_later(self) -> bool:
        return self._monitor.version >= LATER_WRITE_BLOCKING

    async def make_write_blocking(self) -> None:
        """From here on the guest's writes come in their order, if they did not already."""
        if self._changes_later:
            change = {"id": self.name, "type": "mirror", "copy-mode": "write-blocking"}
            await self._monitor.execute("block-job-change", change)

    async def resume(self) -> None:
        """Let a job that stands go on; nothing if it goes on already."""
        with contextlib.suppress(QmpRefusedError):
            await self._monitor.execute("block-job-resume", {"device": self.name})

    async def free_guest(self) -> bool:
        """Let no write of the guest wait for a target that hangs; the job is ended, to be started anew. False if QEMU cannot.

        A qemu-storage-daemon has no `yank`. Without one nothing is tried: a job that is cancelled waits for what it has sent, and
        all of QEMU with it.
        """
        try:
            yank = {"instances": [{"type": "block-node", "node-name": self.name}]}
            await self._monitor.execute("yank", yank)
        except QmpRefusedError:
            return False
        await self._cancel(force=True)
        return True

    async def end_others(self, node: str) -> None:
        """End the mirrors of ours that a node has besides: to timelines that were its target before, and are so no more."""
        nodes = await self._nodes()
        file = next((one.get("file") for one in nodes if one["node-name"] == node), None)
        for one in nodes:
            name = str(one["node-name"])
            if (
                name.startswith(OURS)
                and name.endswith(FILTER)
                and one.get("file") == file
                and name != self.filter
            ):
                await Mirror(self._monitor, name.removesuffix(FILTER)).end(force=True)

    async def end(self, *, force: bool = False) -> None:
        """End the job and take the node away; RefusedError if that takes too long.

        Not forced, a job in sync leaves a target that is whole.
        """
        await self.stop(force=force)
        await self._delete_node()
        await tls.take_back(self._monitor, self._credential)

    async def stop(self, *, force: bool) -> None:
        """End the job; the target stays open. RefusedError if that takes too long."""
        await self._cancel(force=force)
        deadline = trio.current_time() + ENDING_S
        while trio.current_time() < deadline:
            if await self.look() is None:
                return
            await trio.sleep(ENDING_LOOK_S)
        raise RefusedError(f"QEMU does not end the job {self.name}", hint="it is asked again by itself")

    async def _cancel(self, *, force: bool) -> None:
        # Gone already, or ending: both are what is wanted.
        with contextlib.suppress(QmpRefusedError):
            await self._monitor.execute("block-job-cancel", {"device": self.name, "force": force})

    async def _delete_node(self) -> None:
        if any(node["node-name"] == self.name for node in await self._nodes()):
            await self._monitor.execute("blockdev-del", {"node-name": self.name})
