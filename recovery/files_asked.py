"""Files of a point, asked of the service: its session has the point open, and answers in milliseconds."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from recovery.client import Client, Object
from recovery.output import say

PAGE = 1000


class Said:
    """Says remarks, each once: every page of a list has them."""

    def __init__(self, head: str = "") -> None:
        """`head` stands before each."""
        self._head = head
        self._said: set[str] = set()

    def __call__(self, remarks: list[str]) -> None:
        for remark in remarks:
            if remark not in self._said:
                self._said.add(remark)
                say(f"{self._head}{remark}")


class AskedFiles:
    """What `recovery.files` wants to know, from the API."""

    def __init__(self, service: Client, point: str) -> None:
        """`point` is absolute, and may name a volume."""
        self._service, self.point = service, point
        self._say = Said(f"{point}: ")

    def listing(self, path: bytes) -> Iterator[Object]:
        """A directory, or the volumes."""
        return self._pages("files", path_query(path))

    def find(self, path: bytes, wanted: Mapping[str, str | None]) -> Iterator[Object]:
        """What is below and matches."""
        return self._pages("files:find", path_query(path) | dict(wanted))

    def stat(self, path: bytes) -> Object:
        """All that is known of a file."""
        return self._one("files:stat", path_query(path))

    def preview(self, path: bytes, most: int) -> Object:
        """The head of a file."""
        return self._one("files:preview", path_query(path) | {"bytes": most})

    def content(self, path: bytes) -> Iterator[bytes]:
        """A file, in pieces."""
        return self._service.stream("files:content", {"point": self.point} | path_query(path), self._say)

    def tar(self, path: bytes) -> Iterator[bytes]:
        """A tree, in pieces of a tar stream."""
        return self._service.stream("files:tar", {"point": self.point} | path_query(path), self._say)

    def _one(self, route: str, query: Object) -> Object:
        found = self._service.ask(route, {"point": self.point} | query)
        self._say(found.pop("remarks", []))
        return found

    def _pages(self, route: str, query: Object) -> Iterator[Object]:
        yield from pages(self._service, route, {"point": self.point} | query, self._say)


def pages(service: Client, route: str, query: Object, remark: Any = lambda remarks: None) -> Iterator[Object]:
    """Every item of a list that comes in pages."""
    token: str | None = None
    while True:
        page = service.ask(route, query | {"page_size": PAGE, "page_token": token})
        remark(page.get("remarks", []))
        yield from page["items"]
        token = page["next_page_token"]
        if token is None:
            return


def path_query(path: bytes) -> Object:
    """A path as a request names it."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        return {"path_hex": path.hex()}


def may_read(state_dir: os.PathLike[str]) -> bool:
    """Could this process open points itself?"""
    return os.access(state_dir, os.R_OK | os.X_OK)
