"""Locks on points: what can be said of them, what nobody can take back, and that they hold against a removal."""

import fcntl
import json
import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import clock as clocks
from cdpserver import locks
from cdpserver.catalog import Catalog, Row
from cdpserver.chain.lock import FILE, stays
from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.events import EventLog
from cdpserver.locks import Lock
from cdpserver.names import MAX_TIME_NS, format_time
from cdpserver.service.prepare import prepare
from cdpserver.state import StateDir
from tests.core import World
from tests.test_policy import cdp
from tests.test_service import ApiError, Server, pattern, write

SECOND_NS = 1_000_000_000
DAY_NS = 86_400 * SECOND_NS
NOW_NS = 1_800_000_000 * SECOND_NS

LOCK = Lock("lock-00000001", "t1", 12, NOW_NS - DAY_NS, NOW_NS + DAY_NS, True, "audit", NOW_NS - 5)

TIMES = st.integers(NOW_NS - DAY_NS, NOW_NS + 9 * DAY_NS)
LOCKS = st.builds(
    Lock,
    st.just("lock-1"),
    st.just("t1"),
    st.integers(0, 99),
    TIMES,
    st.none() | TIMES,
    st.booleans(),
    st.text(max_size=9),
    TIMES,
)


@given(LOCKS.filter(lambda lock: lock.reason.isprintable()))
def test_a_lock_is_read_as_it_was_kept(lock: Lock) -> None:
    assert locks.read_lock(lock.row()) == lock


@pytest.mark.parametrize(
    "change",
    [
        {"seq": "1"},
        {"until_ns": "soon"},
        {"immutable": 1},
        {"timeline": None},
        {"reason": None},
        {"time_ns": True},
    ],
)
def test_a_lock_that_cannot_be_read_is_damage_not_nothing(change: dict[str, Any]) -> None:
    row = LOCK.row()
    with pytest.raises(CorruptError, match="lock-00000001"):
        locks.read_lock(replace(row, fields={**row.fields, **change}))
    with pytest.raises(CorruptError):
        locks.read_lock(replace(row, schema=2))


@given(LOCKS, st.none() | TIMES, st.booleans(), TIMES)
def test_nothing_makes_an_immutable_lock_shorter(
    old: Lock, until_ns: int | None, immutable: bool, now_ns: int
) -> None:
    try:
        new = locks.renew(old, until_ns=until_ns, immutable=immutable, reason=None, now_ns=now_ns)
    except RefusedError:
        assert old.immutable and old.holds(now_ns)
        return
    assert (new.id, new.seq, new.timeline) == (old.id, old.seq, old.timeline)
    for later_ns in (now_ns, now_ns + SECOND_NS, old.until_ns or MAX_TIME_NS, (old.until_ns or 1) - 1):
        if later_ns >= now_ns and old.immutable and old.holds(now_ns) and old.holds(later_ns):
            assert new.immutable and new.holds(later_ns)


@given(LOCKS, TIMES)
def test_only_an_immutable_lock_before_its_time_is_kept_from_removal(lock: Lock, now_ns: int) -> None:
    try:
        locks.check_removable(lock, now_ns=now_ns)
    except RefusedError:
        assert lock.immutable and lock.holds(now_ns)
    else:
        assert not (lock.immutable and lock.holds(now_ns))


def test_when_a_lock_ends() -> None:
    assert locks.parse_until("30d", now_ns=NOW_NS) == NOW_NS + 30 * DAY_NS
    assert locks.parse_until(format_time(NOW_NS + 1), now_ns=NOW_NS) == NOW_NS + 1
    for text in ("0s", "yesterday", "-5m", "", format_time(NOW_NS), "1970-01-01T00:00:00Z", "latest"):
        with pytest.raises(UsageError) as caught:
            locks.parse_until(text, now_ns=NOW_NS)
        assert "30d" in caught.value.hint
    assert LOCK.holds(NOW_NS) and not LOCK.holds(NOW_NS + DAY_NS)
    assert replace(LOCK, until_ns=None).holds(MAX_TIME_NS)


