"""In which order chunks are read: those that lie together in a pack, together. Pure but for the index.

chunks of a stretch of the disk   3 4 5 6 7 8          (6 is 3 once more)
their packs                       A A B . A B
runs                              A: 3+6 4 7     B: 5 8
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cdpserver.repository.format import ENTRY_SIZE, Entry

RUN_BYTES = 2 << 20
"""Read with one request, if a chunk alone is not larger."""

GAP = 64 << 10
"""So much between two chunks is cheaper to read than to ask around."""


@dataclass(slots=True)
class Wanted:
    """A chunk, and the numbers of the disk's chunks that it is."""

    id: bytes
    entry: Entry | None = None
    numbers: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes [start, end) of a pack, and what is wanted of them. Without a pack: of chunks that the index does not know."""

    pack: str
    start: int
    end: int
    wanted: tuple[Wanted, ...]


def runs(
    chunks: Iterable[tuple[int, bytes]], find: Callable[[bytes], list[tuple[str, Entry]]]
) -> Iterator[Run]:
    """The runs that have all of `chunks` (number, id), each id once. `find` says where a chunk is, best first."""
    wanted: dict[bytes, Wanted] = {}
    packs: dict[str, list[Wanted]] = {}
    for number, id_ in chunks:
        one = wanted.get(id_)
        if one is None:
            one = wanted[id_] = Wanted(id_)
            places = find(id_)
            pack, one.entry = places[0] if places else ("", None)
            packs.setdefault(pack, []).append(one)
        one.numbers.append(number)
    for pack, found in packs.items():
        yield from _runs(pack, found) if pack else (Run("", 0, 0, (one,)) for one in found)


def _runs(pack: str, found: list[Wanted]) -> Iterator[Run]:
    entries = sorted(
        ((one.entry, one) for one in found if one.entry is not None), key=lambda pair: pair[0].place
    )
    start = end = 0
    together: list[Wanted] = []
    for entry, one in entries:
        if together and (
            entry.place - end > GAP + ENTRY_SIZE or entry.place + entry.stored - start > RUN_BYTES
        ):
            yield Run(pack, start, end, tuple(together))
            together = []
        if not together:
            start = entry.place
        together.append(one)
        end = entry.place + entry.stored
    if together:
        yield Run(pack, start, end, tuple(together))
