"""`cdp snapshot`: the tree of a disk, and merging its base points."""

import sys
from argparse import Namespace
from typing import Any

from cdpserver.catalog import Catalog
from cdpserver.errors import UnreachableError, UsageError
from cdpserver.names import BasePoint, format_bytes, parse_point
from cdpserver.state import StateDir, default_state_dir
from recovery.output import answer, answer_json, printable, show_time
from recovery.remote import ask, client, on_a_terminal

LEAST_WIDTH = 200
"""Columns of a tree in a pipe: no line of it is folded."""

_LINE = {"bp", "base", "snapshot", "active"}
"""Kinds that follow on each other in one line of history."""


def snapshot_tree(options: Namespace) -> None:
    """The tree, from the service, or from the files when there is none."""
    try:
        value = client(options).tree(options.disk)
    except UnreachableError:
        from cdpserver.chain.tree import tree

        state = StateDir.open(default_state_dir(options.state_dir))
        with Catalog.open(state, writable=False) as catalog:
            value = tree(state, catalog, options.disk).as_dict()
    if options.json:
        answer_json(value)
    else:
        print_tree(value)


def print_tree(value: dict[str, Any]) -> None:
    """A disk's base points in one column, and what stands on each of them a step to the right."""
    from rich.console import Console
    from rich.tree import Tree

    def grow(into: Tree, branch: dict[str, Any]) -> None:
        todo = list(branch["children"])
        while todo:
            child = todo.pop(0)
            made = into.add(_label(child))
            if child["kind"] in _LINE:
                # Those on the same line of history follow below; only what leaves it goes to the right.
                todo += [above for above in child["children"] if above["kind"] in _LINE]
                grow(made, {"children": [other for other in child["children"] if other["kind"] not in _LINE]})
            else:
                grow(made, child)

    root = Tree(_label(value), highlight=False)
    grow(root, value)
    width = None if sys.stdout.isatty() else LEAST_WIDTH
    Console(width=width, highlight=False, markup=False, emoji=False).print(root)


def _label(branch: dict[str, Any]) -> str:
    words = [
        f"{branch['kind']} {branch['name']}" if branch["kind"] not in ("bp", "point") else branch["name"]
    ]
    words.append(show_time(branch["time_ns"]))
    if branch["kind"] != "point":
        words.append(format_bytes(branch["size_bytes"]))
    if branch["locked"]:
        words.append("locked")
    return printable("  ".join(words))


def bp_rebuild(options: Namespace) -> None:
    """The file of a base point, anew."""
    disk, when = parse_point(options.point)
    if not isinstance(when, BasePoint):
        raise UsageError(f"{options.point} names no base point", hint=f"write {disk}@bp:N")
    made = client(options).rebuild(disk, when.number)
    if options.json:
        answer_json(made)
    else:
        answer(f"{options.point} is whole again: {made['path']}")


def snapshot_delete(options: Namespace) -> None:
    """One base point goes."""
    _merge(options, "delete", f"Delete the base point {options.point}?")


def snapshot_pull(options: Namespace) -> None:
    """Those below go."""
    below = f"between it and {options.base}" if options.base else "below it"
    _merge(options, "pull", f"Delete the base points {below} of {options.point}?")


def snapshot_commit(options: Namespace) -> None:
    """Those below go, the base too."""
    below = f"from {options.base} up to it" if options.base else "next below it"
    _merge(options, "commit", f"Delete the base points {below} of {options.point}?")


def _merge(options: Namespace, verb: str, question: str) -> None:
    if not options.yes and on_a_terminal():
        ask(question)
    disk, _, point = options.point.partition("@")
    said = client(options).merge(disk, verb=verb, point=point, base=getattr(options, "base", None))
    if options.json:
        answer_json(said)
        return
    answer(
        f"{', '.join(said['removed'])} of {disk} removed; {said['stays']} stays; "
        f"{format_bytes(max(said['freed_bytes'], 0))} freed"
    )
