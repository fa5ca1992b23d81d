"""The metrics: what is served is what docs/metrics.md says, means what it says, and comes in time.

The document's table is made from what is served: `CDP_UPDATE_GOLDEN=1 python -m pytest tests/test_metrics.py -k document`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from cdpserver.service import metrics
from cdpserver.target.counts import NAMES, Counts, total
from tests.core import ROOT, World, scratch
from tests.test_service import Server, connected, pattern, until
from tests.test_status import DISK, FOUND
from tools.kit.processes import within

DOCUMENT = ROOT / "docs" / "metrics.md"
BLOCK = 4096
DISKS = 100

COUNTS = {name: number for number, name in enumerate(NAMES, start=1)}
EVERYTHING = FOUND | {
    "look_s": 0.25,
    "events": [{"process": "target", "level": "error", "count": 3}],
    "drills": [
        {"what": "web", "state": "passed", "rto_ms": 4200, "ended_ns": 8 * 10**9, "reason": ""},
        {"what": "db", "state": "failed", "rto_ms": None, "ended_ns": 9 * 10**9, "reason": "no marker"},
    ],
    "backups": [
        {
            "what": "web",
            "state": "done",
            "ended_ns": 7 * 10**9,
            "waits": "",
            "stored_bytes": 4096,
            "seconds": 0.5,
            "reason": "",
        },
        {
            "what": "db",
            "state": "failed",
            "ended_ns": 6 * 10**9,
            "waits": "for web, which /repo has been at for long",
            "stored_bytes": 0,
            "seconds": 0,
            "reason": "full",
        },
    ],
    "disks": [DISK | {"counts": COUNTS}, DISK | {"name": 'a"\\\n', "counts": None, "clients": None}],
}
"""A look in which every metric has a value."""


def families(text: str) -> dict[str, Metric]:
    found = list(text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def served(found: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """Every sample: (name, label values in order of the labels' names) to value."""
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in families(metrics.text(found).decode()).values()
        for sample in family.samples
    }


def table() -> list[str]:
    """The lines of the document's table, as they should be."""
    lines = []
    for family in families(metrics.text(EVERYTHING).decode()).values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in sorted(family.samples[0].labels))
        lines.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return lines


def test_the_document_lists_what_is_served() -> None:
    """What is wrong is shown as the lines that the document should have."""
    text = DOCUMENT.read_text()
    if os.environ.get("CDP_UPDATE_GOLDEN") == "1":
        head = "| --- | --- | --- | --- |\n"
        before, _, after = text.partition(head)
        text = before + head + "".join(f"{line}\n" for line in table()) + "\n" + after.partition("\n\n")[2]
        DOCUMENT.write_text(text)
    assert [
        line for line in text.splitlines() if line.startswith("| `cdp_") and line.count("|") == 5
    ] == table()


def test_names_say_their_units() -> None:
    for family in families(metrics.text(EVERYTHING).decode()).values():
        assert re.fullmatch(r"cdp_[a-z_]+", family.name) and family.documentation.endswith((".", "trim."))
        if re.search(r"\b(age|how long|when|instant)\b", family.documentation, re.IGNORECASE):
            assert "seconds" in family.name
        if re.match(r"(size|bytes)\b", family.documentation, re.IGNORECASE):
            assert family.name.endswith("_bytes")


def test_values() -> None:
    found = served(EVERYTHING)
    name = DISK["name"]
    assert found["cdp_disk_durable_lag_seconds", name] == 0.34
    assert found["cdp_disk_index_lag_seconds", name] == 2.1
    assert found["cdp_disk_tail_records", name] == 12_345
    assert found["cdp_disk_state", name, "synced"] == 1 and found["cdp_disk_state", name, "fork"] == 0
    assert found["cdp_store_used_ratio",] == 0.25
    assert found["cdp_process_restarts_total", "export"] == 2
    assert found["cdp_events_total", "error", "target"] == 3
    assert found["cdp_disk_written_bytes_total", name, "trim"] == COUNTS["trim_bytes"]
    assert found["cdp_disk_write_seconds_sum", name] == COUNTS["timed_ns"] / 1e9
    # What is not known is not served; a name is a name, whatever is in it.
    strange = EVERYTHING["disks"][1]["name"]
    assert ("cdp_disk_size_bytes", strange) in found and ("cdp_disk_clients", strange) not in found
    assert ("cdp_disk_writes_total", strange, "data") not in found


