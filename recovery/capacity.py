"""`cdp usage` and `cdp forecast`: what history takes, and what another policy would need. From the files alone."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from cdpserver.config import Config, load_config
from cdpserver.names import format_bytes
from cdpserver.retention import capacity, usage
from cdpserver.retention.growth import HOUR_NS
from cdpserver.state import StateDir, default_state_dir
from recovery.output import Column, answer, answer_json, answer_table, say, show_time

SECOND_NS = 1_000_000_000
UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))

THEN = {"shorten": "history is shortened", "refuse": "writes are refused", "full": "there is no room left"}

COLUMNS = (
    Column("disk"),
    *(Column(name, name.replace("_", " "), right=True) for name in ("bytes", *usage.KINDS)),
    Column("per_hour", "per hour", right=True),
    Column("held", right=True),
)

GAPS = (
    Column("base points", right=True),
    Column("apart", right=True),
    Column("each", right=True),
    Column("from"),
)


def _config(options: Namespace) -> Config:
    return load_config(Path(options.config)) if options.config is not None else Config()


def _about(span_ns: float) -> str:
    """A span for people: its largest two units."""
    left = int(span_ns // SECOND_NS)
    parts: list[str] = []
    for unit, seconds in UNITS:
        if left >= seconds and len(parts) < 2:
            parts.append(f"{left // seconds}{unit}")
            left %= seconds
    return "".join(parts) or "0s"


# --- usage


def show_usage(options: Namespace) -> None:
    """What is used, how it grows, when a cap is reached."""
    state = StateDir.open(default_state_dir(options.state_dir))
    found = usage.survey(state, _config(options), disk=options.disk)
    value = capacity.usage_value(found)
    if options.json:
        answer_json(value)
        return
    rows = [
        {"disk": disk["disk"]}
        | {name: format_bytes(disk[name]) for name in ("bytes", *usage.KINDS)}
        | {
            "per_hour": "-" if disk["per_hour"] is None else format_bytes(disk["per_hour"]),
            "held": _about(disk["held_ns"]),
        }
        for disk in value["disks"]
    ]
    answer_table(COLUMNS, rows, nothing="no disk is protected")
    if found.images_bytes:
        answer(f"images that disks share: {format_bytes(found.images_bytes)}")
    for cap in found.caps:
        answer(_cap_line(cap, found.now_ns))
    for disk in found.disks:
        if disk.problem is not None:
            say(f"warning: {disk.disk}: {disk.problem}")


def _cap_line(cap: usage.Cap, now_ns: int) -> str:
    used = f"{cap.of}: {format_bytes(cap.bytes)} of {format_bytes(cap.cap_bytes)}"
    if cap.hours is None:
        return f"{used}; not reached at this growth"
    if not cap.hours:
        return f"{used}; reached: {THEN[cap.then]}"
    return f"{used}; {THEN[cap.then]} in {_about(cap.hours * HOUR_NS)} at the soonest"


# --- forecast


def show_forecast(options: Namespace) -> None:
    """What another policy would need."""
    state = StateDir.open(default_state_dir(options.state_dir))
    asked = {"keep_rp": options.keep, "keep_bp": options.keep_bp, "bp_every": options.bp_every}
    value = capacity.forecast(state, _config(options), options.disk, asked)
    if options.json:
        answer_json(value)
    else:
        _answer_forecast(value)


def _answer_forecast(value: dict[str, Any]) -> None:
    instants, points = value["rp"], value["bp"]
    answer(
        f"every instant of {_about(instants['every_instant_ns'])}: {format_bytes(instants['bytes'])}"
        f" ({format_bytes(instants['measured'])} in the journal now, {format_bytes(instants['extrapolated'])} extrapolated)"
    )
    before = _about(instants["every_instant_ns"])
    for step in instants["thinned"]:
        every, until = _about(step["every_ns"]), _about(step["span_ns"])
        answer(f"then one each {every} until {until}, after {before}: about {format_bytes(step['bytes'])}")
        before = until
    answer(f"base points ({value['bp_every']}; {value['keep_bp']}): about {format_bytes(points['bytes'])}")
    rows = [
        {
            "base points": str(gap["count"]),
            "apart": _about(gap["gap_ns"]),
            "each": format_bytes(gap["bytes_each"]),
            "from": "measured" if gap["gap_ns"] <= points["measured_ns"] else "extrapolated",
        }
        for gap in points["gaps"]
    ]
    rows.append(
        {"base points": "1", "apart": "oldest", "each": format_bytes(points["oldest_bytes"]), "from": ""}
    )
    answer_table(GAPS, rows, nothing="none")
    answer(f"the first copy: {format_bytes(value['base'])}")
    answer(f"together: {format_bytes(value['bytes'])}; now: {format_bytes(value['bytes_now'])}")
    if value["fits"] is False:
        answer(
            f"more than size_cap, {format_bytes(value['size_cap'])}: history would be shortened or writes refused"
        )
    read = sum(found["records"] for found in value["samples"])
    start = value["time_ns"] - value["held_ns"]
    answer(
        f"sampled: {read:,} records in {sum(found['places'] for found in value['samples'])} places"
        f" of the history since {show_time(start)}"
    )
