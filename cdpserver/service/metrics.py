"""The overview as Prometheus metrics: what `GET /v1/metrics` and `cdp metrics` answer. docs/metrics.md lists them.

Made anew from one look for each scrape: nothing is kept, so a disk that is gone leaves nothing behind. Counters of a disk start
again when the target opens it anew, which is what Prometheus expects of counters.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

DISK_GAUGES: tuple[tuple[str, str, str, float], ...] = (
    ("size_bytes", "Size of the disk.", "size", 1),
    ("clients", "NBD clients that have the disk open for writing.", "clients", 1),
    (
        "lag_seconds",
        "Age of the newest instant whose content is complete; 0 while the mirror is in sync.",
        "lag_ns",
        1e9,
    ),
    (
        "durable_lag_seconds",
        "Age of the oldest acknowledged write that a power loss would take; 0 when there is none.",
        "durable_lag_ns",
        1e9,
    ),
    (
        "rpo_seconds",
        "What a loss of source and host would cost now: age of the newest write that is whole, in order and durable.",
        "rpo_ns",
        1e9,
    ),
    ("tail_records", "Records that the index lacks: the tail that views read.", "tail_records", 1),
    ("index_lag_seconds", "Age of the oldest record that the index lacks.", "index_lag_ns", 1e9),
)
"""Name, meaning, field of a disk in the overview, and what divides it."""

WRITES = (("data", "writes", "data_bytes"), ("zero", "zeros", "zero_bytes"), ("trim", "trims", "trim_bytes"))
"""Kind of a write, and the fields of its number and bytes in a disk's counts."""

STATES = ("empty", "first-copy", "unordered", "synced", "fork", "removing", "damaged")


