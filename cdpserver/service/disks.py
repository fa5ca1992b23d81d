"""Adding, showing and removing disks and forks, and what an operator says of them.

Order of making: directory, first records, socket name, catalog. Order of removing: catalog says *removing*, the target lets
go, the lease is taken, files go, catalog forgets. So a name never means something half made, and a crash in between leaves what
`finish_what_was_left` ends at the next start.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from cdpserver import durable, groups, images, locks, names, timeline
from cdpserver.catalog import Entry
from cdpserver.chain.lock import stays
from cdpserver.errors import CdpError, RefusedError, UsageError
from cdpserver.forks import forks_of
from cdpserver.journal.begin import start_history
from cdpserver.journal.log import Journal
from cdpserver.journal.record import Kind
from cdpserver.journal.segment import SegmentReader
from cdpserver.retention import policies
from cdpserver.service import facts
from cdpserver.service.browsing import Browsing
from cdpserver.service.core import Core
from cdpserver.service.links import link_socket
from cdpserver.service.pruning import Pruning
from cdpserver.timeline import BackupBase, Base, EmptyBase, ImageBase, PointBase, Timeline
from cdpserver.vm.recovery import record

STATUS_S = 5.0
"""A list is shown without the target's figures rather than not at all."""

FEW_RECORDS = 1000
"""A timeline with more has been used."""

LEASE_S = 2.0
"""How long a removal waits for readers that are about to end (a request of our own, say)."""


@dataclass(frozen=True, slots=True)
class Begun:
    """How a history begins: since when, and what it stands on, as its first record says it."""

    time_ns: int
    mode: str


