"""Files appear whole or not at all, and stay: the only place that knows when to fsync and when to rename.

Durability: each function returns when what it did survives a power loss. If it raises, the old state is still
there whole; at most a `.tmp-*` or `.removing-*` name is left over, which `sweep` takes away.

Errors: a full file system (or quota) is NoSpaceError, a failed device BrokenError; any other OSError (not
found, exists, permission) goes to the caller as it is.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from cdpserver.errors import BrokenError, CorruptError, NoSpaceError
from cdpserver.names import show

TEMPORARY = ".tmp-"
REMOVING = ".removing-"

SECTOR = 512
"""What st_blocks counts, whatever the file system's own block is (stat(2))."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What it says where there is no room."""

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says to who may not write: read-only media, or another's files."""

DELETIONS = 10
"""Times that a directory is deleted: who had found it by its old name may have made one more file in it, and a few can do so."""

MAX_JSON_BYTES = 64 << 20
"""Largest JSON file that is read: far above a catalog copy of 100,000 disks, so anything more is damage."""


@contextlib.contextmanager
def io_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn the OSErrors that mean *no space* and *broken device* into the project's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise NoSpaceError(
                f"no space left to {doing} {path}",
                hint="free space on the store's file system, then try again",
            ) from error
        if error.errno == errno.EIO:
            raise BrokenError(
                f"cannot {doing} {path}: {error.strerror}", hint="look at the kernel log"
            ) from error
        raise


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turn every OSError of reading what is stored under `path` into the project's: what is missing, or not the file or directory
    that it should be, is damage (CorruptError), anything else BrokenError.
    """
    try:
        with io_errors("read", path):
            yield
    except OSError as error:
        where, why = error.filename or path, error.strerror
        if is_damage(error):
            raise CorruptError(f"{where} is damaged: {why}") from error
        raise BrokenError(f"cannot read {where}: {why}", hint="look at its owner and mode") from error


def is_damage(error: OSError) -> bool:
    """Does it speak of what is stored, rather than of a device or a right?"""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EUCLEAN)


def fsync_dir(path: Path) -> None:
    """Make the names in directory `path` durable."""
    with io_errors("sync", path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def is_at(path: Path, fd: int) -> bool:
    """Does the name still lead to the open file?"""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def close_open(*fds: int) -> None:
    """Close those that are open, which -1 is not."""
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def used_bytes(path: str | Path) -> int:
    """The room that a file takes on its file system; 0 if there is none (any more)."""
    try:
        return os.stat(path).st_blocks * SECTOR
    except FileNotFoundError:
        return 0


def _write_all(fd: int, data: bytes | bytearray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_whole(path: Path, data: bytes | bytearray, mode: int = 0o644) -> None:
    """Create or replace file `path`: a reader, or a power loss, sees the old content or all of `data`."""
    # One process writes a given file at a time, so its id makes the name unique; a left-over is overwritten.
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    with io_errors("write", path):
        try:
            fd = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode
            )
            try:
                _write_all(fd, data)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    fsync_dir(path.parent)


def publish(tmp: Path, path: Path) -> None:
    """Give the finished file or directory `tmp` its name `path` (same file system); `tmp` is synced first.

    Of a directory only its names are synced: files in it must be durable before.
    """
    with io_errors("publish", path):
        fd = os.open(tmp, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(tmp, path)
    fsync_dir(path.parent)
    if tmp.parent != path.parent:
        fsync_dir(tmp.parent)


def make_dir(path: Path, mode: int = 0o755) -> None:
    """Create directory `path`; FileExistsError if there is one."""
    with io_errors("make directory", path):
        os.mkdir(path, mode)
    fsync_dir(path.parent)


def _delete(path: Path) -> None:
    """Delete whatever `path` is; what vanishes meanwhile is fine."""
    for left in reversed(range(DELETIONS)):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            if not os.path.lexists(path):
                return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not left:
                raise


def remove_tree(path: Path) -> None:
    """Remove file or directory `path`: at once by name, then its content. Safe to run again after a crash."""
    doomed = path.with_name(REMOVING + path.name)
    with io_errors("remove", path):
        _delete(doomed)
        try:
            os.rename(path, doomed)
        except FileNotFoundError:
            return
        fsync_dir(path.parent)
        _delete(doomed)


def sweep(directory: Path) -> list[str]:
    """Remove what crashes left in `directory`; the removed names.

    A temporary whose process runs is its own affair: a target that outlived the service may be in the middle of one.
    """
    names = (n for n in os.listdir(directory) if n.startswith((TEMPORARY, REMOVING)))
    left_over = sorted(name for name in names if not _is_being_written(name))
    with io_errors("sweep", directory):
        for name in left_over:
            _delete(directory / name)
    return left_over


def _is_being_written(name: str) -> bool:
    """Does a name of `write_whole`'s end in the id of another process that runs?"""
    pid = name.rpartition("-")[2]
    return (
        name.startswith(TEMPORARY)
        and pid.isdecimal()
        and int(pid) != os.getpid()
        and os.path.exists(f"/proc/{pid}")
    )


# --- JSON files


def write_json(path: Path, value: dict[str, Any], mode: int = 0o644) -> None:
    """`value` as a readable JSON file, whole."""
    write_whole(path, json.dumps(value, indent=1).encode() + b"\n", mode)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. CorruptError if it holds none; FileNotFoundError if there is no file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except IsADirectoryError:
        raise corrupt_json(path, "it is a directory") from None
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise corrupt_json(path, str(error)) from None
    return value


def read_objects(
    path: Path, keys: set[str], *, optional: Set[str] = frozenset()
) -> dict[str, dict[str, Any]]:
    """Objects by their names, each with `keys` and maybe some `optional` ones; none if there is no file. CorruptError for one
    that says other things.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    for name, said in value.items():
        if not isinstance(said, dict):
            raise corrupt_json(path, f"{show(name)} is not an object")
        take_keys(said, keys | (optional & said.keys()), path)
    return value


def corrupt_json(path: Path, why: str) -> CorruptError:
    """The error for a JSON file that cannot be what it should be."""
    return CorruptError(
        f"{path} is damaged: {why}", hint=f"move {path.name} away and restore it from a backup"
    )


def take_int(value: dict[str, Any], key: str, path: Path, *, least: int = 0) -> int:
    """The integer `key` of the object read from `path`, at least `least`; CorruptError otherwise."""
    number = value.get(key)
    if type(number) is not int or number < least:  # bool is an int to isinstance
        raise corrupt_json(path, f"{key!r} is not a whole number from {least}")
    return number


def take_str(value: dict[str, Any], key: str, path: Path) -> str:
    """The string `key` of the object read from `path`; CorruptError otherwise."""
    text = value.get(key)
    if not isinstance(text, str):
        raise corrupt_json(path, f"{key!r} is not a text")
    return text


def take_keys(value: dict[str, Any], keys: set[str], path: Path) -> None:
    """Check that the object read from `path` has exactly `keys`; CorruptError otherwise."""
    if value.keys() != keys:
        different = ", ".join(sorted(map(repr, value.keys() ^ keys)))[:200]
        raise corrupt_json(path, f"missing or unknown: {different}")
