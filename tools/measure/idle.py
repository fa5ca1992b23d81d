"""What disks cost that nobody writes to: the start of a service that has many of them, and its rest."""

import os
import time
from pathlib import Path

from tools.kit.processes import run
from tools.kit.server import Server
from tools.measure.context import MIB, Context
from tools.measure.processes import Processes
from tools.measure.result import Goal, Measure
from tools.measure.seed import seeded

CALM = 0.05
"""Processors that are still busy with the start above this."""
CALM_S = 60.0
"""How long the start's work may go on before it counts as the rest."""


def idle(context: Context) -> list[Measure]:
    """Each number of disks: start with nothing of their files in memory, start again, and the rest after that."""
    counts = context.sizes.idle_disks
    most = f"{counts[-1]:,} idle disks"
    cold = Measure(
        "idle-start-cold",
        "start to ready, files not in memory",
        "s",
        "lower",
        (Goal(most, "", 10.0, "in seconds"),),
    )
    warm = Measure("idle-start", "start to ready", "s", "lower", (Goal(most, "", 5.0, "in seconds"),))
    cpu = Measure("idle-cpu", "processors at rest", "CPUs", "lower", (Goal(most, "", 0.03, "under 3 %"),))
    memory = Measure("idle-memory", "memory of all processes at rest", "MiB", "lower")
    files = Measure("idle-files", "open files of all processes at rest", "files", "lower")
    for count in counts:
        subject = f"{count:,} idle disks"
        with seeded(context, count) as directory:
            for _ in range(context.rounds):
                _forget(directory)
                cold.add(subject, _start(directory))
                warm.add(subject, _start(directory))
                with Server(directory) as server:
                    processes = Processes.of(server)
                    _calm(processes)
                    began, started = processes.taken(), time.monotonic()
                    time.sleep(context.sizes.idle_seconds)
                    ended, spent = processes.taken(), time.monotonic() - started
                cpu.add(subject, sum(ended[kind].cpu_s - began[kind].cpu_s for kind in ended) / spent)
                memory.add(subject, sum(taken.memory for taken in ended.values()) / MIB)
                files.add(subject, sum(taken.files for taken in ended.values()))
                for kind, taken in ended.items():
                    share = (taken.cpu_s - began[kind].cpu_s) / spent
                    cpu.notes.setdefault(f"of that {kind}", {})[subject] = round(share, 4)
        context.say(
            f"{subject}: ready in {warm.median(subject):.2f} s, {cpu.median(subject):.4f} CPUs at rest"
        )
    return [cold, warm, cpu, memory, files]


def _start(directory: Path) -> float:
    """Seconds from the start of the process until its API answers."""
    started = time.monotonic()
    with Server(directory):
        return time.monotonic() - started


def _forget(directory: Path) -> None:
    """Have the kernel drop what it holds of the files' content; it keeps their names."""
    run("sync", "--file-system", directory)
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def _calm(processes: Processes) -> None:
    """Wait until the work of the start is over."""
    deadline = time.monotonic() + CALM_S
    before = processes.taken()
    while time.monotonic() < deadline:
        time.sleep(1)
        now = processes.taken()
        if sum(now[kind].cpu_s - before[kind].cpu_s for kind in now) < CALM:
            return
        before = now
