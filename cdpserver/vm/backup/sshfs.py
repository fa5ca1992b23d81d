"""A directory of this machine mounted on the VM's host, over one ssh connection of its own.

    here                                             the VM's host
    sftp-server ◄──► this process ◄──► ssh ═════════ sshd ◄──► sshfs -o passive ◄── QEMU
    (the directory)

`passive`: sshfs speaks SFTP on its standard input and output, so the host needs no way back to here, and no key. What passes goes
through this process: when that ends, however it ends, both sides see it, and sshfs unmounts.
"""

import contextlib
import secrets
import shlex
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import BinaryIO

import trio

from cdpserver.errors import BrokenError

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")

SFTP_SERVERS = (
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
)

PIECE = 256 << 10

END_S = 20.0
"""How long sshfs may take to hand on what it has, and to unmount."""


class Link:
    """A mount on a host, as long as `linked` lasts."""

    def __init__(self, host: str, path: str, ssh: trio.Process, log: BinaryIO) -> None:
        self.path = path
        """Where the directory is, on the host."""
        self._host, self._ssh, self._log = host, ssh, log

    def cut(self) -> None:
        """End it at once: what waits for it on the host gets an error."""
        self._ssh.kill()

    def check(self) -> None:
        """BrokenError if it has ended."""
        if self._ssh.poll() is not None:
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().splitlines()
            raise BrokenError(
                f"the sshfs link to {self._host} has ended: {said[-1][:300] if said else 'it said nothing'}",
                hint=f"sshfs must be installed there, and `ssh {self._host}` must need no password",
            )


@contextlib.asynccontextmanager
async def linked(directory: Path, host: str, *, ssh: Sequence[str] = SSH) -> AsyncIterator[Link]:
    """The directory on the host, sooner or later. BrokenError if it cannot be begun; at the end everything written is here."""
    mount = (
        f"/tmp/cdp-sshfs-{secrets.token_hex(8)}"  # nobody can guess it, and mkdir refuses one that is there
    )
    with tempfile.TemporaryFile() as log:
        async with (
            _started([_sftp_server(), "-d", str(directory)], log) as server,
            _started([*ssh, host, _script(directory, mount)], log) as client,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_pump, server, client)
            nursery.start_soon(_pump, client, server)
            yield Link(host, mount, client, log)
            # No more requests come: nothing is open there by now, and closing it has sent everything.
            nursery.cancel_scope.cancel()


def _script(directory: Path, mount: str) -> str:
    """What the host's shell is told. QEMU may be another user there, to whom only root can show it."""
    at, of = shlex.quote(mount), shlex.quote(f":{directory}")
    return (
        f"umask 077; mkdir {at} || exit; o=passive,sshfs_sync; [ $(id -u) = 0 ] && o=$o,allow_other;"
        f' sshfs -f -o "$o" {of} {at}; rmdir {at}'
    )


def _sftp_server() -> str:
    found = next((path for path in SFTP_SERVERS if Path(path).exists()), None)
    if found is None:
        raise BrokenError("there is no sftp-server here", hint="apt-get install openssh-sftp-server")
    return found


@contextlib.asynccontextmanager
async def _started(command: Sequence[str], log: BinaryIO) -> AsyncIterator[trio.Process]:
    try:
        process = await trio.lowlevel.open_process(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.fileno(),
            start_new_session=True,  # it is not to hear the terminal's Ctrl-C before we have ended
        )
    except OSError as error:
        raise BrokenError(f"{command[0]} cannot be started: {error}", hint="is it installed?") from None
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None and process.stdout is not None
            await process.stdin.aclose()
            await process.stdout.aclose()
            with trio.move_on_after(END_S):
                await process.wait()
            process.kill()
            await process.wait()


async def _pump(source: trio.Process, to: trio.Process) -> None:
    """What one says to the other, until one of them has ended."""
    assert source.stdout is not None and to.stdin is not None
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while part := await source.stdout.receive_some(PIECE):
            await to.stdin.send_all(part)
    await to.stdin.aclose()
