"""Files of a point as a tar stream: POSIX (pax), with holes left out, attributes, owners and links, names in whatever bytes.

Holes are written as GNU tar writes them (format 1.0: the map stands before the data), so an 8 EiB file of nothing is a small
stream.
"""

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
    source: Extents,
    found: Iterator[File],
    name: bytes,
    out: IO[bytes],
    *,
    progress: Progress | None = None,
    taken: Taken | None = None,
) -> Taken:
    """Everything of a walk; its top is called `name`. `taken` is told what came so far."""
    taken = Taken() if taken is None else taken
    for part in tar_stream(source, found, name, taken, progress=progress):
        out.write(part)
    return taken


def tar_stream(
    source: Extents,
    found: Iterator[File],
    name: bytes,
    taken: Taken,
    *,
    progress: Progress | None = None,
    report: bool = False,
) -> Iterator[bytes]:
    """The same, in pieces; `taken` says what came of it so far.

    With `report` a last member, NAME.not-fetched.txt, says what could not be had: to who gets the stream alone.
    """
    tell = progress or (lambda files, bytes: None)
    links: dict[int, str] = {}
    for file in found:
        path = (name, *file.path)
        try:
            for part in path:
                check_name(part)
            yield from _member(source, file, path, links, taken, tell)
        except CdpError as error:
            taken.problem(path, error.message)
    if report and taken.failed:
        more = taken.failed - len(taken.problems)
        lines = [*taken.problems, *([f"and {more} more"] if more else [])]
        yield from _report(name + b".not-fetched.txt", "\n".join([*lines, ""]).encode())
    yield bytes(2 * tarfile.BLOCKSIZE)


def _report(name: bytes, text: bytes) -> Iterator[bytes]:
    head = tarfile.TarInfo(_text(name))
    head.size = len(text)
    yield _packed(head)
    yield text.ljust(-(-len(text) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, b"\0")


def _member(
    source: Extents,
    file: File,
    path: tuple[bytes, ...],
    links: dict[int, str],
    taken: Taken,
    tell: Progress,
) -> Iterator[bytes]:
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
    is_again = file.type == "file" and file.links > 1 and file.id in links
    if file.type in ("file", "dir") and not is_again:
        for key, value in _attributes(source, file, path, taken).items():
            head.pax_headers[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
    if file.type == "link":
        head.linkname = _text(file.target or b"")
    if is_again:
        head.type, head.linkname = tarfile.LNKTYPE, links[file.id]
        yield _packed(head)
    elif file.type == "file":
        pieces = _Pieces(source, file, tell)
        yield _packed(pieces.described(head))
        yield from pieces.all(source)
        links[file.id] = head.name
    else:
        yield _packed(head)
    taken.files += 1
    taken.bytes += file.size if file.type == "file" else 0
    tell(1, 0)


def _attributes(source: Source, file: File, path: tuple[bytes, ...], taken: Taken) -> dict[str, bytes]:
    """A directory is told without them, where they cannot be read: what is in it comes, too."""
    try:
        return source.xattrs(file)
    except CdpError as error:
        if file.type == "file":
            raise
        taken.problem(path, f"its attributes: {error.message}")
        return {}


class _Pieces:
    """A file's data without its holes; `data` says where it belongs.

    The stream's header promises its length: what cannot be read is zeros from there on, and then the error is raised.
    """

    def __init__(self, source: Extents, file: File, tell: Progress) -> None:
        self.data: list[tuple[int, int]] = []
        self._file, self._tell = file, tell
        self._first = b""
        self._size = 0
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

    def described(self, head: tarfile.TarInfo) -> tarfile.TarInfo:
        """The header, with the size; of a file with holes also that its map comes first."""
        file = self._file
        self._size = sum(end - start for start, end in self.data)
        if self.data != [(0, file.size)]:
            table = [*self.data, (file.size, file.size)]
            text = f"{len(table)}\n" + "".join(f"{start}\n{end - start}\n" for start, end in table)
            self._first = text.encode().ljust(-(-len(text) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, b"\0")
            head.pax_headers = {
                **head.pax_headers,
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": head.name,
                "GNU.sparse.realsize": str(file.size),
            }
        self._size += len(self._first)
        head.size = self._size
        return head

    def all(self, source: Source) -> Iterator[bytes]:
        """Exactly what the header said, and filled up to a block."""
        done = 0
        error: CdpError | None = None
        try:
            for data in self._data(source):
                part = data[: self._size - done]
                done += len(part)
                yield part
        except CdpError as raised:
            error = raised
        end = -(-self._size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        for at in range(done, end, CHUNK):
            yield bytes(min(CHUNK, end - at))
        if error is not None:
            raise error

    def _data(self, source: Source) -> Iterator[bytes]:
        yield self._first
        for start, end, data in source.content(self._file):
            if data is not None:
                yield data
            self._tell(0, end - start)


def _packed(head: tarfile.TarInfo) -> bytes:
    return head.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
