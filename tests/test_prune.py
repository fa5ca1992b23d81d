"""Carrying out the plan: what is kept reads as before, whatever is open, and however a pass ends."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import nbd
import pytest

from cdpserver import durable, leases, offtime, timeline
from cdpserver.catalog import Catalog, Row
from cdpserver.chain.lock import alone, stays
from cdpserver.check.links import check_links
from cdpserver.config import Config, parse_config
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.forks import Forks
from cdpserver.journal import links
from cdpserver.journal.log import Journal, interval_path, intervals
from cdpserver.leases import GRACE_NS, Lease
from cdpserver.locks import Lock
from cdpserver.retention import policies
from cdpserver.retention import prune as pruning
from cdpserver.retention.facts import gather, gather_all
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.core import INDEXER, SECOND_NS, Line, World, scratch
from tests.dying import Step, dies_at
from tests.islands import publish
from tests.model import BLOCK
from tests.test_policy import cdp
from tests.test_service import Server, connected, pattern, read, until, write

SIZE = 64 * BLOCK
MINUTE_NS = 60 * SECOND_NS
CONFIG = parse_config("[policy]\nbp_every = '20m'\nkeep_rp = '1h'\nkeep_bp = '2h'\n")


class Kept:
    """A disk with four hours of history, a base point every 20 minutes, and its catalog."""

    def __init__(self, path: Path, hours: int = 4) -> None:
        self.world = World(path)
        self.catalog = Catalog.open(self.world.state, writable=True)
        self.line: Line = self.world.add(SIZE, image=bytes(SIZE))
        self.entry = self.catalog.add(self.line.timeline.full_name, self.line.timeline.id)
        self.ends: dict[int, int] = {}
        chance = random.Random(7)
        self.line.write(0, chance.randbytes(BLOCK))
        self.line.synced()  # the session that the first write began
        for number in range(3 * hours):
            for _ in range(3):
                self.line.write(chance.randrange(64) * BLOCK, chance.randbytes(BLOCK))
                self.world.now_ns += 6 * MINUTE_NS
            self.line.cut()
            self.world.now_ns += 2 * MINUTE_NS
            INDEXER.call("drain", self.line.directory, self.world.boot)
            publish(self.line, number)
        self.line.write(0, chance.randbytes(BLOCK))

    def clone(self, path: Path) -> Self:
        """The same files in another place, for passes and for reading."""
        path.mkdir()
        made = object.__new__(type(self))
        made.world, made.entry = self.world.clone(path), self.entry
        made.line, made.catalog = made.world.lines[0], Catalog.open(made.world.state, writable=True)
        return made

    def prune(self, config: Config = CONFIG) -> pruning.Pass:
        return pruning.prune(self.world.state, self.catalog, config, now_ns=self.world.now_ns, disk=None)

    def look(self, config: Config = CONFIG) -> pruning.Pass:
        return pruning.look(self.world.state, self.catalog, config, now_ns=self.world.now_ns, disk=None)[0]

    def intervals(self) -> list[int]:
        return intervals(self.line.directory)

    def inside(self, interval: int) -> int:
        """A seq that no base point holds."""
        journal = Journal(self.line.directory)
        try:
            return journal.first_reader(interval).first_seq + 1
        finally:
            journal.close()

    @contextlib.contextmanager
    def view(self, seq: int) -> Iterator[View]:
        with (
            contextlib.closing(
                History(self.world.state.path, self.line.timeline, self.world.boot)
            ) as history,
            contextlib.closing(View(history, seq)) as view,
        ):
            yield view

    def read(self, seq: int) -> bytes:
        with self.view(seq) as view:
            return view.read(0, SIZE)

    def close(self) -> None:
        self.catalog.close()
        self.world.close()


@pytest.fixture
def kept() -> Iterator[Kept]:
    with scratch() as path:
        found = Kept(path)
        try:
            yield found
        finally:
            found.close()


def check(kept: Kept, last_seq: int | None = None) -> int:
    """Every instant that is still offered is bit-exact; how many. `last_seq` where nobody writes."""
    good = 0
    for seq in range(1, (kept.line.last_seq if last_seq is None else last_seq) + 1):
        with contextlib.suppress(RefusedError):
            content = kept.read(seq)
            assert content == kept.line.model.read(seq, 0, SIZE), seq
            good += 1
    return good


def test_a_pass_does_what_was_announced_and_the_rest_reads_as_before(kept: Kept) -> None:
    before = kept.intervals()
    announced = kept.look()
    assert kept.intervals() == before
    done = kept.prune()
    # Base points that stay take over what only merged ones held, and are packed anew: what came back is told as it was.
    most = {decision.what: decision.bytes for decision in announced.dropped}
    assert [replace(d, bytes=most[d.what]) for d in done.dropped] == announced.dropped
    assert not done.failed and all(d.bytes > 0 and d.reason for d in done.dropped)
    assert all(d.bytes == most[d.what] for d in done.dropped if d.is_interval)
    came_back = announced.disks[0].bytes - done.disks[0].bytes
    assert sum(d.bytes for d in done.dropped) == came_back > 0
    assert kept.intervals() == before[-4:]
    # All of the last hour, and the base points that are kept.
    assert check(kept) >= 3 * 4 + 6
    assert kept.prune().dropped == [] == kept.look().dropped


@pytest.mark.parametrize("clean", [True, False])
def test_history_does_not_age_while_the_host_is_down(kept: Kept, clean: bool) -> None:
    """Nor by a clock that is years ahead at a boot."""
    kept.prune()
    before = kept.intervals()
    kept.world.now_ns += 400 * 24 * 60 * MINUTE_NS
    assert kept.look().dropped == [], "time alone makes nothing old"
    last_ns = kept.line.writer.last_time_ns
    kept.world.reboot(clean=clean)
    assert offtime.note(kept.world.state, last_ns, kept.world.now_ns)
    kept.line.write(0, b"x" * BLOCK)
    assert kept.look().dropped == []
    assert set(before) <= set(kept.intervals())
    # Another hour of writes does.
    kept.line.synced()
    for _ in range(7):
        kept.line.write(BLOCK, b"y" * BLOCK)
        kept.world.now_ns += 10 * MINUTE_NS
    kept.line.cut()
    kept.world.now_ns += MINUTE_NS
    publish(kept.line, 12)
    kept.line.write(0, b"z" * BLOCK)
    assert kept.look().dropped


def test_a_resync_keeps_what_it_compares_with(kept: Kept) -> None:
    kept.line.disconnect()
    kept.line.write(0, kept.line.model.read(kept.line.last_seq, 0, BLOCK))  # a new session
    ref = kept.line.writer.state.resync_ref
    for _ in range(3):
        kept.world.now_ns += 70 * MINUTE_NS
        kept.line.write(BLOCK, b"new" + bytes(BLOCK - 3))
        kept.line.cut()
        publish(kept.line, len(kept.line.cuts) - 1)
    kept.prune()
    assert kept.read(ref) == kept.line.model.read(ref, 0, SIZE)
    old = kept.line.model.read(ref, 2 * BLOCK, 30 * BLOCK)
    kept.line.write(2 * BLOCK, old)  # the mirror goes on: what is as it was costs no payload
    assert kept.read(kept.line.last_seq) == kept.line.model.read(kept.line.last_seq, 0, SIZE)
    assert check(kept) > 0


def test_an_open_view_finds_another_instant_after_a_pass(kept: Kept) -> None:
    """As a resync does, of what the target has open: intervals that were listed then are no reason to refuse a write."""
    with kept.view(kept.line.last_seq) as view:
        assert kept.prune().dropped
        seq = kept.inside(kept.intervals()[-2])
        assert view.at(seq).read(0, SIZE) == kept.line.model.read(seq, 0, SIZE)


def test_locks_and_leases_keep_what_they_hold(kept: Kept) -> None:
    early, middle, locked = (kept.inside(number) for number in (3, 5, 7))
    kept.catalog.put_row(
        "locks", Lock("lock-1", kept.entry.id, locked, 1, kept.world.now_ns + SECOND_NS, False, "", 1).row()
    )
    lease = Lease.take(kept.line.directory, early)
    with kept.view(early) as reader:
        content = reader.read(0, SIZE)
        kept.prune()
        assert reader.read(0, SIZE) == content == kept.line.model.read(early, 0, SIZE)
        assert kept.read(locked) == kept.line.model.read(locked, 0, SIZE)
        with pytest.raises(RefusedError):
            kept.read(middle)
    # Its holder ends: a grace, then it goes; the lock goes when its time has come.
    lease.close()
    for passed_ns, held in ((0, True), (GRACE_NS - 1, True), (1, False)):
        kept.world.now_ns += passed_ns
        kept.prune()
        if held:
            assert kept.read(early) == content
        else:
            with pytest.raises(RefusedError):
                kept.read(early)
    with pytest.raises(RefusedError):
        kept.read(locked)


def test_a_lease_ends_with_its_process(tmp_path: Path) -> None:
    """Also one that is killed; and taken again it holds anew."""
    script = (
        "import sys, time; from pathlib import Path; from cdpserver.leases import Lease\n"
        "lease = Lease.take(Path(sys.argv[1]), 5); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert leases.held(tmp_path, now_ns=1, tidy=True) == [5]
        assert leases.held(tmp_path, now_ns=1 + 10 * GRACE_NS, tidy=True) == [5]
        holder.send_signal(signal.SIGKILL)
    now_ns = 10**18
    assert leases.held(tmp_path, now_ns=now_ns, tidy=True) == [5]
    again = Lease.take(tmp_path, 5)
    now_ns += 2 * GRACE_NS
    assert leases.held(tmp_path, now_ns=now_ns, tidy=True) == [5]
    again.close()
    assert leases.held(tmp_path, now_ns=now_ns, tidy=True) == [5]
    assert leases.held(tmp_path, now_ns=now_ns - 1, tidy=True) == [5]
    # A mere look takes nothing away.
    assert leases.held(tmp_path, now_ns=now_ns + GRACE_NS) == [] != os.listdir(tmp_path / leases.DIRECTORY)
    assert leases.held(tmp_path, now_ns=now_ns + GRACE_NS, tidy=True) == []
    assert os.listdir(tmp_path / leases.DIRECTORY) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a lease of another user's needs root")
def test_leases_that_root_takes_end_for_the_service() -> None:
    """An export that is started by hand must not keep history for ever, nor stop the passes."""
    user = 65534
    with scratch() as timeline:
        os.chown(timeline, user, user)
        lease = Lease.take(timeline, 5)

        def looks() -> None:
            os.setgid(user)
            os.setuid(user)
            assert leases.held(timeline, now_ns=10**18, tidy=True) == [5]

        assert not dies_at(1, looks, lambda _: None)
        lease.close()

        def ends() -> None:
            os.setgid(user)
            os.setuid(user)
            assert leases.held(timeline, now_ns=10**18, tidy=True) == [5]
            assert leases.held(timeline, now_ns=10**18 + GRACE_NS, tidy=True) == []

        assert not dies_at(1, ends, lambda _: None)
        assert os.listdir(timeline / leases.DIRECTORY) == []


def test_a_pass_killed_at_any_step_is_finished_by_the_next(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each rename, and between a rename and the removal of what was renamed."""
    whole = durable.remove_tree

    class KilledError(BaseException):
        pass

    def killed(path: Path) -> None:
        if half:
            os.rename(path, path.with_name(durable.REMOVING + path.name))
        raise KilledError

    gone = sum(decision.is_interval for decision in kept.look().dropped)
    assert gone > 5
    for number in range(gone):
        half = number % 2 == 0
        with monkeypatch.context() as patched:
            patched.setattr(durable, "remove_tree", killed)
            with pytest.raises(KilledError):
                kept.prune()
        assert check(kept) > 0
        # One more step is done by hand, as a pass that was killed later would have.
        first = kept.look().dropped[:1]
        pruning.finish(kept.line.directory)
        for decision in first:
            assert decision.is_interval
            whole(interval_path(kept.line.directory, decision.number))
        if not any(decision.is_interval for decision in kept.look().dropped):
            break
    assert not any(decision.is_interval for decision in kept.prune().dropped)
    assert kept.prune().dropped == []
    assert not list((kept.line.directory / "intervals").glob(f"{durable.REMOVING}*"))
    assert len(kept.intervals()) == 4 and check(kept) >= 3 * 4 + 6


