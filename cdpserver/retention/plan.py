"""What is kept of a disk's history and what goes, with the reason for each thing. Pure.

    intervals   1 2 3 . . 6 7 . . 10 11 12(open)
    nodes           3     5     7  9     11

An instant in an interval is read from the intervals below it, one by one, down to the base point (node) that closed the first
one that is gone. So an interval that is kept needs the one before it, or the node that closed that. What goes is therefore all
that nothing wanted needs. Wanted are the instants of the last `keep_rp`, the base points that `keep_bp` chooses, what locks,
leases and forks hold, and always the newest node with all that came after it, since the next base point is computed from it.

Invariants: what is wanted needs nothing that goes. A plan that was carried out plans nothing more. A clock set back wants more,
never less (a cap aside).
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cdpserver.names import format_duration
from cdpserver.retention.policy import SHORTEN, Policy
from cdpserver.retention.slots import slot_of

ANYTHING = -1
"""A cutoff before every time: nothing is shortened."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval of the journal: the seqs and times of its first and last record, its room on the disk.

    `refers` are older intervals that its *same* records look into, `looks_at` the seqs that they name.
    `every_ns`: how far apart its instants are, if it was thinned (0: all are there); `held` are those of them that are there for
    somebody. `settled`: it is closed, sealed and indexed, so that it can be thinned.
    """

    number: int
    first_seq: int
    last_seq: int
    first_time_ns: int
    last_time_ns: int
    bytes: int
    refers: frozenset[int] = frozenset()
    looks_at: frozenset[int] = frozenset()
    every_ns: int = 0
    held: frozenset[int] = frozenset()
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A published base point: the content at the end of `interval`."""

    number: int
    seq: int
    time_ns: int
    interval: int
    grade: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Somebody needs the instant `seq`; `why` is a sentence for the operator. `locked`: by a lock, which has a quota."""

    seq: int
    why: str
    locked: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the plan of one disk depends on. Intervals and nodes ascend; the last interval is the open one.

    `id` is that of the timeline. `stood_on`: nodes that files of other timelines stand on, and why.
    """

    disk: str
    policy: Policy
    now_ns: int
    intervals: tuple[Interval, ...] = ()
    nodes: tuple[Node, ...] = ()
    holds: tuple[Hold, ...] = ()
    stood_on: Mapping[int, str] = field(default_factory=dict)
    other_bytes: int = 0
    id: str = ""

    @property
    def bytes(self) -> int:
        """The room that the disk's history takes."""
        return self.other_bytes + sum(i.bytes for i in self.intervals) + sum(n.bytes for n in self.nodes)


@dataclass(frozen=True, slots=True)
class Decision:
    """One interval (`interval:7`) or base point (`bp:12`) of a disk: kept or not, and why."""

    what: str
    number: int
    disk: str
    keep: bool
    reason: str
    bytes: int

    @property
    def is_interval(self) -> bool:
        """An interval, not a base point."""
        return self.what.startswith("interval:")


class _Wanted:
    """What is kept, growing, with the first reason for each thing."""

    def __init__(self, facts: Facts) -> None:
        self.intervals: dict[int, str] = {}
        self.nodes: dict[int, str] = {}
        self._by_number = {interval.number: interval for interval in facts.intervals}
        self._firsts = [interval.first_seq for interval in facts.intervals]
        self._all = facts.intervals
        self._closing = {node.interval: node.number for node in facts.nodes}
        self._at = {node.seq: node.number for node in facts.nodes}

    def node(self, number: int, why: str) -> None:
        self.nodes.setdefault(number, why)

    def interval(self, number: int, why: str) -> None:
        """An interval, and what it is read from."""
        todo = [(number, why)]
        while todo:
            number, why = todo.pop()
            if number in self.intervals or number not in self._by_number:
                continue
            self.intervals[number] = why
            todo += [(older, f"interval {number} refers to it") for older in self._by_number[number].refers]
            if number - 1 in self._closing:
                self.node(self._closing[number - 1], f"interval {number} stands on it")
            else:
                todo.append((number - 1, f"interval {number} is read from it"))

    def instant(self, seq: int, why: str) -> None:
        """An instant: the node that holds it, or its interval."""
        if seq in self._at:
            self.node(self._at[seq], why)
            return
        place = bisect_right(self._firsts, seq) - 1
        if place >= 0:
            self.interval(self._all[place].number, why)


def _want_newest(facts: Facts, wanted: _Wanted) -> None:
    newest = facts.nodes[-1] if facts.nodes else None
    if newest is not None:
        wanted.node(newest.number, "the newest base point: the next one is computed from it")
    for interval in facts.intervals:
        if newest is None:
            wanted.interval(interval.number, "no base point holds its content yet")
        elif interval.number > newest.interval:
            wanted.interval(interval.number, "written after the newest base point")
    if facts.intervals:
        wanted.interval(facts.intervals[-1].number, "being written")


