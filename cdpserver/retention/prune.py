"""Carries out what the plan says: a pass over all disks, in a process of its own.

Crash safety: intervals go the newest first, each by a rename, and then base points by merges that are whole or not at all; so
what is left can always be read, and the next pass finishes. Nothing is dropped of a disk whose policy, locks or files cannot be
read.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from cdpserver import durable, leases, messages, timeline
from cdpserver.catalog import Catalog, Entry
from cdpserver.chain import merge as chain
from cdpserver.chain.lock import alone, intervals_alone
from cdpserver.clock import Clock
from cdpserver.config import Config, parse_config
from cdpserver.errors import CdpError, NotFoundError, RefusedError
from cdpserver.forks import Forks
from cdpserver.journal.links import Chain
from cdpserver.journal.log import interval_path
from cdpserver.names import show
from cdpserver.retention import thin
from cdpserver.retention.facts import gather, gather_all
from cdpserver.retention.plan import Decision, Facts, cutoffs, drops, fixed_bytes, locked_bytes, plan
from cdpserver.retention.thinning import Thinning, thinnings
from cdpserver.state import StateDir
from cdpserver.timeline import INTERVALS

MAX_ROUNDS = 32
"""Times that a pass makes its plan. At a cap one is not enough: the base points that stay take over what only merged ones held.
Each drops something more, and what none has dropped the next pass does."""


@dataclass
class Pass:
    """What a pass did, or would do."""

    dropped: list[Decision] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    disks: list[Facts] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the service and for `cdp prune`."""
        return {
            "dropped": [describe(decision) for decision in self.dropped],
            "failed": self.failed,
            "disks": {
                facts.disk: {
                    "bytes": facts.bytes,
                    "fixed_bytes": fixed_bytes(facts),
                    "locked_bytes": locked_bytes(facts),
                    "size_cap": facts.policy.size_cap,
                    "at_cap": facts.policy.at_cap,
                }
                for facts in self.disks
            },
        }


def describe(decision: Decision) -> dict[str, Any]:
    """Something that goes, as the CLI and the API show it."""
    return {
        "what": decision.what,
        "disk": decision.disk,
        "reason": decision.reason,
        "bytes": decision.bytes,
    }


def look(
    state: StateDir, catalog: Catalog, config: Config, *, now_ns: int, disk: str | None
) -> tuple[Pass, dict[str, int]]:
    """What a pass would do, and how far each disk's history is shortened. Nothing is changed.

    At a cap a pass can drop more than this, once it is seen how much what stays had to take over.
    """
    found, failed = _gather(state, catalog, config, now_ns=now_ns, disk=disk)
    until = cutoffs(found, config.store_size_cap)
    chosen = [facts for facts in found if disk in (None, facts.disk)]
    dropped: list[Decision] = []
    for facts in chosen:
        decisions = plan(facts, until[facts.disk])
        dropped += drops(decisions)
        for thinning in thinnings(facts, decisions):
            size = 0
            try:
                size = thin.estimate(state.timeline(facts.id), thinning)
            except (CdpError, OSError) as error:
                failed[facts.disk] = str(error)
            dropped.append(_thinned(thinning, size))
    return Pass(dropped, failed, chosen), until


def _gather(
    state: StateDir,
    catalog: Catalog,
    config: Config,
    *,
    now_ns: int,
    disk: str | None,
    forks: Forks | None = None,
) -> tuple[list[Facts], dict[str, str]]:
    """The facts of every disk, since the store's cap is all disks' business; why there are none of some that were asked for."""
    if disk is not None and catalog.get(disk) is None:
        raise NotFoundError(f"there is no disk {show(disk)}", hint="list the disks: cdp disk list")
    found, failed = gather_all(state, catalog, config, now_ns=now_ns, forks=forks)
    return found, {name: why for name, why in failed.items() if disk in (None, name)}


def prune(state: StateDir, catalog: Catalog, config: Config, *, now_ns: int, disk: str | None) -> Pass:
    """Drop what the plan says, until it says nothing more; durable on return.

    A disk that fails is said, with what was dropped of it before, and the others are done.
    """
    forks = Forks(state, catalog)
    gathered, failed = _gather(state, catalog, config, now_ns=now_ns, disk=disk, forks=forks)
    anew = partial(gather, state, catalog, config, now_ns=now_ns, forks=forks)
    found = {facts.disk: facts for facts in gathered}
    done = Pass(failed=failed)
    left = {name for name in found if disk in (None, name)}
    for again in range(MAX_ROUNDS):
        until, changed = cutoffs(list(found.values()), config.store_size_cap), False
        for name in sorted(left):
            entry, before = catalog.get(name), len(done.dropped)
            if entry is None or entry.state != "live":
                left.remove(name)
                continue
            try:
                if _goes(found[name], until[name]):
                    _prune_one(state, catalog, anew, entry, until[name], done)
                    _thin(state, anew, entry, until[name], done)
                    found[name] = anew(entry)
                elif not again:
                    _tidy(state.timeline(entry.id), now_ns)
            except (CdpError, OSError) as error:
                done.failed[name] = str(error)
            changed = changed or len(done.dropped) > before
            if name in done.failed:
                left.remove(name)
        if not changed:
            break
    done.disks = [facts for name, facts in found.items() if disk in (None, name) and name not in done.failed]
    return done


def _goes(facts: Facts, cutoff_ns: int) -> bool:
    decisions = plan(facts, cutoff_ns)
    return bool(drops(decisions) or thinnings(facts, decisions))


