"""`chain.lock`: what a timeline has of history stands still while it is held.

Who takes base points away, or intervals, holds it exclusively, all the time that it works. Shared it is held by who names a
point that is to stay (a lock, a fork), so that what was looked at is still there when it is named, and by who publishes a file on
a base point of *another* timeline (the first of a fork). Publishing in the own timeline needs no lock: a base point stands on the
newest, and that always stays.

A flock on `intervals/` is for longer: exclusive for who drops or thins intervals, shared for who reads all of them, as `cdp
check` does. Meanwhile locks can be set, and base points cut and merged.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from cdpserver import durable
from cdpserver.errors import BrokenError, RefusedError
from cdpserver.timeline import INTERVALS

FILE = "chain.lock"

NOTE = "chain.json"
"""In the timeline: what a merge that was killed still has to remove."""


WAIT_S = 20.0
"""How long a request waits for a pass that drops or merges; an operator would rather be told."""

PAUSE_S = 0.02


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold it exclusively. RefusedError at once if somebody holds it."""
    fd = _open(directory)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"history of timeline {directory.name} is being merged, dropped or locked",
                hint="wait for that: cdp job list",
            ) from None
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def stays(directory: Path, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Nothing of a timeline is dropped or merged inside. RefusedError after waiting for that in vain. For threads."""
    fd = _open(directory)
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
def shared(directory: Path) -> Iterator[None]:
    """Hold it with others; waits for a merge to end."""
    fd = _open(directory)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def standing_on(backing: Path, directory: Path) -> Iterator[None]:
    """While a file of timeline `directory` is published on `backing`, that is not taken away. BrokenError if it just was."""
    if backing.parent == directory or backing.suffix != ".qcow2":
        yield
        return
    with shared(backing.parent):
        if not backing.exists() or (backing.parent / NOTE).exists():
            raise BrokenError(
                f"{backing.parent.name}/{backing.name} was merged meanwhile",
                hint="the base point is written anew on what took its place",
            )
        yield


@contextlib.contextmanager
def intervals_alone(directory: Path) -> Iterator[bool]:
    """Nobody else drops or thins intervals inside, or reads all of them; False if somebody does."""
    with _intervals(directory) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def intervals_stand(directory: Path) -> Iterator[None]:
    """No interval is dropped or thinned inside; waits for who does that."""
    with _intervals(directory) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _intervals(directory: Path) -> Iterator[int]:
    fd = os.open(directory / INTERVALS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _open(directory: Path) -> int:
    try:
        return os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in durable.READ_ONLY:
            raise
    # Who may not write only reads: it holds the file if there is one, and others drop nothing meanwhile.
    path = directory / FILE
    return os.open(path if path.exists() else directory, os.O_RDONLY | os.O_CLOEXEC)
