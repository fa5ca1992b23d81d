"""Control records and the state that they fold into.

What points mean is in the journal itself: where sessions begin, when they are synced, where base points were cut,
where a gap is. `fold` turns one state and one control record into the next state; nothing else decides a grade.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from typing import Any

import msgpack

from cdpserver import messages
from cdpserver.errors import CorruptError
from cdpserver.journal.observed import NOT_WRITTEN, Observed, read_observed
from cdpserver.limits import MAX_DISK_SIZE, SECTOR


class Grade(IntEnum):
    """What a point is worth, worst first."""

    UNORDERED = 0
    CRASH = 1
    APP = 2

    @property
    def label(self) -> str:
        """The word an operator sees."""
        return self.name.lower()


SYNCED, WRITE_BLOCKING, FORK = 1, 2, 4

FIRST_WRITE = "first write"
"""Reason of a session that begins because a connection wrote for the first time, whoever that is."""


@dataclass(frozen=True, slots=True)
class State:
    """A timeline's state after some record.

    session        number of the current session, 0 before the first
    synced         the mirror of this session is complete
    write_blocking a controller said that the mirror is write-blocking
    fork           a fork's guest writes to it directly: ordered from the start, until a mirror's session begins
    cuts           base points cut so far; the next one has this number
    resync_ref     seq before the session began: what a resync compares with; -1 when none is under way
    gap_until_ns   time at which the last gap of lost records ended, 0 without one
    gap_open       writes of the guest that were not received are missing, and none has come since
    size           bytes of the disk since it last grew, 0 if it never did: then `timeline.json` has them
    anchor         the dirty bitmap at the source that a controller anchored last, "" for none: what differed from the source at
                   that record, and what the guest wrote since, is marked in it
    anchored       nothing but the source's mirror has written since
    observed       what *synced* of this session rests on
    """

    session: int = 0
    synced: bool = False
    write_blocking: bool = False
    fork: bool = False
    cuts: int = 0
    resync_ref: int = -1
    gap_until_ns: int = 0
    gap_open: bool = False
    size: int = 0
    anchor: str = ""
    anchored: bool = False
    observed: Observed = NOT_WRITTEN

    @property
    def grade(self) -> Grade:
        """The grade of a point in this state."""
        ordered = self.fork or (self.synced and self.write_blocking)
        return Grade.CRASH if ordered else Grade.UNORDERED

    @property
    def evidence(self) -> int:
        """What the grade rests on, as bits: SYNCED, WRITE_BLOCKING, FORK."""
        return SYNCED * self.synced | WRITE_BLOCKING * self.write_blocking | FORK * self.fork


def shown(state: State, *, frozen: bool = False) -> dict[str, Any]:
    """Why instants in this state have their grade."""
    return show_evidence(state.session, state.evidence, state.observed, frozen=frozen)


def show_evidence(session: int, evidence: int, observed: Observed, *, frozen: bool = False) -> dict[str, Any]:
    """Why a point has its grade, for people and programs; `frozen`: the guest's file systems were, for the instant."""
    if evidence & FORK:
        return {"source": "fork", "frozen": frozen}
    synced, ordered = bool(evidence & SYNCED), bool(evidence & WRITE_BLOCKING)
    said = {"session": session, "synced": synced, "write_blocking": ordered, "frozen": frozen}
    return said | {"observed": observed.as_dict() if synced else None}


def pack(state: State) -> dict[str, Any]:
    """The state as plain values for a header page; `size` only of a disk that has grown, `gap_open` only in a gap, an anchor and
    what was observed only where they are.
    """
    values = asdict(state)
    if not state.gap_open:
        del values["gap_open"]
    if not state.size:
        del values["size"]
    if not state.anchor:
        del values["anchor"], values["anchored"]
    if not state.observed.by:
        del values["observed"]
    return values


