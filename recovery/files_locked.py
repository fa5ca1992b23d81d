"""What a LUKS volume holds, for who has its key: its export, decrypted by nbdkit's luks filter, as the disk of a browser.

    point's export of the volume -> nbdkit --filter=luks (a process of its own) -> NBD -> Browser

The filter knows LUKS 1 and passphrases; the key file holds one. It is named to nbdkit and never read into a command line.
"""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdpserver.errors import BrokenError, RefusedError, UsageError
from cdpserver.files.browser import Browser
from cdpserver.limits import SECTOR
from cdpserver.view.view import View

MAX_KEY = 512
"""Bytes of a passphrase, as cryptsetup has it."""

START_S = 60.0
"""A key is made slow on purpose; two seconds is what cryptsetup aims at, on a machine that may have been faster."""

LARGEST_READ = 4 << 20

LUKS2_HINT = "attach the disk to a VM that has the key: cdp fork add"


class NbdDisk:
    """An NBD export as a browser reads it."""

    def __init__(self, socket: Path) -> None:
        """BrokenError if it does not answer."""
        import nbd

        self._nbd: Any = nbd
        self._client = nbd.NBD()
        try:
            self._client.connect_unix(str(socket))
        except nbd.Error as error:
            raise BrokenError(f"the decrypted volume cannot be read: {error.string}") from error
        self.size = int(self._client.get_size())

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes; the filter reads whole sectors."""
        first, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        try:
            parts = (
                bytes(self._client.pread(min(LARGEST_READ, end - at), at))
                for at in range(first, end, LARGEST_READ)
            )
            return b"".join(parts)[offset - first : offset - first + length]
        except self._nbd.Error as error:
            raise BrokenError(f"the decrypted volume cannot be read: {error.string}") from error

    def close(self) -> None:
        """Hang up."""
        self._client.shutdown()


def split(browser: Browser, named: str | None) -> tuple[str, str | None]:
    """(the LUKS volume, the volume in it) that are meant: what is named is the former if it is one, else the latter."""
    locked = [volume.name for volume in browser.volumes() if volume.holds == "luks"]
    if named in locked:
        return str(named), None
    if len(locked) != 1:
        found = ", ".join(locked) or "none"
        raise UsageError(f"which volume does the key open? LUKS is in: {found}", hint="name it: DISK@WHEN/p3")
    return locked[0], named


def check_version(browser: Browser, view: View, volume: str) -> None:
    """RefusedError for what the filter cannot open."""
    _, _, place = browser.parts(volume)[0]
    version = int.from_bytes(view.read(place + 6, 2), "big")
    if version != 1:
        raise RefusedError(
            f"{volume or 'the disk'} is LUKS {version}; with a key LUKS 1 is read", hint=LUKS2_HINT
        )


def check_key(path: Path) -> Path:
    """UsageError for what cannot be a passphrase in a file."""
    try:
        with open(path, "rb") as file:
            held = file.read(MAX_KEY + 2)
    except OSError as error:
        raise UsageError(f"the key file cannot be read: {error.strerror}", hint=str(path)) from None
    text = held.removesuffix(b"\n")
    if not text or len(text) > MAX_KEY or b"\n" in text or b"\0" in text:
        raise UsageError(
            f"{path} holds no passphrase: one line of at most {MAX_KEY} bytes",
            hint="a key file of random bytes is not supported; a passphrase of the same volume is",
        )
    return path.absolute()


@contextlib.contextmanager
def unlocked(uri: str, key: Path) -> Iterator[NbdDisk]:
    """What the LUKS volume at a URI holds. RefusedError if the key does not open it."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as work, tempfile.TemporaryFile() as log:
        socket, ready = Path(work) / "nbd", Path(work) / "pid"
        process = subprocess.Popen(
            [
                *("nbdkit", "-f", "-r", "-t", "1", "-U", str(socket), "-P", str(ready)),
                *("--exit-with-parent", "--filter=luks"),
                *("nbd", f"uri={uri}", f"passphrase=+{key}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + START_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise _why(log)
                time.sleep(0.005)
            try:
                disk = NbdDisk(socket)
            except BrokenError as error:
                raise _why(log) from error
            with contextlib.closing(disk):
                yield disk
        finally:
            process.kill()
            process.wait()


def _why(log: Any) -> Exception:
    log.seek(0)
    said = log.read().decode(errors="replace").strip()
    if "passphrase is not correct" in said:
        return RefusedError("the key does not open this volume", hint="another key, or an earlier instant")
    last = said.rpartition("\n")[2]
    return BrokenError(f"the volume cannot be opened: {last[-300:]}", hint=LUKS2_HINT)
