"""What a policy would need on a disk whose journal says how it is written to. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cdpserver.retention.distinct import Curve
from cdpserver.retention.growth import HOUR_NS, Span, held_ns, unbroken
from cdpserver.retention.policy import Policy
from cdpserver.retention.slots import SPANS_NS, span_ns


@dataclass(frozen=True, slots=True)
class EveryInstant:
    """What keeping every instant for a span takes: `measured` bytes are in the journal now, the others extrapolated."""

    measured: int
    extrapolated: int
    per_hour: float

    @property
    def bytes(self) -> int:
        return self.measured + self.extrapolated


@dataclass(frozen=True, slots=True)
class Thinned:
    """What a step of `keep_rp` takes: `count` instants `every_ns` apart, each with what was written since the one before."""

    span_ns: int
    every_ns: int
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Gap:
    """`count` base points that each come `gap_ns` after the one below, and what each holds."""

    gap_ns: int
    count: int
    bytes_each: int


@dataclass(frozen=True, slots=True)
class BasePoints:
    """What base points take: the oldest holds all that was written before it, each other one what came since the one below."""

    gaps: tuple[Gap, ...]
    oldest_bytes: int

    @property
    def count(self) -> int:
        return 1 + sum(gap.count for gap in self.gaps)

    @property
    def bytes(self) -> int:
        return self.oldest_bytes + sum(gap.count * gap.bytes_each for gap in self.gaps)


def every_instant(spans: Sequence[Span], now_ns: int, keep_ns: int) -> EveryInstant:
    """The intervals that reach into the last `keep_ns`; for what is longer than the history, its write rate goes on."""
    kept = unbroken(spans)
    # A thinned interval says nothing of the rate any more.
    kept = kept[max((place + 1 for place, span in enumerate(kept) if span.every_ns), default=0) :]
    held = held_ns(kept, now_ns)
    rate = sum(span.bytes for span in kept) * HOUR_NS / held if held else 0.0
    measured = sum(span.bytes for span in kept if span.last_ns >= now_ns - keep_ns)
    return EveryInstant(measured, round(rate * max(0, keep_ns - held) / HOUR_NS), rate)


def thinned(policy: Policy, curve: Curve, per_hour: float) -> tuple[Thinned, ...]:
    """The steps of `keep_rp` that keep fewer than all instants.

    An interval of the journal gives its own end in any case, so no two instants are further apart than base points; and thinning
    writes no more than there is.
    """
    found, before_ns = [], 0
    for step in policy.keep_rp:
        length_ns = step.span_ns - before_ns
        if step.every_ns:
            every_ns = min(step.every_ns, policy.bp_every_ns)
            count = -(-length_ns // every_ns)
            whole = round(per_hour * length_ns / HOUR_NS)
            found.append(Thinned(step.span_ns, step.every_ns, count, min(count * curve.at(every_ns), whole)))
        before_ns = step.span_ns
    return tuple(found)


def all_instants_ns(policy: Policy) -> int:
    """For how long every instant is kept."""
    return max((step.span_ns for step in policy.keep_rp if not step.every_ns), default=0)


def windows(policy: Policy) -> set[int]:
    """The window lengths whose distinct bytes a forecast asks for."""
    return {
        *gaps(policy),
        *(min(step.every_ns, policy.bp_every_ns) for step in policy.keep_rp if step.every_ns),
    }


def gaps(policy: Policy) -> dict[int, int]:
    """How many base points a policy keeps at which distance from the one below; all of keep_rp, then the slots."""
    dense = policy.keep_rp_ns // policy.bp_every_ns
    found = Counter({policy.bp_every_ns: dense} if dense else {})
    at = dense * policy.bp_every_ns
    ages = {k * SPANS_NS[rule.unit] for rule in policy.keep_bp for k in range(1, rule.count + 1)}
    for age in sorted(age for age in ages if age > at):
        found[age - at] += 1
        at = age
    return dict(sorted(found.items()))


def base_points(policy: Policy, curve: Curve, held: int) -> BasePoints:
    """What the policy's base points take once it has been in effect for as long as it reaches back."""
    found = tuple(Gap(gap, count, curve.at(gap)) for gap, count in gaps(policy).items())
    return BasePoints(found, curve.at(max(held, policy.keep_rp_ns, span_ns(policy.keep_bp))))
