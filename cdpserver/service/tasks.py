"""One task at a time for each name: the next begins when the last has ended, to its last word."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio


@dataclass(eq=False)
class _Task:
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Tasks:
    """Tasks of one nursery, by name."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._tasks: dict[str, _Task] = {}

    def begin(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Begin one. The last of this name has ended: see `last_ended`."""
        assert name not in self._tasks
        task = self._tasks[name] = _Task()
        self._nursery.start_soon(self._run, name, task, work)

    async def _run(self, name: str, task: _Task, work: Callable[[], Awaitable[None]]) -> None:
        try:
            with task.scope:
                await work()
        finally:
            del self._tasks[name]
            task.ended.set()

    async def last_ended(self, name: str) -> None:
        """Return when there is none."""
        while (task := self._tasks.get(name)) is not None:
            await task.ended.wait()

    def cancel(self, name: str) -> None:
        """End it, if there is one; at its next checkpoint."""
        if (task := self._tasks.get(name)) is not None:
            task.scope.cancel()
