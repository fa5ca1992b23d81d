"""`cdp status` as lines of text, from what the service says of itself. Pure: no terminal, no clock.

A narrow terminal gets fewer columns and cut names, a low one fewer disks, and says so; warnings stay on top and are wrapped.
"""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cdpserver.names import format_bytes, format_size
from recovery.copies import in_short
from recovery.output import printable

MIN_WIDTH = 20
GAP = "  "


class Line(NamedTuple):
    """One line of the screen, and how much it matters: `plain`, `head`, `warning` or `bad`."""

    text: str
    weight: str = "plain"


class Column(NamedTuple):
    """A column of the table of disks. The greater `rank`, the sooner a narrow terminal goes without it."""

    title: str
    rank: int
    show: Callable[[dict[str, Any], int], str]
    right: bool = True


def span(nanoseconds: int | None) -> str:
    """A length of time, to two units: `340ms`, `2.1s`, `2m14s`, `3d2h`; `?` for one that is not known."""
    if nanoseconds is None:
        return "?"
    if nanoseconds < 1_000_000:
        return "0" if nanoseconds <= 0 else "<1ms"
    if nanoseconds < 1_000_000_000:
        return f"{nanoseconds // 1_000_000}ms"
    if nanoseconds < 60_000_000_000:
        return f"{nanoseconds / 1e9:.1f}s"
    left = nanoseconds // 1_000_000_000
    parts: list[str] = []
    for unit, seconds in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        if left >= seconds and len(parts) < 2:
            parts.append(f"{left // seconds}{unit}")
            left %= seconds
    return "".join(parts)


def _base_point(disk: dict[str, Any], now_ns: int) -> str:
    found = disk["last_base_point"]
    if found is None:
        return "-"
    age = f" {span(now_ns - found['time_ns'])}" if found["time_ns"] is not None else ""
    return f"bp:{found['number']}{age}"


def _state(disk: dict[str, Any]) -> str:
    return "broken" if disk["broken"] else str(disk["state"])


COPY = "last copy"

COLUMNS = (
    Column("disk", 0, lambda disk, _: printable(disk["name"]), right=False),
    Column("state", 1, lambda disk, _: _state(disk), right=False),
    Column("grade", 4, lambda disk, _: disk["grade"] or "-", right=False),
    Column("size", 10, lambda disk, _: "-" if disk["size"] is None else format_size(disk["size"])),
    Column("rpo", 3, lambda disk, _: span(disk["rpo_ns"])),
    Column("lag", 2, lambda disk, _: span(disk["lag_ns"])),
    Column("durable lag", 5, lambda disk, _: span(disk["durable_lag_ns"])),
    Column("tail", 8, lambda disk, _: f"{disk['tail_records']:,}"),
    Column("index lag", 6, lambda disk, _: span(disk["index_lag_ns"])),
    Column("base point", 7, _base_point),
    Column(COPY, 11, lambda disk, _: in_short(disk["resync"]), right=False),
    Column("clients", 9, lambda disk, _: "?" if disk["clients"] is None else str(disk["clients"])),
)


def screen(found: dict[str, Any], *, width: int | None = None, height: int | None = None) -> list[Line]:
    """The whole screen, at most `width` columns wide and `height` lines high."""
    width = None if width is None else max(width, MIN_WIDTH)
    top = [*_warnings(found, width), *_service(found, width), Line("")]
    if not found["disks"]:
        return [*top, Line(_cut("no disks; add one: cdp disk add NAME --size SIZE", width))]
    rows = _table(found["disks"], found["time_ns"], width)
    room = len(rows) if height is None else max(height - len(top), 2)
    if len(rows) > room:
        left = len(rows) - (room - 1)
        note = f"... and {left} more disk{'s' if left > 1 else ''}: cdp status"
        rows = [*rows[: room - 1], Line(_cut(note, width))]
    return [*top, *rows]


def _warnings(found: dict[str, Any], width: int | None) -> Iterator[Line]:
    for warning in found["warnings"]:
        text = f"! {printable(warning)}"
        wrapped = [text] if width is None else textwrap.wrap(text, width, subsequent_indent="  ")
        yield from (Line(part, "bad") for part in wrapped)
    error = found["last_error"]
    if error is not None:
        text = f"last error: {error.get('time', '')} {error.get('event', '')} (events.jsonl)"
        yield Line(_cut(printable(text), width), "warning")


def _service(found: dict[str, Any], width: int | None) -> Iterator[Line]:
    up = span(found["time_ns"] - found["started_ns"])
    yield from _flow(
        [f"cdpserver {found['version']}", f"up {up}", f"pid {found['pid']}", found["state_dir"]], width
    )
    children = []
    for name, child in found["children"].items():
        pid = "down" if child["pid"] is None else f"pid {child['pid']}"
        restarts = max(0, child["starts"] - 1)
        children.append(
            f"{name} {pid}" + (f", {restarts} restart{'s' if restarts > 1 else ''}" if restarts else "")
        )
    yield from _flow(children, width)
    store = found["store"]
    size, free = store["size_bytes"], store["free_bytes"]
    used = f"{100 - free * 100 // size}%" if size else "-"
    yield from _flow([f"store {used} used", f"{format_bytes(free)} free of {format_bytes(size)}"], width)


def _flow(parts: list[str], width: int | None) -> Iterator[Line]:
    """The parts on one line, or on as many as it takes."""
    line = ""
    for part in map(printable, parts):
        joined = f"{line} | {part}" if line else part
        if line and width is not None and len(joined) > width:
            yield Line(_cut(line, width))
            joined = part
        line = joined
    yield Line(_cut(line, width))


def _cut(text: str, width: int | None) -> str:
    return text if width is None or len(text) <= width else text[: width - 1] + "~"


def _table(disks: list[dict[str, Any]], now_ns: int, width: int | None) -> list[Line]:
    # Of disks that the service protects.
    copied = any(disk.get("resync") for disk in disks)
    columns = [column for column in COLUMNS if column.title != COPY or copied]
    while True:
        cells = [[column.show(disk, now_ns) for column in columns] for disk in disks]
        widths = [
            max(len(column.title), *(len(row[number]) for row in cells))
            for number, column in enumerate(columns)
        ]
        total = sum(widths) + len(GAP) * (len(columns) - 1)
        if width is None or total <= width or len(columns) == 2:
            break
        columns.remove(max(columns, key=lambda column: column.rank))
    if width is not None and total > width:
        widths[0] = max(6, widths[0] - (total - width))
    weights = ["head", *("bad" if _state(disk) in ("broken", "damaged") else "plain" for disk in disks)]
    lines = []
    for weight, row in zip(weights, [[column.title for column in columns], *cells], strict=True):
        shown = [
            text.rjust(room) if column.right else _cut(text, room).ljust(room)
            for column, text, room in zip(columns, row, widths, strict=True)
        ]
        lines.append(Line(_cut(GAP.join(shown).rstrip(), width), weight))
    return lines
