"""What is kept of a trial: rows of the catalog's table `trials`.

    drill       a point is booted, and what is waited for comes or does not: the result stays
    isolated    an operator's own look at a running copy, until it is ended
    probe       forks that are lent to a program as long as it lives; the row goes with them

The row is written before the forks are made, so that a service that was killed knows what to take away.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from cdpserver.catalog import Catalog, Row
from cdpserver.catalog.rows import read_each
from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.names import format_time, show

SCHEMA = 1

Kind: TypeAlias = Literal["drill", "isolated", "probe"]
State: TypeAlias = Literal["running", "passed", "failed", "ended"]
Span: TypeAlias = Literal["export", "process", "read", "write", "ready"]

SPANS: tuple[Span, ...] = get_args(Span)

KEPT = 30
"""Trials of one VM or disk that are kept once they are over, the newest: a month of nights."""

MAX_REASON = 600

KILLED, CANCELLED = "cdpserver was ended during it", "it was cancelled"
"""Reasons of a trial that came to no end of its own."""


@dataclass(frozen=True, slots=True)
class TrialDisk:
    """One disk: the point `disk@seq:seq` of a timeline, and its fork."""

    disk: str
    timeline: str
    seq: int
    fork: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial. `time_ns` is the instant; `spans` are milliseconds since the request until each thing had happened."""

    id: str
    kind: Kind
    what: str
    command: str
    time_ns: int
    disks: tuple[TrialDisk, ...]
    created_ns: int
    state: State = "running"
    ended_ns: int = 0
    scheduled: bool = False
    slot: str = ""
    """Of a scheduled one: the day and the time of day that it is for, `2026-11-27 03:00`, by the host's clock."""
    waited_for: str = ""
    reason: str = ""
    spans: Mapping[Span, int] = field(default_factory=dict)
    owner: tuple[int, int] | None = None

    @property
    def subject(self) -> str:
        """The VM or disk."""
        return self.what.partition("@")[0]

    @property
    def was_cut_short(self) -> bool:
        """Did the service end before it did?"""
        return self.state == "failed" and self.reason in (KILLED, CANCELLED)

    @property
    def rto_ms(self) -> int | None:
        """From the request until what was waited for had come; None if it did not."""
        return self.spans.get("ready")

    def after(self, state: State, *, now_ns: int, reason: str = "") -> "Trial":
        """The trial when it is over."""
        return replace(self, state=state, ended_ns=now_ns, reason=reason[:MAX_REASON])

    def row(self) -> Row:
        """The row that says it."""
        fields: dict[str, Any] = {
            "kind": self.kind,
            "what": self.what,
            "command": self.command,
            "time_ns": self.time_ns,
            "created_ns": self.created_ns,
            "state": self.state,
            "ended_ns": self.ended_ns,
            "scheduled": self.scheduled,
            "slot": self.slot,
            "waited_for": self.waited_for,
            "reason": self.reason,
            "spans": dict(self.spans),
            "owner": None if self.owner is None else list(self.owner),
            "disks": [
                {"disk": one.disk, "timeline": one.timeline, "seq": one.seq, "fork": one.fork}
                for one in self.disks
            ],
        }
        return Row(self.id, SCHEMA, fields)

    def brief(self) -> dict[str, Any]:
        """What a list of points says of it."""
        return {
            "id": self.id,
            "state": self.state,
            "rto_ms": self.rto_ms,
            "created": format_time(self.created_ns),
        }

    def describe(self) -> dict[str, Any]:
        """The trial as the API shows it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "what": self.what,
            "time": format_time(self.time_ns),
            "state": self.state,
            "rto_ms": self.rto_ms,
            **{f"{span}_ms": self.spans.get(span) for span in SPANS},
            "waited_for": self.waited_for,
            "reason": self.reason,
            "scheduled": self.scheduled,
            "created": format_time(self.created_ns),
            "ended": format_time(self.ended_ns) if self.ended_ns else None,
            "disks": [{"point": f"{one.disk}@seq:{one.seq}", "fork": one.fork} for one in self.disks],
        }


def read(row: Row) -> Trial:
    """What a row says; CorruptError."""
    fields = row.fields
    try:
        if row.schema != SCHEMA:
            raise ValueError(f"its schema is {row.schema}")
        owner = fields["owner"]
        return Trial(
            id=row.id,
            kind=_one_of(fields["kind"], Kind),
            what=str(fields["what"]),
            command=str(fields["command"]),
            time_ns=int(fields["time_ns"]),
            disks=tuple(
                TrialDisk(str(one["disk"]), str(one["timeline"]), int(one["seq"]), str(one["fork"]))
                for one in fields["disks"]
            ),
            created_ns=int(fields["created_ns"]),
            state=_one_of(fields["state"], State),
            ended_ns=int(fields["ended_ns"]),
            scheduled=bool(fields["scheduled"]),
            slot=str(fields.get("slot", "")),
            waited_for=str(fields["waited_for"]),
            reason=str(fields["reason"]),
            spans={_one_of(name, Span): int(value) for name, value in fields["spans"].items()},
            owner=None if owner is None else (int(owner[0]), int(owner[1])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptError(
            f"the catalog's row {row.id} of a trial cannot be read: {error}",
            hint="its forks, if any, are there all the same: cdp fork list",
        ) from None


def _one_of(word: Any, words: Any) -> Any:
    if word not in get_args(words):
        raise ValueError(f"{word!r} is not known")
    return word


def all_of(catalog: Catalog) -> list[Trial]:
    """Every trial whose row can be read, oldest first."""
    found, _ = read_each(catalog.rows("trials").values(), read)
    return sorted(found, key=lambda one: (one.created_ns, one.id))


def unreadable(catalog: Catalog) -> list[CorruptError]:
    """What is wrong with the other rows."""
    return read_each(catalog.rows("trials").values(), read)[1]


def find(catalog: Catalog, id: str) -> Trial:
    """The trial of this id. NotFoundError."""
    row = catalog.row("trials", id)
    if row is None:
        raise NotFoundError(
            f"there is no trial {show(id)}", hint="list them: cdp point drills, cdp recover list"
        )
    return read(row)


def new_id(kind: Kind, taken: Iterable[str]) -> str:
    """An id that no trial has."""
    used = set(taken)
    while (id := f"{kind}-{secrets.token_hex(4)}") in used:
        continue
    return id


def too_many(trials: Iterable[Trial], subject: str) -> list[str]:
    """The ids of those of a VM or disk that are over and not among the newest that are kept."""
    over = [one for one in trials if one.subject == subject and one.state != "running"]
    return [one.id for one in sorted(over, key=lambda one: one.created_ns)[:-KEPT]]


def drilled(trials: Iterable[Trial], timeline: str) -> list[tuple[int, Trial]]:
    """(seq, drill) of the drills of a timeline's points, oldest drill first."""
    return sorted(
        (
            (disk.seq, one)
            for one in trials
            if one.kind == "drill"
            for disk in one.disks
            if disk.timeline == timeline
        ),
        key=lambda pair: pair[1].created_ns,
    )
