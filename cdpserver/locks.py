"""Locks: points that an operator holds against everything that takes history away. Rows of the catalog; the rules are pure.

A lock holds one instant, `seq` of a timeline, until a time or until it is taken back. An immutable one can be made longer, never
shorter, by nobody, until its time has come. Expired locks hold nothing; the next pass of pruning takes their rows away.
Locks age by being lived with, as history does: time in which the host was down, or that its clock jumped over at a boot, is added
to their end. So a clock that is ahead at a boot ends none early.
"""

import contextlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from cdpserver.catalog import Catalog, Row
from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.names import MAX_TIME_NS, format_time, parse_duration, parse_time, show
from cdpserver.offtime import Off, off_since, off_times

SCHEMA = 1

MAX_REASON = 500
"""Characters: a row has 4 KiB."""

UNTIL_FORMS = "write a time such as 2027-01-31T00:00:00Z, or how long from now: 30d"


@dataclass(frozen=True, slots=True)
class Lock:
    """One lock. `until_ns` is when it ends, None for one that ends only by being taken back.

    `off_ns` of that is time since it was set in which the host was off: the row keeps the end without it.
    """

    id: str
    timeline: str
    seq: int
    time_ns: int
    until_ns: int | None
    immutable: bool
    reason: str
    created_ns: int
    off_ns: int = 0

    def holds(self, now_ns: int) -> bool:
        """Does it hold its point now?"""
        return self.until_ns is None or now_ns < self.until_ns

    def row(self) -> Row:
        """As the catalog keeps it."""
        fields = {
            "timeline": self.timeline,
            "seq": self.seq,
            "time_ns": self.time_ns,
            "until_ns": None if self.until_ns is None else self.until_ns - self.off_ns,
            "immutable": self.immutable,
            "reason": self.reason,
            "created_ns": self.created_ns,
        }
        return Row(self.id, SCHEMA, fields)


def read_lock(row: Row, off: Off = ()) -> Lock:
    """The lock that a row is, the host having been off at these times. CorruptError."""
    f = row.fields
    kinds: dict[str, tuple[type, ...]] = {
        "timeline": (str,),
        "seq": (int,),
        "time_ns": (int,),
        "until_ns": (int, type(None)),
        "immutable": (bool,),
        "reason": (str,),
        "created_ns": (int,),
    }
    if row.schema != SCHEMA or any(type(f.get(key)) not in kind for key, kind in kinds.items()):
        raise CorruptError(
            f"lock {row.id} in the catalog cannot be read, so nothing is dropped or merged",
            hint="a newer cdpserver wrote it: use that one",
        )
    off_ns = off_since(f["created_ns"], off)
    end_ns = None if f["until_ns"] is None else f["until_ns"] + off_ns
    return Lock(row.id, **{key: f[key] for key in kinds} | {"until_ns": end_ns, "off_ns": off_ns})


def all_locks(catalog: Catalog) -> list[Lock]:
    """Every lock, also expired ones, oldest first. CorruptError: a lock that cannot be read must not be passed over."""
    off = off_times(catalog.state)
    found = [read_lock(row, off) for row in catalog.rows("locks").values()]
    return sorted(found, key=lambda lock: (lock.created_ns, lock.id))


def locked_points(catalog: Catalog, timeline: str, *, now_ns: int) -> dict[int, int]:
    """Instants of a timeline that are locked now: seq to time. CorruptError: a lock that cannot be read may hold any."""
    held = [lock for lock in all_locks(catalog) if lock.timeline == timeline and lock.holds(now_ns)]
    return {lock.seq: lock.time_ns for lock in held}


def new_id(taken: Iterable[str]) -> str:
    """An id that no lock has: short, and of no order, so that a mistyped one is hardly another's."""
    used = set(taken)
    while True:
        id = f"lock-{secrets.token_hex(4)}"
        if id not in used:
            return id


