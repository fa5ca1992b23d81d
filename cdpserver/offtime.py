"""Times in which the host was down, or that its clock jumped over at a boot: neither history nor locks grow older by them.

`boots.json` in the state directory: {"off": [[from_ns, to_ns], ...]}, ascending; from the newest time in any journal before a
boot to the boot's own first time.
"""

from collections.abc import Sequence
from typing import TypeAlias

from cdpserver import durable
from cdpserver.errors import CorruptError
from cdpserver.state import StateDir

Off: TypeAlias = Sequence[tuple[int, int]]

LEAST_NS = 60 * 1_000_000_000
"""Shorter ones make nothing old."""

MOST = 4000
"""Boots that are remembered: one a day for ten years."""


def note(state: StateDir, from_ns: int, to_ns: int) -> bool:
    """A boot at `to_ns`, after history up to `from_ns`. Durable on return. Was it worth a note?"""
    if not from_ns or to_ns - from_ns < LEAST_NS:
        return False
    # Noted before, by a start that died before it had fixed the clock.
    before = [span for span in off_times(state) if span[0] != from_ns]
    off = [*before, (from_ns, to_ns)][-MOST:]
    durable.write_json(state.boots, {"off": [list(span) for span in off]})
    return True


def off_times(state: StateDir) -> Off:
    """What was noted; nothing when the file is lost. CorruptError if it cannot be read: what is old is not known then."""
    try:
        found = durable.read_json(state.boots)["off"]
        spans = [(int(from_ns), int(to_ns)) for from_ns, to_ns in found]
    except FileNotFoundError:
        return []
    except (CorruptError, KeyError, TypeError, ValueError):
        raise CorruptError(
            f"{state.boots} cannot be read, so nobody knows what is old, and nothing is dropped",
            hint="take it from a backup; or move it away: locks and history then age by the time in which the host was down",
        ) from None
    return [span for span in spans if span[0] < span[1]]


def off_since(time_ns: int, off: Off) -> int:
    """How much of the time since `time_ns` was off."""
    return sum(to_ns - max(from_ns, time_ns) for from_ns, to_ns in off if to_ns > time_ns)


def lived_since(time_ns: int, off: Off) -> int:
    """`time_ns` moved forward by the off times after it."""
    return time_ns + off_since(time_ns, off)
