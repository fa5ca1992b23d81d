"""Which drills are due. Pure: the time of day is the host's, as people mean it."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import datetime, timedelta

from cdpserver.catalog import Entry, Row
from cdpserver.config import Config
from cdpserver.names import split_name
from cdpserver.retention import policies
from cdpserver.retention.policy import Layer, Policy, combine, parse_values


@dataclass(frozen=True, slots=True)
class Planned:
    """A VM or disk that is drilled each day, and what its policy says."""

    subject: str
    policy: Policy


def planned(
    rows: Mapping[str, Row], config: Config, entries: Iterable[Entry], forks: Set[str]
) -> list[Planned]:
    """What is to be drilled: VMs as their own policy says, disks as theirs. CorruptError for a row that cannot be read.

    A disk of a VM only when its own policy names a time: else its VM is drilled as a whole. Forks, of which recoveries and trials
    are made, only when they or their VM are named.
    """
    found: dict[str, Policy] = {}
    for entry in entries:
        _, vm = split_name(entry.name)
        own = policies.texts_of(rows.get(policies.disk_row(entry.id)))
        if "drill" in own or (vm is None and entry.name not in forks):
            found[entry.name] = combine(policies.layers(rows, config, entry)).policy
        said = {} if vm is None else policies.texts_of(rows.get(policies.vm_row(vm)))
        if vm is not None and ("drill" in said or entry.name not in forks):
            found[vm] = combine([config.policy, Layer(f"VM {vm}", parse_values(said))]).policy
    return [Planned(subject, policy) for subject, policy in found.items() if policy.drill is not None]


def came_due(at: str, *, after: datetime, now: datetime) -> bool:
    """Did this time of day come in (after, now]?"""
    hour, minute, *second = map(int, at.split(":"))
    today = now.replace(hour=hour, minute=minute, second=second[0] if second else 0, microsecond=0)
    last = today if today <= now else today - timedelta(days=1)
    return after < last
