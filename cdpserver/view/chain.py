"""Reading a chain of base points directly: which file of the chain holds each part of the disk, and where.

    own_map      what one QCOW2 file holds itself, as `qemu-img map` says it; kept beside the file as bp-N.map
    Chain        the maps of a file and of all that it stands on, laid over each other (`laid`)

A read costs one bisection, however long the chain is; QEMU asks every file of it. To open a chain costs what checking its maps
costs: 24 bytes a part, at the speed of BLAKE3.
Invariants: a published file never changes in place, so a map is true as long as the file is the same one (inode, length, time).
Files may be replaced under us by a merge: a chain opens all of its files, looks again whether they are still the ones that the
names lead to, and reads on from what it has open.
"""

import contextlib
import mmap
import os
import struct
from pathlib import Path

import numpy as np
from blake3 import blake3

from cdpserver import durable, qemu
from cdpserver.errors import CorruptError
from cdpserver.nodes import read_header
from cdpserver.view.extent import Extent, Files
from cdpserver.view.laid import ZERO, Laid, OwnMap

HEADER = struct.Struct("<8sQQQQ")
"""Of a map file: magic, the image's inode, length, time of change in ns, number of parts."""

MAGIC = b"cdpmap1\n"
DIGEST = 32

MAPPED = 1 << 20
"""Length of a map file from which on it is mapped instead of read."""

ATTEMPTS = 10
"""Looks at a chain that is being merged before it is called broken."""

LONGEST = 4096
"""Files of a chain; more is a circle."""


def map_path(image: Path) -> Path:
    """Where the map of a base point is kept."""
    return image.with_suffix(".map")


def own_map(image: Path, fd: int) -> OwnMap:
    """What the open file `image` holds itself: from its map file if that is of this very file, else asked of qemu-img."""
    with contextlib.suppress(OSError, CorruptError):
        return _read(map_path(image), os.fstat(fd))
    # The name may lead to another file by now.
    return _ask(Path(f"/proc/{os.getpid()}/fd/{fd}"))


def write_map(image: Path) -> None:
    """Keep the map of a published image; it can be made anew at any time, so nothing waits for the disk."""
    found, stat = _ask(image), os.stat(image)
    head = HEADER.pack(MAGIC, stat.st_ino, stat.st_size, stat.st_mtime_ns, len(found.start))
    data = head + found.start.tobytes() + found.end.tobytes() + found.place.tobytes()
    durable.write_whole(map_path(image), data + blake3(data).digest())


def _read(path: Path, image: os.stat_result) -> OwnMap:
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < HEADER.size + DIGEST:
            raise CorruptError(f"{path} is cut short")
        # All readers of a point share the pages of a large map, which is never changed in place. It costs an open file.
        data = file.read() if length < MAPPED else mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    if blake3(memoryview(data)[:-DIGEST]).digest() != data[-DIGEST:]:
        raise CorruptError(f"{path} is damaged")
    magic, inode, length, time_ns, count = HEADER.unpack_from(data)
    if (magic, inode, length, time_ns) != (MAGIC, image.st_ino, image.st_size, image.st_mtime_ns):
        raise CorruptError(f"{path} is of another file")
    columns = np.frombuffer(data, np.int64, 3 * count, HEADER.size).reshape(3, count)
    return OwnMap(columns[0], columns[1], columns[2])


def _ask(image: Path) -> OwnMap:
    parts = np.array(list(qemu.own_parts(image)), dtype=np.int64).reshape(-1, 3)
    return OwnMap(parts[:, 0], parts[:, 1], parts[:, 2])


class Chain:
    """The content of the QCOW2 file `top` with all that it stands on; files stay open in `files`."""

    def __init__(self, top: Path, files: Files) -> None:
        self._keys: list[str] = []
        self.root: tuple[str, int] | None = None
        """(key in `files`, length) of the raw file at the bottom."""
        self.size = 0
        """Bytes of the disk that `top` holds; what it stands on may be of the time when there were fewer."""
        self._open(top, files)
        self._keys.reverse()
        maps = [own_map(Path(key.partition("#")[0]), files.fd(key)) for key in self._keys]
        self._laid = Laid(maps, self.size)

    def _open(self, top: Path, files: Files) -> None:
        for _ in range(ATTEMPTS):
            found: list[tuple[Path, int]] = []
            try:
                self._descend(top, found)
                if all(os.fstat(fd).st_ino == os.stat(path).st_ino for path, fd in found):
                    break
            except FileNotFoundError as error:
                missing = error.filename
            else:
                missing = str(top)
            for _, fd in found:
                os.close(fd)
        else:
            raise CorruptError(f"{missing} is missing", hint="cdp check says what it touches")
        for path, fd in found:
            key = f"{path}#{os.fstat(fd).st_ino}"
            files.keep(key, fd)
            if path.suffix == ".raw":
                self.root = (key, os.fstat(files.fd(key)).st_size)
            else:
                self._keys.append(key)

    def _descend(self, top: Path, found: list[tuple[Path, int]]) -> None:
        path = top
        while True:
            found.append((path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)))
            if path.suffix == ".raw":
                return
            backing, size = read_header(path)
            self.size = size if path == top else self.size
            if not backing:
                return
            path = Path(os.path.normpath(path.parent / backing))
            if len(found) > LONGEST:
                raise CorruptError(f"{top} stands on itself", hint="cdp check says what it touches")

    def resolve(self, offset: int, end: int) -> list[Extent]:
        """Where bytes [offset, end) are. Parts of the root have its key; those beyond its end are the caller's to see."""
        root = self.root[0] if self.root is not None else None
        extents: list[Extent] = []
        for start, stop, owner, place in self._laid.parts(offset, end):
            if owner == 0:
                extents.append((start, stop, root, start))
            elif place == ZERO:
                extents.append((start, stop, None, 0))
            else:
                extents.append((start, stop, self._keys[owner - 1], place))
        return extents
