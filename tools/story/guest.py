"""Who writes to the disk in the demo: a file system that this kernel mounts (as root), or else qemu-io.

Both do the same: some precious data at the start, then work in a thread that can be held still, a loss, and a look at what a
recovered disk holds.
"""

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Protocol

from tools.kit.mount import as_file, as_loop, mounted
from tools.kit.processes import FailedError, run

FILES = 400
"""Names that the workload writes to: each is written, appended to, renamed and removed many times."""

PRECIOUS_FILES = 20
PRECIOUS_BYTES = 100_000

WORK_S = 90.0
"""Longest wait for one piece of work: QEMU holds writes for half a minute while the target is away."""


class Guest(Protocol):
    """What the story asks of whoever uses the disk."""

    kind: str
    """A sentence for the person who looks on."""

    precious: str
    """What will be lost."""

    def prepare(self) -> None:
        """The disk as it is before protection begins, with the precious data."""

    def work(self) -> None:
        """One small piece of work: a few writes."""

    def sync(self) -> None:
        """Everything written so far is in the disk's image."""

    def lose(self) -> str:
        """Lose the precious data; what was done, as a command line."""

    def recover(self, uri: str, directory: Path) -> bool:
        """Is the precious data whole on the writable disk at `uri`? What is found is put back where it belongs."""

    def close(self) -> None:
        """Let go of the disk, everything written."""


class FileSystemGuest:
    """ext4 on the disk, mounted here."""

    kind = "ext4 on the disk, mounted over nbdfuse and a loop device"
    precious = "accounts/"

    def __init__(self, uri: str, directory: Path, seed: int) -> None:
        self._uri = uri
        self._directory = directory
        self._random = random.Random(seed)
        self._stack = contextlib.ExitStack()
        self._root = directory / "mnt"
        self._sums: dict[str, str] = {}

    def prepare(self) -> None:
        """mkfs, mount, and the precious files."""
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(as_file(self._uri, self._directory / "disk"))
            # Small file systems get blocks of 1 KiB, which libnbd's clients don't write to exports of 4 KiB blocks.
            run("mkfs.ext4", "-q", "-F", "-b", "4096", file)
            device = stack.enter_context(as_loop(file))
            stack.enter_context(mounted(device, self._root))
            self._stack = stack.pop_all()
        (self._root / "work").mkdir()
        accounts = self._root / "accounts"
        accounts.mkdir()
        for number in range(PRECIOUS_FILES):
            (accounts / f"{number:02d}.db").write_bytes(self._random.randbytes(PRECIOUS_BYTES))
        self._sums = sums(accounts)
        self.sync()

    def work(self) -> None:
        """Write, append to, rename or remove a file; now and then fsync it."""
        chance = self._random
        path = self._root / "work" / f"{chance.randrange(FILES):03d}"
        action = chance.random()
        if action < 0.1:
            path.unlink(missing_ok=True)
        elif action < 0.2 and path.exists():
            path.rename(path.with_name(f"{chance.randrange(FILES):03d}"))
        else:
            with open(path, "ab" if action < 0.5 else "wb") as file:
                file.write(chance.randbytes(chance.randrange(1, 20_000)))
                file.truncate(min(file.tell(), 100_000))
                if action > 0.8:
                    file.flush()
                    os.fsync(file.fileno())

    def sync(self) -> None:
        """syncfs."""
        run("sync", "--file-system", self._root)

    def lose(self) -> str:
        """rm -rf, and junk where the files were."""
        shutil.rmtree(self._root / "accounts")
        with open(self._root / "junk", "wb") as junk:
            junk.write(self._random.randbytes(2 * PRECIOUS_FILES * PRECIOUS_BYTES))
        self.sync()
        return "rm -rf accounts/, and 4 MB of junk written in its place"

    def recover(self, uri: str, directory: Path) -> bool:
        """Mount the fork read-only (ext4's journal is replayed into the fork) and copy the lost files back."""
        with (
            as_file(uri, directory / "rescue") as file,
            as_loop(file) as device,
            mounted(device, directory / "rescue.mnt", "-o", "ro") as root,
        ):
            found = root / "accounts"
            if not found.is_dir() or sums(found) != self._sums:
                return False
            shutil.copytree(found, self._root / "accounts")
        return sums(self._root / "accounts") == self._sums

    def close(self) -> None:
        """Unmount."""
        self._stack.close()


