"""The scrub: everything at rest is read again and verified, a little at a time, within an I/O budget.

    base -> header logs and payload -> indexes -> base points          a round; `scrub.json` says how far it is

It takes no lock while it reads, so nothing that drops, thins or merges ever waits for it. What looks damaged is looked at once
more by a check, which holds the intervals, knows what is meant to be gone, and says which times and points are touched.

Durability: `scrub.json` is replaced whole at the end of every turn; a scrub that is killed goes on from there.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cdpserver import durable, messages, sums, timeline
from cdpserver.check import check_timeline
from cdpserver.check.basepoints import base_file
from cdpserver.check.depth import BASE, BASE_POINT, END, INDEX, MERGED_INDEXES, NOWHERE, PAYLOAD, Part, Place
from cdpserver.check.isolated import MERGED, check_indexes
from cdpserver.check.records import whole_records
from cdpserver.clock import Clock, boot_id
from cdpserver.errors import CorruptError
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.record import DTYPE, Kind
from cdpserver.journal.recovery import payload_whole
from cdpserver.journal.segment import SegmentReader
from cdpserver.limits import SECTOR
from cdpserver.nodes import base_point_path, published
from cdpserver.state import StateDir
from cdpserver.timeline import Timeline

FILE = "scrub.json"
CHUNK = 1024
"""Records verified between two looks at the clock."""

MAX_DAMAGE = 100
"""Damaged places that are kept for who asks; the check lists the others."""

NAP_S = 0.05
"""Shortest pause, so that a small budget is not spent on waking up."""


@dataclass
class Budget:
    """So many bytes a second, on average from when it was made."""

    rate: int
    clock: Callable[[], float] = time.monotonic
    nap: Callable[[float], None] = time.sleep
    spent: int = 0
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def spend(self, count: int) -> None:
        """So much was read; returns when that was due."""
        self.spent += count
        early = self.began + self.spent / self.rate - self.clock()
        if early > NAP_S:
            self.nap(early)


@dataclass
class Progress:
    """What `scrub.json` says. `ended_ns`: when the newest whole round ended; 0 before the first."""

    at: Place = NOWHERE
    again: set[Place] = field(default_factory=set)
    begun_ns: int = 0
    ended_ns: int = 0
    bytes: int = 0
    rounds: int = 0
    damage: list[dict[str, Any]] = field(default_factory=list)

    @property
    def under_way(self) -> bool:
        """Has a round begun that has not ended?"""
        return self.begun_ns > 0

    def as_dict(self) -> dict[str, Any]:
        """For the overview."""
        return {
            "under_way": self.under_way,
            "ended_ns": self.ended_ns or None,
            "bytes": self.bytes,
            "damaged": len(self.damage),
        }

    @classmethod
    def load(cls, directory: Path) -> "Progress":
        """Of a timeline. A file that is lost or damaged means that the round begins anew."""
        try:
            value = durable.read_json(directory / FILE)
            part = Part.from_json(value["part"], lambda: False)
            numbers = [value[name] for name in ("begun_ns", "ended_ns", "bytes", "rounds")]
            if any(type(number) is not int or number < 0 for number in numbers):
                return cls()
            begun_ns, ended_ns, count, rounds = numbers
            return cls(part.at, part.again, begun_ns, ended_ns, count, rounds, list(value["damage"]))
        except (FileNotFoundError, CorruptError, KeyError, TypeError):
            return cls()

    def save(self, directory: Path) -> None:
        """Durable on return."""
        part = Part(at=self.at, damaged=self.again)
        durable.write_json(
            directory / FILE,
            {
                "part": part.as_json(),
                "begun_ns": self.begun_ns,
                "ended_ns": self.ended_ns,
                "bytes": self.bytes,
                "rounds": self.rounds,
                "damage": self.damage,
            },
        )


class Walk:
    """One turn of a scrub: goes on from a place until its time is over, and gathers what looks damaged."""

    def __init__(self, state_dir: Path, held: Timeline, part: Part, budget: Budget) -> None:
        self._state_dir = state_dir
        self._held = held
        self._directory = state_dir / "timelines" / held.id
        self._part = part
        self._budget = budget

    def run(self) -> None:
        """Until the end of the round, or of the time. What looks damaged is in the part's `damaged`."""
        self._base()
        if not (self._directory / timeline.INTERVALS).is_dir():
            return
        self._payload()
        self._indexes()
        self._base_points()

    def _base(self) -> None:
        path = base_file(self._state_dir, self._held)
        if path is None or self._part.at > (PAYLOAD, 0, 0, 0):
            return
        if sums.read(path) is None:
            # Nobody can tell whether it is what it was; from now on somebody can.
            sums.write(path, spend=self._budget.spend)
            return
        takes = lambda number: self._part.takes((BASE, number + 1, 0, 0))  # noqa: E731
        for number in sums.wrong(path, takes=takes, spend=self._budget.spend):
            self._part.found((BASE, number + 1, 0, 0))

    def _payload(self) -> None:
        stage, *after = self._part.at
        if stage > PAYLOAD:
            return
        begin = (after[0], after[1]) if stage == PAYLOAD else (0, 0)
        journal = Journal(self._directory)
        for interval, number in journal.places(after=begin):
            if self._part.ended:
                return
            with contextlib.suppress(FileNotFoundError):  # dropped or thinned meanwhile
                self._segment(interval, number)

    def _segment(self, interval: int, number: int) -> None:
        place = (PAYLOAD, interval, number, 0)
        try:
            reader = SegmentReader(interval_path(self._directory, interval), number)
        except CorruptError:
            self._part.found(place)
            return
        with contextlib.closing(reader):
            count = reader.count
            if reader.claimed > count:
                self._part.found(place)
            for first in range(0, count, CHUNK):
                end = min(first + CHUNK, count)
                # A place is a record: what comes back to it begins with the chunk that it is the last of.
                if self._part.takes((PAYLOAD, interval, number, end)):
                    self._chunk(reader, interval, first, end)
                if self._part.ended:
                    return

    def _chunk(self, reader: SegmentReader, interval: int, first: int, end: int) -> None:
        raw = reader.raw(first, end)
        whole = whole_records(raw, reader.header, first)
        if not whole.all():
            self._part.found((PAYLOAD, interval, reader.segment, 0))
        read = len(raw)
        records = np.frombuffer(raw, DTYPE, count=len(whole))
        for at in np.flatnonzero(whole).tolist():
            record = records[at]
            if record["kind"] in (Kind.DATA, Kind.CONTROL):
                read += int(record["length"]) * SECTOR
                try:
                    good = payload_whole(reader, record)
                except (CorruptError, OSError):
                    good = False
                if not good:
                    self._part.found((PAYLOAD, interval, reader.segment, first + at))
        self._budget.spend(read)

    def _indexes(self) -> None:
        numbers = [*Journal(self._directory).intervals, MERGED]
        wanted = (number for number in numbers if self._part.takes((INDEX, number or MERGED_INDEXES, 0, 0)))
        for number, found in check_indexes(self._directory, wanted, (), boot_id()):
            if found:
                self._part.found((INDEX, number or MERGED_INDEXES, 0, 0))
            self._budget.spend(self._index_bytes(number))

    def _index_bytes(self, interval: int) -> int:
        path = interval_path(self._directory, interval) / CLOSED_NAME
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_size
        return 0

    def _base_points(self) -> None:
        for number in published(self._directory):
            place = (BASE_POINT, number, 0, 0)
            path = base_point_path(self._directory, number)
            with contextlib.suppress(FileNotFoundError):  # merged away meanwhile
                if not self._part.takes(place):
                    continue
                if sums.read(path) is None:
                    sums.write(path, spend=self._budget.spend)
                elif any(sums.wrong(path, takes=lambda _: True, spend=self._budget.spend)):
                    self._part.found(place)


