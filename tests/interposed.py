"""The calls of the C library by which this process changes files: each is seen, and can be made to fail.

    Python's os and open, LMDB's library -> table of addresses (the GOT) of their ELF object -> here -> libc

A call is told when it is about a path below the root that is watched. What goes another way is met where it goes: the two calls
of ours by ctypes (renameat2, fallocate), and Python's mmap (its own allocator calls libc's).
"""

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lmdb
import pytest

from cdpserver.journal import firstcopy
from cdpserver.retention import thin

_libc = ctypes.CDLL("libc.so.6", use_errno=True)
"""Asked for by name: of the whole process one would get entries of the very tables that are changed here."""

_busy = threading.local()

JUMPS = {"x86_64": (6, 7), "aarch64": (1025, 1026)}[os.uname().machine]
"""Relocations that are the address of a function: GLOB_DAT, JUMP_SLOT."""

AT_FDCWD = -100
PROT_READ_WRITE = 3

INT, LONG, SIZE, TEXT, POINTER = (
    ctypes.c_int,
    ctypes.c_long,
    ctypes.c_size_t,
    ctypes.c_char_p,
    ctypes.c_void_p,
)


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `kind` is what it does: open, write, truncate, allocate, sync, rename, link, unlink, mkdir, rmdir, copy, read,
    punch, exchange, chmod, lock, list, map."""

    kind: str
    name: str
    path: Path
    other: Path | None = None
    fd: int = -1
    offset: int = 0
    data: bytes = b""
    flags: int = 0


class Watcher(Protocol):
    """Who is told."""

    def before(self, call: Call) -> int | None:
        """An errno that it is to fail with; with a write -1 for half of it; None to let it be done."""

    def after(self, call: Call, result: int) -> None:
        """It was done; `result` is what it returned, -1 if it failed by itself."""


# --- what each function is about


def _of_fd(fd: int) -> Path:
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))
    except OSError:
        return Path("/")


def _of_path(path: bytes | None, directory: int = AT_FDCWD) -> Path:
    text = os.fsdecode(path or b"")
    if directory != AT_FDCWD and not text.startswith("/"):
        return _of_fd(directory) / text
    return Path(os.path.abspath(text))


def _position(fd: int) -> int:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
        return os.fstat(fd).st_size
    return os.lseek(fd, 0, os.SEEK_CUR)


def _bytes(pointer: int | None, length: int) -> bytes:
    return ctypes.string_at(pointer, length) if pointer and length else b""


def _gathered(vector: int, count: int) -> bytes:
    parts = (ctypes.c_uint64 * (2 * count)).from_address(vector) if count else (ctypes.c_uint64 * 0)()
    return b"".join(_bytes(parts[at], parts[at + 1]) for at in range(0, 2 * count, 2))


def _open(name: str, path: bytes, flags: int, _mode: int) -> Call:
    return Call("open", name, _of_path(path), flags=flags)


def _openat(name: str, directory: int, path: bytes, flags: int, _mode: int) -> Call:
    return Call("open", name, _of_path(path, directory), flags=flags)


def _write(name: str, fd: int, data: int, length: int) -> Call:
    path = _of_fd(fd)
    here = str(path).startswith("/") and os.path.isabs(path) and path.name and _is_file(fd)
    if not here:
        return Call("write", name, Path("/"), fd=fd)
    return Call("write", name, path, fd=fd, offset=_position(fd), data=_bytes(data, length))


def _is_file(fd: int) -> bool:
    return os.path.isfile(f"/proc/self/fd/{fd}")


def _pwrite(name: str, fd: int, data: int, length: int, offset: int) -> Call:
    return Call("write", name, _of_fd(fd), fd=fd, offset=offset, data=_bytes(data, length))


def _writev(name: str, fd: int, vector: int, count: int) -> Call:
    if not _is_file(fd):
        return Call("write", name, Path("/"), fd=fd)
    return Call("write", name, _of_fd(fd), fd=fd, offset=_position(fd), data=_gathered(vector, count))


def _by_fd(kind: str) -> Callable[..., Call]:
    def make(name: str, fd: int, offset: int = 0, *_: int) -> Call:
        return Call(kind, name, _of_fd(fd), fd=fd, offset=offset)

    return make


def _allocate(name: str, fd: int, offset: int, length: int) -> Call:
    return Call("allocate", name, _of_fd(fd), fd=fd, offset=offset + length)


def _read(name: str, fd: int, *_: int) -> Call:
    return Call("read", name, _of_fd(fd), fd=fd)


def _pwritev(name: str, fd: int, vector: int, count: int, offset: int, _flags: int) -> Call:
    return Call("write", name, _of_fd(fd), fd=fd, offset=offset, data=_gathered(vector, count))


def _map(name: str, _at: int, _length: int, _may: int, _flags: int, fd: int, offset: int) -> Call:
    return Call("map", name, _of_fd(fd), fd=fd, offset=offset)


def _copy(name: str, out: int, source: int, *_: int) -> Call:
    return Call("copy", name, _of_fd(out), other=_of_fd(source), fd=out)


def _copy_range(name: str, source: int, _at: int, out: int, *_: int) -> Call:
    return Call("copy", name, _of_fd(out), other=_of_fd(source), fd=out)


def _truncate(name: str, path: bytes, length: int) -> Call:
    return Call("truncate", name, _of_path(path), offset=length)


def _path(kind: str) -> Callable[..., Call]:
    def make(name: str, path: bytes, *_: int) -> Call:
        return Call(kind, name, _of_path(path))

    return make


def _path_at(kind: str) -> Callable[..., Call]:
    def make(name: str, directory: int, path: bytes, flags: int = 0) -> Call:
        is_dir = kind == "unlink" and flags
        return Call("rmdir" if is_dir else kind, name, _of_path(path, directory))

    return make


def _two(kind: str) -> Callable[..., Call]:
    def make(name: str, old: bytes, new: bytes) -> Call:
        return Call(kind, name, _of_path(old), _of_path(new))

    return make


def _two_at(kind: str) -> Callable[..., Call]:
    def make(name: str, old_dir: int, old: bytes, new_dir: int, new: bytes, *_: int) -> Call:
        return Call(kind, name, _of_path(old, old_dir), _of_path(new, new_dir))

    return make


def _symlink(name: str, _to: bytes, path: bytes) -> Call:
    return Call("symlink", name, _of_path(path))


def _symlink_at(name: str, _to: bytes, directory: int, path: bytes) -> Call:
    return Call("symlink", name, _of_path(path, directory))


_WIDE = ("open", "openat", "pwrite", "pread", "ftruncate", "truncate", "posix_fallocate", "sendfile", "mmap")
_TABLE: dict[str, tuple[Callable[..., Call], Any, tuple[Any, ...]]] = {
    "open": (_open, INT, (TEXT, INT, INT)),
    "openat": (_openat, INT, (INT, TEXT, INT, INT)),
    "write": (_write, LONG, (INT, POINTER, SIZE)),
    "pwrite": (_pwrite, LONG, (INT, POINTER, SIZE, LONG)),
    "writev": (_writev, LONG, (INT, POINTER, INT)),
    "read": (_read, LONG, (INT, POINTER, SIZE)),
    "pread": (_read, LONG, (INT, POINTER, SIZE, LONG)),
    "readv": (_read, LONG, (INT, POINTER, INT)),
    "preadv64v2": (_read, LONG, (INT, POINTER, INT, LONG, INT)),
    "pwritev64v2": (_pwritev, LONG, (INT, POINTER, INT, LONG, INT)),
    "mmap": (_map, LONG, (POINTER, SIZE, INT, INT, INT, LONG)),
    "ftruncate": (_by_fd("truncate"), INT, (INT, LONG)),
    "truncate": (_truncate, INT, (TEXT, LONG)),
    "posix_fallocate": (_allocate, INT, (INT, LONG, LONG)),
    "fsync": (_by_fd("sync"), INT, (INT,)),
    "fdatasync": (_by_fd("sync"), INT, (INT,)),
    "rename": (_two("rename"), INT, (TEXT, TEXT)),
    "renameat": (_two_at("rename"), INT, (INT, TEXT, INT, TEXT)),
    "link": (_two("link"), INT, (TEXT, TEXT)),
    "linkat": (_two_at("link"), INT, (INT, TEXT, INT, TEXT, INT)),
    "symlink": (_symlink, INT, (TEXT, TEXT)),
    "symlinkat": (_symlink_at, INT, (TEXT, INT, TEXT)),
    "unlink": (_path("unlink"), INT, (TEXT,)),
    "unlinkat": (_path_at("unlink"), INT, (INT, TEXT, INT)),
    "rmdir": (_path("rmdir"), INT, (TEXT,)),
    "mkdir": (_path("mkdir"), INT, (TEXT, INT)),
    "mkdirat": (_path_at("mkdir"), INT, (INT, TEXT, INT)),
    "opendir": (_path("list"), POINTER, (TEXT,)),
    "fdopendir": (_by_fd("list"), POINTER, (INT,)),
    "chmod": (_path("chmod"), INT, (TEXT, INT)),
    "fchmod": (_by_fd("chmod"), INT, (INT, INT)),
    "fchmodat": (_path_at("chmod"), INT, (INT, TEXT, INT, INT)),
    "flock": (_by_fd("lock"), INT, (INT, INT)),
    "sendfile": (_copy, LONG, (INT, INT, POINTER, SIZE)),
    "copy_file_range": (_copy_range, LONG, (INT, POINTER, INT, POINTER, SIZE, INT)),
}


# --- the tables of addresses


def _objects() -> Iterator[tuple[Path, int]]:
    """Python and LMDB's library, as they are mapped: path, and the address of their first byte."""
    wanted = {Path(sys.executable).resolve(), *Path(lmdb.__file__).parent.glob("*.so")}
    seen: set[Path] = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split(None, 5)
            path = Path(fields[5].strip()) if len(fields) > 5 else Path()
            is_one = path in wanted or path.name.startswith("libpython")
            if is_one and path not in seen and int(fields[2], 16) == 0:
                seen.add(path)
                yield path, int(fields[0].split("-")[0], 16)


