"""Keys of encrypted repositories: read from a file, or printed by a command. They are in no argument and in no file of ours."""

import os
import signal
import subprocess

from cdpserver.errors import RefusedError
from cdpserver.names import show

KEY_BYTES = 64 << 10

COMMAND_S = 45.0
"""After which such a command is killed: less than the service waits for a repository."""


def of_file(path: str) -> bytes:
    """What a key file holds. RefusedError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(KEY_BYTES)
    except OSError as error:
        raise RefusedError(
            f"the key file {show(path)} cannot be read: {error.strerror}",
            hint="name the file that holds the key, and that this user can read",
        ) from None


def of_command(command: str) -> bytes:
    """What a command of the shell prints. RefusedError if it fails, prints nothing or takes too long; it is killed then, with
    what it started.
    """
    with subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    ) as running:
        try:
            said, _ = running.communicate(timeout=COMMAND_S)
        except BaseException as error:
            os.killpg(running.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RefusedError(
                f"the key command did not end in {COMMAND_S:.0f} s", hint="try it by hand"
            ) from None
    if running.returncode:
        raise RefusedError(f"the key command ended with {running.returncode}", hint="try it by hand")
    if not said.strip():
        raise RefusedError("the key command printed nothing", hint="try it by hand")
    return said[:KEY_BYTES]
