"""`tools/soak`: load, faults and retention at random for as long as it is told, with an oracle that knows every instant.

Disks are written at random through the NBD target of a real `cdpserver` with a policy of minutes. In the first half its processes
are killed, hang and come back, and its store is full and read-only for a while; in the second only jobs are killed, so that what
the long-lived processes take can be seen to stay bounded. All the time random instants are opened and compared. At the end
everything is compared and checked.

`--seed` gives the same writes, faults and looks in the same order; when each of them happens is up to the processes.
"""

import argparse
import contextlib
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from cdpserver.clock import Clock
from cdpserver.errors import CdpError, RefusedError
from cdpserver.state import StateDir
from tools.kit.processes import FailedError, ended_by_signals, run, scratch
from tools.kit.server import BIN
from tools.soaking import trend
from tools.soaking.besieged import LONG_LIVED, Besieged
from tools.soaking.faults import Faults
from tools.soaking.looks import Looks
from tools.soaking.oracle import Oracle
from tools.soaking.writer import Writer

MIB = 1 << 20
STORE = 1024 * MIB
DISKS = {"small": 8 * MIB, "odd": 16 * MIB + 512, "large": 24 * MIB}
"""One with a size that is no multiple of a block: it is written by sectors."""

POLICY = {"bp_every": "20s", "keep_rp": "1m 5m/5s", "keep_bp": "1h", "max_chain": "24"}
RATE = 40.0
"""Writes a second to each disk, at most."""

SAMPLE_S = 5.0
FAULT_S = 6.0
"""Mean time between two faults; in a short run as long as there are a few."""

JOIN_S = 120.0
"""How long the last write of each disk may take, once no fault is under way."""