def _slots() -> Iterator[tuple[str, int]]:
    """(function, address of where its address is) of everything in the table above."""
    known = set(_TABLE) | {f"{name}64" for name in _WIDE}
    for path, base in _objects():
        for name, at in _relocations(path.read_bytes(), base):
            if name in known and not (name.startswith("mmap") and "lmdb" not in str(path)):
                yield name, at


def _relocations(elf: bytes, base: int) -> Iterator[tuple[str, int]]:
    is_fixed = struct.unpack_from("<H", elf, 16)[0] == 2  # ET_EXEC
    table, size, count = (
        struct.unpack_from("<Q", elf, 40)[0],
        *struct.unpack_from("<HH", elf, 58),
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + number * size) for number in range(count)]
    for section in sections:
        if section[1] != 4 or not section[6]:  # SHT_RELA; its symbols
            continue
        symbols = sections[section[6]]
        texts = sections[symbols[6]][4] if symbols[6] else 0
        for at in range(section[4], section[4] + section[5], 24):
            place, info, _ = struct.unpack_from("<QQq", elf, at)
            if info & 0xFFFFFFFF in JUMPS:
                start = texts + struct.unpack_from("<I", elf, symbols[4] + (info >> 32) * 24)[0]
                yield elf[start : elf.index(b"\0", start)].decode(), place + (0 if is_fixed else base)


