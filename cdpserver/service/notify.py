"""Talking to systemd: sd_notify(3), and the watchdog. Without systemd (no $NOTIFY_SOCKET) nothing is said to nobody."""

import array
import os
import socket
import time
from collections.abc import Sequence

import trio


def notify(*lines: str, fds: Sequence[int] = ()) -> bool:
    """Send `lines` (such as `READY=1`) and file descriptors; False when nobody listens.

    A manager that is gone or slow must not stop the service, so a message that cannot be sent is dropped.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        try:
            client.sendmsg(["\n".join(lines).encode()], rights, socket.MSG_DONTWAIT, address)
        except OSError:
            return False
    return True


def ready() -> None:
    """The service serves."""
    notify("READY=1", "STATUS=serving")


def reloading() -> None:
    """The service is about to replace itself by a new program in the same process."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    """The service is closing its journals."""
    notify("STOPPING=1", "STATUS=closing the journals")


def watchdog_s() -> float | None:
    """Within how many seconds systemd wants to hear from this process; None when it does not."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(wanted) / 1e6 if wanted.isdecimal() and int(wanted) and mine == str(os.getpid()) else None


async def feed_watchdog() -> None:
    """Say that the event loop turns, twice as often as is asked for. A loop that hangs says nothing, and systemd restarts it."""
    limit = watchdog_s()
    if limit is None:
        return
    while True:
        notify("WATCHDOG=1")
        await trio.sleep(limit / 2)
