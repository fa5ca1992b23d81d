"""Which intervals are to be thinned, how far, and what of each must stay exactly; pure.

An interval that is kept goes from step to step of `keep_rp` as its newest record ages. It is written anew when the step that it
is in keeps fewer instants than it has, and when instants that somebody held are held no more.
Invariants: what a hold, or a *same* record of any interval that stays, needs is among what must stay. A plan that was
carried out plans nothing more.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from cdpserver.names import format_duration
from cdpserver.retention.plan import Decision, Facts
from cdpserver.retention.steps import step_at


@dataclass(frozen=True, slots=True)
class Thinning:
    """Interval `number` is to give one instant of each `every_ns`, its end, and the seqs `exact`, some `held` by somebody."""

    disk: str
    number: int
    every_ns: int
    exact: frozenset[int]
    held: frozenset[int]
    reason: str
    bytes: int

    @property
    def what(self) -> str:
        """As `cdp prune` names it."""
        return f"thin:{self.number}"


def thinnings(facts: Facts, decisions: Sequence[Decision]) -> list[Thinning]:
    """The intervals to be thinned, oldest first, among those that the plan of the disk keeps."""
    steps = facts.policy.keep_rp
    if not any(step.every_ns for step in steps):
        return []
    kept = {decision.number for decision in decisions if decision.is_interval and decision.keep}
    holds = sorted({hold.seq for hold in facts.holds})
    looked_at = {seq for interval in facts.intervals if interval.number in kept for seq in interval.looks_at}
    found = []
    for interval in facts.intervals[:-1]:
        step = step_at(steps, facts.now_ns - interval.last_time_ns)
        if interval.number not in kept or not interval.settled or interval.last_seq < interval.first_seq:
            continue
        held = _within(holds, interval.first_seq, interval.last_seq)
        every = max(step.every_ns, interval.every_ns)
        why = f"keep_rp {step}: one instant of each {format_duration(every)} is kept"
        if every == interval.every_ns:
            if not interval.every_ns or interval.held <= held:
                continue
            why = "instants in it are no longer held"
        exact = held | _within(sorted(looked_at), interval.first_seq, interval.last_seq)
        found.append(Thinning(facts.disk, interval.number, every, exact, held, why, interval.bytes))
    return found


def _within(seqs: Sequence[int], first: int, last: int) -> frozenset[int]:
    return frozenset(seqs[bisect_right(seqs, first - 1) : bisect_right(seqs, last)])
