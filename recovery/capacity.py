"""`cdp usage` and `cdp forecast`: what history takes, and what another policy would need. From the files alone."""

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cdpserver.catalog import Catalog
from cdpserver.chain.holds import now_ns as clock_ns
from cdpserver.config import Config, load_config
from cdpserver.errors import RefusedError, RemovedError
from cdpserver.journal.log import Journal
from cdpserver.names import format_bytes, format_duration
from cdpserver.retention import distinct, forecast, usage
from cdpserver.retention.growth import HOUR_NS, LEAST_NS, unbroken
from cdpserver.retention.policy import BY_NAME, Policy, contradiction
from cdpserver.retention.slots import format_slots
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


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


# --- usage


def show_usage(options: Namespace) -> None:
    """What is used, how it grows, when a cap is reached."""
    state = StateDir.open(default_state_dir(options.state_dir))
    found = usage.survey(state, _config(options), disk=options.disk)
    value = usage_value(found)
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


def usage_value(found: usage.Store) -> dict[str, Any]:
    """As --help describes it."""
    return {
        "time_ns": found.now_ns,
        "disks": [
            {
                "disk": disk.disk,
                "id": disk.id,
                "state": disk.state,
                "bytes": disk.bytes,
                **disk.kinds,
                "per_hour": _rounded(_per_hour(disk)),
                "journal_per_hour": _rounded(disk.journal_per_hour),
                "base_points_per_hour": _rounded(disk.base_points_per_hour),
                "held_ns": disk.held_ns,
                "error": str(disk.problem) if disk.problem is not None else None,
            }
            for disk in found.disks
        ],
        "images": found.images_bytes,
        "free": found.free_bytes,
        "caps": [
            {
                "of": cap.of,
                "bytes": cap.bytes,
                "cap_bytes": cap.cap_bytes,
                "then": cap.then,
                "in_ns": None if cap.hours is None else round(cap.hours * HOUR_NS),
            }
            for cap in found.caps
        ],
    }


def _per_hour(disk: usage.Usage) -> float | None:
    if disk.journal_per_hour is None:
        return None
    return disk.journal_per_hour + (disk.base_points_per_hour or 0.0)


# --- forecast


def show_forecast(options: Namespace) -> None:
    """What another policy would need."""
    state = StateDir.open(default_state_dir(options.state_dir))
    with Catalog.open(state, writable=False) as catalog:
        entry = usage.entry_of(catalog, options.disk)
        if entry.state != "live":
            raise RemovedError(f"{options.disk} is being removed", hint="cdp disk list shows when it is gone")
        read = usage.policy_reader(catalog, _config(options))
        disk = usage.measure(state, entry, read, now_ns=clock_ns(state))
    usage.check_readable(disk)
    assert disk.policy is not None
    policy = _asked(disk.policy, options)
    if problem := contradiction(policy):
        raise problem
    if disk.held_ns < LEAST_NS:
        raise RefusedError(
            f"{disk.disk} has {_about(disk.held_ns)} of history, which says nothing of an hour",
            hint=f"ask again when there is {format_duration(LEAST_NS)} of it",
        )
    value = forecast_value(state.timeline(entry.id), disk, policy)
    if options.json:
        answer_json(value)
    else:
        _answer_forecast(value)


def _asked(policy: Policy, options: Namespace) -> Policy:
    """The disk's policy with what was asked for in its place."""
    given = {"keep_rp": ("--keep", options.keep), "keep_bp": ("--keep-bp", options.keep_bp)}
    given["bp_every"] = ("--bp-every", options.bp_every)
    for name, (flag, text) in given.items():
        if text is not None:
            field = BY_NAME[name]
            policy = replace(policy, **{field.attribute: field.kind.read_option(flag, text)})
    return policy


def forecast_value(directory: Path, disk: usage.Usage, policy: Policy) -> dict[str, Any]:
    """As --help describes it."""
    first_ns = unbroken(disk.spans)[0].first_ns
    now_ns = first_ns + disk.held_ns
    journal = Journal(directory)
    try:
        samples = distinct.sample(journal, start_ns=first_ns, now_ns=now_ns, wanted=forecast.gaps(policy))
    except FileNotFoundError:
        raise RefusedError(f"history of {disk.disk} was dropped meanwhile", hint="try again") from None
    finally:
        journal.close()
    curve = distinct.Curve(samples, disk.size)
    instants = forecast.every_instant(disk.spans, now_ns, policy.keep_rp_ns)
    points = forecast.base_points(policy, curve, disk.held_ns)
    base = disk.kinds["base"]
    total = base + instants.bytes + points.bytes
    cap = policy.size_cap
    return {
        "disk": disk.disk,
        "time_ns": now_ns,
        "keep": format_duration(policy.keep_rp_ns),
        "keep_bp": format_slots(policy.keep_bp),
        "bp_every": format_duration(policy.bp_every_ns),
        "held_ns": disk.held_ns,
        "rp": {
            "bytes": instants.bytes,
            "measured": instants.measured,
            "extrapolated": instants.extrapolated,
            "per_hour": round(instants.per_hour),
        },
        "bp": {
            "bytes": points.bytes,
            "count": points.count,
            "oldest_bytes": points.oldest_bytes,
            "measured_ns": curve.measured_ns,
            "gaps": [asdict(gap) for gap in points.gaps],
        },
        "base": base,
        "bytes": total,
        "bytes_now": disk.capped_bytes,
        "size_cap": cap,
        "fits": None if cap is None else total <= cap,
        "samples": [found.as_dict() for found in samples],
    }


def _answer_forecast(value: dict[str, Any]) -> None:
    instants, points = value["rp"], value["bp"]
    answer(
        f"every instant of {value['keep']}: {format_bytes(instants['bytes'])}"
        f" ({format_bytes(instants['measured'])} in the journal now, {format_bytes(instants['extrapolated'])} extrapolated)"
    )
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
