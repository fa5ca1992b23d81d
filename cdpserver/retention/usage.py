"""What every disk takes, by kind, how fast that grows, and when a cap is reached. From the files alone; nothing is changed.

Bytes are those that files use on the file system, not how long they are.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cdpserver import durable, timeline
from cdpserver.catalog import Catalog, Entry
from cdpserver.chain.holds import now_ns as clock_ns
from cdpserver.config import Config
from cdpserver.errors import CdpError, NotFoundError, RefusedError
from cdpserver.index.merged import DIRECTORY as MERGED
from cdpserver.journal.log import Journal, interval_path
from cdpserver.nodes import NUMBERED, base_point_path, nodes
from cdpserver.retention import policies
from cdpserver.retention.growth import HOUR_NS, Part, Span, held_ns, hours_until, made_per_hour, per_hour
from cdpserver.retention.policy import REFUSE, SHORTEN, Effective, Policy
from cdpserver.retention.slots import span_ns
from cdpserver.state import StateDir

KINDS = ("base", "data", "headers", "index", "base_points", "maps", "other")
CAPPED = ("base", "data", "headers", "index", "base_points")
"""What a cap counts."""

FULL = "full"
"""What happens when the file system has no room left: every write to it fails."""


@dataclass(frozen=True, slots=True)
class Usage:
    """One disk. `journal_per_hour` and `base_points_per_hour` are None where history is too short to say.

    `problem`: why something that would be said of it is not.
    """

    disk: str
    id: str
    state: str
    kinds: dict[str, int]
    spans: tuple[Span, ...] = ()
    held_ns: int = 0
    size: int = 0
    journal_per_hour: float | None = None
    base_points_per_hour: float | None = None
    policy: Policy | None = None
    problem: CdpError | None = None

    @property
    def bytes(self) -> int:
        """All that its files take."""
        return sum(self.kinds.values())

    @property
    def capped_bytes(self) -> int:
        """What a cap counts of that."""
        return sum(self.kinds[kind] for kind in CAPPED)

    def parts(self) -> list[Part]:
        """What it takes, as parts that grow until the policy drops as much as comes."""
        fixed = self.kinds["base"]
        journal = sum(self.kinds[kind] for kind in ("data", "headers", "index"))
        points = self.kinds["base_points"]
        if self.policy is None:
            return [Part(self.capped_bytes, 0.0, self.capped_bytes)]
        keep = self.policy.keep_rp_ns
        journal_rate, points_rate = self.journal_per_hour or 0.0, self.base_points_per_hour or 0.0
        # Whole intervals go: the oldest stays until its last instant may.
        journal_limit = journal_rate * (keep + self.policy.bp_every_ns) / HOUR_NS
        # Merged base points never hold more than they held apart; how much less, `cdp forecast` says.
        points_limit = points_rate * max(keep, span_ns(self.policy.keep_bp)) / HOUR_NS
        return [
            Part(fixed, 0.0, fixed),
            Part(journal, journal_rate, max(journal, journal_limit)),
            Part(points, points_rate, max(points, points_limit)),
        ]


@dataclass(frozen=True, slots=True)
class Cap:
    """A limit, how much of it is used, what happens there, and in how many hours at the soonest (None: not by this growth)."""

    of: str
    bytes: int
    cap_bytes: int
    then: str
    hours: float | None


@dataclass(frozen=True, slots=True)
class Store:
    """Everything: the disks, the images that they share, the caps."""

    now_ns: int
    disks: tuple[Usage, ...]
    images_bytes: int
    free_bytes: int
    caps: tuple[Cap, ...] = field(default=())


def _kind(name: str, *, in_interval: bool) -> str:
    _, dot, suffix = name.rpartition(".")
    if in_interval:
        kind = {"data": "data", "log": "headers"}.get(suffix)
        return kind or ("index" if dot and suffix.startswith("mdb") else "other")
    if NUMBERED.fullmatch(name):
        return "base_points"
    if name.startswith("bp-") and suffix in ("map", "json"):
        return "maps"
    return "base" if name == "base.raw" else "other"


def by_kind(directory: Path) -> dict[str, int]:
    """Bytes of a timeline's files by kind. What goes away meanwhile counts nothing."""
    found = dict.fromkeys(KINDS, 0)
    for folder, _, names in os.walk(directory):
        for name in names:
            in_interval = Path(folder).parent == directory / timeline.INTERVALS
            merged = Path(folder) == directory / MERGED
            kind = "index" if merged else _kind(name, in_interval=in_interval)
            found[kind] += durable.used_bytes(os.path.join(folder, name))
    return found


def spans(journal: Journal) -> Iterator[Span]:
    """The intervals of a journal, oldest first. CorruptError for one that cannot be read."""
    for number in journal.intervals:
        first = journal.first_reader(number)
        last = journal.last_reader(number)
        with os.scandir(interval_path(journal.timeline, number)) as files:
            size = sum(durable.used_bytes(file.path) for file in files)
        last_ns = last.time_of(last.count - 1) if last.count else last.header.first_time_ns
        yield Span(number, first.header.first_time_ns, last_ns, size, first.header.every_ns)


