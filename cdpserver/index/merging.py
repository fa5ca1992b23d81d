"""Merges closed indexes, so that what an instant is read through stays few files, however many intervals there are.

    intervals        1 2 3 4 5 6 7 8 9 10 11 12(open)
    read through    [1 . . . . . .][8 . .][11]         a merged index, another one, an index of its own

More than MOST of these side by side are merged: those that cost least for each that goes, and neighbours that are not much
larger with them, so that an entry is written a handful of times in its life. Readers need none of it: without a merged index they
go through the indexes one by one.
Durability: a file is synced before it has its name, so it is whole or not there. Killed at any time, this leaves a temporary
name, or a file that nothing is read through any more; both go at the next look.
Locks: a flock on `merged/` for who merges. It needs no other: what changes meanwhile, the new file says nothing of.
"""

import argparse
import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import lmdb
import numpy as np

from cdpserver import durable, events
from cdpserver.errors import CdpError, CorruptError, NoSpaceError
from cdpserver.index.fold import fold
from cdpserver.index.merged import (
    DIRECTORY,
    MOST_INTERVALS,
    ORDINAL_BITS,
    ORDINAL_MASK,
    Entries,
    Identity,
    Merged,
    Source,
    Words,
    Writer,
    cover,
    identity,
)
from cdpserver.index.store import CLOSED_NAME, IndexFile
from cdpserver.journal.log import interval_path, intervals
from cdpserver.state import StateDir

MOST = 4
"""Sources of closed intervals that a view goes through in the end."""

GROWTH = 2
"""A neighbour is merged with the others if it is at most so many times what they are together."""

STREAMS = 16
"""Sources merged at once: each holds up to the blocks of a GiB in memory, 5 MiB."""

ENTRY_BYTES = 16
INDEX_ROW_BYTES = 34
"""Of an entry in a merged index; of a row in a closed one, about, from which its rows are told without opening it."""

SPARE = 256 << 20
"""Room that is left to everybody else."""

ATTEMPTS = 3
"""Listings of a directory whose files are being replaced."""


def load(timeline: Path) -> list[Merged]:
    """The merged indexes of a timeline that can be used; the caller closes them."""
    found: list[Merged] = []
    for _ in range(ATTEMPTS):
        try:
            names = sorted(os.listdir(timeline / DIRECTORY))
        except FileNotFoundError:
            return []
        try:
            for name in names:
                if not name.startswith(".") and (file := _open(timeline / DIRECTORY / name)) is not None:
                    found.append(file)
            return found
        except FileNotFoundError:
            for file in found:
                file.close()
            found = []
    return []


def _open(path: Path) -> Merged | None:
    """None for what cannot be used: the indexes that it was made of are there."""
    try:
        return Merged(path)
    except FileNotFoundError:
        raise
    except (CorruptError, OSError):
        return None


def sources(timeline: Path, numbers: Sequence[int], files: Sequence[Merged]) -> list[Source]:
    """What consecutive intervals, the newest first, are read through."""
    known: dict[int, Identity] = {}
    directory = str(interval_path(timeline, 0).parent)  # a Path for each would cost more than the look
    for number in numbers if files else ():
        if (found := identity(f"{directory}/{number:06d}/{CLOSED_NAME}")) is not None:
            known[number] = found
    return cover(numbers, files, known)


def choose(sizes: Sequence[int]) -> tuple[int, int] | None:
    """Which neighbours [first, end) of sources with so many entries are to be merged, if any. Pure."""
    if len(sizes) <= MOST:
        return None
    windows = (
        (sum(sizes[first:end]) / (end - first - 1), first, end)
        for first in range(len(sizes))
        for end in range(first + 2, min(len(sizes), first + STREAMS) + 1)
    )
    _, first, end = min(windows)
    while end - first < STREAMS:
        limit = GROWTH * sum(sizes[first:end])
        if first and sizes[first - 1] <= limit:
            first -= 1
        elif end < len(sizes) and sizes[end] <= limit:
            end += 1
        else:
            break
    return first, end


def _closed(timeline: Path) -> list[list[int]]:
    """Consecutive intervals with a closed index, the newest first."""
    numbers = [n for n in intervals(timeline) if (interval_path(timeline, n) / CLOSED_NAME).exists()]
    groups = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in reversed(list(group))] for _, group in groups]


def _size(timeline: Path, source: Source) -> int:
    if source.merged is not None:
        return source.entries
    found = identity(interval_path(timeline, source.low) / CLOSED_NAME)
    return found[1] // INDEX_ROW_BYTES if found is not None else 0


def _next(timeline: Path, files: Sequence[Merged]) -> list[Source]:
    """The sources to be merged next, the newest first; none if there is nothing to do."""
    for numbers in _closed(timeline):
        held = sources(timeline, numbers, files)
        chosen = choose([_size(timeline, source) for source in held])
        if chosen is not None:
            window = held[slice(*chosen)]
            if window[0].high - window[-1].low < MOST_INTERVALS:
                return window
    return []


def due(timeline: Path) -> bool:
    """Is there something to merge, or to remove?"""
    files = load(timeline)
    try:
        if _next(timeline, files):
            return True
        used = {
            source.merged for numbers in _closed(timeline) for source in sources(timeline, numbers, files)
        }
        return any(file not in used for file in files)
    finally:
        for file in files:
            file.close()


