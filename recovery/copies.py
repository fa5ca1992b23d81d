"""A copy of a protected disk, for people: how it was done, why, and what it cost."""

from typing import Any

from cdpserver.names import format_bytes


def in_short(copy: dict[str, Any] | None) -> str:
    """`bitmap 43%` while it is under way, `bitmap 640.0K` (sent) afterwards."""
    if copy is None:
        return "-"
    if copy["under_way"]:
        return f"{copy['method']} {100 * copy['done_bytes'] // max(1, copy['total_bytes'])}%"
    return f"{copy['method']} {format_bytes(copy['sent_bytes'])}"


def in_words(copy: dict[str, Any]) -> str:
    """All of it in one line."""
    journalled = copy["journalled_bytes"]
    parts = [
        f"{format_bytes(copy['sent_bytes'])} sent",
        "what of it was journalled is not known"
        if journalled is None
        else f"{format_bytes(journalled)} journalled",
    ]
    if copy["pause_ns"]:
        parts.append(f"guest held for {copy['pause_ns'] / 1e6:.1f} ms")
    return f"{copy['method']} ({copy['why']}): {', '.join(parts)}"
