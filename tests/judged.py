"""A protected guest under its loads: how long a write of it waited, and whether its points hold what they must.

A write's wait is measured by QEMU itself (`block-latency-histogram`), below the guest: a processor that is emulated on a busy
machine does not count. What the machine kept everybody waiting is measured beside it, and added to the bound.

A `crash` point is what a power cut at that instant would have left: its file systems replay and are clean, it holds all that was
said to be durable before, and no disk is ahead of another that is written before it.
"""

import contextlib
import json
import os
import random
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import nbd

from cdpserver.names import format_time
from tests.guest_image import GuestImage
from tests.guest_vm import Guest, file_disk
from tests.test_service import ApiError, Server, until
from tools.kit.mount import as_file, as_loop, mounted
from tools.kit.processes import TooLate, run
from tools.kit.processes import until as soon
from tools.kit.qmp import Qmp

BOUND_S = 2.0
"""No write of a guest waits longer, by the default policy."""

DISKS = {"root": 64 << 20, "left": 1 << 20, "right": 1 << 20}
"""The file system with counter and ledger, and two raw disks with numbers in dependent order."""

SAMPLED = int(os.environ.get("CDP_SAMPLED", "6"))
"""Points whose file system is looked into; each takes a second. CDP_SAMPLED=1000: all of them."""

BOOT_S = 120.0
"""A guest that was reset has to boot before it writes again."""

FEWEST = 3
"""Points that there must be, else nothing is judged."""

EDGES_MS = [*range(100, 3100, 100), 4000, 6000, 10_000, 20_000, 40_000]


class Lateness:
    """The longest time that this machine let a sleeping thread wait too long."""

    STEP_S = 0.01

    def __enter__(self) -> Self:
        self.worst_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self.STEP_S):
            now = time.monotonic()
            self.worst_s = max(self.worst_s, now - before - self.STEP_S)
            before = now

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measure_waits(guest: Guest) -> None:
    """Measure the waits of the guest's writes and flushes from now on."""
    with Qmp(guest.qmp2) as qmp:
        for name in device_ids(qmp):
            qmp.call(
                "block-latency-histogram-set",
                id=name,
                **{f"boundaries-{kind}": [ms * 10**6 for ms in EDGES_MS] for kind in ("write", "flush")},
            )


def device_ids(qmp: Qmp) -> list[str]:
    return [str(block["qdev"]) for block in qmp.call("query-block") if block.get("qdev")]


def longest_wait_s(guest: Guest) -> float:
    """The longest wait since `measure_waits`, rounded up; an AssertionError if a request failed."""
    longest = 0
    with Qmp(guest.qmp2) as qmp:
        for block in qmp.call("query-blockstats"):
            stats = block["stats"]
            assert not stats["failed_wr_operations"] and not stats["failed_flush_operations"], block
            for kind in ("wr", "flush"):
                bins = stats.get(f"{kind}_latency_histogram", {}).get("bins", [])
                held = [number for number, count in enumerate(bins) if count]
                if held:
                    longest = max(longest, [*EDGES_MS, 1 << 30][held[-1]])
    return longest / 1000


def make_disks(directory: Path, image: GuestImage) -> list[str]:
    """The files of DISKS, and QEMU's arguments for them."""
    arguments: list[str] = []
    for name, size in DISKS.items():
        path = directory / f"{name}.raw"
        if name == "root":
            image.copy_root(path)
        else:
            with open(path, "xb") as file:
                file.truncate(size)
        arguments += file_disk(name, path)
    return arguments


