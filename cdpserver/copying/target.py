"""Where a copy is written: a raw file, or an NBD export. Every worker writes through a writer of its own."""

import os
import threading
from pathlib import Path
from typing import Protocol

from cdpserver import durable
from cdpserver.copying.nbdend import Connection
from cdpserver.errors import BrokenError, NoSpaceError


class Writer(Protocol):
    """Writes for one thread."""

    def write(self, data: memoryview, offset: int) -> None:
        """All of `data`. NoSpaceError, CutError, BrokenError."""

    def zero(self, start: int, end: int) -> None:
        """Let [start, end) read as zeros."""

    def close(self) -> None:
        """Give it back."""


class Target(Protocol):
    """A disk to be written; `fresh` if what is never written reads as zeros."""

    fresh: bool

    def writer(self) -> Writer:
        """For one thread."""

    def flush(self) -> None:
        """Every write that has returned is durable."""


class RawFile:
    """A file that was made for this copy. Its size is set before."""

    fresh = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def writer(self) -> "RawFile":
        """Itself: a file can be written by many threads."""
        return self

    def write(self, data: memoryview, offset: int) -> None:
        """All of `data`."""
        try:
            while data:
                done = os.pwrite(self._fd, data, offset)
                data, offset = data[done:], offset + done
        except OSError as error:
            raise self._ours(error) from error

    def zero(self, start: int, end: int) -> None:
        """Nothing was ever written there."""
        raise AssertionError("zeros are not written into a fresh file")

    def flush(self) -> None:
        """fdatasync"""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._ours(error) from error

    def _ours(self, error: OSError) -> Exception:
        if error.errno in durable.NO_SPACE:
            return NoSpaceError(
                f"no space left to write {self._path}",
                hint="make room there, then give the same command again",
            )
        return BrokenError(f"cannot write {self._path}: {error.strerror}")

    def close(self) -> None:
        """A writer's end is not the file's."""

    def end(self) -> None:
        """Close the file."""
        os.close(self._fd)


class NbdTarget:
    """An export. With multi-conn every worker has a connection of its own; else they share one."""

    def __init__(self, uri: str, *, fresh: bool = False) -> None:
        self.uri = uri
        self.fresh = fresh
        self._main = Connection(uri, writes=True)
        self.size = self._main.size
        self._lock = threading.Lock()

    def writer(self) -> Writer:
        """A connection, or a turn at the one that there is."""
        return Connection(self.uri, writes=True) if self._main.shared else _Shared(self._main, self._lock)

    def flush(self) -> None:
        """NBD's FLUSH, which with multi-conn is for the writes of all connections."""
        with self._lock:
            self._main.flush()

    def end(self) -> None:
        """Leave."""
        self._main.close()


class _Shared:
    def __init__(self, connection: Connection, lock: threading.Lock) -> None:
        self._connection = connection
        self._lock = lock

    def write(self, data: memoryview, offset: int) -> None:
        with self._lock:
            self._connection.write(data, offset)

    def zero(self, start: int, end: int) -> None:
        with self._lock:
            self._connection.zero(start, end)

    def close(self) -> None:
        """The connection is the target's."""