def parse_until(text: str, *, now_ns: int) -> int:
    """When a lock ends: a time, or a duration from now. UsageError unless that is to come."""
    try:
        until_ns = parse_time(text)
    except UsageError:
        try:
            until_ns = now_ns + parse_duration(text)
        except UsageError:
            raise UsageError(f"not when a lock can end: {show(text)}", hint=UNTIL_FORMS) from None
    if not now_ns < until_ns <= MAX_TIME_NS:
        raise UsageError(f"a lock cannot end at {show(text)}: that is over", hint=UNTIL_FORMS)
    return until_ns


def check_reason(text: str) -> str:
    """`text` if it can be kept as the reason of a lock."""
    if len(text) > MAX_REASON or not text.isprintable():
        raise UsageError(
            f"not a reason: {show(text)}", hint=f"write one line of at most {MAX_REASON} characters"
        )
    return text


def renew(old: Lock, *, until_ns: int | None, immutable: bool, reason: str | None, now_ns: int) -> Lock:
    """The lock after a point that has it is locked again. RefusedError if an immutable one would become less."""
    if old.immutable and old.holds(now_ns):
        ends_sooner = until_ns is not None and (old.until_ns is None or until_ns < old.until_ns)
        if ends_sooner or not immutable:
            raise RefusedError(
                f"{old.id} is immutable until {_shown(old.until_ns)}",
                hint="it can only be made longer: --immutable --until a later time",
            )
    return replace(
        old, until_ns=until_ns, immutable=immutable, reason=old.reason if reason is None else reason
    )


def check_removable(lock: Lock, *, now_ns: int) -> None:
    """RefusedError if the lock is immutable and its time has not come."""
    if lock.immutable and lock.holds(now_ns):
        raise RefusedError(
            f"{lock.id} is immutable until {_shown(lock.until_ns)}", hint="no command can end it before"
        )


def check_unlocked(locks: Iterable[Lock], name: str, *, now_ns: int) -> None:
    """RefusedError if a disk that is to be removed has locked points."""
    held = [lock for lock in locks if lock.holds(now_ns)]
    if not held:
        return
    fixed = [lock for lock in held if lock.immutable]
    if fixed:
        last = max(lock.until_ns or MAX_TIME_NS for lock in fixed)
        raise RefusedError(
            f"{name} has {len(fixed)} immutable lock(s), the last until {_shown(last)}",
            hint="no command can end them before",
        )
    raise RefusedError(
        f"{name} has {len(held)} locked point(s)",
        hint=f"list them: cdp point locks {name}; then: cdp point unlock LOCK",
    )


def _shown(time_ns: int | None) -> str:
    return "for ever" if time_ns is None else format_time(time_ns)


def find(locks: Iterable[Lock], id: str) -> Lock:
    """The lock of this id. NotFoundError."""
    found = next((lock for lock in locks if lock.id == id), None)
    if found is None:
        raise NotFoundError(f"there is no lock {show(id)}", hint="list them: cdp point locks")
    return found


def describe(lock: Lock, disk: str, *, now_ns: int) -> dict[str, Any]:
    """A lock as the CLI and the API show it."""
    return {
        "id": lock.id,
        "disk": disk,
        "point": f"{disk}@seq:{lock.seq}",
        "seq": lock.seq,
        "time": format_time(lock.time_ns),
        "time_ns": lock.time_ns,
        "until": None if lock.until_ns is None else format_time(lock.until_ns),
        "until_ns": lock.until_ns,
        "off_ns": lock.off_ns,
        "immutable": lock.immutable,
        "reason": lock.reason,
        "expired": not lock.holds(now_ns),
        "created_ns": lock.created_ns,
    }


def locked_seqs(catalog: Catalog, timeline: str, *, now_ns: int) -> set[int]:
    """The seqs of a timeline that are locked now; for showing, so a row that cannot be read is only not shown."""
    found, off = set(), off_times(catalog.state)
    for row in catalog.rows("locks").values():
        with contextlib.suppress(CorruptError):
            lock = read_lock(row, off)
            if lock.timeline == timeline and lock.holds(now_ns):
                found.add(lock.seq)
    return found


def forget(catalog: Catalog, timeline: str) -> None:
    """A disk is gone, and with it what its expired locks held. Durable on return."""
    for id, row in catalog.rows("locks").items():
        if row.fields.get("timeline") == timeline:
            catalog.delete_row("locks", id)
