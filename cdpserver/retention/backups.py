"""When backups are made and how long they stay, as a policy says it: `daily 02:00 keep 7d 4w 12m`. Pure.

    hourly [:MM]    daily HH:MM    weekly DAY HH:MM    monthly D HH:MM        [keep RULE]

Times are those of the host's clock, as people mean them. Of the times that passed while nobody looked only the newest counts.
"""

import calendar
import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import ClassVar

from cdpserver.config_values import quoted
from cdpserver.errors import UsageError
from cdpserver.names import show
from cdpserver.retention.slots import Rule, parse_slots

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

FORMS = "write hourly, daily 02:00, weekly sun 02:00 or monthly 1 02:00; and how many of each are kept, such as keep 7d 4w 12m 5y"

_FORM = re.compile(
    r"(?:(?P<hourly>hourly)(?: :(?P<at_minute>[0-5][0-9]))?"
    r"|(?P<daily>daily) (?P<at>(?:[01][0-9]|2[0-3]):[0-5][0-9])"
    rf"|(?P<weekly>weekly) (?P<weekday>{'|'.join(DAYS)}) (?P<week_at>(?:[01][0-9]|2[0-3]):[0-5][0-9])"
    r"|(?P<monthly>monthly) (?P<day>[1-9]|[12][0-9]|3[01]) (?P<month_at>(?:[01][0-9]|2[0-3]):[0-5][0-9]))"
    r"(?: keep (?P<keep>.+))?"
)


_REPOSITORY = re.compile(r"/.{0,1000}|s3://.{1,1000}|[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class BackupPlan:
    """A schedule: hourly, daily, weekly or monthly; `day` of the week (0 is Monday) or month. Without `keep` all stay."""

    every: str
    hour: int
    minute: int
    day: int
    keep: tuple[Rule, ...] | None

    def last(self, now: datetime) -> datetime:
        """The newest time that has come."""
        at = now.replace(minute=self.minute, second=0, microsecond=0)
        if self.every == "hourly":
            return at if at <= now else at - timedelta(hours=1)
        at = at.replace(hour=self.hour)
        if self.every == "monthly":
            at = _in_month(at, self.day)
            return at if at <= now else _in_month(at.replace(day=1) - timedelta(days=1), self.day)
        if self.every == "weekly":
            at -= timedelta(days=(at.weekday() - self.day) % 7)
            return at if at <= now else at - timedelta(days=7)
        return at if at <= now else at - timedelta(days=1)


def _in_month(at: datetime, day: int) -> datetime:
    """That day of the month, or its last one."""
    return at.replace(day=min(day, calendar.monthrange(at.year, at.month)[1]))


def parse_plan(text: str) -> BackupPlan:
    """UsageError for what is no schedule."""
    match = _FORM.fullmatch(" ".join(text.split()))
    if match is None:
        raise UsageError(f"not a schedule of backups: {show(text)}", hint=FORMS)
    keep = parse_slots(match["keep"]) if match["keep"] is not None else None
    if match["hourly"]:
        return BackupPlan("hourly", 0, int(match["at_minute"] or 0), 0, keep)
    hour, minute = map(int, (match["at"] or match["week_at"] or match["month_at"]).split(":"))
    if match["daily"]:
        return BackupPlan("daily", hour, minute, 0, keep)
    if match["weekly"]:
        return BackupPlan("weekly", hour, minute, DAYS.index(match["weekday"]), keep)
    return BackupPlan("monthly", hour, minute, int(match["day"]), keep)


@dataclass(frozen=True, slots=True)
class BackupValue:
    """A configuration value: a schedule of backups, or none. It is kept as it is written."""

    takes: ClassVar[str] = (
        "when backups are made and how many are kept, such as daily 02:00 keep 7d 4w 12m, or none"
    )
    example: ClassVar[str] = '"daily 02:00 keep 7d 4w 12m"'

    def read(self, key: str, value: object) -> str | None:
        return self.read_option(key, quoted(key, value, FORMS))

    def read_option(self, key: str, text: str) -> str | None:
        if text == "none":
            return None
        try:
            parse_plan(text)
        except UsageError as error:
            raise UsageError(f"{key}: {error.message}", hint=error.hint) from None
        return text

    def write(self, value: str | None) -> str:
        return '"none"' if value is None else f'"{value}"'


@dataclass(frozen=True, slots=True)
class RepositoryValue:
    """A registered repository, by where it is or by its id; or none. Whether it is there is asked when it is needed."""

    example: str
    takes: ClassVar[str] = "the absolute path, the s3:// location or the id of a repository, or none"

    def read(self, key: str, value: object) -> str | None:
        return self.read_option(key, quoted(key, value, self.takes))

    def read_option(self, key: str, text: str) -> str | None:
        if text == "none":
            return None
        if not _REPOSITORY.fullmatch(text) or not text.isprintable():
            raise UsageError(f"{key}: not a repository: {show(text)}", hint=f"it takes {self.takes}")
        return text

    def write(self, value: str | None) -> str:
        return '"none"' if value is None else json.dumps(value, ensure_ascii=False)
