"""What a policy says: how often points come, how long they stay, how much room they may take. Pure.

A policy is made of layers, each giving some values: built-in defaults, `[policy]` of the configuration, the VM's, the disk's.
Each value is sound by itself; whether they go together is asked of the sum (`contradiction`), since layers change one by one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from cdpserver.config_values import (
    ChoiceValue,
    DurationValue,
    Kind,
    NumberValue,
    PathValue,
    RegexValue,
    SizeValue,
    SpanValue,
    TimeOfDayValue,
)
from cdpserver.errors import UsageError
from cdpserver.names import format_duration, format_size
from cdpserver.retention.backups import BackupValue, RepositoryValue
from cdpserver.retention.slots import Rule, SlotsValue, format_slots, parse_slots, span_ns
from cdpserver.retention.steps import Step, StepsValue

SECOND_NS = 1_000_000_000
HOUR_NS = 3600 * SECOND_NS
DAY_NS = 24 * HOUR_NS

MIN_BP_EVERY_NS = 10 * SECOND_NS
"""Cutting and verifying a base point takes seconds; closer ones would only queue."""

MAX_BP_EVERY_NS = 7 * DAY_NS
"""A week in one interval already is a large index; longer is a forgotten unit."""

MAX_KEEP_RP_NS = 3650 * DAY_NS

CHAIN_LIMIT = 128
"""Files that a chain may have: past this QEMU takes seconds to open one, and reads slow down."""

CHAIN_WARNING = 64

MIN_SIZE_CAP = 64 << 20
"""The newest base point, the interval after it and its index need tens of MiB on the smallest disk."""

SHORTEN, REFUSE = "shorten", "refuse"

MIN_MARK_EVERY_NS = 10 * SECOND_NS
"""A guest that is frozen more often does little else."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A whole policy."""

    rp_every_ns: int = SECOND_NS
    bp_every_ns: int = 20 * 60 * SECOND_NS
    keep_rp: tuple[Step, ...] = (Step(DAY_NS),)
    keep_bp: tuple[Rule, ...] = parse_slots("48h 7d 4w 12m")
    max_chain: int = CHAIN_LIMIT
    size_cap: int | None = None
    at_cap: str = SHORTEN
    mark_every_ns: int | None = None
    freeze: str = "no"
    drill: str | None = None
    drill_command: str | None = None
    drill_marker: str | None = None
    drill_check: str | None = None
    backup: str | None = None
    backup_to: str | None = None
    backup_copy: str | None = None

    @property
    def keep_rp_ns(self) -> int:
        """How long recovery points are kept, however densely."""
        return self.keep_rp[-1].span_ns


@dataclass(frozen=True, slots=True)
class Field:
    """One value of a policy: its name for operators, the attribute of Policy that holds it, what it takes and means."""

    name: str
    attribute: str
    kind: Kind
    doc: str
    absent: str = ""

    @property
    def flag(self) -> str:
        """The option of `cdp policy set`."""
        return f"--{self.name.replace('_', '-')}"

    def write(self, policy: Policy) -> str:
        """The value as an operator writes it."""
        value = getattr(policy, self.attribute)
        return "none" if value is None else _plain(self.kind.write(value))


def _plain(text: str) -> str:
    """TOML without its quotes."""
    return json.loads(text) if text.startswith('"') else text


