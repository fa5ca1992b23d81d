"""Is what was written to a file without syncing it on stable storage? Asked after a power loss: nobody believes a torn file.

    FILE-unsynced    the boot in which something was written; flocked, shared, by each process that did and has not synced it yet

Durability: it is durable before the first change, and goes when everything is synced and nobody else has changes. So one that
another boot has left says that the file may be torn; one without anything in it was left before any change.
Threads: any.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from cdpserver import durable
from cdpserver.clock import boot_id


def _marker(path: Path) -> Path:
    return Path(f"{path}-unsynced")


def remove_torn(path: Path, also: Iterable[Path] = ()) -> None:
    """Before the file is opened: delete it, and `also` others, if a power loss may have torn it."""
    marker = _marker(path)
    try:
        fd = os.open(marker, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if _written(fd) in (b"", boot_id().encode()):
            return
        fcntl.flock(fd, fcntl.LOCK_EX)
        if durable.is_at(marker, fd):  # another process may have done it meanwhile
            for name in (path, *also):
                name.unlink(missing_ok=True)
            durable.fsync_dir(path.parent)
            marker.unlink()
    finally:
        os.close(fd)


def _written(fd: int) -> bytes:
    return os.pread(fd, 256, 0)


class Unsynced:
    """The changes of this process to one file."""

    def __init__(self, path: Path) -> None:
        self._marker = _marker(path)
        self._lock = threading.Lock()
        self._fd: int | None = None

    def begin(self) -> None:
        """Before each change."""
        with self._lock:
            if self._fd is None:
                self._fd = self._held()

    def _held(self) -> int:
        while True:
            fd = os.open(self._marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if durable.is_at(self._marker, fd):
                break
            os.close(fd)
        if not _written(fd):
            os.pwrite(fd, boot_id().encode(), 0)
            os.fsync(fd)
            durable.fsync_dir(self._marker.parent)
        return fd

    def end(self, sync: Callable[[], None]) -> None:
        """No change is to come: `sync` makes all that were made durable, those of processes that were killed too."""
        with self._lock:
            if self._fd is None:
                return
            try:
                sync()
                with contextlib.suppress(BlockingIOError):  # others have changes, and do it at their end
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if durable.is_at(self._marker, self._fd):
                        self._marker.unlink()
            finally:
                os.close(self._fd)
                self._fd = None
