"""What a worker says of a disk that it has open, as plain values: `TargetDisk.status`, but for its clients."""

from typing import Any

from cdpserver.journal.firstcopy import FirstCopy
from cdpserver.journal.writer import JournalWriter
from cdpserver.target.place import place


def of(first_copy: FirstCopy | None, journal: JournalWriter | None, *, base_durable: bool) -> dict[str, Any]:
    """Of a disk in its first copy, of one with a history, or of one whose history did not open: then there is neither."""
    if first_copy is not None:
        at = {"place": place(first_copy), "synced": False}
        return {"mode": "first-copy", "wrote": first_copy.wrote, "session": first_copy.session, **at}
    if journal is None:
        return {"mode": "journal", "session": 0, "synced": False}
    state = journal.state
    return {
        "mode": "journal",
        "session": state.session,
        "synced": state.synced,
        "write_blocking": state.write_blocking,
        "grade": state.grade.label,
        "fork": state.fork,
        "last_seq": journal.last_seq,
        # Without its base a history is worth nothing.
        "durable_seq": journal.durable_seq if base_durable else 0,
        "lag_ns": journal.lag_ns(),
        "gap_until_ns": state.gap_until_ns,
        "anchor": state.anchor,
        "anchored": state.anchored,
        "payload_bytes": journal.payload_bytes,
        "place": place(journal),
    }
