"""Flocks that keep history where it is for a moment: `chain.lock` of a timeline, held by whoever changes what is there.

Who drops intervals or base points, or merges them, holds it alone; who names a point that is to stay (a lock) holds it with
others, so that what was looked at is still there when it is named.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cdpserver.errors import RefusedError

FILE = "chain.lock"

WAIT_S = 20.0
"""How long a request waits for a pass that drops or merges; an operator would rather be told."""

PAUSE_S = 0.02


@contextlib.contextmanager
def stays(directory: Path, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Nothing of a timeline is dropped or merged inside. RefusedError after waiting for that in vain. For threads."""
    fd = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RefusedError(
                        f"history of timeline {directory.name} is being dropped or merged",
                        hint="try again when that has ended: cdp job list",
                    ) from None
            time.sleep(PAUSE_S)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold it alone, to drop something. RefusedError at once while somebody else drops, merges or sets a lock."""
    fd = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"history of timeline {directory.name} is being merged, dropped or locked",
                hint="the next pass tries again",
            ) from None
        yield
    finally:
        os.close(fd)
