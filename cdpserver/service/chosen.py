"""What an operator means by DISK@WHEN or VM@WHEN when it is to be run: one place in the history of each disk, of one instant."""

from dataclasses import dataclass

from cdpserver import groups, names
from cdpserver.catalog import Entry
from cdpserver.errors import NotFoundError, RefusedError, UsageError
from cdpserver.journal.control import Grade
from cdpserver.names import At, Latest, When
from cdpserver.points import Timeline as Points
from cdpserver.service.core import Core
from cdpserver.service.vms import Vms
from cdpserver.stretches import leads_to_gap
from cdpserver.timeline import BackupBase

UNORDERED = "unordered: what the guest wrote last may be there while what it wrote before is not"
BEFORE_GAP = "the last before a gap: writes of the guest that were acknowledged after it are lost"


@dataclass(frozen=True, slots=True)
class Chosen:
    """One disk at the instant."""

    entry: Entry
    seq: int
    time_ns: int
    size: int
    warning: str = ""
    """What the point lacks; only when forced."""
    of: str = ""
    """The disk that was backed up, where this one stands on its backup."""

    @property
    def name(self) -> str:
        """The disk whose content it is."""
        return self.of or self.entry.name

    @property
    def short_name(self) -> str:
        """The disk's name in its VM."""
        return names.split_name(self.entry.name)[0]


def choose(core: Core, point: str, *, force: bool, most: int) -> list[Chosen]:
    """The disks of a point, at most `most`. RefusedError for an unordered one, or one next to a gap, unless forced."""
    what, when = names.parse_point(point)
    if groups.find(core.catalog, what) is not None:
        raise UsageError(
            f"{what} is a group", hint=f"run its VMs one by one, all at the time of: cdp point show {point}"
        )
    entries = _entries(core, what)
    if len(entries) > most:
        raise RefusedError(f"{what} has more than {most} disks", hint="run them one by one")
    if len(entries) > 1:
        when = _one_time(core, what, when, force=force)
    return [_choose(core, entry, when, force=force) for entry in entries]


def _entries(core: Core, what: str) -> list[Entry]:
    """The disk of this name, or all disks of the VM."""
    if what in core.catalog.names():
        return [core.entry(what)]
    if "/" in what:
        raise NotFoundError(f"there is no disk {what}", hint="list the disks: cdp disk list")
    return Vms(core).disks(what)


def _one_time(core: Core, vm: str, when: When, *, force: bool) -> When:
    """The same instant for all disks, at which all are good; if forced, whatever they are."""
    if not force:
        return At(Vms(core).resolve(vm, when).time_ns)
    now_ns = core.clock.now_ns()
    match when:
        case Latest():
            return At(now_ns)
        case names.Ago(delta_ns):
            return At(now_ns - delta_ns)
        case At():
            return when
    raise UsageError(
        f"{vm} has several disks, and {names.format_when(when)} is an instant of one",
        hint="name a time, -90s or latest",
    )


def _choose(core: Core, entry: Entry, when: When, *, force: bool) -> Chosen:
    now_ns = core.clock.now_ns()

    def look(points: Points) -> Chosen:
        position = points.resolve(when, now_ns=now_ns)
        unordered = points.grade_at(position) is Grade.UNORDERED
        warning = UNORDERED if unordered else BEFORE_GAP if leads_to_gap(points, position) else ""
        base = points.history.timeline.base
        of = base.disk if isinstance(base, BackupBase) else ""
        size = points.history.size_at(position.seq)
        return Chosen(entry, position.seq, position.time_ns, size, warning, of)

    found = core.look(entry, look)
    if found.warning and not force:
        raise RefusedError(
            f"{entry.name}@seq:{found.seq} is {found.warning}",
            hint=f"cdp point list {entry.name} shows graded points; to recover this one all the same, add --force",
        )
    return found
