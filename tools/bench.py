"""`tools/bench`: what protection costs, measured beside what QEMU and nbdkit do with the same requests.

The subjects take turns in every round, each on fresh space; figures are medians, and ratios are taken within a round.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from cdpserver.errors import CdpError
from tools.kit.processes import FailedError, ended_by_signals, scratch
from tools.kit.server import Server
from tools.measure import (
    backups,
    basepoints,
    chains,
    chunks,
    costs,
    disturbed,
    files,
    idle,
    lengths,
    machine,
    many,
    memory,
    migrate,
    mirrors,
    opening,
    reads,
    result,
    rto,
    scale,
    space,
    work,
    workers,
    writes,
)
from tools.measure.context import QUICK, SMOKE, Context, Sizes
from tools.measure.result import Measure
from tools.measure.servers import Ours

BENCHES: dict[str, Callable[[Context], list[Measure]]] = {
    "write-4k": writes.random_4k,
    "latency-4k": writes.latency_4k,
    "write-1m": writes.sequential_1m,
    "first-copy": mirrors.first_copy,
    "mirror": mirrors.writes,
    "steady": disturbed.steadiness,
    "read-4k": reads.random_4k,
    "read-chain": chains.reads,
    "open": opening.first_byte,
    "base-point": basepoints.base_points,
    "lengths": lengths.lengths,
    "space": space.space,
    "memory": memory.curve,
    "scale": scale.scale,
    "work": work.work,
    "zero": costs.zero,
    "remirror": costs.remirror,
    "rto": rto.rto,
    "disks": many.disks,
    "idle": idle.idle,
    "forward": workers.forward,
    "takeover": workers.takeover,
    "files": files.files,
    "migrate": migrate.migrate,
    "backup": backups.backups,
    "chunks": chunks.chunks,
}

QUICK_BENCHES = tuple(BENCHES)[: tuple(BENCHES).index("rto")]
"""What `--quick` runs: the rest takes its time however small it is."""


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=0, help="rounds of each bench (default: 5; 1 with --quick and --smoke)"
    )
    parser.add_argument("--only", action="append", choices=list(BENCHES), help="this bench; may be repeated")
    parser.add_argument(
        "--quick", action="store_true", help="smaller sizes, and only what is quick: a few minutes"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it work at all?")
    parser.add_argument("--json", action="store_true", help="figures, samples and the machine as JSON")
    parser.add_argument(
        "--directory", type=Path, help="where to put the files: the file system to measure on"
    )
    parser.add_argument(
        "--guestfish",
        action="store_true",
        help="files: measure guestfish, too (libguestfs-tools and a kernel package; in software, half a minute a round)",
    )
    chosen = parser.parse_args(arguments)
    chosen.rounds = chosen.rounds or (1 if chosen.quick or chosen.smoke else 5)
    chosen.only = chosen.only or list(QUICK_BENCHES if chosen.quick else BENCHES)
    if chosen.rounds < 0:
        parser.error("--rounds is 1 or more")
    return chosen


def sizes(chosen: argparse.Namespace) -> Sizes:
    """How much work is done."""
    if chosen.smoke:
        return SMOKE
    return QUICK if chosen.quick else Sizes()


def measure(chosen: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> list[Measure]:
    """Run the benches that were chosen, one after the other, against one server."""
    found = []
    with Server(directory / "state") as server:
        context = Context(directory, Ours(server), chosen.rounds, sizes(chosen), say, chosen.guestfish)
        for name in chosen.only:
            found += BENCHES[name](context)
    return found


def as_json(chosen: argparse.Namespace, facts: dict[str, Any], measures: list[Measure]) -> dict[str, Any]:
    """Everything for programs."""
    return {
        "machine": facts,
        "options": {
            "rounds": chosen.rounds,
            "only": chosen.only,
            "sizes": dataclasses.asdict(sizes(chosen)),
        },
        "measures": {found.name: found.as_dict() for found in measures},
    }


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status. A goal that is missed is no failure."""
    chosen = options(arguments)
    talk = Console(stderr=True)
    with scratch("cdp-bench-", parent=chosen.directory) as directory:
        try:
            with ended_by_signals():
                facts = machine.facts(directory)
                measures = measure(
                    chosen, directory, lambda line: talk.print(line, highlight=False, markup=False)
                )
        except KeyboardInterrupt as signal:
            talk.print(f"ended by {signal}")
            return 130
        except (FailedError, CdpError, OSError) as error:
            talk.print(f"tools/bench: {error}", markup=False)
            return 1
    if chosen.json:
        sys.stdout.write(json.dumps(as_json(chosen, facts, measures), indent=2) + "\n")
    else:
        console = Console(width=None if sys.stdout.isatty() else 130)
        result.show(measures, console)
        console.print(
            ", ".join(f"{key}: {value}" for key, value in facts.items()), style="dim", highlight=False
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
