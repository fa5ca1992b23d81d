"""Leases: instants that somebody reads, `leases/SEQ` in a timeline's directory, each held by a shared flock.

Who opens a point for a client takes its lease first, and looks then whether the point is still there. Leases are taken under
a shared flock of the directory, and who drops holds that alone from its look at the leases on: by then the point is gone, or it
stays. A lease's own flock ends with its holder, however that ends. After that it holds for a grace, as long as a client may take
to connect again: the first look that finds it free writes the time into the file, a later one removes it.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cdpserver import durable

DIRECTORY = "leases"

GRACE_NS = 30 * 1_000_000_000
"""A client's reconnect-delay; looks come a minute apart, so it is often longer."""

MAX_STAMP = 20


class Lease:
    """One instant, held until `close` or the end of the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def take(cls, timeline: Path, seq: int) -> "Lease":
        """Hold the instant `seq`, whether it is there or not: look afterwards.

        Where nothing may be written there is nothing to hold: on read-only media nobody drops anything, and who may only read
        a store that others prune gets an error where that happens under him, never other bytes.
        """
        try:
            return cls._take(timeline, seq)
        except OSError as error:
            if error.errno not in durable.READ_ONLY:
                raise
            return cls(-1)

    @classmethod
    def _take(cls, timeline: Path, seq: int) -> "Lease":
        with _directory(timeline, fcntl.LOCK_SH) as leases:
            fd = os.open(leases / str(seq), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                _belongs_to(timeline, fd)
                fcntl.flock(fd, fcntl.LOCK_SH)
                os.ftruncate(fd, 0)
            except BaseException:
                os.close(fd)
                raise
        return cls(fd)

    def close(self) -> None:
        """The grace begins."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _belongs_to(timeline: Path, fd: int) -> None:
    """What root makes for a reader of its own goes to the service's user, whose passes must be able to stamp and remove it."""
    if os.geteuid() == 0:
        owner = os.stat(timeline)
        os.fchown(fd, owner.st_uid, owner.st_gid)


@contextlib.contextmanager
def _directory(timeline: Path, how: int) -> Iterator[Path]:
    path = timeline / DIRECTORY
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o755)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _belongs_to(timeline, fd)
        fcntl.flock(fd, how)
        yield path
    finally:
        os.close(fd)


@contextlib.contextmanager
def none_taken(timeline: Path) -> Iterator[None]:
    """Nobody takes a lease inside; for who looks at them and drops what is not held."""
    with _directory(timeline, fcntl.LOCK_EX):
        yield


def held(timeline: Path, *, now_ns: int, tidy: bool = False) -> list[int]:
    """The seqs that are held, or were a moment ago. With `tidy`, under `none_taken`, leases whose grace is over are removed."""
    try:
        names = os.listdir(timeline / DIRECTORY)
    except FileNotFoundError:
        return []
    numbers = sorted(int(name) for name in names if name.isascii() and name.isdecimal())
    return [seq for seq in numbers if _holds(timeline / DIRECTORY / str(seq), now_ns, tidy)]


def _holds(path: Path, now_ns: int, tidy: bool) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Held: an old stamp says nothing any more.
            os.ftruncate(fd, 0)
            return True
        stamp = os.pread(fd, MAX_STAMP, 0)
        if not stamp.isdigit():
            os.pwrite(fd, str(now_ns).encode(), 0)
            return True
        if now_ns < int(stamp) + GRACE_NS:
            return True
        if tidy:
            os.unlink(path)
        return False
    finally:
        os.close(fd)
