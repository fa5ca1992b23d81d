"""Writes of the guest that were never received: the gap that they leave, found in the journal and put on record.

The target sees connections end and begin, not whether the guest wrote meanwhile. Who watches QEMU says that, perhaps when the
mirror is back already: then the gap has an end as well.

    in sync ──► last change ──► connection lost, or killed ──► first write of the next session ──► ... ──► in sync
                broke_ns                                       began_ns

Where the connection ended says nothing: QEMU may have ended its job long before. Nor does the last change where a target hung
until the guest was let go on without it: what was on its way is received when it goes on, later than what it is of. Nor where no
connection ended: what refused a write did so on the way, and the next may have come through.
"""

from contextlib import closing
from dataclasses import dataclass
from functools import partial

from cdpserver.journal import control
from cdpserver.journal.control import State
from cdpserver.journal.log import Journal
from cdpserver.journal.record import Kind
from cdpserver.journal.writer import JournalWriter

NEAR = 1024
"""So many records are looked at for the last change; a disk at rest has none but it and its commit's."""


@dataclass(frozen=True, slots=True)
class Break:
    """What was received was whole up to `broke_ns`; `began_ns` is the time of the next first write, 0 before it."""

    broke_ns: int
    began_ns: int = 0


def find_break(journal: Journal, state: State) -> Break | None:
    """Where a timeline in this state stopped being in sync; None if it never was, or if its gap is on record."""
    if state.synced:
        return Break(_changed_ns(journal, journal.last().seq))
    if state.fork or state.resync_ref <= 0:
        return None
    before = journal.state_at(state.resync_ref)
    if not before.synced:
        return None
    broke_ns, began_ns = _changed_ns(journal, state.resync_ref), 0
    for run in journal.runs(state.resync_ref, journal.last().seq):
        for record in run.records[run.records["kind"] == Kind.CONTROL]:
            message, time_ns = run.reader.control(record), int(record["time"])
            if message["type"] in ("missed", "gap"):
                return None
            if message["type"] == "session" and message["reason"] == control.FIRST_WRITE and not began_ns:
                began_ns = time_ns
    return Break(broke_ns, began_ns)


def _changed_ns(journal: Journal, upto: int) -> int:
    """Time of the newest record up to a seq that changed data, or of one shortly before it."""
    found = 0
    for run in journal.runs(max(0, upto - NEAR), upto):
        changes = run.records[(run.records["kind"] != Kind.CONTROL) & (run.records["kind"] != Kind.DURABLE)]
        if len(changes):
            found = int(changes["time"][-1])
        elif not found:
            found = int(run.records["time"][0])
    return found


def put_gap(
    writer: JournalWriter,
    session: int,
    reason: str,
    *,
    whole_ns: int | None,
    freed_ns: int | None,
    connected: bool,
) -> tuple[int, int] | None:
    """Put on record that writes of the guest were not received, says who saw session `session` in sync at `whole_ns`, if ever.

    If it was let go on, at `freed_ns`, a record that came after that is of before. `connected`: who wrote is there still, so that
    something on the way refused a write, and others have come after it. Returns the gap, (from, until), durable on return;
    `until` is 0 while it is open. None if there is none, or it is known.
    """
    with writer._lock, closing(Journal(writer.directory)) as journal:
        state = writer.state
        if state.gap_open or (state.synced and state.session != session):
            return None
        broke = journal.settled(partial(find_break, journal, state))
        if broke is None:
            return None
        from_ns, until_ns = broke.broke_ns, broke.began_ns
        if whole_ns is not None:
            from_ns = whole_ns if connected else max(from_ns, whole_ns)
        if freed_ns is not None:
            from_ns = min(from_ns, freed_ns)
        if until_ns and until_ns <= from_ns + 1:
            return None
        if state.synced:
            writer.begin_session(reason)
        writer._put_control(control.missed(from_time_ns=from_ns, until_time_ns=until_ns, reason=reason))
    writer.commit()
    return from_ns, until_ns
