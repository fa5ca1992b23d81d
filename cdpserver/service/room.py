"""Chains stay below their limit: automatic base points make room for new ones, manual ones are refused at it."""

from typing import Any

from cdpserver.catalog import Entry
from cdpserver.chain import room
from cdpserver.errors import CdpError, RefusedError
from cdpserver.nodes import published
from cdpserver.retention.policy import CHAIN_WARNING
from cdpserver.service.core import Core
from cdpserver.service.merges import Merges
from cdpserver.service.warned import Rising


class Room:
    """Room for one more base point in the chains of every disk and fork."""

    def __init__(self, core: Core, merges: Merges) -> None:
        self._core = core
        self._merges = merges
        self._long = Rising([CHAIN_WARNING], fall=CHAIN_WARNING // 8)

    async def check(self, entry: Entry) -> None:
        """Before somebody's own base point is cut. RefusedError at the limit."""
        length, limit = await self._core.thread(self._length, entry)
        if length >= limit:
            raise RefusedError(
                f"the chain of {entry.name} has {length} base points, and max_chain is {limit}",
                hint=f"merge some: cdp snapshot pull --help; or: cdp policy set {entry.name} --max-chain N",
            )

    async def make(self, entry: Entry, number: int) -> None:
        """Before base point `number` is published. RefusedError if the chain is full and nothing may go by itself."""
        core = self._core
        while True:
            length, limit = await core.thread(self._length, entry)
            if length < limit:
                break
            pull = await core.thread(self._pull, entry, length + 1 - limit)
            if pull is None:
                raise RefusedError(
                    f"the chain of {entry.name} is full ({length} of {limit}), and no automatic base point in it may go",
                    hint=f"cdp snapshot tree {entry.name} shows what holds them",
                )
            owner = await core.thread(core.catalog.by_id, pull.timeline)
            if owner is None:
                raise RefusedError(f"timeline {pull.timeline} has no name", hint="restart cdpserver")
            await self._merges.pull(owner, pull.number, pull.base)
        if self._long.news(entry.id, length + 1):
            fields: dict[str, Any] = {"disk": entry.name, "length": length + 1, "limit": limit}
            core.log.emit("chain.long", level="warning", number=number, **fields)

    async def asked_for(self, entry: Entry, number: int) -> None:
        """Note that a base point is somebody's own."""
        await self._core.thread(room.add_manual, self._core.state.timeline(entry.id), number)

    def _length(self, entry: Entry) -> tuple[int, int]:
        limit = self._core.policy(entry).max_chain
        try:
            return len(room.chain(self._core.state, entry.id)), limit
        except (CdpError, OSError):
            # A chain that cannot be read: its files count, and publishing says what is wrong with them.
            return len(published(self._core.state.timeline(entry.id))), limit

    def _pull(self, entry: Entry, too_many: int) -> room.Pull | None:
        state, catalog = self._core.state, self._core.catalog
        return room.make_room(room.slots(state, catalog, room.chain(state, entry.id)), too_many)
