"""Which backups are due, by what was noted of those before. Pure but for reading the notes.

    backups.json    of each VM or disk: its schedule, the time that was dealt with last, what came of it, whether its copy is due

A time is dealt with when there is a backup: a service that was down, or killed in the middle, makes one for all that passed.
Times are those of the host's clock, as text: where summer ends, an hour that comes again brings no second one. A clock that goes
back by more than a day (an hour, if hourly) begins with its next time.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cdpserver import durable
from cdpserver.errors import CorruptError
from cdpserver.retention.backups import BackupPlan, parse_plan
from cdpserver.state import StateDir
from cdpserver.vm.trial.schedule import Planned

FILE = "backups.json"

DUE = "due"
"""Of a copy."""


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be backed up, and the time that it is for."""

    planned: Planned
    plan: BackupPlan
    slot: str


@dataclass(frozen=True, slots=True)
class Work:
    """What one repository is to do: a backup, or, where `copies` says so, the copies of what is in another one."""

    due: Due
    copies: bool = False

    @property
    def what(self) -> str:
        """As events name it."""
        return f"copies of {self.due.planned.subject}" if self.copies else self.due.planned.subject

    @property
    def to(self) -> str | None:
        """The repository, as the policy names it."""
        return self.due.planned.policy.backup_copy if self.copies else self.due.planned.policy.backup_to


def load(state: StateDir) -> dict[str, dict[str, Any]]:
    """By VM or disk; {} where nothing was noted, or what was cannot be read: then each begins with its next time."""
    try:
        found = durable.read_json(state.path / FILE)
    except (FileNotFoundError, CorruptError):
        return {}
    return {subject: said for subject, said in found.items() if isinstance(said, dict)}


def due(
    noted: dict[str, dict[str, Any]], wanted: list[Planned], now: datetime
) -> tuple[list[Due], dict[str, dict[str, Any]]]:
    """(what is due, what is to be noted from here on). Pure. What is new, or has another schedule, begins with its next time."""
    found, kept = [], {}
    for one in wanted:
        text = one.policy.backup or ""
        plan = parse_plan(text)
        slot = f"{plan.last(now):%Y-%m-%dT%H:%M}"
        said = noted.get(one.subject, {})
        before = said.get("slot")
        if said.get("schedule") != text or not _is_of_now(before, plan, now):
            said = said | {"schedule": text, "slot": slot}
        elif str(before) < slot:
            found.append(Due(one, plan, slot))
        kept[one.subject] = said
    return found, kept


def copies_due(noted: dict[str, dict[str, Any]], wanted: list[Planned]) -> list[Work]:
    """Backups that are made, and not in the second repository yet. Pure."""
    found = []
    for one in wanted:
        said = noted.get(one.subject, {})
        if said.get("copy") == DUE and one.policy.backup_copy is not None:
            plan = parse_plan(one.policy.backup or "")
            found.append(Work(Due(one, plan, str(said.get("slot"))), copies=True))
    return found


def _is_of_now(slot: object, plan: BackupPlan, now: datetime) -> bool:
    """Is it a time that has come, or comes once more since clocks went back a little?"""
    try:
        at = datetime.fromisoformat(str(slot))
    except ValueError:
        return False
    again = timedelta(hours=1) if plan.every == "hourly" else timedelta(days=1)
    return at.tzinfo is None and at - now.replace(tzinfo=None) <= again
