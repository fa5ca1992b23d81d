"""Chains of base points: trees, merges by stock tools, what stands in their way, and their death at every step."""

import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import durable, leases, nodes, qemu
from cdpserver.catalog import Catalog, Row
from cdpserver.chain import lock, merge, room, same
from cdpserver.chain.plan import VERBS, Link, Merge, Verb, plan
from cdpserver.chain.room import Pull, Slot
from cdpserver.chain.tree import MAX_BASE_POINTS, Branch, tree
from cdpserver.clock import fix_clock
from cdpserver.config import Config
from cdpserver.errors import (
    BrokenError,
    CdpError,
    CorruptError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from cdpserver.events import EventLog, read_events
from cdpserver.journal.control import Grade
from cdpserver.journal.log import interval_path
from cdpserver.leases import Lease
from cdpserver.nodes import MANUAL, base_point_path, read_header
from cdpserver.retention.policy import CHAIN_WARNING
from cdpserver.service.control import Targets
from cdpserver.service.core import Core
from cdpserver.service.merges import Merges
from cdpserver.service.room import Room
from cdpserver.state import StateDir
from tests.chains import START_NS, Forest, Line
from tests.dying import Step, dies_at


@pytest.fixture
def forest(tmp_path: Path) -> Iterator[Forest]:
    made = Forest(tmp_path / "s")
    yield made
    made.close()


def do(forest: Forest, line: Line, verb: Verb, number: int, base: int | None = None) -> dict[str, Any]:
    """A merge, told to the model as well."""
    said = merge.merge(forest.state, forest.catalog, line.id, verb, number, base=base)
    for name in said["removed"]:
        del line.content[int(name.removeprefix("bp:"))]
    return said


# --- plans


CHAIN = [Link(0, "base.raw"), Link(2, "bp-0.qcow2"), Link(3, "bp-2.qcow2"), Link(7, "bp-3.qcow2")]
FREE: dict[int, list[str]] = {7: ["the next base point will stand on it"]}


@pytest.mark.parametrize(
    ("verb", "number", "base", "expected"),
    [
        ("delete", 0, None, Merge(2, "base.raw", (0,))),
        ("delete", 3, None, Merge(7, "bp-2.qcow2", (3,))),
        ("pull", 7, 0, Merge(7, "bp-0.qcow2", (3, 2))),
        ("pull", 3, None, Merge(3, "base.raw", (2, 0))),
        ("commit", 3, None, Merge(3, "bp-0.qcow2", (2,))),
        ("commit", 7, 2, Merge(7, "bp-0.qcow2", (3, 2))),
        ("commit", 7, 0, Merge(7, "base.raw", (3, 2, 0))),
    ],
)
def test_a_plan(verb: Verb, number: int, base: int | None, expected: Merge) -> None:
    assert plan(CHAIN, verb, number, base, FREE, "d") == expected


@pytest.mark.parametrize(
    ("verb", "number", "base", "kind", "says"),
    [
        ("delete", 7, None, RefusedError, "bp:7 of d must stay: the next base point"),
        ("delete", 1, None, NotFoundError, "d has no base point 1"),
        ("delete", 2, 0, UsageError, "a delete has no base"),
        ("pull", 3, 1, NotFoundError, "d has no base point 1"),
        ("pull", 3, 3, UsageError, "bp:3 is not below bp:3"),
        ("commit", 3, 7, UsageError, "bp:7 is not below bp:3"),
        ("pull", 3, 2, RefusedError, "nothing lies below bp:3 that could go"),
        ("pull", 0, None, RefusedError, "nothing lies below bp:0 that could go"),
        ("commit", 0, None, RefusedError, "nothing lies below bp:0 that could go"),
    ],
)
def test_what_cannot_be_planned(
    verb: Verb, number: int, base: int | None, kind: type[CdpError], says: str
) -> None:
    with pytest.raises(kind, match=says) as refused:
        plan(CHAIN, verb, number, base, FREE, "d")
    assert refused.value.hint


def test_a_chain_that_is_none_is_not_merged() -> None:
    with pytest.raises(CorruptError, match=r"bp:3 of d stands on bp-1.qcow2, not on bp:2"):
        plan([*CHAIN[:2], Link(3, "bp-1.qcow2"), CHAIN[3]], "delete", 0, None, FREE, "d")


def test_what_must_stay_says_why() -> None:
    with pytest.raises(RefusedError, match=r"bp:2 of d must stay: it is locked; a fork stands on it"):
        plan(CHAIN, "pull", 7, 0, {2: ["it is locked", "a fork stands on it"]}, "d")


# --- the tree


def names(branch: Branch) -> Any:
    """The tree as nested names."""
    return [branch.name, *(names(child) for child in branch.children)]


def test_a_tree(forest: Forest) -> None:
    disk = forest.disk("web", 3)
    forest.fork("rescue", disk, 1, 2)
    forest.lock(disk, 20)
    forest.lock(disk, 25)
    forest.lock(disk, 3)
    forest.lock(disk, 10, until_ns=0)
    found = tree(forest.state, forest.catalog, "web")
    fork = ["rescue", ["bp:0", ["bp:1"]]]
    assert names(found) == ["web", ["seq:3"], ["bp:0", ["bp:1", fork, ["seq:25"], ["bp:2"]]]]
    value = found.as_dict()
    assert list(value) == ["kind", "name", "time_ns", "size_bytes", "locked", "children"]
    first = value["children"][1]
    second = first["children"][0]
    assert [value["kind"], first["kind"], second["children"][0]["kind"]] == ["disk", "bp", "fork"]
    assert [first["locked"], second["locked"], second["children"][1]["locked"]] == [False, True, True]
    assert first["time_ns"] == START_NS and second["time_ns"] == START_NS + 1
    assert first["size_bytes"] == disk.path(0).stat().st_blocks * 512 > 0
    whole = subprocess.run(
        ["du", "-s", "-B1", "--apparent-size", forest.state.timelines], capture_output=True, check=True
    )
    assert 0 < value["size_bytes"] <= int(whole.stdout.split()[0]) * 2
    below = value["size_bytes"] - second["children"][0]["size_bytes"]
    assert below >= sum(disk.path(n).stat().st_blocks * 512 for n in range(3))


def test_the_tree_of_a_long_chain_is_as_deep_as_it(tmp_path: Path) -> None:
    deep = Branch("bp", "bp:0", 0, 0, False, ())
    for _ in range(3 * MAX_BASE_POINTS):
        deep = Branch("bp", "bp", 0, 0, False, (deep,))
    assert deep.as_dict()["children"][0]["children"]


def test_no_tree_of_what_is_not_there(forest: Forest) -> None:
    with pytest.raises(NotFoundError, match="there is no disk 'web'"):
        tree(forest.state, forest.catalog, "web")


# --- merges


def test_delete_pull_and_commit(forest: Forest) -> None:
    disk = forest.disk("web", 7)
    assert do(forest, disk, "delete", 1) | {"freed_bytes": 0} == {
        "disk": "web",
        "stays": "bp:2",
        "removed": ["bp:1"],
        "freed_bytes": 0,
    }
    assert read_header(disk.path(2))[0] == "bp-0.qcow2"
    forest.check()
    assert do(forest, disk, "pull", 4, 2)["removed"] == ["bp:3"]
    assert read_header(disk.path(4))[0] == "bp-2.qcow2"
    forest.check()
    assert do(forest, disk, "commit", 5)["removed"] == ["bp:4"]
    assert read_header(disk.path(5))[0] == "bp-2.qcow2"
    forest.check()
    assert do(forest, disk, "commit", 6, 2)["removed"] == ["bp:2", "bp:5"]
    forest.check()
    assert do(forest, disk, "pull", 6)["removed"] == ["bp:0"]
    assert read_header(disk.path(6))[0] == "base.raw"
    forest.check()
    assert not disk.path(6).stat().st_mode & 0o222


@pytest.mark.parametrize("seed", range(3))
def test_random_merges(tmp_path: Path, seed: int) -> None:
    """Whatever is merged, every base point that stays is bit-exact, of forks too; what is refused changes nothing."""
    forest = Forest(tmp_path / "s", seed, size=(1 << 20) + 512 * (seed % 2))
    dice = random.Random(seed)
    disk = forest.disk("web", 5)
    at = dice.randrange(5)
    fork = forest.fork("rescue", disk, at, 3)
    forest.fork("unused", disk, 2, 0)
    outcomes = set()
    for _ in range(8):
        line = dice.choice((disk, disk, fork))
        verb = dice.choice(VERBS)
        number = dice.choice(list(line.content))
        base = dice.choice([None, *line.content]) if verb != "delete" else None
        kept = {at, max(disk.content)} if line is disk else {max(fork.content)}
        before = {path.name: path.stat().st_ino for path in line.directory.glob("bp-*")}
        try:
            do(forest, line, verb, number, base)
            outcomes.add("merged")
        except (RefusedError, UsageError):
            assert before == {path.name: path.stat().st_ino for path in line.directory.glob("bp-*")}
            outcomes.add("refused")
        assert kept <= set(line.content)
        if dice.random() < 0.4:
            forest.cut(line, Path(), b"")
        forest.check()
    assert outcomes == {"merged", "refused"}
    forest.close()


def test_zeros_stay_zeros(tmp_path: Path) -> None:
    """What a base point zeroed costs nothing where it is merged to."""
    forest = Forest(tmp_path / "s", size=64 << 20)
    disk = forest.disk("web", 3)
    (disk.directory / "base.raw").write_bytes(b"x" * forest.size)
    for number, zero in ((0, False), (1, True), (2, False)):
        path = disk.path(number)
        path.unlink()
        backing = disk.path(number - 1) if number else disk.directory / "base.raw"
        qemu.create_overlay(path, backing=backing, format="qcow2" if number else "raw", size=forest.size)
        if zero:
            subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -z 0 64M", path], check=True)
        disk.content[number] = bytes(forest.size) if number else b"x" * forest.size
    do(forest, disk, "delete", 1)
    forest.check()
    assert disk.path(2).stat().st_blocks * 512 < 1 << 20
    forest.close()


def test_open_files_read_on(forest: Forest) -> None:
    """Who serves a base point while it is merged, or one that goes, goes on reading what it was."""
    import nbd

    disk = forest.disk("web", 4)
    held = dict(disk.content)
    with (
        qemu.serve(disk.path(2), forest.state.run / "2.sock") as second,
        qemu.serve(disk.path(1), forest.state.run / "1.sock") as first,
    ):
        for number, uri in ((2, second), (1, first)):
            client = nbd.NBD()
            client.connect_uri(uri)
            if number == 2:
                do(forest, disk, "pull", 2)
            assert client.pread(forest.size, 0) == held[number]
            client.shutdown()
    forest.check()


# --- what must stay


def refused(forest: Forest, line: Line, number: int, why: str) -> None:
    with pytest.raises(RefusedError, match=why) as error:
        do(forest, line, "delete", number)
    assert "cdp snapshot tree" in error.value.hint
    forest.check()


def test_what_must_stay(forest: Forest) -> None:
    disk = forest.disk("web", 5)
    fork = forest.fork("rescue", disk, 1, 2)
    forest.fork("deeper", fork, 0, 1)
    forest.lock(disk, 30)
    refused(forest, disk, 4, "bp:4 of web must stay: the next base point will stand on it")
    refused(forest, disk, 1, "the fork rescue stands on it")
    refused(forest, disk, 2, "it is locked")
    refused(forest, fork, 0, "the fork deeper stands on it")
    do(forest, disk, "delete", 3)
    interval_path(disk.directory, 1).rmdir()
    refused(forest, disk, 0, "the journal after it reads from it, since what was before is dropped")
    interval_path(disk.directory, 2).rmdir()
    do(forest, disk, "delete", 0)
    forest.check()


def test_a_fork_without_base_points_holds_where_it_starts(forest: Forest) -> None:
    disk = forest.disk("web", 3)
    forest.fork("rescue", disk, 1, 0)
    shutil.rmtree(interval_path(disk.directory, 2))
    shutil.rmtree(interval_path(disk.directory, 3))
    refused(forest, disk, 1, "the fork rescue starts at it")


def test_an_open_point_holds_its_base_point(forest: Forest) -> None:
    """Until a grace after its reader is gone; the journal does not hold what it reads any more."""
    disk = forest.disk("web", 3)
    for interval in (2, 3):
        shutil.rmtree(interval_path(disk.directory, interval))
    lease = Lease.take(disk.directory, 20)
    refused(forest, disk, 1, "it is open, or was a moment ago")
    lease.close()
    refused(forest, disk, 1, "it is open, or was a moment ago")
    now_ns = START_NS
    for _ in range(2):
        leases.held(disk.directory, now_ns=now_ns, tidy=True)
        now_ns += leases.GRACE_NS
    do(forest, disk, "delete", 1)
    forest.check()


def test_a_lock_that_cannot_be_read_holds_everything(forest: Forest) -> None:
    disk = forest.disk("web", 3)
    forest.catalog.put_row("locks", Row("k1", 2, {"point": "web@bp:2"}))
    with pytest.raises(CorruptError, match="lock k1 in the catalog cannot be read"):
        do(forest, disk, "delete", 0)
    forest.check()


def test_a_base_point_without_a_note_may_be_anything(forest: Forest) -> None:
    """Locked, or the start of a fork: nothing is merged until it is known again."""
    disk = forest.disk("web", 4)
    note = disk.directory / "bp-1.json"
    held = note.read_bytes()
    note.write_text("{}")
    with pytest.raises(CorruptError, match=r"the note bp-1.json is lost or damaged"):
        do(forest, disk, "delete", 1)
    assert names(tree(forest.state, forest.catalog, "web")) == ["web", ["bp:0", ["bp:2", ["bp:3"]]]]
    note.write_bytes(held)
    do(forest, disk, "delete", 1)
    forest.check()


def test_two_at_once(forest: Forest) -> None:
    disk = forest.disk("web", 3)
    with lock.alone(disk.directory), pytest.raises(RefusedError, match="is being merged, dropped or locked"):
        do(forest, disk, "delete", 1)
    with lock.shared(disk.directory), pytest.raises(RefusedError):
        do(forest, disk, "delete", 1)
    do(forest, disk, "delete", 1)
    forest.check()


def test_a_fork_is_not_published_on_what_goes(forest: Forest) -> None:
    disk = forest.disk("web", 3)
    fork = forest.fork("rescue", disk, 1, 1)
    with (
        lock.standing_on(disk.path(1), fork.directory),
        pytest.raises(RefusedError, match="merged, dropped or locked"),
    ):
        do(forest, disk, "delete", 0)
    with lock.alone(disk.directory), lock.standing_on(disk.path(1), disk.directory):
        pass  # in its own timeline nothing is waited for
    with lock.standing_on(disk.directory / "base.raw", fork.directory):
        do(forest, disk, "delete", 0)
    with pytest.raises(BrokenError, match=r"/bp-0.qcow2 was merged meanwhile"):  # noqa: SIM117
        with lock.standing_on(disk.path(0), fork.directory):
            pytest.fail("it goes on")
    (disk.directory / lock.NOTE).touch()
    with pytest.raises(BrokenError, match=r"/bp-1.qcow2 was merged meanwhile"):  # noqa: SIM117
        with lock.standing_on(disk.path(1), fork.directory):
            pytest.fail("it goes on")
    (disk.directory / lock.NOTE).unlink()
    forest.check()


# --- room


def slots(*free: bool, id: str = "t1", from_ns: int = 0) -> list[Slot]:
    return [Slot(id, number, is_free, from_ns + number) for number, is_free in enumerate(free)]


def at(*times: int, held: tuple[int, ...] = ()) -> list[Slot]:
    """A chain with base points at these times, of which the newest is not free."""
    return [
        Slot("t1", number, number not in (len(times) - 1, *held), time) for number, time in enumerate(times)
    ]


@pytest.mark.parametrize(
    ("chain", "too_many", "expected"),
    [
        (slots(True, True, False), 1, Pull("t1", 2, 0, 1)),
        (slots(True, True, False), 5, Pull("t1", 2, 0, 1)),
        (slots(True, False, False), 5, Pull("t1", 1, None, 1)),
        (slots(False, True, True, False), 1, Pull("t1", 2, 0, 1)),
        (slots(False, True, True, False), 2, Pull("t1", 3, 0, 2)),
        (slots(True, False, True, True, False), 2, Pull("t1", 4, 1, 2)),
        (slots(False, False), 1, None),
        ([], 1, None),
        ([*slots(False, True, False), *slots(True, False, id="t2", from_ns=3)], 3, Pull("t1", 2, 0, 1)),
        ([*slots(False, False), *slots(True, False, id="t2", from_ns=2)], 3, Pull("t2", 1, None, 1)),
        ([*slots(True, True), *slots(False, id="t2", from_ns=2)], 3, Pull("t1", 1, None, 1)),
        # The smallest span; the earliest of several; two halves before a piece of something longer.
        (at(0, 10, 20, 25, 30, 40), 1, Pull("t1", 4, 2, 1)),
        (at(0, 10, 20, 30, 40), 1, Pull("t1", 2, 0, 1)),
        (at(0, 10, 20, 23, 24, 34), 1, Pull("t1", 4, 2, 1)),
        (at(0, 40, 80, 81, 82), 1, Pull("t1", 4, 2, 1)),
        (at(0, 20, 40, 60, 70, 80, 81), 1, Pull("t1", 5, 3, 1)),
        (at(0, 10, 20, 25, 30, 40, held=(3,)), 1, Pull("t1", 3, 1, 1)),
        # Many are to go: several at once, as long as that leaves no hole.
        (at(*range(0, 120, 10)), 8, Pull("t1", 5, 0, 4)),
    ],
)
def test_what_makes_room(chain: list[Slot], too_many: int, expected: Pull | None) -> None:
    """What leaves the chain most even, no more than are too many."""
    assert room.make_room(chain, too_many) == expected


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=20),
    st.integers(0, 20),
    st.integers(1, 20),
)
def test_what_makes_room_is_free(steps: list[tuple[bool, int]], fork: int, too_many: int) -> None:
    """Only what is free goes, of one timeline with what follows it there, no more than asked; where something may go, it does."""
    time, chain = 0, []
    for number, (free, later) in enumerate(steps):
        time += later
        chain.append(Slot("t2" if number >= fork else "t1", number, free, time))
    followed = [slot.free and after.timeline == slot.timeline for slot, after in itertools.pairwise(chain)]
    pull = room.make_room(chain, too_many)
    if pull is None:
        assert not any(followed)
        return
    assert 1 <= pull.count <= too_many
    gone = chain[pull.number - pull.count : pull.number]
    assert all(followed[slot.number] for slot in gone)
    assert {slot.timeline for slot in gone} == {chain[pull.number].timeline} == {pull.timeline}
    before = chain[gone[0].number - 1] if gone[0].number else None
    assert pull.base == (before.number if before and before.timeline == pull.timeline else None)
    if before is None:
        assert not any(followed[gone[-1].number + 1 :])


