"""The other way for a backup to come: QEMU's jobs write QCOW2 files in directories of ours that are mounted on the VM's host,
each disk's by a link of its own: what one job sends waits for no other's.

When the jobs have ended and the links are closed, the files are taken in, and go. Nothing in them is believed but where in the
file the disk's bytes are: they come from another machine.

Whether a write failed there nobody tells us: the guest, and so the job, is not to hear of it. But QEMU writes each place of the
disk that is to be sent exactly once, as data or as zeros, and enters in the file that it is there only after that: what is
missing in the file was not written. (sshfs answers a write when it was done here: `sshfs_sync`.)
"""

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import trio

from cdpserver import qemu
from cdpserver.errors import BrokenError, CorruptError, RefusedError
from cdpserver.repository import sessions
from cdpserver.repository.pushed import Intent, Pushed, Sent
from cdpserver.repository.repository import Repository
from cdpserver.vm.backup.sshfs import Link, linked

LINKS = 8
"""At most; more disks share them. An sshd refuses connections from the eleventh on that has not logged in yet (MaxStartups)."""

PIECE = 1 << 20

ZEROS = 1 << 30
"""Taken at once, chunk by chunk."""


class Staged:
    """One backup on its way; see `transport.Transport`."""

    closes_first = True

    def __init__(self, repository: Repository, intent: Intent, directory: Path) -> None:
        self._repository, self._intent, self._directory = repository, intent, directory
        self._links: list[Link] = []
        self._ends = contextlib.AsyncExitStack()

    async def begin(self, host: str, ssh: Sequence[str]) -> None:
        """Empty files, and the links to the host."""
        disks = self._intent.disks
        for number in range(min(len(disks), LINKS)):
            self._shared(number).mkdir(mode=0o700)
        for number, disk in enumerate(disks):
            await trio.to_thread.run_sync(
                lambda path, size: qemu.create_image(path, size=size), self._file(number), disk.size
            )
        for number in range(min(len(disks), LINKS)):
            link = linked(self._shared(number), host, ssh=ssh)
            self._links.append(await self._ends.enter_async_context(link))

    async def end(self) -> None:
        """The links are closed, and each sshfs gone."""
        await self._ends.aclose()

    def _shared(self, number: int) -> Path:
        """What the link of disk `number` shows the host."""
        return self._directory / f"link-{number % LINKS}"

    def _file(self, number: int) -> Path:
        return self._shared(number) / f"disk-{number}.qcow2"

    def target(self, number: int) -> dict[str, Any]:
        """See Transport."""
        name = f"{self._links[number % LINKS].path}/{self._file(number).name}"
        return {"driver": "qcow2", "file": {"driver": "file", "filename": name}}

    async def much(self) -> bool:
        """See Transport. Whoever writes waits for its link itself."""
        self._check()
        return False

    async def abandon(self) -> None:
        """See Transport."""
        for link in self._links:
            link.cut()

    def _check(self) -> None:
        for link in self._links:
            link.check()

    async def commit(self, *, time_ns: int, grade: str, sent: Sequence[int]) -> dict[str, Any]:
        """See Transport."""
        self._check()
        await self.end()
        return await trio.to_thread.run_sync(self.take_in, time_ns, grade, sent)

    def take_in(self, time_ns: int, grade: str, sent: Sequence[int]) -> dict[str, Any]:
        """Make the backup of the files that are here. BrokenError if something is missing in one, CorruptError for no image."""
        with sessions.session(self._repository.place, self._intent.id) as check_held:
            self._repository.refresh()
            pushed = Pushed(self._repository, self._intent, check_held)
            with contextlib.closing(pushed):
                for number, disk in enumerate(self._intent.disks):
                    self._take_disk(pushed, number, disk, sent[number])
                return pushed.commit(time_ns, grade).show()

    def _take_disk(self, pushed: Pushed, number: int, disk: Sent, sent: int) -> None:
        """What the job wrote; of a full backup that is all of the disk, which `commit` looks at."""
        to, path, at, came = pushed.connect(disk.name), self._file(number), 0, 0
        with open(path, "rb") as file:
            for start, end, place in qemu.own_parts(path):
                if not at <= start < end <= disk.size:
                    raise CorruptError(f"{path.name} is no image of such a disk")
                at, came = end, came + end - start
                step = PIECE if place >= 0 else ZEROS
                for low in range(start, end, step):
                    length = min(step, end - low)
                    if place < 0:
                        pushed.zero(to, low, length)
                        continue
                    data = os.pread(file.fileno(), length, place + low - start)
                    if len(data) < length:
                        raise BrokenError(f"{path.name} is not all here", hint="make the backup again")
                    pushed.write(to, low, data)
        if came < min(sent, disk.size):
            raise BrokenError(
                f"of {disk.name} {came} bytes came of {sent}",
                hint=f"is there room in {self._directory.parent}? make the backup again",
            )


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise RefusedError(
            f"{directory} cannot be made: {error.strerror}", hint="name another directory with --staging"
        ) from None


@contextlib.asynccontextmanager
async def staging(
    repository: Repository, intent: Intent, directory: Path, *, host: str, ssh: Sequence[str]
) -> AsyncIterator[Staged]:
    """In a directory that is nobody else's, and empty afterwards; what one that was killed left there goes first."""
    _make_empty(directory)
    staged = Staged(repository, intent, directory)
    try:
        await staged.begin(host, ssh)
        yield staged
    finally:
        await staged.end()
        shutil.rmtree(directory, ignore_errors=True)
