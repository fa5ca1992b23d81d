"""Backups as something to boot, browse and recover from: a backup is attached as a VM of forks that stand on it.

    backup:ID  ──►  the VM backup-ID, its disks, all begun at the backup's instant; nothing is copied

What takes DISK@WHEN or VM@WHEN so takes a backup, without knowing of it. While it is attached a lock in the repository keeps it.
One that nothing stands on, and that nobody asked for or read in IDLE_S, is detached.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import trio

from cdpserver import durable, names, timeline
from cdpserver.catalog import Entry
from cdpserver.errors import BrokenError, CdpError, NotFoundError, RefusedError, UsageError
from cdpserver.repository import registered
from cdpserver.repository.places import S3, open_place
from cdpserver.repository.record import BackedUpDisk, Backup
from cdpserver.repository.registered import Registered
from cdpserver.repository.repository import load_config
from cdpserver.service.core import Core
from cdpserver.service.disks import Begun, Disks
from cdpserver.timeline import BackupBase

IDLE_S = 24 * 3600.0
"""A URI that was printed is good for so long, if nobody uses it."""

LOOK_S = 60.0

FIRST_SEQ = 1
"""The record that begins the history: just after it the disk is what the backup holds."""

ANSWER_S = 60.0
"""A repository that does not answer for so long is one that cannot be read: a NAS may hang for ever."""

REACHING = 8
"""Threads that wait for repositories at once; those that hang are none of the service's own."""

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class Idle:
    """Which attached backups nobody uses any more. Times are seconds of one clock."""

    def __init__(self, began: float) -> None:
        """What was attached before `began` counts as used then."""
        self._began = began
        self._used: dict[str, float] = {}

    def use(self, name: str, now: float) -> None:
        """Somebody asked for it, or cannot do without it yet."""
        self._used[name] = now

    def forget(self, name: str) -> None:
        """It is attached no more."""
        self._used.pop(name, None)

    def is_over(self, name: str, now: float) -> bool:
        """Was it used by nobody in IDLE_S?"""
        return now - self._used.get(name, self._began) > IDLE_S


