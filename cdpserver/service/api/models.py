"""What requests hold and answers look like: the source of the OpenAPI description.

Requests are strict. Answers may gain fields: a client passes over what it does not know.
"""

from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")
Count: TypeAlias = Annotated[int, Field(ge=0)]
Natural: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A number that an operator gives and that records have room for."""

Text: TypeAlias = Annotated[str, Field(max_length=4096)]


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Answer(BaseModel):
    """The body of an answer."""

    model_config = ConfigDict(extra="allow")


class Error(Answer):
    """What is wrong, and what to do next."""

    error: str = Field(description="The class of the error.", examples=["not-found"])
    message: str
    hint: str = Field(description="The next step; may be empty.")
    exit_code: int = Field(description="The exit code of `cdp`.")


class Page(Answer, Generic[Item]):
    """One page of a list. Without `next_page_token` it is the last one."""

    items: list[Item]
    next_page_token: str | None


# --- requests


class AddDisk(Body):
    """POST /v1/disks"""

    name: Text
    size: Text | Natural = Field(description="Bytes, or a text such as 64M.")
    vm: Text | None = None
    base: Text | None = Field(None, description="The absolute path of an image on the server.")


class Resize(Body):
    """POST /v1/disks/NAME:resize"""

    size: Text | Natural = Field(description="Bytes, or a text such as 64M; not less than it has.")


class Synced(Body):
    """POST /v1/disks/NAME:synced"""

    session: Natural | None = None
    write_blocking: bool = False


class Mark(Body):
    """POST /v1/disks/NAME:mark"""

    name: Text
    freeze: bool = Field(
        False, description="Of a VM or group: freeze the guests' file systems for the instant."
    )
    or_crash: bool = Field(
        False, description="Set it also if a guest cannot be frozen, with the lesser grade."
    )


class Rebuild(Body):
    """POST /v1/disks/NAME:rebuild"""

    number: Natural


class Merge(Body):
    """POST /v1/disks/NAME:merge"""

    verb: Literal["delete", "pull", "commit"]
    point: Text = Field(description="The base point, as WHEN.", examples=["bp:7"])
    base: Text | None = Field(None, description="For pull and commit: how far down.", examples=["bp:3"])


class AddFork(Body):
    """POST /v1/forks"""

    point: Text
    name: Text


class AddLock(Body):
    """POST /v1/locks"""

    point: Text = Field(description="DISK@WHEN, or VM@WHEN or GROUP@WHEN for all their disks.")
    until: Text | None = Field(None, description="A time, or how long from now.", examples=["30d"])
    reason: Text | None = None
    immutable: bool = Field(False, description="Nobody can end it before `until`.")


class Prune(Body):
    """POST /v1/prune"""

    disk: Text | None = None


# --- answers


class Child(Answer):
    """One process of the service."""

    pid: int | None
    starts: Count


class Status(Answer):
    """The service."""

    version: str
    state_dir: str
    time_ns: Count
    children: dict[str, Child]
    disks: Count


class Store(Answer):
    """The file system that holds everything."""

    size_bytes: Count
    free_bytes: Count = Field(description="What the service may still use.")


class EventCount(Answer):
    """Events since the service started."""

    process: str
    level: str
    count: Count


class LastBasePoint(Answer):
    """The newest base point that is published."""

    number: Count
    time_ns: Count | None


class Resync(Answer):
    """A copy of a disk, or of what changed of it; the last one, or the one under way."""

    method: str = Field(
        description="full: the whole disk, compared here; bitmap: what a dirty bitmap marks; job: what QEMU's job had kept."
    )
    why: str
    under_way: bool
    done_bytes: Count
    total_bytes: Count
    sent_bytes: Count
    journalled_bytes: Count | None = Field(
        description="Payload that the journal took meanwhile; unknown where a worker ended."
    )
    pause_ns: Count = Field(description="For how long the guest was held.")


class Scrub(Answer):
    """The scrub of a disk: it verifies everything at rest, round by round."""

    under_way: bool
    ended_ns: Count | None = Field(description="When the newest whole round ended.")
    bytes: Count = Field(description="Read in this round, or in the last one.")
    damaged: Count = Field(description="Places that are damaged; `cdp check` says what they touch.")


class SeenMirror(Answer):
    """What the service, or an agent, sees of the mirror of a protected disk."""

    state: str = Field(description="waiting, starting, copying, resyncing, synced, degraded.")
    reason: str = Field(description="Why it is not in sync, where that is known.")


class SeenDisk(Answer):
    """A disk or a fork at a glance."""

    name: str
    id: str
    state: str
    size: Count | None
    clients: Count | None = Field(description="Unknown while the target does not answer.")
    grade: str | None = Field(description="Of the newest instant; none of a disk that cannot be read.")
    broken: str
    rpo_ns: Count | None = Field(
        description="What would be lost now: the age of the newest write that is whole, in order and durable."
    )
    write_ns: Count | None = Field(
        description="How long a write took in the target: the mean of the last second, if it had any."
    )
    mirror: SeenMirror | None = Field(description="Of a disk that is to be protected.")
    resync: Resync | None = Field(
        description="The last copy of a disk that the service protects, or the one under way."
    )
    lag_ns: Count = Field(description="Age of the newest instant whose content is complete; 0 in sync.")
    durable_lag_ns: Count | None = Field(
        description="Age of the oldest acknowledged write that is not durable. Unknown while the target does not answer."
    )
    tail_records: Count = Field(description="Records that the index lacks.")
    index_lag_ns: Count = Field(description="Age of the oldest of them.")
    last_base_point: LastBasePoint | None
    scrub: Scrub | None = Field(description="None of a disk that has no history yet.")
    counts: dict[str, Count] | None = Field(
        description="What the target did for the disk since it opened it; none while it has not."
    )


class Overview(Answer):
    """The service at a glance."""

    version: str
    state_dir: str
    pid: Count
    time_ns: Count
    clock_ahead_ns: int = Field(
        description="How far the server's clock is ahead of the host's; negative: behind."
    )
    started_ns: Count
    children: dict[str, Child]
    targets: dict[str, bool] = Field(description="Whether each answered in time.")
    store: Store
    events: list[EventCount]
    last_error: dict[str, Any] | None
    disks: list[SeenDisk]
    warnings: list[str] = Field(description="Worst first, each with its next step.")
    look_s: Annotated[float, Field(ge=0, description="How long it took to find out.")]


class Disk(Answer):
    """A disk or a fork."""

    name: str
    vm: str | None
    size: Count | None
    state: str
    uri: str
    uri_unix: str | None = None
    id: str
    created: str
    created_ns: Count
    session: Count
    synced: bool
    write_blocking: bool
    grade: str
    lag_ns: int
    durable_seq: Count
    last_seq: Count
    journal_bytes: Count
    points: Count
    clients: Count
    broken: str
    base: str | None = Field(None, description="What a fork stands on: DISK@seq:N.")


class Removed(Answer):
    """A disk or fork that is gone."""

    removed: str


class Observed(Answer):
    """What *synced* rests on."""

    by: Literal["operator", "qmp", "libvirt", "agent"] = Field(
        description="An operator said so; or who saw QEMU's job: a controller by QMP or through libvirt, or one of an agent."
    )
    ready: bool | None = Field(description="Of QEMU's job; null for an operator's word.")
    io_status: str | None = Field(description="Of QEMU's job; null for an operator's word.", examples=["ok"])
    time_ns: Count = Field(description="When that was seen, or said.")


class Evidence(Answer):
    """What a grade rests on: the state of the mirror, or `source` for a fork that its guest writes to itself."""

    source: Literal["fork"] | None = None
    session: Count | None = None
    synced: bool | None = None
    write_blocking: bool | None = None
    observed: Observed | None = Field(
        None, description="Null while not in sync, and where it was not written down."
    )
    frozen: bool = Field(False, description="The guest's file systems were frozen for the instant.")


class Point(Answer):
    """A recovery point, base point or bookmark."""

    kind: str
    time: str
    time_ns: Count
    seq: Count
    records: Count
    bytes: Count
    grade: str
    evidence: Evidence
    name: str | None
    locked: bool


class VmPoint(Answer):
    """An instant at which every disk of a VM or group is good."""

    kind: str
    time: str
    time_ns: Count
    records: Count
    bytes: Count
    grade: str = Field(description="That of the worst disk.")
    name: str | None = Field(description="Of a bookmark that all disks have.")
    disks: dict[str, str] = Field(description="The grade of each disk there.")
    evidence: dict[str, Evidence] = Field(description="What the grade of each disk rests on.")


class DiskUri(Answer):
    """Where a disk is written to."""

    uri: str
    uri_unix: str | None = None


class PointUri(Answer):
    """Where a point is read."""

    uri: str
    uri_unix: str | None = None
    timeline: str = Field(description="the line of history that seq counts in, whatever its name becomes")
    seq: Count
    time_ns: Count


class Dropped(Answer):
    """Something that no policy keeps."""

    what: str = Field(examples=["interval:7"])
    disk: str
    reason: str
    bytes: Count


class Lock(Answer):
    """A point that is held against everything that takes history away."""

    id: str
    disk: str
    point: str = Field(description="DISK@seq:N")
    seq: Count
    time: str
    time_ns: Count
    until: str | None = Field(description="None: until it is taken back.")
    until_ns: Count | None
    off_ns: Count = Field(
        description="Of `until`: time since the lock was set in which the host was off, or that its clock jumped over."
    )
    immutable: bool
    reason: str
    expired: bool = Field(description="It holds nothing any more, and goes with the next pass.")
    created_ns: Count


class BasePoint(Answer):
    """A published base point."""

    number: Count
    path: str
    time_ns: Count
    seq: Count


class Branch(Answer):
    """A disk, base point, fork or locked point, and what follows on it."""

    kind: Literal["disk", "bp", "fork", "point"]
    name: str = Field(examples=["bp:7"])
    time_ns: Count
    size_bytes: Count = Field(
        description="Of a base point its file, of a disk or fork all of it with its forks."
    )
    locked: bool
    children: list["Branch"]


class Merged(Answer):
    """What a merge did."""

    disk: str
    stays: str = Field(description="The base point whose file was written anew.", examples=["bp:7"])
    removed: list[str] = Field(description="Base points that are no more, oldest first.", examples=[["bp:3"]])
    freed_bytes: int


class Event(Answer):
    """Something that happened; what else it says depends on the event."""

    time: str
    level: str
    process: str
    event: str
    place: str = Field(description="Its end in the event file: what follows it is asked for by this.")


class Job(Answer):
    """Long work. Ended ones are kept until `kept_until`, the last 1000 of them, and until the service stops."""

    name: str = Field(examples=["jobs/12"])
    kind: str = Field(examples=["basepoint.cut"])
    target: str = Field(description="The disk or fork.")
    state: Literal["running", "done", "failed", "cancelled"]
    progress: Annotated[float, Field(ge=0, le=1)] | None
    result: dict[str, Any] | None = Field(description="What the request would have answered.")
    error: Error | None
    created: str
    ended: str | None
    kept_until: str | None