@pytest.mark.parametrize("text", ["x" * 501, "two\nlines", "\x1b[2J"])
def test_what_is_no_reason(text: str) -> None:
    with pytest.raises(UsageError):
        locks.check_reason(text)


def test_locked_disks_are_not_removed() -> None:
    locks.check_unlocked([replace(LOCK, until_ns=NOW_NS)], "d", now_ns=NOW_NS)
    with pytest.raises(RefusedError, match="1 immutable"):
        locks.check_unlocked([LOCK, replace(LOCK, immutable=False)], "d", now_ns=NOW_NS)
    with pytest.raises(RefusedError, match="1 locked") as caught:
        locks.check_unlocked([replace(LOCK, immutable=False)], "d", now_ns=NOW_NS)
    assert "cdp point unlock" in caught.value.hint


def test_rows_of_a_disk_go_with_it(tmp_path: Path) -> None:
    with Catalog.open(StateDir.create_or_open(tmp_path / "s"), writable=True) as catalog:
        for number, line in enumerate(("t1", "t2", "t1")):
            lock = replace(LOCK, id=f"lock-{number}", timeline=line, seq=number)
            catalog.put_row("locks", lock.row())
        catalog.put_row("locks", Row("lock-9", 2, {"timeline": "t2", "of": "a newer version"}))
        assert locks.locked_seqs(catalog, "t1", now_ns=NOW_NS) == {0, 2}
        assert locks.locked_seqs(catalog, "t2", now_ns=NOW_NS) == {1}
        assert locks.locked_seqs(catalog, "t1", now_ns=NOW_NS + 2 * DAY_NS) == set()
        with pytest.raises(CorruptError, match="lock-9"):
            locks.all_locks(catalog)
        locks.forget(catalog, "t1")
        assert sorted(catalog.rows("locks")) == ["lock-1", "lock-9"]
        with pytest.raises(NotFoundError):
            locks.find([LOCK], "lock-77")
    assert locks.new_id(["lock-1"]) != locks.new_id([])


