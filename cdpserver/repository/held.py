"""A name in a directory that one process holds: by a lock of the kernel's and, for other hosts, by writing it again and again.

A file system that several hosts share (NFS, SMB, sshfs) need not tell one of them what another one has locked. So a holder writes
into the name's file which boot of which host it is, and by which mount it has the file, and renews that while it lives:

    written by the same boot and mount    held while the lock is
    written by another one                held, if it was renewed less than a lease ago

Age is the difference of two times of the file system's own clock. As in a bucket (lease.py), a holder does not believe in its
name for longer than half a lease without having renewed it, so that what it began in time has ended before anybody takes it for
dead. A file that says nothing (an older program's) is held while its lock is.
Threads: one of its own renews while the name is held.
"""

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from cdpserver import durable
from cdpserver.clock import boot_id
from cdpserver.errors import BrokenError, RefusedError
from cdpserver.repository.lease import RENEWALS

PATIENCE_S = 0.5
"""Who only looks whether a name is held holds it for a moment."""


class HeldFile:
    """A context that holds a name, whose directory is there."""

    def __init__(self, path: Path, lease_s: float, delete: Callable[[], None]) -> None:
        """`delete` takes the name away."""
        self._path = path
        self._lease_s = lease_s
        self._delete = delete
        self._fd = -1
        self._said = b""
        self._renewed = 0.0
        self._lost = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="holding")

    def __enter__(self) -> Self:
        """RefusedError where another process holds it, here or on another host."""
        self._fd = self._locked()
        try:
            self._said = f"{_here(self._fd)} {secrets.token_hex(8)}\n".encode()
            os.ftruncate(self._fd, 0)
            self._write()
        except BaseException:
            os.close(self._fd)
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        try:
            if self._is_mine():
                self._delete()
        finally:
            os.close(self._fd)

    def check(self) -> None:
        """BrokenError unless it is held, and will be for half a lease."""
        self._look_at_the_time()
        if not self._lost and not self._is_mine():
            self._lost = "another host took it for dead"
        if self._lost:
            raise BrokenError(
                f"{self._path} is not held any more: {self._lost}",
                hint="start the command again: it goes on with what is stored",
            )

    def _locked(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with durable.io_errors("write", self._path):
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if _try_lock(fd):
                    if durable.is_at(self._path, fd):
                        self._refuse_another(fd)
                        return fd
                elif time.monotonic() > deadline:
                    raise RefusedError(
                        f"{self._path} is held by another process", hint="try again when it has ended"
                    )
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            time.sleep(0.01)

    def _refuse_another(self, fd: int) -> None:
        if _is_of_another(self._path, fd, self._lease_s):
            raise RefusedError(
                f"{self._path} is held by another process, on another host",
                hint=f"try again when it has ended; if it died, {self._lease_s:.0f} s after that",
            )

    def _is_mine(self) -> bool:
        try:
            return durable.is_at(self._path, self._fd) and self._path.read_bytes() == self._said
        except FileNotFoundError:
            return False

    def _write(self) -> None:
        started = _now()
        with durable.io_errors("write", self._path):
            os.pwrite(self._fd, self._said, 0)
            os.fsync(self._fd)
        self._renewed = started

    def _look_at_the_time(self) -> None:
        if not self._lost and _now() - self._renewed > self._lease_s / 2:
            self._lost = "it could not be renewed in time"

    def _renew(self) -> None:
        while not self._end.wait(self._lease_s / RENEWALS):
            self._look_at_the_time()
            if self._lost:
                return  # never again: somebody may have counted on its end
            with contextlib.suppress(BrokenError, OSError):  # the next one may get through
                self._write()


def is_held(path: Path, lease_s: float, delete: Callable[[], None]) -> bool:
    """Does somebody hold that name? What the dead left is taken away by `delete`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not _try_lock(fd):
            return True
        if durable.is_at(path, fd):
            if _is_of_another(path, fd, lease_s):
                return True
            delete()
        return False
    finally:
        os.close(fd)


def _here(fd: int) -> str:
    """Who shares locks of a file with us: the processes of this boot that have it by the same mount."""
    return f"{boot_id()} {os.fstat(fd).st_dev}"


def _is_of_another(path: Path, fd: int, lease_s: float) -> bool:
    """Does somebody hold it whose locks are not seen here?"""
    said = os.pread(fd, 256, 0).decode(errors="replace").split()
    if len(said) != 3 or " ".join(said[:2]) == _here(fd):
        return False
    return _now_of(path.parent) - os.fstat(fd).st_mtime <= lease_s


def _now_of(directory: Path) -> float:
    """How late it is by the clock of the file system."""
    probe = directory / f".now-{os.getpid()}-{secrets.token_hex(4)}"
    with durable.io_errors("write", probe):
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b".")
            os.fsync(fd)
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)
            probe.unlink(missing_ok=True)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _now() -> float:
    """Goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
