"""`python -m cdpserver.files.session FD STATE_DIR`: one point, open for whoever asks the service about its files.

    service <-- messages --> session (holds the point, reads the disk) <-- messages --> worker (parses; may do nothing else)

It starts with its worker loaded, before a point is known, so that opening one takes milliseconds. One request, one answer; in
between `{"alive": true}` says that the disk is being read. Lists come in pages by place: a point never changes, so the n-th
item is the same however often a list is begun; what is under way is kept, and begun anew where it was forgotten.
Threads: none.
"""

import contextlib
import json
import resource
import signal
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver import messages
from cdpserver.errors import BrokenError, CdpError, CorruptError, RefusedError
from cdpserver.files import through
from cdpserver.files.browser import Browser
from cdpserver.files.fetch import Taken
from cdpserver.files.point import Files
from cdpserver.files.tarball import tar_stream
from cdpserver.held import HeldPoint
from cdpserver.names import Seq
from cdpserver.state import StateDir

PAGE_SECONDS = 1.0
"""After which a page goes out as far as it is."""

MEMORY_BYTES = 4 << 30
"""Of its own: the indexes of a large store that it maps are none of it."""

ALIVE_S = 5.0

LISTS = 8
"""Lists under way that are kept, as many as the worker keeps."""

STREAMS = 8
"""Files and trees that are on their way out at once."""


class Nothing:
    """The disk before there is one."""

    size = 0

    def read(self, offset: int, length: int) -> bytes:
        """Nobody asks."""
        raise CorruptError("no point is open")


@dataclass
class Listing:
    """A list under way, how many of its items have come, and what was to be said so far."""

    items: Iterator[dict[str, Any] | None]
    remarks: list[str]
    at: int = 0


