"""A backup of a running VM from beginning to end.

    clean up after one that was killed ─► disks, bitmaps ─► full or incremental? ─► target and nodes
      ─► [guest frozen] ─► transaction ─► [thawed] ─► the jobs end ─► commit ─► older bitmaps go

Killed at any step: before the commit there is no backup, and the bitmap of the last one still marks all that changed since; the
bitmap that began is of a backup that is not there, and goes with the next run. After the commit it counts. See choice.py.
"""

import contextlib
import hashlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from cdpserver.errors import CdpError, RefusedError
from cdpserver.journal.control import Grade
from cdpserver.repository import sessions
from cdpserver.repository.place import Place
from cdpserver.repository.pushed import Intent, Sent
from cdpserver.repository.repository import Repository
from cdpserver.repository.take import MAX_INCREMENTS, Choice
from cdpserver.vm import disks as found_disks
from cdpserver.vm import frozen
from cdpserver.vm.backup.choice import LiveDisk, choose, prefix_of, read_marks
from cdpserver.vm.backup.jobs import LOOK_S, Jobs
from cdpserver.vm.backup.receiver import Where, receiving
from cdpserver.vm.backup.sshfs import SSH
from cdpserver.vm.backup.staged import staging
from cdpserver.vm.backup.transport import Transport
from cdpserver.vm.disks import OURS, FoundDisk
from cdpserver.vm.mirror import FILTER
from cdpserver.vm.qmp import Monitor, QmpClosedError, QmpRefusedError
from cdpserver.vm.record import Connection
from cdpserver.vm.virt import LibvirtMonitor

MOUNT_S = 60.0
"""How long a link to the VM's host may take to be there."""

CLEANING_S = 90.0
"""What is given up is cleaned up for no longer; the next run does the rest."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for. `agent` is the address of the guest's agent (vm/guest_agent.py), for a guest that is to be frozen."""

    vm: str
    disks: Sequence[str] = ()
    full: bool = False
    max_increments: int = MAX_INCREMENTS
    agent: str | None = None
    or_crash: bool = False
    user: int | None = None
    """Who QEMU runs as, if that is known; libvirt is asked."""
    sshfs: "Sshfs | None" = None
    """The backup comes this way, and not by NBD."""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sshfs:
    """The host where QEMU runs, a directory here that files may wait in, and how ssh is called."""

    host: str
    staging: Path
    ssh: Sequence[str] = SSH


@contextlib.contextmanager
def alone(place: Place, connection: Connection) -> Iterator[str]:
    """One at a time for a VM and a repository; a name that is theirs. RefusedError."""
    who = f"live-{hashlib.sha256(f'{socket.gethostname()} {connection}'.encode()).hexdigest()[:24]}"
    try:
        with sessions.session(place, who):
            yield who
    except RefusedError as error:
        if "is held by another" in error.message:
            raise RefusedError(
                "another process backs up this VM into this repository", hint="try again when it has ended"
            ) from None
        raise


