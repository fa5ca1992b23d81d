"""Asking the target's workers, the only writers of journals, over their control sockets (`run/target-K.ctl`).

A connection a call: the target has a thread for each, so that one that waits for a disk (the base of a first copy being
synced) holds up no other. While the target restarts, calls wait for it, within a limit.
"""

import contextlib
from pathlib import Path
from typing import Any

import trio

from cdpserver import messages
from cdpserver.errors import BrokenError, CdpError, CorruptError, UnreachableError
from cdpserver.state import StateDir
from cdpserver.target.placement import process_name, worker_of

RESTART_S = 15.0
"""How long a call waits for a target that is not there: it is back in 0.1 s unless something is wrong."""

RETRY_S = 0.02
CALLS = 16
"""Calls at once: the backlog of the target's control socket."""

REPEATABLE = frozenset({"ping", "status", "look", "holds", "commit", "full", "shut", "mirrored"})
"""Operations that may be asked again when the target died before it answered."""

EVENTS_HINT = "the events say why: events.jsonl"


class Targets:
    """The workers: each disk is with one of them, and some questions are for all."""

    def __init__(self, state: StateDir, workers: int) -> None:
        self._workers = [WorkerControl(state.worker_control(number)) for number in range(workers)]

    async def call(self, timeline_id: str, operation: str, **fields: Any) -> Any:
        """Ask the worker of a disk."""
        number = worker_of(timeline_id, len(self._workers))
        return await self._workers[number].call(operation, **fields)

    async def status(self, *, within_s: float) -> tuple[dict[str, Any], dict[str, bool]]:
        """(what the workers say of the disks that they have open, by name; whether each worker answered in time)."""
        said: dict[str, Any] = {}
        answered = {process_name(number): False for number in range(len(self._workers))}

        async def ask(name: str, worker: WorkerControl) -> None:
            with trio.move_on_after(within_s), contextlib.suppress(CdpError):
                said.update(await worker.call("status"))
                answered[name] = True

        async with trio.open_nursery() as nursery:
            for name, worker in zip(answered, self._workers, strict=True):
                nursery.start_soon(ask, name, worker)
        return said, answered

    async def shut_all(self, *, ping_s: float, shut_s: float) -> tuple[int, list[str]]:
        """Have every journal closed; how many disks, and why some were not.

        A worker that is not there within `ping_s` has none.
        """
        count = 0
        failed: list[str] = []

        async def ask(number: int, worker: WorkerControl) -> None:
            nonlocal count
            try:
                with trio.fail_after(ping_s):
                    await worker.call("ping")
                with trio.fail_after(shut_s):
                    count += await worker.call("shut-all")
            except (CdpError, trio.TooSlowError) as error:
                failed.append(f"worker {number}: {str(error) or 'it took too long'}")

        async with trio.open_nursery() as nursery:
            for number, worker in enumerate(self._workers):
                nursery.start_soon(ask, number, worker)
        return count, failed


class WorkerControl:
    """Client of the control socket at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls = trio.CapacityLimiter(CALLS)

    async def call(self, operation: str, **fields: Any) -> Any:
        """Ask and return the answer. Raises what the target raised, or UnreachableError; callers set other limits."""
        message = messages.pack({"op": operation, **fields})
        async with self._calls:
            while True:
                stream = await self._connect()
                async with stream:
                    reply = await _converse(stream, message)
                if reply is not None:
                    messages.raise_error(reply)
                    return reply["ok"]
                if operation not in REPEATABLE:
                    raise BrokenError(
                        f"the target ended while it was asked for {operation!r}",
                        hint="look whether it was done (cdp disk show, cdp point list), then ask again",
                    )

    async def _connect(self) -> trio.SocketStream:
        with trio.move_on_after(RESTART_S):
            while True:
                try:
                    return await trio.open_unix_socket(str(self._path))
                except OSError:
                    await trio.sleep(RETRY_S)
        raise UnreachableError("the target process does not answer", hint=EVENTS_HINT)


async def _converse(stream: trio.SocketStream, message: bytes) -> dict[str, Any] | None:
    """Send and receive one message; None when the other side is gone."""
    try:
        await stream.send_all(message)
        prefix = await exactly(stream, messages.LENGTH.size)
        return messages.unpack(await exactly(stream, messages.check_length(prefix)))
    except (trio.BrokenResourceError, EOFError):
        return None
    except ValueError as error:
        raise CorruptError(f"the target answered nonsense: {error}") from None


async def exactly(stream: trio.SocketStream, length: int) -> bytes:
    """So many bytes; EOFError when the other side is gone first."""
    parts = bytearray()
    while len(parts) < length:
        part = await stream.receive_some(length - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
