"""The scrub: everything at rest is read again and verified, a little at a time, within an I/O budget.

    base -> header logs and payload -> indexes -> base points          a round; `scrub.json` says how far it is

It takes no lock while it reads, so nothing that drops, thins or merges ever waits for it. What looks damaged is looked at once
more by a check, which holds the intervals, knows what is meant to be gone, and says which times and points are touched.

Durability: `scrub.json` is replaced whole at the end of every turn; a scrub that is killed goes on from there. What was read of
late and is more than the budget (an interval's index is looked at in one go) is paid for by the next turn, before it reads.
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
from cdpserver.index.merged import DIRECTORY as MERGED_DIRECTORY
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.record import DTYPE, Kind
from cdpserver.journal.recovery import payload_whole
from cdpserver.journal.segment import PAGE, SegmentReader
from cdpserver.limits import SECTOR
from cdpserver.nodes import base_point_path, published
from cdpserver.state import StateDir
from cdpserver.timeline import Timeline

FILE = "scrub.json"
CHUNK = 1024
"""Records verified between two looks at the clock."""

PATIENCE_S = 20.0
"""Longest pause within a turn: one that is further ahead of its budget ends."""

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
        """So much was read; returns when that was due, or if it is `behind`."""
        self.spent += count
        early = self._early
        if NAP_S < early <= PATIENCE_S:
            self.nap(early)

    def pay(self, count: int) -> None:
        """So much was read before. Returns when that was due."""
        self.nap(count / self.rate)
        self.began = self.clock()

    @property
    def _early(self) -> float:
        return self.began + self.spent / self.rate - self.clock()

    @property
    def behind(self) -> bool:
        """Was so much read that to wait for it would take too long?"""
        return self._early > PATIENCE_S

    @property
    def owed(self) -> int:
        """Bytes that were read ahead of time."""
        return max(0, int(self._early * self.rate))


@dataclass
class Progress:
    """What `scrub.json` says. `ended_ns`: when the newest whole round ended; 0 before the first."""

    at: Place = NOWHERE
    again: set[Place] = field(default_factory=set)
    begun_ns: int = 0
    ended_ns: int = 0
    bytes: int = 0
    rounds: int = 0
    owed: int = 0
    """Bytes that the turn before read ahead of its time."""

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
            numbers.append(value.get("owed", 0))  # older ones have none
            if any(type(number) is not int or number < 0 for number in numbers):
                return cls()
            begun_ns, ended_ns, count, rounds, owed = numbers
            return cls(part.at, part.again, begun_ns, ended_ns, count, rounds, owed, list(value["damage"]))
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
                "owed": self.owed,
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
        self._file(path, lambda block: (BASE, block, 0, 0))

    def _file(self, path: Path, place: Callable[[int], Place]) -> None:
        """A file, block by block: against its sums, and where there are none they are made. From then on somebody can tell."""

        def takes(number: int) -> bool:
            return self._part.takes(place(number + 1))

        try:
            for number in sums.wrong(path, takes=takes, spend=self._budget.spend):
                self._part.found(place(number + 1))
            sums.extend(path, takes=takes, spend=self._budget.spend)
        except CorruptError:
            self._part.found(place(1))  # what the sums say of it, nobody knows: the check says so

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
        self._budget.spend(PAGE + len(raw))
        records = np.frombuffer(raw, DTYPE, count=len(whole))
        for at in np.flatnonzero(whole).tolist():
            record = records[at]
            if record["kind"] in (Kind.DATA, Kind.CONTROL):
                try:
                    good = payload_whole(reader, record)
                except (CorruptError, OSError):
                    good = False
                self._budget.spend(int(record["length"]) * SECTOR)
                if not good:
                    self._part.found((PAYLOAD, interval, reader.segment, first + at))

    def _indexes(self) -> None:
        numbers = [*Journal(self._directory).intervals, MERGED]
        wanted = (number for number in numbers if self._part.takes((INDEX, number or MERGED_INDEXES, 0, 0)))
        for number, found in check_indexes(self._directory, wanted, (), boot_id()):
            if found:
                self._part.found((INDEX, number or MERGED_INDEXES, 0, 0))
            self._budget.spend(index_bytes(self._directory, number))

    def _base_points(self) -> None:
        for number in published(self._directory):
            if self._part.ended:
                return
            with contextlib.suppress(FileNotFoundError):  # merged away meanwhile
                self._file(
                    base_point_path(self._directory, number),
                    lambda block, number=number: (BASE_POINT, number, block, 0),  # type: ignore[misc]
                )


def index_bytes(directory: Path, interval: int) -> int:
    """How much is read to look at an interval's index: that, and the header logs. At the merged ones: they, and all others."""
    if interval == MERGED:
        found = [
            *(directory / MERGED_DIRECTORY).glob("[0-9]*"),
            *directory.glob(f"intervals/*/{CLOSED_NAME}"),
        ]
    else:
        path = interval_path(directory, interval)
        found = [*path.glob("*.log"), *path.glob("*.mdb")]
    total = 0
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # dropped or merged meanwhile
            total += path.stat().st_size
    return total


def turn(
    state_dir: Path, id: str, *, budget: Budget, seconds: float, now_ns: Callable[[], int], boot: str
) -> dict[str, Any]:
    """Go on with a timeline's scrub for so long; what came of it. The round may end.

    What was damaged before is looked at again at the end of each round, so that what was mended is forgotten.
    """
    directory = state_dir / "timelines" / id
    held = timeline.load(directory)
    progress = Progress.load(directory)
    budget.pay(progress.owed)
    if not progress.under_way:
        progress.begun_ns, progress.at, progress.bytes = now_ns(), NOWHERE, 0
    until = budget.clock() + seconds
    part = Part(at=progress.at, ends=lambda: budget.clock() >= until or budget.behind)
    Walk(state_dir, held, part, budget).run()
    ended = not part.ended
    suspects = part.damaged | progress.again if ended else part.damaged - progress.again
    told = _look(state_dir, id, suspects, boot, budget) if suspects else []
    known = {(row["what"], row["path"]) for row in progress.damage}
    new = [row for row in told if (row["what"], row["path"]) not in known]
    if ended:
        progress.damage, progress.again = told, suspects if told else set()
    elif told:
        progress.damage, progress.again = (progress.damage + new)[:MAX_DAMAGE], progress.again | suspects
    progress.bytes += budget.spent
    progress.at, progress.owed = part.at, budget.owed
    if ended:
        progress.ended_ns, progress.begun_ns, progress.rounds = now_ns(), 0, progress.rounds + 1
    progress.save(directory)
    return {"ended": ended, "bytes": progress.bytes, "new": new, "damaged": len(progress.damage)}


def _look(state_dir: Path, id: str, suspects: set[Place], boot: str, budget: Budget) -> list[dict[str, Any]]:
    """What a check says of these places, whose headers it goes through as ever. It holds the intervals, so it does not pause."""
    found = check_timeline(state_dir, id, boot_id=boot, depth=Part(at=END, again=suspects))
    blocks = sum(place[0] in (BASE, BASE_POINT) for place in suspects)
    indexes = {place[1] for place in suspects if place[0] == INDEX}
    budget.spent += found.bytes + blocks * sums.BLOCK
    budget.spent += sum(
        index_bytes(state_dir / "timelines" / id, MERGED if number == MERGED_INDEXES else number)
        for number in indexes
    )
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
