"""`python -m cdpserver.files.worker FD PARENT SIZE`: the process that parses file systems, and may do nothing else.

It asks over its one connection for bytes of the disk, which it cannot read itself, and answers what it is asked:

    -> {"op": ...}            <- {"read": [offset, length]}  (any number of times)   -> length, bytes
                              <- {"ok": ...} or an error's fields

Lists come in batches, and go on with {"op": "more", "cursor": N}. A file in a list has a number, by which it can be read as
long as it is among the last NUMBERED.
"""

import contextlib
import encodings.cp437
import encodings.utf_16_le  # noqa: F401
import io
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import imagesize

from cdpserver import messages
from cdpserver.errors import CdpError, CorruptError, NotFoundError, RefusedError
from cdpserver.files import DAMAGED, sandbox
from cdpserver.files.formats.base import HOLE, OPAQUE
from cdpserver.files.replay import journal_replayed
from cdpserver.files.source import Cached, Reader
from cdpserver.files.tree import Found, Tree, matcher, open_tree, preload, reason
from cdpserver.files.volumes import FORK, Volume, find_volumes

BATCH_ITEMS = 512
BATCH_SECONDS = 0.1
"""After which a list goes out as far as it is: there is somebody to show it to."""

RUNS = 4096
"""Runs of a file's content that are told at once."""

FEW_RUNS = 16
FEW_BYTES = 4096
"""Runs of a file, and bytes of its attributes, that are told along with it: those of nearly every file."""

NUMBERED = 8192
CURSORS = 24
"""Lists and files under way: those of a session."""
LARGEST_CONTENT = 1 << 20
"""Of one answer."""

_LEAST, _MOST = -(1 << 63), (1 << 63) - 1