@pytest.mark.parametrize(
    ("limit", "keep", "more", "copies"),
    [(4, 60, 2.1, 40), (6, 100, 1.5, 20), (8, 100, 1.35, 7), (16, 500, 1.15, 8), (32, 1000, 1.1, 7)],
)
def test_old_history_goes_with_a_short_chain(limit: int, keep: int, more: float, copies: float) -> None:
    """History that is to be kept longer than `limit` base points follow each other: what is older can be dropped all the same.

    `more`: how much is kept at most, of what is to be; `copies`: how often what was written is written again by merges.
    """
    chain: list[Slot] = []
    written = 0
    rounds = 5 * keep
    for now in range(1, rounds + 1):
        while len(chain) >= limit:
            pull = room.make_room(chain, len(chain) + 1 - limit)
            assert pull is not None and pull.count == 1
            numbers = [slot.number for slot in chain]
            end = numbers.index(pull.number)
            written += chain[end].time_ns - (chain[end - 2].time_ns if end > 1 else 0)
            del chain[end - 1]
        chain.append(Slot("t1", now, True, now))
        # As retention does: history stands on the newest that is old enough, and what is older goes.
        stands = max((slot.time_ns for slot in chain if slot.time_ns < now - keep), default=0)
        newest = chain[-1].number
        chain = [
            replace(slot, free=slot.number != newest and slot.time_ns != stands)
            for slot in chain
            if slot.time_ns >= stands
        ]
        assert now - stands <= more * keep, now
    assert written <= copies * rounds