def _want_by_policy(facts: Facts, wanted: _Wanted, cutoff_ns: int) -> None:
    policy, now_ns = facts.policy, facts.now_ns
    span = format_duration(policy.keep_rp_ns)
    for node in facts.nodes:
        if node.time_ns >= now_ns - policy.keep_rp_ns and node.time_ns > cutoff_ns:
            wanted.node(node.number, f"keep_rp: of the last {span}")
    for rule in policy.keep_bp:
        best: dict[int, Node] = {}
        for node in facts.nodes:
            slot = slot_of(rule.unit, node.time_ns)
            if slot not in best or node.grade >= best[slot].grade:
                best[slot] = node
        for node in best.values():
            if rule.covers(node.time_ns, now_ns) and node.time_ns > cutoff_ns:
                wanted.node(node.number, f"keep_bp {rule}: that of its {rule.word}")
    for interval in facts.intervals:
        if interval.last_time_ns >= now_ns - policy.keep_rp_ns and interval.last_time_ns > cutoff_ns:
            wanted.interval(interval.number, f"keep_rp: every instant of the last {span}")


def _want(facts: Facts, cutoff_ns: int) -> _Wanted:
    wanted = _Wanted(facts)
    _want_newest(facts, wanted)
    for hold in facts.holds:
        wanted.instant(hold.seq, hold.why)
    for number, why in facts.stood_on.items():
        wanted.node(number, why)
    _want_by_policy(facts, wanted, cutoff_ns)
    return wanted


def plan(facts: Facts, cutoff_ns: int = ANYTHING) -> list[Decision]:
    """A decision for every interval and base point. What the policy wants up to `cutoff_ns` goes: the cap says so."""
    wanted = _want(facts, cutoff_ns)
    before = f"older than the policy keeps (keep_rp {format_duration(facts.policy.keep_rp_ns)})"
    unwanted = "no slot of keep_bp needs it"
    capped = "the cap is reached: history is shortened"
    free = _want(facts, ANYTHING) if cutoff_ns != ANYTHING else wanted
    found = []
    for interval in facts.intervals:
        why = wanted.intervals.get(interval.number)
        gone = capped if interval.number in free.intervals else before
        found.append(_decide("interval", interval.number, facts.disk, why, gone, interval.bytes))
    for node in facts.nodes:
        why = wanted.nodes.get(node.number)
        gone = capped if node.number in free.nodes else unwanted
        found.append(_decide("bp", node.number, facts.disk, why, gone, node.bytes))
    return found


def _decide(kind: str, number: int, disk: str, why: str | None, gone: str, size: int) -> Decision:
    return Decision(f"{kind}:{number}", number, disk, why is not None, gone if why is None else why, size)


def kept_bytes(facts: Facts, cutoff_ns: int = ANYTHING) -> int:
    """The room that a disk's history takes once its plan is carried out."""
    return facts.other_bytes + sum(decision.bytes for decision in plan(facts, cutoff_ns) if decision.keep)


def fixed_bytes(facts: Facts) -> int:
    """The room that no policy and no cap can give back."""
    return kept_bytes(
        facts, max([ANYTHING, *(i.last_time_ns for i in facts.intervals), *(n.time_ns for n in facts.nodes)])
    )


def locked_bytes(facts: Facts) -> int:
    """The room of what locks keep: their intervals and base points, whoever else wants them."""
    wanted = _Wanted(facts)
    for hold in facts.holds:
        if hold.locked:
            wanted.instant(hold.seq, hold.why)
    held = [i.bytes for i in facts.intervals if i.number in wanted.intervals]
    return sum(held) + sum(n.bytes for n in facts.nodes if n.number in wanted.nodes)


def _times(all_facts: Sequence[Facts]) -> list[int]:
    """Every time that history could be cut off at, none first."""
    intervals = {i.last_time_ns for facts in all_facts for i in facts.intervals}
    return sorted({ANYTHING} | intervals | {n.time_ns for facts in all_facts for n in facts.nodes})


def _cutoff(all_facts: Sequence[Facts], cap: int, fixed: int) -> int:
    """The earliest time up to which history must go for the disks to fit `cap` together with `fixed` bytes of others."""
    times = _times(all_facts)
    low, high = 0, len(times) - 1
    while low < high:
        middle = (low + high) // 2
        if fixed + sum(kept_bytes(facts, times[middle]) for facts in all_facts) <= cap:
            high = middle
        else:
            low = middle + 1
    return times[low]


def cutoffs(all_facts: Sequence[Facts], store_cap: int | None = None) -> dict[str, int]:
    """By disk the time up to which its history goes, so that each is within its own cap and all are within the store's.

    A disk whose policy is to refuse writes is never shortened.
    """
    found = {}
    for facts in all_facts:
        cap = facts.policy.size_cap
        own = cap is not None and facts.policy.at_cap == SHORTEN
        found[facts.disk] = _cutoff([facts], cap or 0, 0) if own else ANYTHING
    if store_cap is not None:
        short = [facts for facts in all_facts if facts.policy.at_cap == SHORTEN]
        fixed = sum(kept_bytes(facts) for facts in all_facts if facts.policy.at_cap != SHORTEN)
        common = _cutoff(short, store_cap, fixed)
        found |= {facts.disk: max(found[facts.disk], common) for facts in short}
    return found


def plan_all(all_facts: Sequence[Facts], store_cap: int | None = None) -> list[Decision]:
    """The plans of all disks, within their caps."""
    until = cutoffs(all_facts, store_cap)
    return [decision for facts in all_facts for decision in plan(facts, until[facts.disk])]


def drops(decisions: Iterable[Decision]) -> list[Decision]:
    """What goes, in the order in which it can: killed anywhere, nothing that is left lacks what it is read from.

    Intervals before base points, and both the newest first: whatever is read from a thing is gone before it.
    """
    gone = [decision for decision in decisions if not decision.keep]
    return sorted(gone, key=lambda d: (d.disk, not d.is_interval, -d.number))
