"""What the API takes from agents, and gives them."""

from typing import Any, Literal

from pydantic import Field

from cdpserver.service.api.models import Answer, Body, Text
from cdpserver.service.api.models import Count as Counted

MAX = 1 << 62


class ThereDisk(Body):
    """A disk as it was found on an agent's host."""

    name: Text
    device: Text
    size: int = Field(gt=0, lt=MAX)


class ProtectThere(Body):
    """PUT /v1/agents/AGENT/vms/VM"""

    qmp: Text | None = None
    libvirt: Text | None = None
    domain: Text | None = None
    disks: list[ThereDisk]
    wait: bool = False
    drive_mirror: bool = False
    waits: bool = Field(False, description="The VM is still to move into that QEMU.")


class SeenCopy(Body):
    """A copy as an agent sees it."""

    method: Literal["full", "bitmap", "job"]
    why: str
    under_way: bool
    done_bytes: int = Field(ge=0, lt=MAX)
    total_bytes: int = Field(ge=0, lt=MAX)
    sent_bytes: int = Field(ge=0, lt=MAX)
    journalled_bytes: int | None = Field(ge=0, lt=MAX)
    pause_ns: int = Field(ge=0, lt=MAX)


class SeenMirror(Body):
    """A disk as an agent sees it."""

    name: Text
    state: Literal["waiting", "starting", "copying", "resyncing", "synced", "degraded"]
    reason: str
    node: str
    bitmap: str
    behind_ns: int | None = Field(None, ge=0, lt=MAX)
    resync: SeenCopy | None = None


class SeenVm(Body):
    """A VM as an agent sees it."""

    vm: Text
    disks: list[SeenMirror]


class ComingVm(Body):
    """A VM that an agent waits for."""

    vm: Text
    reason: str


class SeenEvent(Body):
    """An event that an agent puts on record."""

    event: Text
    fields: dict[str, Any] = Field(default_factory=dict)


class Report(Body):
    """POST /v1/agents/AGENT:report"""

    vms: list[SeenVm]
    events: list[SeenEvent] = Field(default_factory=list)
    coming: list[ComingVm] = Field(default_factory=list)


class SeenJob(Body):
    """What QEMU showed of its job."""

    ready: bool
    io_status: str = Field(max_length=64)
    ago_ns: int = Field(ge=0, lt=MAX)


class SyncedMirror(Body):
    """POST /v1/mirror:synced"""

    disk: Text
    session: int = Field(ge=0, lt=MAX)
    bitmap: str = ""
    seen: SeenJob | None = None


class LostMirror(Body):
    """POST /v1/mirror:lost"""

    disk: Text
    session: int = Field(ge=0, lt=MAX)
    reason: str
    whole_ns: int | None = Field(
        None, ge=0, lt=MAX, description="When it was whole last, on the server's clock."
    )
    freed_ns: int | None = Field(None, ge=0, lt=MAX, description="When its guest was let go on, likewise.")


class HeldPlace(Body):
    """POST /v1/mirror:holds"""

    disk: Text
    place: Text


class SizedMirror(Body):
    """POST /v1/mirror:size"""

    disk: Text
    size: int = Field(gt=0, lt=MAX)


class Taken(Answer):
    """What was taken of a report."""

    taken: Counted


class ArrivedVm(Answer):
    """A VM that is an agent's now."""

    vm: str


class Held(Answer):
    """Whether a place is in the history of a disk."""

    holds: bool


class Done(Answer):
    """It is done."""

    disk: str


class MirrorSaid(Answer):
    """What a worker says of a disk."""

    session: Counted
    synced: bool
    last_seq: Counted
    gap_until_ns: Counted
    anchor: str
    anchored: bool
    payload_bytes: Counted
    place: str


class MirrorSide(Answer):
    """Our side of a mirror."""

    uuid: str
    uris: dict[str, str]
    said: MirrorSaid
    time_ns: int = Field(description="The server's clock, when this was asked.")


class WantedDisk(Answer):
    """A disk to protect."""

    name: str
    device: str


class WantedVm(Answer):
    """A VM that an agent is to protect."""

    vm: str
    connection: dict[str, str]
    disks: list[WantedDisk]
    created_ns: Counted
    method: str
    wait: bool
    guest_agent: str | None
    by: str
    coming: bool = Field(description="It is to move there: it is waited for.")