@dataclass
class Summary:
    """What a run did and found."""

    seed: int
    minutes: float
    writes: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    bytes_compared: int = 0
    bytes_wrong: int = 0
    cut_off: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    longest_write_s: float = 0.0
    highest: dict[str, float] = field(default_factory=dict)
    ends: dict[str, tuple[float, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()
        }


class Soak:
    """One run in a directory of its own."""

    def __init__(self, chosen: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> None:
        self.summary = Summary(chosen.seed, chosen.minutes)
        self._say = say
        self._half_s = chosen.minutes * 30
        self._dice = {name: random.Random(f"{chosen.seed} {name}") for name in ("faults", "looks", *DISKS)}
        self._began = time.monotonic()
        self._over = threading.Event()
        self._series = trend.Series()
        self._besieged = Besieged(directory, store_bytes=STORE)
        self._calm_since_s = 0.0

    def run(self) -> Summary:
        """All of it. FailedError and CdpError if it cannot go on."""
        try:
            self._prepare()
            self._endure()
            self._conclude()
        finally:
            self._over.set()
            self._besieged.close()
        return self.summary

    def _prepare(self) -> None:
        """Disks with a history, and who writes and looks."""
        client = self._besieged.client
        self._oracles = {
            name: Oracle(size, align=4096 if size % 4096 == 0 else 512, disk=number)
            for number, (name, size) in enumerate(DISKS.items(), 1)
        }
        for name, size in DISKS.items():
            client.add_disk(name, size=size, vm=None, base=None)
            client.synced(name, session=None, write_blocking=True)
            client.set_policy(name, POLICY)
        self._writers = [
            Writer(client, name, oracle, dice=self._dice[name], rate=RATE)
            for name, oracle in self._oracles.items()
        ]
        clock = Clock.load(StateDir(self._besieged.state_dir).clock)
        self._looks = Looks(client, clock, self._oracles, dice=self._dice["looks"])

    def _endure(self) -> None:
        faults = Faults(self._besieged, list(DISKS), dice=self._dice["faults"], over=self._over)
        watch = threading.Thread(target=self._watch, name="watch")
        for begin in (*(writer.start for writer in self._writers), self._looks.start, watch.start):
            begin()
        try:
            self._strike(faults.strike, self._half_s)
            self._looks.no_more_excuses()
            self._calm_since_s = self._now_s()
            self._say("from here on no process that lives long is struck")
            self._strike(faults.gentle, 2 * self._half_s)
        finally:
            self._over.set()
            for writer in self._writers:
                writer.tell_to_end()
            self._looks.end()
            watch.join()
            self.summary.faults = faults.done
            late = [writer.disk for writer in self._writers if not writer.join(JOIN_S)]
        if late:
            raise FailedError(f"the last write was not acknowledged within {JOIN_S:.0f} s: {', '.join(late)}")

    def _strike(self, strike: Callable[[], None], end_s: float) -> None:
        """Again and again until then; once at least."""
        dice, mean_s = self._dice["faults"], min(FAULT_S, self._half_s / 4)
        strike()
        while self._now_s() < end_s and not self._looks.failures:
            self._over.wait(min(dice.expovariate(1 / mean_s), max(0.0, end_s - self._now_s())))
            if self._now_s() < end_s:
                strike()

    def _watch(self) -> None:
        said_s = 0.0
        while not self._over.wait(SAMPLE_S):
            self._sample()
            if self._now_s() > said_s + 60:
                said_s = self._now_s()
                writes = sum(oracle.count for oracle in self._oracles.values())
                self._say(
                    f"{said_s / 60:.0f} min: {writes:,} writes, {sum(self._looks.compared.values()):,} looks, "
                    f"{self._besieged.used() / MIB:,.0f} MiB"
                )

    def _sample(self) -> None:
        besieged = self._besieged
        trend.sample(self._series, self._now_s(), besieged.processes(), besieged.state_dir, besieged.used())

    def _conclude(self) -> None:
        """Everything that is there is compared and checked, and what was taken is judged."""
        looks, summary = self._looks, self.summary
        self._sample()
        if not looks.failures:
            for disk in DISKS:
                with contextlib.suppress(
                    RefusedError
                ):  # a chain of base points that were asked for may be at its limit
                    self._besieged.client.cut(disk)
            looks.everything()
            for disk in DISKS:
                self._check(disk)
        summary.writes = sum(oracle.count for oracle in self._oracles.values())
        summary.compared, summary.bytes_compared = looks.compared, looks.bytes_compared
        summary.bytes_wrong, summary.refused, summary.unanswered = (
            looks.bytes_wrong,
            looks.refused,
            looks.unanswered,
        )
        summary.failures += looks.failures
        for writer in self._writers:
            summary.cut_off += writer.cut_off
            summary.longest_write_s = max(summary.longest_write_s, writer.longest_s)
        bounds = {
            "memory": trend.MEMORY,
            "files": trend.FILES,
            "deleted": trend.DELETED,
            "bytes": trend.ROOM,
        }
        for name in sorted(self._series.values):
            summary.highest[name] = self._series.highest(name)
            if name.partition(" ")[0] in (*LONG_LIVED, "store"):
                summary.ends[name] = self._series.ends(name, self._calm_since_s)
                grown = self._series.grown(name, self._calm_since_s, bounds[name.rpartition(" ")[2]])
                summary.failures += [grown] if grown else []

    def _check(self, disk: str) -> None:
        """`cdp check` finds no damage."""
        done = run(BIN / "cdp", "--state-dir", self._besieged.state_dir, "check", disk, accept=range(256))
        if done.returncode:
            self.summary.failures.append(
                f"cdp check {disk}: status {done.returncode}: {done.stdout}{done.stderr}"
            )

    def _now_s(self) -> float:
        return time.monotonic() - self._began


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="what a run printed, to do it again"
    )
    parser.add_argument(
        "--directory", type=Path, help="where to put the files, unless root: then on a tmpfs there"
    )
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.minutes < 10_000:
        parser.error("--minutes is more than 0")
    return chosen


def show(summary: Summary, console: Console) -> None:
    """For a person."""
    faults = ", ".join(f"{name} {count}" for name, count in sorted(summary.faults.items()))
    looks = ", ".join(f"{name} {count}" for name, count in sorted(summary.compared.items()))
    console.print(f"seed {summary.seed}, {summary.minutes:g} minutes: {summary.writes:,} writes")
    console.print(f"faults: {sum(summary.faults.values())} ({faults})")
    console.print(f"compared: {sum(summary.compared.values()):,} ({looks}), {summary.bytes_compared:,} bytes")
    console.print(f"bytes wrong: {summary.bytes_wrong}")
    console.print(f"longest write: {summary.longest_write_s:.1f} s; cut off: {dict(summary.cut_off)}")
    console.print(f"refused: {dict(summary.refused)}; unanswered: {dict(summary.unanswered)}")
    for name, (early, late) in summary.ends.items():
        scale, unit = (1, "") if name.endswith(("files", "deleted")) else (MIB, " MiB")
        console.print(
            f"{name}: {early / scale:,.0f}, at the end {late / scale:,.0f}, "
            f"at most {summary.highest[name] / scale:,.0f}{unit}"
        )
    for failure in summary.failures:
        console.print(f"FAILED: {failure}", markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status: 1 if anything was wrong."""
    chosen = options(arguments)
    talk = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    talk.print(f"seed {chosen.seed}")
    with scratch("cdp-soak-", parent=chosen.directory) as directory:
        try:
            with ended_by_signals():
                summary = Soak(chosen, directory, talk.print).run()
        except KeyboardInterrupt as signal:
            talk.print(f"ended by {signal}")
            return 130
        except (FailedError, CdpError, OSError) as error:
            talk.print(f"tools/soak: {error}")
            return 1
    if chosen.json:
        sys.stdout.write(json.dumps(summary.as_dict(), indent=2) + "\n")
    else:
        show(summary, Console(markup=False, highlight=False, soft_wrap=True))
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