class Attached:
    """The repositories that are registered, and the backups in use."""

    def __init__(self, core: Core, disks: Disks) -> None:
        self._core = core
        self._disks = disks
        self._changing = trio.Lock()
        self._idle = Idle(trio.current_time())
        self._reaching = trio.CapacityLimiter(REACHING)

    async def _reach(
        self, where: str, function: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Result:
        """Ask a repository something, in a thread that is left to itself if there is no answer. BrokenError."""
        with trio.move_on_after(ANSWER_S):
            return await trio.to_thread.run_sync(
                function, *arguments, abandon_on_cancel=True, limiter=self._reaching
            )
        raise BrokenError(
            f"{where} has not answered for {ANSWER_S:.0f} s", hint="look whether its file system hangs"
        )

    # -- repositories ----------------------------------------------------------------------------------------

    async def add(self, path: str, key_file: str, key_command: str = "") -> dict[str, Any]:
        """Register a repository, or where it is now; durable on return. RefusedError for a wrong key."""
        for one in (path, key_file):
            if one and not one.startswith(S3) and not Path(one).is_absolute():
                raise UsageError(
                    f"not an absolute path: {names.show(one)}", hint="the service has another directory"
                )
        async with self._changing:
            return await self._reach(path, self._add, path, key_file, key_command)

    def _add(self, path: str, key_file: str, key_command: str) -> dict[str, Any]:
        state = self._core.state
        one = Registered(load_config(open_place(path)).id.hex(), path, key_file, key_command)
        registered.open_registered(state.path, one).close()
        known = registered.load(state.path)
        if known.get(one.id) != one:
            registered.save(state.path, {**known, one.id: one})
            self._core.log.emit("repository.registered", repository=one.id, path=path)
        return self._shown(one)

    async def remove(self, which: str) -> dict[str, Any]:
        """Forget a repository, by its id or path. RefusedError while a backup in it is attached."""
        async with self._changing:
            return await self._core.thread(self._remove, which)

    def _remove(self, which: str) -> dict[str, Any]:
        state = self._core.state
        known = registered.load(state.path)
        one = next((one for one in known.values() if which in (one.id, one.path)), None)
        if one is None:
            raise NotFoundError(f"no repository {names.show(which)} is registered", hint="cdp repo list")
        if used := [entry.name for entry, base in self._all() if base.repository == one.id]:
            raise RefusedError(
                f"{len(used)} disks stand on backups in {one.path}: {', '.join(used[:3])}",
                hint="remove what stands on them: cdp fork list",
            )
        registered.save(state.path, {id_: other for id_, other in known.items() if id_ != one.id})
        self._core.log.emit("repository.forgotten", repository=one.id, path=one.path)
        return self._shown(one)

    async def repositories(self) -> list[dict[str, Any]]:
        """Those that are registered, by path."""
        known = await self._core.thread(registered.load, self._core.state.path)
        return [self._shown(one) for one in sorted(known.values(), key=lambda one: one.path)]

    def _shown(self, one: Registered) -> dict[str, Any]:
        return {"id": one.id, "path": one.path, "encrypted": one.encrypted}

    # -- backups ---------------------------------------------------------------------------------------------

    async def backups(self, name: str | None, repository: str | None) -> list[dict[str, Any]]:
        """The backups in the registered repositories, or in one (of the disk, VM or group `name`), oldest first; each id once."""
        core = self._core
        found: dict[str, tuple[int, dict[str, Any]]] = {}
        for one in await self._known(repository):
            try:
                for made_ns, row in await self._reach(one.path, self._list, one, name):
                    found.setdefault(row["id"], (made_ns, row))
            except CdpError as error:
                core.log.emit(
                    "repository.not-read", level="warning", repository=one.path, reason=error.message
                )
        return [row for _, (_, row) in sorted(found.items(), key=lambda item: (item[1][0], item[0]))]

    async def _known(self, repository: str | None) -> list[Registered]:
        """Those that are registered, or the one of that id or path."""
        known = await self._core.thread(registered.load, self._core.state.path)
        return [one for one in known.values() if repository in (None, one.id, one.path)]

    def _list(self, one: Registered, name: str | None) -> list[tuple[int, dict[str, Any]]]:
        """(when it was made by the repository's time, what is told of it)."""
        with registered.open_registered(self._core.state.path, one) as repository:
            return [
                (backup.order[0], _listed(backup, one))
                for backup in repository.backups()
                if name in (None, backup.subject, *(disk.name for disk in backup.disks))
            ]

    async def attach(self, text: str, repository: str | None) -> dict[str, Any]:
        """`backup:ID`, `backup:ID/DISK` or a volume in it as a point; `repository` is the id or path of the one it is in.

        NotFoundError if no registered repository has it.
        """
        wanted, inner = names.parse_backup(text)
        async with self._changing:
            return await self._attach(wanted, inner, repository)

    async def _attach(self, wanted: str, inner: str, repository: str | None) -> dict[str, Any]:
        core = self._core
        one, id_ = await self.find(wanted, repository)
        vm = names.attached_name(id_)
        self._idle.use(vm, trio.current_time())  # it is not idle from the moment on in which it is seen
        backup = await self._reach(one.path, self._read, one, id_)
        disks = named(backup, vm)
        time_ns = min(max(disk.time_ns for disk in backup.disks), core.clock.now_ns())
        for name, disk in disks.items():
            if core.catalog.get(name) is None:
                base = BackupBase(one.id, id_, disk.name, disk.image)
                # What was unordered then is so now.
                mode = "image" if disk.grade == "unordered" else "point"
                await self._disks.stand_on_backup(name, disk.size, base, Begun(time_ns, mode))
                core.log.emit("backup.attached", backup=id_, disk=name, repository=one.path)
        await self._reach(one.path, self._hold, one, id_)
        # It may have been removed before the lock was there.
        await self._reach(one.path, self._read, one, id_)
        points = {disk.name: f"{name}@seq:{FIRST_SEQ}" for name, disk in disks.items()}
        return {
            "backup": id_,
            "name": vm,
            "repository": one.path,
            "time_ns": time_ns,
            "point": pick(points, inner, f"{vm}@{names.format_time(time_ns)}"),
            "disks": [{"disk": disk, "point": point} for disk, point in points.items()],
        }

    async def find(self, wanted: str, repository: str | None) -> tuple[Registered, str]:
        """The one repository that has the backup, and its whole id. One that is not there, or hangs, is passed over."""
        known = await self._known(repository)
        if not known:
            what = "no repository is registered" if repository is None else f"{repository} is not registered"
            raise NotFoundError(what, hint="cdp repo add PATH registers a repository")
        found: list[tuple[Registered, tuple[int, str]]] = []
        silent = []
        for one in known:
            try:
                found += [(one, aged) for aged in await self._reach(one.path, self._aged, one, wanted)]
            except CdpError as error:
                silent.append(error.message)
        different = {id_ for _, (_, id_) in found}
        if len(different) > 1 and wanted != "latest":
            raise UsageError(
                f"{len(different)} backups begin with {names.show(wanted)}", hint="write more of the id"
            )
        if not found:
            where = ", ".join(one.path for one in known)
            more = f" ({'; '.join(silent)})" if silent else ""
            raise NotFoundError(
                f"there is no backup {names.show(wanted)} in {where}{more}", hint="cdp backup list"
            )
        # A copy in another repository has the same id, and is the same.
        newest = max(found, key=lambda each: each[1])[1][1]
        return next((one, newest) for one, (_, id_) in found if id_ == newest)

    def _aged(self, one: Registered, wanted: str) -> list[tuple[int, str]]:
        """(when it was made, id) of the newest backup, or (0, id) of those whose ids begin so."""
        if wanted != "latest":
            ids = (name.removeprefix("backups/") for name, _ in open_place(one.path).names("backups"))
            return [(0, id_) for id_ in ids if id_.startswith(wanted)]
        with registered.open_registered(self._core.state.path, one) as repository:
            return [brief.order for brief in repository.briefs()[-1:]]

    def _read(self, one: Registered, id_: str) -> Backup:
        with registered.open_registered(self._core.state.path, one) as repository:
            return repository.backup(id_)

    def _hold(self, one: Registered, id_: str) -> None:
        """Nobody removes the backup while something stands on it. A repository that cannot be written is read all the same."""
        try:
            with _writing(one.path):
                open_place(one.path).put(self._lock(id_), json.dumps({"reason": "it is attached"}).encode())
        except CdpError as error:
            self._core.log.emit("backup.not-held", level="warning", backup=id_, reason=error.message)

    def _lock(self, id_: str) -> str:
        """The name of our lock, which is not that of another server's, nor of an operator's."""
        prefix = f"{names.attached_name(id_)}/"
        disks = sorted(self._core.catalog.names().items())
        first = next(entry for name, entry in disks if name.startswith(prefix))
        return f"locks/{id_}.{timeline.load(self._core.state.timeline(first.id)).uuid.hex()[:16]}"

    def _all(self) -> list[tuple[Entry, BackupBase]]:
        """Every disk that stands on a backup. For threads."""
        found = []
        for name, entry in self._core.catalog.names().items():
            if names.is_attached(name):
                try:
                    base = timeline.load(self._core.state.timeline(entry.id)).base
                except CdpError:  # cdp check says what is wrong with it
                    continue
                if isinstance(base, BackupBase):
                    found.append((entry, base))
        return found

    # -- detaching -------------------------------------------------------------------------------------------

    async def detach(self, id_: str) -> None:
        """Take an attached backup away. RefusedError while something stands on it or reads it."""
        core, vm = self._core, names.attached_name(id_)
        async with self._changing:
            mine = [(entry, base) for entry, base in await core.thread(self._all) if base.backup == id_]
            if not mine:
                raise NotFoundError(f"backup {id_} is not attached", hint="cdp fork list shows what is")
            lock = await core.thread(self._lock, id_)
            for entry, _ in mine:
                await self._disks.remove(entry.name)
            self._idle.forget(vm)
            await self._let_go(mine[0][1].repository, lock)
        core.log.emit("backup.detached", backup=id_)

    async def _let_go(self, repository: str, lock: str) -> None:
        one = (await self._core.thread(registered.load, self._core.state.path)).get(repository)
        if one is not None:
            try:
                await self._reach(one.path, _delete, one.path, lock)
            except CdpError as error:
                self._core.log.emit("backup.lock-stays", level="warning", lock=lock, reason=error.message)

    async def keep_tidy(self) -> None:
        """Detach what nobody uses, until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            for id_ in {base.backup for _, base in await self._core.thread(self._all)}:
                name = names.attached_name(id_)
                if self._idle.is_over(name, trio.current_time()):
                    try:
                        await self.detach(id_)
                    except CdpError as error:
                        self._idle.use(name, trio.current_time())
                        self._core.log.emit("backup.stays-attached", backup=id_, reason=error.message)


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """RefusedError for a directory that is read-only, or another's."""
    try:
        yield
    except OSError as error:
        if error.errno not in durable.READ_ONLY:
            raise
        raise RefusedError(
            f"{path} cannot be written: {error.strerror}", hint="look at its owner and mode"
        ) from None


def _delete(path: str, name: str) -> None:
    with _writing(path):
        open_place(path).delete(name)


def _listed(backup: Backup, one: Registered) -> dict[str, Any]:
    time_ns = max(disk.time_ns for disk in backup.disks)
    return {
        "id": backup.id,
        "name": backup.name,
        "kind": backup.kind,
        "time": names.format_time(time_ns),
        "time_ns": time_ns,
        "disks": [disk.name for disk in backup.disks],
        "grade": "unordered" if any(disk.grade == "unordered" for disk in backup.disks) else "crash",
        "repository": one.path,
    }


def named(backup: Backup, vm: str) -> dict[str, BackedUpDisk]:
    """What each disk of a backup is called when it is attached as `vm`: by its short name, if that is clear."""
    short = {disk.name: names.split_name(disk.name)[0] for disk in backup.disks}
    count = Counter(short.values())
    return {
        names.full_name(short[d.name] if count[short[d.name]] == 1 else d.name.replace("/", "-"), vm): d
        for d in backup.disks
    }


def pick(points: dict[str, str], inner: str, whole: str) -> str:
    """The point that `backup:ID/inner` is: of a disk, with or without its VM, and a volume after it; else of all disks."""
    for disk, point in points.items():
        for name in (disk, names.split_name(disk)[0]):
            if inner == name or inner.startswith(f"{name}/"):
                return point + inner.removeprefix(name)
    if len(points) == 1:
        return "/".join(filter(None, (*points.values(), inner)))
    if inner:
        raise NotFoundError(
            f"the backup has no {names.show(inner)}", hint=f"its disks are {', '.join(points)}"
        )
    return whole