def test_the_chain_of_a_fork_goes_on_in_its_parent(forest: Forest) -> None:
    disk = forest.disk("web", 4)
    fork = forest.fork("rescue", disk, 2, 2)
    bare = forest.fork("bare", disk, 0, 0)
    room.add_manual(disk.directory, 0)
    room.add_manual(fork.directory, 9)
    room.add_manual(fork.directory, 0)
    assert room.manual(fork.directory) == {0}
    below = [(disk.id, n) for n in range(3)]
    assert room.chain(forest.state, fork.id) == [*below, (fork.id, 0), (fork.id, 1)]
    assert room.chain(forest.state, bare.id) == [*below, (disk.id, 3)]
    found = room.slots(forest.state, forest.catalog, room.chain(forest.state, fork.id))
    assert [slot.free for slot in found] == [False, True, False, False, False]
    (disk.directory / MANUAL).write_text('{"numbers": [true]}')
    with pytest.raises(CorruptError, match="'numbers' are not base points"):
        room.manual(disk.directory)


def service_of(forest: Forest, config: Config) -> Core:
    """What the service has of its own, without its processes."""
    state = forest.state
    clock, _ = fix_clock(state.clock, lambda: START_NS)
    return Core(state, config, clock, forest.catalog, EventLog(state.events), Targets(state, 1))


