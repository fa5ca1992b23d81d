"""A merged index as text: the intervals that it holds, and its pieces by GiB of the disk, level, place, interval."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.index.merged import (
    DIRECTORY,
    LEVEL_SHIFT,
    ORDINAL_BITS,
    ORDINAL_MASK,
    PLACE_SHIFT,
    REBUILD,
    REGION_MASK,
    REGION_SHIFT,
    Merged,
    identity,
)
from cdpserver.index.pieces import BLOCK_MASK, KIND_BITS, REST_MASK, SEGMENT_BITS, SHIFTS
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal.log import interval_path
from cdpserver.journal.record import CHANGES, Kind
from cdpserver.limits import BLOCK
from recovery.item import Item


def is_merged(path: Path) -> bool:
    """Is this the path of a merged index?"""
    return path.parent.name == DIRECTORY


def items(path: Path) -> Iterator[Item]:
    """Everything in the merged index at `path`. NotFoundError, CorruptError."""
    try:
        file = Merged(path)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", hint="cdp timeline show DISK lists them") from None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}", hint=REBUILD) from None
    with contextlib.closing(file):
        damage = "" if file.whole() else "it does not hold what it says"
        yield Item(
            "merged-index", {"file": path.name, "entries": file.entries, "levels": list(file.levels)}, damage
        )
        for number, member in sorted(file.members.items()):
            index = interval_path(path.parent.parent, number) / CLOSED_NAME
            current = identity(index) == member.index
            yield Item("member", {"interval": number, "entries": member.entries, "current": current})
        for keys, values in file.chunks():
            for key, value in zip(keys.tolist(), values.tolist(), strict=True):
                yield _piece(key, value, file.first)


def _piece(key: int, value: int, first: int) -> Item:
    place = key >> ORDINAL_BITS
    level, kind, rest = place >> LEVEL_SHIFT & 7, value >> KIND_BITS, value & REST_MASK
    if level >= len(SHIFTS) or kind not in CHANGES:
        return Item("piece", {"key": key, "value": value}, "it cannot be read")
    block = (place >> PLACE_SHIFT << REGION_SHIFT) + ((place & REGION_MASK) << SHIFTS[level])
    fields: dict[str, Any] = {
        "level": level,
        "offset": block * BLOCK,
        "length": BLOCK << SHIFTS[level],
        "interval": first + (key & ORDINAL_MASK),
        "kind": Kind(kind).name.lower(),
    }
    if kind == Kind.DATA:
        fields |= {"segment": rest >> SEGMENT_BITS, "place": (rest & BLOCK_MASK) * BLOCK}
    elif kind == Kind.SAME:
        fields["ref"] = rest
    return Item("piece", fields)
