"""How fast history grows, and when it reaches a cap. Pure.

History grows for as long as the policy keeps it; after that as much goes as comes. So what a disk takes is a sum of parts that
each grow at their own rate up to their own limit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

HOUR_NS = 3600 * 1_000_000_000

WINDOW_NS = 24 * HOUR_NS
"""The growth of how long is measured: a day evens out what differs between its hours."""

LEAST_NS = 60 * 1_000_000_000
"""A shorter history says nothing of an hour."""


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of the journal: the times of its first and last record, the bytes that its files take.

    `every_ns`: how far apart its instants are, if it was thinned.
    """

    number: int
    first_ns: int
    last_ns: int
    bytes: int
    every_ns: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes `bytes` now and grows by `per_hour` up to `limit`."""

    bytes: int
    per_hour: float
    limit: float

    def after(self, hours: float) -> float:
        """Its bytes after some hours."""
        return max(self.bytes, min(self.limit, self.bytes + self.per_hour * hours))


def unbroken(spans: Sequence[Span]) -> list[Span]:
    """The newest intervals (of ascending ones) between which none was dropped."""
    found: list[Span] = []
    for span in reversed(spans):
        if found and found[-1].number != span.number + 1:
            break
        found.append(span)
    return found[::-1]


def held_ns(spans: Sequence[Span], now_ns: int) -> int:
    """How far back the journal reaches without a break."""
    kept = unbroken(spans)
    return max(0, now_ns - kept[0].first_ns) if kept else 0


def per_hour(spans: Sequence[Span], now_ns: int, *, window_ns: int = WINDOW_NS) -> float | None:
    """Bytes that the journal grew by in an hour, on the average of the last `window_ns`; None if history is too short to say.

    An interval that is only partly inside counts in proportion to the time.
    """
    kept = unbroken(spans)
    length = min(window_ns, held_ns(spans, now_ns))
    if length < LEAST_NS:
        return None
    start = now_ns - length
    ends = [span.first_ns for span in kept[1:]] + [now_ns]
    total = 0.0
    for span, end in zip(kept, ends, strict=True):
        inside = end - max(start, span.first_ns)
        if end <= span.first_ns:
            total += span.bytes if span.first_ns >= start else 0
        elif inside > 0:
            total += span.bytes * inside / (end - span.first_ns)
    return total * HOUR_NS / length


def made_per_hour(
    made: Iterable[tuple[int, int]], spans: Sequence[Span], now_ns: int, *, window_ns: int = WINDOW_NS
) -> float | None:
    """The same for files that were made at one instant each: (time, bytes)."""
    length = min(window_ns, held_ns(spans, now_ns))
    if length < LEAST_NS:
        return None
    return sum(size for time_ns, size in made if time_ns > now_ns - length) * HOUR_NS / length


def hours_until(parts: Iterable[Part], cap: float) -> float | None:
    """Hours until the parts together take more than `cap` bytes: 0 if they do so now, None if they never will."""
    held, hours = list(parts), 0.0
    total: float = sum(part.bytes for part in held)
    if total > cap:
        return 0.0
    growing = [replace(part) for part in held if part.per_hour > 0 and part.limit > part.bytes]
    ends = sorted((part.limit - part.bytes) / part.per_hour for part in growing)
    rates = sorted(growing, key=lambda part: (part.limit - part.bytes) / part.per_hour)
    slope = sum(part.per_hour for part in growing)
    for end, part in zip(ends, rates, strict=True):
        reached = total + slope * (end - hours)
        if reached > cap:
            return hours + (cap - total) / slope
        total, hours = reached, end
        slope -= part.per_hour
    return None
