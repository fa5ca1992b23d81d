"""A point: a place in a journal that has a name, a file or a second of its own. Pure."""

from dataclasses import dataclass
from typing import Any

from cdpserver.index.build import SECOND_NS
from cdpserver.index.store import PointRow
from cdpserver.journal import control
from cdpserver.journal.control import Grade
from cdpserver.journal.observed import Observed
from cdpserver.names import format_time

KINDS = ("rp", "bp", "bookmark")
"""In the order in which points of one seq are listed."""


@dataclass(frozen=True, slots=True)
class Point:
    """A place in a journal that has a name or a second of its own."""

    kind: str
    time_ns: int
    seq: int
    records: int
    bytes: int
    grade: Grade
    name: str | None
    session: int
    evidence: int
    observed: Observed
    locked: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The point as the CLI and the API show it."""
        return {
            "kind": self.kind,
            "time": format_time(self.time_ns),
            "time_ns": self.time_ns,
            "seq": self.seq,
            "records": self.records,
            "bytes": self.bytes,
            "grade": self.grade.label,
            "evidence": control.show_evidence(
                self.session, self.evidence, self.observed, frozen=self.grade == Grade.APP
            ),
            "name": self.name,
            "locked": self.locked,
        }


def slot_seconds(every_ns: int) -> int:
    """Whole seconds that share a recovery point: the index has one row a second."""
    return max(1, -(-every_ns // SECOND_NS))


def recovery_point(row: PointRow, observed: Observed) -> Point:
    """The point of a second, or of several that share one; `observed` is what counted then."""
    grade, size, evidence = Grade(row.grade), row.payload_bytes, row.evidence
    at_ns, seq = row.last_time_ns, row.last_seq
    return Point("rp", at_ns, seq, row.records, size, grade, None, row.session, evidence, observed)
