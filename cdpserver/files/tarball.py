"""Files of a point as a tar stream: POSIX (pax), with holes left out, attributes, owners and links, names in whatever bytes.

Holes are written as GNU tar writes them (format 1.0: the map stands before the data), so an 8 EiB file of nothing is a small
stream.
"""

import itertools
import tarfile
from collections.abc import Iterator
from typing import IO, Protocol

from cdpserver.errors import CdpError, RefusedError
from cdpserver.files.browser import CHUNK, File
from cdpserver.files.fetch import Progress, Source, Taken, check_name
from cdpserver.files.formats.base import HOLE

MAX_MAP = 1 << 18
"""Stretches of data of one file: its map is in memory."""

_TYPES = {"dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "fifo": tarfile.FIFOTYPE, "file": tarfile.REGTYPE}


class Extents(Source, Protocol):
    """A browser."""

    def extents(self, file: File) -> Iterator[tuple[int, int, int]]:
        """(start, end, place) of a file's content."""


def write_tar(
    source: Extents, found: Iterator[File], name: bytes, out: IO[bytes], *, progress: Progress | None = None
) -> Taken:
    """Everything of a walk; its top is called `name`."""
    taken = Taken()
    tell = progress or (lambda files, bytes: None)
    links: dict[int, str] = {}
    with tarfile.open(
        fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for file in found:
            path = (name, *file.path)
            try:
                for part in path:
                    check_name(part)
                _add(source, tar, file, path, links, taken, tell)
            except CdpError as error:
                taken.problem(path, error.message)
    return taken


def _add(
    source: Extents,
    tar: tarfile.TarFile,
    file: File,
    path: tuple[bytes, ...],
    links: dict[int, str],
    taken: Taken,
    tell: Progress,
) -> None:
    if file.type not in _TYPES:
        if file.why:
            taken.problem(path, file.why)
        else:
            taken.skipped += 1
        return
    head = tarfile.TarInfo(_text(b"/".join(path)))
    head.type = _TYPES[file.type]
    head.mode, head.uid, head.gid, head.mtime = file.mode, file.uid, file.gid, max(file.mtime_ns // 10**9, 0)
    head.pax_headers = {"mtime": f"{file.mtime_ns / 10**9:.9f}"} if file.mtime_ns >= 0 else {}
    if file.type == "link":
        head.linkname = _text(file.target or b"")
    if file.type == "file" and file.links > 1 and file.id in links:
        head.type, head.linkname = tarfile.LNKTYPE, links[file.id]
        tar.addfile(head)
    elif file.type == "file":
        for key, value in source.xattrs(file).items():
            head.pax_headers[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
        links[file.id] = head.name
        _content(source, tar, head, file, tell)
    else:
        tar.addfile(head)
    taken.files += 1
    taken.bytes += file.size if file.type == "file" else 0
    tell(1, 0)


def _content(
    source: Extents, tar: tarfile.TarFile, head: tarfile.TarInfo, file: File, tell: Progress
) -> None:
    pieces = _Pieces(source, file, tell)
    if len(pieces.data) == 1 and pieces.data[0] == (0, file.size):
        head.size = file.size
        _put(tar, head, pieces)
        return
    table = [*pieces.data, (file.size, file.size)]
    text = f"{len(table)}\n" + "".join(f"{start}\n{end - start}\n" for start, end in table)
    pieces.first = text.encode().ljust(-(-len(text) // 512) * 512, b"\0")
    head.size = len(pieces.first) + sum(end - start for start, end in pieces.data)
    head.pax_headers = {
        **head.pax_headers,
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": head.name,
        "GNU.sparse.realsize": str(file.size),
    }
    _put(tar, head, pieces)


def _put(tar: tarfile.TarFile, head: tarfile.TarInfo, pieces: "_Pieces") -> None:
    tar.addfile(head, pieces)  # type: ignore[arg-type]
    if pieces.error is not None:
        raise pieces.error


class _Pieces:
    """A file's data without its holes, to be read once; `data` says where it belongs.

    The stream's header has promised its length: what cannot be read is zeros from there on, and `error` says why.
    """

    def __init__(self, source: Extents, file: File, tell: Progress) -> None:
        self.first = b""
        self.data: list[tuple[int, int]] = []
        self.error: CdpError | None = None
        self._tell = tell
        for start, end, place in source.extents(file):
            if place == HOLE:
                continue
            if self.data and self.data[-1][1] == start:
                self.data[-1] = (self.data[-1][0], end)
            elif len(self.data) < MAX_MAP:
                self.data.append((start, end))
            else:
                raise RefusedError(
                    f"it has more than {MAX_MAP} stretches of data", hint="fetch it into a directory"
                )
        self._held = bytearray()
        self._chunks = self._all(source, file)

    def _all(self, source: Source, file: File) -> Iterator[bytes]:
        yield self.first
        for start, end, data in source.content(file):
            if data is not None:
                yield data
            self._tell(0, end - start)

    def read(self, length: int) -> bytes:
        """Exactly so many bytes."""
        while len(self._held) < length:
            try:
                self._held += next(self._chunks)
            except CdpError as error:
                self.error = error
                self._chunks = itertools.repeat(bytes(CHUNK))
        found = bytes(self._held[:length])
        del self._held[:length]
        return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
