"""Usage and forecasts as plain values, for `cdp` and for the API. From the files alone; as a process: one of both, as JSON."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cdpserver import messages
from cdpserver.catalog import Catalog
from cdpserver.chain.holds import now_ns as clock_ns
from cdpserver.config import Config, parse_config
from cdpserver.errors import RefusedError, RemovedError
from cdpserver.journal.log import Journal
from cdpserver.names import format_duration
from cdpserver.retention import distinct, usage
from cdpserver.retention import forecast as forecasts
from cdpserver.retention.growth import HOUR_NS, LEAST_NS, unbroken
from cdpserver.retention.policy import BY_NAME, Policy, contradiction
from cdpserver.retention.slots import format_slots
from cdpserver.retention.steps import format_steps
from cdpserver.state import StateDir

FLAGS = {"keep_rp": "--keep", "keep_bp": "--keep-bp", "bp_every": "--bp-every"}
"""What may be asked for in the place of a disk's own policy, and the option that says it."""


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


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


def forecast(state: StateDir, config: Config, name: str, asked: Mapping[str, str | None]) -> dict[str, Any]:
    """What a disk's policy, with what was asked for in its place, would need.

    UsageError, NotFoundError, RefusedError, CorruptError.
    """
    with Catalog.open(state, writable=False) as catalog:
        entry = usage.entry_of(catalog, name)
        if entry.state != "live":
            raise RemovedError(f"{name} is being removed", hint="cdp disk list shows when it is gone")
        read = usage.policy_reader(catalog, config)
        disk = usage.measure(state, entry, read, now_ns=clock_ns(state))
    usage.check_readable(disk)
    assert disk.policy is not None
    policy = _with(disk.policy, asked)
    if problem := contradiction(policy):
        raise problem
    if disk.held_ns < LEAST_NS:
        raise RefusedError(
            f"{disk.disk} has less than {format_duration(LEAST_NS)} of history, which says nothing of an hour",
            hint=f"ask again when there is {format_duration(LEAST_NS)} of it",
        )
    return _forecast_value(state.timeline(entry.id), disk, policy)


def _with(policy: Policy, asked: Mapping[str, str | None]) -> Policy:
    """The disk's policy with what was asked for in its place."""
    for name, text in asked.items():
        if text is not None:
            field = BY_NAME[name]
            policy = replace(policy, **{field.attribute: field.kind.read_option(FLAGS[name], text)})
    return policy


def _forecast_value(directory: Path, disk: usage.Usage, policy: Policy) -> dict[str, Any]:
    """As --help describes it."""
    first_ns = unbroken(disk.spans)[0].first_ns
    now_ns = first_ns + disk.held_ns
    journal = Journal(directory)
    try:
        windows = forecasts.windows(policy)
        samples = journal.settled(
            lambda: distinct.sample(journal, start_ns=first_ns, now_ns=now_ns, wanted=windows)
        )
    except FileNotFoundError:
        raise RefusedError(f"history of {disk.disk} was dropped meanwhile", hint="try again") from None
    finally:
        journal.close()
    curve = distinct.Curve(samples, disk.size)
    all_ns = forecasts.all_instants_ns(policy)
    instants = forecasts.every_instant(disk.spans, now_ns, all_ns)
    thinned = forecasts.thinned(policy, curve, instants.per_hour)
    points = forecasts.base_points(policy, curve, disk.held_ns)
    base = disk.kinds["base"]
    total = base + instants.bytes + sum(step.bytes for step in thinned) + points.bytes
    cap = policy.size_cap
    return {
        "disk": disk.disk,
        "time_ns": now_ns,
        "keep": format_steps(policy.keep_rp),
        "keep_bp": format_slots(policy.keep_bp),
        "bp_every": format_duration(policy.bp_every_ns),
        "held_ns": disk.held_ns,
        "rp": {
            "bytes": instants.bytes,
            "measured": instants.measured,
            "extrapolated": instants.extrapolated,
            "per_hour": round(instants.per_hour),
            "every_instant_ns": all_ns,
            "thinned": [asdict(step) for step in thinned],
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


def main() -> int:
    """`python -m cdpserver.retention.capacity`: usage, or with `--forecast` what a policy would need, as JSON."""
    parser = argparse.ArgumentParser(description="what history takes")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--config-text", default="", help="the configuration in effect, as TOML")
    parser.add_argument("--disk")
    parser.add_argument("--forecast", action="store_true")
    for name, flag in FLAGS.items():
        parser.add_argument(flag, dest=name)
    options = parser.parse_args()
    state, config = StateDir.open(options.state_dir), parse_config(options.config_text)

    def told() -> dict[str, Any]:
        if options.forecast:
            return forecast(state, config, options.disk, {name: getattr(options, name) for name in FLAGS})
        return usage_value(usage.survey(state, config, disk=options.disk))

    return messages.tell(told)


if __name__ == "__main__":
    sys.exit(main())
