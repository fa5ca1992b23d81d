"""What a disk's plan depends on, gathered from its files and the catalog. Nothing is changed.

History ages by being lived on: its now is its newest record, and the time between two boots of the host does not count. So a
disk that rests keeps what it has, and neither a month without power nor a clock that is years ahead at a boot makes all too old.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from cdpserver import durable, leases, locks
from cdpserver.catalog import Catalog, Entry
from cdpserver.config import Config
from cdpserver.errors import CdpError
from cdpserver.forks import Forks
from cdpserver.index.merged import DIRECTORY as MERGED
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.record import DTYPE, Kind
from cdpserver.journal.segment import SEALED
from cdpserver.nodes import base_point_path, nodes
from cdpserver.offtime import Off, lived_since, off_times
from cdpserver.retention import policies
from cdpserver.retention.plan import Facts, Hold, Interval, Node, plan
from cdpserver.retention.thinning import thinnings
from cdpserver.state import StateDir


def gather(
    state: StateDir,
    catalog: Catalog,
    config: Config,
    entry: Entry,
    *,
    now_ns: int,
    tidy: bool = False,
    references: bool = True,
    forks: Forks | None = None,
) -> Facts:
    """The facts of one disk; with `tidy`, leases that are over are removed. Who gathers more than once has `forks` of its own, so
    that the timelines of all disks are read once.

    Without `references` nobody reads the records for what their *same* records look into: quick, and good only to see that
    nothing goes, since they could but keep more.
    UsageError for a policy that contradicts itself, CorruptError for what cannot be read: nothing is dropped then.
    """
    found = policies.effective(catalog, config, entry)
    if found.problem is not None:
        raise found.problem
    directory = state.timeline(entry.id)
    journal = Journal(directory)
    intervals: tuple[Interval, ...] = ()
    off = off_times(state)
    holds: list[Hold] = []
    try:
        if not journal.empty:
            intervals = journal.settled(lambda: tuple(_intervals(journal, off, references=references)))
            holds += _compared_with(journal)
    finally:
        journal.close()
    held = tuple(
        Node(
            n.number,
            n.seq,
            lived_since(n.time_ns, off),
            n.interval,
            int(n.grade),
            durable.used_bytes(base_point_path(directory, n.number)),
        )
        for n in nodes(directory)
    )
    holds += _locked(catalog, entry, now_ns)
    # A fork's files stand on the newest base point at or below its point; what holds the point holds that.
    holds += [
        Hold(base.seq, f"the fork {fork.full_name} stands on it")
        for base, fork in (forks or Forks(state, catalog)).of(entry.id)
    ]
    holds += [Hold(seq, "it is open") for seq in leases.held(directory, now_ns=now_ns, tidy=tidy)]
    return Facts(
        entry.name,
        found.policy,
        min(now_ns, intervals[-1].last_time_ns) if intervals else now_ns,
        intervals,
        held,
        tuple(holds),
        other_bytes=durable.used_bytes(directory / "base.raw") + _merged_bytes(directory),
        id=entry.id,
    )


def _merged_bytes(directory: Path) -> int:
    """What merged indexes take. They come and go by themselves, with the intervals."""
    return sum(durable.used_bytes(path) for path in (directory / MERGED).glob("*"))


def _compared_with(journal: Journal) -> list[Hold]:
    """The instant that a resync under way compares with: blocks that are as they were then get *same* records."""
    state = journal.state_at(journal.last().seq)
    if state.resync_ref > 0 and not state.synced:
        return [Hold(state.resync_ref, "a resync compares with it")]
    return []


def _intervals(journal: Journal, off: Off, *, references: bool) -> Iterator[Interval]:
    journal.newest()
    numbers = list(journal.intervals)
    firsts = [journal.first_reader(number).first_seq for number in numbers]
    for number, following in pairwise([*numbers, 0]):
        first = journal.first_reader(number)
        last = journal.last_reader(number)
        path = interval_path(journal.timeline, number)
        with os.scandir(path) as files:
            size = sum(durable.used_bytes(file.path) for file in files)
        seqs = _referred(journal, number, following) if references else set()
        yield Interval(
            number,
            first.first_seq,
            max(last.last_seq, first.first_seq - 1),
            lived_since(first.header.first_time_ns, off),
            lived_since(last.time_of(last.count - 1) if last.count else last.header.first_time_ns, off),
            size,
            frozenset(numbers[p] for p in {bisect_right(firsts, seq) - 1 for seq in seqs} if p >= 0)
            - {number},
            frozenset(seqs),
            first.header.every_ns,
            first.instants.held() if first.instants is not None else frozenset(),
            following > 0 and last.state == SEALED and (path / CLOSED_NAME).exists(),
        )


def _referred(journal: Journal, number: int, following: int) -> set[int]:
    """The seqs that the *same* records of an interval look at. Only a resync writes some."""
    carry = journal.first_reader(number).header.carry
    if following and following == number + 1:
        after = journal.first_reader(following).header.carry
        # No session began inside, and none was under way: there is nothing to look for.
        if carry.resync_ref < 0 and after.session == carry.session:
            return set()
    found: set[int] = set()
    for segment in journal.segments(number):
        reader = journal.reader(number, segment)
        if reader.count:
            records = np.frombuffer(reader.raw(0, reader.count), DTYPE)
            found |= set(np.unique(records["place"][records["kind"] == Kind.SAME]).tolist())
    return found


def _locked(catalog: Catalog, entry: Entry, now_ns: int) -> Iterator[Hold]:
    for lock in locks.all_locks(catalog):
        if lock.timeline == entry.id and lock.holds(now_ns):
            yield Hold(
                lock.seq, f"locked: {lock.id}{f' ({lock.reason})' if lock.reason else ''}", locked=True
            )


def gather_all(
    state: StateDir, catalog: Catalog, config: Config, *, now_ns: int, forks: Forks | None = None
) -> tuple[list[Facts], dict[str, str]]:
    """The facts of every disk, and by name why there are none of some."""
    found, failed, forks = [], {}, forks or Forks(state, catalog)
    for entry in catalog.names().values():
        if entry.state != "live":
            continue
        try:
            facts = gather(state, catalog, config, entry, now_ns=now_ns, references=False, forks=forks)
            capped = facts.policy.size_cap is not None or config.store_size_cap is not None
            decisions = plan(facts)
            goes = any(not decision.keep for decision in decisions) or thinnings(facts, decisions)
            if capped or goes:
                facts = gather(state, catalog, config, entry, now_ns=now_ns, forks=forks)
            found.append(facts)
        except (CdpError, OSError) as error:
            failed[entry.name] = str(error)
    return found, failed
