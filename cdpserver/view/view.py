"""A view: one timeline as it was at one seq, read through tail, indexes and base; nothing is copied.

    block -> open interval (tail, index) -> older intervals (merged indexes, indexes) -> base (raw file, or the parent's view)

Invariants: a view shows exactly the records up to its seq, indexed or not; beyond its size are zeros.
Opening costs the same however long the journal is;
older intervals are opened when a read first falls through to them, many at a time where their indexes are merged. What it has
open stays open until it is closed, and so readable, whoever drops it meanwhile; what it opens is what is there then.
A *same* piece sends the lookup back to the seq that it names; the writer made sure that this takes one step.
Threads: none; every connection has a view of its own.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from cdpserver.errors import CorruptError
from cdpserver.index.merged import Merged, Source
from cdpserver.index.merging import load, sources
from cdpserver.index.pieces import BLOCK_MASK, KIND_BITS, REST_MASK, SEGMENT_BITS
from cdpserver.journal.log import LOOKS, Found, interval_path
from cdpserver.journal.record import Kind
from cdpserver.limits import BLOCK
from cdpserver.nodes import Node, base_point_path
from cdpserver.timeline import BackupBase, EmptyBase, ImageBase, PointBase
from cdpserver.view.backed import backed_up
from cdpserver.view.chain import Chain
from cdpserver.view.extent import Extent, Files, coalesce, fill, raw_extents
from cdpserver.view.history import History
from cdpserver.view.layers import NOTHING, Layer, Piece
from cdpserver.view.span import Span

STATUS_WINDOW = 4 << 20
"""Bytes resolved at first when asked for block status; more at a time while there is nothing but one run."""

STATUS_RUNS = 64
"""Runs after which an answer is long enough: it costs milliseconds, however fragmented the disk is."""

STATUS_EXTENTS = 16_384
"""Extents after which it is, however few runs they come to: content that was written in small pieces is one run of data."""

STATUS_MOST = 1 << 30
"""The widest window: what is resolved at a time is held in memory."""

KEPT_REFS = 16
"""Views of older seqs kept for *same* records."""


Part: TypeAlias = Layer | Span
"""What a view is read through: one interval, or several."""


class View:
    """The disk of `history` at `seq`; seq 0 is its base."""

    live = False
    """Does its seq go on?"""

    def __init__(self, history: History, seq: int, files: Files | None = None) -> None:
        self.history = history
        self.seq = seq
        self.size = history.size_at(seq)
        self.files = files or Files()
        self._layers: list[Part] = []
        self._older: list[int] = []
        self._sources: list[Source] | None = None
        self._merged: list[Merged] = []
        self._refs: dict[int, View] = {}
        self._base_view: View | None = None
        self._floor: Node | None = None
        self._chain: Chain | None = None
        self._status: list[tuple[int, int, bool]] = []
        self._status_seq = -1
        self._is_open = False
        self._listed: Mapping[int, int] = {}
        try:
            self._open_layers()
        except BaseException:
            self._close_layers()  # nobody else could
            raise

    def _open_layers(self) -> None:
        """The newest interval, and every further one that its index does not hold whole."""
        self.history.journal.settled(self._find_layers)
        self._is_open = True

    def _find_layers(self) -> None:
        self._close_layers()
        self._listed = self.history.journal.listed
        if self.seq == 0:
            return
        self._older, self._floor = self.history.standing(self.seq)
        while self._older:
            try:
                if self._next_layer():
                    # The indexer goes in order: what is older than an indexed record is indexed.
                    return
            except CorruptError:
                if not self._layers or self.history.journal.has_lost(self._listed):
                    raise
                return  # what is read of it meets it again

    def _next_layer(self) -> bool:
        """Open the next older interval, and fold what its index lacks. Was any of it indexed?

        Also an old interval may lack its index: while it is rebuilt.
        """
        # The newest one is open, or may be read up to somewhere in its middle.
        source = self._next_source() if self._layers else None
        if source is not None and source.merged is not None:
            del self._older[: source.high - source.low + 1]
            self._layers.append(Span(self.history.directory, source.merged, source.low, source.high))
            return True
        interval = self._older[0]
        directory = interval_path(self.history.directory, interval)
        layer = Layer(directory, interval, self.history.boot_id)
        try:
            has_any = layer.catch_up(self.history.journal, self.seq)
        except BaseException:
            layer.close()
            if self._sources is not None and source is not None:
                self._sources.insert(0, source)  # it may be looked at again
            raise
        del self._older[0]
        self._layers.append(layer)
        return has_any

    def _next_source(self) -> Source:
        """What the next older intervals are read through. Looked up once, for all of them."""
        if self._sources is None:
            self._merged = load(self.history.directory)
            self._sources = sources(self.history.directory, self._older, self._merged)
        return self._sources.pop(0)

    def refresh(self) -> None:
        """A view of a fixed seq never changes. What failed to open is opened anew, all of it: a part would read otherwise."""
        if not self._is_open:
            self._open_layers()

    # -- resolving -------------------------------------------------------------------------------------------

    def pieces(self, first: int, end: int) -> list[tuple[Part | None, Piece]]:
        """Which interval and piece holds each part of blocks [first, end); None where the base does."""
        self.refresh()
        try:
            return self._pieces(first, end)
        except BaseException:
            self._is_open = False  # an interval may have been opened by half
            raise

    def _pieces(self, first: int, end: int) -> list[tuple[Part | None, Piece]]:
        if end - first == 1:
            return [self._piece(first)]
        found: list[tuple[Part | None, Piece]] = []
        gaps = [(first, end)]
        number = 0
        while gaps:
            if number == len(self._layers):
                if not self._older:
                    break
                self._next_layer()
            layer = self._layers[number]
            number += 1
            left: list[tuple[int, int]] = []
            layer.begin()
            try:
                for start, stop in gaps:
                    for piece in layer.resolve(start, stop, self.seq):
                        if piece[2] == NOTHING:
                            left.append(piece[:2])
                        else:
                            found.append((layer, piece))
            finally:
                layer.end()
            gaps = left
        found.extend((None, (start, stop, NOTHING, 0)) for start, stop in gaps)
        if len(found) > 1:
            found.sort(key=_piece_start)
        return found

    def _piece(self, block: int) -> tuple[Part | None, Piece]:
        """The same for one block: what most reads ask for."""
        number = 0
        while True:
            if number == len(self._layers):
                if not self._older:
                    return None, (block, block + 1, NOTHING, 0)
                self._next_layer()
            layer = self._layers[number]
            number += 1
            layer.begin()
            try:
                found = layer.newest(block, self.seq)
            finally:
                layer.end()
            if found is not None:
                return layer, (block, block + 1, *found)

    def resolve(self, offset: int, end: int, *, holes: bool = False) -> list[Extent]:
        """Where bytes [offset, end) are. With `holes`, holes of the base come out as zeros."""
        try:
            return self._resolve(offset, end, holes=holes)
        except (CorruptError, FileNotFoundError) as error:
            return self._again(error, partial(self._resolve, offset, end, holes=holes))

    def _again(self, error: Exception, read: Callable[[], Found]) -> Found:
        """What `read` finds after it failed so, from what is there now; as often as history goes meanwhile."""
        for _ in range(LOOKS):
            if not self._lost_ground():
                break
            try:
                return read()
            except (CorruptError, FileNotFoundError) as again:
                error = again
        raise error

    def _lost_ground(self) -> bool:
        """Was history dropped since this view was opened? Then it stands on a base point from now on.

        Or thinned: then it reads the same from other segments.
        """
        # Of all, not just of the first one.
        lost = [
            self.history.journal.has_lost(self._listed) or not all(layer.stands for layer in self._layers),
            *(view._lost_ground() for view in self._others()),
        ]
        if lost[0]:
            self._open_layers()
        return any(lost)

    def _others(self) -> list["View"]:
        """The views that this one reads through."""
        return [*self._refs.values()] + ([self._base_view] if self._base_view is not None else [])

    def keeps_gone(self) -> bool:
        """Is a file open here that has lost its name? The file system has its room back when it is closed."""
        return (
            self.files.keeps_gone()
            or any(layer.keeps_gone() for layer in self._layers)
            or any(merged.is_gone() for merged in self._merged)
            or any(view.keeps_gone() for view in self._others())
        )

    def _resolve(self, offset: int, end: int, *, holes: bool) -> list[Extent]:
        extents: list[Extent] = []
        for layer, (start, stop, seq, value) in self.pieces(offset // BLOCK, -(-end // BLOCK)):
            low, high = max(start * BLOCK, offset), min(stop * BLOCK, end)
            if layer is None:
                extents.extend(self._base(low, high, holes=holes))
                continue
            kind = value >> KIND_BITS
            if kind == Kind.DATA:
                segment = (value & REST_MASK) >> SEGMENT_BITS
                place = (value & BLOCK_MASK) * BLOCK + low - start * BLOCK
                extents.append((low, high, layer.data(segment, seq), place))
            elif kind == Kind.SAME:
                extents.extend(self.at(value & REST_MASK).resolve(low, high, holes=holes))
            else:
                extents.append((low, high, None, 0))
        return coalesce(extents) if len(extents) > 1 else extents

    def at(self, seq: int) -> "View":
        """The view of the same timeline at an older seq."""
        if seq >= self.seq and not self.live:
            raise CorruptError(f"a *same* record refers forward, to seq {seq}")
        found = self._refs.get(seq)
        if found is None:
            if len(self._refs) >= KEPT_REFS:
                self._refs.pop(next(iter(self._refs)))._close_layers()
            found = self._refs[seq] = View(self.history, seq, self.files)
        return found

    def refs(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """For blocks [first, end): runs with the seq that a *same* record should name for what is there now."""
        try:
            pieces = self.pieces(first, end)
        except (CorruptError, FileNotFoundError) as error:
            pieces = self._again(error, partial(self.pieces, first, end))
        runs: list[tuple[int, int, int]] = []
        for layer, (start, stop, _, value) in pieces:
            is_same = layer is not None and value >> KIND_BITS == Kind.SAME
            ref = value & REST_MASK if is_same else self.seq
            if runs and runs[-1][2] == ref:
                runs[-1] = (runs[-1][0], stop, ref)
            else:
                runs.append((start, stop, ref))
        return runs

    def _base(self, offset: int, end: int, *, holes: bool) -> list[Extent]:
        if self._floor is not None:
            return self._node(self._floor, offset, end, holes=holes)
        base = self.history.timeline.base
        if isinstance(base, PointBase):
            if self._base_view is None:
                assert self.history.parent is not None
                parent = self.history.parent
                parent.journal.refresh()  # it was listed when the fork was opened; some of it may be dropped
                if parent.journal.settled(partial(parent.journal.at_seq, base.seq)).seq != base.seq:
                    raise CorruptError(
                        f"{parent.timeline.full_name} has lost seq {base.seq}, which {self.history.timeline.full_name} stands on",
                        hint="cdp check says what it touches",
                    )
                self._base_view = View(parent, base.seq, self.files)
            return self._base_view.resolve(offset, end, holes=holes)
        if isinstance(base, ImageBase):
            # An image may be smaller than the disk: beyond it are zeros. Of an empty one nothing was ever imported.
            return self._raw(f"{self.history.state_dir}/{base.file}", offset, end, least=1, holes=holes)
        if isinstance(base, BackupBase):
            return backed_up(self.files, self.history.state_dir, base, offset, end, holes=holes)
        assert isinstance(base, EmptyBase)
        path = f"{self.history.directory}/base.raw"
        return self._raw(path, offset, end, least=self.history.timeline.size, holes=holes)

    def _node(self, node: Node, offset: int, end: int, *, holes: bool) -> list[Extent]:
        """The base point that stands where older history was."""
        if self._chain is None:
            path = base_point_path(self.history.directory, node.number)
            self._chain = Chain(path, self.files)
        extents: list[Extent] = []
        root = self._chain.root
        # The disk may have grown since.
        held = max(offset, min(end, self._chain.size))
        for part in self._chain.resolve(offset, held):
            if root is not None and part[2] == root[0]:
                extents.extend(self._raw(root[0], part[0], part[1], least=root[1], holes=holes))
            else:
                extents.append(part)
        if held < end:
            extents.append((held, end, None, 0))
        return extents

    def _raw(self, path: str, offset: int, end: int, *, least: int, holes: bool) -> list[Extent]:
        return raw_extents(self.files.fd(path), path, offset, end, least=least, holes=holes)

    # -- reading ---------------------------------------------------------------------------------------------

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on."""
        target = memoryview(buffer)
        try:
            self._fill(target, offset)
        except CorruptError as error:
            self._again(error, partial(self._fill, target, offset))

    def _fill(self, target: memoryview, offset: int) -> None:
        readers = self.files.readers
        for start, end, path, place in self.resolve(offset, offset + len(target)):
            part = target[start - offset : end - offset]
            if path is None:
                part[:] = bytes(len(part))
            elif path in readers:
                readers[path].read_into(part, place)
            else:
                fd = self.files.fd(path)
                fill(fd, part, place, path)
                if self.files.verifier is not None:
                    self.files.verifier.check(fd, path, place, part, start)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""
        buffer = bytearray(length)
        self.read_into(buffer, offset)
        return bytes(buffer)

    def status(self, offset: int, end: int, *, one: bool) -> list[tuple[int, int, bool]]:
        """(start, end, zero) runs from `offset` on: the first one, which may be cut short, or (not `one`) many.

        QEMU asks for one run at a time, from the end of the last one on. What a look at a window finds is kept, so that a
        fragmented disk is resolved once, not once a run.
        """
        self.refresh()
        if not one:
            return self._runs(offset, end)
        if self._status_seq != self.seq:
            self._status, self._status_seq = [], self.seq
        found = bisect_right(self._status, offset, key=_run_start) - 1
        # The last run kept may go on behind its window, so it is looked at again.
        if found < 0 or found >= len(self._status) - 1:
            self._status = self._runs(offset, end)
            found = 0
        start, stop, zero = self._status[found]
        return [(max(start, offset), min(stop, end), zero)]

    def _runs(self, offset: int, end: int) -> list[tuple[int, int, bool]]:
        """Runs from `offset` on, until there are some and a window is done, or `end`."""
        runs: list[tuple[int, int, bool]] = []
        window = STATUS_WINDOW
        at, looked = offset, 0
        while at < end and len(runs) < STATUS_RUNS and looked < STATUS_EXTENTS:
            stop = min(end, at + window)
            extents = self.resolve(at, stop, holes=True)
            looked += len(extents)
            for start, high, path, _ in extents:
                zero = path is None
                if runs and runs[-1][2] == zero:
                    runs[-1] = (runs[-1][0], high, zero)
                else:
                    runs.append((start, high, zero))
            at = stop
            if len(extents) < STATUS_RUNS:
                window = min(4 * window, STATUS_MOST)
        return runs

    def _close_layers(self) -> None:
        for layer in self._layers:
            layer.close()
        for view in self._refs.values():
            view._close_layers()
        if self._base_view is not None:
            self._base_view._close_layers()
        for merged in self._merged:
            merged.close()
        self._layers, self._older, self._refs, self._base_view = [], [], {}, None
        self._sources, self._merged = None, []
        self._floor, self._chain, self._is_open = None, None, False

    def close(self) -> None:
        """Give everything back but the history."""
        self._close_layers()
        self.files.close()


def _run_start(run: tuple[int, int, bool]) -> int:
    return run[0]


def _piece_start(item: tuple[Part | None, Piece]) -> int:
    return item[1][0]
