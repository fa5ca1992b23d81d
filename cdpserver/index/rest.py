"""A timeline at rest, seen without keeping a file of it open: what the indexer looks at while nothing is written.

A look is one read of the newest log's two words and one stat. Files stay closed meanwhile, so that disks at rest cost neither
descriptors nor address space.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cdpserver.index.store import IndexFile
from cdpserver.journal.log import Journal
from cdpserver.journal.segment import peek


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest log and its words: they change with every record, and when the writer goes on to another segment."""

    log: Path
    words: bytes

    @classmethod
    def of(cls, journal: Journal | None) -> "Newest | None":
        """Take this before looking for records: what is written after it shows itself by other words. None without a segment."""
        if journal is None or journal.empty:
            return None
        log = journal.newest()[1].path
        return cls(log, peek(log))


@dataclass(frozen=True, slots=True)
class Rest:
    """What the files were when the index lacked nothing."""

    newest: Newest
    index: Path
    inode: int

    @classmethod
    def of(cls, newest: Newest | None, journal: Journal | None, index: IndexFile | None) -> "Rest | None":
        """After a look that began at `newest` and found no record; None if the writer went on meanwhile."""
        if newest is None or journal is None or index is None or journal.newest()[1].path != newest.log:
            return None
        return cls(newest, index.path, index.inode)

    def lasts(self) -> bool:
        """Has nothing been written since, and is the index still there?"""
        try:
            return peek(self.newest.log) == self.newest.words and self.index_stands()
        except FileNotFoundError:
            return False

    def index_stands(self) -> bool:
        """Is the index the same file?"""
        try:
            return os.stat(self.index).st_ino == self.inode
        except FileNotFoundError:
            return False
