"""How densely old base points are kept: `48h 7d 4w 12m` is one an hour for 48 hours, one a day for 7 days, one a week
for 4 weeks, one a month for 12 months; y are years. Pure.

Slots are those of the calendar in UTC, a week beginning on Monday. A rule of N units covers the slot of now and the N before it,
so that what is N units old is still covered.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from cdpserver.config_values import quoted
from cdpserver.errors import UsageError
from cdpserver.names import show

UNITS = "hdwmy"
MAX_COUNT = 9999
NONE = "none"

SLOT_FORMS = (
    "write how many of each: hours h, days d, weeks w, months m, years y, such as '48h 7d 4w 12m'; or none"
)

SECOND_NS = 1_000_000_000
HOUR_NS = 3600 * SECOND_NS
DAY_NS = 24 * HOUR_NS
MONTH_NS = 28 * DAY_NS
"""The shortest: a span made of months is never longer than it says."""

YEAR_NS = 365 * DAY_NS

WORDS = {"h": "hour", "d": "day", "w": "week", "m": "month", "y": "year"}

SPANS_NS = {"h": HOUR_NS, "d": DAY_NS, "w": 7 * DAY_NS, "m": MONTH_NS, "y": YEAR_NS}

_RULE = re.compile(r"([0-9]{1,4})([hdwmy])")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Rule:
    """One base point in each `unit`, for `count` of them."""

    count: int
    unit: str

    @property
    def word(self) -> str:
        """What a slot is called."""
        return WORDS[self.unit]

    @property
    def span_ns(self) -> int:
        """How far back it reaches, at least."""
        return self.count * SPANS_NS[self.unit]

    def covers(self, time_ns: int, now_ns: int) -> bool:
        """Is the slot of `time_ns` one of those that it keeps a base point of?"""
        return slot_of(self.unit, time_ns) >= slot_of(self.unit, now_ns) - self.count

    def __str__(self) -> str:
        return f"{self.count}{self.unit}"


def slot_of(unit: str, time_ns: int) -> int:
    """The number of the hour, day, week, month or year that holds an instant."""
    match unit:
        case "h":
            return time_ns // HOUR_NS
        case "d":
            return time_ns // DAY_NS
        case "w":
            return (time_ns // DAY_NS + 3) // 7  # 1970 began on a Thursday
        case "m":
            day = _EPOCH + timedelta(days=time_ns // DAY_NS)
            return day.year * 12 + day.month
        case "y":
            return (_EPOCH + timedelta(days=time_ns // DAY_NS)).year
    raise AssertionError(unit)


def parse_slots(text: str) -> tuple[Rule, ...]:
    """The rules, shortest unit first; `none` is no rule. UsageError."""
    words = text.replace(",", " ").split()
    if words == [NONE]:
        return ()
    found: dict[str, Rule] = {}
    for word in words:
        match = _RULE.fullmatch(word)
        if match is None or int(match[1]) == 0:
            raise UsageError(f"not how many are kept: {show(word)}", hint=SLOT_FORMS)
        if match[2] in found:
            raise UsageError(f"{show(text)} says twice how many {match[2]}", hint=SLOT_FORMS)
        found[match[2]] = Rule(int(match[1]), match[2])
    if not found:
        raise UsageError(f"not how many are kept: {show(text)}", hint=SLOT_FORMS)
    return tuple(found[unit] for unit in UNITS if unit in found)


def format_slots(rules: Sequence[Rule]) -> str:
    """The text that `parse_slots` reads as `rules`."""
    return " ".join(map(str, rules)) or NONE


def span_ns(rules: Sequence[Rule]) -> int:
    """How far back the rules reach together."""
    return max((rule.span_ns for rule in rules), default=0)


@dataclass(frozen=True, slots=True)
class SlotsValue:
    """A configuration value: how densely base points are kept."""

    takes: ClassVar[str] = "numbers of hours, days, weeks, months and years, or none"
    example: ClassVar[str] = '"48h 7d 4w"'

    def read(self, key: str, value: object) -> tuple[Rule, ...]:
        return self.read_option(key, quoted(key, value, SLOT_FORMS))

    def read_option(self, key: str, text: str) -> tuple[Rule, ...]:
        try:
            return parse_slots(text)
        except UsageError as error:
            raise UsageError(f"{key}: {error.message}", hint=error.hint) from None

    def write(self, value: tuple[Rule, ...]) -> str:
        return f'"{format_slots(value)}"'