class Disks:
    """The disks and forks of a state directory."""

    def __init__(self, core: Core, browsing: Browsing) -> None:
        self._core = core
        self.browsing = browsing
        self.pruning = Pruning(core)
        self._changing = trio.Lock()
        self._importing = trio.Lock()

    # -- making ----------------------------------------------------------------------------------------------

    async def add(self, name: str, size: str | int, *, vm: str | None, base: str | None) -> dict[str, Any]:
        """A new disk, empty or on a base image; durable on return."""
        full = names.full_name(name, vm)
        size_bytes = names.parse_size(str(size))
        self._check_free(full)
        if base is None:
            entry = await self._create(full, size_bytes, EmptyBase())
        else:
            path = images.check_path(base)
            async with self._importing:
                entry = await self._create(full, size_bytes, await self._import(path, size_bytes))
        self._core.log.emit("disk.added", disk=full, id=entry.id, size=size_bytes, base=base)
        return await self.show(full)

    def _check_free(self, full: str) -> None:
        if self._core.catalog.get(full) is not None:
            raise RefusedError(f"there is a disk {full} already", hint="choose another name")

    async def _import(self, path: Path, size: int) -> ImageBase:
        core = self._core
        image = await core.thread(images.check_fits, path, size)
        source = await core.thread(images.Source.of, path)
        found = await core.thread(images.find, core.state, source)
        if found is not None:
            return found
        raw = await core.thread(images.free_path, core.state)
        core.log.emit("image.import-begins", source=source.path, format=image.format)
        arguments = ["--source", source.path, "--format", image.format, "--target", str(raw)]
        try:
            made = await core.job("import", "cdpserver.images", *arguments)
        except BaseException:  # cancelled, mostly: its process had no time to tidy up
            images.drop_unfinished(raw)
            raise
        base = await core.thread(images.record, core.state, raw, source, str(made["digest"]))
        core.log.emit("image.imported", source=source.path, file=base.file)
        return base

    async def _create(self, full: str, size: int, base: Base) -> Entry:
        async with self._changing:
            return await self._core.thread(self._make, full, size, base)

    def _make(self, full: str, size: int, base: Base, begun: Begun | None = None) -> Entry:
        core = self._core
        self._check_free(full)
        name, vm = names.split_name(full)
        id = core.catalog.next_id()
        now_ns = core.clock.now_ns()
        made = timeline.create_timeline(
            core.state, id=id, name=name, vm=vm, size=size, base=base, now_ns=now_ns
        )
        try:
            self._begin(made, begun or Begun(now_ns, "image" if isinstance(base, ImageBase) else "point"))
            link_socket(core, id)
            return core.catalog.add(full, id, created_ns=now_ns)
        except BaseException:
            self._discard(id)
            raise

    def _begin(self, made: Timeline, begun: Begun) -> None:
        """Disks on an image and forks have a history from the start."""
        if isinstance(made.base, EmptyBase):
            return
        directory = self._core.state.timeline(made.id)
        with durable.io_errors("begin the history in", directory):
            start_history(
                directory,
                uuid=made.uuid,
                boot_id=self._core.clock.boot_id,
                now_ns=begun.time_ns,
                mode=begun.mode,
            )

    def _discard(self, id: str) -> None:
        with contextlib.suppress(OSError, CdpError):
            (self._core.state.nbd / f"{id}.sock").unlink(missing_ok=True)
            durable.remove_tree(self._core.state.timeline(id))

    async def resize(self, name: str, size: str | int) -> dict[str, Any]:
        """A disk or fork that has grown where it comes from grows here; durable on return. RefusedError for a smaller size.

        Points before this keep their size, and so do connections that are open; whoever connects anew sees the new one.
        """
        wanted = names.parse_size(str(size))
        entry = self._core.entry(names.check_disk_name(name))
        async with self._changing:
            await self._core.targets.call(entry.id, "grow", disk=entry.name, size=wanted)
        return await self.show(name)

    # -- showing ---------------------------------------------------------------------------------------------

    async def show(self, name: str) -> dict[str, Any]:
        """One disk or fork. NotFoundError."""
        entry = self._core.catalog.get(names.check_disk_name(name))
        if entry is None:
            raise groups.no_disk(self._core.catalog, name)
        return await self._core.thread(facts.describe, self._core, entry, await self._status())

    async def uris(self, name: str) -> dict[str, str]:
        """Where a mirror writes to, as it opens. NotFoundError."""
        entry = self._core.entry(name)
        return self._core.disk_uris(entry, await self._core.thread(self._core.secret, entry))

    async def list_disks(self) -> list[dict[str, Any]]:
        """Every disk and fork, by name."""
        entries = await self._core.thread(self._core.catalog.names)
        status = await self._status()

        def collect() -> list[dict[str, Any]]:
            rows = self._core.catalog.rows("policies")
            return [facts.describe(self._core, entry, status, rows) for entry in entries.values()]

        return await self._core.thread(collect)

    async def _status(self) -> dict[str, Any]:
        """What the target says of the disks that it has open; {} when it doesn't answer in time."""
        said, _ = await self._core.targets.status(within_s=STATUS_S)
        return said

    # -- forks -----------------------------------------------------------------------------------------------

    async def fork(self, point: str, name: str) -> dict[str, Any]:
        """The same as `make_fork`, and what it is then."""
        await self.make_fork(point, name)
        return await self.show_fork(name)

    async def make_fork(self, point: str, name: str) -> None:
        """A writable timeline on top of a point, which is made durable first."""
        core = self._core
        disk, when = names.parse_point(point)
        names.check_disk_name(name)
        self._check_free(name)
        async with self._changing:
            # Under the lock: nobody removes the parent between the look and the fork's appearing.
            parent = core.entry(disk)
            position, size = await core.thread(core.resolve, parent, when)
            await core.make_durable(parent, position.seq)
            base = PointBase(parent.id, position.seq, position.time_ns)
            made = await core.thread(self._fork, parent, name, size, base)
        core.log.emit("fork.added", fork=name, id=made.id, base=facts.base_name(core, base))

    async def stand_on_backup(self, name: str, size: int, base: BackupBase, begun: Begun) -> None:
        """A fork that stands on a disk of a backup; durable on return."""
        async with self._changing:
            await self._core.thread(self._make, name, size, base, begun)

    def _fork(self, parent: Entry, name: str, size: int, base: PointBase) -> Any:
        """Make it while nothing of the parent is dropped; from then on it holds its point itself."""
        with stays(self._core.state.timeline(parent.id)):
            self._core.resolve(parent, names.Seq(base.seq))
            return self._make(name, size, base)

    async def show_fork(self, name: str) -> dict[str, Any]:
        """One fork: name, uri, base and what a disk has. UsageError for a disk."""
        shown = await self.show(name)
        if "base" not in shown and shown["state"] != "removing":
            raise UsageError(f"{name} is a disk, not a fork", hint="cdp disk show shows it")
        return shown

    async def forks(self) -> list[dict[str, Any]]:
        """Every fork, by name."""
        return [shown for shown in await self.list_disks() if "base" in shown]

    # -- removing --------------------------------------------------------------------------------------------

    async def remove(self, name: str, *, fork: bool = False) -> dict[str, Any]:
        """Remove a disk or fork with its history. RefusedError while something stands on it or has it open."""
        if fork:
            await self.show_fork(name)
        async with self._changing:
            entry = self._core.catalog.get(names.check_disk_name(name))
            if entry is None:
                raise groups.no_disk(self._core.catalog, name)
            await self._core.thread(self._check_no_forks, entry)
            await self._core.thread(self._check_no_recovery, entry)
            await self._let_go(entry)
            # From here on a removal is not to be cancelled: it would be ended only by the next start.
            with trio.CancelScope(shield=True):
                await self._core.thread(self._erase, entry)
        self._core.log.emit("disk.removed", disk=name, id=entry.id)
        with trio.CancelScope(shield=True):
            await self._drop_unused_images()
        return {"removed": name}

    async def _drop_unused_images(self) -> None:
        if not self._importing.locked():
            async with self._importing:
                for file in await self._core.thread(images.drop_unused, self._core.state):
                    self._core.log.emit("image.removed", file=file)

    def _check_no_forks(self, entry: Entry) -> None:
        forks = [fork.full_name for _, fork in forks_of(self._core.state, self._core.catalog, entry.id)]
        if forks:
            raise RefusedError(
                f"{entry.name} is what {len(forks)} fork(s) stand on: {', '.join(sorted(forks)[:10])}",
                hint="remove the forks first: cdp fork remove NAME",
            )

    def _check_no_recovery(self, entry: Entry) -> None:
        needed = record.holding(self._core.catalog, entry.name)
        if needed is not None:
            raise RefusedError(
                f"{entry.name} is what {needed.id} stands on",
                hint=f"commit or abort it first: cdp recover show {needed.id}",
            )

    def _check_no_locks(self, entry: Entry) -> None:
        held = [lock for lock in locks.all_locks(self._core.catalog) if lock.timeline == entry.id]
        locks.check_unlocked(held, entry.name, now_ns=self._core.clock.now_ns())

    async def _let_go(self, entry: Entry) -> None:
        """Nobody opens the disk from here on, and nobody has it open; else everything is as before and RefusedError."""
        core = self._core
        await core.thread(core.catalog.set_state, entry.name, "removing")
        try:
            await core.thread(self._check_no_locks, entry)
            clients = (await core.target_status(entry)).get("clients", 0)
            if clients:
                raise RefusedError(
                    f"{entry.name} is being written by {clients} client(s)",
                    hint="stop its mirror or guest first",
                )
            await core.targets.call(entry.id, "shut", id=entry.id)
            await self._wait_for_readers(entry)
        except BaseException:
            with trio.CancelScope(shield=True):
                await core.thread(core.catalog.set_state, entry.name, entry.state)
            raise

    async def _wait_for_readers(self, entry: Entry) -> None:
        with trio.move_on_after(LEASE_S):
            await self.browsing.forget(entry.id)
            while True:
                if await self._core.thread(self._is_free, entry):
                    return
                await trio.sleep(0.05)
        raise RefusedError(
            f"{entry.name} is being read: an open point, a recovery or a base point under way",
            hint="close what reads it, then try again",
        )

    def _is_free(self, entry: Entry) -> bool:
        with exclusive_lease(self._core.state.timeline(entry.id)) as free:
            return free

    def _erase(self, entry: Entry) -> None:
        """Remove the files under the exclusive lease, then the name."""
        core = self._core
        directory = core.state.timeline(entry.id)
        try:
            # A crash may have come between saying *removing* and this look.
            self._check_no_locks(entry)
        except RefusedError:
            core.catalog.set_state(entry.name, "live")
            raise
        with exclusive_lease(directory) as free:
            if not free:
                core.catalog.set_state(entry.name, "live")
                raise RefusedError(f"{entry.name} is being read", hint="close what reads it, then try again")
            (core.state.nbd / f"{entry.id}.sock").unlink(missing_ok=True)
            durable.remove_tree(directory)
        core.catalog.remove(entry.name)
        policies.forget(core.catalog, entry)
        locks.forget(core.catalog, entry.id)

    # -- starting --------------------------------------------------------------------------------------------

    def finish_what_was_left(self) -> None:
        """End removals that a crash cut short, and take away what was never given a name. Before anything is added."""
        core = self._core
        entries = core.catalog.names()
        for entry in entries.values():
            if entry.state == "removing":
                try:
                    self._erase(entry)
                    core.log.emit("disk.removed", disk=entry.name, id=entry.id)
                except RefusedError as error:
                    core.log.emit("disk.removal-waits", level="warning", disk=entry.name, reason=str(error))
        known = {entry.id for entry in entries.values()}
        for directory in sorted(core.state.timelines.iterdir()):
            if directory.name not in known:
                self._unnamed(directory)
        for link in core.state.nbd.iterdir():
            if link.stem not in known:
                link.unlink()
        images.drop_unused(core.state)

    def _unnamed(self, directory: Path) -> None:
        """A timeline without a name: left by an `add` cut short if nothing was ever written to it."""
        log = self._core.log
        if never_written(directory):
            durable.remove_tree(directory)
            log.emit("service.left-over-removed", timeline=directory.name)
        else:
            log.emit("service.unnamed-timeline", level="warning", timeline=directory.name)


def never_written(directory: Path) -> bool:
    """Holds a timeline nothing but the record that begins it, and those of what is durable? A client that goes leaves one."""
    if (directory / "base.raw").exists():
        return False
    try:
        journal = Journal(directory)
        try:
            places = list(journal.places())
            if len(places) > 1 or (places and journal.last().seq > FEW_RECORDS):
                return False
            return not places or _only_durable(journal.reader(*places[0]))
        finally:
            journal.close()
    except (CdpError, OSError):
        return False


def _only_durable(reader: SegmentReader) -> bool:
    return bool((reader.records(0, reader.count)["kind"][1:] == Kind.DURABLE).all())


@contextlib.contextmanager
def exclusive_lease(directory: Path) -> Iterator[bool]:
    """Hold the lease of a timeline against readers; False when some have it. True when it is gone already."""
    try:
        fd = os.open(directory / "lease", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)