def test_a_service_in_trouble_is_served_too() -> None:
    found = served(
        EVERYTHING
        | {
            "disks": [
                DISK | {"broken": "EIO", "size": None, "last_base_point": {"number": 1, "time_ns": None}}
            ],
            "targets": {"target": False},
            "children": {"target": {"pid": None, "starts": 0}},
            "store": {"size_bytes": 0, "free_bytes": 0},
        }
    )
    assert found["cdp_disk_broken", DISK["name"]] == 1 and found["cdp_target_up", "target"] == 0
    assert found["cdp_process_up", "target"] == 0 and found["cdp_process_restarts_total", "target"] == 0
    assert found["cdp_store_used_ratio",] == 0


# --- counting


def test_what_is_counted() -> None:
    with scratch() as path:
        world = World(path)
        disk = world.add(1 << 20)
        for number in range(40):
            disk.write(number * BLOCK, b"x" * BLOCK)
        disk.zero(0, 2 * BLOCK)
        disk.zero(0, 3 * BLOCK, trim=True)
        disk.connection().read_into(memoryview(bytearray(BLOCK)), 0)
        disk.connection().flush()
        seen = disk.disk.status()["counts"]
        assert seen.pop("timed_ns") > 0
        assert seen == {
            "writes": 40,
            "data_bytes": 40 * BLOCK,
            "zeros": 1,
            "zero_bytes": 2 * BLOCK,
            "trims": 1,
            "trim_bytes": 3 * BLOCK,
            "reads": 1,
            "read_bytes": BLOCK,
            "flushes": 1,
            "timed": 3,
        }
        # A connection that ends leaves its counts, once; another one adds to them.
        connection = disk.connection()
        disk.disconnect()
        connection.close()
        disk.write(0, b"y" * BLOCK, number=1)
        assert disk.disk.status()["counts"]["writes"] == 41
        world.close()


def test_counts_add_up() -> None:
    one, other = Counts(writes=1, flushes=2), Counts(writes=10, timed_ns=7)
    assert total([one, other]) == dict.fromkeys(NAMES, 0) | {"writes": 11, "flushes": 2, "timed_ns": 7}
    assert total([]) == dict.fromkeys(NAMES, 0)


# --- against a service


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="cdp-") as path, Server(Path(path) / "s") as made:
        uri = made.add("web")
        with connected(uri) as client:
            client.pwrite(pattern(1), 0)
        made.synced("web", write_blocking=True)
        for number in range(DISKS - 1):
            made.add(f"d{number}")
        yield made


def scrape(server: Server, *arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "recovery.cli",
        "--state-dir",
        str(server.state_dir),
        "metrics",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True, timeout=60).stdout


@pytest.mark.real
def test_a_scrape_of_many_disks(server: Server) -> None:
    with within(5, "the scrape"):
        found = families(scrape(server))
    assert len(found["cdp_disk_lag_seconds"].samples) == DISKS
    assert found["cdp_disk_writes"].samples[0].value >= 1
    assert found["cdp_look_seconds"].samples[0].value < 3
    assert {sample.value for sample in found["cdp_process_up"].samples} == {1.0}


@pytest.mark.real
def test_samples_as_json(server: Server) -> None:
    samples = json.loads(scrape(server, "--json"))
    assert {"name": "cdp_process_restarts_total", "labels": {"process": "export"}, "value": 0.0} in samples


@pytest.mark.real
def test_a_target_that_hangs_and_one_that_dies(server: Server) -> None:
    pid = server.pids()["target-0"]
    os.kill(pid, signal.SIGSTOP)
    try:
        found = families(scrape(server))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert found["cdp_target_up"].samples[0].value == 0
    assert found["cdp_store_size_bytes"].samples[0].value > 0
    assert len(found["cdp_disk_tail_records"].samples) == DISKS
    told = {sample.labels["disk"] for sample in found["cdp_disk_durable_lag_seconds"].samples}
    assert "web" not in told
    os.kill(pid, signal.SIGKILL)

    def is_counted() -> bool:
        now = families(scrape(server))
        restarts = {s.labels["process"]: s.value for s in now["cdp_process_restarts"].samples}
        errors = {
            s.labels["process"]: s.value for s in now["cdp_events"].samples if s.labels["level"] == "error"
        }
        return (
            restarts["target-0"] == 1
            and errors["cdpserver"] >= 1
            and now["cdp_target_up"].samples[0].value == 1
        )

    until(is_counted, "restart in the metrics")
