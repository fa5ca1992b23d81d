"""COW snapshots of a running disk that is not QCOW2, through QEMU's copy-before-write filter: create, show, save, delete.

A snapshot is a point in time that QEMU itself keeps, readable over its NBD server, from the moment in which the filter is put in
until it is deleted or QEMU ends: what it knows of copied blocks is in QEMU's memory alone. The guest is never harmed by it: when
its directory is full, or too slow for `TIMEOUT_S`, the snapshot breaks, and every read of it is refused from then on.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from cdpserver import durable, qemu
from cdpserver.errors import BrokenError, CdpError, NotFoundError, RefusedError, UsageError
from cdpserver.names import show
from cdpserver.progress import Progress, nobody
from cdpserver.vm.chain import cownodes
from cdpserver.vm.chain.cownodes import Cow, Door, uri
from cdpserver.vm.chain.cowtree import is_broken, left_files
from cdpserver.vm.chain.graph import Answers, LiveChain, chain_of
from cdpserver.vm.chain.snapshots import ask
from cdpserver.vm.qmp import Monitor, QmpRefusedError

EXPORT_END_S = 30.0
"""How long an export may take to end after it was told to."""

SAFE_THREADS = (9, 0, 0)
"""From this QEMU on a disk in an iothread can be read over NBD."""


@dataclass(frozen=True, slots=True)
class _Made:
    chain: LiveChain
    cow: Cow
    door: Door
    warning: str | None


@dataclass(frozen=True, slots=True)
class Server:
    """QEMU's NBD server: where it listens, and whether it is there for COW snapshots alone."""

    socket: Path
    own: bool

    @classmethod
    def of(cls, monitor_path: Path, given: Path | None) -> "Server":
        """The one that is given; else one beside the monitor."""
        if given is not None:
            return cls(given.absolute(), own=False)
        return cls(monitor_path.absolute().with_name(f"{monitor_path.name}.nbd"), own=True)


async def create(
    monitor: Monitor,
    vm: str,
    disks: Sequence[str],
    *,
    name: str,
    directory: Path | None,
    server: Server,
) -> list[dict[str, Any]]:
    """A COW snapshot of each disk, all at one instant, exported by QEMU's server, which is started if it is ours.

    Refused for all if it is for one. UsageError, RefusedError, BrokenError.
    """
    answers = await ask(monitor)
    token_ns = time.time_ns()
    made = [_planned(answers, disk, name, directory, token_ns) for disk in disks]
    if len({one.chain.root for one in made}) < len(made):
        raise UsageError("one disk is named twice", hint="give each --disk once")
    if len(made) > 1 and (direct := [one.chain.disk for one in made if one.door.raw is None]):
        raise RefusedError(
            f"{', '.join(direct)} has no raw node with a name of its own, and QEMU gives a device a filter alone",
            hint="give one --disk alone, or start QEMU with -blockdev driver=raw,node-name=N,file=...",
        )
    for one in made:
        await _check_thread(monitor, one.chain)
    if server.own:
        await _serve(monitor, server.socket)
    with trio.CancelScope(shield=True):  # a Ctrl-C leaves no half of it
        await _put_in(monitor, answers, made, server)
    return [
        {
            "vm": vm,
            "disk": one.chain.disk,
            "snapshot": name,
            "time_ns": one.cow.time_ns,
            "path": str(one.cow.path),
            "uri": uri(one.cow, server.socket),
            "snapshots": len(cownodes.cows(one.chain, answers.nodes)) + 1,
            "warning": one.warning,
        }
        for one in made
    ]


async def _put_in(monitor: Monitor, answers: Answers, made: Sequence[_Made], server: Server) -> None:
    """All of them, or none."""
    try:
        for one in made:
            await trio.to_thread.run_sync(_file, one)
            for part in cownodes.parts(one.cow, one.door.below, answers.nodes[one.door.below]):
                await monitor.execute("blockdev-add", part)
        await _stand_on(monitor, answers, [(one.door, one.cow.node("cbw")) for one in made])
        for one in made:
            await _show(monitor, one.cow)
    except CdpError:
        for one in made:
            with contextlib.suppress(CdpError):  # what QEMU does not let go is shown by the tree
                await _remove(monitor, one.chain.handle, one.cow)
        await _end_server(monitor, server)
        raise