def turn(
    state_dir: Path, id: str, *, budget: Budget, seconds: float, now_ns: Callable[[], int], boot: str
) -> dict[str, Any]:
    """Go on with a timeline's scrub for so long; what came of it. The round may end.

    What was damaged before is looked at again at the end of each round, so that what was mended is forgotten.
    """
    directory = state_dir / "timelines" / id
    held = timeline.load(directory)
    progress = Progress.load(directory)
    if not progress.under_way:
        progress.begun_ns, progress.at, progress.bytes = now_ns(), NOWHERE, 0
    until = budget.clock() + seconds
    part = Part(at=progress.at, ends=lambda: budget.clock() >= until)
    Walk(state_dir, held, part, budget).run()
    ended = not part.ended
    suspects = part.damaged | progress.again if ended else part.damaged - progress.again
    told = _look(state_dir, id, suspects, boot) if suspects else []
    known = {(row["what"], row["path"]) for row in progress.damage}
    new = [row for row in told if (row["what"], row["path"]) not in known]
    if ended:
        progress.damage, progress.again = told, suspects if told else set()
    elif told:
        progress.damage, progress.again = (progress.damage + new)[:MAX_DAMAGE], progress.again | suspects
    progress.bytes += budget.spent
    progress.at = part.at
    if ended:
        progress.ended_ns, progress.begun_ns, progress.rounds = now_ns(), 0, progress.rounds + 1
    progress.save(directory)
    return {"ended": ended, "bytes": progress.bytes, "new": new, "damaged": len(progress.damage)}


def _look(state_dir: Path, id: str, suspects: set[Place], boot: str) -> list[dict[str, Any]]:
    """What a check says of these places, whose headers it goes through as ever."""
    found = check_timeline(state_dir, id, boot_id=boot, depth=Part(at=END, again=suspects))
    return [damage.as_dict(state_dir) for damage in found.damage][:MAX_DAMAGE]


def main() -> int:
    """`python -m cdpserver.check.scrub`: one turn of one timeline, in a process of its own; what came of it as JSON."""
    parser = argparse.ArgumentParser(description="verify what is at rest")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--timeline", required=True)
    parser.add_argument("--rate", type=int, required=True, help="bytes a second")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    state = StateDir.open(options.state_dir)
    now_ns = Clock.load(state.clock).now_ns
    return messages.tell(
        lambda: turn(
            state.path,
            options.timeline,
            budget=Budget(options.rate),
            seconds=options.seconds,
            now_ns=now_ns,
            boot=boot_id(),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