def test_a_chain_that_grows_long_is_said(forest: Forest) -> None:
    """Once, at half of the limit; a few less are no news."""
    disk = forest.disk("web", 1)
    entry = forest.catalog.get("web")
    assert entry is not None
    core = service_of(forest, Config())
    making = Room(core, Merges(core))
    for number in range(1, CHAIN_WARNING + 2):
        if number >= CHAIN_WARNING - 3:
            trio.run(making.make, entry, number)
            assert len(read_events(forest.state.events, 99)) == (number >= CHAIN_WARNING - 1)
        qemu.create_overlay(
            disk.path(number), backing=disk.path(number - 1), format="qcow2", size=forest.size
        )
        note = nodes.Node(number, 10 * (number + 1), START_NS + number, number + 1, Grade.CRASH, 1, 3)
        nodes.write_note(disk.directory, note)
    (event,) = read_events(forest.state.events, 99)
    assert (event["event"], event["level"]) == ("chain.long", "warning")
    assert (event["disk"], event["length"], event["limit"]) == ("web", CHAIN_WARNING, 128)


def test_at_the_limit_nothing_goes_that_somebody_asked_for(forest: Forest) -> None:
    disk = forest.disk("web", 4)
    entry = forest.catalog.get("web")
    assert entry is not None
    core = service_of(forest, Config(policy_max_chain=4))
    making = Room(core, Merges(core))
    for number in range(3):
        room.add_manual(disk.directory, number)
    with pytest.raises(
        RefusedError, match=r"is full \(4 of 4\), and no automatic base point in it may go"
    ) as full:
        trio.run(making.make, entry, 4)
    assert "cdp snapshot tree web" in full.value.hint
    with pytest.raises(RefusedError, match="has 4 base points, and max_chain is 4"):
        trio.run(making.check, entry)
    assert nodes.published(disk.directory) == [0, 1, 2, 3]
    forest.check()


