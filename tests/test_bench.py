"""The benchmark: a tiny run of everything, and its arithmetic. No figure is asserted for its speed."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tools import bench
from tools.kit.processes import why_no_mount
from tools.measure.context import GIB, MIB, SMOKE
from tools.measure.result import Goal, Measure, number, show

ROOT = Path(__file__).resolve().parent.parent

PEERS = [name for name in ("borg", "restic") if shutil.which(name)]
CHUNKS = ("chunk-full", "chunk-incremental", "chunk-index", "chunk-speed", "chunk-time")

MEASURES = {
    "write-4k": 4,
    "write-4k-p50": 4,
    "write-4k-p99": 4,
    "write-1m": 4,
    "first-copy": 2,
    **dict.fromkeys((f"mirror-{depth}{key}" for depth in (1, 16) for key in ("", "-p50", "-p99")), 3),
    **dict.fromkeys(("steady-p999", "steady-p99", "steady-p50"), 2),
    "read-4k-16": 3,
    "read-4k-1": 3,
    **{f"chain-{length}-open": 1 for length in SMOKE.chains},
    **{
        f"chain-{length}{key}": 3 for length in SMOKE.chains for key in ("", "-1m", "-dropped", "-dropped-1m")
    },
    **dict.fromkeys(("chain-flat", "chain-flat-dropped"), len(SMOKE.chains)),
    "open": len(SMOKE.records),
    "open-nbd": len(SMOKE.records),
    "open-read": len(SMOKE.records),
    "base-point": 3,
    **dict.fromkeys(("length-write", "length-seal", "rebuild", "restart"), len(SMOKE.lengths)),
    "space": 2,
    "space-index": 2,
    **dict.fromkeys(
        ("memory-rest", "memory-busy", "memory-export", "memory-qemu-nbd"), len(SMOKE.memory_disks)
    ),
    "scale-2": (os.cpu_count() or 1) + 1,
    "work-cut": len(SMOKE.cut_blocks),
    "work-cut-cpu": len(SMOKE.cut_blocks),
    "work-prune": len(SMOKE.prune_intervals),
    "work-prune-cpu": len(SMOKE.prune_intervals),
    **dict.fromkeys(("rto-export", "rto-process", "rto-read", "rto-rto"), 4),
    "zero": 2,
    "zero-index": 2,
    "zero-journal": 2,
    "remirror": 2,
    "remirror-journal": 1,
    "remirror-delta": 1,
    "remirror-speed": 1,
    "disks-writes": 2,
    "disks-lag": 2,
    "disks-lag-full": 2,
    "disks-index-lag": 2,
    "disks-memory": 2,
    "disks-memory-all": 2,
    "disks-files": 2,
    "disks-cpu": 2,
    "idle-start-cold": 1,
    "idle-start": 1,
    "idle-cpu": 1,
    "idle-memory": 1,
    "idle-files": 1,
    "forward-1": 2,
    "forward-16": 2,
    "takeover": 1,
    "files-ls": 3 if why_no_mount() else 4,
    "files-walk": 1 if why_no_mount() else 2,
    "files-read": 2 if why_no_mount() else 3,
    "migrate": 3,
    "migrate-read": 2,
    **{
        f"backup-{what}": 1 + len(PEERS)
        for what in ("full", "incremental", "restore", "stored", "stored-both", "memory")
    },
    **({} if why_no_mount() else dict.fromkeys(CHUNKS, len(SMOKE.chunk_sizes))),
}
"""How many subjects each measure has."""


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    """What one smoke run says; it leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        done = subprocess.run(
            [sys.executable, "-m", "tools.bench", "--smoke", "--json", "--directory", directory],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        assert list(Path(directory).iterdir()) == []
    return dict(json.loads(done.stdout))


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_smoke_run_measures_everything(smoke: dict[str, Any]) -> None:
    found = smoke["measures"]
    assert {name: len(measure["medians"]) for name, measure in found.items()} == MEASURES
    for name, measure in found.items():
        for subject, samples in measure["rounds"].items():
            assert samples and all(sample > 0 for sample in samples), (name, subject, samples)
            assert min(samples) <= measure["medians"][subject] <= max(samples)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_smoke_run_says_what_it_ran_on(smoke: dict[str, Any]) -> None:
    machine = smoke["machine"]
    for key in ("date", "cpus", "kernel", "file_system", "python", "qemu", "nbdkit", "fio"):
        assert machine[key], key
    assert smoke["options"]["sizes"]["records"] == list(SMOKE.records)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_what_costs_no_time_but_space_is_as_the_format_says(smoke: dict[str, Any]) -> None:
    found = smoke["measures"]
    records = SMOKE.zero_disk // GIB
    # A record of 64 bytes for each request; control and durable records come on top.
    assert 64 * records <= found["zero-journal"]["medians"]["in 1 GiB requests"] < 64 * records + 16_384
    assert found["zero-index"]["medians"]["in 1 GiB requests"] < MIB
    # Nothing of the disk's content is journalled a second time.
    (journal,) = found["remirror-journal"]["medians"].values()
    assert journal < SMOKE.remirror // 100


# --- the arithmetic


def measured(**samples: list[float]) -> Measure:
    return Measure("m", "a measure", "IOPS", "higher", (Goal("ours", "theirs", 1.5, "1.5x"),), samples)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine was three times slower in the second round, for both.
    measure = measured(ours=[300.0, 100.0, 320.0], theirs=[150.0, 50.0, 200.0])
    assert measure.median("ours") == 300.0
    assert measure.ratio("ours", "theirs") == 2.0
    assert measure.reached(measure.goals[0]) == (2.0, True)


def test_a_goal_is_a_least_or_a_most() -> None:
    measure = measured(ours=[100.0], theirs=[100.0])
    assert measure.reached(measure.goals[0]) == (1.0, False)
    seconds = Measure(
        "s", "seconds", "s", "lower", (Goal("ours", "", 0.3, "under 0.3 s"),), {"ours": [0.1, 0.2, 0.9]}
    )
    assert seconds.reached(seconds.goals[0]) == (0.2, True)


def test_figures_for_programs_hold_every_sample() -> None:
    measure = measured(ours=[300.0, 100.0], theirs=[150.0, 50.0])
    measure.notes["median latency, us"] = {"ours": 12}
    found = json.loads(json.dumps(measure.as_dict()))
    assert found["rounds"] == {"ours": [300.0, 100.0], "theirs": [150.0, 50.0]}
    assert found["medians"] == {"ours": 200.0, "theirs": 100.0}
    assert found["ratios"] == {"ours / theirs": 2.0}
    assert found["goals"] == [{"text": "1.5x", "goal": 1.5, "value": 2.0, "reached": True}]
    assert found["notes"] == {"median latency, us": {"ours": 12}}


def test_the_table_shows_each_subject_with_its_goal() -> None:
    measure = measured(ours=[43_586.0], theirs=[22_792.0])
    measure.notes["median latency, us"] = {"ours": 330, "theirs": 594}
    console = Console(width=130, record=True, file=io.StringIO())
    show([measure], console)
    text = console.export_text()
    assert "43,586 IOPS" in text
    assert "1.5x: 1.9" in text
    assert "ours 330, theirs 594" in text


@pytest.mark.parametrize(
    ("value", "text"), [(43_585.9, "43,586"), (0.08654, "0.0865"), (2.5, "2.5"), (0.0, "0")]
)
def test_numbers_are_without_noise(value: float, text: str) -> None:
    assert number(value) == text


def test_options_of_the_command_line() -> None:
    assert bench.options([]).rounds == 5
    assert bench.options(["--smoke"]).rounds == 1
    assert bench.options(["--smoke", "--rounds", "3", "--only", "open"]).only == ["open"]
    with pytest.raises(SystemExit):
        bench.options(["--only", "nothing"])
    with pytest.raises(SystemExit):
        bench.options(["--rounds", "-1"])
