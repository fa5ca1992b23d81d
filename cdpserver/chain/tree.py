"""The tree of a disk: its base points as they follow on each other, with forks and locked points where they start or stand.

disk
 +- bp:0
     +- bp:1
         +- fork         with its own base points below it
         +- seq:4711     a locked point after bp:1 and before bp:2
         +- bp:2
"""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cdpserver import durable, timeline
from cdpserver.catalog import Catalog
from cdpserver.chain.holds import now_ns
from cdpserver.errors import NotFoundError, RefusedError, RemovedError
from cdpserver.forks import forks_of
from cdpserver.locks import locked_points
from cdpserver.names import show
from cdpserver.nodes import Node, base_point_path, nodes
from cdpserver.state import StateDir
from cdpserver.timeline import PointBase, Timeline

Kind: TypeAlias = Literal["disk", "bp", "fork", "point"]

MAX_BASE_POINTS = 400
"""Of one disk in a tree: each is two levels deeper in JSON, and Python's own reader and writer of it stop at 1000."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A disk, base point, fork or locked point, and what follows on it.

    `size_bytes` of a base point is what its own file uses; of a disk or fork, what all of it uses, its forks too; 0 of a locked
    point, which is no file.
    """

    kind: Kind
    name: str
    time_ns: int
    size_bytes: int
    locked: bool
    children: tuple["Branch", ...]

    def as_dict(self) -> dict[str, Any]:
        """As the CLI and the API show it."""
        # By hand rather than by recursion: a chain is as deep as it is long.
        made: dict[str, Any] = {}
        todo = [(self, made)]
        while todo:
            branch, into = todo.pop()
            children: list[dict[str, Any]] = [{} for _ in branch.children]
            into |= {
                "kind": branch.kind,
                "name": branch.name,
                "time_ns": branch.time_ns,
                "size_bytes": branch.size_bytes,
                "locked": branch.locked,
                "children": children,
            }
            todo += zip(branch.children, children, strict=True)
        return made


def tree(state: StateDir, catalog: Catalog, disk: str) -> Branch:
    """The tree of a live disk or fork, from the files alone. NotFoundError, RemovedError."""
    entry = catalog.get(disk)
    if entry is None:
        raise NotFoundError(f"there is no disk {show(disk)}", hint="list the disks: cdp disk list")
    if entry.state != "live":
        raise RemovedError(f"{disk} is being removed", hint="cdp disk list shows when it is gone")
    return _root(state, catalog, timeline.load(state.timeline(entry.id)))


def _root(state: StateDir, catalog: Catalog, line: Timeline) -> Branch:
    directory = state.timeline(line.id)
    held = nodes(directory)
    if len(held) > MAX_BASE_POINTS:
        raise RefusedError(
            f"{line.full_name} has {len(held)} base points, too many for a tree",
            hint=f"list them: cdp bp list {line.full_name}; to merge old ones: cdp snapshot pull --help",
        )
    locked = locked_points(catalog, line.id, now_ns=now_ns(state))
    under: dict[int, list[Branch]] = defaultdict(list)
    forks_bytes = 0
    for base, fork in forks_of(state, catalog, line.id):
        branch = _root(state, catalog, fork)
        under[_place(held, base.seq)].append(branch)
        forks_bytes += branch.size_bytes
    for seq, time_ns in sorted(locked.items()):
        if all(node.seq != seq for node in held):
            under[_place(held, seq)].append(Branch("point", f"seq:{seq}", time_ns, 0, True, ()))
    above: tuple[Branch, ...] = ()
    for node in reversed(held):
        children = (*under[node.number], *above)
        above = (_base_point(directory, node, locked=node.seq in locked, children=children),)
    children = (*under[-1], *above)
    time_ns = line.base.time_ns if isinstance(line.base, PointBase) else line.created_ns
    size = _used(directory) + forks_bytes
    return Branch("fork" if line.is_fork else "disk", line.full_name, time_ns, size, False, children)


def _place(held: list[Node], seq: int) -> int:
    """The number of the base point that an instant follows on; -1 for the disk itself."""
    return next((node.number for node in reversed(held) if node.seq <= seq), -1)


def _base_point(directory: Path, node: Node, *, locked: bool, children: tuple[Branch, ...]) -> Branch:
    # 0 of one that was merged away since it was listed.
    size = durable.used_bytes(base_point_path(directory, node.number))
    return Branch("bp", f"bp:{node.number}", node.time_ns, size, locked, children)


def _used(directory: Path) -> int:
    """Bytes that the files of a directory use."""
    paths = (os.path.join(folder, name) for folder, _, files in os.walk(directory) for name in files)
    return sum(map(durable.used_bytes, paths))
