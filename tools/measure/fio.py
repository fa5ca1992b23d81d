"""fio's nbd engine against a server, with a pause after the first writes that belongs to no figure.

    start, first writes | SIGSTOP ... SIGCONT | measured
                             the session is declared in sync

A session of ours begins with its connection's first write and is protected once *synced* is said for it; everything is
measured in that state. fio starts its figures anew when its ramp time is over, which it is when the pause ends. The
other servers know no sessions and get no pause: all of the same work is measured.
"""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.kit.processes import FailedError, start, until

RAMP_S = 0.8

START_S = 0.3
"""What does not count of a job that goes by time."""

LONGEST_S = 600.0
"""Longest run of fio: a bench is bounded by size, so a slow server takes its time, but not for ever."""


@dataclass(frozen=True, slots=True)
class Job:
    """One fio job. `io_bytes` of requests somewhere in the first `size` bytes of the disk; reads go on for `seconds`."""

    kind: str
    block: int
    depth: int
    size: int
    io_bytes: int = 0
    seconds: float = 0.0
    again: bool = False
    """May a block be written more than once?"""

    def arguments(self, uri: str, output: Path, *, ramp_s: float = 0.0) -> list[str]:
        """fio's command line; nothing counts before `ramp_s`. It prints other things on stdout, so its figures go to a file."""
        found = [
            *(
                "fio",
                "--name=bench",
                "--ioengine=nbd",
                f"--uri={uri}",
                f"--rw={self.kind}",
                f"--bs={self.block}",
            ),
            *(f"--iodepth={self.depth}", f"--size={self.size}", "--thread", "--eta=never"),
            *("--output-format=json", f"--output={output}"),
        ]
        if self.io_bytes:
            found.append(f"--io_size={self.io_bytes}")
        if self.seconds:
            found += ["--time_based", f"--runtime={self.seconds * 1000:.0f}ms", "--norandommap"]
        if self.again:
            found.append("--norandommap")
        if ramp_s:
            found.append(f"--ramp_time={ramp_s * 1000:.0f}ms")
        return found


@dataclass(frozen=True, slots=True)
class Figures:
    """What fio measured."""

    iops: float
    mb_s: float
    latency_us: float
    """Median completion latency."""
    p99_us: float
    """Its 99th percentile."""


def read(uri: str, job: Job, directory: Path) -> Figures:
    """A read job, for its time."""
    return _plainly(uri, job, directory, "read", ramp_s=START_S)


def write_for(uri: str, job: Job, directory: Path) -> Figures:
    """A write job, for its time, on a disk of which nothing is to be declared meanwhile."""
    return _plainly(uri, job, directory, "write", ramp_s=START_S)


def _plainly(uri: str, job: Job, directory: Path, direction: str, *, ramp_s: float) -> Figures:
    output = directory / "fio.json"
    process = start(job.arguments(uri, output, ramp_s=ramp_s), directory / "fio.log")
    try:
        return _figures(process.wait(LONGEST_S), output, direction)
    finally:
        process.kill()
        process.wait()


def write(
    uri: str, job: Job, directory: Path, *, wrote: Callable[[], bool], declare: Callable[[], object] | None
) -> Figures:
    """A write job with its pause: once `wrote` says that the first write has arrived, `declare` is called in it.

    Without `declare`, there is no pause.
    """
    if declare is None:
        return _plainly(uri, job, directory, "write", ramp_s=0.0)
    output = directory / "fio.json"
    process = start(job.arguments(uri, output, ramp_s=RAMP_S), directory / "fio.log")
    try:
        until(lambda: wrote() or process.poll() is not None, "first write of fio", every_s=0.001)
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        declare()
        # Its ramp time began before the first write.
        time.sleep(max(0.0, stopped + RAMP_S + 0.1 - time.monotonic()))
        process.send_signal(signal.SIGCONT)
        return _figures(process.wait(LONGEST_S), output, "write")
    finally:
        process.kill()
        process.wait()


def fill(
    uri: str, job: Job, directory: Path, *, wrote: Callable[[], bool], declare: Callable[[], object]
) -> None:
    """A write job of which nothing is measured, declared as `write` does it."""
    output = directory / "fio.json"
    process = start(job.arguments(uri, output), directory / "fio.log")
    try:
        until(lambda: wrote() or process.poll() is not None, "first write of fio", every_s=0.001)
        process.send_signal(signal.SIGSTOP)
        declare()
        process.send_signal(signal.SIGCONT)
        _answer(process.wait(LONGEST_S), output)
    finally:
        process.kill()
        process.wait()


def _answer(status: int, output: Path) -> dict[str, Any]:
    text = output.read_text(errors="replace") if output.exists() else ""
    if status or "{" not in text:
        said = output.with_suffix(".log").read_text(errors="replace")[-1000:]
        raise FailedError(f"fio ended with status {status}: {said}")
    found: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
    return found


def _figures(status: int, output: Path, direction: str) -> Figures:
    found = _answer(status, output)
    side = found[direction]
    percentiles = side["clat_ns"].get("percentile")
    if found["error"] or not side["total_ios"] or not percentiles:
        raise FailedError(f"fio measured nothing (error {found['error']})")
    p50_us, p99_us = (percentiles[key] / 1000 for key in ("50.000000", "99.000000"))
    return Figures(side["iops"], side["bw_bytes"] / 1e6, p50_us, p99_us)