class Remote(Reader):
    """The disk, asked of who started this process."""

    def __init__(self, connection: socket.socket, size: int) -> None:
        self.size = size
        self._connection = connection

    def read(self, offset: int, length: int) -> bytes:
        """One question, one answer."""
        self._connection.sendall(messages.pack({"read": [offset, length]}))
        data = messages.receive_bytes(self._connection)
        if data is None or len(data) != length:
            raise SystemExit(0)  # nobody is there any more
        return data

    def places(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """It is the disk."""
        yield offset, end, offset


class Worker:
    """Answers; what is open stays open."""

    def __init__(self, disk: Reader) -> None:
        self._remote = disk
        self._disk = Cached(disk)
        self._volumes: list[Volume] | None = None
        self._trees: dict[str, Tree] = {}
        self._cursors: OrderedDict[int, Iterator[Any]] = OrderedDict()
        self._files: OrderedDict[int, tuple[Tree, Any]] = OrderedDict()
        self._next = 0
        self._ops: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "volumes": self._list_volumes,
            "open": self._open,
            "map": self._map,
            "entries": self._entries,
            "walk": self._walk,
            "find": self._find,
            "stat": self._stat,
            "runs": self._runs,
            "more": self._more,
            "read": self._read,
            "xattrs": self._xattrs,
            "image": self._image,
            "turn": self._turn,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer, or the error. Nothing that a parser raises ends the process."""
        try:
            return {"ok": self._ops[request["op"]](request)}
        except CorruptError as error:
            # Of the journal's bytes `cdp check` knows; these are the guest's.
            return messages.error_fields(CorruptError(error.message, hint=DAMAGED))
        except CdpError as error:
            return messages.error_fields(error)
        except Exception as error:  # noqa: BLE001 - the process's rim
            return messages.error_fields(CorruptError(f"it cannot be read: {reason(error)}", hint=DAMAGED))

    def _turn(self, request: dict[str, Any]) -> dict[str, Any]:
        """Another instant, of which nothing is known yet."""
        self._remote.size = request["size"]
        self._disk, self._volumes = Cached(self._remote), None
        for known in (self._trees, self._cursors, self._files):
            known.clear()
        return {}

    # -- volumes

    def _found(self) -> list[Volume]:
        if self._volumes is None:
            self._volumes = find_volumes(self._disk)
        return self._volumes

    def _list_volumes(self, _: dict[str, Any]) -> dict[str, Any]:
        rows = [
            {"name": v.name, "size": v.reader.size, "holds": v.holds, "note": v.note} for v in self._found()
        ]
        return {"volumes": rows}

    def _volume(self, name: str) -> Volume:
        volume = next((volume for volume in self._found() if volume.name == name), None)
        if volume is None:
            names = ", ".join(volume.name for volume in self._found() if volume.name)
            raise NotFoundError(
                f"the disk has no {name}" if name else "the disk is not one file system",
                hint=f"there are {names}" if names else "it has no partitions: name the disk alone",
            )
        return volume

    def _map(self, request: dict[str, Any]) -> dict[str, Any]:
        """Where a volume lies, whatever it holds."""
        volume = self._volume(request["volume"])
        if not volume.reader.size or "volume groups" in volume.note:
            raise RefusedError(f"{volume.name} {volume.note or 'is empty'}", hint=FORK)
        return self._begin(volume.reader.places(0, volume.reader.size))

    def _tree(self, request: dict[str, Any]) -> Tree:
        name = request["volume"]
        tree = self._trees.get(name)
        if tree is None:
            volume = self._volume(name)
            replayed = journal_replayed(volume.reader)
            tree = self._trees[name] = open_tree(volume, replayed.reader, list(replayed.remarks))
        return tree

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        tree = self._tree(request)
        return {"kind": tree.fs.kind, "remarks": tree.remarks}

    # -- lists

    def _entries(self, request: dict[str, Any]) -> dict[str, Any]:
        tree = self._tree(request)
        found = tree.find(request["path"], follow=False)
        if found.stat is not None and found.stat.type == "dir":
            return self._begin(self._items(tree, tree.entries(found)))
        return self._begin(self._items(tree, iter([replace(found, path=found.path[-1:])])))

    def _walk(self, request: dict[str, Any]) -> dict[str, Any]:
        tree = self._tree(request)
        items = self._items(tree, tree.walk(tree.find(request["path"], follow=False)))
        return self._begin(self._full(items) if request["full"] else items)

    def _full(self, items: Iterator[dict[str, Any] | None]) -> Iterator[dict[str, Any] | None]:
        """With what a fetch asks of each file anyway. What cannot be had is left to the question, which says why."""
        for item in items:
            if item is not None and item.get("type") in ("file", "dir"):
                tree, node = self._files[item["number"]]
                with contextlib.suppress(Exception):
                    is_file = item["type"] == "file"
                    runs = list(islice(self._on_disk(tree, node), FEW_RUNS + 1)) if is_file else []
                    xattrs = tree.fs.xattrs(node)
                    if len(runs) <= FEW_RUNS and sum(map(len, xattrs.values())) <= FEW_BYTES:
                        item["attributes"] = xattrs
                        item["runs"] = runs if is_file else None
            yield item

    def _find(self, request: dict[str, Any]) -> dict[str, Any]:
        tree = self._tree(request)
        matches = matcher(
            glob=request["name"], regex=request["regex"], newer_ns=request["newer_ns"], kind=request["type"]
        )
        return self._begin(self._items(tree, tree.search(tree.find(request["path"], follow=True), matches)))

    def _stat(self, request: dict[str, Any]) -> dict[str, Any]:
        tree = self._tree(request)
        return self._item(tree, tree.find(request["path"], follow=request["follow"]))

    def _items(self, tree: Tree, found: Iterator[Found | None]) -> Iterator[dict[str, Any] | None]:
        return (None if one is None else self._item(tree, one) for one in found)

    def _item(self, tree: Tree, found: Found) -> dict[str, Any]:
        self._next += 1
        if found.node is not None:
            if len(self._files) >= NUMBERED:
                self._files.popitem(last=False)
            self._files[self._next] = (tree, found.node)
        fields: dict[str, Any] = {"path": list(found.path), "target": found.target, "why": found.why}
        fields["number"] = self._next
        if found.stat is not None:
            stat = found.stat
            fields |= {"type": stat.type, "size": stat.size, "mode": stat.mode, "uid": stat.uid}
            fields |= {"gid": stat.gid, "links": stat.links, "id": stat.id}
            fields |= {"mtime_ns": _within(stat.mtime_ns), "atime_ns": _within(stat.atime_ns)}
        return fields

    def _begin(self, items: Iterator[Any]) -> dict[str, Any]:
        self._next += 1
        if len(self._cursors) >= CURSORS:
            self._cursors.popitem(last=False)
        self._cursors[self._next] = items
        return self._batch(self._next)

    def _more(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._batch(request["cursor"])

    def _batch(self, cursor: int) -> dict[str, Any]:
        self._cursors.move_to_end(cursor)
        items = self._cursors[cursor]
        batch: list[Any] = []
        deadline = time.monotonic() + BATCH_SECONDS
        try:
            for item in items:
                if item is not None:
                    batch.append(item)
                if len(batch) >= BATCH_ITEMS or time.monotonic() > deadline:
                    return {"items": batch, "cursor": cursor}
        except Exception as error:
            del self._cursors[cursor]
            if not batch:
                raise
            # What was found first is told first.
            self._cursors[cursor] = _raising(error)
            return {"items": batch, "cursor": cursor}
        del self._cursors[cursor]
        return {"items": batch, "cursor": 0}

    # -- content

    def _file(self, request: dict[str, Any]) -> tuple[Tree, Any]:
        self._files.move_to_end(request["file"])
        return self._files[request["file"]]

    def _runs(self, request: dict[str, Any]) -> dict[str, Any]:
        tree, node = self._file(request)
        return self._begin(self._on_disk(tree, node))

    def _on_disk(self, tree: Tree, node: Any) -> Iterator[list[int]]:
        """Runs by their place on the disk; what is not there in these bytes is OPAQUE."""
        for start, end, place in tree.fs.runs(node):
            if place < 0:
                yield [start, end, place]
                continue
            at = start
            for low, high, where in tree.fs.reader.places(place, place + end - start):
                first, last = start + low - place, start + high - place
                if first > at:
                    yield [at, first, OPAQUE]
                yield [first, last, where]
                at = last
            if at < end:
                yield [at, end, OPAQUE]

    def _read(self, request: dict[str, Any]) -> dict[str, Any]:
        tree, node = self._file(request)
        offset, end = request["offset"], request["offset"] + min(request["length"], LARGEST_CONTENT)
        found = bytearray()
        for start, stop, place in tree.fs.runs(node):
            low, high = max(start, offset), min(stop, end)
            if start >= end:
                break
            if high <= low:
                continue
            if place == HOLE:
                found += bytes(high - low)
            elif place == OPAQUE:
                found += tree.fs.read(node, low, high - low).ljust(high - low, b"\0")[: high - low]
            else:
                found += tree.fs.reader.read(place + low - start, high - low).ljust(high - low, b"\0")
        return {"data": bytes(found)}

    def _xattrs(self, request: dict[str, Any]) -> dict[str, Any]:
        tree, node = self._file(request)
        return {"xattrs": tree.fs.xattrs(node)}

    def _image(self, request: dict[str, Any]) -> dict[str, Any]:
        """Width and height, if the bytes begin an image; else -1."""
        try:
            width, height = imagesize.get(io.BytesIO(request["head"]))
        except Exception:  # noqa: BLE001 - of bytes that are no image anything may be raised
            width = height = -1
        return {"width": int(width), "height": int(height)}


def _raising(error: Exception) -> Iterator[Any]:
    def raise_it() -> Iterator[Any]:
        raise error
        yield

    return chain(raise_it())


def _within(time_ns: int) -> int:
    return min(max(time_ns, _LEAST), _MOST)


def main() -> None:
    """Until the connection ends."""
    descriptor, parent, size = map(int, sys.argv[1:4])
    connection = socket.socket(fileno=descriptor)
    preload()
    worker = Worker(Remote(connection, size))
    restrained = sandbox.enter(parent)
    connection.sendall(messages.pack({"ok": {"restrained": restrained}}))
    while (request := messages.receive(connection)) is not None:
        connection.sendall(messages.pack(worker.answer(request)))


if __name__ == "__main__":
    main()
