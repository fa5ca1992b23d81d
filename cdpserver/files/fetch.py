"""Files of a point, written into a directory: content, holes, times, modes, owners, links, attributes.

Invariants: nothing is written outside of the directory. Every name is one component, opened relative to the directory above
it, which was opened without following a link; a file appears under its name when it is whole, and is made anew, never written
through what is there.
Resumes: what is there with the size and time of the file is taken for it; a file that was begun goes on where it ended, if
that was the same point since the same boot of this host (what was written before a power loss may not be there).
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from cdpserver.clock import boot_id
from cdpserver.errors import CdpError, RefusedError
from cdpserver.files import DAMAGED
from cdpserver.files.browser import File
from cdpserver.names import show

MAX_NAME = 255
MAX_TOLD = 20
"""Problems that are told one by one; the rest is counted."""

Names: TypeAlias = tuple[bytes, ...]
"""A path, name by name."""

Progress: TypeAlias = Callable[[int, int], None]
"""Told (files, bytes) that are done since it was told last."""

FORCE = "--force replaces files"
ELSEWHERE = "fetch into another directory"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_HERE = (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL)


class Source(Protocol):
    """A browser."""

    def content(self, file: File, offset: int = 0) -> Iterator[tuple[int, int, bytes | None]]:
        """Content from an offset on."""

    def xattrs(self, file: File) -> dict[str, bytes]:
        """Extended attributes."""


@dataclass
class Taken:
    """What came of it."""

    files: int = 0
    bytes: int = 0
    kept: int = 0
    """Files that were there already."""
    skipped: int = 0
    """Devices and sockets."""
    attributes_lost: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, path: Names, why: str) -> None:
        """One file could not be had; the others can."""
        self.failed += 1
        if len(self.problems) < MAX_TOLD:
            self.problems.append(f"{show_path(path)}: {why}")


class Fetch:
    """Writes what a walk finds into `target`, which is made if it is not there."""

    def __init__(
        self,
        source: Source,
        target: Path,
        *,
        point: str,
        force: bool = False,
        progress: Progress | None = None,
        taken: Taken | None = None,
    ) -> None:
        """`point` names the instant: what was begun from another one is not gone on with. `taken` is told what came so far."""
        self._source = source
        self._force = force
        self._tell = progress or (lambda files, bytes: None)
        self._begun = f"{boot_id()}:{point}"
        self._owner = os.geteuid() == 0
        self._links: dict[int, tuple[bytes, ...]] = {}
        self._open: list[tuple[tuple[bytes, ...], int, File | None, dict[str, bytes]]] = []
        """(path, descriptor, what it is like, its attributes) of the directory that is filled and those above it."""
        self.taken = Taken() if taken is None else taken
        target.mkdir(parents=True, exist_ok=True)
        self._open.append(((), os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), None, {}))

    def run(self, found: Iterator[File], name: bytes) -> Taken:
        """Everything of a walk; its top is called `name` in the target, or is the target itself where that is empty."""
        try:
            for file in found:
                path = (name, *file.path) if name else file.path
                self._leave(path[:-1])
                try:
                    self._one(file, path)
                except (CdpError, OSError) as error:
                    self.taken.problem(path, _why(error))
        finally:
            self._leave(())
            os.close(self._open[0][1])
        return self.taken

    # -- directories

    def _leave(self, above: tuple[bytes, ...]) -> None:
        """Close the directories that `above` is not in; what they are like is set last."""
        while len(self._open) > 1 and self._open[-1][0] != above[: len(self._open[-1][0])]:
            path, fd, file, attributes = self._open.pop()
            try:
                if file is not None:
                    self._dress(fd, file, attributes)
            except OSError as error:
                self.taken.problem(path, _why(error))
            finally:
                os.close(fd)

    def _enter(self, file: File, path: tuple[bytes, ...], above: int) -> None:
        if not path:
            return
        with contextlib.suppress(FileExistsError):
            os.mkdir(path[-1], 0o700, dir_fd=above)
        # Asked for now: by the time that it is left, the worker may have forgotten which it was.
        attributes: dict[str, bytes] = {}
        try:
            attributes = self._source.xattrs(file)
        except CdpError as error:
            self.taken.problem(path, f"its attributes: {_why(error)}")
        self._open.append((path, os.open(path[-1], _DIRECTORY, dir_fd=above), file, attributes))

    # -- files

    def _one(self, file: File, path: tuple[bytes, ...]) -> None:
        for name in path[-1:]:
            check_name(name)
        at, above, _, _ = self._open[-1]
        if at != path[:-1]:
            raise RefusedError("the directory above it could not be made", hint=ELSEWHERE)
        if file.type == "unreadable":
            raise RefusedError(file.why, hint=DAMAGED)
        if file.type == "dir":
            self._enter(file, path, above)
            self._tell(1, 0)
            return
        if file.type not in ("file", "link", "fifo"):
            self.taken.skipped += 1
            return
        if self._linked(file, path, above):
            return
        if file.type == "file":
            self._content(file, path[-1], above)
        elif not self._there(file, path[-1], above):
            self._special(file, path[-1], above)
        if file.links > 1:
            self._links[file.id] = path
        self._tell(1, 0)

    def _linked(self, file: File, path: tuple[bytes, ...], above: int) -> bool:
        """Was this another name of a file that is here? Then it is now."""
        first = self._links.get(file.id) if file.links > 1 else None
        if first is None:
            return False
        part = self._part(file, path[-1])
        with contextlib.ExitStack() as stack:
            fd = self._open[0][1]
            for name in first[:-1]:
                fd = os.open(name, _DIRECTORY, dir_fd=fd)
                stack.callback(os.close, fd)
            if self._same(path[-1], above, first[-1], fd):
                self.taken.kept += 1
                return True
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part, dir_fd=above)
            os.link(first[-1], part, src_dir_fd=fd, dst_dir_fd=above, follow_symlinks=False)
        self._place(part, path[-1], above)
        self.taken.files += 1
        return True

    def _same(self, name: bytes, above: int, other: bytes, fd: int) -> bool:
        try:
            known = os.stat(name, dir_fd=above, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if os.path.samestat(known, os.stat(other, dir_fd=fd, follow_symlinks=False)):
            return True
        if stat.S_ISDIR(known.st_mode) or not self._force:
            raise RefusedError("something else of this name is there", hint=FORCE)
        return False

    def _there(self, file: File, name: bytes, above: int) -> bool:
        """Is it there already? RefusedError if something else is."""
        try:
            known = os.stat(name, dir_fd=above, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if file.type == "link":
            same = stat.S_ISLNK(known.st_mode) and os.readlink(name, dir_fd=above) == file.target
        elif file.type == "fifo":
            same = stat.S_ISFIFO(known.st_mode)
        else:
            same = stat.S_ISREG(known.st_mode) and known.st_size == file.size
            same = same and known.st_mtime_ns == file.mtime_ns
        if same:
            self.taken.kept += 1
            return True
        if stat.S_ISDIR(known.st_mode) or not self._force:
            raise RefusedError("something else of this name is there", hint=FORCE)
        return False

    def _content(self, file: File, name: bytes, above: int) -> None:
        if self._there(file, name, above):
            self._tell(0, file.size)
            return
        part = self._part(file, name)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(part, flags, 0o600, dir_fd=above)
        try:
            begun = os.fstat(fd)
            if not stat.S_ISREG(begun.st_mode) or begun.st_nlink != 1:
                raise RefusedError("something else stands in the way", hint=ELSEWHERE)
            at = begun.st_size if begun.st_size <= file.size else 0
            os.ftruncate(fd, at)
            self._tell(0, at)
            for start, end, data in self._source.content(file, at):
                if data is None:
                    os.ftruncate(fd, end)
                else:
                    _write(fd, data, start)
                self._tell(0, end - start)
            self._dress(fd, file, self._source.xattrs(file))
        except (CdpError, OSError) as error:
            # Another try would end here, too, unless there is more room by then.
            if getattr(error, "errno", None) != errno.ENOSPC or isinstance(error, CdpError):
                os.unlink(part, dir_fd=above)
            raise
        finally:
            os.close(fd)
        self._place(part, name, above)
        self.taken.files += 1
        self.taken.bytes += file.size

    def _special(self, file: File, name: bytes, above: int) -> None:
        part = self._part(file, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=above)
        if file.type == "fifo":
            os.mkfifo(part, file.mode & 0o777, dir_fd=above)
        else:
            if not file.target or b"\0" in file.target:
                raise RefusedError("the link has no target", hint=DAMAGED)
            os.symlink(file.target, part, dir_fd=above)
        if self._owner:
            os.chown(part, file.uid, file.gid, dir_fd=above, follow_symlinks=False)
        os.utime(part, ns=(file.atime_ns, file.mtime_ns), dir_fd=above, follow_symlinks=False)
        self._place(part, name, above)
        self.taken.files += 1

    def _part(self, file: File, name: bytes) -> bytes:
        """The name that a file has until it is whole."""
        key = f"{self._begun}:{file.id}:{file.size}".encode() + name
        return b".cdp-" + hashlib.blake2b(key, digest_size=12).hexdigest().encode() + b".part"

    def _place(self, part: bytes, name: bytes, above: int) -> None:
        os.rename(part, name, src_dir_fd=above, dst_dir_fd=above)

    def _dress(self, fd: int, file: File, attributes: dict[str, bytes]) -> None:
        """Owner, attributes, mode, times, in this order.

        A change of owner takes capabilities away, and who is not root may not set attributes of what is not to be written.
        Without the owner, nothing may run as whoever fetched it.
        """
        if self._owner:
            os.fchown(fd, file.uid, file.gid)
        for name, value in attributes.items():
            try:
                os.setxattr(fd, os.fsencode(name), value)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self.taken.attributes_lost += 1
        os.fchmod(fd, file.mode if self._owner else file.mode & 0o777)
        os.utime(fd, ns=(file.atime_ns, file.mtime_ns))


def check_name(name: bytes) -> None:
    """RefusedError unless this is one component of a path."""
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name or len(name) > MAX_NAME:
        raise RefusedError("this cannot be the name of a file", hint=DAMAGED)


def show_path(path: tuple[bytes, ...]) -> str:
    """A path for a message: quoted, escaped, shortened."""
    return show(b"/".join(path).decode("utf-8", "backslashreplace"))


def _write(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done


def _why(error: CdpError | OSError) -> str:
    if isinstance(error, CdpError):
        return f"{error.message} ({error.hint})" if error.hint == FORCE else error.message
    return error.strerror or str(error)
