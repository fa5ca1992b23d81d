"""The errors of the project, classed by what the caller may do next.

usage    the operator fixes the command
refused  valid, but not now (or not any more)
corrupt  stop, verify, use another copy
broken   I/O failed; the writer stays failed until it is reopened
"""

import errno
from typing import ClassVar


class CdpError(Exception):
    """One line for the operator, a hint with the next step, an exit code, and an errno for NBD."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = errno.EIO

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

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


class RemovedError(RefusedError):
    """The timeline is being removed."""

    kind = "removed"
    errno = errno.ESHUTDOWN


class CorruptError(CdpError):
    """Bytes on disk that fail their check."""

    kind = "corrupt"
    exit_code = 4


class BrokenError(CdpError):
    """An I/O operation failed; the writer is poisoned until it is reopened."""

    kind = "broken"
    exit_code = 5


class UnreachableError(CdpError):
    """The service does not answer."""

    kind = "unreachable"
    exit_code = 6
