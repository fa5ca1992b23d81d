"""Workers that hang while running VMs write through them: noticed, and killed, which loses nothing.

A guest's write waits for its worker. A dead worker's connections end, and QEMU connects to its successor within the second that
it waits; a hung one (stopped, or waiting for a store that does not answer) would hold the guest for ever. A worker that is
starting does not listen yet, and is left alone however long that takes.
"""

import contextlib
import os
import signal
from collections.abc import Callable

import trio

from cdpserver import messages
from cdpserver.service.children import Child
from cdpserver.service.control import exactly
from cdpserver.service.core import Core
from cdpserver.target.placement import worker_of

PING_EVERY_S = 0.1

SLOW_S = 0.3
"""An answer that takes no longer than this is no news: the machine may be busy."""

KILL_AFTER_S = 0.8
"""A worker answers within a millisecond; a guest waits no longer than two seconds, of which QEMU's reconnect may take one."""

_PING = messages.pack({"op": "ping"})


class Hung:
    """Watches the workers."""

    def __init__(self, core: Core, workers: list[Child]) -> None:
        self._core = core
        self._workers = workers
        self._asked_at: list[float | None] = [None] * len(workers)

    def for_s(self, timeline_id: str) -> float:
        """For how long the worker of a timeline has not answered; 0.0 if it does, or is just starting."""
        asked_at = self._asked_at[worker_of(timeline_id, len(self._workers))]
        waited = 0.0 if asked_at is None else trio.current_time() - asked_at
        return waited if waited > SLOW_S else 0.0

    async def watch(self, needed: Callable[[], bool]) -> None:
        """Until cancelled, while it is needed."""
        async with trio.open_nursery() as nursery:
            for number in range(len(self._workers)):
                nursery.start_soon(self._watch, number, needed)

    async def _watch(self, number: int, needed: Callable[[], bool]) -> None:
        while True:
            if needed():
                await self._ping(number)
            await trio.sleep(PING_EVERY_S)

    async def _ping(self, number: int) -> None:
        try:
            stream = await trio.open_unix_socket(str(self._core.state.worker_control(number)))
        except OSError:
            return  # it is starting
        async with stream:
            self._asked_at[number] = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._kill_later, number)
                # One that ends is no hung one: its successor is asked next.
                with contextlib.suppress(trio.BrokenResourceError, EOFError):
                    await stream.send_all(_PING)
                    await exactly(stream, messages.LENGTH.size)
                nursery.cancel_scope.cancel()
            self._asked_at[number] = None

    async def _kill_later(self, number: int) -> None:
        await trio.sleep(KILL_AFTER_S)
        worker = self._workers[number]
        self._core.log.emit("target.hung", level="error", child=worker.name, seconds=KILL_AFTER_S)
        if worker.pid is not None:
            os.kill(worker.pid, signal.SIGKILL)