def _planned(answers: Answers, disk: str, name: str, directory: Path | None, time_ns: int) -> _Made:
    chain = chain_of(answers, disk)
    there = cownodes.cows(chain, answers.nodes)
    warning = cownodes.check_room(chain, there)
    door = cownodes.door(chain)
    disk_path = chain.active.path
    if directory is None and (disk_path is None or chain.active.protocol != "file"):
        raise UsageError(
            f"{disk} is {chain.active.protocol} {chain.active.filename}: what is overwritten needs a place",
            hint="name one with --directory",
        )
    into = directory if directory is not None else chain.active.path.parent if chain.active.path else Path()
    if not into.is_dir():
        raise UsageError(f"there is no directory {into}", hint="give one with --directory")
    path = into / cownodes.file_of(_stem(chain), name)
    if path.exists() or _find(there, name) is not None:
        raise UsageError(f"{path.name} exists", hint="give the snapshot another name: --name")
    return _Made(chain, Cow(cownodes.new_token(time_ns), path), door, warning)


def _stem(chain: LiveChain) -> str:
    return chain.active.path.stem if chain.active.path is not None else chain.disk.rpartition("/")[2]


def _file(made: _Made) -> None:
    """The empty file that takes what is overwritten, for QEMU to open as it opened the disk. UsageError, BrokenError."""
    path, disk = made.cow.path, made.chain.active.path
    assert path is not None
    qemu.create_image(path, size=made.chain.active.size)
    try:
        path.chmod(0o600)
        if disk is not None and os.geteuid() == 0:
            owner = disk.stat()
            os.chown(path, owner.st_uid, owner.st_gid)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise BrokenError(
            f"{path} cannot be made ready: {error.strerror}", hint="look at its directory"
        ) from None


async def _check_thread(monitor: Monitor, chain: LiveChain) -> None:
    """RefusedError for a disk in a thread of its own, if QEMU's NBD server would kill the VM when a reader of it ends.

    Seen with 7.2: `nbd_blockdev_client_closed: Assertion qemu_in_main_thread()`; clients got locks in 9.0.
    """
    if chain.qdev is None or monitor.version >= SAFE_THREADS:
        return
    bus = await _property(monitor, chain.qdev, "parent_bus")
    for device in (chain.qdev, bus.rpartition("/")[0]):  # the disk itself, or its controller
        if await _property(monitor, device, "iothread"):
            version = ".".join(map(str, monitor.version))
            raise RefusedError(
                f"{chain.disk} is in an iothread, where QEMU {version} dies when a reader of its NBD server ends",
                hint="start it without iothread=, or with QEMU 9.0; a point of cdpserver does not need QEMU for it",
            )


async def _property(monitor: Monitor, device: str, name: str) -> str:
    """A property of a device; empty if it has none of this name."""
    try:
        return str(await monitor.execute("qom-get", {"path": device, "property": name}))
    except QmpRefusedError:
        return ""


async def _stand_on(monitor: Monitor, answers: Answers, changes: Sequence[tuple[Door, str]]) -> None:
    """Let raw nodes, all at one instant, or a device stand on other nodes."""
    options = [
        cownodes.reopened(door.raw, node, answers.nodes[door.raw])
        for door, node in changes
        if door.raw is not None
    ]
    if options:
        await monitor.execute("blockdev-reopen", {"options": options})
    for door, node in changes:
        if door.raw is None:
            await monitor.execute("qom-set", {"path": door.device, "property": "drive", "value": node})


async def _show(monitor: Monitor, cow: Cow) -> None:
    """The snapshot itself, and its export. Only once the filter is in: until then the disk's writer forbids it."""
    snap = {"driver": "snapshot-access", "node-name": cow.node("snap"), "file": cow.node("cbw")}
    await monitor.execute("blockdev-add", snap)
    export = {
        "type": "nbd",
        "id": cow.export,
        "node-name": cow.node("snap"),
        "name": cow.export,
        "writable": False,
    }
    await monitor.execute("block-export-add", export)


async def _serve(monitor: Monitor, socket: Path) -> None:
    """QEMU's NBD server listens at `socket`. RefusedError if it has another one, of which nobody can tell us."""
    at = {"type": "unix", "data": {"path": str(socket)}}
    try:
        await monitor.execute("nbd-server-start", {"addr": at})
    except QmpRefusedError as error:
        if "already running" not in error.desc:
            raise
        if not await _listens(socket):
            raise RefusedError(
                "QEMU has an NBD server already, and does not say where it listens",
                hint="say it: --nbd-socket PATH",
            ) from None


async def _listens(socket: Path) -> bool:
    try:
        stream = await trio.open_unix_socket(str(socket))
    except OSError:
        return False
    await stream.aclose()
    return True


