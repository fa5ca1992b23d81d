"""A timeline opened for reading: its journal, what it stands on, and the lease that holds it against removal."""

import fcntl
import os
from functools import partial
from itertools import takewhile
from pathlib import Path

from cdpserver import durable
from cdpserver import timeline as timeline_file
from cdpserver.clock import boot_id
from cdpserver.errors import CorruptError, RefusedError, RemovedError
from cdpserver.journal.log import FIRST_INTERVAL, Journal, Position
from cdpserver.nodes import Node, base_point_path, newest_at, nodes, read_header
from cdpserver.timeline import PointBase, Timeline


class History:
    """A timeline opened for reading: its journal, its base, and a shared lease that holds it against removal."""

    def __init__(self, state_dir: Path, timeline: Timeline, boot: str | None = None) -> None:
        self.state_dir = state_dir
        self.timeline = timeline
        self.boot_id = boot or boot_id()
        self.directory = state_dir / "timelines" / timeline.id
        self.parent: History | None = None
        self._lease = _take_lease(self.directory)
        try:
            with durable.unreadable(self.directory):
                self.journal = Journal(self.directory)
            if isinstance(timeline.base, PointBase):
                parent_directory = state_dir / "timelines" / timeline.base.timeline
                self.parent = History(state_dir, timeline_file.load(parent_directory), self.boot_id)
        except BaseException:
            os.close(self._lease)  # else what cannot be opened could not be removed either
            raise

    @property
    def size(self) -> int:
        """Bytes of the disk now."""
        return self.journal.grown_to() or self.timeline.size

    def size_at(self, seq: int) -> int:
        """Bytes of the disk at an instant; 0 is its base. RefusedError for an instant that is not kept."""
        return self.timeline.size if seq == 0 else self.journal.settled(partial(self._size_at, seq))

    def _size_at(self, seq: int) -> int:
        if self._place(seq) is not None:
            return self.journal.grown_to(seq) or self.timeline.size
        try:
            return read_header(base_point_path(self.directory, self._node(seq).number))[1]
        except FileNotFoundError:
            # Merged away since it was listed: another one that holds the instant, or it is not kept any more.
            return read_header(base_point_path(self.directory, self._node(seq).number))[1]

    def standing(self, seq: int) -> tuple[list[int], Node | None]:
        """(intervals that an instant is read from, newest first; the base point that they stand on, if older ones are gone).

        RefusedError for an instant that is not kept, CorruptError where something that it needs is missing.
        """
        return self.journal.settled(partial(self._standing, seq))

    def _standing(self, seq: int) -> tuple[list[int], Node | None]:
        position = self._place(seq)
        if position is None:
            return [], self._node(seq)
        numbers = [number for number in reversed(self.journal.intervals) if number <= position.interval]
        island = list(takewhile(lambda pair: pair[1] == position.interval - pair[0], enumerate(numbers)))
        lowest = island[-1][1]
        floor = None
        if lowest > FIRST_INTERVAL:
            floor = next((node for node in nodes(self.directory) if node.interval == lowest - 1), None)
            if floor is None:
                raise CorruptError(
                    f"interval {lowest - 1} of {self.timeline.full_name} is missing, and no base point stands in its place",
                    hint="cdp check says what it touches",
                )
        return [number for _, number in island], floor

    def _place(self, seq: int) -> Position | None:
        """Where the journal has an instant; None where only a base point may."""
        position = self.journal.at_seq(seq) if seq >= self.journal.first().seq else None
        if position is None or (position.seq != seq and self.journal.ends_with(position)):
            return None
        if not self.journal.gives(seq):
            raise RefusedError(
                f"{self.timeline.full_name}@seq:{seq} is not kept any more: the history around it was thinned",
                hint=f"cdp point list {self.timeline.full_name}",
            )
        return position

    def _node(self, seq: int) -> Node:
        """The base point that holds an instant which the journal has no more."""
        node = newest_at(self.directory, seq)
        if node is None or node.seq != seq:
            raise RefusedError(
                f"{self.timeline.full_name}@seq:{seq} is not kept any more",
                hint=f"cdp point list {self.timeline.full_name}",
            )
        return node

    def let_go(self) -> None:
        """Close every segment; what is asked for next is opened again."""
        self.journal.close()
        if self.parent is not None:
            self.parent.let_go()

    def keeps_gone(self) -> bool:
        """Is a segment open here that has lost its name?"""
        return self.journal.keeps_gone() or (self.parent is not None and self.parent.keeps_gone())

    def close(self) -> None:
        """Close the journal and give the lease back."""
        self.journal.close()
        os.close(self._lease)
        if self.parent is not None:
            self.parent.close()


def _take_lease(directory: Path) -> int:
    try:
        fd = os.open(directory / "lease", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if (directory / timeline_file.FILE).exists():
            raise CorruptError(
                f"{directory / 'lease'} is missing",
                hint="nothing is lost: restart cdpserver, it makes it anew",
            ) from None
        raise RemovedError(f"timeline {directory.name} is gone") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise RemovedError(f"timeline {directory.name} is being removed") from error
    except BaseException:
        os.close(fd)
        raise
    return fd
