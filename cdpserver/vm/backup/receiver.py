"""The process that takes a backup (nbdplugin/intake.py), as seen by who runs it: started, asked, ended.

It speaks over one end of a pair of sockets, and ends when the other end does. QEMU's user must reach its NBD socket: that lies in
a directory of its own, which is given to that user.
"""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import trio

from cdpserver import messages
from cdpserver.errors import BrokenError, CdpError
from cdpserver.repository.pushed import Intent
from cdpserver.vm.mirror import nbd_node

ANSWER_S = 20.0
"""A process that says nothing for so long hangs: it has a thread for answers alone."""

START_S = 60.0
"""It opens the repository meanwhile, which may be far away."""

END_S = 20.0
"""What it may take to let go of the repository; it is killed then."""

DEAD_S = 5.0
"""One that is killed is gone by then, or hangs in the kernel, as in a write to a NAS that is away: it is waited for no longer."""


@dataclass(frozen=True, slots=True)
class Where:
    """The repository: its location, the key of an encrypted one, where its index is kept, if not in this user's cache, and where
    the socket for QEMU is, if not in TMPDIR.
    """

    location: str
    secret: bytes | None
    cache: str | None = None
    sockets: str | None = None


class Receiver:
    """One backup on its way; see `transport.Transport`."""

    closes_first = False

    def __init__(
        self, intent: Intent, process: trio.Process, control: trio.SocketStream, nbd: Path, log: BinaryIO
    ) -> None:
        self._intent, self._process, self._control = intent, process, control
        self._nbd, self._log = nbd, log
        self._answers = True

    def target(self, number: int) -> dict[str, Any]:
        """See Transport."""
        # A connection that was lost is not made again: what was under way may be missing.
        return nbd_node(f"nbd+unix:///{self._intent.disks[number].name}?socket={self._nbd}", reconnect_s=0)

    async def much(self) -> bool:
        """See Transport."""
        return bool((await self._ask({"op": "status"}))["much"])

    async def commit(self, *, time_ns: int, grade: str, sent: Sequence[int]) -> dict[str, Any]:
        """See Transport. What was not taken is known here, whatever the job says."""
        asked = {"op": "commit", "time_ns": time_ns, "grade": grade}
        return await self._ask(asked, within_s=float("inf"))

    async def abandon(self) -> None:
        """See Transport. It stays where it answers: killed, it might not be gone, but would answer QEMU no more."""
        with contextlib.suppress(CdpError):  # what ended the backup, which is known
            await self._ask({"op": "give-up"})
        if not self._answers:
            await kill(self._process)

    async def end(self) -> None:
        """Let it let go of the repository, and end."""
        with contextlib.suppress(CdpError):  # the backup is there
            await self._ask({"op": "end"}, within_s=END_S)

    async def _ask(self, asked: dict[str, Any], *, within_s: float = ANSWER_S) -> dict[str, Any]:
        try:
            with trio.fail_after(within_s if self._answers else 0):
                await self._control.send_all(messages.pack(asked))
                length = messages.check_length(await self._exactly(messages.LENGTH.size))
                said = messages.unpack(await self._exactly(length))
        except trio.TooSlowError:
            self._answers = False
            raise BrokenError(
                f"what takes the backup said nothing for {within_s:.0f} s", hint="make the backup again"
            ) from None
        except (trio.BrokenResourceError, EOFError):
            self._answers = False
            raise BrokenError(
                f"what takes the backup has ended: {self._said()}", hint="make the backup again"
            ) from None
        messages.raise_error(said)
        return said

    async def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = await self._control.receive_some(length - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def _said(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    async def _begin(self, where: Where) -> None:
        asked: dict[str, Any] = {"repo": where.location, "secret": where.secret, "cache": where.cache}
        asked["intent"] = asdict(self._intent)
        await self._ask(asked, within_s=START_S)


@contextlib.asynccontextmanager
async def receiving(where: Where, intent: Intent, *, user: int | None) -> AsyncIterator[Receiver]:
    """It listens, with the repository open. `user` is who QEMU runs as, if that is known. What was not committed is no backup."""
    directory = Path(tempfile.mkdtemp(prefix="cdp-", dir=where.sockets))
    ours, theirs = socket.socketpair()
    try:
        with tempfile.TemporaryFile() as log, theirs:
            nbd = directory / "nbd"
            process = await _start(nbd, theirs, log)
            try:
                theirs.close()
                async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as control:
                    receiver = Receiver(intent, process, control, nbd, log)
                    await receiver._begin(where)
                    if user is not None and os.geteuid() == 0:
                        for path in (directory, nbd):
                            os.chown(path, user, -1)
                    yield receiver
                    await receiver.end()
            finally:
                await kill(process)
    finally:
        ours.close()
        shutil.rmtree(directory, ignore_errors=True)


async def kill(process: trio.Process) -> None:
    """It is gone on return, unless the kernel holds it: then it goes when it is let go."""
    process.kill()
    with trio.move_on_after(DEAD_S, shield=True):
        await process.wait()


async def _start(nbd: Path, control: socket.socket, log: BinaryIO) -> trio.Process:
    try:
        return await trio.lowlevel.open_process(
            [*command(nbd), f"control={control.fileno()}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log.fileno(),
            pass_fds=[control.fileno()],
            env=environment(),
            start_new_session=True,  # it is not to hear the terminal's Ctrl-C before we have ended
        )
    except OSError as error:
        raise BrokenError(f"nbdkit cannot be started: {error}", hint="apt-get install nbdkit") from None


def environment() -> dict[str, str]:
    """nbdkit finds its Python by PATH."""
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path}


def command(nbd: Path) -> list[str]:
    """How the process is started that listens at `nbd`; it takes `control=FD` as well."""
    found = importlib.util.find_spec("nbdplugin")
    assert found is not None and found.submodule_search_locations
    plugin = Path(found.submodule_search_locations[0]) / "intake.py"
    return ["nbdkit", "-f", "-t", "1", "-U", str(nbd), "python", str(plugin)]
