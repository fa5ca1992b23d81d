"""What is to be drilled or backed up, and which drills are due. Pure: the time of day is the host's, as people mean it."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import datetime, timedelta

from cdpserver.catalog import Entry, Row
from cdpserver.config import Config
from cdpserver.names import split_name
from cdpserver.retention import policies
from cdpserver.retention.policy import Layer, Policy, combine, parse_values
from cdpserver.vm.trial.record import Trial

MOST_TRIES = 2
"""Of one night: a drill that takes the service down with it does not do so all day."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A VM or disk that something is done to by the clock, and what its policy says."""

    subject: str
    policy: Policy


def planned(
    rows: Mapping[str, Row], config: Config, entries: Iterable[Entry], forks: Set[str], what: str = "drill"
) -> list[Planned]:
    """Where the policy has a time for `what`: VMs as their own policy says, disks as theirs. CorruptError for an unreadable row.

    A disk of a VM only when its own policy names a time: else its VM is drilled as a whole. Forks, of which recoveries and trials
    are made, only when they or their VM are named.
    """
    found: dict[str, Policy] = {}
    for entry in entries:
        _, vm = split_name(entry.name)
        own = policies.texts_of(rows.get(policies.disk_row(entry.id)))
        if what in own or (vm is None and entry.name not in forks):
            found[entry.name] = combine(policies.layers(rows, config, entry)).policy
        said = {} if vm is None else policies.texts_of(rows.get(policies.vm_row(vm)))
        if vm is not None and (what in said or entry.name not in forks):
            found[vm] = combine([config.policy, Layer(f"VM {vm}", parse_values(said))]).policy
    return [
        Planned(subject, policy) for subject, policy in found.items() if getattr(policy, what) is not None
    ]


def last_at(at: str, now: datetime) -> datetime:
    """When this time of day was last, at or before `now`."""
    hour, minute, *second = map(int, at.split(":"))
    today = now.replace(hour=hour, minute=minute, second=second[0] if second else 0, microsecond=0)
    return today if today <= now else today - timedelta(days=1)


def slot_of(one: Planned, now: datetime) -> str:
    """The newest of its times: the same text for the whole day, also when the clock is set back."""
    return f"{last_at(one.policy.drill or '', now):%Y-%m-%d} {one.policy.drill}"


def is_due(one: Planned, trials: Iterable[Trial], *, after: datetime, now: datetime) -> bool:
    """Did its time come in (after, now], and is there no drill for that? One that the end of the service cut short is done again.

    Times are of the host's clock, without a zone.
    """
    slot = slot_of(one, now)
    begun = [trial for trial in trials if trial.subject == one.subject and trial.slot == slot]
    if not begun:
        return after < last_at(one.policy.drill or "", now)
    return len(begun) < MOST_TRIES and all(trial.was_cut_short for trial in begun)
