"""The first copy: before *synced*, a mirror's writes go straight into the sparse base image.

Which mode a timeline is in is decided by files: without a segment it is in its first copy. The switch makes the base read-only
and opens segment 1; the base is made durable outside the barrier, and base point 0 counts after that (`base.synced`).
Durability: none before the switch. After an unclean boot the base is thrown away and the first copy starts again.
"""

import ctypes
import errno
import json
import os
from pathlib import Path
from typing import Any

from cdpserver import durable
from cdpserver.durable import take_int, take_keys
from cdpserver.errors import BrokenError, CdpError, CorruptError, NoSpaceError
from cdpserver.journal.begin import start_history

FALLOC_PUNCH = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE (linux/falloc.h)."""

_libc = ctypes.CDLL(None, use_errno=True)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make a range of a file a hole, which reads as zeros."""
    if _libc.fallocate(fd, FALLOC_PUNCH, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class FirstCopy:
    """The base image being filled. Open it with the timeline's writer lock held."""

    def __init__(self, directory: Path, *, size: int, boot_id: str) -> None:
        self.directory = directory
        self.size = size
        self.boot_id = boot_id
        self.path = directory / "base.raw"
        self.restarted = False
        self.session = 0
        self.wrote = False
        self._load()
        if self.path.exists():
            self.path.chmod(0o600)  # a switch that was killed half-way had made it read-only
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, size)

    def _load(self) -> None:
        kept = self._noted()
        self.session, self.wrote = kept["session"], kept["wrote"]
        if (kept["boot_id"] != self.boot_id or self._lost_base()) and self.wrote:
            # What was acknowledged may be missing: nothing of it can be trusted.
            self.restarted = True
            self.wrote = False
            self.path.unlink(missing_ok=True)
            self.session += 1
        self._save()

    def _noted(self) -> dict[str, Any]:
        """What `first-copy.json` says. Without one a base was written by nobody knows which session and boot."""
        path = self.directory / "first-copy.json"
        try:
            kept = durable.read_json(path)
            take_keys(kept, {"boot_id", "session", "wrote"}, path)
            return {**kept, "session": take_int(kept, "session", path), "wrote": bool(kept["wrote"])}
        except (FileNotFoundError, CorruptError):
            return {"boot_id": "", "session": 0, "wrote": self.path.exists()}

    def _lost_base(self) -> bool:
        """Is the base gone or cut short behind our back? A disk that was to grow when we were killed left a longer one."""
        return not self.path.exists() or self.path.stat().st_size < self.size

    def _save(self) -> None:
        values = {"boot_id": self.boot_id, "session": self.session, "wrote": self.wrote}
        durable.write_whole(self.directory / "first-copy.json", json.dumps(values).encode())

    def grow(self, size: int) -> None:
        """Room for `size` bytes, more than before. It counts when `timeline.json` says so; until then it is taken back."""
        with durable.io_errors("grow", self.path):
            os.ftruncate(self._fd, size)
        self.size = size

    def begin_session(self) -> int:
        """A connection writes for the first time, or one that wrote is lost. Returns the session's number."""
        self.session += 1
        self.wrote = True
        self._save()
        return self.session

    def write(self, payload: memoryview, offset: int) -> None:
        """Write to the base; on return it survives a kill."""
        written = 0
        try:
            while written < len(payload):
                written += os.pwrite(self._fd, payload[written:], offset + written)
        except OSError as error:
            raise _failed(error) from error

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, without using space."""
        try:
            punch_hole(self._fd, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise _failed(error) from error
            step = 1 << 20
            for at in range(offset, offset + length, step):
                self.write(memoryview(bytes(min(step, offset + length - at))), at)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Read from the base."""
        done = 0
        while done < len(buffer):
            read = os.preadv(self._fd, [buffer[done:]], offset + done)
            if not read:
                raise CorruptError(
                    f"{self.path} ends before {offset + len(buffer)}", hint="copy the disk anew"
                )
            done += read

    def status(self, offset: int, end: int) -> list[tuple[int, int, bool]]:
        """(start, end, zero) of the first run from `offset` on."""
        try:
            data = min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
        except OSError:
            data = end
        if data > offset:
            return [(offset, data, True)]
        return [(offset, min(os.lseek(self._fd, offset, os.SEEK_HOLE), end), False)]

    def sync(self) -> None:
        """Make what was written durable (it is worth nothing before the switch, but a client asked)."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise _failed(error) from error

    def switch(self, *, uuid: bytes, now_ns: int) -> None:
        """End the first copy: the base becomes read-only and the journal opens. Milliseconds; nothing may write meanwhile."""
        with durable.io_errors("begin the history in", self.directory):
            os.fchmod(self._fd, 0o400)
            start_history(
                self.directory,
                uuid=uuid,
                boot_id=self.boot_id,
                now_ns=now_ns,
                mode="first-copy",
                session=self.session,
            )

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def sync_base(directory: Path) -> None:
    """Make the base of a switched timeline durable and say so on disk (`base.synced`). Idempotent."""
    done = directory / "base.synced"
    if done.exists() or not (directory / "base.raw").exists():
        return
    fd = os.open(directory / "base.raw", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise _failed(error) from error
    finally:
        os.close(fd)
    durable.write_whole(done, b"")


def base_lost(directory: Path) -> bool:
    """Did an unclean boot come between the switch and the base being durable? A base point is only published after that."""
    return not (directory / "base.synced").exists() and not any(directory.glob("bp-*.qcow2"))


def _failed(error: OSError) -> CdpError:
    if error.errno in durable.NO_SPACE:
        return NoSpaceError(
            "the store's file system is full", hint="free space; nothing acknowledged is lost"
        )
    return BrokenError(f"writing to the base image failed: {error.strerror}", hint="look at the store's disk")
