"""What changed of a disk since an earlier backup, stored: places of which little changed as patches, the others whole.

    changed          of an earlier patch        together
    | |b| | | |  +   | | | |b| |    ->         | |b| |b| |     up to a third of the place: a patch over the same chunk; else whole

Only those blocks are read. A page of the list at a time, so that what is known of its places fits in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby

from cdpserver.limits import BLOCK
from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import PAGE_IDS
from cdpserver.repository.listing import Listing
from cdpserver.repository.patches import Patch, gathered, is_patched, runs_of_bits, touched
from cdpserver.repository.pipeline import Pipeline, Readable, Sent

Group = list[tuple[int, int]]
"""(place, bits of its blocks) of those that share a patch."""


class Increment:
    """Of one disk. Threads: one."""

    def __init__(self, source: Readable, old: ChunkList, made: Listing, pipeline: Pipeline) -> None:
        """`old` is the list of the earlier backup, and `made` goes on from it."""
        self._source, self._old, self._made, self._pipeline = source, old, made, pipeline

    def store(self, ranges: Iterable[tuple[int, int]], told: Callable[[int], None]) -> None:
        """What changed: ascending, disjoint ranges. `told` hears how many places there are up to what is done."""

        def put(chunk: int, id_: bytes) -> None:
            self._made.put(chunk, id_)
            told(chunk + 1)

        changed = touched(ranges, self._old.step)
        for number, places in groupby(changed, lambda place: place[0] // PAGE_IDS):
            whole, patched = self._sorted(number, places)
            self._pipeline.store(self._source, iter(whole), put)
            self._pipeline.store_sent(self._patches(patched))
            told((number + 1) * PAGE_IDS)

    def _sorted(self, number: int, places: Iterable[tuple[int, int]]) -> tuple[list[int], Group]:
        """The places of a page that are stored whole, and the others with all of their blocks that are not their chunks'."""
        whole: list[int] = []
        patched: Group = []
        table = self._old.table(number)
        for place, changed in places:
            before = table.get(place % PAGE_IDS)
            blocks = changed | (before.blocks if before is not None else 0)
            if is_patched(blocks, self._old.length(place), self._old.step):
                patched.append((place, blocks))
            else:
                whole.append(place)
        return whole, patched

    def _patches(self, places: Group) -> Iterator[Sent]:
        step = self._old.step
        for group in gathered(places, step):
            content = bytearray(sum(blocks.bit_count() for _, blocks in group) * BLOCK)
            view, at = memoryview(content), 0
            for place, blocks in group:
                for low, high in runs_of_bits(blocks):
                    end = at + (high - low) * BLOCK
                    self._source.read_into(view[at:end], place * step + low * BLOCK)
                    at = end
            self._pipeline.read_bytes += len(content)
            yield partial(self._put, group, len(content)), group[0][0], content

    def _put(self, group: Group, length: int, _: int, id_: bytes) -> None:
        """The patch of a group is stored, or is zeros."""
        first = 0
        for place, blocks in group:
            self._made.put_patch(place, Patch(id_, length, first, blocks))
            first += blocks.bit_count()
