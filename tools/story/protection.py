"""A disk under `blockdev-mirror`: history, a loss, an instant opened, a fork, a base point, a killed target."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbd

from cdpserver.names import format_bytes, format_size
from tools.kit.processes import FailedError, run, until
from tools.kit.server import Cdp, Server
from tools.kit.source import RECONNECT_S, Source
from tools.story.guest import FileSystemGuest, Guest, QemuIoGuest, Workload
from tools.story.report import Report

DISK = "vm1/disk0"
BOOKMARK = "before-the-loss"

KILLS = 2

ATTEMPTS = 5
"""A mounted file system may write something by itself while its disk is copied; then the copy is of no instant."""


@dataclass(frozen=True, slots=True)
class Instant:
    """An instant, by its time on the server's clock and by an independent copy of the source."""

    time: str
    copy: Path


def same(first: str | Path, second: str | Path, *, second_format: str = "raw") -> bool:
    """qemu-img compare: every byte, whatever is a hole. The images may be in use: nobody writes meanwhile."""
    command = ["qemu-img", "compare", "-q", "-U", "-f", "raw", "-F", second_format, str(first), str(second)]
    return run(*command, accept=(0, 1)).returncode == 0


class Protection:
    """The story of one protected disk; its parts are told in the order in which they stand here."""

    def __init__(self, report: Report, server: Server, cdp: Cdp, directory: Path, *, seconds: float) -> None:
        self._report = report
        self._server = server
        self._cdp = cdp
        self._directory = directory
        self._seconds = seconds
        self._source: Source
        self._guest: Guest
        self._workload: Workload
        self._before: Instant
        self._base_point: Path
        self._at_cut: Path

    # -- protection begins -----------------------------------------------------------------------------------

    def begin(self, stack: ExitStack, *, size: int, no_mount: str, seed: int) -> None:
        """A disk with data on it, its mirror, the word that it is in sync. What is started ends with the stack."""
        report = self._report
        report.step("A disk with data on it: qemu-storage-daemon serves a raw file")
        self._source = stack.enter_context(Source(self._directory, size))
        guest: Guest = (
            QemuIoGuest(self._source.uri, size, seed)
            if no_mount
            else FileSystemGuest(self._source.uri, self._directory, seed)
        )
        stack.callback(guest.close)
        self._guest = guest
        report.say(f"the guest: {guest.kind}{f' ({no_mount})' if no_mount else ''}")
        guest.prepare()
        report.step("Protection: a disk in cdpserver, and QEMU mirrors into it")
        uri = self._cdp.json("disk", "add", "disk0", "--vm", "vm1", "--size", format_size(size))["uri"]
        report.say(f"    {uri}")
        report.say("QMP blockdev-mirror (sync=full, copy-mode=write-blocking) ...")
        started = time.monotonic()
        self._source.mirror(uri)
        report.figure("First copy until READY", f"{time.monotonic() - started:.2f} s")
        self._say_synced()
        self._workload = Workload(guest)
        stack.callback(self._workload.end)

    def _say_synced(self) -> None:
        """What a controller that sees QMP does: the job is in sync, so the session's content is a disk at an instant."""
        until(self._source.in_sync, "mirror in sync", every_s=0.05)
        session = self._server.client.disk(DISK)["session"]
        shown = self._cdp.json("disk", "synced", DISK, "--session", str(session), "--write-blocking")
        self._report.say(f"    session {shown['session']} is {shown['grade']}-consistent")

    def work(self) -> None:
        """The guest works, and points appear."""
        self._report.step(
            "The guest works; a recovery point appears for each second in which something changed"
        )
        self._workload.resume()
        self._workload.progress(seconds=self._seconds)
        self._cdp("point", "list", DISK, "--limit", "8")

    # -- an instant, a loss ----------------------------------------------------------------------------------

    def keep_an_instant(self) -> None:
        """Copy the source itself while the guest holds still, and name the instant."""
        self._report.step("An independent copy of the source, and a bookmark at the same instant")
        copy, mark = self._hold_still("before", self._mark)
        self._before = Instant(mark["time"], copy)
        self._workload.resume()
        self._workload.progress(seconds=self._seconds / 2)

    def _mark(self, attempt: int) -> Any:
        name = BOOKMARK if attempt == 1 else f"{BOOKMARK}-{attempt}"
        return self._cdp.json("point", "mark", DISK, "--name", name)

    def _hold_still(self, name: str, act: Callable[[int], Any]) -> tuple[Path, Any]:
        """Pause the guest, copy the source, do something; the copy, and what was done.

        The source is compared with its copy afterwards: nothing was written in between, so the copy is of that instant.
        """
        copy = self._directory / f"{name}.raw"
        for attempt in range(1, ATTEMPTS + 1):
            self._workload.pause()
            run("cp", "--sparse=always", self._source.image, copy)
            result = act(attempt)
            if same(copy, self._source.image):
                self._report.say(f"the guest holds still; cp {self._source.image.name} {copy.name}")
                return copy, result
            self._report.say("the file system wrote something meanwhile; once more")
        raise FailedError(f"the source did not hold still in {ATTEMPTS} attempts")

    def lose(self) -> None:
        """The guest loses data, and goes on."""
        self._report.step(f"A loss: {self._guest.precious}")
        self._report.say(self._guest.lose())
        self._workload.progress(seconds=self._seconds / 2)
        self._workload.pause()
        self._cdp("point", "list", DISK, "--limit", "5")

    # -- the past --------------------------------------------------------------------------------------------

    def open_the_instant(self) -> None:
        """The instant before the loss, by its time; bit for bit."""
        self._report.step("The instant before the loss, opened by its time")
        point, copy = f"{DISK}@{self._before.time}", self._before.copy
        started = time.monotonic()
        uri = self._cdp("uri", point)
        handle = nbd.NBD()
        handle.connect_uri(uri)
        handle.pread(4096, 0)
        self._report.figure("From `cdp uri` to the first bytes", f"{time.monotonic() - started:.2f} s")
        handle.shutdown()
        mine = f"{copy.name}, copied then"
        self._report.compare("the point by time", mine, "qemu-img compare", lambda: same(copy, uri))
        self._report.compare("the point by time", mine, "nbdcopy, cmp", lambda: self._copied(uri, copy))
        named = self._server.uri(f"{DISK}@{BOOKMARK}")
        self._report.compare("the point by bookmark", mine, "qemu-img compare", lambda: same(copy, named))
        latest = self._server.uri(f"{DISK}@latest")
        what = "the disk as it is now"
        self._report.compare(what, mine, "control", lambda: same(copy, latest), differ=True)

    def _copied(self, uri: str, copy: Path) -> bool:
        fetched = self._directory / "fetched.raw"
        run("nbdcopy", uri, fetched)
        equal = run("cmp", fetched, copy, accept=(0, 1)).returncode == 0
        fetched.unlink()
        return equal

    def recover(self) -> None:
        """A fork of that instant is a writable disk: what was lost is read from it."""
        report, guest = self._report, self._guest
        report.step("A fork of that instant: a writable disk, from which the loss is made good")
        uri = self._cdp.json("fork", "add", f"{DISK}@{BOOKMARK}", "rescue")["uri"]
        report.compare(
            f"{guest.precious} in a fork",
            "what was written at first",
            "mount -o ro, SHA-256" if isinstance(guest, FileSystemGuest) else "qemu-io read -P",
            lambda: guest.recover(uri, self._directory),
        )
        point, copy = self._server.uri(f"{DISK}@{BOOKMARK}"), self._before.copy
        mine = f"{copy.name}, copied then"
        report.compare("the point under the fork", mine, "qemu-img compare", lambda: same(copy, point))
        self._cdp("fork", "list")
        self._cdp("fork", "remove", "rescue", "--yes")

    def cut_a_base_point(self) -> None:
        """A base point and a copy of the source at the same instant; compared at the end, without the server."""
        report = self._report
        report.step("A base point: a QCOW2 file on top of the last one, made by qemu-img")
        self._workload.resume()
        self._workload.progress(seconds=self._seconds / 2)
        started = time.monotonic()
        copy, cut = self._hold_still("cut", lambda _: self._cdp.json("bp", "cut", DISK))
        report.figure("A base point, cut and verified", f"{time.monotonic() - started:.2f} s")
        self._base_point = Path(cut["path"])
        self._at_cut = copy
        self._cdp("bp", "list", DISK)
        uri = self._cdp("uri", f"{DISK}@bp:{cut['number']}")
        mine = f"{copy.name}, copied at the cut"
        report.compare(f"{DISK}@bp:{cut['number']}", mine, "qemu-img compare", lambda: same(copy, uri))

    # -- a killed target, the end ----------------------------------------------------------------------------

    def kill_the_target(self) -> None:
        """SIGKILL for the process that QEMU writes to, under load: the mirror goes on."""
        report, workload = self._report, self._workload
        report.step(
            f"kill -9 of the target under load (QEMU waits for it up to {RECONNECT_S} s: reconnect-delay)"
        )
        workload.resume()
        workload.progress(seconds=self._seconds / 4)
        workload.longest_s = 0.0
        for _ in range(KILLS):
            old = until(lambda: self._server.child("target-0"), "target")
            done = workload.done
            report.say(f"$ kill -9 {old}")
            os.kill(old, signal.SIGKILL)
            new = until(partial(self._other_target, old), "new target")
            workload.progress(seconds=self._seconds / 4)
            report.say(f"the new target is {new}; the guest did {workload.done - done} pieces of work since")
        report.figure("Longest wait of the guest while the target was killed", f"{workload.longest_s:.2f} s")
        self._cdp("point", "list", DISK, "--limit", "2")
        report.say("the mirror's job is ready and without an error, so it is said again:")
        self._say_synced()
        workload.progress(seconds=1.0)
        self._cdp("point", "list", DISK, "--limit", "2")

    def _other_target(self, old: int) -> int | None:
        pid = self._server.child("target-0")
        return pid if pid != old else None

    def end(self) -> None:
        """The guest and the mirror end; the last state is compared."""
        report = self._report
        report.step("The end of the mirror")
        self._workload.pause()
        self._workload.end()
        self._guest.close()
        self._source.end_mirror()
        uri = self._cdp("uri", f"{DISK}@latest")
        image = self._source.image
        report.compare(
            "the last state", f"{image.name}, the source", "qemu-img compare", lambda: same(image, uri)
        )
        before, copy = self._server.uri(f"{DISK}@{BOOKMARK}"), self._before.copy
        mine = f"{copy.name}, copied then"
        report.compare("that point once more", mine, "qemu-img compare", lambda: same(copy, before))
        shown = self._server.client.disk(DISK)
        report.figure("Journal", f"{format_bytes(shown['journal_bytes'])} for {shown['last_seq']} records")
        self._cdp("check", DISK)

    def read_the_base_point(self) -> None:
        """With nothing of ours running."""
        path, copy = self._base_point, self._at_cut
        command = ("qemu-img", "check", path)
        self._report.say(f"$ {' '.join(map(str, command))}")
        self._report.say(f"    {run(*command).stdout.splitlines()[0]}")
        for line in run("qemu-img", "info", "--backing-chain", path).stdout.splitlines():
            if line.startswith(("image:", "backing file:")):
                self._report.say(f"    {line}")
        mine = f"{copy.name}, copied at the cut"
        how = "qemu-img alone"
        self._report.compare(path.name, mine, how, lambda: same(copy, path, second_format="qcow2"))
