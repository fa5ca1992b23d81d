"""What a backup is made of: a disk at an instant, and what changed of it since another one."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from cdpserver import images
from cdpserver.errors import CdpError
from cdpserver.files.watched import is_unbroken
from cdpserver.held import HeldPoint
from cdpserver.names import When
from cdpserver.points import Timeline as Points
from cdpserver.repository.record import BackedUpDisk
from cdpserver.state import StateDir
from cdpserver.stretches import grade_at, stretches
from cdpserver.timeline import ImageFile
from cdpserver.view.delta import changed
from cdpserver.view.view import View


class UnknownChangeError(Exception):
    """It cannot be said what changed; the message says why."""


class Source(Protocol):
    """A disk at an instant. Threads: one."""

    name: str
    timeline: str
    seq: int
    time_ns: int
    size: int
    grade: str
    image: ImageFile | None

    def used(self) -> Iterator[tuple[int, int]]:
        """Ranges that may hold data; all others are zeros."""

    def changed_since(self, disk: BackedUpDisk) -> list[tuple[int, int]]:
        """Ranges that may differ from what was backed up, ascending and disjoint. UnknownChangeError."""

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on."""


class PointSource:
    """`DISK@WHEN` of a state directory, with the service or without it."""

    def __init__(self, view: View, *, name: str, time_ns: int) -> None:
        """`view` is the caller's, and stays open and held as long as this is."""
        self._view = view
        self.name = name
        self.timeline = view.history.timeline.id
        self.seq = view.seq
        self.time_ns = time_ns
        self.size = view.size
        self.image = images.made_from(StateDir(view.history.state_dir), view.history.timeline)
        found = grade_at(stretches(Points(view.history), now_ns=time_ns), time_ns)
        self.grade = found.label if found is not None else ""

    def used(self) -> Iterator[tuple[int, int]]:
        """By block status."""
        view, at = self._view, 0
        while at < self.size:
            for start, end, zero in view.status(at, self.size, one=False):
                if not zero:
                    yield start, end
                at = end

    def changed_since(self, disk: BackedUpDisk) -> list[tuple[int, int]]:
        """From the header logs between the two instants: costs what was written, not the disk."""
        history = self._view.history
        if disk.timeline != self.timeline:
            raise UnknownChangeError("the last backup is of another disk under that name")
        if disk.size != self.size:
            raise UnknownChangeError("the disk was resized")
        if disk.seq > self.seq:
            raise UnknownChangeError("the last backup is of a later instant")
        try:
            if not is_unbroken(history, disk.seq, self.seq):
                raise UnknownChangeError("the history since the last backup is not all there any more")
            with contextlib.closing(View(history, disk.seq)) as old:
                ranges = changed(self._view, old).tolist()
        except CdpError as error:
            raise UnknownChangeError(
                f"the history since the last backup cannot be read: {error.message}"
            ) from None
        return [(start, min(end, self.size)) for start, end in ranges if start < self.size]

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Through the view."""
        self._view.read_into(buffer, offset)


@contextlib.contextmanager
def held_points(state_dir: Path, points: Sequence[tuple[str, When]]) -> Iterator[list[Source]]:
    """Sources of these points, which are held meanwhile. NotFoundError, RefusedError if one is not there."""
    state = StateDir.open(state_dir)
    with contextlib.ExitStack() as stack:
        sources: list[Source] = []
        for name, when in points:
            point = HeldPoint(state, name, when)
            stack.callback(point.close)
            sources.append(PointSource(point.view, name=name, time_ns=point.position.time_ns))
        yield sources