def unpack(values: object) -> State:
    """The state from a header page's `carry`."""
    try:
        state = State(**values)  # type: ignore[arg-type]
        if "observed" in values:  # type: ignore[operator]
            state = replace(state, observed=read_observed(state.observed, "a header page's carry"))
    except TypeError as error:
        raise CorruptError(f"a header page's carry cannot be read: {error}") from error
    for field in fields(State):
        if type(getattr(state, field.name)) is not field.type:
            raise CorruptError(f"a header page's carry has a {field.name} that cannot be read")
    if state.size:
        _check_size(state.size, "a header page's carry")
    return state


def begin(mode: str, number: int = 0) -> dict[str, Any]:
    """First record of a history; mode is `first-copy`, `image` or `point`; `number` the session under way."""
    return {"type": "begin", "mode": mode, "session": number}


def session(number: int, reason: str) -> dict[str, Any]:
    """From here points are unordered until *synced* is said for session `number`."""
    return {"type": "session", "session": number, "reason": reason}


def synced(
    number: int,
    *,
    write_blocking: bool,
    bitmap: str = "",
    direct: bool = False,
    observed: Observed = NOT_WRITTEN,
) -> dict[str, Any]:
    """The mirror of session `number` is complete; `bitmap` is the source's that marks what is written from here on.

    `direct`: from here a fork's guest writes to it itself, without a mirror.
    """
    message: dict[str, Any] = {"type": "synced", "session": number, "write_blocking": write_blocking}
    if observed.by:
        message["observed"] = asdict(observed)
    return message | ({"bitmap": bitmap} if bitmap else {}) | ({"direct": True} if direct else {})


def mark(name: str, *, at: tuple[int, int] | None = None, grade: Grade | None = None) -> dict[str, Any]:
    """A bookmark of this record; or of an earlier one of its interval, `at` (seq, time), that has this grade."""
    message: dict[str, Any] = {"type": "mark", "name": name}
    if at is not None:
        message |= {"at_seq": at[0], "at_time_ns": at[1]}
    if grade is not None:
        message["grade"] = int(grade)
    return message


def marked(message: dict[str, Any], *, seq: int, time_ns: int) -> tuple[int, int]:
    """(seq, time) of the instant that a mark, which is the record `seq`, names."""
    return message.get("at_seq", seq), message.get("at_time_ns", time_ns)


def marked_grade(message: dict[str, Any], state: State) -> Grade:
    """The grade of the instant that a mark names, by what was known when it was set; `state` is that after the mark."""
    grade = message.get("grade")
    return state.grade if grade is None else Grade(grade)


def cut(number: int) -> dict[str, Any]:
    """Base point `number` is the view at this record."""
    return {"type": "cut", "number": number}


def gap(*, from_seq: int, from_time_ns: int, reason: str) -> dict[str, Any]:
    """Acknowledged records after `from_seq` may be lost up to this record."""
    return {"type": "gap", "from_seq": from_seq, "from_time_ns": from_time_ns, "reason": reason}


def missed(*, from_time_ns: int, until_time_ns: int, reason: str) -> dict[str, Any]:
    """Writes of the guest after `from_time_ns` were not received until `until_time_ns`; 0: nor are those that follow this record,
    up to the next first write.
    """
    message = {"type": "missed", "from_time_ns": from_time_ns, "until_time_ns": until_time_ns}
    return message | {"reason": reason}


def missed_spans(controls: Iterable[tuple[int, int, dict[str, Any]]]) -> list[tuple[int, int]]:
    """The (from, until) between which writes were missing, as these (seq, time, message) say afterwards; neither is in it."""
    return [
        (message["from_time_ns"], message["until_time_ns"] or said_ns)
        for _, said_ns, message in controls
        if message["type"] == "missed"
    ]


def is_inside(spans: Iterable[tuple[int, int]], time_ns: int) -> bool:
    """Is this time between the two of one of them?"""
    return any(from_ns < time_ns < until_ns for from_ns, until_ns in spans)


def grow(size: int) -> dict[str, Any]:
    """From here the disk has `size` bytes. Always the first record of its segment."""
    return {"type": "grow", "size": size}