class Judged:
    """The VM `web`. `guests`: the QEMUs that it has been in; it is in the last."""

    def __init__(self, directory: Path, server: Server, guest: Guest) -> None:
        self.directory, self.server = directory, server
        self.guests = [guest]
        self.offsets: list[tuple[int, int]] = []
        """(boottime from which on, the server's offset)."""

    @property
    def guest(self) -> Guest:
        return self.guests[-1]

    def load(self) -> None:
        for load in ("counter", "ledger", "pair"):
            self.guest.start(load)

    def protect(self) -> None:
        self.server.request("PUT", "/v1/vms/web", {"qmp": str(self.guest.qmp)})

    def states(self) -> list[str]:
        with contextlib.suppress(ApiError, OSError):
            return [disk["state"] for disk in self.server.get("/v1/vms/web")["disks"]]
        return []

    def in_sync(self) -> None:
        until(lambda: set(self.states()) == {"synced"}, "mirrors in sync")

    def points_go_on(self) -> None:
        """What the guest writes from now on is in `crash` points, of each disk and of the VM."""
        since_ns = self.server_ns(time.clock_gettime_ns(time.CLOCK_BOOTTIME))

        def there() -> bool:
            with contextlib.suppress(ApiError, OSError):
                points = self.server.get(f"/v1/vms/web:points?since={format_time(since_ns)}")
                return bool(points)
            return False

        try:
            soon(there, "point of the VM", seconds=BOOT_S, every_s=0.1)
        except TooLate as error:
            events = (self.server.state_dir / "events.jsonl").read_text().splitlines()[-40:]
            vm = json.dumps(self.server.get("/v1/vms/web"))
            raise TooLate("\n".join([str(error), vm, *events, *self.guest.console[-5:]])) from None

    def goes_on(self, acks: int = 5) -> None:
        """The guest's writes are done, and said to be."""
        self.guest.wait_acks(acks)

    def saw_no_error(self) -> None:
        for guest in self.guests:
            failed = [n for n, line in enumerate(guest.console) if re.search("failed|rror", line)]
            assert not failed, guest.console[max(0, failed[0] - 5) : failed[0] + 5]

    @contextlib.contextmanager
    def waits_no_longer_than_the_bound(self, what: str) -> Iterator[None]:
        """The guest may reboot meanwhile, and be in another QEMU afterwards; then that one is not looked at."""
        with Lateness() as late:
            before = self.guest.process
            measure_waits(self.guest)
            yield
            waited_s = longest_wait_s(self.guest) if self.guest.process is before else 0.0
        print(f"{what}: a write waited up to {waited_s} s, the machine {late.worst_s:.2f} s")
        assert waited_s <= BOUND_S + late.worst_s, what
        self.saw_no_error()

    # -- what was said to be durable, and when ---------------------------------------------------------------

    def note_clock(self) -> None:
        """The server's clock as it is in this boot; what was said before the first is not judged."""
        offset_ns = json.loads((self.server.state_dir / "clock.json").read_text())["offset_ns"]
        self.offsets.append((time.clock_gettime_ns(time.CLOCK_BOOTTIME), int(offset_ns)))

    def server_ns(self, boottime_ns: int) -> int:
        """An instant by the server's clock."""
        offset = next(offset for since, offset in reversed(self.offsets) if since <= boottime_ns)
        return boottime_ns + offset

    def said(self, word: str) -> list[tuple[int, int]]:
        """(server's time at which it was heard, number) of what a load said to be durable."""
        found: list[tuple[int, int]] = []
        for guest in self.guests:
            for line, heard in zip(list(guest.console), list(guest.heard_ns), strict=False):
                match = re.fullmatch(rf"{word} (\d+)", line)
                if match and heard >= self.offsets[0][0]:
                    found.append((self.server_ns(heard), int(match[1])))
        return found

    # -- points ----------------------------------------------------------------------------------------------

    def check_points(self, dice: random.Random) -> None:
        """SAMPLED of the `crash` points of the root disk, half of them next to an interruption, and all points of the VM."""
        server = self.server
        counted, paid = self.said("ACK"), self.said("PAID")
        since_ns, last_ns = min(counted)[0], max(counted)[0]
        until(
            lambda: server.get("/v1/disks/web/root-device:points?kind=rp")[-1]["time_ns"] >= last_ns,
            "last point",
        )
        points = [
            point
            for point in server.get("/v1/disks/web/root-device:points?kind=rp")
            if point["grade"] == "crash" and point["time_ns"] > since_ns
        ]
        assert len(points) >= FEWEST
        for number, point in enumerate(chosen(points, dice)):
            self._check_file_system(f"look{number}", point, newest(counted, point), newest(paid, point))
        common = [p for p in server.get("/v1/vms/web:points") if p["time_ns"] > since_ns]
        assert len(common) >= FEWEST
        for shared in common:
            left, right = (
                number_at(server.uri(f"web/{disk}-device@{shared['time']}")) for disk in ("left", "right")
            )
            assert left - right in (0, 1), (left, right, shared)
        print(f"judged {min(SAMPLED, len(points))} of {len(points)} points, and {len(common)} of the VM")

    def _check_file_system(self, name: str, point: dict[str, Any], counted: int, paid: int) -> None:
        """In a fork of the point its journal is replayed, by fsck alone and by the kernel, and what was durable is there."""
        server = self.server
        work = self.directory / name
        work.mkdir()
        fork = server.post("/v1/forks", name=name, point=f"web/root-device@seq:{point['seq']}")
        told = f"{point}; gaps: {server.events('disk.gap')}"
        with as_file(str(fork.get("uri_unix", fork["uri"])), work / "nf") as file:
            check_root(file, work, counted=counted, paid=paid, told=told)


