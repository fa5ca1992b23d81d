"""One thing that is stored, as a line of text or as a JSON object: what it is, its fields, and what is wrong with it.

The text is stable, so that tests can compare it: a change of it is a change of the format.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cdpserver.names import format_time

TIMES = frozenset({"time_ns", "created_ns", "first_time_ns", "last_time_ns", "from_time_ns", "mtime_ns"})
"""Fields that are instants: people read them as such."""

_PLAIN = re.compile(r"[^\s\"={}\[\]]+")


@dataclass(frozen=True, slots=True)
class Item:
    """`what` is one word; `fields` are plain values."""

    what: str
    fields: dict[str, Any] = field(default_factory=dict)
    damage: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The item for programs."""
        found: dict[str, Any] = {"what": self.what}
        for key, value in self.fields.items():
            if key in TIMES and _is_time(value):
                found[key.removesuffix("_ns")] = format_time(value)
            found[key] = value
        return found | ({"damage": self.damage} if self.damage else {})

    def as_line(self) -> str:
        """The item for people."""
        parts = [self.what]
        for key, value in self.fields.items():
            if key in TIMES and _is_time(value):
                parts.append(f"{key.removesuffix('_ns')}={format_time(value)}")
            else:
                parts.append(f"{key}={_text(value)}")
        if self.damage:
            parts.append(f"DAMAGED: {self.damage}")
        return " ".join(parts)


def _is_time(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 64


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        return "-"
    if isinstance(value, str) and value != "-" and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, default=repr)


def show(
    items: Iterable[Item], *, as_json: bool, answer: Callable[[str], None], answer_json: Callable[[Any], None]
) -> int:
    """Hand every item on as it comes, as a line or as JSON; how many are damaged."""
    damaged = 0

    def counted() -> Iterator[Item]:
        nonlocal damaged
        for item in items:
            damaged += bool(item.damage)
            yield item

    if as_json:
        answer_json(item.as_dict() for item in counted())
        return damaged
    for item in counted():
        answer(item.as_line())
    return damaged
