"""Browsing a disk's files: the worker process, what is asked of it, and the bytes that it asks for.

The worker parses; the bytes of the disk and of files' content are read here. Nothing that it does can hurt who asks: a worker
that takes too long, dies or answers nonsense is an error, and is killed.
Threads: none; one browser, one user.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from cdpserver import messages
from cdpserver.errors import BrokenError, CorruptError, RefusedError, UsageError
from cdpserver.files.formats.base import FILE_SYSTEMS, HOLE

ROOT = Path(__file__).resolve().parent.parent.parent

ANSWER_S = 60.0
"""How long the worker may take for one answer; a batch of a list takes a tenth of a second."""

MAX_PARTS = 1 << 18
"""Of a volume: 16 GiB in stripes of 64 KiB. A linear one has a handful."""

CHUNK = 1 << 20
"""Content comes in pieces of this size."""


MOST_HELD = 1_000_000
"""Entries or runs that who needs them all keeps in memory: each takes a few hundred bytes."""

T = TypeVar("T")


def bounded(found: Iterator[T], what: str) -> Iterator[T]:
    """For who keeps all of it. RefusedError for more than MOST_HELD."""
    for number, one in enumerate(found):
        if number == MOST_HELD:
            raise RefusedError(
                f"{what}: more than {MOST_HELD} entries",
                hint="look at less of it: cdp file ls or find, below it",
            )
        yield one


class Disk(Protocol):
    """A view."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes."""


@dataclass(frozen=True, slots=True)
class File:
    """A file as the worker tells of it. The path is from where the search began; `why` says what makes one unreadable."""

    path: tuple[bytes, ...]
    type: str
    size: int
    mtime_ns: int
    atime_ns: int
    mode: int
    uid: int
    gid: int
    links: int
    id: int
    target: bytes | None
    why: str
    number: int
    runs: tuple[tuple[int, int, int], ...] | None = None
    attributes: dict[str, bytes] | None = None
    """These two only where a walk was asked for them."""

    @property
    def name(self) -> bytes:
        """The last name of its path."""
        return self.path[-1] if self.path else b""


@dataclass(frozen=True, slots=True)
class Volume:
    """A partition, logical volume, or ("") the whole disk; `holds` a file system, `lvm`, `luks`, or "" for nothing known."""

    name: str
    size: int
    holds: str
    note: str