def test_a_lock_waits_for_a_pass_that_drops_and_says_so_in_vain(tmp_path: Path) -> None:
    dropping = os.open(tmp_path / FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(dropping, fcntl.LOCK_EX)
    with pytest.raises(RefusedError, match="being dropped"), stays(tmp_path, wait_s=0.05):
        raise AssertionError("somebody drops history")
    done = threading.Timer(0.1, os.close, [dropping])
    done.start()
    with stays(tmp_path, wait_s=30), stays(tmp_path, wait_s=0):
        other = os.open(tmp_path / FILE, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    done.join()


@pytest.mark.real
def test_locks_of_a_service(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        uri = server.add("d")
        for number in range(3):
            write(uri, pattern(number))
        server.synced("d")
        server.post("/v1/disks/d:mark", name="good")
        write(uri, pattern(9))

        done = cdp(
            server,
            "point",
            "lock",
            "d@good",
            "--until",
            "1h",
            "--reason",
            "ticket 5",
            "--immutable",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        lock = json.loads(done.stdout)
        seq = lock["seq"]
        assert (lock["point"], lock["immutable"], lock["reason"]) == (f"d@seq:{seq}", True, "ticket 5")
        # What is locked survives a power loss.
        assert server.get("/v1/disks/d")["durable_seq"] >= seq
        locked = {point["seq"]: point["locked"] for point in server.get("/v1/disks/d:points?kind=bookmark")}
        assert locked == {seq: True}

        for arguments, code, says in (
            (["lock", "d@good"], 3, "immutable until"),
            (["lock", "d@good", "--until", "10m", "--immutable"], 3, "made longer"),
            (["lock", "d@good", "--until", "3h"], 3, "made longer"),
            (["lock", "d@latest", "--immutable"], 2, "add --until"),
            (["lock", "d@latest", "--until", "1970-01-01T00:00:00Z"], 2, "that is over"),
            (["lock", "d@seq:99999"], 2, "after the newest record"),
            (["lock", "nobody@latest"], 2, "no disk nobody"),
            (["lock", "d@latest", "--reason", "a\nb"], 2, "not a reason"),
            (["unlock", lock["id"]], 3, "no command can end it"),
            (["unlock", "d@good"], 3, "no command can end it"),
            (["unlock", "d@seq:1"], 2, "is not locked"),
            (["unlock", "lock-0"], 2, "no lock 'lock-0'"),
        ):
            done = cdp(server, "point", *arguments)
            assert (done.returncode, says in done.stderr) == (code, True), (arguments, done.stderr)
        with pytest.raises(ApiError, match=r"409: .*immutable lock"):
            server.delete("/v1/disks/d")
        assert server.get("/v1/disks/d")["state"] != "removing"

        longer = server.post("/v1/locks", point="d@good", until="2h", immutable=True)
        assert (longer["id"], longer["reason"]) == (lock["id"], "ticket 5")
        assert longer["until_ns"] > lock["until_ns"]
        plain = server.post("/v1/locks", point="d@seq:2", reason="for now")
        assert len(server.get("/v1/locks")) == len(server.get("/v1/locks?disk=d")) == 2
        shown = cdp(server, "point", "locks", "d").stdout
        assert "ticket 5" in shown and plain["id"] in shown
        assert cdp(server, "point", "unlock", "d@seq:2").returncode == 0
        assert [found["id"] for found in server.get("/v1/locks")] == [lock["id"]]

        # Killed just after it said *removing*: the next start must not go on with that.
        server.stop()
        with Catalog.open(StateDir.open(short_path / "s"), writable=True) as catalog:
            catalog.set_state("d", "removing")
    with Server(short_path / "s") as server:
        assert server.get("/v1/disks/d")["state"] not in ("removing", "damaged")
        assert [found["id"] for found in server.get("/v1/locks")] == [lock["id"]]
        assert server.events("disk.removal-waits")


@pytest.mark.real
def test_a_removed_lock_lets_its_disk_go(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        write(server.add("d"), pattern(1))
        server.synced("d")
        made = server.post("/v1/locks", point="d@latest")
        with pytest.raises(ApiError, match="cdp point unlock"):
            server.delete("/v1/disks/d")
        server.delete(f"/v1/locks/{made['id']}")
        server.delete("/v1/disks/d")
        assert server.get("/v1/locks") == []


@pytest.mark.real
def test_locks_have_a_quota(short_path: Path) -> None:
    config = short_path / "c.toml"
    config.write_text("[store]\nsize_cap = '64M'\nlock_quota = 1\n")
    with Server(short_path / "s", "--config", str(config)) as server:
        uri = server.add()
        write(uri, pattern(1))
        server.synced("d")
        write(uri, random.Random(1).randbytes(4 << 20))
        assert cdp(server, "point", "lock", "d@latest").returncode == 0
        write(uri, pattern(2))
        done = cdp(server, "point", "lock", "d@latest")
        assert done.returncode == 3
        assert "quota" in done.stderr and "cdp point unlock" in done.stderr
        cdp(server, "prune")
        assert len(server.events("retention.lock-quota-near")) == 1
        [held] = server.get("/v1/locks")
        assert cdp(server, "point", "unlock", held["id"]).returncode == 0
        assert cdp(server, "point", "lock", "d@latest").returncode == 0


SPANS = st.lists(st.integers(NOW_NS, NOW_NS + 40 * DAY_NS), min_size=2, max_size=10).map(
    lambda times: list(zip(*[iter(sorted(times))] * 2, strict=False))
)


@given(SPANS, st.integers(1, 20 * DAY_NS), st.integers(0, 60 * DAY_NS))
def test_a_lock_holds_for_as_long_as_was_asked_for_of_time_that_was_lived(
    off: list[tuple[int, int]], asked_ns: int, after_ns: int
) -> None:
    """Whatever the clock jumped over meanwhile: neither earlier nor later."""
    row = replace(LOCK, created_ns=NOW_NS, until_ns=NOW_NS + asked_ns).row()
    now_ns = NOW_NS + after_ns
    if any(from_ns < now_ns < to_ns for from_ns, to_ns in off):
        return  # nobody asks while the host is off
    past = [span for span in off if span[1] <= now_ns]
    lived_ns = after_ns - sum(to_ns - from_ns for from_ns, to_ns in past)
    lock = locks.read_lock(row, past)
    assert lock.holds(now_ns) == (lived_ns < asked_ns)
    assert lock.row() == row
    # Made longer, it ends when that says.
    longer = (
        locks.renew(lock, until_ns=now_ns + DAY_NS, immutable=False, reason=None, now_ns=now_ns)
        if not (lock.immutable and lock.holds(now_ns))
        else lock
    )
    assert locks.read_lock(longer.row(), past) == longer


class Host:
    """One that boots with this or that wall clock; its store has a disk whose newest point is locked for 90 days, immutably."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        world = World(path)
        line = world.add(1 << 20, image=b"image")
        line.write(0, b"x" * 4096)
        self.state, self.set_ns = world.state, line.writer.last_time_ns
        lock = replace(LOCK, seq=line.last_seq, created_ns=self.set_ns, until_ns=self.set_ns + 90 * DAY_NS)
        Catalog.recover(self.state)
        with Catalog.open(self.state, writable=True) as catalog:
            catalog.put_row("locks", lock.row())
        world.close()
        self._patch, self.boots = patch, 0

    def boot(self, wall_ns: int) -> int:
        """The service starts after it; the server's time."""
        self.boots += 1
        self._patch.setenv("CDP_BOOT_ID", f"boot-{self.boots:04d}")
        return self.start(wall_ns)

    def start(self, wall_ns: int) -> int:
        """The service starts; the server's time."""
        self._patch.setattr(clocks, "time_ns", lambda: wall_ns)
        clock, catalog = prepare(self.state, EventLog(self.state.events))
        catalog.close()
        return clock.now_ns()

    def lock(self) -> Lock:
        """The lock, as every process of the server sees it."""
        with Catalog.open(self.state, writable=False) as catalog:
            (found,) = locks.all_locks(catalog)
        return found


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_a_clock_that_is_ahead_at_a_boot_ends_no_lock(host: Host) -> None:
    year_ns = 365 * DAY_NS
    first = host.boot(host.set_ns + DAY_NS)
    assert host.lock().holds(first) and host.lock().off_ns == pytest.approx(DAY_NS, abs=SECOND_NS)
    ahead = host.boot(host.set_ns + year_ns)
    assert ahead >= host.set_ns + year_ns
    lock = host.lock()
    assert lock.holds(ahead) and lock.until_ns == pytest.approx(ahead + 90 * DAY_NS, abs=SECOND_NS)
    with pytest.raises(RefusedError, match="no command can end it before"):
        locks.check_removable(lock, now_ns=ahead)
    with pytest.raises(RefusedError, match="immutable until"):
        locks.renew(lock, until_ns=ahead + 80 * DAY_NS, immutable=True, reason=None, now_ns=ahead)
    # The wall clock is set right: the server's never goes back, and the lock's time goes on.
    right = host.boot(host.set_ns + 2 * DAY_NS)
    assert right < ahead and host.lock().holds(right)
    assert not host.lock().holds(right + 91 * DAY_NS + year_ns)


def test_a_start_that_dies_before_the_clock_is_fixed_counts_the_time_once(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clocks, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            host.boot(host.set_ns + 200 * DAY_NS)
    now_ns = host.start(host.set_ns + 200 * DAY_NS)
    assert host.lock().until_ns == pytest.approx(now_ns + 90 * DAY_NS, abs=SECOND_NS)


def test_nothing_ends_while_it_cannot_be_read_what_is_old(host: Host) -> None:
    host.boot(host.set_ns + 200 * DAY_NS)
    host.state.boots.write_text("[")
    host.boot(host.set_ns + 400 * DAY_NS)
    with pytest.raises(CorruptError, match=r"boots.json cannot be read, .*nothing is dropped.*from a backup"):
        host.lock()
    assert "service.boots-damaged" in host.state.events.read_text()
