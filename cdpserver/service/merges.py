"""Chains of base points in the service: the tree of a disk, and merges, one at a time for a disk, in a process of their own."""

from typing import Any

import trio

from cdpserver import names
from cdpserver.catalog import Entry
from cdpserver.chain import lock, merge
from cdpserver.chain.plan import Verb
from cdpserver.chain.tree import tree
from cdpserver.errors import NotFoundError, RefusedError
from cdpserver.names import BasePoint, When
from cdpserver.nodes import nodes
from cdpserver.service.core import Core
from cdpserver.service.jobs import current


class Merges:
    """The chains of every disk and fork."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._busy: dict[str, str] = {}

    async def tree(self, name: str) -> dict[str, Any]:
        """What follows on what, with the size of each."""
        entry = self._core.entry(name)
        branch = await self._core.thread(tree, self._core.state, self._core.catalog, entry.name)
        return branch.as_dict()

    async def merge(self, name: str, verb: Verb, point: str, base: str | None) -> dict[str, Any]:
        """Delete, pull or commit a base point; durable on return. RefusedError with the reason, as while another goes on."""
        core = self._core
        entry = core.entry(name)
        return await self._alone(
            entry, verb, [await core.thread(self._number, entry, when) for when in _whens(point, base)]
        )

    async def pull(self, entry: Entry, number: int, base: int | None) -> None:
        """The same by the service itself."""
        await self._alone(entry, "pull", [number] if base is None else [number, base])

    async def _alone(self, entry: Entry, verb: Verb, numbers: list[int]) -> dict[str, Any]:
        job, core, name = current.get(), self._core, entry.name
        if entry.id in self._busy:
            raise RefusedError(
                f"{self._busy[entry.id]} is merging base points of {name}", hint="wait for it: cdp job list"
            )
        self._busy[entry.id] = job
        try:
            said = await self._run(entry, verb, numbers)
        finally:
            del self._busy[entry.id]
        core.log.emit(
            "snapshot.merged",
            disk=name,
            verb=verb,
            stays=said["stays"],
            removed=said["removed"],
            freed_bytes=said["freed_bytes"],
        )
        return said

    async def _run(self, entry: Entry, verb: Verb, numbers: list[int]) -> dict[str, Any]:
        core = self._core
        arguments = ["--state-dir", str(core.state.path), "--timeline", entry.id, "--verb", verb]
        for option, number in zip(("--number", "--base"), numbers, strict=False):
            arguments += [option, str(number)]
        try:
            said: dict[str, Any] = await core.job(f"merge-{entry.id}", "cdpserver.chain.merge", *arguments)
            return said
        except BaseException:
            # Whatever ended its process, what it had begun is undone or finished before anything else goes on.
            with trio.CancelScope(shield=True):
                await core.thread(self._finish, entry)
            raise

    def _finish(self, entry: Entry) -> None:
        directory = self._core.state.timeline(entry.id)
        try:
            with lock.alone(directory):
                merge.drop_unfinished(directory)
                merge.finish(directory)
        except RefusedError:
            return  # somebody else is at work there, and begins by finishing
        except Exception as error:  # noqa: BLE001 - the reason why it ended is what is to be told; the next merge tries again
            self._core.log.emit("snapshot.unfinished", level="warning", disk=entry.name, reason=str(error))

    def _number(self, entry: Entry, when: When) -> int:
        """The base point that an instant is. NotFoundError if it is none."""
        if isinstance(when, BasePoint):
            return when.number
        position, _ = self._core.resolve(entry, when)
        for node in nodes(self._core.state.timeline(entry.id)):
            if node.seq == position.seq:
                return node.number
        raise NotFoundError(
            f"{entry.name}@{names.format_when(when)} is not the instant of a base point",
            hint=f"name one as bp:N: cdp snapshot tree {entry.name}",
        )


def _whens(point: str, base: str | None) -> list[When]:
    return [names.parse_when(text) for text in (point, base) if text is not None]
