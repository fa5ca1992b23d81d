"""When a plugin begins to serve: after the process that served before it is gone.

nbdkit calls `after_fork` before it accepts the first client. There the plugin has loaded everything; it says so to the service,
waits for the lock that its predecessor holds until it ends, opens its files, says that too, and returns.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from cdpserver.messages import READY_FD
from nbdplugin.parent import outlive_parent


def begin(lock: Path, start: Callable[[], None]) -> None:
    """Wait for `lock`, which this process then holds for life, and `start`."""
    outlive_parent()
    os.umask(0o077)  # nbdkit has set its own, 022
    _say(b"warm\n")
    # Never closed: the kernel lets go of it when the process ends, however it ends.
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    start()
    _say(b"ready\n")
    if READY_FD in os.environ:
        os.close(int(os.environ.pop(READY_FD)))


def _say(word: bytes) -> None:
    """A service that is gone does not hear it, and the next one kills us: either way we go on."""
    if READY_FD in os.environ:
        try:
            os.write(int(os.environ[READY_FD]), word)
        except BrokenPipeError:
            return
