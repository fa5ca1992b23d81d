"""What befalls a protected guest, and what it must not feel of it: strikes, on a guest and a server with a host of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.guest_image import guest_image
from tests.guest_vm import Guest
from tests.judged import DISKS, Judged, make_disks, measure_waits
from tests.test_service import Server, sweep, until
from tools.kit.processes import run
from tools.kit.qmp import Qmp


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
        self.boot_anew()

    def boot_anew(self) -> None:
        """What was stopped, or killed, runs again in another boot."""
        sweep(self.state_dir)
        self.boot.write_text(f"{uuid.uuid4()}\n")
        self.start()


class Sea(Judged):
    """A guest with its loads, a server on a small store, and the strikes."""

    server: Host

    def __init__(self, directory: Path, state_dir: Path) -> None:
        image = guest_image()
        guest = Guest(directory / "vm", make_disks(directory, image), image=image)
        super().__init__(directory, Host(state_dir, directory / "boot_id"), guest)

    def boot(self) -> None:
        self.guest.boot()
        measure_waits(self.guest)

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

    def host_restarted(self) -> None:
        """Cleanly; what the guest writes meanwhile does not arrive, and nothing else is missing."""
        assert self.server.stop() == 0
        self.goes_on(20)
        self.server.boot_anew()
        self.note_clock()
        self.in_sync()
        copies = [disk["resync"]["method"] for disk in self.server.get("/v1/vms/web")["disks"]]
        assert copies == ["job"] * len(DISKS), "a journal that was closed is what QEMU's mirror left"

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
        self.guest.wait_ready(since=said)
        self.load()

    def qemu_ended(self) -> None:
        """Cleanly, whatever its guest was doing."""
        with Qmp(self.guest.qmp2) as qmp:
            qmp.call("quit")
        self.guest.wait_end()
        self.guest.close()
        self.boot()
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
    (Sea.host_restarted, True),
    (Sea.store_full, True),
    (Sea.job_ended, True),
    (Sea.guest_rebooted, False),
    (Sea.qemu_ended, False),
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
