"""The verbs for a command that is no Trio program: each connects to the monitor, does one thing, and ends.

Ctrl-C cancels what is under way, and QEMU's job with it; a command that was killed leaves the job, which the same command
joins again.
"""

import signal
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

import trio

from cdpserver.vm.qmp import Monitor, Qmp, connect

Said = TypeVar("Said")
Opened = TypeVar("Opened", bound=Monitor)


def over(path: Path, do: Callable[[Qmp], Awaitable[Said]]) -> Said:
    """What `do` says, given a connection to the monitor at `path`. KeyboardInterrupt, and what both raise."""
    return over_any(connect(path), do)


def over_any(
    connecting: AbstractAsyncContextManager[Opened], do: Callable[[Opened], Awaitable[Said]]
) -> Said:
    """The same by any way to a monitor."""
    return trio.run(_over, connecting, do)


async def _over(
    connecting: AbstractAsyncContextManager[Opened], do: Callable[[Opened], Awaitable[Said]]
) -> Said:
    said: list[Said] = []
    failed: Exception | None = None
    async with connecting as monitor:
        # Inside the connection, which must still carry the end of a job that is cancelled.
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:

                async def end() -> None:
                    async for _ in signals:
                        nursery.cancel_scope.cancel()

                nursery.start_soon(end)
                try:
                    said.append(await do(monitor))
                except Exception as error:  # noqa: BLE001 - raised below, where no group wraps it
                    failed = error
                nursery.cancel_scope.cancel()
    if failed is not None:
        raise failed
    if not said:
        raise KeyboardInterrupt
    return said[0]
