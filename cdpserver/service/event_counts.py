"""How many events there were since the service started, by process and level: read from the event file, as far as it has grown.

All processes write to that file, so all are counted, whoever died since. A line is looked at once.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from cdpserver.events import EVENT_FILE_BYTES, previous_file


class EventCounts:
    """Counts from the file at `path`, from its end now. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset = self._end()
        self.counts: Counter[tuple[str, str]] = Counter()
        """(process, level) to number."""
        self.last_error: dict[str, Any] | None = None

    def _end(self) -> tuple[int, int]:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_size

    def update(self) -> None:
        """Count what was written since the last time."""
        inode, _ = self._end()
        if inode != self._inode:
            if self._inode:
                # Rotated: the rest is in the previous file, unless that was replaced as well.
                self._count(previous_file(self._path), self._inode)
            self._inode, self._offset = inode, 0
        self._count(self._path, inode)

    def _count(self, path: Path, inode: int) -> None:
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_ino != inode:
                    return
                file.seek(self._offset)
                data = file.read(2 * EVENT_FILE_BYTES)
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            process, level = str(event["process"]), str(event["level"])
        except (ValueError, RecursionError, KeyError, TypeError):
            return  # cut short by a full disk: readers of the file pass over it, too
        self.counts[process, level] += 1
        if level == "error":
            self.last_error = event