# --- faults


STEPS = ("rename", "fsync", "fdatasync", "unlink")


def every_step(dying: Callable[[Step], Step]) -> None:
    """Durable steps, and those of the tools."""
    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))
    for name in ("copy", "rebase", "check"):
        setattr(qemu, name, dying(getattr(qemu, name)))
    setattr(same, "_compare", dying(getattr(same, "_compare")))  # noqa: B009, B010


def restart(state: StateDir) -> list[str]:
    """What the service's start does to a directory; what it ended."""
    for directory in state.timelines.iterdir():
        durable.sweep(directory)
    done, failed = merge.finish_all(state)
    assert not failed
    return done


def test_a_merge_killed_anywhere_is_as_before_or_done(tmp_path: Path) -> None:
    forest = Forest(tmp_path / "s", 3, size=256 << 10)
    disk = forest.disk("web", 4)
    forest.fork("rescue", disk, 3, 1)
    forest.close()
    merged_content = {n: disk.content[n] for n in (0, 3)}
    before, merged, ended = 0, 0, 0
    for number in range(1, 100):
        copy = Forest(tmp_path / f"c{number}")
        shutil.copytree(forest.state.path, copy.state.path, dirs_exist_ok=True)
        copy.lines = {
            line.name: Line(line.id, line.name, copy.state.timeline(line.id), dict(line.content))
            for line in forest.lines.values()
        }
        copy.close()

        def work(state: StateDir = copy.state, id: str = disk.id) -> None:
            with Catalog.open(state, writable=False) as catalog:
                merge.merge(state, catalog, id, "pull", 3, base=0)

        died = dies_at(number, work, every_step)
        ended += bool(restart(copy.state))
        if not base_point_path(copy.state.timeline(disk.id), 2).exists():
            copy.lines["web"].content = dict(merged_content)
            merged += 1
        else:
            before += 1
        copy.check()
        shutil.rmtree(copy.state.path)
        if not died:
            break
    assert before > 5 and merged > 3 and ended > 3


