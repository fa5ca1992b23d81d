"""The graph of QEMU's block nodes: on which node the guest's disk stands.

    guest's device ──► [a job's filter] ──► raw ──► nbd           device and raw need not be there
       backend             driver          driver    driver
                                   └──────► qcow2 ──► file

A job has edges to nodes of its own, and a mirror a backend above its target: only without a job is a node below a backend in use.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from cdpserver.vm.disks import guest_disks
from cdpserver.vm.qmp import Monitor

DRIVER, BACKEND = "block-driver", "block-backend"

FILES = ("file", "host_device")
"""Drivers of what lies on this host."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Names, NBD exports and files of nodes, what kind each is, and who stands above whom (by QEMU's numbers)."""

    names: dict[str, int]
    kinds: dict[int, str]
    parents: dict[int, tuple[int, ...]]
    exports: dict[str, str]
    """Node name to the name of the export that it is connected to."""
    files: dict[str, str]
    """Node name to the real path of the file or device that it has open."""
    drivers: dict[str, str]
    """Node name to its driver."""

    def on_export(self, export: str) -> list[str]:
        """The NBD nodes connected to an export of this name."""
        return [node for node, name in self.exports.items() if name == export]

    def used_on_export(self, export: str) -> list[str]:
        """Those of them that a device or an export stands on."""
        return [node for node in self.on_export(export) if self.is_used(node)]

    def image(self, path: str, format: str) -> str | None:
        """The node that reads the file at `path` in its format, if a device or an export stands on it."""
        real = os.path.realpath(path)
        for node, file in self.files.items():
            if file == real and self.is_used(node):
                above = [name for name in self.way_up(node) if self.drivers.get(name) == format]
                return above[-1] if above else node
        return None

    def child(self, image: str, path: str) -> str:
        """The node of the file at `path` that an image's node reads."""
        real = os.path.realpath(path)
        return next(node for node, file in self.files.items() if file == real and image in self.way_up(node))

    def top(self, node: str) -> str:
        """The highest driver's node over this one: what a job is told to work on."""
        by_number = {number: name for name, number in self.names.items()}
        number = self.names[node]
        while above := [p for p in self.parents.get(number, ()) if self.kinds.get(p) == DRIVER]:
            number = above[0]
        return by_number[number]

    def is_used(self, node: str) -> bool:
        """Does a device or an export stand on this node?"""
        if node not in self.names:
            return False
        top = self.names[self.top(node)]
        return any(self.kinds.get(parent) == BACKEND for parent in self.parents.get(top, ()))

    def way_up(self, node: str) -> Iterator[str]:
        """The nodes from the highest over this one down to itself."""
        by_number = {number: name for name, number in self.names.items()}
        number, way = self.names[node], [node]
        while above := [p for p in self.parents.get(number, ()) if self.kinds.get(p) == DRIVER]:
            number = above[0]
            way.append(by_number[number])
        yield from reversed(way)


async def read_graph(monitor: Monitor) -> Graph:
    """The graph as it is now."""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    shape = await monitor.execute("x-debug-query-block-graph")
    return make_graph(nodes, shape)


def make_graph(nodes: list[dict[str, Any]], shape: dict[str, Any]) -> Graph:
    """From what the two queries return."""
    parents: dict[int, tuple[int, ...]] = {}
    for edge in shape["edges"]:
        parents[edge["child"]] = (*parents.get(edge["child"], ()), edge["parent"])
    return Graph(
        names={one["name"]: one["id"] for one in shape["nodes"] if one["type"] == DRIVER},
        kinds={one["id"]: one["type"] for one in shape["nodes"]},
        parents=parents,
        exports={
            one["node-name"]: export_of(one["file"]) for one in nodes if one["drv"] == "nbd" and "file" in one
        },
        files={
            one["node-name"]: path_of(one["file"]) for one in nodes if one["drv"] in FILES and "file" in one
        },
        drivers={one["node-name"]: one["drv"] for one in nodes},
    )


def path_of(filename: str) -> str:
    """The real path in QEMU's name of a file's node: itself, or `json:`."""
    return os.path.realpath(str(_options(filename).get("filename", "")) if _is_json(filename) else filename)


def _is_json(filename: str) -> bool:
    return filename.startswith("json:")


def _options(filename: str) -> dict[str, Any]:
    """Of a `json:` name: those of the innermost node."""
    try:
        options = json.loads(filename.removeprefix("json:"))
    except ValueError:
        return {}
    options = options.get("file", options) if isinstance(options, dict) else {}
    return options if isinstance(options, dict) else {}


def export_of(filename: str) -> str:
    """The export's name in QEMU's name of an NBD node: a URI, or `json:` where a URI cannot say everything."""
    if not _is_json(filename):
        return unquote(urlsplit(filename).path.removeprefix("/"))
    return str(_options(filename).get("export", ""))


def device_of(blocks: Iterable[Mapping[str, Any]], node: str) -> str:
    """The guest's device that stands on a node, of the answer to `query-block`; the node's own name where nothing says it."""
    for block in blocks:
        if block.get("inserted", {}).get("node-name") == node and (found := guest_disks([block])):
            return found[0].device
    return node