def read_spans(directory: Path) -> tuple[Span, ...]:
    """The intervals of a timeline; () before its first copy has ended. CorruptError; RefusedError while history is dropped."""
    try:
        journal = Journal(directory)
        try:
            if not journal.empty:
                journal.newest()
            return journal.settled(lambda: tuple(spans(journal)))
        finally:
            journal.close()
    except FileNotFoundError as error:
        raise RefusedError(
            f"history of timeline {directory.name} went away meanwhile: {error.filename}",
            hint="try again; cdp check DISK if it stays so",
        ) from None


def _size(directory: Path) -> int:
    """Bytes that a disk has grown to; 0 if it has not."""
    journal = Journal(directory)
    try:
        return journal.grown_to()
    finally:
        journal.close()


def measure(state: StateDir, entry: Entry, policy_of: Callable[[Entry], Effective], *, now_ns: int) -> Usage:
    """One disk. Never fails for what its files hold: that is its `problem`."""
    directory = state.timeline(entry.id)
    kinds = by_kind(directory)
    if entry.state != "live":
        return Usage(entry.name, entry.id, entry.state, kinds)
    try:
        found = timeline.load(directory)
        effective = policy_of(entry)
        held = read_spans(directory)
        size = _size(directory) or found.size
    except CdpError as error:
        return Usage(entry.name, entry.id, entry.state, kinds, problem=error)
    # Where nobody knows the time, or it was set back, it is that of the newest record.
    now = max(now_ns, held[-1].last_ns) if held else now_ns
    made = [
        (node.time_ns, durable.used_bytes(base_point_path(directory, node.number)))
        for node in nodes(directory)
    ]
    return Usage(
        entry.name,
        entry.id,
        entry.state,
        kinds,
        held,
        held_ns(held, now),
        size,
        per_hour(held, now),
        made_per_hour(made, held, now),
        effective.policy,
        effective.problem,
    )


def caps(disks: list[Usage], *, store_cap: int | None, free_bytes: int) -> list[Cap]:
    """Every limit there is: each disk's, the store's, the file system's."""
    found = []
    for disk in disks:
        if disk.policy is not None and disk.policy.size_cap is not None:
            cap = disk.policy.size_cap
            hours = hours_until(disk.parts(), cap)
            found.append(Cap(f"disk {disk.disk}", disk.capped_bytes, cap, disk.policy.at_cap, hours))
    parts = [part for disk in disks for part in disk.parts()]
    used = sum(part.bytes for part in parts)
    if store_cap is not None:
        refuses = [disk.policy.at_cap == REFUSE for disk in disks if disk.policy is not None]
        then = REFUSE if refuses and all(refuses) else SHORTEN
        found.append(Cap("store", used, store_cap, then, hours_until(parts, store_cap)))
    room = used + free_bytes
    found.append(Cap("file system", used, room, FULL, hours_until(parts, room)))
    return found


def policy_reader(catalog: Catalog, config: Config) -> Callable[[Entry], Effective]:
    """The policy in effect of an entry, read when it is asked for; CorruptError."""
    return lambda entry: policies.effective(catalog, config, entry)


def entry_of(catalog: Catalog, disk: str) -> Entry:
    """The entry of a disk; NotFoundError."""
    entry = catalog.get(disk)
    if entry is None:
        raise NotFoundError(f"there is no disk {disk}", hint="list the disks: cdp disk list")
    return entry


def survey(state: StateDir, config: Config, *, disk: str | None = None) -> Store:
    """Every disk, or one; the caps of the store are looked at with all of them. NotFoundError, CorruptError for the catalog."""
    now = clock_ns(state)
    with Catalog.open(state, writable=False) as catalog:
        if disk is not None:
            entry_of(catalog, disk)
        policy_of = policy_reader(catalog, config)
        entries = sorted(catalog.names().values(), key=lambda entry: entry.name)
        disks = [measure(state, entry, policy_of, now_ns=now) for entry in entries]
    free = shutil.disk_usage(state.path).free
    found = caps(disks, store_cap=config.store_size_cap, free_bytes=free)
    now = max([now, *(span.last_ns for usage in disks for span in usage.spans[-1:])])
    images = sum(durable.used_bytes(path) for path in state.bases.iterdir()) if state.bases.is_dir() else 0
    chosen = tuple(usage for usage in disks if disk in (None, usage.disk))
    wanted = tuple(cap for cap in found if disk is None or cap.of in (f"disk {disk}", "store", "file system"))
    return Store(now, chosen, images, free, wanted)


def check_readable(usage: Usage) -> None:
    """What is said of a disk needs its history: its `problem` if that cannot be read, RefusedError if there is none yet."""
    if usage.policy is None and usage.problem is not None:
        raise usage.problem
    if not usage.spans:
        raise RefusedError(f"{usage.disk} has no history yet", hint="it begins when the first copy has ended")