def encode(message: dict[str, Any]) -> bytes:
    """A control record's payload."""
    return bytes(msgpack.packb(message))


FIELDS: dict[str, dict[str, type]] = {
    "begin": {"mode": str, "session": int},
    "session": {"session": int, "reason": str},
    "synced": {"session": int, "write_blocking": bool},
    "mark": {"name": str},
    "cut": {"number": int},
    "gap": {"from_seq": int, "from_time_ns": int, "reason": str},
    "missed": {"from_time_ns": int, "until_time_ns": int, "reason": str},
    "grow": {"size": int},
}
"""What each type of message carries (docs/format.md)."""

OPTIONAL: dict[str, tuple[str, ...]] = {"mark": ("at_seq", "at_time_ns", "grade")}
"""Numbers that it may carry besides."""


def decode(payload: bytes) -> dict[str, Any]:
    """A control record's message; CorruptError unless it is a map with a type and, of a known type, its fields."""
    message = messages.unpack(payload, "a control record's payload")
    kind = message.get("type")
    if not isinstance(kind, str):
        raise CorruptError("a control record's payload has no type")
    for name, wanted in FIELDS.get(kind, {}).items():
        if type(message.get(name)) is not wanted:
            raise CorruptError(f"the control record {kind!r} has no {name} that can be read")
    for name in OPTIONAL.get(kind, ()):
        value = message.get(name, 0)
        if type(value) is not int or value < 0 or (name == "grade" and value > max(Grade)):
            raise CorruptError(f"the control record {kind!r} has a {name} that cannot be read")
    if kind == "grow":
        _check_size(message["size"], "a control record")
    if kind == "synced" and type(message.get("bitmap", "")) is not str:
        raise CorruptError("the control record 'synced' has no bitmap that can be read")
    if kind == "synced" and "observed" in message:
        read_observed(message["observed"], "the control record 'synced'")
    return message


def _check_size(size: int, where: str) -> None:
    if not 0 < size <= MAX_DISK_SIZE or size % SECTOR:
        raise CorruptError(f"{where} says that the disk has {size} bytes, which none can have")


def fold(state: State, message: dict[str, Any], *, seq: int, time_ns: int) -> State:
    """The state after the control record `message` with this seq and time. Unknown types change nothing."""
    match message["type"]:
        case "begin":
            ref = 0 if message["mode"] == "image" else -1
            return replace(state, session=message["session"], fork=message["mode"] == "point", resync_ref=ref)
        case "session":
            # A resync under way goes on comparing with what was there before it began.
            ref = state.resync_ref if state.resync_ref >= 0 else seq - 1
            return replace(
                state,
                session=message["session"],
                synced=False,
                write_blocking=False,
                fork=False,
                observed=NOT_WRITTEN,
                resync_ref=ref,
                gap_open=state.gap_open and message["reason"] != FIRST_WRITE,
                # A connection that is lost, or a mirror's word that it lost something, changes nothing here.
                anchored=state.anchored and message["reason"] != FIRST_WRITE,
            )
        case "synced":
            bitmap = message.get("bitmap", "")
            # Said again, as for another bitmap, it may rest on what was seen before.
            seen = message.get("observed")
            return replace(
                state,
                synced=True,
                write_blocking=message["write_blocking"],
                resync_ref=-1,
                gap_open=False,
                anchor=bitmap or state.anchor,
                anchored=bool(bitmap) or state.anchored,
                fork=message.get("direct") is True,
                observed=state.observed if seen is None else Observed(**seen),
            )
        case "cut":
            return replace(state, cuts=message["number"] + 1)
        case "gap":
            return replace(
                state,
                synced=False,
                write_blocking=False,
                observed=NOT_WRITTEN,
                gap_until_ns=time_ns,
                anchor="",
                anchored=False,
            )
        case "missed":
            return replace(state, gap_open=state.gap_open or not message["until_time_ns"])
        case "grow":
            return replace(state, size=message["size"], anchored=False)
        case _:
            return state