def _set(at: int, address: int) -> int:
    """Write an address; what was there."""
    page = at & -4096
    assert (
        _libc.mprotect(ctypes.c_void_p(page), SIZE(8192 if at + 8 > page + 4096 else 4096), PROT_READ_WRITE)
        == 0
    )
    slot = ctypes.c_uint64.from_address(at)
    before = slot.value
    slot.value = address
    return before


# --- the watch


def _make(name: str, root: str, watcher: Watcher, failed: list[BaseException]) -> tuple[Any, Any]:
    """A function that libc's callers can call instead of `name`."""
    told, result, arguments = _TABLE[name.removesuffix("64")]
    real = getattr(_libc, name)
    real.restype, real.argtypes = result, list(arguments)
    by_value = name.startswith("posix_fallocate")  # returns its error

    def fail(code: int) -> int:
        if by_value:
            return code
        ctypes.set_errno(code)
        return 0 if result is POINTER else -1

    def call(*given: Any) -> int:
        if getattr(_busy, "now", False):
            return int(real(*given) or 0)
        _busy.now = True
        saved = ctypes.get_errno()
        done: int | None = None
        try:
            seen = told(name, *given)
            if not any(str(path).startswith(root) for path in (seen.path, seen.other) if path is not None):
                ctypes.set_errno(saved)
                return int(real(*given) or 0)
            answer = watcher.before(seen)
            if answer is not None and answer > 0:
                return fail(answer)
            if answer is not None:
                given = _half(name, seen, given)
                seen = Call(
                    seen.kind, name, seen.path, None, seen.fd, seen.offset, seen.data[: len(seen.data) // 2]
                )
            ctypes.set_errno(saved)
            done = int(real(*given) or 0)
            code = ctypes.get_errno()
            watcher.after(seen, done)
            ctypes.set_errno(code)
            return done
        except BaseException as error:  # noqa: BLE001 - the rim: libc's caller takes no exceptions
            failed.append(error)
            return done if done is not None else int(real(*given) or 0)
        finally:
            _busy.now = False

    prototype = ctypes.CFUNCTYPE(result, *arguments, use_errno=True)
    made = prototype(call)
    return made, ctypes.cast(made, ctypes.c_void_p).value


def _half(name: str, seen: Call, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a write that writes half of it."""
    half = len(seen.data) // 2
    if name in ("writev", "pwritev64v2"):
        first = ctypes.c_uint64.from_address(given[1] + 8)  # its caller knows what was written by the result
        first.value = min(first.value, half)
        return (given[0], given[1], 1, *given[3:])
    return (*given[:2], half, *given[3:])


# --- what goes another way


class _Python:
    """Calls that Python code makes by itself: each is told, as those of the table are."""

    def __init__(self, root: str, watcher: Watcher) -> None:
        self._root, self._watcher = root, watcher
        self._fallocate, self._map = firstcopy._libc.fallocate, mmap.mmap

    def _told(self, call: Call, do: Callable[[], Any]) -> Any:
        if not str(call.path).startswith(self._root):
            return do()
        code = self._watcher.before(call)
        if code:
            raise OSError(code, os.strerror(code))
        done = do()
        self._watcher.after(call, done if isinstance(done, int) else 0)
        return done

    def _by_errno(self, call: Call, do: Callable[[], int]) -> int:
        """As ctypes' caller sees it."""
        try:
            return int(self._told(call, do))
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1

    def fallocate(self, fd: int, how: int, offset: Any, length: Any) -> int:
        """fallocate(2), which punches."""
        call = Call("punch", "fallocate", _of_fd(fd), fd=fd, offset=offset.value)
        return self._by_errno(call, lambda: int(self._fallocate(fd, how, offset, length)))

    def renameat2(self, old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> int:
        """renameat2(2), which exchanges."""
        call = Call("exchange", "renameat2", _of_path(old, old_dir), _of_path(new, new_dir))
        return self._by_errno(call, lambda: int(_libc.renameat2(old_dir, old, new_dir, new, flags)))

    def mmap(self, fd: int, length: int, *more: Any, **named: Any) -> mmap.mmap:
        """mmap.mmap."""
        made: mmap.mmap = self._told(
            Call("map", "mmap", _of_fd(fd), fd=fd), lambda: self._map(fd, length, *more, **named)
        )
        return made


@contextmanager
def interposed(root: Path, watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` is told of every call that is about something below `root`."""
    failed: list[BaseException] = []
    slots = list(_slots())
    made = {name: _make(name, str(root), watcher, failed) for name, _ in slots}
    python = _Python(str(root), watcher)
    before = [(at, _set(at, made[name][1])) for name, at in slots]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(firstcopy._libc, "fallocate", python.fallocate)
            patch.setattr(thin._libc, "renameat2", python.renameat2)
            patch.setattr(mmap, "mmap", python.mmap)
            yield
    finally:
        for at, address in before:
            _set(at, address)
        if failed:
            raise failed[0]


def functions() -> set[str]:
    """What is interposed here."""
    return {name for name, _ in _slots()}