async def back_up(
    monitor: Monitor,
    repository: Repository,
    where: Where,
    wanted: Wanted,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """What `cdp backup show` tells of the backup, and `not_frozen`. In `alone`; the error if there is none."""
    prefix = prefix_of(repository.config.id)
    jobs = Jobs(monitor, prefix)
    await jobs.clean()
    disks = await _disks(monitor, wanted, prefix)
    choice = choose(repository, wanted.vm, disks, full=wanted.full, max_increments=wanted.max_increments)
    there = set(repository.backup_ids())
    await jobs.forget(lambda backup: backup not in there)  # of runs that were killed
    created_ns = time.time_ns()
    intent = _intent(wanted, choice, disks, created_ns)
    run = _Run(jobs, wanted, disks, intent)
    async with await _transport(monitor, repository, where, wanted, intent) as transport:
        try:
            made = await run.make(transport, granularity=repository.chunk_size, progress=progress)
            await jobs.clean()
        except BaseException:
            await run.give_up(transport)
            raise
    await jobs.forget(lambda backup: backup != intent.id)
    return made


async def _transport(
    monitor: Monitor, repository: Repository, where: Where, wanted: Wanted, intent: Intent
) -> AbstractAsyncContextManager[Transport]:
    if wanted.sshfs is not None:
        return staging(repository, intent, wanted.sshfs.staging, host=wanted.sshfs.host, ssh=wanted.sshfs.ssh)
    user = await monitor.user() if isinstance(monitor, LibvirtMonitor) else wanted.user
    return receiving(where, intent, user=user)


async def _disks(monitor: Monitor, wanted: Wanted, prefix: str) -> list[LiveDisk]:
    try:
        blocks = await monitor.execute("query-block")
    except QmpRefusedError:
        blocks = []
    nodes = {str(node["node-name"]): node for node in await Jobs(monitor, prefix).nodes()}
    chosen = found_disks.choose(blocks, nodes.values(), wanted.disks)
    return [_live(wanted.vm, one, nodes[one.node], prefix) for one in chosen]


def _live(vm: str, found: FoundDisk, node: dict[str, Any], prefix: str) -> LiveDisk:
    if found.node.startswith(OURS) and found.node.endswith(FILTER):
        raise RefusedError(
            f"{found.name} of {vm} is protected here",
            hint=f"back up a point of it: cdp backup run {vm}@latest",
        )
    return LiveDisk(
        name=f"{vm}/{found.name}",
        node=found.node,
        size=found.size,
        allocated=int(node["image"].get("actual-size", 0)),
        marks=read_marks(node, prefix),
    )


def _intent(wanted: Wanted, choice: Choice, disks: Sequence[LiveDisk], created_ns: int) -> Intent:
    return Intent(
        id=sessions.new_id(created_ns),
        created_ns=created_ns,
        vm=wanted.vm,
        kind=choice.kind,
        reason=choice.reason,
        parent=choice.parent.id if choice.parent is not None else "",
        disks=tuple(Sent(disk.name, disk.size) for disk in disks),
        tags=wanted.tags,
    )


class _Run:
    """One backup that is decided on."""

    def __init__(self, jobs: Jobs, wanted: Wanted, disks: Sequence[LiveDisk], intent: Intent) -> None:
        self._jobs = jobs
        self._wanted, self._disks, self._intent = wanted, disks, intent
        self._committing = False

    async def make(
        self, transport: Transport, *, granularity: int, progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """The backup, in the repository."""
        for number, disk in enumerate(self._disks):
            await self._open(number, disk, transport)
        time_ns, not_frozen = await self._instant(granularity)
        sent = await self._jobs.follow(transport.much, progress)
        if transport.closes_first:
            await self._jobs.clean()
        frozen_too = self._wanted.agent is not None and not not_frozen
        grade = Grade.APP if frozen_too else Grade.CRASH
        self._committing = True
        made = await transport.commit(time_ns=time_ns, grade=grade.label, sent=sent)
        return made | {"grade": grade.label, "not_frozen": not_frozen}

    async def _open(self, number: int, disk: LiveDisk, transport: Transport) -> None:
        deadline = trio.current_time() + MOUNT_S
        while True:
            try:
                await self._jobs.open_target(number, disk, transport.target(number))
                return
            except QmpRefusedError:
                await transport.much()  # raises why it will not come
                if not transport.closes_first or trio.current_time() > deadline:
                    raise
            await trio.sleep(LOOK_S)

    async def _instant(self, granularity: int) -> tuple[int, str]:
        """Begin, with the guest frozen if that is asked: the time of the instant, and why the guest was not frozen then."""

        async def begin() -> int:
            # Before the transaction: all that was acknowledged up to then is in the backup.
            time_ns = time.time_ns()
            await self._jobs.start(self._disks, self._intent.id, self._intent.parent, granularity=granularity)
            return time_ns

        if self._wanted.agent is None:
            return await begin(), ""
        held = frozen.Frozen(self._wanted.vm, await frozen.start(self._wanted.agent, stdin=subprocess.PIPE))
        time_ns: int | None = None
        failed: CdpError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(held.follow)
            try:
                await held.wait_frozen()
                time_ns = await begin()
                reason = await held.release()
            except CdpError as error:  # raised below, where no group wraps it
                failed, reason = error, error.message
            await held.let_thaw()
        if isinstance(failed, QmpRefusedError) or (failed is not None and not self._wanted.or_crash):
            raise failed
        if reason and not self._wanted.or_crash:
            raise RefusedError(reason, hint="try again, or take what there is: --or-crash")
        return (time_ns if time_ns is not None else await begin()), reason

    async def give_up(self, transport: Transport) -> None:
        """First nothing of the guest's is to wait for us any more. What the monitor does not answer is left to the next run."""
        with (
            trio.move_on_after(CLEANING_S, shield=True),
            contextlib.suppress(QmpClosedError, QmpRefusedError, RefusedError),
        ):
            # At the commit the jobs have ended: QEMU waits for nothing.
            if not self._committing:
                await transport.abandon()
            await self._jobs.clean()
            if not self._committing:  # else nobody knows whether it is one
                await self._jobs.forget(lambda backup: backup == self._intent.id)