@contextlib.contextmanager
def alone(timeline: Path) -> Iterator[bool]:
    """Nobody else merges inside; False if somebody does."""
    with contextlib.suppress(FileExistsError):
        durable.make_dir(timeline / DIRECTORY)
    fd = os.open(timeline / DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def merge(timeline: Path) -> int:
    """Merge what is to be merged, and remove what nothing is read through: how many files were written.

    NoSpaceError if there is no room for one; what was written before is there.
    """
    written = 0
    with alone(timeline) as mine:
        if not mine:
            return 0
        while True:
            files = load(timeline)
            try:
                _remove_but(timeline, {file.path for file in files})
                window = _next(timeline, files)
                if window:
                    written += _merge(timeline, window)
                else:
                    _remove_but(timeline, _used(timeline, files))
                    return written
            finally:
                for file in files:
                    file.close()


def _merge(timeline: Path, window: Sequence[Source]) -> int:
    """1 if a file was written; 0 if one that it was to be made of proved damaged, and is gone now."""
    damaged = [source.merged for source in window if source.merged is not None and not source.merged.whole()]
    for file in damaged:
        file.path.unlink(missing_ok=True)
    if damaged:
        return 0
    low, high = window[-1].low, window[0].high
    path = timeline / DIRECTORY / f"{low:06d}-{high:06d}"
    temporary = path.with_name(f"{durable.TEMPORARY}{path.name}")
    known: dict[int, Identity] = {}
    needed = sum(_size(timeline, source) for source in window) * ENTRY_BYTES
    _check_room(timeline, needed)
    with contextlib.ExitStack() as stack, durable.io_errors("merge indexes in", timeline):
        writer = stack.enter_context(Writer(temporary, low))
        streams = [_stream(timeline, source, low, known, stack) for source in window]
        for keys, values in interleave(streams):
            writer.add(keys, values)
        writer.publish(path, known)
    return 1


def _check_room(timeline: Path, needed: int) -> None:
    found = os.statvfs(timeline)
    if found.f_bavail * found.f_frsize < needed + SPARE:
        raise NoSpaceError(
            f"merging indexes of {timeline.name} needs {needed} bytes, and there is no room for that",
            hint="nothing is lost, reading is slower: free space on the store's file system",
        )


def _stream(
    timeline: Path, source: Source, first: int, known: dict[int, Identity], stack: contextlib.ExitStack
) -> Iterator[Entries]:
    """The entries of a source with ordinals from interval `first` on; into `known` what they are made of."""
    if source.merged is not None:
        for number in range(source.low, source.high + 1):
            known[number] = source.merged.members[number].index
        return _again(source.merged, source, first)
    path = interval_path(timeline, source.low) / CLOSED_NAME
    # A closed index is written by nobody, so that no reader need be noted beside it.
    index = IndexFile(path, writable=False, lock=False)
    stack.callback(index.env.close)
    found = identity(path)
    if found is None or found[0] != index.inode:
        raise FileNotFoundError(path)
    known[source.low] = found
    return _folded(index, source.low - first)


def _folded(index: IndexFile, ordinal: int) -> Iterator[Entries]:
    for places, values in fold(index):
        yield places << np.uint64(ORDINAL_BITS) | np.uint64(ordinal), values


def _again(merged: Merged, source: Source, first: int) -> Iterator[Entries]:
    oldest, newest = source.low - merged.first, source.high - merged.first
    for keys, values in merged.chunks():
        ordinals = keys & np.uint64(ORDINAL_MASK)
        kept = (ordinals >= oldest) & (ordinals <= newest)
        ordinals = ordinals[kept] - np.uint64(oldest) + np.uint64(source.low - first)
        yield keys[kept] >> np.uint64(ORDINAL_BITS) << np.uint64(ORDINAL_BITS) | ordinals, values[kept]


Head: TypeAlias = tuple[Iterator[Entries], Words, Words]
"""A stream, and what of it comes next."""


def interleave(streams: Sequence[Iterator[Entries]]) -> Iterator[Entries]:
    """The entries of all streams, each ascending, in ascending order. No key is in two of them."""
    heads = [head for stream in streams if (head := _following(stream)) is not None]
    while heads:
        bound = min(head[1][-1] for head in heads)
        parts: list[Entries] = []
        left = []
        for head in heads:
            stream, keys, values = head
            cut = int(np.searchsorted(keys, bound, side="right"))
            parts.append((keys[:cut], values[:cut]))
            if cut < len(keys):
                left.append((stream, keys[cut:], values[cut:]))
            elif (more := _following(stream)) is not None:
                left.append(more)
        heads = left
        keys, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(keys, kind="stable")
        yield keys[order], values[order]


def _following(stream: Iterator[Entries]) -> Head | None:
    for keys, values in stream:
        if len(keys):
            return stream, keys, values
    return None


def _used(timeline: Path, files: Sequence[Merged]) -> set[Path]:
    """The files that anything is read through."""
    return {
        source.merged.path
        for numbers in _closed(timeline)
        for source in sources(timeline, numbers, files)
        if source.merged is not None
    }


def _remove_but(timeline: Path, kept: set[Path]) -> None:
    for path in (timeline / DIRECTORY).iterdir():
        if path not in kept:
            durable.remove_tree(path)


def main() -> None:
    """`python -m cdpserver.index.merging --state-dir DIR ID...`: merge what is due in timelines; what fails is an event."""
    parser = argparse.ArgumentParser(description="merge closed indexes")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("ids", nargs="+")
    options = parser.parse_args()
    os.nice(10)
    events.configure("merging")
    state = StateDir.open(options.state_dir)
    for id in options.ids:
        try:
            merge(state.timeline(id))
        except (CdpError, OSError, lmdb.Error) as error:
            # Removed or thinned meanwhile, or something that the indexer asks for again in a while.
            if state.timeline(id).exists():
                events.EventLog(state.events).emit(
                    "indexer.merge_failed", level="warning", timeline=id, reason=str(error)
                )


if __name__ == "__main__":
    main()