class Session:
    """Answers; `alive` is called while the disk is read."""

    def __init__(self, state: StateDir, alive: Callable[[], None]) -> None:
        self._state, self._alive = state, alive
        self.size = 0
        """Of the disk."""
        self._held: HeldPoint | None = None
        self._files = Files(Browser(Nothing()))
        self._lists: OrderedDict[str, Listing] = OrderedDict()
        self._streams: dict[int, Iterator[dict[str, Any]]] = {}
        self._next = 0
        self._ops: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "open": self._open,
            "page": self._page,
            "stat": self._stat,
            "preview": self._preview,
            "content": self._content,
            "tar": self._tar,
            "next": self._continue,
            "end": self._end,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer, or the error."""
        try:
            return {"ok": self._ops[request["op"]](request)}
        except CdpError as error:
            return messages.error_fields(error)
        except MemoryError:
            return messages.error_fields(
                RefusedError("this takes more memory than reading may", hint="look at less of it")
            )
        except OSError as error:
            return messages.error_fields(
                BrokenError(f"the point cannot be read: {error}", hint="look at the store's disk")
            )

    # -- the point

    def read(self, offset: int, length: int) -> bytes:
        """Of the disk; that it is read says that we are alive."""
        assert self._held is not None
        self._alive()
        return self._held.view.read(offset, length)

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        self._held = HeldPoint(self._state, request["disk"], Seq(request["seq"]))
        self.size = self._held.view.size
        self._worker().browser.turn(self)
        return {"size": self.size}

    def _worker(self) -> Files:
        """The worker; another one where it is gone, whatever was under way with it."""
        if not self._files.browser.is_there():
            self._files.browser.close()
            self._lists.clear()
            self._files = Files(Browser(self))
        return self._files

    def _volume(self, request: dict[str, Any]) -> tuple[Files, str, list[str]]:
        files = self._worker()
        return files, *files.volume(request["volume"])

    # -- answers

    def _stat(self, request: dict[str, Any]) -> dict[str, Any]:
        files, volume, remarks = self._volume(request)
        return {"row": files.stat(volume, request["path"]), "remarks": remarks}

    def _preview(self, request: dict[str, Any]) -> dict[str, Any]:
        files, volume, remarks = self._volume(request)
        return {"row": files.preview(volume, request["path"], request["bytes"]), "remarks": remarks}

    def _page(self, request: dict[str, Any]) -> dict[str, Any]:
        """Items of a list from `position` on, and where it goes on: maybe fewer than asked for, or none."""
        what, position = request["what"], request["position"]
        asked = {key: value for key, value in request.items() if key not in ("op", "position", "count")}
        key = json.dumps(asked, sort_keys=True, default=bytes.hex)
        listing = self._lists.pop(key, None)
        if listing is None or listing.at > position:
            remarks: list[str] = []
            listing = Listing(self._list(what, request, remarks), remarks)
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + PAGE_SECONDS
        for item in listing.items:
            if item is not None:
                listing.at += 1
                if listing.at > position:
                    found.append(item)
            if len(found) >= request["count"] or time.monotonic() > deadline:
                break
        else:
            return {"items": found, "next": None, "remarks": listing.remarks}
        if len(self._lists) >= LISTS:
            self._lists.popitem(last=False)
        self._lists[key] = listing
        return {"items": found, "next": max(position, listing.at), "remarks": listing.remarks}

    def _list(
        self, what: str, request: dict[str, Any], remarks: list[str]
    ) -> Iterator[dict[str, Any] | None]:
        path = request["path"]
        if what == "history":
            return through.history(
                self._state,
                request["disk"],
                path,
                volume=request["volume"],
                since=request["since"],
                until=request["until"],
                remark=remarks.append,
                beat=self._alive,
            )
        if what == "diff":
            points = (request["point"], request["other"])
            return through.diff(self._state, *points, path, remark=remarks.append, beat=self._alive)
        files = self._worker()
        if what == "files" and files.lists_volumes(request["volume"], path):
            return iter(files.volumes())
        files, volume, said = self._volume(request)
        remarks += said
        if what == "files":
            return files.listing(volume, path)
        wanted = {key: request[key] for key in ("name", "regex", "newer_ns", "type")}
        return files.find(volume, path, **wanted)

    # -- content

    def _content(self, request: dict[str, Any]) -> dict[str, Any]:
        """A file and, but for `end` 0, the number of the stream of its bytes [`start`, `end`)."""
        files, volume, remarks = self._volume(request)
        file = files.content_of(volume, request["path"])
        start, end = request["start"], request["end"]
        if end is None or end > file.size:
            end = file.size
        if start < 0:  # the last so many bytes
            start = max(file.size + start, 0)
        stream = self._stream(_pieces(files.browser, file, start, end)) if start < end else 0
        return {
            "size": file.size,
            "start": start,
            "end": max(start, end),
            "stream": stream,
            "remarks": remarks,
        }

    def _tar(self, request: dict[str, Any]) -> dict[str, Any]:
        files, volume, remarks = self._volume(request)
        top = files.browser.stat(volume, request["path"])
        walk = files.browser.walk(volume, b"/" + b"/".join(top.path), full=True)
        taken = Taken()
        parts = tar_stream(files.browser, walk, top.name or b"root", taken, report=True)
        told = ({"data": bytes(part), "taken": _told(taken)} for part in parts)
        return {"name": top.name, "stream": self._stream(told), "remarks": remarks}

    def _stream(self, parts: Iterator[dict[str, Any]]) -> int:
        if len(self._streams) >= STREAMS:
            raise RefusedError(
                f"{STREAMS} files of this point are being fetched", hint="wait for one of them to end"
            )
        self._next += 1
        self._streams[self._next] = parts
        return self._next

    def _continue(self, request: dict[str, Any]) -> dict[str, Any]:
        """The next piece: `data`, or `hole` bytes of zeros; `end` where there is none."""
        stream = self._streams.get(request["stream"])
        if stream is None:
            raise CorruptError("the process that reads file systems ended meanwhile")
        piece = next(stream, None)
        if piece is None:
            del self._streams[request["stream"]]
            return {"end": True}
        return piece

    def _end(self, request: dict[str, Any]) -> dict[str, Any]:
        """Nobody wants the rest."""
        self._streams.pop(request["stream"], None)
        return {}


def _pieces(browser: Browser, file: Any, start: int, end: int) -> Iterator[dict[str, Any]]:
    for low, high, data in browser.content(file, start):
        if low >= end:
            return
        length = min(high, end) - low
        yield {"hole": length} if data is None else {"data": bytes(data[:length])}


def _told(taken: Taken) -> dict[str, int]:
    return {"files": taken.files, "bytes": taken.bytes, "failed": taken.failed}


class Connection:
    """The service's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._said = time.monotonic()

    def alive(self) -> None:
        """Something comes out of it, if not yet an answer."""
        if time.monotonic() > self._said + ALIVE_S:
            self.send({"alive": True})

    def send(self, message: dict[str, Any]) -> None:
        """One message."""
        self._said = time.monotonic()
        self._connection.sendall(messages.pack(message))

    def receive(self) -> dict[str, Any] | None:
        """The next request; None at the end."""
        request = messages.receive(self._connection)
        self._said = time.monotonic()
        return request


def main() -> None:
    """Until the service closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at a terminal it is for the service
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    with contextlib.suppress(ConnectionError):
        try:
            session = Session(StateDir.open(Path(sys.argv[2])), connection.alive)
        except CdpError as error:
            connection.send(messages.error_fields(error))
            return
        connection.send({"ok": {}})
        while (request := connection.receive()) is not None:
            connection.send(session.answer(request))


if __name__ == "__main__":
    main()