async def _end_server(monitor: Monitor, server: Server) -> None:
    """End the server that was started for snapshots, when nothing is exported any more."""
    exports = await monitor.execute("query-block-exports")
    if not server.own or any(export["type"] == "nbd" for export in exports):
        return
    if await _listens(server.socket):
        with contextlib.suppress(QmpRefusedError):  # it ended already
            await monitor.execute("nbd-server-stop")


async def find(monitor: Monitor, disk: str, name: str) -> tuple[Cow, int]:
    """The COW snapshot of this name, and the disk's size in bytes. NotFoundError."""
    answers = await ask(monitor)
    chain = chain_of(answers, disk)
    there = cownodes.cows(chain, answers.nodes)
    cow = _find(there, name)
    if cow is None:
        known = ", ".join(cow.name for cow in there[:8]) or "none"
        raise NotFoundError(f"{chain.disk} has no COW snapshot {show(name)}", hint=f"it has {known}")
    return cow, chain.active.size


def save(cow: Cow, server: Server, output: Path, *, format: str, progress: Progress = nobody) -> None:
    """Write a snapshot to a file of its own, durable on return; the monitor is free meanwhile.

    UsageError, BrokenError, NoSpaceError.
    """
    if output.exists():
        raise UsageError(f"{output} exists", hint="name another file")
    at = uri(cow, server.socket)
    if is_broken(at):
        raise BrokenError(
            f"the snapshot {cow.name} is broken: what was overwritten could not be copied away",
            hint=f"look at the room of {cow.path and cow.path.parent}; delete the snapshot and take another",
        )
    qemu.copy_export(at, output, format=format, progress=progress)


async def delete(monitor: Monitor, disk: str, name: str, *, server: Server) -> dict[str, Any] | None:
    """Take a snapshot away, or what one of an earlier QEMU left; None if the disk has none of this name.

    RefusedError while somebody reads it, or has its file open.
    """
    answers = await ask(monitor)
    chain = chain_of(answers, disk)
    there = cownodes.cows(chain, answers.nodes)
    cow, path = _find(there, name), None
    if cow is None:
        path = next((path for path in left_files(chain) if name == cownodes.name_of(path)), None)
        if path is None:
            return None
        cow = cownodes.half_made(path, answers.nodes)
    path = path if cow is None else cow.path
    size = 0 if path is None else durable.used_bytes(path)
    if cow is not None:
        await _remove(monitor, chain.handle, cow)
        await _end_server(monitor, server)
    elif path is not None:
        await trio.to_thread.run_sync(qemu.check_unused, path)
        path.unlink()
    return {
        "disk": chain.disk,
        "verb": "delete",
        "removed": [name],
        "kept": [],
        "stays": chain.active.name,
        "active": chain.active.name,
        "snapshots": len([other for other in there if other is not cow]),
        "freed_bytes": size,
    }


def _find(there: Sequence[Cow], name: str) -> Cow | None:
    return next((cow for cow in there if name in (cow.name, cow.token)), None)


async def _remove(monitor: Monitor, disk: str, cow: Cow) -> None:
    """Take away whatever there is of a snapshot, however far its creation came."""
    exports = await monitor.execute("query-block-exports")
    if any(export["id"] == cow.export for export in exports):
        try:
            await monitor.execute("block-export-del", {"id": cow.export})
        except QmpRefusedError as error:
            raise RefusedError(f"{cow.name} is being read: {error.desc}", hint="end who reads it") from None
        await _until_gone(monitor, cow)
    await _take_away(monitor, cow.node("snap"))
    answers = await ask(monitor)
    chain = chain_of(answers, disk)
    if any(node == cow.node("cbw") for node, _ in chain.line):
        door = cownodes.door_of(chain, cow)
        await _stand_on(monitor, answers, [(door, door.below)])
    for part in ("cbw", "low", "tmp"):
        await _take_away(monitor, cow.node(part))
    if cow.path is not None:
        cow.path.unlink(missing_ok=True)


async def _take_away(monitor: Monitor, node: str) -> None:
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    if any(found["node-name"] == node for found in nodes):
        await monitor.execute("blockdev-del", {"node-name": node})


async def _until_gone(monitor: Monitor, cow: Cow) -> None:
    with trio.move_on_after(EXPORT_END_S):
        while any(export["id"] == cow.export for export in await monitor.execute("query-block-exports")):
            await monitor.next_event()  # its end is one
        return
    raise RefusedError(f"the export of {cow.name} does not end", hint="end who reads it, then try again")