class Browser:
    """The files of one disk at one instant."""

    def __init__(self, disk: Disk, *, answer_s: float = ANSWER_S) -> None:
        """Starts the worker. BrokenError if it does not start."""
        self._disk = disk
        self._answer_s = answer_s
        self._ended = False
        self._connection, theirs = socket.socketpair()
        with theirs:
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "cdpserver.files.worker"),
                    *(str(theirs.fileno()), str(os.getpid()), str(disk.size)),
                ],
                env={"PYTHONPATH": os.pathsep.join(paths), "PATH": os.defpath},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C at a terminal is for us, who then end it
            )
        try:
            self.restrained = str(self._receive("starting")["restrained"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker."""
        self._connection.close()
        self._end()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._process.wait()

    def is_there(self) -> bool:
        """Is its worker? Else whoever wants to go on needs another browser."""
        return not self._ended and self._process.poll() is None

    def _end(self) -> None:
        self._ended = True
        self._process.kill()

    def turn(self, disk: Disk) -> None:
        """From here on it is about another instant; what was told before is no longer valid."""
        self._disk = disk
        self._ask("turn", size=disk.size)

    # -- what there is

    def volumes(self) -> list[Volume]:
        """The volumes of the disk."""
        return [Volume(**row) for row in self._ask("volumes")["volumes"]]

    def choose(self, wanted: str | None) -> str:
        """The volume that is meant: the one with a file system, unless it is said. UsageError if there are several."""
        if wanted is not None:
            return wanted
        volumes = self.volumes()
        readable = [volume for volume in volumes if volume.holds in FILE_SYSTEMS]
        if len(readable) == 1:
            return readable[0].name
        if not readable and len(volumes) == 1:
            return volumes[0].name
        names = ", ".join(volume.name for volume in readable or volumes)
        raise UsageError(
            f"the disk has several volumes: {names}", hint="add one to the point, such as DISK@WHEN/p2"
        )

    def open(self, volume: str) -> list[str]:
        """Open the file system of a volume; remarks for the operator."""
        return [str(remark) for remark in self._ask("open", volume=volume)["remarks"]]

    def parts(self, volume: str) -> list[tuple[int, int, int]]:
        """Where a volume lies: (start, end, place on the disk), in order, without gaps. RefusedError for too many parts."""
        found: list[tuple[int, int, int]] = []
        at = 0
        for start, end, place in self._all("map", volume=volume):
            if start != at or end <= start or not 0 <= place <= place + end - start <= self._disk.size:
                raise CorruptError("the map of the volume is wrong")
            if len(found) == MAX_PARTS:
                raise RefusedError(
                    f"{volume} lies in more than {MAX_PARTS} parts",
                    hint="its files can be read: cdp file ls",
                )
            found.append((start, end, place))
            at = end
        return found

    def entries(self, volume: str, path: bytes) -> Iterator[File]:
        """What is in a directory, or the file itself; as it comes, in no order."""
        return map(_file, self._all("entries", volume=volume, path=path))

    def walk(self, volume: str, path: bytes, *, full: bool = False) -> Iterator[File]:
        """Everything from a path down, it included; a directory before what is in it. `full` is for who reads all files."""
        return map(_file, self._all("walk", volume=volume, path=path, full=full))

    def find(self, volume: str, path: bytes, **wanted: Any) -> Iterator[File]:
        """As `search`, without pauses."""
        return (file for file in self.search(volume, path, **wanted) if file is not None)

    def search(
        self,
        volume: str,
        path: bytes,
        *,
        name: bytes | None = None,
        regex: bytes | None = None,
        newer_ns: int | None = None,
        type: str | None = None,
    ) -> Iterator[File | None]:
        """What is below a path and matches: the name a pattern, the path from there a regular expression.

        None comes ten times a second at least, for who wants to stop.
        """
        wanted = {"name": name, "regex": regex, "newer_ns": newer_ns, "type": type}
        for fields in self._all("find", pauses=True, volume=volume, path=path, **wanted):
            yield None if fields is None else _file(fields)

    def stat(self, volume: str, path: bytes, *, follow: bool = False) -> File:
        """One file; its path is the whole one."""
        return _file(self._ask("stat", volume=volume, path=path, follow=follow))

    # -- content

    def extents(self, file: File) -> Iterator[tuple[int, int, int]]:
        """(start, end, place on the disk, HOLE, or less for what comes through the worker) of a file's content, in order."""
        if file.runs is not None:
            return iter(file.runs)
        return ((start, end, place) for start, end, place in self._all("runs", file=file.number))

    def content(self, file: File, offset: int = 0) -> Iterator[tuple[int, int, bytes | None]]:
        """(start, end, bytes) of a file's content from `offset` on, in order; None for a hole, however long."""
        at = offset
        for start, end, place in self.extents(file):
            if end <= at:
                continue
            if start > at or end > file.size:
                raise CorruptError("the map of the file has gaps")
            if place == HOLE:
                yield at, end, None
                at = end
            while at < end:
                stop = min(end, at + CHUNK)
                if place < 0:
                    data = bytes(self._ask("read", file=file.number, offset=at, length=stop - at)["data"])
                else:
                    data = self._on_disk(place + at - start, stop - at)
                if len(data) != stop - at:
                    raise CorruptError("the file's content ends before its size")
                yield at, stop, data
                at = stop
        if at < file.size:
            raise CorruptError("the map of the file ends before its size")

    def head(self, file: File, most: int) -> bytes:
        """The first bytes of a file."""
        found = bytearray()
        for start, end, data in self.content(file):
            found += bytes(min(end, most) - start) if data is None else data
            if len(found) >= most:
                break
        return bytes(found[:most])

    def xattrs(self, file: File) -> dict[str, bytes]:
        """Its extended attributes."""
        if file.attributes is not None:
            return file.attributes
        return dict(self._ask("xattrs", file=file.number)["xattrs"])

    def image_size(self, head: bytes) -> tuple[int, int] | None:
        """Width and height, if these bytes begin an image."""
        found = self._ask("image", head=head)
        return (found["width"], found["height"]) if found["width"] > 0 else None

    def _on_disk(self, place: int, length: int) -> bytes:
        if not 0 <= place <= place + length <= self._disk.size:
            raise CorruptError("the file's content is said to be outside of the disk")
        return self._disk.read(place, length)

    # -- asking

    def _all(self, op: str, *, pauses: bool = False, **fields: Any) -> Iterator[Any]:
        found = self._ask(op, **fields)
        while True:
            yield from found["items"]
            if not found["cursor"]:
                return
            if pauses:
                yield None
            found = self._ask("more", cursor=found["cursor"])

    def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        try:
            self._connection.settimeout(self._answer_s)
            self._connection.sendall(messages.pack({"op": op, **fields}))
        except OSError as error:
            raise self._gone() from error
        return self._receive(op)

    def _receive(self, doing: str) -> dict[str, Any]:
        deadline = time.monotonic() + self._answer_s
        while True:
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                self._connection.settimeout(left)
                message = messages.receive(self._connection)
            except TimeoutError:
                self._end()
                raise CorruptError(
                    f"reading the file system took longer than {self._answer_s:g} s, and was ended ({doing})",
                    hint="it is damaged, or made to be slow: try another instant, or mount it in a VM",
                ) from None
            except OSError as error:
                raise self._gone() from error
            if message is None:
                raise self._gone()
            if "read" not in message:
                messages.raise_error(message)
                if not isinstance(found := message.get("ok"), dict):
                    raise CorruptError("the process that reads file systems answers nonsense")
                return found
            self._serve(*message["read"])

    def _serve(self, offset: int, length: int) -> None:
        if not 0 <= offset <= offset + length <= self._disk.size or length > messages.MAX_MESSAGE:
            self._end()
            raise CorruptError("the process that reads file systems asked for what is no part of the disk")
        try:
            data = self._disk.read(offset, length)
        except BaseException:
            self._end()  # it waits for bytes that do not come
            raise
        try:
            self._connection.settimeout(self._answer_s)
            self._connection.sendall(messages.LENGTH.pack(length) + data)
        except OSError as error:
            raise self._gone() from error

    def _gone(self) -> Exception:
        self._end()
        said = self._process.stderr.read() if self._process.stderr is not None else b""
        self._process.wait()
        last = said.decode(errors="replace").strip().rpartition("\n")[2] if said else ""
        if "No module named" in last:
            return BrokenError(
                f"files cannot be read: {last}", hint="install the extra: pip install 'cdpserver[files]'"
            )
        status = self._process.returncode
        return CorruptError(
            f"the process that reads file systems ended ({last or f'status {status}'})",
            hint="the file system is damaged, or made to be harmful: try another instant",
        )


def _file(fields: dict[str, Any]) -> File:
    none: dict[str, Any] = {
        "type": "unreadable",
        "size": 0,
        "mtime_ns": 0,
        "atime_ns": 0,
        "mode": 0,
        "uid": 0,
        "gid": 0,
    }
    known = none | {"links": 1, "id": 0} | fields
    runs = known.get("runs")
    if runs is not None:
        known["runs"] = tuple((start, end, place) for start, end, place in runs)
    return File(**known | {"path": tuple(known["path"])})
