"""What the service's processes take from the machine, as the kernel counts it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tools.kit.server import Server


@dataclass(frozen=True, slots=True)
class Taken:
    """One process at one moment."""

    cpu_s: float
    memory: int
    """Bytes, with its share of what it has in common with others (PSS)."""
    files: int


@dataclass(frozen=True, slots=True)
class Processes:
    """The service with its children: name to pid. Workers count as one kind."""

    pids: dict[str, int]

    @classmethod
    def of(cls, server: Server) -> "Processes":
        """Those that run now."""
        children = server.client.status()["children"]
        return cls(
            {"cdpserver": server.process.pid, **{name: each["pid"] for name, each in children.items()}}
        )

    def taken(self) -> dict[str, Taken]:
        """By kind: cdpserver, target, export, indexer."""
        found: dict[str, Taken] = {}
        for name, pid in self.pids.items():
            kind = name.partition("-")[0]
            before, now = found.get(kind, Taken(0.0, 0, 0)), _taken(pid)
            found[kind] = Taken(
                before.cpu_s + now.cpu_s, before.memory + now.memory, before.files + now.files
            )
        return found

    def spent(self) -> float:
        """Processor seconds of all of them so far, and of the jobs of the service that have ended."""
        # utime and stime of waited-for children, in ticks; the name before them may hold anything.
        stat = Path(f"/proc/{self.pids['cdpserver']}/stat").read_text().rpartition(")")[2].split()
        ended = (int(stat[13]) + int(stat[14])) / os.sysconf("SC_CLK_TCK")
        return ended + sum(time.clock_gettime(_cpu_clock(pid)) for pid in self.pids.values())


def memory(pid: int) -> int:
    """Bytes of a process, with its share of what it has in common with others (PSS)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) << 10


def _taken(pid: int) -> Taken:
    return Taken(time.clock_gettime(_cpu_clock(pid)), memory(pid), len(os.listdir(f"/proc/{pid}/fd")))


def _cpu_clock(pid: int) -> int:
    """clock_getcpuclockid(3), which Python lacks: nanoseconds of all threads, those that have ended too."""
    return (~pid << 3) | 2
