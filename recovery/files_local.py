"""Files of a point, read here: from the state directory, without the service. The point is held by a lease."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cdpserver import names
from cdpserver.errors import UnreachableError
from cdpserver.files.browser import Browser, File
from cdpserver.files.point import Files
from cdpserver.held import HeldPoint
from cdpserver.names import Seq
from cdpserver.state import StateDir, default_state_dir
from recovery.output import say
from recovery.remote import client

ZEROS = bytes(1 << 20)


class LocalFiles:
    """What `recovery.files` wants to know, from a browser of this process."""

    def __init__(self, name: str, browser: Browser, volume: str | None) -> None:
        self.browser, self._files, self._named = browser, Files(browser), volume
        self.name = name
        """The point, absolute, without a volume."""
        self.point = name + ("" if volume is None else f"/{volume}")
        self._volume: str | None = None

    @property
    def volume(self) -> str:
        """The volume that is meant, its file system open; what is to be known of it is said, once."""
        if self._volume is None:
            self._volume, remarks = self._files.volume(self._named)
            where = self.name + (f"/{self._volume}" if self._volume else "")
            for remark in remarks:
                say(f"{where}: {remark}")
        return self._volume

    def listing(self, path: bytes) -> Iterator[dict[str, Any]]:
        """A directory, or the volumes."""
        if self._files.lists_volumes(self._named, path):
            return iter(self._files.volumes())
        return self._files.listing(self.volume, path)

    def find(self, path: bytes, wanted: Mapping[str, str | None]) -> Iterator[dict[str, Any]]:
        """What is below and matches."""
        asked = {key: _bytes(wanted[key]) for key in ("name", "regex")}
        times = {
            "newer_ns": names.wall_time_of(wanted["newer"], now_ns=time.time_ns()),
            "type": wanted["type"],
        }
        return (row for row in self._files.find(self.volume, path, **asked, **times) if row is not None)

    def stat(self, path: bytes) -> dict[str, Any]:
        """All that is known of a file."""
        return self._files.stat(self.volume, path) | {"point": self.point}

    def preview(self, path: bytes, most: int) -> dict[str, Any]:
        """The head of a file."""
        return self._files.preview(self.volume, path, most) | {"point": self.point}

    def content(self, path: bytes) -> Iterator[bytes]:
        """A file, in pieces."""
        file: File = self._files.content_of(self.volume, path)
        for start, end, data in self.browser.content(file):
            if data is not None:
                yield data
                continue
            for at in range(start, end, len(ZEROS)):
                yield ZEROS[: min(len(ZEROS), end - at)]


@contextlib.contextmanager
def opened(options: Namespace) -> Iterator[LocalFiles]:
    """The point of the options, opened here. The service, if it runs, says what instant is meant, and makes it durable."""
    text, volume = names.split_volume(options.point)
    disk, when = names.parse_point(text)
    state = StateDir.open(default_state_dir(options.state_dir))
    with contextlib.suppress(UnreachableError):
        when = Seq(int(client(options).place(text)["seq"]))
    with contextlib.closing(HeldPoint(state, disk, when)) as held, Browser(held.view) as browser:
        if getattr(options, "key_file", None) is None:
            yield LocalFiles(held.name, browser, volume)
            return
        with _unlocked(options, held, browser, volume) as files:
            yield files


@contextlib.contextmanager
def _unlocked(
    options: Namespace, held: HeldPoint, browser: Browser, named: str | None
) -> Iterator[LocalFiles]:
    """The same of what a LUKS volume of the point holds."""
    from recovery import files_locked
    from recovery.opened import opened as exported

    key = files_locked.check_key(Path(options.key_file))
    outer, inner = files_locked.split(browser, named)
    files_locked.check_version(browser, held.view, outer)
    with exported(options, held.name) as export:
        uri = export.uri.replace("?", f"/{outer}?", 1) if outer else export.uri
        with files_locked.unlocked(uri, key) as disk, Browser(disk) as within:
            yield LocalFiles(held.name, within, inner)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode(errors="surrogateescape")
