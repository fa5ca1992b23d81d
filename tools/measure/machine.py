"""What a figure depends on besides the code: the machine, its kernel, its file system, the versions of the programs."""

import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

from tools.kit.processes import run

ROOT = Path(__file__).resolve().parents[2]


def facts(directory: Path) -> dict[str, Any]:
    """The machine, as plain values; `directory` is where the files of the measurements are."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _line("git", "-C", ROOT, "describe", "--always", "--dirty"),
        "cpus": os.cpu_count(),
        "cpu": _value("/proc/cpuinfo", "model name"),
        "memory": _value("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "load": os.getloadavg(),
        "file_system": _line("stat", "--file-system", "--format=%T", directory),
        "device": _line("df", "--output=source", directory),
        "python": sys.version.split()[0],
        "qemu": _line("qemu-img", "--version"),
        "nbdkit": _line("nbdkit", "--version"),
        "fio": _line("fio", "--version"),
    }


def _line(*command: str | Path) -> str:
    """What a program says: its last line for `df`, which heads its answer, and else the first."""
    lines = run(*command, accept=range(256)).stdout.strip().splitlines() or [""]
    return lines[-1 if command[0] == "df" else 0]


def _value(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