FIELDS = (
    Field(
        "rp_every",
        "rp_every_ns",
        DurationValue(least=SECOND_NS, most=HOUR_NS),
        "How far apart recovery points are listed; any instant between them opens as well.",
    ),
    Field(
        "bp_every",
        "bp_every_ns",
        DurationValue(least=MIN_BP_EVERY_NS, most=MAX_BP_EVERY_NS),
        "How often a base point of each changed disk is cut.",
    ),
    Field(
        "keep_rp",
        "keep_rp",
        StepsValue(least=MIN_BP_EVERY_NS, most=MAX_KEEP_RP_NS),
        "How long every instant is kept; or in steps, fewer as they age: 1h 24h/1m keeps one a minute after the first hour.",
    ),
    Field(
        "keep_bp",
        "keep_bp",
        SlotsValue(),
        "How many base points are kept after that: one of each hour, day, week, month and year.",
    ),
    Field(
        "max_chain",
        "max_chain",
        NumberValue(least=2, most=CHAIN_LIMIT),
        "How many files a base point and what it stands on may be; they are merged before it is more.",
    ),
    Field(
        "size_cap",
        "size_cap",
        SizeValue(least=MIN_SIZE_CAP),
        "How much room the history of one disk may take.",
        absent="none",
    ),
    Field(
        "at_cap",
        "at_cap",
        ChoiceValue((SHORTEN, REFUSE)),
        "What happens at a cap: the oldest history goes before its time, or writes are refused (ENOSPC).",
    ),
    Field(
        "mark_every",
        "mark_every_ns",
        SpanValue(least=MIN_MARK_EVERY_NS, most=30 * DAY_NS),
        "How often a bookmark of a VM, or of a disk that is of none, is set by the service.",
        absent="none",
    ),
    Field(
        "freeze",
        "freeze",
        ChoiceValue(("no", "yes")),
        "Whether the guest is frozen for these bookmarks, by its agent; if that fails they are set all the same.",
    ),
    Field(
        "drill",
        "drill",
        TimeOfDayValue(),
        "When the newest point is booted each day, on the host's clock, to see that it can be; of a VM all its disks.",
        absent="none",
    ),
    Field(
        "drill_command",
        "drill_command",
        PathValue('"/etc/cdp/web.qemu"'),
        "The file with the QEMU command line that drills start.",
        absent="none",
    ),
    Field(
        "drill_marker",
        "drill_marker",
        RegexValue(),
        "The line on the serial port that a drill waits for; with neither this nor a check, the guest agent.",
        absent="none",
    ),
    Field(
        "drill_check",
        "drill_check",
        PathValue('"/etc/cdp/web-check"'),
        "The program that has to end with 0 for a drill to pass.",
        absent="none",
    ),
    Field(
        "backup",
        "backup",
        BackupValue(),
        "When the newest good point is backed up, on the host's clock, and how many backups are kept; of a VM all its disks.",
        absent="none",
    ),
    Field(
        "backup_to",
        "backup_to",
        RepositoryValue('"/mnt/nas/backups"'),
        "The repository that it goes to: one that cdp repo add has registered.",
        absent="none",
    ),
    Field(
        "backup_copy",
        "backup_copy",
        RepositoryValue('"/mnt/vault/backups"'),
        "A second repository, to which each backup is copied; kept there as long as in the first.",
        absent="none",
    ),
)

assert {field.attribute for field in FIELDS} == {field.name for field in fields(Policy)}

BY_NAME = {field.name: field for field in FIELDS}

Values = Mapping[str, Any]
"""Some values of a policy, by the fields' names."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Where values come from, in words, and the values."""

    source: str
    values: Values


@dataclass(frozen=True, slots=True)
class Effective:
    """The sum of the layers, and by a field's name where its value comes from; what is not named is a default."""

    policy: Policy
    sources: Mapping[str, str]

    @property
    def problem(self) -> UsageError | None:
        """Why the values do not go together."""
        return contradiction(self.policy)


def parse_values(texts: Mapping[str, str]) -> dict[str, Any]:
    """Checked values from what an operator wrote. UsageError."""
    return {name: _field(name).kind.read_option(_field(name).flag, text) for name, text in texts.items()}


def _field(name: str) -> Field:
    if name not in BY_NAME:
        raise UsageError(f"a policy has no {name}", hint=f"it has {', '.join(BY_NAME)}")
    return BY_NAME[name]


def combine(layers: Sequence[Layer]) -> Effective:
    """The sum of the layers, later ones going before earlier ones."""
    policy, sources = Policy(), {}
    for layer in layers:
        for name, value in layer.values.items():
            policy = replace(policy, **{BY_NAME[name].attribute: value})
            sources[name] = layer.source
    return Effective(policy, sources)


def contradiction(policy: Policy) -> UsageError | None:
    """What in a policy cannot be meant together; None if it is sound."""
    every, keep = format_duration(policy.bp_every_ns), format_duration(policy.keep_rp_ns)
    if policy.rp_every_ns > policy.bp_every_ns:
        return UsageError(
            f"rp_every {format_duration(policy.rp_every_ns)} is longer than bp_every {every}",
            hint="recovery points lie between base points: make rp_every shorter",
        )
    if policy.bp_every_ns > policy.keep_rp_ns:
        return UsageError(
            f"bp_every {every} is longer than keep_rp {keep}",
            hint="history goes in the steps that base points make: make keep_rp longer, or bp_every shorter",
        )
    if policy.keep_bp and span_ns(policy.keep_bp) < policy.keep_rp_ns:
        return UsageError(
            f"keep_bp {format_slots(policy.keep_bp)} ends before keep_rp {keep}",
            hint="make keep_bp reach further back, or say keep_bp none",
        )
    if policy.backup is not None and policy.backup_to is None:
        return UsageError(
            f"backup {policy.backup} says not where to", hint="name the repository with backup_to"
        )
    return None


def check_cap(policy: Policy, *, fixed_bytes: int) -> None:
    """UsageError if the cap has no room for what can never go: the newest base point and what came after it."""
    if policy.size_cap is not None and policy.size_cap < fixed_bytes:
        raise UsageError(
            f"size_cap {format_size(policy.size_cap)} is less than the {fixed_bytes} bytes that always stay",
            hint="the newest base point with the interval after it: choose a larger cap, or a shorter bp_every",
        )