def _tidy(directory: Path, now_ns: int) -> None:
    """Where nothing goes: what a killed pass left, and leases that are over."""
    finish(directory)
    with leases.none_taken(directory):
        leases.held(directory, now_ns=now_ns, tidy=True)


Anew: TypeAlias = Callable[..., Facts]
"""`gather` for an entry, with all else that it takes."""


def _prune_one(
    state: StateDir, catalog: Catalog, anew: Anew, entry: Entry, cutoff_ns: int, done: Pass
) -> None:
    directory = state.timeline(entry.id)
    finish(directory)
    with alone(directory), intervals_alone(directory) as mine, leases.none_taken(directory):
        # What a merge that failed had still to remove is not there to be merged.
        chain.finish(directory)
        # Anew, since a lock or a lease may have come meanwhile; from here on none does without our knowing.
        decisions = plan(anew(entry, tidy=True), cutoff_ns)
        gone = drops(decisions)
        for decision in gone:
            if decision.is_interval:
                if not mine:
                    raise RefusedError(
                        f"history of timeline {directory.name} is being verified or thinned",
                        hint="nothing is lost: a pass after that drops it",
                    )
                with Chain.open(directory, timeline.load(directory).uuid) as links:
                    links.drop(decision.number, reason=decision.reason)
                durable.remove_tree(interval_path(directory, decision.number))
                done.dropped.append(decision)
    for run in merges(decisions):
        merged = chain.merge(state, catalog, entry.id, "pull", run.keep, base=run.base)
        taken = [decision for decision in gone if run.takes(decision)]
        done.dropped += share(taken, max(0, merged["freed_bytes"]))


def _thinned(thinning: Thinning, size: int) -> Decision:
    return Decision(thinning.what, thinning.number, thinning.disk, True, thinning.reason, size)


def _thin(state: StateDir, anew: Anew, entry: Entry, cutoff_ns: int, done: Pass) -> None:
    """Thin the intervals of a disk that are due; one that cannot be is said, and the others are thinned."""
    directory = state.timeline(entry.id)

    def due() -> list[Thinning]:
        facts = anew(entry)
        return thinnings(facts, plan(facts, cutoff_ns))

    with intervals_alone(directory) as mine:
        if not mine:
            return
        for thinning in due():
            try:
                size = thin.thin(directory, thinning, partial(_needed, directory, due, thinning))
                done.dropped.append(_thinned(thinning, size))
            except (CdpError, OSError) as error:
                done.failed[entry.name] = str(error)


@contextlib.contextmanager
def _needed(
    directory: Path, due: Callable[[], list[Thinning]], thinning: Thinning
) -> Iterator[frozenset[int]]:
    """The seqs that must stay in an interval; inside, nobody names another point or takes a lease."""
    with alone(directory), leases.none_taken(directory):
        found = next((other.exact for other in due() if other.number == thinning.number), None)
        if found is None:
            raise RefusedError(
                f"interval {thinning.number} of {thinning.disk} is not to be thinned any more",
                hint="nothing is lost: the next pass looks again",
            )
        yield found


@dataclass(frozen=True, slots=True)
class Run:
    """Base points that go lie between `base`, or the disk's beginning, and `keep`, which takes what only they held."""

    keep: int
    base: int | None

    def takes(self, decision: Decision) -> bool:
        """Does this base point go in this merge?"""
        below = -1 if self.base is None else self.base
        return not decision.is_interval and below < decision.number < self.keep


def merges(decisions: list[Decision]) -> list[Run]:
    """The merges that take away the base points that go, those of the newest first."""
    found: list[Run] = []
    base, between = None, False
    for decision in decisions:
        if decision.is_interval:
            continue
        if not decision.keep:
            between = True
            continue
        if between:
            found.append(Run(decision.number, base))
        base, between = decision.number, False
    return found[::-1]


def share(taken: list[Decision], freed: int) -> list[Decision]:
    """The base points that a merge took away, each with its share of what came back: what only they held the one above has."""
    whole, below, found = sum(decision.bytes for decision in taken), 0, []
    for decision in taken:
        before, below = below, below + decision.bytes
        found.append(
            replace(decision, bytes=freed * below // whole - freed * before // whole if whole else 0)
        )
    return found


def finish(directory: Path) -> None:
    """Remove what a killed pass had renamed already. Others' temporary names are left alone."""
    for left in (directory / INTERVALS).glob(f"{durable.REMOVING}*"):
        durable.remove_tree(left.with_name(left.name.removeprefix(durable.REMOVING)))
    with intervals_alone(directory) as mine:
        if mine:
            thin.tidy(directory)


def run(state_dir: Path, config_text: str, disk: str | None, *, dry_run: bool) -> Pass:
    """One pass, or a look at what it would do."""
    state, config = StateDir.open(state_dir), parse_config(config_text)
    now_ns = Clock.load(state.clock).now_ns()
    with Catalog.open(state, writable=False) as catalog:
        if dry_run:
            return look(state, catalog, config, now_ns=now_ns, disk=disk)[0]
        return prune(state, catalog, config, now_ns=now_ns, disk=disk)


def main() -> int:
    """`python -m cdpserver.retention.prune`: one pass; what it did, or the error, as JSON."""
    parser = argparse.ArgumentParser(description="drop what no policy keeps")
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--config-text", default="", help="the configuration in effect, as TOML")
    parser.add_argument("--disk")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    return messages.tell(
        lambda: run(options.state_dir, options.config_text, options.disk, dry_run=options.dry_run).as_json()
    )


if __name__ == "__main__":
    sys.exit(main())
