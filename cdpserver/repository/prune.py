"""Which backups a rule keeps: one of each of the newest N hours, days, weeks, months or years that have any; and why each. Pure.

The newest of a slot is kept, by the repository's own time: what a clock dated ahead is no newer for it. Slots without a backup do
not count: neither a clock that is years ahead nor a machine that was off for a year makes all too old. A backup that is locked,
or younger than the repository's immutable time, is kept whatever the rule says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cdpserver.names import format_duration
from cdpserver.repository.record import Backup
from cdpserver.retention.slots import SECOND_NS, Rule, slot_of


@dataclass(frozen=True, slots=True)
class Verdict:
    """Keep or drop, and why."""

    backup: Backup
    keep: bool
    reason: str


def plan(
    backups: Sequence[Backup],
    rules: Sequence[Rule],
    *,
    locked: Mapping[str, str],
    immutable_ns: int = 0,
    lived_ns: int = 0,
    keep_last: int = 1,
) -> list[Verdict]:
    """A verdict for each backup, oldest first. Backups of different names (disks, VMs) don't take each other's slots.

    Rules go by the calendar; what is immutable by the repository's own time, which is `lived_ns`.
    """
    verdicts = []
    names = sorted({backup.subject for backup in backups})
    for name in names:
        mine = sorted((b for b in backups if b.subject == name), key=lambda b: b.order, reverse=True)
        taken: set[tuple[str, int]] = set()
        for number, backup in enumerate(mine):
            reasons = []
            if number < keep_last:
                reasons.append("the newest" if number == 0 else f"one of the newest {keep_last}")
            for rule in rules:
                slot = (rule.unit, slot_of(rule.unit, backup.created_ns))
                if slot not in taken and sum(unit == rule.unit for unit, _ in taken) < rule.count:
                    taken.add(slot)
                    reasons.append(f"the newest of its {rule.word}")
            held = hold(backup, lived_ns, locked=locked, immutable_ns=immutable_ns)
            reasons += [held] if held else []
            verdicts.append(Verdict(backup, bool(reasons), ", ".join(reasons) or "no rule keeps it"))
    return sorted(verdicts, key=lambda v: v.backup.order)


def hold(backup: Backup, lived_ns: int, *, locked: Mapping[str, str], immutable_ns: int) -> str:
    """Why a backup cannot be removed at all; empty if it can. `lived_ns` is the repository's time."""
    if backup.id in locked:
        return f"locked: {locked[backup.id]}" if locked[backup.id] else "locked"
    left_ns = (backup.since_ns or backup.created_ns) + immutable_ns - lived_ns
    if immutable_ns and left_ns > 0:
        return f"immutable for {format_duration(-(-left_ns // SECOND_NS) * SECOND_NS)} more"
    return ""
