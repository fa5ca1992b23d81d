"""Where a repository's objects are: names to bytes that appear whole or not at all.

    repo.json            what the repository is
    packs/ab/<id>        chunks, some dozens of MiB of them in one object
    backups/<id>         one backup each; its name appearing is what makes it one
    listed/<id>          a backup that was made, until it is removed
    locks/<id>           an operator's hold on a backup
    clock/now            how late it is at least (clock.py)
    sessions/<id>        a backup that is under way, held by who runs it
    doomed/<id>          a pack that is about to be deleted
    damaged/<pack>.<id>  a chunk that was found damaged

A Place promises no more than object stores have: put whole, get, get a range, list, delete. What a name holds never changes but
by `put` of the whole. Packs, backups and repo.json are put once, and some places can promise that nobody deletes them before
a time.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol, TypeAlias

from cdpserver import durable
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.names import show
from cdpserver.repository.held import HeldFile, is_held
from cdpserver.repository.lease import LEASE_S

_NAME = re.compile(r"[a-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,2}")

HeldCheck: TypeAlias = Callable[[], None]
"""BrokenError if a name is not held any more."""


class Place(Protocol):
    """All methods: BrokenError where the place fails, NoSpaceError where it is full. Threads: any."""

    where: str
    """For people."""

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        """Durable on return; who reads sees the old content, or none, or all of the new.

        Where the place `locks`, nobody can delete it before `until_ns`.
        """

    def get(self, name: str) -> bytes:
        """All of it. FileNotFoundError."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly these bytes. FileNotFoundError; CorruptError where the object is shorter."""

    def names(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(name, bytes) of the objects below the folder `prefix`, in any order."""

    def delete(self, name: str) -> None:
        """Gone on return; one that is not there is no error. RefusedError where the place does not let it go."""

    def hold(self, name: str) -> contextlib.AbstractContextManager[HeldCheck]:
        """Put `name` and hold it while the context lasts, at most until this process ends; then delete it. RefusedError."""

    def holds(self, prefix: str) -> set[str]:
        """The names below a folder that somebody holds now; what the dead left is deleted."""

    @property
    def locks(self) -> bool:
        """Can the place itself see to it that nobody deletes something before a time?"""

    def retain(self, name: str, until_ns: int) -> None:
        """Nobody can delete it before `until_ns`, if the place `locks`; never sooner than before. FileNotFoundError."""

    def retained_until_ns(self, name: str) -> int:
        """0 where nothing is retained. FileNotFoundError."""

    def now_ns(self) -> int | None:
        """By the place's own clock, if it has one."""


def is_name(name: str) -> bool:
    """A temporary that a crash left, or a foreign file, has none that we use."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def check_name(name: str) -> str:
    """Names come from listings and from operators: nothing that leads elsewhere."""
    if not is_name(name):
        raise NotFoundError(
            f"not a name in a repository: {show(name)}", hint="cdp backup list shows the names"
        )
    return name


class DirectoryPlace:
    """A directory: a local disk, an array, or a mounted NAS."""

    def __init__(self, path: Path, *, lease_s: float = LEASE_S) -> None:
        self.path = path.absolute()
        self._lease_s = lease_s
        self.where = str(self.path)

    def _at(self, name: str) -> Path:
        return self.path / check_name(name)

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        path = self._at(name)
        if not path.parent.is_dir():
            self._make_parents(path.parent)
        durable.write_whole(path, data, 0o600)

    def _make_parents(self, folder: Path) -> None:
        missing = [p for p in (folder, *folder.parents) if self.path in (p, *p.parents) and not p.exists()]
        for parent in reversed(missing):  # the topmost first
            with contextlib.suppress(FileExistsError):  # another writer was first
                durable.make_dir(parent, 0o700)

    def get(self, name: str) -> bytes:
        with durable.io_errors("read", self._at(name)):
            return self._at(name).read_bytes()

    def read(self, name: str, offset: int, length: int) -> bytes:
        path = self._at(name)
        with durable.io_errors("read", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(fd, length, offset)
            finally:
                os.close(fd)
        if len(data) < length:
            raise CorruptError(
                f"{path} ends before {offset + length}", hint="cdp repo check says which backups that touches"
            )
        return data

    def names(self, prefix: str) -> Iterator[tuple[str, int]]:
        with durable.io_errors("list", self.path / prefix):
            yield from self._names(prefix)

    def _names(self, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            entries = sorted(os.scandir(self.path / prefix), key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if not is_name(name):
                continue
            if entry.is_dir():
                yield from self._names(name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield name, entry.stat().st_size

    def delete(self, name: str) -> None:
        path = self._at(name)
        with durable.io_errors("delete", path):
            try:
                path.unlink()
            except FileNotFoundError:
                return
        durable.fsync_dir(path.parent)

    @property
    def locks(self) -> bool:
        return False

    def retain(self, name: str, until_ns: int) -> None:
        """Whoever may write a directory may delete in it."""

    def retained_until_ns(self, name: str) -> int:
        return 0

    def now_ns(self) -> int | None:
        return None

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[HeldCheck]:
        path = self._at(name)
        self._make_parents(path.parent)
        with HeldFile(path, self._lease_s, lambda: self.delete(name)) as held:
            yield held.check

    def holds(self, prefix: str) -> set[str]:
        return {
            name
            for name, _ in list(self.names(prefix))
            if is_held(self._at(name), self._lease_s, partial(self.delete, name))
        }
