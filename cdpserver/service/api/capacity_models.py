"""What answers about room look like: a part of `models`. Bytes are those that files use on the file system."""

from pydantic import Field

from cdpserver.service.api.models import Answer, Count


class DiskUsage(Answer):
    """What a disk takes, by kind, and how fast that grows."""

    disk: str
    id: str
    state: str
    bytes: Count
    base: Count = Field(description="The first copy.")
    data: Count
    headers: Count
    index: Count
    base_points: Count
    maps: Count
    other: Count
    per_hour: int | None = Field(
        description="Growth in the last 24 hours; null where history is shorter than a minute."
    )
    journal_per_hour: int | None
    base_points_per_hour: int | None
    held_ns: Count = Field(description="How far back the journal reaches without a break.")
    error: str | None


class Cap(Answer):
    """A limit, and how far it is."""

    of: str = Field(examples=["disk web/vda", "store", "file system"])
    bytes: Count
    cap_bytes: Count
    then: str = Field(description="shorten, refuse, or full.")
    in_ns: Count | None = Field(
        description="Until it is reached, at the soonest; 0 is now, null never at this growth."
    )


class Usage(Answer):
    """What all disks take, or one of them."""

    time_ns: Count
    disks: list[DiskUsage]
    images: Count = Field(description="Base images, which disks share.")
    free: Count
    caps: list[Cap]


class ThinnedInstants(Answer):
    """What a step of keep_rp takes."""

    span_ns: Count
    every_ns: Count
    count: Count
    bytes: Count


class InstantsForecast(Answer):
    """What instants take: all of every_instant_ns, then those of thinned history."""

    bytes: Count
    measured: Count = Field(description="In the journal now.")
    extrapolated: Count
    per_hour: Count
    every_instant_ns: Count
    thinned: list[ThinnedInstants]


class Gap(Answer):
    """Base points that far from the one below."""

    gap_ns: Count
    count: Count
    bytes_each: Count


class BasePointsForecast(Answer):
    """What base points take, without the tables of their files."""

    bytes: Count
    count: Count
    oldest_bytes: Count
    measured_ns: Count = Field(description="Longer gaps are extrapolated.")
    gaps: list[Gap]


class Sample(Answer):
    """Distinct bytes written within a window, on average over the places looked at."""

    window_ns: Count
    bytes: Count
    least: Count
    most: Count
    places: Count
    records: Count


class Forecast(Answer):
    """What a policy would need, estimated from the disk's own journal."""

    disk: str
    time_ns: Count
    keep: str
    keep_bp: str
    bp_every: str
    held_ns: Count
    rp: InstantsForecast
    bp: BasePointsForecast
    base: Count
    bytes: Count
    bytes_now: Count
    size_cap: Count | None
    fits: bool | None
    samples: list[Sample]
