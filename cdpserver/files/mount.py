"""A point as a directory, by FUSE and read-only: the disk as a file, and the file systems in it below.

    disk.img   fs/ (a disk without partitions)   p1/ p2/ ...   lv/VG/LV/

Whatever fails is EIO and an event, never a hang: the worker has its time limit, and after a failure the next question has a
new one.
Threads: none; libfuse calls one after the other.
"""

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mfusepy

from cdpserver.errors import CdpError, NotFoundError
from cdpserver.files.browser import Browser, Disk, File, bounded
from cdpserver.files.formats.base import FILE_SYSTEMS, OPAQUE

IMAGE = "disk.img"
KNOWN = 65_536
"""Files whose attributes are kept; `find` asks for each after the listing."""

TYPES = {
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "link": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
}


class PointFiles(mfusepy.Operations):  # type: ignore[misc]
    """What libfuse asks. `failed` is told what could not be read, and why."""

    use_ns = True

    def __init__(self, disk: Disk, failed: Callable[[str, str], None]) -> None:
        self._disk, self._failed = disk, failed
        self._browser: Browser | None = Browser(disk)
        holds = {v.name: v.name or "fs" for v in self._browser.volumes() if v.holds in FILE_SYSTEMS}
        self._roots = {tuple(path.split("/")): name for name, path in holds.items()}
        self._above = {path[:length] for path in self._roots for length in range(len(path))} | {()}
        self._known: OrderedDict[str, File] = OrderedDict()
        self._open: dict[int, File] = {}
        self._next = 0
        self.remarks = [
            f"{'/'.join(root)}: {said}" for root, name in self._roots.items() for said in self._opened(name)
        ]
        """What is to be known of the file systems, such as how old the view may be."""

    def close(self) -> None:
        """End the worker."""
        if self._browser is not None:
            self._browser.close()
            self._browser = None

    def _opened(self, volume: str) -> list[str]:
        """Remarks; of one that cannot be opened, why. The others can."""
        try:
            if self._browser is None:
                self._browser = Browser(self._disk)
            return self._browser.open(volume)
        except (CdpError, OSError) as error:
            self.close()
            self._failed(f"/{volume or 'fs'}", str(error))
            return [str(error)]

    # -- where a path is

    def _split(self, path: str) -> tuple[str, bytes] | None:
        """(volume, path in it); None above them."""
        parts = tuple(part for part in path.split("/") if part)
        for root, volume in self._roots.items():
            if parts[: len(root)] == root:
                return volume, b"/" + os.fsencode("/".join(parts[len(root) :]))
        if parts in self._above or parts == (IMAGE,):
            return None
        raise mfusepy.FuseOSError(errno.ENOENT)

    def _ask(self, path: str, question: Callable[[Browser], Any]) -> Any:
        try:
            if self._browser is None:
                self._browser = Browser(self._disk)
            return question(self._browser)
        except NotFoundError:
            raise mfusepy.FuseOSError(errno.ENOENT) from None
        except (CdpError, OSError) as error:
            self.close()
            self._failed(path, str(error))
            raise mfusepy.FuseOSError(errno.EIO) from None

    def _stat(self, path: str, *, anew: bool = False) -> File:
        place = self._split(path)
        assert place is not None
        file = None if anew else self._known.get(path)
        if file is None:
            file = self._ask(path, lambda browser: browser.stat(*place))
            self._keep(path, file)
        if file.type == "unreadable":
            raise mfusepy.FuseOSError(errno.EIO)
        return file

    def _keep(self, path: str, file: File) -> None:
        self._known[path] = file
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)

    # -- what libfuse calls

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Attributes; set-user-id is never told."""
        if self._split(path) is None:
            if path == f"/{IMAGE}":
                return {"st_mode": stat.S_IFREG | 0o400, "st_size": self._disk.size, "st_nlink": 1}
            return {"st_mode": stat.S_IFDIR | 0o555, "st_nlink": 2}
        file = self._stat(path)
        return {
            "st_mode": TYPES.get(file.type, stat.S_IFREG) | file.mode & 0o1777,
            "st_size": file.size,
            "st_nlink": file.links,
            "st_uid": file.uid,
            "st_gid": file.gid,
            "st_mtime": file.mtime_ns,
            "st_atime": file.atime_ns,
            "st_ctime": file.mtime_ns,
        }

    def readdir(self, path: str, fh: int) -> Iterator[str]:
        """Names."""
        yield from (".", "..")
        place = self._split(path)
        if place is None:
            parts = tuple(part for part in path.split("/") if part)
            if not parts:
                yield IMAGE
            below = {one[len(parts)] for one in self._roots if one[: len(parts)] == parts}
            yield from sorted(below)
            return
        top = path.rstrip("/")
        for file in self._ask(path, lambda browser: list(bounded(browser.entries(*place), "the directory"))):
            name = os.fsdecode(file.name)
            self._keep(f"{top}/{name}", file)
            yield name

    def readlink(self, path: str) -> str:
        """What the link says."""
        return os.fsdecode(self._stat(path).target or b"")

    def open(self, path: str, flags: int) -> int:
        """A handle that has the file's map."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise mfusepy.FuseOSError(errno.EROFS)
        self._next += 1
        if path != f"/{IMAGE}":
            file = self._stat(path, anew=True)
            runs = self._ask(path, lambda browser: tuple(bounded(browser.extents(file), "the file's map")))
            self._open[self._next] = replace(file, runs=runs)
        return self._next

    def release(self, path: str, fh: int) -> int:
        """The handle is done with."""
        self._open.pop(fh, None)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Short only at the end."""
        if path == f"/{IMAGE}":
            length = max(min(size, self._disk.size - offset), 0)
            return bytes(self._ask(path, lambda _: self._disk.read(offset, length)))
        file = self._open[fh]
        if any(place == OPAQUE for _, _, place in file.runs or ()):
            # It comes through the worker, which forgets the files it told of first.
            file = replace(self._stat(path, anew=True), runs=file.runs)
        end = min(offset + size, file.size)
        return bytes(self._ask(path, lambda browser: _content(browser, file, offset, end)))


def _content(browser: Browser, file: File, offset: int, end: int) -> bytes:
    found = bytearray()
    for start, stop, data in browser.content(file, offset) if offset < end else ():
        found += bytes(min(stop, end) - start) if data is None else data
        if stop >= end:
            break
    return bytes(found[: end - offset])


def serve(files: PointFiles, directory: str, name: str) -> None:
    """Until it is unmounted."""
    mfusepy.FUSE(
        files,
        directory,
        foreground=True,
        nothreads=True,
        ro=True,
        nosuid=True,
        nodev=True,
        fsname=name,
        subtype="cdp",
    )
