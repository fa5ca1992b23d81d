"""A timeline opened for reading: its journal, what it stands on, and the lease that holds it against removal."""

import fcntl
import os
from itertools import takewhile
from pathlib import Path

from cdpserver import timeline as timeline_file
from cdpserver.clock import boot_id
from cdpserver.errors import CorruptError, RefusedError, RemovedError
from cdpserver.journal.log import FIRST_INTERVAL, Journal
from cdpserver.nodes import Node, newest_at, nodes
from cdpserver.timeline import PointBase, Timeline


class History:
    """A timeline opened for reading: its journal, its base, and a shared lease that holds it against removal."""

    def __init__(self, state_dir: Path, timeline: Timeline, boot: str | None = None) -> None:
        self.state_dir = state_dir
        self.timeline = timeline
        self.boot_id = boot or boot_id()
        self.directory = state_dir / "timelines" / timeline.id
        self._lease = _take_lease(self.directory)
        self.journal = Journal(self.directory)
        self.parent: History | None = None
        if isinstance(timeline.base, PointBase):
            parent_directory = state_dir / "timelines" / timeline.base.timeline
            self.parent = History(state_dir, timeline_file.load(parent_directory), self.boot_id)

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.timeline.size

    def standing(self, seq: int) -> tuple[list[int], Node | None]:
        """(intervals that an instant is read from, newest first; the base point that they stand on, if older ones are gone).

        RefusedError for an instant that is not kept, CorruptError where something that it needs is missing.
        """
        journal = self.journal
        position = journal.at_seq(seq) if seq >= journal.first().seq else None
        if position is None or (position.seq != seq and journal.ends_with(position)):
            node = newest_at(self.directory, seq)
            if node is None or node.seq != seq:
                raise RefusedError(
                    f"{self.timeline.full_name}@seq:{seq} is not kept any more",
                    hint=f"cdp point list {self.timeline.full_name}",
                )
            return [], node
        numbers = [number for number in reversed(journal.intervals) if number <= position.interval]
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
    except OSError as error:
        os.close(fd)
        raise RemovedError(f"timeline {directory.name} is being removed") from error
    return fd
