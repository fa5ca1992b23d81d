"""What nbdkit does about its parent, undone."""

import ctypes
import os

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def outlive_parent() -> None:
    """Go on when the service is killed: clients keep writing, and the next service ends this process by its pid.

    nbdkit 1.32 in the foreground asks the kernel for SIGTERM at its parent's death, with or without `--exit-with-parent`
    (strace shows it). SIGTERM would turn a live mirror's writes into errors. Call from the main thread: `after_fork`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
