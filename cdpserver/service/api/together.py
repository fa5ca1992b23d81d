"""Models of what several disks have in common: answers for VMs and groups."""

from pydantic import Field

from cdpserver.service.api.models import Answer, Body, Count, Disk, Evidence, Lock, Text, VmPoint


class Members(Body):
    """PUT and DELETE /v1/groups/GROUP"""

    members: list[Text] = Field(description="Names of VMs and disks.", examples=[["web", "db/vda"]])


class Group(Answer):
    """VMs and disks that are cut at one instant."""

    name: str
    members: list[str]
    created_ns: Count
    disks: list[str] = Field(description="The disks that these are now.")
    problem: str | None = Field(description="Why the group has no points, such as a member that is gone.")


class Shown(Answer):
    """One instant of a disk."""

    name: str
    point: str = Field(description="DISK@seq:N")
    time: str
    time_ns: Count
    seq: Count
    grade: str
    evidence: Evidence
    names: list[str] = Field(description="Bookmarks and base points there.")
    locked: bool


class Several(Answer):
    """One instant of all disks of a VM or group."""

    name: str
    point: str = Field(description="VM@TIME or GROUP@TIME")
    time: str
    time_ns: Count
    grade: str = Field(description="That of the worst disk.")


class PlacedDisk(Answer):
    """What one disk shows at the instant."""

    disk: str
    point: str = Field(description="DISK@seq:N")
    timeline: str
    seq: Count
    time_ns: Count = Field(description="Of its newest record then.")
    grade: str
    evidence: Evidence


class PlacedUri(PlacedDisk):
    """The same, and where it is read."""

    uri: str
    uri_unix: str | None = None


class SeveralShown(Several):
    """The instant, disk by disk."""

    disks: list[PlacedDisk]


class SeveralUris(Several):
    """Where each disk is read."""

    disks: list[PlacedUri]


class SeveralForks(Several):
    """A fork for each disk."""

    forks: list[Disk]


class SeveralLocks(Several):
    """A lock for each disk."""

    locks: list[Lock]


class Marked(VmPoint):
    """A bookmark of all disks."""

    of: str = Field(description="The VM or group.")
    reason: str = Field(description="Why guests that were to be frozen were not; empty if they were.")


class Rpo(Answer):
    """What could have been lost of a disk in one second, or at worst in one minute."""

    disk: str
    time: str
    time_ns: Count
    span_ns: Count
    rpo_ns: Count | None = Field(
        description="What a loss of source and host would have cost; none: not known."
    )
    lag_ns: Count = Field(description="Age of the newest instant whose content was complete.")
    durable_lag_ns: Count | None
    received_seq: Count
    durable_seq: Count
    write_ns: Count = Field(description="How long a write took in the target.")
    grade: str
    resync: bool
