"""A disk's chain in a running QEMU, read from what the monitor answers; pure.

    guest's device, or an export
      |root
    filters         a mirror of ours, copy-before-write
      |file, backing
    active overlay  layers[0], which the guest writes to
      |backing
    snapshot        layers[1]
      |backing
    base            layers[-1]

Node names are not in the file headers, and the backing files that QEMU opened by itself have names of its own. Which node stands
on which only `x-debug-query-block-graph` tells; it has stayed the same since QEMU 4.0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver.errors import CorruptError, NotFoundError, RefusedError
from cdpserver.names import show

FILTERS = frozenset(
    {"blkdebug", "blkverify", "commit_top", "compress", "copy-before-write", "copy-on-read", "cor"}
    | {"mirror_top", "preallocate", "replication", "throttle"}
)
"""Drivers whose node shows what lies under it."""

LOCAL = frozenset({"file", "host_device"})
"""Protocols whose file we can look at ourselves."""

_DOWN = ("backing", "file")


@dataclass(frozen=True, slots=True)
class Answers:
    """What the monitor says; the keys of `nodes` are node names."""

    graph: Mapping[str, Any]
    nodes: Mapping[str, Mapping[str, Any]]
    blocks: Sequence[Mapping[str, Any]]
    exports: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Layer:
    """One image of a chain: the node of its format, the protocol under it, its disk's size in bytes, and what it uses of it."""

    node: str
    driver: str
    protocol: str
    filename: str
    size: int
    used: int
    subclusters: bool = False

    @property
    def path(self) -> Path | None:
        """Its file, where that is one of this host with an absolute name."""
        if self.protocol in LOCAL and self.filename.startswith("/"):
            return Path(self.filename)
        return None

    @property
    def name(self) -> str:
        """What operators call it: its file's name, else its node's."""
        return self.path.name if self.path is not None else self.node


@dataclass(frozen=True, slots=True)
class LiveChain:
    """A disk of a running VM. `handle` names it whatever becomes of its nodes.

    `layers` go from the active one down; `root` and `filters` are node names, the outermost first.

    `qdev` is the device's QOM path; None of an export. `jobs` has for each job's id the nodes that it works on.
    `line` has every node from the root down, of whatever driver.
    """

    disk: str
    handle: str
    root: str
    qdev: str | None
    filters: tuple[tuple[str, str], ...]
    layers: tuple[Layer, ...]
    jobs: Mapping[str, frozenset[str]]
    line: tuple[tuple[str, str], ...] = ()

    @property
    def active(self) -> Layer:
        """What the guest writes to."""
        return self.layers[0]

    @property
    def snapshots(self) -> int:
        """How many earlier states it keeps."""
        return len(self.layers) - 1

    @property
    def on_ceph(self) -> bool:
        """Any of it is an RBD image."""
        return any(layer.protocol == "rbd" for layer in self.layers)

    def jobs_on(self, nodes: set[str]) -> list[str]:
        """The jobs that work on any of these nodes."""
        return sorted(job for job, used in self.jobs.items() if used & nodes)

    def position(self, name: str) -> int:
        """Where in `layers` an image is, by its file's name or path or its node's name. NotFoundError, RefusedError."""
        found = [
            number
            for number, layer in enumerate(self.layers)
            if name in (layer.node, layer.name) or name == layer.filename
        ]
        if len(found) > 1:
            raise RefusedError(
                f"{len(found)} images of {self.disk} have the name {name}", hint="give its path"
            )
        if not found:
            raise NotFoundError(
                f"{self.disk} has no image {show(name)} in its chain",
                hint=f"it has {', '.join(layer.name for layer in self.layers[:8])}",
            )
        return found[0]


