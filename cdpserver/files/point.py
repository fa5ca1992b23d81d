"""The files of one point as programs ask about them: paths in, rows out.

One instance has one browser, and like it one user. `remarks` of a volume say what was done about its journal.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from cdpserver.errors import RefusedError, UsageError
from cdpserver.files import DAMAGED
from cdpserver.files.browser import Browser, File
from cdpserver.files.fetch import show_path
from cdpserver.files.rows import preview_row, row, stat_row, volume_row

SORTED = 10_000
"""Entries of a directory that are sorted, as many as are read in a second or two; a larger one comes as it lies."""

NO_FILES = ("", "lvm", "swap")
"""What a volume may hold that nobody looks for files in."""


class Files:
    """What a browser finds, in rows."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def volume(self, wanted: str | None) -> tuple[str, list[str]]:
        """(the volume that is meant, remarks), its file system open. UsageError if it has to be said."""
        volume = self.browser.choose(wanted)
        return volume, self.browser.open(volume)

    def lists_volumes(self, wanted: str | None, path: bytes) -> bool:
        """Is it the volumes that are asked about: no path, no volume, and more than one that may have files?"""
        if wanted is not None or path.strip(b"/"):
            return False
        return sum(volume.holds not in NO_FILES for volume in self.browser.volumes()) > 1

    def volumes(self) -> list[dict[str, Any]]:
        """The volumes of the disk."""
        return list(map(volume_row, self.browser.volumes()))

    def listing(self, volume: str, path: bytes) -> Iterator[dict[str, Any]]:
        """A directory by name, or a file itself."""
        found = self.browser.entries(volume, path)
        first = sorted(islice(found, SORTED), key=_name)
        yield from map(row, first)
        if len(first) == SORTED:
            yield from map(row, found)

    def find(self, volume: str, path: bytes, **wanted: Any) -> Iterator[dict[str, Any] | None]:
        """What is below a path and matches (`Browser.search`); None where somebody may want to stop."""
        for file in self.browser.search(volume, path, **wanted):
            yield None if file is None else row(file)

    def stat(self, volume: str, path: bytes) -> dict[str, Any]:
        """All that is known of a file."""
        file = self.browser.stat(volume, path)
        if file.type == "unreadable":
            raise RefusedError(f"{show_path((path,))} cannot be read: {file.why}", hint=DAMAGED)
        return stat_row(file, self.browser.xattrs(file))

    def content_of(self, volume: str, path: bytes) -> File:
        """The file whose content is meant, links followed. UsageError for what has none."""
        file = self.browser.stat(volume, path, follow=True)
        if file.type != "file":
            said = f": {file.why}" if file.why else f" is a {file.type}"
            raise UsageError(f"{show_path((path,))}{said}", hint="cdp file ls shows what is there")
        return file

    def preview(self, volume: str, path: bytes, most: int) -> dict[str, Any]:
        """The head of a file."""
        file = self.content_of(volume, path)
        head = self.browser.head(file, most)
        return preview_row(file, head, self.browser.image_size(head))


def _name(file: File) -> bytes:
    return file.name