def text(found: dict[str, Any]) -> bytes:
    """The metrics of one look, in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Seen(found))
    return generate_latest(registry)


class _Seen(Collector):
    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        yield from _service(self._found)
        yield from _store(self._found["store"])
        yield from _drills(self._found["drills"])
        yield from _backups(self._found["backups"])
        disks = self._found["disks"]
        yield from _disks(disks)
        yield from _base_points(disks)
        yield from _scrubs(disks)
        yield from _counts([disk for disk in disks if disk["counts"] is not None])


def _labelled(
    family: type[Metric], name: str, meaning: str, labels: tuple[str, ...], rows: list[tuple[Any, ...]]
) -> Metric:
    """A metric with a row of label values and a value for each of `rows`."""
    made: Any = family(name, meaning, labels=labels)  # type: ignore[call-arg]
    for *values, value in rows:
        made.add_metric([str(label) for label in values], value)
    metric: Metric = made
    return metric


def _service(found: dict[str, Any]) -> Iterator[Metric]:
    yield _labelled(
        GaugeMetricFamily,
        "cdp_build_info",
        "The version that runs; always 1.",
        ("version",),
        [(found["version"], 1)],
    )
    yield GaugeMetricFamily(
        "cdp_start_time_seconds", "When the service started, since 1970.", value=found["started_ns"] / 1e9
    )
    yield GaugeMetricFamily(
        "cdp_look_seconds", "How long it took to find out all this.", value=found["look_s"]
    )
    yield GaugeMetricFamily(
        "cdp_warnings", "Warnings that cdp status shows now.", value=len(found["warnings"])
    )
    yield _labelled(
        GaugeMetricFamily,
        "cdp_target_up",
        "1 if this target answered in time, else its disks lack figures.",
        ("target",),
        [(name, int(up)) for name, up in found["targets"].items()],
    )
    children = found["children"].items()
    yield _labelled(
        GaugeMetricFamily,
        "cdp_process_up",
        "1 if this process of the service runs.",
        ("process",),
        [(name, int(child["pid"] is not None)) for name, child in children],
    )
    yield _labelled(
        CounterMetricFamily,
        "cdp_process_restarts",
        "How often this process was started again since the service started.",
        ("process",),
        [(name, max(0, child["starts"] - 1)) for name, child in children],
    )
    yield _labelled(
        CounterMetricFamily,
        "cdp_events",
        "Events since the service started, of every process; errors are those of level error.",
        ("process", "level"),
        [(event["process"], event["level"], event["count"]) for event in found["events"]],
    )


def _store(store: dict[str, Any]) -> Iterator[Metric]:
    size, free = store["size_bytes"], store["free_bytes"]
    yield GaugeMetricFamily("cdp_store_size_bytes", "Size of the file system of the store.", value=size)
    yield GaugeMetricFamily("cdp_store_free_bytes", "What the service may still use of it.", value=free)
    yield GaugeMetricFamily(
        "cdp_store_used_ratio", "Share of it that is used, from 0 to 1.", value=1 - free / size if size else 0
    )


def _drills(drills: list[dict[str, Any]]) -> Iterator[Metric]:
    """Of the newest drill of each VM or disk."""
    for name, meaning, rows in (
        (
            "passed",
            "1 if the newest drill has passed, else 0.",
            [(one["what"], int(one["state"] == "passed")) for one in drills],
        ),
        (
            "rto_seconds",
            "How long the newest drill took until what it waited for had come; without one that failed.",
            [(one["what"], one["rto_ms"] / 1000) for one in drills if one["rto_ms"] is not None],
        ),
        (
            "end_time_seconds",
            "When it ended, since 1970.",
            [(one["what"], one["ended_ns"] / 1e9) for one in drills],
        ),
    ):
        yield _labelled(GaugeMetricFamily, f"cdp_drill_{name}", meaning, ("vm",), rows)


def _backups(backups: list[dict[str, Any]]) -> Iterator[Metric]:
    """Of the newest scheduled backup of each VM or disk."""
    for name, meaning, rows in (
        (
            "ok",
            "1 if the newest scheduled backup was made, and copied where that is asked for, else 0.",
            [(one["what"], int(not one["reason"])) for one in backups],
        ),
        (
            "end_time_seconds",
            "When it ended, or failed, since 1970.",
            [(one["what"], one["ended_ns"] / 1e9) for one in backups],
        ),
        (
            "waits",
            "1 if one that is due waits for long behind another one of its repository, else 0.",
            [(one["what"], int(bool(one["waits"]))) for one in backups],
        ),
        ("stored_bytes", "What the newest one added.", [(o["what"], o["stored_bytes"]) for o in backups]),
        ("seconds", "How long the newest one took.", [(o["what"], o["seconds"]) for o in backups]),
    ):
        yield _labelled(GaugeMetricFamily, f"cdp_backup_{name}", meaning, ("vm",), rows)


def _disks(disks: list[dict[str, Any]]) -> Iterator[Metric]:
    yield _labelled(
        GaugeMetricFamily,
        "cdp_disk_state",
        "1 for the state that the disk is in: " + ", ".join(STATES) + ".",
        ("disk", "state"),
        [(disk["name"], state, int(disk["state"] == state)) for disk in disks for state in STATES],
    )
    yield _labelled(
        GaugeMetricFamily,
        "cdp_disk_broken",
        "1 if the disk takes no writes, because an I/O operation failed.",
        ("disk",),
        [(disk["name"], int(bool(disk["broken"]))) for disk in disks],
    )
    for name, meaning, field, divisor in DISK_GAUGES:
        # What is not known is left out.
        rows = [(disk["name"], disk[field] / divisor) for disk in disks if disk[field] is not None]
        yield _labelled(GaugeMetricFamily, f"cdp_disk_{name}", meaning, ("disk",), rows)


def _base_points(disks: list[dict[str, Any]]) -> Iterator[Metric]:
    held = [(disk["name"], disk["last_base_point"]) for disk in disks if disk["last_base_point"] is not None]
    yield _labelled(
        GaugeMetricFamily,
        "cdp_disk_base_point_number",
        "Number of the newest published base point.",
        ("disk",),
        [(name, point["number"]) for name, point in held],
    )
    yield _labelled(
        GaugeMetricFamily,
        "cdp_disk_base_point_time_seconds",
        "The instant of the newest published base point, since 1970.",
        ("disk",),
        [(name, point["time_ns"] / 1e9) for name, point in held if point["time_ns"] is not None],
    )


def _scrubs(disks: list[dict[str, Any]]) -> Iterator[Metric]:
    held = [(disk["name"], disk["scrub"]) for disk in disks if disk["scrub"] is not None]
    yield _labelled(
        GaugeMetricFamily,
        "cdp_disk_scrub_time_seconds",
        "When the newest whole round of the scrub ended, since 1970.",
        ("disk",),
        [(name, scrub["ended_ns"] / 1e9) for name, scrub in held if scrub["ended_ns"] is not None],
    )
    yield _labelled(
        GaugeMetricFamily,
        "cdp_disk_damaged_places",
        "Places that the scrub found damaged.",
        ("disk",),
        [(name, scrub["damaged"]) for name, scrub in held],
    )


def _counts(disks: list[dict[str, Any]]) -> Iterator[Metric]:
    counted = [(disk["name"], disk["counts"]) for disk in disks]
    by_kind = [(name, counts, kind) for name, counts in counted for kind in WRITES]
    yield _labelled(
        CounterMetricFamily,
        "cdp_disk_writes",
        "Write requests, by kind: data, zero, trim.",
        ("disk", "kind"),
        [(name, kind, counts[number]) for name, counts, (kind, number, _) in by_kind],
    )
    yield _labelled(
        CounterMetricFamily,
        "cdp_disk_written_bytes",
        "Bytes of the disk that they wrote, by kind; zeroes and trims take no room in the store.",
        ("disk", "kind"),
        [(name, kind, counts[size]) for name, counts, (kind, _, size) in by_kind],
    )
    for metric, meaning, field in (
        ("cdp_disk_reads", "Read requests to the target (points are read from the export).", "reads"),
        ("cdp_disk_read_bytes", "Bytes that they read.", "read_bytes"),
        ("cdp_disk_flushes", "Flush requests.", "flushes"),
    ):
        rows = [(name, counts[field]) for name, counts in counted]
        yield _labelled(CounterMetricFamily, metric, meaning, ("disk",), rows)
    latency = SummaryMetricFamily(
        "cdp_disk_write_seconds",
        "How long writes of data took in the target: of every 16th write of a client.",
        labels=("disk",),
    )
    for name, counts in counted:
        latency.add_metric([name], count_value=counts["timed"], sum_value=counts["timed_ns"] / 1e9)
    yield latency
