"""What the controller of a VM asks and says of our side of a mirror, wherever that is."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class TargetState:
    """What our side says of a disk.

    session       0 has not begun
    last_seq      of the newest record; 0 before its history begins
    gap_ns        time of the last gap, 0 without one
    anchor        the source's dirty bitmap that it is anchored to, or was; "" for none
    anchored      nothing but the source's mirror has written since
    payload_bytes put into the journal since it was opened
    place         in its history, now; "" while it is not open
    """

    session: int
    synced: bool
    last_seq: int = 0
    gap_ns: int = 0
    anchor: str = ""
    anchored: bool = False
    payload_bytes: int = 0
    place: str = ""

    @classmethod
    def read(cls, said: dict[str, Any]) -> "TargetState":
        """From what a worker says of a disk."""
        return cls(
            session=int(said.get("session", 0)),
            synced=bool(said.get("synced")),
            last_seq=int(said.get("last_seq", 0)),
            gap_ns=int(said.get("gap_until_ns", 0)),
            anchor=str(said.get("anchor", "")),
            anchored=bool(said.get("anchored")),
            payload_bytes=int(said.get("payload_bytes", 0)),
            place=str(said.get("place", "")),
        )

    def as_dict(self) -> dict[str, Any]:
        """What `read` reads."""
        return {
            "session": self.session,
            "synced": self.synced,
            "last_seq": self.last_seq,
            "gap_until_ns": self.gap_ns,
            "anchor": self.anchor,
            "anchored": self.anchored,
            "payload_bytes": self.payload_bytes,
            "place": self.place,
        }


@dataclass(frozen=True, slots=True)
class SeenJob:
    """What QEMU showed of its job, `ago_ns` ago, that "in sync" rests on; `by` as in `journal.observed.Observed`."""

    ready: bool
    io_status: str
    ago_ns: int
    by: str

    def as_dict(self) -> dict[str, Any]:
        """For the wire."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ago:
    """How long ago the mirror was seen whole last, and the guest let go on without a target that hung; None for never."""

    whole_ns: int | None
    freed_ns: int | None = None

    @classmethod
    def of(cls, now: float, *, whole_at: float | None, freed_at: float | None) -> "Ago":
        """From times of one clock, in seconds."""
        return cls(*(None if at is None else int((now - at) * 1e9) for at in (whole_at, freed_at)))


@dataclass(frozen=True, slots=True)
class At:
    """When that was, on the server's clock. Said to who may hear it late."""

    whole_ns: int | None
    freed_ns: int | None = None

    @classmethod
    def of(cls, ago: Ago, *, now_ns: int) -> "At":
        """`now_ns` may be earlier than it is, and not later: a gap rather begins too early."""
        return cls(*(None if ns is None else max(0, now_ns - ns) for ns in (ago.whole_ns, ago.freed_ns)))


class Target(Protocol):
    """Our side of a mirror. Every method but `hung_s` may raise CdpError."""

    async def identity(self, disk: str) -> tuple[str, str]:
        """(uuid of its timeline, URI that a mirror on this host writes to)."""
        ...

    async def check_size(self, disk: str, size: int) -> None:
        """The disk has this size from here on. RefusedError if that would lose something."""
        ...

    async def state(self, disk: str) -> TargetState:
        """What it says of itself."""
        ...

    async def holds(self, disk: str, place: str) -> bool:
        """Is this place in its history? False for an older copy of it, and for one that lost it and went on."""
        ...

    async def synced(self, disk: str, session: int, bitmap: str = "", *, seen: SeenJob | None = None) -> None:
        """The mirror is in sync and write-blocking, as was `seen`. RefusedError for a session that is over.

        With `bitmap` said again: from now on source and target differ where that marks, and nowhere else.
        """
        ...

    async def lost(self, disk: str, session: int, reason: str, *, ago: Ago) -> None:
        """Writes of the guest did not arrive: a gap, from at most `ago.whole_ns` ago, and points are unordered after it.

        Nothing if that is on record, or if the disk was not in sync before.
        """
        ...

    def hung_s(self, disk: str) -> float:
        """For how long the target has not answered; 0.0 if it does, or is not there to answer."""
        ...

    def emit(self, event: str, **fields: Any) -> None:
        """Put an event on record."""
        ...
