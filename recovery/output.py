"""What `cdp` prints: answers on stdout, as JSON for programs or as text for people; talk on stderr.

Text that comes from elsewhere (names, paths, messages) is printed with its control characters escaped, so that it can
move no cursor and forge no line. Rich is loaded for a terminal only: in a pipe the same table is plain text.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from cdpserver.names import format_bytes, format_size, format_time

MAX_TABLE_WIDTH = 8192
"""Columns of a table at a terminal: a path may have 4096."""

GRADE_COLOURS = {"app": "bold green", "crash": "green", "unordered": "yellow"}
_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def printable(text: object) -> str:
    """`text` with everything escaped that a terminal may take for more than a character."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def say(line: str) -> None:
    """One line of talk on stderr."""
    print(printable(line), file=sys.stderr)


def answer(line: str = "") -> None:
    """One line of the answer."""
    print(printable(line))


def answer_json(value: Any) -> None:
    """The answer for programs: an object on one line, or a list with a line for each of its items."""
    if not isinstance(value, list):
        print(json.dumps(value))
        return
    answer_json_items(value)


def answer_json_items(items: Iterable[Any]) -> None:
    """A JSON list, a line for each item, written as they come."""
    opening = "["
    for item in items:
        print(opening, json.dumps(item), sep="\n", end="")
        opening = ","
    print("[]" if opening == "[" else "\n]")


# --- values for people


def show_size(value: object) -> str:
    """A disk's size, exactly."""
    return format_size(value) if isinstance(value, int) else show(value)


def show_bytes(value: object) -> str:
    """A count of bytes, rounded."""
    return format_bytes(value) if isinstance(value, int) else show(value)


def show_time(value: object) -> str:
    """An instant in full, so that it can be given back as WHEN: rounded, it would mean an earlier record."""
    if not isinstance(value, int):
        return show(value)
    whole, _, fraction = format_time(value).rstrip("Z").partition(".")
    return f"{whole}.{fraction.rstrip('0').ljust(3, '0')}Z"


def show_age(value: object) -> str:
    """How long ago an instant was: `2m14s`."""
    if not isinstance(value, int):
        return show(value)
    left = (time.time_ns() - value) // 1_000_000_000
    parts: list[str] = []
    for unit, seconds in _UNITS:
        if left >= seconds and len(parts) < 2:
            parts.append(f"{left // seconds}{unit}")
            left %= seconds
    return "".join(parts) or "now"


def show_lag(value: object) -> str:
    """A span of nanoseconds, to the millisecond."""
    return f"{value / 1e9:.3f}s" if isinstance(value, int) else show(value)


def show(value: object) -> str:
    """Any other value."""
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict() | list():
            return json.dumps(value)
    return printable(value)


_FORMATS: dict[str, Callable[[object], str]] = {
    "size": show_size,
    "bytes": show_bytes,
    "journal_bytes": show_bytes,
    "lag_ns": show_lag,
    "time_ns": show_time,
    "created_ns": show_time,
    "age": show_age,
}


def format_field(key: str, value: object) -> str:
    """The value of a field as people read it."""
    return _FORMATS.get(key, show)(value)


def answer_fields(value: dict[str, Any]) -> None:
    """One thing: a line for each of its fields. A time in nanoseconds takes the place of its text."""
    shown = {
        key.removesuffix("_ns"): format_field(key, field)
        for key, field in value.items()
        if f"{key}_ns" not in value
    }
    width = max((len(key) for key in shown), default=0)
    for key, text in shown.items():
        answer(f"{key.ljust(width)}  {text}")


# --- tables


class Column(NamedTuple):
    """A column of a table: the field that it shows, and its title where that differs."""

    key: str
    title: str = ""
    right: bool = False

    @property
    def head(self) -> str:
        """What stands above it."""
        return self.title or self.key


def answer_table(columns: Sequence[Column], rows: Sequence[dict[str, Any]], *, nothing: str) -> None:
    """A list as a table. Without rows nothing is answered, and `nothing` is said."""
    if not rows:
        say(nothing)
        return
    cells = [[format_field(column.key, row.get(column.key)) for column in columns] for row in rows]
    if sys.stdout.isatty():
        _rich_table(columns, cells)
    else:
        _plain_table(columns, cells)


def _plain_table(columns: Sequence[Column], cells: list[list[str]]) -> None:
    heads = [column.head for column in columns]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for row in [heads, *cells]:
        shown = [
            text.rjust(width) if column.right else text.ljust(width)
            for column, text, width in zip(columns, row, widths, strict=True)
        ]
        answer("  ".join(shown).rstrip())


def _rich_table(columns: Sequence[Column], cells: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column.head, justify="right" if column.right else "left", no_wrap=True)
    for row in cells:
        # As Text, so that no name is taken for markup.
        table.add_row(*(Text(text, style=GRADE_COLOURS.get(text, "")) for text in row))
    console = Console(highlight=False)
    # Instants and URIs are there to be copied: where the terminal is too narrow it wraps, and nothing is cut off.
    unbounded = console.options.update(max_width=MAX_TABLE_WIDTH)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)
