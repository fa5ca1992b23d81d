"""LMDB files are as long as they say: a page that is mapped beyond the end of its file ends the process that reads it (SIGBUS).

LMDB reads its two meta pages when it opens a file, and believes what they say of the last page. So a file that was cut short is
refused before any other page is looked at. `check_length` after opening, `keep_length` after every change: LMDB does not write
pages that a transaction took and gave back, so the last ones that it counts may be missing though nothing is.
Between a change and `keep_length` a sound file may look short: to readers it is one that is not whole yet.

The file in which LMDB notes readers is made sparse, and written through a mapping: on a full store that is SIGBUS, too.
`allocate_lock` before opening.
"""

import os
from pathlib import Path

import lmdb

from cdpserver import durable

DAMAGE = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.VersionMismatchError,
    lmdb.PageNotFoundError,
    lmdb.NotFoundError,
)
"""What LMDB says of a file that is damaged, rather than of what it cannot do now."""

READERS_HEAD, READER = 128, 64
"""Bytes of LMDB's lock file (`MDB_txninfo`, `MDB_reader` of lmdb 0.9): 8192 for 126 readers, as it makes it by itself."""


def check_length(env: lmdb.Environment, path: Path) -> None:
    """lmdb.InvalidError if the file of an environment, just opened, is cut short."""
    held, needed = path.stat().st_size, _needed(env)
    if held < needed:
        raise lmdb.InvalidError(f"{path}: it is cut short to {held} bytes of {needed}")


def keep_length(env: lmdb.Environment, path: Path) -> None:
    """Let the file be as long as it says after a change, also where its last pages were never written. OSError."""
    if path.stat().st_size < _needed(env):
        os.truncate(path, _needed(env))


def allocate_lock(path: Path, readers: int) -> None:
    """Have room for the file beside an environment in which LMDB notes up to so many readers. lmdb.DiskError if there is none.

    Why else it cannot be written is for LMDB to say. It is opened only where it lacks room, which is before this process has the
    environment open: closing it would give back what LMDB holds locked in it.
    """
    size = READERS_HEAD + readers * READER
    try:
        if path.exists() and path.stat().st_blocks * 512 >= size:
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in durable.NO_SPACE:
            raise lmdb.DiskError(f"{path}: {error.strerror}") from error


def _needed(env: lmdb.Environment) -> int:
    return int((env.info()["last_pgno"] + 1) * env.stat()["psize"])
