"""Brings a state directory of an older format version up to this one, step by step.

Invariants: steps run in order, with the server's lock held and nobody else on the files. A step may be repeated, and
ends with the durable write of the new version: whenever we are killed, the next start goes on from there.
What a step has not done yet, the version before still reads; there is no way back.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cdpserver import durable
from cdpserver.basepoint import note_base_points
from cdpserver.catalog.upgrade import add_locks_and_policies, add_protection, add_trials
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.events import EventLog
from cdpserver.state import OLDEST_VERSION, VERSION, StateDir


@dataclass(frozen=True, slots=True)
class Step:
    """From `version` to the next one."""

    version: int
    does: str
    run: Callable[[StateDir], None]


def allow_growth(state: StateDir) -> None:
    """3 -> 4: disks may grow. No file changes; the version keeps older programs from what they would misread."""


STEPS = (
    Step(1, "the catalog gets tables for locks and policies", add_locks_and_policies),
    Step(2, "each base point gets a note of what it holds", note_base_points),
    Step(3, "disks may grow", allow_growth),
    Step(4, "intervals may be thinned; those that are there stay as they are", lambda _: None),
    Step(5, "the catalog gets tables for protected VMs, groups and recoveries", add_protection),
    Step(6, "the catalog gets a table for trials; journals may be anchored to a dirty bitmap", add_trials),
)


def upgrade(state: StateDir, log: EventLog) -> None:
    """Make `state` one of this version. Hold its lock. RefusedError if it is of a newer one after all."""
    version = state.version()
    if version is None:
        version = _remake_format(state, log)
    for step in STEPS:
        if step.version == version:
            step.run(state)
            version += 1
            state.set_version(version)
            log.emit("service.upgraded", from_version=step.version, to_version=version, does=step.does)
    assert version == VERSION, "a step is missing"


def check_current(state: StateDir) -> None:
    """RefusedError if `upgrade` has anything to do: for a start that is to leave the directory as it is."""
    version = state.version()
    if version != VERSION:
        held = "has lost its format file" if version is None else f"has format version {version}"
        raise RefusedError(
            f"{state.path} {held}, this cdpserver writes {VERSION}", hint="start it without --no-upgrade"
        )


def _remake_format(state: StateDir, log: EventLog) -> int:
    """Write a lost `format` anew. The catalog's copy has the same version; failing that the oldest will do, since
    steps may be repeated.
    """
    try:
        found = durable.read_json(state.catalog_copy).get("format")
    except (FileNotFoundError, CorruptError):
        found = None
    if type(found) is int and found > VERSION:
        raise RefusedError(
            f"{state.path} has lost its format file, and its catalog is of format version {found}",
            hint="upgrade cdpserver",
        )
    version = found if type(found) is int and found >= OLDEST_VERSION else OLDEST_VERSION
    state.set_version(version)
    log.emit(
        "service.format-remade",
        level="warning",
        said="The file format was missing or damaged. It only says the version, and is written anew.",
        version=version,
    )
    return version
