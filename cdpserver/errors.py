"""The errors of the project, classed by what the caller may do next.

usage    the operator fixes the command
refused  valid, but not now (or not any more)
corrupt  stop, verify, use another copy
broken   I/O failed; the writer stays failed until it is reopened

Every error names the next step: its own hint, or the usual one of its class.
"""

import errno
from typing import ClassVar

EXIT_CODES = {
    0: "done",
    1: "internal error",
    2: "wrong command or nothing of that name",
    3: "refused now",
    4: "damage found",
    5: "I/O failed",
    6: "cdpserver does not answer",
    130: "interrupted",
    141: "nobody reads the answer",
}
"""What `cdp` and `cdpserver` end with; help, man pages and README show this table."""


def exit_codes_line() -> str:
    """The table as a line of help."""
    return "exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())


class CdpError(Exception):
    """One line for the operator, a hint with the next step, an exit code, and an errno for NBD."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = errno.EIO
    usual_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(CdpError):
    """A name, size, instant or option that cannot be meant."""

    kind = "usage"
    exit_code = 2
    errno = errno.EINVAL


class NotFoundError(UsageError):
    """The thing named does not exist."""

    kind = "not-found"
    errno = errno.ENOENT


class RefusedError(CdpError):
    """Valid, but the state of things forbids it now."""

    kind = "refused"
    exit_code = 3
    errno = errno.EPERM


class NoSpaceError(RefusedError):
    """The store's file system is full; nothing acknowledged is lost."""

    kind = "no-space"
    errno = errno.ENOSPC
    usual_hint = "free space on the file system of the state directory, or remove disks: cdp disk list"


class ForbiddenError(RefusedError):
    """Not for whom this process runs as."""

    kind = "forbidden"
    errno = errno.EACCES


class RemovedError(RefusedError):
    """The timeline is being removed."""

    kind = "removed"
    errno = errno.ESHUTDOWN
    usual_hint = "list what is there: cdp disk list"


class CorruptError(CdpError):
    """Bytes on disk that fail their check."""

    kind = "corrupt"
    exit_code = 4
    usual_hint = "cdp check DISK says what that touches"


class BrokenError(CdpError):
    """An I/O operation failed; the writer is poisoned until it is reopened."""

    kind = "broken"
    exit_code = 5
    usual_hint = "look at the kernel log and at the server's: journalctl -k, journalctl -u cdpserver"


class UnreachableError(CdpError):
    """The service does not answer."""

    kind = "unreachable"
    exit_code = 6
    usual_hint = "look whether it runs: systemctl status cdpserver"