def check_root(file: Path, work: Path, *, counted: int, paid: int, told: str) -> None:
    """A root disk, in a file that may be written: its journal is replayed, it is clean, and holds what was said to be durable."""
    # Through a loop device: the file system's blocks are smaller than what an export reads at least.
    with as_loop(file) as device:
        run("e2fsck", "-y", "-E", "journal_only", device, accept=(0, 1))
        run("e2fsck", "-fn", device)
        with mounted(device, work / "m", "-o", "ro") as root:
            lines = (root / "data/counter").read_text().split()
            database = work / "ledger.db"
            for suffix in ("", "-journal"):
                kept = root / f"data/ledger.db{suffix}"
                if kept.exists():
                    database.with_name(f"ledger.db{suffix}").write_bytes(kept.read_bytes())
    assert lines == [str(n + 1) for n in range(len(lines))], told
    assert len(lines) >= counted, f"{counted} was said to be durable, {len(lines)} is the newest: {told}"
    with sqlite3.connect(database) as ledger:
        assert ledger.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if paid:
            (held,) = ledger.execute("SELECT max(number) FROM payment").fetchone()
            assert held >= paid, f"{paid} was said to be committed, {held} is the newest: {told}"
            assert ledger.execute("SELECT sum(units) FROM account").fetchone() == (1_000_000,)
    ledger.close()


def chosen(points: list[dict[str, Any]], dice: random.Random) -> list[dict[str, Any]]:
    """SAMPLED points; of many, half of them next to a change of sessions: what was lost is missing there first."""
    if len(points) <= SAMPLED:
        return points
    sessions = [point["evidence"]["session"] for point in points]
    edges = {n for n in range(1, len(points)) if sessions[n] != sessions[n - 1]}
    edges |= {n - 1 for n in edges}
    taken = set(dice.sample(sorted(edges), min(SAMPLED // 2, len(edges))))
    rest = [n for n in range(len(points)) if n not in taken]
    return [points[n] for n in sorted(taken | set(dice.sample(rest, SAMPLED - len(taken))))]


def newest(said: list[tuple[int, int]], point: dict[str, Any]) -> int:
    """The newest number that was said to be durable by the time of a point."""
    return max((number for time_ns, number in said if time_ns <= point["time_ns"]), default=0)


def number_in(content: bytes) -> int:
    """The newest number on a disk of a pair."""
    return int(content[:16].replace(b"\0", b"").strip() or b"0")


def number_at(uri: str) -> int:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        return number_in(bytes(handle.pread(512, 0)))
    finally:
        handle.shutdown()
