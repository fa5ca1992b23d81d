"""The tree of a running disk's images: its chain, and beside it what stands on the chain's images and is not open."""

from pathlib import Path
from typing import Any

from cdpserver import durable
from cdpserver.vm.chain.graph import Layer, LiveChain
from cdpserver.vm.chain.plan import Branches


def tree(chain: LiveChain, branches: Branches, vm: str) -> dict[str, Any]:
    """`{"kind","name","time_ns","size_bytes","locked","children"}`, nested; kinds disk, base, snapshot, active, branch.

    `time_ns` is when a file was last written, of a snapshot the instant that it holds; 0 of what is no file of this host;
    `size_bytes` what a file uses, of the disk all of them; `locked` that a job of QEMU works on it.
    """
    under: list[dict[str, Any]] = []
    for number, layer in enumerate(
        chain.layers
    ):  # from the active one down, so that each is put into the next
        base = number == len(chain.layers) - 1
        kind = "active" if number == 0 else "base" if base else "snapshot"
        beside = _branches(layer.path, branches) if layer.path is not None else []
        locked = bool(chain.jobs_on({layer.node}))
        under = [_item(kind, layer.name, *_facts(layer), [*beside, *under], locked=locked)]
    every = _flat(under)
    return _item("disk", vm, _facts(chain.active)[0], sum(item["size_bytes"] for item in every), under)


def depth(value: dict[str, Any]) -> int:
    """How many images lie on each other, at most."""
    deepest, todo = 0, [(value, 0)]
    while todo:
        item, level = todo.pop()
        deepest = max(deepest, level)
        todo += [(child, level + 1) for child in item["children"]]
    return deepest


def _branches(path: Path, branches: Branches) -> list[dict[str, Any]]:
    """What stands on a file and is not open. A file that by its header stands on itself is in no chain."""
    made: list[dict[str, Any]] = []
    todo = [(path, made)]
    while todo:
        below, into = todo.pop()
        for above in branches.get(below, ()):
            item = _item("branch", above.name, _written_ns(above), durable.used_bytes(above), [])
            into.append(item)
            todo.append((above, item["children"]))
    return made


def _item(
    kind: str, name: str, time_ns: int, size: int, children: list[dict[str, Any]], *, locked: bool = False
) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "time_ns": time_ns,
        "size_bytes": size,
        "locked": locked,
        "children": children,
    }


def _facts(layer: Layer) -> tuple[int, int]:
    if layer.path is None:
        return 0, layer.used
    return _written_ns(layer.path), durable.used_bytes(layer.path)


def _written_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _flat(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = list(items)
    for item in found:
        found.extend(item["children"])
    return found