def test_the_disk_is_full_in_the_middle(forest: Forest, tmp_path: Path) -> None:
    """Stock tools on a file system that has no room for the new file."""
    store = tmp_path / "small"
    store.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", store], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system of a size of its own needs root")
    try:
        small = Forest(store / "s", size=2 << 20)
        disk = small.disk("web", 4)
        room = os.statvfs(store)
        (store / "ballast").write_bytes(bytes(room.f_bavail * room.f_frsize - (384 << 10)))
        with pytest.raises(NoSpaceError, match="No space left") as full:
            do(small, disk, "pull", 3, 0)
        assert "free space" in full.value.hint
        small.check()
        (store / "ballast").unlink()
        do(small, disk, "pull", 3, 0)
        small.check()
        small.close()
    finally:
        subprocess.run(["umount", store], check=True)


def test_a_tool_that_writes_something_else_is_found(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header alone says that the new file stands elsewhere: what `rebase -u` does, which copies nothing."""
    disk = forest.disk("web", 4)
    tools = Path(forest.state.path.parent, "bin")
    tools.mkdir()
    real = shutil.which("qemu-img")
    (tools / "qemu-img").write_text(
        f'#!/bin/sh\n[ "$1" = rebase ] && {{ shift; set -- rebase -u "$@"; }}\nexec {real} "$@"\n'
    )
    (tools / "qemu-img").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        with pytest.raises(CorruptError, match=r"the merged bp-3.qcow2 differs from its original in bytes"):
            do(forest, disk, "pull", 3)
    forest.check()
    do(forest, disk, "pull", 3)
    forest.check()


def test_a_note_of_a_merge_that_makes_no_sense_removes_nothing(forest: Forest) -> None:
    disk = forest.disk("web", 3)
    path = disk.directory / lock.NOTE
    for text in (
        "{",
        '{"keep": 1, "on": "base.raw", "gone": [2]}',
        '{"keep": 1, "on": "bp-0.qcow2", "gone": [0]}',
        '{"keep": 1, "on": 3, "gone": [0]}',
        '{"keep": 1, "gone": [0]}',
    ):
        path.write_text(text)
        with pytest.raises(CorruptError, match=r"chain.json is damaged"):
            do(forest, disk, "delete", 1)
        assert [len(said) for said in merge.finish_all(forest.state)] == [0, 1]
        path.unlink()
        forest.check()
