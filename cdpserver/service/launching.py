"""A QEMU of the service's: started so that it outlives the service, found again by the next one, ended.

Everything of it is in a directory of its own, `run/ID/`: its pid, its sockets, and what it and its serial port say.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from cdpserver.errors import BrokenError, UsageError
from cdpserver.names import show
from cdpserver.service import processes
from cdpserver.service.core import Core
from cdpserver.vm.launch import template
from cdpserver.vm.launch.parts import Places

LOOK_S = 0.01
"""Between two looks whether the monitor is there: it takes some 100 ms."""

START_S = 30.0
"""How long QEMU may take to open its monitor, before it has opened its disks."""

LOG_KIB = 64 << 10
"""What an isolated VM may write to its logs, and a check: more ends it."""

LIMITED = f'ulimit -f {LOG_KIB * 2}; exec "$@"'
"""A shell counts blocks of 512 bytes."""

LAST_BYTES = 4096


class LaunchError(BrokenError):
    """QEMU did not start, or has ended."""

    usual_hint = "mend the command, then try again"


def limited(command: Sequence[str]) -> list[str]:
    """The command that cannot fill the file system with what it says."""
    return ["/bin/sh", "-c", LIMITED, "sh", *command]


class Vm:
    """One QEMU, by the id of what it is started for. It need not run."""

    def __init__(self, core: Core, id: str) -> None:
        self._core = core
        self.places = Places(core.state.run / id)

    async def start(self, command: Sequence[str], *, isolated: bool) -> None:
        """Return when its monitor listens. LaunchError with what QEMU said."""
        pidfd = await self._core.thread(self._start, command, isolated)
        try:
            with trio.move_on_after(START_S):
                while not processes.has_ended(pidfd):
                    with contextlib.suppress(OSError):
                        async with await trio.open_unix_socket(str(self.places.qmp)):
                            return
                    await trio.sleep(LOOK_S)
                raise LaunchError(f"QEMU did not start: {self.last_words()}")
        finally:
            os.close(pidfd)
        raise LaunchError(f"QEMU has not opened its monitor in {START_S:.0f} s: {self.last_words()}")

    def _start(self, command: Sequence[str], isolated: bool) -> int:
        self.end()
        self.places.directory.mkdir(mode=0o700)
        whole = limited(command) if isolated else command
        return os.pidfd_open(processes.spawn(self.places.pid, whole, output=self.places.said))

    def is_running(self) -> bool:
        """Is it there?"""
        fd = processes.noted(self.places.pid)
        if fd is None:
            return False
        try:
            return not processes.has_ended(fd)
        finally:
            os.close(fd)

    async def ended(self) -> None:
        """Return when it does not run any more."""
        fd = processes.noted(self.places.pid)
        if fd is not None:
            try:
                await trio.lowlevel.wait_readable(fd)
            finally:
                os.close(fd)

    def end(self) -> None:
        """Kill it if it runs, and take away its directory. For threads. BrokenError if it does not go."""
        if self.places.pid.exists():
            processes.kill_orphans([self.places.pid])
        shutil.rmtree(self.places.directory, ignore_errors=True)

    def describe(self) -> dict[str, Any]:
        """For whoever is to find it. For threads."""
        places = self.places
        found = {"qmp": places.qmp, "agent": places.agent, "console": places.console}
        return {"running": self.is_running(), **{key: str(path) for key, path in found.items()}}

    def last_words(self) -> str:
        """The last lines that QEMU said, or a sentence that there are none."""
        return last_line(self.places.said, 3) or "it said nothing"


def last_line(path: Path, lines: int = 1) -> str:
    """The last line, or so many in one, of a file that are not empty, shortened; an empty text if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
            said = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    printable = [text[:200] for line in said if (text := re.sub(r"[^\x20-\x7e]+", " ", line).strip())]
    return "; ".join(printable[-lines:])


def read_file(path: str, what: str) -> str:
    """A file that an operator named. UsageError if it cannot be read, is huge or no text."""
    if not os.path.isabs(path):
        raise UsageError(f"{what} {show(path)} is no absolute path", hint="the service has another directory")
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{what} {show(path)} is no file", hint="name a file")
            held = file.read(template.MAX_BYTES + 1)
        return held.decode()
    except OSError as error:
        raise UsageError(
            f"{what} {show(path)} cannot be read: {error.strerror}",
            hint="name a file that the service can read",
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{what} {show(path)} is no text", hint="name a file that holds a command") from None
