"""Talking to systemd: sd_notify(3), and the watchdog. Without systemd (no $NOTIFY_SOCKET) nothing is said to nobody."""

import array
import os
import socket
import time
from collections.abc import Sequence

import trio

WAIT_S = 2.0
"""A manager's queue is full for moments: the sockets of many workers go into it at once. READY must not be lost by that."""

START_S = 600.0
"""How long a start may take: TimeoutStartSec= of the unit."""


def notify(*lines: str, fds: Sequence[int] = (), within_s: float = WAIT_S) -> bool:
    """Send `lines` (such as `READY=1`) and file descriptors; False when nobody listens.

    A manager that is gone or hangs must not stop the service, so a message that cannot be sent within a while is dropped.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.settimeout(within_s)
        try:
            client.sendmsg(["\n".join(lines).encode()], rights, 0, address)
        except OSError:
            return False
    return True


def ready() -> None:
    """The service serves."""
    limit = watchdog_s()
    notify("READY=1", "STATUS=serving", *([_watchdog(limit)] if limit else []))


def reloading() -> None:
    """The service is about to replace itself by a new program in the same process, whose event loop does not turn at once."""
    monotonic = f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
    notify("RELOADING=1", monotonic, *([_watchdog(START_S)] if watchdog_s() else []))


def stopping() -> None:
    """The service is closing its journals."""
    notify("STOPPING=1", "STATUS=closing the journals")


def watchdog_s() -> float | None:
    """Within how many seconds systemd wants to hear from this process; None when it does not."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(wanted) / 1e6 if wanted.isdecimal() and int(wanted) and mine == str(os.getpid()) else None


def _watchdog(seconds: float) -> str:
    return f"WATCHDOG_USEC={seconds * 1e6:.0f}"


async def feed_watchdog() -> None:
    """Say that the event loop turns, twice as often as is asked for. A loop that hangs says nothing, and systemd restarts it."""
    limit = watchdog_s()
    if limit is None:
        return
    while True:
        notify("WATCHDOG=1", within_s=0)
        await trio.sleep(limit / 2)
