"""A small guest on real QEMU, under TCG: its console, a shell in it, its monitor and its agent.

guest.run("echo hello > /data/x; sync")      a line of shell in the guest, and what it printed
guest.start("counter"); guest.acks           a load that says on the console what is durable
guest.qmp, guest.agent                       sockets; nobody holds them
"""

import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from tests.guest_image import GuestImage, guest_image
from tools.kit.processes import TooLate
from tools.kit.qmp import Qmp, QmpError

SILENT_SECONDS = 120
"""A guest that boots says something this often, however busy the machine is; all of it takes 4 s on a quiet one."""


def virtio_disk(name: str, *, port: str = "") -> list[str]:
    """A device of the guest on the block node or drive `name`; its path in the guest goes by the order."""
    return ["-device", f"virtio-blk-pci,drive={name},id={name}-device,serial={name}{port}"]


def file_disk(name: str, path: Path, *, driver: str = "raw") -> list[str]:
    """A disk in a file on this machine: node `name` over `name-file`."""
    file = f"driver={driver},node-name={name},file.driver=file,file.filename={path},discard=unmap"
    return ["-blockdev", file, *virtio_disk(name)]


@dataclass
class Guest:
    """One QEMU process. `close` ends it, whatever it does."""

    directory: Path
    """For its sockets; a short path."""
    disks: Sequence[str]
    """Arguments that make its disks; the first is the root."""
    append: str = ""
    memory_mib: int = 192
    more: Sequence[str] = ()
    image: GuestImage = field(default_factory=guest_image)
    console: list[str] = field(default_factory=list)
    heard_ns: list[int] = field(default_factory=list)
    """CLOCK_BOOTTIME at which each line of the console came."""
    kernel: list[str] = field(default_factory=list)
    """What its kernel said before it had a root disk; what it says later (an error) is on the console."""
    process: subprocess.Popen[bytes] | None = None
    _changed: Condition = field(default_factory=Condition)
    _shell: socket.socket | None = None
    _ended: bool = False
    _booting: bool = False

    @property
    def qmp(self) -> Path:
        return self.directory / "qmp.sock"

    @property
    def qmp2(self) -> Path:
        """One more monitor: each serves one client at a time."""
        return self.directory / "qmp2.sock"

    @property
    def agent(self) -> Path:
        return self.directory / "agent.sock"

    def arguments(self) -> list[str]:
        """QEMU's command line without its disks; serial port 1 is the console, 2 the shell."""
        chardev = f"socket,server=on,wait=off,path={self.directory}"
        return [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max",
            "-m", str(self.memory_mib), "-nodefaults", "-no-user-config", "-display", "none",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd),
            "-append", "console=ttyS0 loglevel=6 panic=-1 nokaslr mitigations=off no_timer_check tsc=reliable"
            f" random.trust_cpu=on root=/dev/vda {self.append}",
            "-serial", "stdio",
            "-chardev", f"{chardev}/shell.sock,id=shell", "-serial", "chardev:shell",
            "-device", "virtio-serial-pci",
            "-chardev", f"{chardev}/agent.sock,id=agent",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            "-qmp", f"unix:{self.qmp},server=on,wait=off", "-qmp", f"unix:{self.qmp2},server=on,wait=off",
        ]  # fmt: skip

    def boot(self) -> None:
        """Returns when the guest is ready and its shell answers."""
        said = len(self.console)
        self.launch()
        self.wait_ready(since=said)
        self.open_shell()

    def wait_ready(self, *, since: int) -> None:
        """Until it says on the console, from line `since` on, that it is ready; as long as it says anything it is waited for."""

        def ready() -> bool:
            return any("GUEST ready" in line for line in self.console[since:])

        try:
            self.wait_until(ready, SILENT_SECONDS, "GUEST ready", renewed=True)
        except TooLate as error:
            raise TooLate(f"{error}; the kernel: {self.kernel[-12:]}; QEMU: {self._condition()}") from None

    def _condition(self) -> dict[str, Any]:
        """What QEMU says of itself."""
        asked = ("query-status", "query-block-jobs", "query-blockstats")
        try:
            with Qmp(self.qmp2) as qmp:
                return {command: qmp.call(command) for command in asked}
        except (OSError, QmpError) as error:
            return {"monitor": repr(error)}

    def launch(self) -> None:
        """Start QEMU and read its console; the guest boots by itself."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [*self.arguments(), *self.disks, *self.more],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._ended = self._booting = False
        Thread(target=self._read_console, args=(self.process,), daemon=True).start()

    def _read_console(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._changed:
                text = line.decode(errors="replace").strip()
                self._booting = "Linux version" in text or (self._booting and "GUEST root" not in text)
                if self._booting:
                    self.kernel.append(text)
                else:
                    self.heard_ns.append(time.clock_gettime_ns(time.CLOCK_BOOTTIME))
                    self.console.append(text)
                self._changed.notify_all()
        with self._changed:
            self._ended = self._ended or process is self.process
            self._changed.notify_all()

    def wait_for(self, pattern: str, seconds: float = 60, *, since: int = 0) -> re.Match[str]:
        """The first line of the console, from line `since` on, that has `pattern`."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found[:] = [m for line in self.console[since:] if (m := re.search(pattern, line))]
            return bool(found)

        self.wait_until(look, seconds, f"{pattern!r} on the console")
        return found[0]

    def wait_until(
        self, condition: Callable[[], bool], seconds: float, what: str, *, renewed: bool = False
    ) -> None:
        """Looks again at each line of the console; `renewed`: each gives it the whole time again."""
        deadline, lines = time.monotonic() + seconds, 0
        with self._changed:
            while not condition():
                if renewed and lines < (lines := len(self.console) + len(self.kernel)):
                    deadline = time.monotonic() + seconds
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TooLate(f"not in {seconds} s: {what}; the console ends: {self.console[-12:]}")
                assert not self._ended, f"QEMU ended before {what}; the console ends: {self.console[-12:]}"
                self._changed.wait(min(left, 1))

    def open_shell(self) -> None:
        self._shell = socket.socket(socket.AF_UNIX)
        self._shell.connect(str(self.directory / "shell.sock"))

    def run(self, line: str, seconds: float = 60, *, check: bool = True) -> str:
        """What one line of shell prints in the guest; an AssertionError if it fails."""
        assert "\n" not in line
        if self._shell is None:
            self.open_shell()
        assert self._shell is not None
        self._shell.settimeout(seconds)
        self._shell.sendall(f"{line}\n".encode())
        answer = b""
        while not (end := re.search(rb"\[done (\d+)\]\r?\n", answer)):
            received = self._shell.recv(65536)
            assert received, f"the shell ended: {answer!r}"
            answer += received
        assert not check or end[1] == b"0", f"{line!r} failed: {answer!r}"
        return answer[: end.start()].decode().replace("\r", "").strip()

    def start(self, load: str) -> None:
        """A load of tests/guest in the background; `stop` ends it."""
        self.run(f"{load} </dev/null >/dev/ttyS0 2>&1 & echo $! >>/tmp/loads")

    def stop(self) -> None:
        """The loads end after what they are doing."""
        self.run("touch /data/stop; wait $(cat /tmp/loads); rm /tmp/loads; sync", 120)

    @property
    def acks(self) -> int:
        """The newest number that the counter made durable, and said so."""
        return self._newest("ACK")

    @property
    def paid(self) -> int:
        """The newest transaction that the ledger committed, and said so."""
        return self._newest("PAID")

    def _newest(self, word: str) -> int:
        said = (re.fullmatch(rf"{word} (\d+)", line) for line in reversed(list(self.console)))
        return next((int(m[1]) for m in said if m), 0)

    def wait_acks(self, count: int, seconds: float = 60) -> None:
        """Until the counter has made `count` more durable than now."""
        target = self.acks + count
        self.wait_until(lambda: self.acks >= target, seconds, f"ACK {target}")

    def wait_end(self, seconds: float = 60) -> None:
        """Until the console says nothing more: QEMU has ended, and every line is there."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._ended:
                if time.monotonic() > deadline:
                    raise TooLate(f"QEMU has not ended in {seconds} s")
                self._changed.wait(1)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as when the host's kernel takes it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self._shell is not None:
            self._shell.close()
            self._shell = None

    close = kill

    def power_off(self, seconds: float = 60) -> None:
        """A clean end: file systems unmounted by the guest's kernel, QEMU ended by itself."""
        assert self._shell is not None
        assert self.process is not None
        self._shell.sendall(b"sync; mount -o remount,ro /; poweroff -f\n")
        self.process.wait(seconds)
        self.kill()


@contextlib.contextmanager
def booted(
    directory: Path, disks: Sequence[str], *, append: str = "", more: Sequence[str] = ()
) -> Iterator[Guest]:
    """A guest that is ready, killed at the end."""
    guest = Guest(directory, disks, append=append, more=more)
    try:
        guest.boot()
        yield guest
    finally:
        guest.close()