def sums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


class QemuIoGuest:
    """qemu-io, which writes patterns; the precious data is a region with a pattern of its own."""

    kind = "qemu-io, which writes patterns over NBD, since nothing is mounted"
    precious = "the first MiB"

    PATTERN = "0xcd"

    def __init__(self, uri: str, size: int, seed: int) -> None:
        self._uri = uri
        self._blocks = size // 4096
        self._random = random.Random(seed)

    def _io(self, *commands: str) -> None:
        """Run commands in a qemu-io of their own: fed through a pipe, it stalls when a line comes early."""
        arguments = [argument for command in commands for argument in ("-c", command)]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", *arguments, self._uri],
            capture_output=True,
            text=True,
            check=False,
            timeout=WORK_S,
        )
        if done.returncode or done.stdout.count("wrote ") != len(commands):
            raise FailedError(f"qemu-io {'; '.join(commands)}: {(done.stderr or done.stdout).strip()}")

    def prepare(self) -> None:
        """The precious region, and some data."""
        self._io(f"write -P {self.PATTERN} 0 1M", "write -P 0x11 8M 8M")

    def work(self) -> None:
        """Some writes (a few of them FUA) and zeroes somewhere after the first 4 MiB."""
        self._io(*(self._one() for _ in range(8)))

    def _one(self) -> str:
        chance = self._random
        block = chance.randrange(1024, self._blocks - 16)
        length = chance.choice((4, 4, 4, 8, 64)) * 1024
        action = chance.random()
        if action < 0.05:
            return f"write -z {block * 4096} {length}"
        forced = "-f " if action < 0.1 else ""
        return f"write {forced}-P {chance.randrange(1, 256)} {block * 4096} {length}"

    def sync(self) -> None:
        """Writes that were answered are in the image."""

    def lose(self) -> str:
        """Overwrite the precious region."""
        self._io("write -P 0xee 0 1M")
        return f"write -P 0xee 0 1M, where {self.PATTERN} was"

    def recover(self, uri: str, directory: Path) -> bool:
        """Read the region from the fork, and write it again."""
        done = subprocess.run(
            ["qemu-io", "-r", "-f", "raw", "-c", f"read -P {self.PATTERN} 0 1M", uri],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or "read 1048576" not in done.stdout or "failed" in done.stdout:
            return False
        self._io(f"write -P {self.PATTERN} 0 1M")
        return True

    def close(self) -> None:
        """Nothing of it runs between two calls."""


class Workload:
    """A guest's work in a thread, with pauses; knows how much was done and how long the longest wait was."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.done = 0
        self.longest_s = 0.0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._wanted = False
        self._idle = False
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="workload")
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._wait_until_wanted():
                started = time.monotonic()
                self.guest.work()
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                self.done += 1
        except BaseException as error:  # noqa: BLE001 (told to whoever waits for the work)
            self._error = error

    def _wait_until_wanted(self) -> bool:
        with self._changed:
            while not self._wanted and not self._ending:
                self._idle = True
                self._changed.notify_all()
                self._changed.wait()
            self._idle = False
            return not self._ending

    def resume(self) -> None:
        """Work on."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()

    def pause(self) -> None:
        """Hold still: nothing is written after the return, and everything written is in the disk's image."""
        with self._changed:
            self._wanted = False
            self._changed.wait_for(lambda: self._idle, WORK_S)
        self._check()
        if not self._idle:
            raise FailedError(f"a write of the guest hangs for {WORK_S:.0f} s")
        self.guest.sync()

    def progress(self, *, seconds: float = 0.0) -> None:
        """Let it work for some time; something is done in it, however slow it is."""
        end, before = time.monotonic() + seconds, self.done
        while time.monotonic() < end or self.done == before:
            self._check()
            if time.monotonic() > end + WORK_S:
                raise FailedError(f"the guest did nothing for {WORK_S:.0f} s")
            time.sleep(0.02)

    def _check(self) -> None:
        if self._error is not None:
            raise FailedError(f"the guest's work failed: {self._error!r}") from self._error

    def end(self) -> None:
        """No more work."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(WORK_S / 2)
