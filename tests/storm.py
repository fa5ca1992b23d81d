"""What befalls a protected guest, and what it must not feel of it: strikes, and how long a write of the guest waited meanwhile.

A write's wait is measured by QEMU itself (`block-latency-histogram`), below the guest: a processor that is emulated on a busy
machine does not count. What the machine kept everybody waiting is measured beside it, and added to the bound.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from cdpserver.names import format_time
from tests.guest_image import guest_image
from tests.guest_vm import READY_SECONDS, Guest, file_disk
from tests.test_service import ApiError, Server, sweep, until
from tools.kit.processes import run
from tools.kit.qmp import Qmp

BOUND_S = 2.0
"""No write of a guest waits longer, by the default policy."""

DISKS = {"root": 64 << 20, "left": 1 << 20, "right": 1 << 20}
"""The file system with counter and ledger, and two raw disks with numbers in dependent order."""

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


class Host(Server):
    """A server whose host can be booted anew: that is, another boot id, and nothing closed before it."""

    def __init__(self, state_dir: Path, boot: Path, *arguments: str) -> None:
        self.boot = boot
        if not boot.exists():
            boot.write_text(f"{uuid.uuid4()}\n")
        self.state_dir, self.arguments = state_dir, arguments
        self.log = state_dir.with_name("service.log")
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "cdpserver.service.main",
            "--state-dir",
            str(self.state_dir),
            *self.arguments,
        ]
        script = f'mount --bind "{self.boot}" /proc/sys/kernel/random/boot_id && exec "$@"'
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", script, "sh", *command],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        until(self._is_up, "answer of the API")

    def reboot(self) -> None:
        """Everything of ours is gone at once, and runs again in another boot."""
        self.kill()
        sweep(self.state_dir)
        self.boot.write_text(f"{uuid.uuid4()}\n")
        self.start()

    def offset_ns(self) -> int:
        """What the server's clock adds to CLOCK_BOOTTIME."""
        return int(json.loads((self.state_dir / "clock.json").read_text())["offset_ns"])


class Sea:
    """A guest with its loads, a server on a small store, and the strikes."""

    def __init__(self, directory: Path, state_dir: Path) -> None:
        self.directory = directory
        self.server = Host(state_dir, directory / "boot_id")
        image = guest_image()
        disks: list[str] = []
        for name, size in DISKS.items():
            path = directory / f"{name}.raw"
            if name == "root":
                image.copy_root(path)
            else:
                with open(path, "xb") as file:
                    file.truncate(size)
            disks += file_disk(name, path)
        self.guest = Guest(directory / "vm", disks, image=image)
        self.offsets: list[tuple[int, int]] = []
        """(boottime from which on, the server's offset)."""

    def boot(self) -> None:
        said = len(self.guest.console)
        self.guest.launch()
        self.guest.wait_for("GUEST ready", READY_SECONDS, since=said)
        self.guest.open_shell()
        measure_waits(self.guest)

    def load(self) -> None:
        for load in ("counter", "ledger", "pair"):
            self.guest.start(load)

    def protect(self, **more: Any) -> None:
        self.server.request("PUT", "/v1/vms/web", {"qmp": str(self.guest.qmp), **more})

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

        until(there, "point of the VM")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Of this name, but for a line that a full store cut."""
        lines = (self.server.state_dir / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if f'"event": "{name}"' in line and line.endswith("}")]

    def goes_on(self, acks: int = 5) -> None:
        """The guest's writes are done, and said to be."""
        self.guest.wait_acks(acks)

    def note_clock(self) -> None:
        self.offsets.append((time.clock_gettime_ns(time.CLOCK_BOOTTIME), self.server.offset_ns()))

    def server_ns(self, boottime_ns: int) -> int:
        """An instant by the server's clock."""
        offset = next(offset for since, offset in reversed(self.offsets) if since <= boottime_ns)
        return boottime_ns + offset

    def said(self, word: str) -> list[tuple[int, int]]:
        """(server's time at which it was heard, number) of what a load said to be durable."""
        lines = zip(list(self.guest.console), list(self.guest.heard_ns), strict=False)
        matches = ((re.fullmatch(rf"{word} (\d+)", line), heard) for line, heard in lines)
        since = self.offsets[0][0]
        return [(self.server_ns(heard), int(m[1])) for m, heard in matches if m and heard >= since]

    # -- strikes ---------------------------------------------------------------------------------------------

    def target(self) -> int:
        return self.server.pids()["target-0"]

    def target_killed(self) -> None:
        os.kill(self.target(), signal.SIGKILL)

    def target_hangs(self) -> None:
        os.kill(self.target(), signal.SIGSTOP)

    def service_killed(self) -> None:
        self.server.kill()
        self.goes_on()
        self.server.start()

    def service_stopped(self) -> None:
        """For longer than the guest waits: what it writes meanwhile does not arrive."""
        assert self.server.stop() == 0
        self.goes_on(20)
        self.server.start()

    def host_rebooted(self) -> None:
        self.server.reboot()
        self.note_clock()

    def store_full(self) -> None:
        filler = self.server.state_dir.with_name("filler")
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        until(lambda: "degraded" in self.states(), "mirror without room")
        self.goes_on(20)
        filler.unlink()

    def job_ended(self) -> None:
        with Qmp(self.guest.qmp2) as qmp:
            job = qmp.call("query-block-jobs")[0]["device"]
            qmp.call("block-job-cancel", device=job, force=True)
            qmp.wait("BLOCK_JOB_CANCELLED")

    def guest_rebooted(self) -> None:
        said = len(self.guest.console)
        with Qmp(self.guest.qmp2) as qmp:
            qmp.call("system_reset")
        self.guest.wait_for("GUEST ready", READY_SECONDS, since=said)
        self.load()

    def qemu_killed(self) -> None:
        self.guest.kill()
        self.boot()
        self.load()


STRIKES: tuple[tuple[Callable[[Sea], None], bool], ...] = (
    (Sea.target_killed, False),
    (Sea.target_hangs, False),
    (Sea.service_killed, False),
    (Sea.service_stopped, True),
    (Sea.host_rebooted, True),
    (Sea.store_full, True),
    (Sea.job_ended, True),
    (Sea.guest_rebooted, False),
    (Sea.qemu_killed, False),
)
"""Each with: does it leave a gap, while the guest writes all the time?"""


@contextlib.contextmanager
def sea(directory: Path) -> Iterator[Sea]:
    """A guest under load, protected and in sync; its store is a tmpfs."""
    store = directory / "store"
    store.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=400m,mode=700", "cdp-storm", store)
    try:
        made = Sea(directory, store / "s")
        with made.server:
            try:
                made.boot()
                made.protect()
                made.in_sync()
                made.note_clock()
                made.load()
                made.goes_on()
                yield made
            finally:
                made.guest.close()
    finally:
        run("umount", "--lazy", store)
