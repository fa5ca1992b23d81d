"""`chain.lock`: the shape of a timeline's chain of base points stands still while it is held.

Who takes base points away, or intervals, holds it exclusively, all the time that it works. Who publishes a file on a base
point of *another* timeline (the first of a fork) holds it shared for the moment of publishing. Publishing in the own timeline
needs no lock: a base point stands on the newest, and that always stays.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cdpserver.errors import RefusedError

FILE = "chain.lock"


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold it exclusively. RefusedError at once if somebody holds it."""
    fd = _open(directory)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"base points of timeline {directory.name} are being merged or dropped already",
                hint="wait for that: cdp job list",
            ) from None
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def shared(directory: Path) -> Iterator[None]:
    """Hold it with others; waits for a merge to end."""
    fd = _open(directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def _open(directory: Path) -> int:
    return os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
