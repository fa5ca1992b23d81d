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
    held = held_ns(spans, now_ns)
    rate = sum(span.bytes for span in kept) * HOUR_NS / held if held else 0.0
    measured = sum(span.bytes for span in kept if span.last_ns >= now_ns - keep_ns)
    return EveryInstant(measured, round(rate * max(0, keep_ns - held) / HOUR_NS), rate)


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