def test_killed_between_the_link_and_the_removal_the_next_pass_drops_it(kept: Kept) -> None:
    """The chain says that the interval is dropped while it is still there: no damage, and said once."""

    def dies(dying: Callable[[Step], Step]) -> None:
        durable.remove_tree = dying(durable.remove_tree)

    first = next(decision.number for decision in kept.look().dropped if decision.is_interval)
    assert dies_at(1, lambda: kept.prune() and None, dies)
    uuid, found = links.read(kept.line.directory)
    assert (found[-1].kind, found[-1].interval) == (links.Kind.DROPPED, first)
    assert first in kept.intervals() and check(kept) > 0
    assert not check_links(kept.line.directory, uuid)[1]
    assert not kept.prune().failed
    assert first not in kept.intervals()
    found = links.read(kept.line.directory)[1]
    assert [link.interval for link in found if link.kind == links.Kind.DROPPED].count(first) == 1
    assert not check_links(kept.line.directory, uuid)[1]


@pytest.mark.parametrize("damage", ["policy", "lock", "contradiction"])
def test_a_disk_that_cannot_be_judged_is_left_alone(kept: Kept, damage: str) -> None:
    before, id = kept.intervals(), policies.disk_row(kept.entry.id)
    match damage:
        case "policy":
            kept.catalog.put_row("policies", policies.row(id, {}, {"keep_rp": "soon"}))
        case "contradiction":
            kept.catalog.put_row("policies", policies.row(id, {}, {"keep_rp": "10m"}))
        case "lock":
            row = Lock("lock-1", kept.entry.id, 5, 1, None, False, "", 1).row()
            kept.catalog.put_row("locks", Row(row.id, 2, row.fields))
    done = kept.prune()
    assert list(done.failed) == [kept.entry.name] and done.dropped == []
    assert kept.intervals() == before


