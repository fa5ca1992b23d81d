"""Holds merged indexes against the indexes that they were made of, which are held against the records."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np

from cdpserver import durable
from cdpserver.check.damage import Finding
from cdpserver.check.index import REBUILD, start_of
from cdpserver.errors import CorruptError
from cdpserver.index.fold import fold
from cdpserver.index.merged import DIRECTORY, ORDINAL_BITS, Merged, add_digests, digests, identity
from cdpserver.index.store import CLOSED_NAME, IndexFile
from cdpserver.journal.log import interval_path, segments


def check_merged(directory: Path) -> list[Finding]:
    """What is wrong with a timeline's merged indexes. One that was replaced meanwhile, or that nobody reads, is no damage."""
    return [
        finding
        for path in sorted((directory / DIRECTORY).glob("*"))
        if not path.name.startswith(durable.TEMPORARY)
        for finding in _check(directory, path)
    ]


def _check(directory: Path, path: Path) -> Iterator[Finding]:
    try:
        file = Merged(path)
    except FileNotFoundError:
        return
    except CorruptError as error:
        yield Finding(error.message, path, 0, 0, hint=REBUILD)
        return
    with contextlib.closing(file):
        if not file.whole():
            first = interval_path(directory, min(file.members, default=0))
            with contextlib.suppress(FileNotFoundError):
                seq, time_ns = start_of(first, segments(directory, int(first.name)))
                what = f"the merged index {path.name} does not hold what it says"
                yield Finding(what, path, seq, time_ns, hint=REBUILD)
            return
        for number, member in file.members.items():
            index = interval_path(directory, number) / CLOSED_NAME
            if identity(index) != member.index:
                continue  # thinned, dropped or rebuilt: views go by its own index
            try:
                found = _digest(index)
            except (FileNotFoundError, lmdb.Error):
                continue  # gone by now, or damaged, which the check of that index says
            if found != (member.entries, member.digest):
                seq, time_ns = start_of(index.parent, segments(directory, number))
                what = f"the merged index {path.name} differs from the index of interval {number}"
                yield Finding(what, path, seq, time_ns, hint=REBUILD)


def _digest(index: Path) -> tuple[int, int]:
    found: dict[int, tuple[int, int]] = {}
    file = IndexFile(index, writable=False)
    try:
        for places, values in fold(file):
            add_digests(found, digests(places << np.uint64(ORDINAL_BITS), values))
    finally:
        file.env.close()
    return found.get(0, (0, 0))
