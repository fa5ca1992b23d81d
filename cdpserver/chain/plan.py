"""What a merge of base points will do to a chain. Pure.

    base.raw <- bp-0 <- bp-1 <- bp-2 <- bp-3

    delete bp:1            bp-0 <- bp-2 <- bp-3              bp-2's file takes what only bp-1's held
    pull bp:3 --base bp:0  bp-0 <- bp-3                      those between go
    commit bp:2            bp-0 <- bp-2 <- bp-3              bp-1 and bp-2 become one, which holds bp:2

A merge is always forward: one file is written anew on an older backing file, with all that the files between added. A name keeps
its meaning, `bp:N` is one instant for ever: after a commit the two files are one, called by the instant that it holds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError

Verb: TypeAlias = Literal["delete", "pull", "commit"]

VERBS: tuple[Verb, ...] = ("delete", "pull", "commit")


@dataclass(frozen=True, slots=True)
class Link:
    """A base point's file and the relative name of the file that it stands on."""

    number: int
    backing: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Base point `keep` is written anew on the file `on`; then the base points `gone` are removed, in this order."""

    keep: int
    on: str
    gone: tuple[int, ...]


def name_of(number: int) -> str:
    """The file of a base point."""
    return f"bp-{number}.qcow2"


def plan(
    links: Iterable[Link],
    verb: Verb,
    number: int,
    base: int | None,
    holds: Mapping[int, list[str]],
    disk: str,
) -> Merge:
    """What `verb` on base point `number` does. `links` are all base points of the disk, oldest first.

    UsageError, NotFoundError; RefusedError with the reason when what would go must stay; CorruptError if the files are no chain.
    """
    chain = list(links)
    _check_chain(chain, disk)
    places = {link.number: place for place, link in enumerate(chain)}
    for wanted in (number, base):
        if wanted is not None and wanted not in places:
            raise NotFoundError(f"{disk} has no base point {wanted}", hint=f"cdp snapshot tree {disk}")
    at = places[number]
    if verb == "delete":
        if base is not None:
            raise UsageError("a delete has no base", hint="leave out --base")
        _check_holds([number], holds, disk)
        if at + 1 == len(chain):
            raise RefusedError(f"bp:{number} of {disk} must stay: it is the newest", hint=_tree(disk))
        return Merge(chain[at + 1].number, chain[at].backing, (number,))
    first = _first_gone(chain, verb, at, None if base is None else places[base], disk)
    gone = [link.number for link in chain[first:at]]
    if not gone:
        raise RefusedError(f"nothing lies below bp:{number} that could go", hint=_tree(disk))
    _check_holds(gone, holds, disk)
    # The newest first: what is left meanwhile can be read.
    return Merge(number, chain[first].backing, tuple(reversed(gone)))


def _first_gone(chain: list[Link], verb: Verb, at: int, base: int | None, disk: str) -> int:
    """The place of the oldest base point that goes."""
    if base is not None and base >= at:
        raise UsageError(
            f"bp:{chain[base].number} is not below bp:{chain[at].number}",
            hint=f"--base is an older base point: cdp snapshot tree {disk}",
        )
    if verb == "pull":
        return 0 if base is None else base + 1
    return max(at - 1, 0) if base is None else base


def _check_chain(chain: list[Link], disk: str) -> None:
    for below, link in pairwise(chain):
        if link.backing != name_of(below.number):
            raise CorruptError(
                f"bp:{link.number} of {disk} stands on {link.backing}, not on bp:{below.number}",
                hint=f"cdp check {disk} --full says what is damaged",
            )


def _check_holds(gone: list[int], holds: Mapping[int, list[str]], disk: str) -> None:
    for number in gone:
        if reasons := holds.get(number):
            raise RefusedError(f"bp:{number} of {disk} must stay: {'; '.join(reasons)}", hint=_tree(disk))


def _tree(disk: str) -> str:
    return f"cdp snapshot tree {disk} shows what stands on what"