class _Graph:
    """The nodes and edges, by name."""

    def __init__(self, answers: Answers) -> None:
        try:
            named = {int(node["id"]): node for node in answers.graph["nodes"]}
            self.kinds = {number: str(node["type"]) for number, node in named.items()}
            self.names = {number: str(node["name"]) for number, node in named.items()}
            self.edges = [
                (int(edge["parent"]), str(edge["name"]), int(edge["child"]))
                for edge in answers.graph["edges"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"QEMU's graph of block nodes makes no sense: {error!r}") from None
        self._drivers = {name: str(node.get("drv", "")) for name, node in answers.nodes.items()}

    def driver(self, node: str) -> str:
        return self._drivers.get(node, "")

    def below(self, node: str, *kinds: str) -> str | None:
        """The first child of these kinds, in their order."""
        found = {
            name: self.names[child]
            for parent, name, child in self.edges
            if self.kinds[parent] == "block-driver" and self.names[parent] == node
        }
        return next((found[kind] for kind in kinds if kind in found), None)

    def above(self, node: str) -> list[str]:
        """The nodes that show this one: overlays and filters, not the temporary views of it."""
        return [
            self.names[parent]
            for parent, name, child in self.edges
            if self.names[child] == node
            and name in _DOWN
            and self.kinds[parent] == "block-driver"
            and self.driver(self.names[parent]) != "snapshot-access"
        ]

    def line(self, root: str) -> Iterator[tuple[str, str]]:
        """(node, driver) from a node down to what it lies on."""
        node: str | None = root
        while node is not None:
            yield node, self.driver(node)
            node = self.below(node, *_DOWN)

    def jobs(self) -> dict[str, frozenset[str]]:
        used: dict[str, set[str]] = {}
        for parent, _, child in self.edges:
            if self.kinds[parent] == "block-job":
                used.setdefault(self.names[parent], set()).add(self.names[child])
        return {job: frozenset(nodes) for job, nodes in used.items()}


def chain_of(answers: Answers, disk: str) -> LiveChain:
    """The chain of a disk, named by its device's id or QOM path, its drive or export, or any of its nodes.

    NotFoundError, RefusedError when the name fits several or the disk is none that can be read, CorruptError.
    """
    graph = _Graph(answers)
    root, qdev = _root(answers, graph, disk)
    filters = []
    node: str | None = root
    while node is not None and graph.driver(node) in FILTERS:
        filters.append((node, graph.driver(node)))
        node = graph.below(node, *_DOWN)
    layers = []
    while node is not None:
        if (
            graph.driver(node) not in FILTERS
        ):  # those between two images are of a job, which is said by its name
            layers.append(_layer(answers, graph, node))
            node = graph.below(node, "backing")
        else:
            node = graph.below(node, *_DOWN)
    if not layers:
        raise RefusedError(f"{disk} has no image in it", hint="a drive without a medium has no snapshots")
    exports = (str(export["id"]) for export in answers.exports if export["node-name"] == root)
    handle = qdev or next(exports, disk)
    line = tuple(graph.line(root))
    return LiveChain(disk, handle, root, qdev, tuple(filters), tuple(layers), graph.jobs(), line)


def _root(answers: Answers, graph: _Graph, disk: str) -> tuple[str, str | None]:
    """The outermost node, and its device's QOM path."""
    devices = {
        str(block["inserted"]["node-name"]): str(block["qdev"]) if block.get("qdev") else None
        for block in answers.blocks
        if block.get("inserted")
    }
    for block in answers.blocks:
        if disk in _names(block) and block.get("inserted"):
            node = str(block["inserted"]["node-name"])
            return node, devices[node]
    for export in answers.exports:
        if export.get("id") == disk:
            return str(export["node-name"]), None
    if disk not in answers.nodes:
        known = [*devices, *sorted(str(export["id"]) for export in answers.exports)]
        raise NotFoundError(f"QEMU has no disk {show(disk)}", hint=f"it has {', '.join(known) or 'none'}")
    node = disk
    while above := graph.above(node):
        if len(above) > 1:
            raise RefusedError(
                f"{', '.join(sorted(above))} stand on {node}: {disk} says not which disk is meant",
                hint="name the device, the export or the active node",
            )
        node = above[0]
    return node, devices.get(node)


def _names(block: Mapping[str, Any]) -> Iterator[str]:
    if block.get("device"):
        yield str(block["device"])
    if qdev := str(block.get("qdev") or ""):
        yield qdev
        parts = qdev.split("/")
        if parts[:3] == ["", "machine", "peripheral"] and len(parts) > 3:
            yield parts[3]


def _layer(answers: Answers, graph: _Graph, node: str) -> Layer:
    protocol = node
    while (lower := graph.below(protocol, "file")) is not None:
        protocol = lower
    said = answers.nodes[node]
    image = said.get("image", {})
    return Layer(
        node=node,
        driver=graph.driver(node),
        protocol=graph.driver(protocol),
        filename=str(answers.nodes.get(protocol, said).get("file", "")),
        size=int(image.get("virtual-size", 0)),
        used=int(image.get("actual-size", 0)),
        subclusters=bool(image.get("format-specific", {}).get("data", {}).get("extended-l2")),
    )