def test_forks_hold_their_point(kept: Kept) -> None:
    stands, other = kept.inside(3), kept.inside(5)
    fork = kept.world.fork(kept.line, stands)
    kept.catalog.add(fork.timeline.full_name, fork.timeline.id)
    kept.prune()
    assert kept.read(stands) == kept.line.model.read(stands, 0, SIZE)
    with pytest.raises(RefusedError):
        kept.read(other)
    found = gather(kept.world.state, kept.catalog, CONFIG, kept.entry, now_ns=kept.world.now_ns)
    assert [hold.why for hold in found.holds] == [f"the fork {fork.timeline.full_name} stands on it"]


def test_a_pass_reads_what_disks_stand_on_once_for_all_of_them(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any disk may be a fork of any other: looked for anew for each, a pass took the square of their number."""
    forks = [kept.world.fork(kept.line, kept.inside(interval)) for interval in (1, 2, 3)]
    for fork in forks:
        kept.catalog.add(fork.timeline.full_name, fork.timeline.id)
    loaded: list[Path] = []
    load = timeline.load

    def noted(directory: Path) -> timeline.Timeline:
        loaded.append(directory)
        return load(directory)

    monkeypatch.setattr("cdpserver.forks.timeline.load", noted)
    found, failed = gather_all(kept.world.state, kept.catalog, CONFIG, now_ns=kept.world.now_ns)
    assert (len(found), failed) == (4, {})
    assert sorted(loaded) == sorted(line.directory for line in (kept.line, *forks))


def test_a_fork_made_meanwhile_counts(kept: Kept) -> None:
    forks = Forks(kept.world.state, kept.catalog)
    assert forks.of(kept.entry.id) == []
    fork = kept.world.fork(kept.line, kept.inside(3))
    kept.catalog.add(fork.timeline.full_name, fork.timeline.id)
    assert [line.id for _, line in forks.of(kept.entry.id)] == [fork.timeline.id]
    (fork.directory / timeline.FILE).write_text("{")
    kept.catalog.set_state(fork.timeline.full_name, "removing")
    with pytest.raises(CorruptError, match="may be a fork"):
        forks.of(kept.entry.id)
    assert forks.of(fork.timeline.id) == []


def test_dropping_and_locking_exclude_each_other(kept: Kept) -> None:
    before = kept.intervals()
    with stays(kept.line.directory):
        done = kept.prune()
        assert "dropped or locked" in done.failed[kept.entry.name] and kept.intervals() == before
    with alone(kept.line.directory), pytest.raises(RefusedError), stays(kept.line.directory, wait_s=0):
        raise AssertionError("history is being dropped")
    assert kept.prune().dropped


@pytest.mark.real
def test_pruning_of_a_service(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        write(server.add("d"), pattern(1))
        server.synced("d")
        for arguments in (["--dry-run"], ["d"], []):
            done = cdp(server, "prune", *arguments, "--json")
            assert (done.returncode, json.loads(done.stdout)) == (0, []), done.stderr
        assert cdp(server, "prune", "nobody").returncode == 2
        # A point that is open is held until its reader is gone, and a grace longer.
        with connected(server.uri("d@latest")) as client:
            directory = server.state_dir / "timelines" / "t1"
            assert client.get_size() and len(leases.held(directory, now_ns=1)) == 1
        assert len(leases.held(directory, now_ns=1)) == 1
        # A policy that no longer goes with the configuration: the disk is left alone, and who asks is told.
        server.request("PATCH", "/v1/policies/d", {"keep_rp": "10h"})
        server.stop()
    config = short_path / "c.toml"
    config.write_text("[policy]\nbp_every = '11h'\n")
    with Server(short_path / "s", "--config", str(config)) as server:
        done = cdp(server, "prune", "d")
        assert done.returncode == 3 and "bp_every 11h is longer than keep_rp 10h" in done.stderr
        assert "cdp prune" in done.stderr and server.events("retention.left-alone")


def test_a_disk_at_its_cap_refuses_writes_when_its_policy_says_so(short_path: Path) -> None:
    mib = 1 << 20
    with Server(short_path / "s") as server:
        uri = server.post("/v1/disks", name="d", size=128 * mib)["uri"]
        write(uri, pattern(1))
        server.synced("d")
        with connected(uri) as client:
            for at in range(0, 72 * mib, 8 * mib):
                client.pwrite(random.Random(at).randbytes(8 * mib), at)
            done = cdp(server, "policy", "set", "d", "--size-cap", "64M")
            assert done.returncode == 2 and "always stay" in done.stderr, "nothing could be shortened to that"
            done = cdp(server, "policy", "set", "d", "--size-cap", "64M", "--at-cap", "refuse")
            assert done.returncode == 0, done.stderr
            cdp(server, "prune")
            with pytest.raises(nbd.Error) as refused:
                client.pwrite(pattern(2), 0)
            assert refused.value.errno == "ENOSPC"
            with pytest.raises(nbd.Error) as refused:
                client.zero(4096, 0)
            assert refused.value.errno == "ENOSPC"
            assert client.pread(8 * mib, 0) == random.Random(0).randbytes(8 * mib), "what is there reads"
            assert server.events("retention.writes-refused")
            # Said again to a worker that does not know.
            os.kill(server.pids()["target-0"], signal.SIGKILL)
            cdp(server, "prune")
            assert len(server.events("retention.cap-near")) == 1, "said once, not by each pass"
        with connected(uri) as client, pytest.raises(nbd.Error):
            client.pwrite(pattern(2), 0)
        cdp(server, "policy", "set", "d", "--size-cap", "1G")
        cdp(server, "prune")
        write(uri, pattern(2))
        assert read(uri, 4096) == pattern(2)


def refused(uri: str) -> bool:
    """Is a write refused for want of room?"""
    with connected(uri) as client:
        try:
            client.pwrite(pattern(3), 0)
        except nbd.Error as error:
            return bool(error.errno == "ENOSPC")
    return False


def test_at_the_stores_cap_disks_that_are_never_shortened_take_no_writes(short_path: Path) -> None:
    """Found by the service itself: while the disks grow, and at once after a start."""
    mib, config, more = 1 << 20, short_path / "c.toml", "[policy]\nat_cap = 'refuse'\n"
    config.write_text(f"[store]\nsize_cap = '64M'\nprune_every = '1s'\n{more}")
    with Server(short_path / "s", "--config", str(config)) as server:
        uris = [str(server.post("/v1/disks", name=name, size=64 * mib)["uri"]) for name in ("d", "e")]
        for uri in uris:
            write(uri, pattern(1))
        for uri in uris:
            with connected(uri) as client:
                for at in range(8 * mib, 44 * mib, 4 * mib):
                    # What was taken is past the cap by then, and neither disk has one of its own.
                    with contextlib.suppress(nbd.Error):
                        client.pwrite(random.Random(at).randbytes(4 * mib), at)
        for uri in uris:
            until(partial(refused, uri), "the refusal of writes")
        first = server.events("retention.writes-refused")
        assert {event["disk"] for event in first} == {"d", "e"} and first[0]["size_cap"] == 64 * mib
        assert "writes are refused then" in server.events("retention.cap-near")[-1]["reason"]
        done = cdp(server, "usage", "--json", "--config", str(config))
        (cap,) = [cap for cap in json.loads(done.stdout)["caps"] if cap["of"] == "store"]
        assert cap["then"] == "refuse" and cap["bytes"] >= cap["cap_bytes"]
    config.write_text(f"[store]\nsize_cap = '64M'\nprune_every = '10m'\n{more}")
    with Server(short_path / "s", "--config", str(config)) as server:
        for uri in uris:
            until(partial(refused, uri), "the refusal after a start")
    config.write_text(f"[store]\nsize_cap = '1G'\n{more}")
    with Server(short_path / "s", "--config", str(config)) as server:
        write(uris[0], pattern(2))
        assert read(uris[0], 4096) == pattern(2)


def test_a_pass_over_one_disk_says_nothing_of_the_whole_store(short_path: Path) -> None:
    config = short_path / "c.toml"
    config.write_text("[store]\nsize_cap = '64M'\nlock_quota = 1\n")
    with Server(short_path / "s", "--config", str(config)) as server:
        for name in ("d", "e"):
            write(server.add(name), pattern(1))
            server.synced(name)
        with connected(server.get("/v1/disks/d")["uri"]) as client:
            client.pwrite(random.Random(1).randbytes(4 << 20), 0)
        assert cdp(server, "point", "lock", "d@latest").returncode == 0
        for arguments in ([], ["e"], []):
            assert cdp(server, "prune", *arguments).returncode == 0
        assert len(server.events("retention.lock-quota-near")) == 1


def test_what_is_over_is_announced_and_the_service_drops_it_by_itself(short_path: Path) -> None:
    config, policy = short_path / "c.toml", "[policy]\nbp_every = '10s'\nkeep_rp = '10s'\nkeep_bp = 'none'\n"
    config.write_text(f"[store]\nprune_every = '10m'\n{policy}")
    with Server(short_path / "s", "--config", str(config)) as server:
        uri = server.add("d")
        write(uri, pattern(1))
        server.synced("d")
        server.post("/v1/disks/d:cut")
        done = cdp(server, "point", "lock", "d@latest", "--until", "3s")
        assert done.returncode == 0, done.stderr

        def announced() -> bool:
            write(uri, pattern(2))  # a disk that rests does not age
            return any(row["what"] == "interval:1" for row in server.get("/v1/prune"))

        until(announced, "the first interval's age")
        done = cdp(server, "prune", "d", "--dry-run", "--json")
        rows = json.loads(done.stdout)
        assert rows and all(set(row) == {"what", "disk", "reason", "bytes"} for row in rows)
        first = next(row for row in rows if row["what"] == "interval:1")
        assert first["disk"] == "d" and first["bytes"] > 0 and "keep_rp 10s" in first["reason"]
        done = cdp(server, "prune", "d", "--dry-run")
        assert "interval:1" in done.stdout and "would come back" in done.stdout + done.stderr
        assert not server.events("retention.dropped"), "a look drops nothing"
    config.write_text(f"[store]\nprune_every = '1s'\n{policy}")
    with Server(short_path / "s", "--config", str(config)) as server:

        def dropped() -> bool:
            write(uri, pattern(3))
            return any("interval:1" in event["things"] for event in server.events("retention.dropped"))

        until(dropped, "the first interval's end")
        (ended,) = server.events("lock.expired")
        assert ended["disk"] == "d" and server.get("/v1/locks") == []
        assert server.events("retention.dropped")[0]["bytes"] > 0


def test_a_cap_is_announced_before_anything_goes(short_path: Path) -> None:
    config = short_path / "c.toml"
    config.write_text("[policy]\nsize_cap = '64M'\n")
    with Server(short_path / "s", "--config", str(config)) as server:
        uri = server.post("/v1/disks", name="d", size=64 << 20)["uri"]
        write(uri, pattern(1))
        server.synced("d")
        with connected(uri) as client:
            for at in range(0, 56 << 20, 8 << 20):
                client.pwrite(random.Random(at).randbytes(8 << 20), at)
        assert json.loads(cdp(server, "prune", "--json").stdout) == []
        (near,) = server.events("retention.cap-near")
        assert near["disk"] == "d" and 80 <= near["percent"] < 95 and near["level"] == "warning"
        assert "the oldest history goes then" in near["reason"] and not server.events("retention.dropped")
