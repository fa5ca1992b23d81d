"""Dirty bitmaps of ours at a source: QEMU's own record of what a guest wrote since its target was known to be the same.

    add B ──► mirror in sync ──► B anchored in the target's journal ──► add C ──► in sync ──► C anchored ──► remove B

A write that was done on the source before B was there is no longer under way once the mirror is in sync, and every later one is
marked in B: so from that observation on, source and target differ in marked places alone. That is why a bitmap is anchored by an
observation that is later than itself, and why the older one goes only after that.

Kept in a QCOW2 file (persistent) a bitmap outlives a clean end of QEMU; after a kill it is `inconsistent`. Elsewhere it lives as
long as the process. Each gets a name of its own, so that an older copy of a source, with an older bitmap, is not taken for it.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from cdpserver.vm.mirror import Mirror
from cdpserver.vm.qmp import Monitor, QmpRefusedError

GRANULARITY = 64 << 10

LOOK_S = 10.0
"""Between two looks at how much a bitmap marks."""

ROTATE_BYTES = 16 << 20
"""So much is marked, and another bitmap begins."""

ROTATE_S = 60.0
"""A bitmap that marks anything is replaced after this."""

_FORMATS = ("qcow2", "raw")


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One dirty bitmap; `marked` in bytes."""

    node: str
    name: str
    marked: int
    inconsistent: bool


class Bitmaps:
    """Those of the disk that a mirror is of, by way of a monitor. Its methods raise what the monitor does."""

    def __init__(self, monitor: Monitor, mirror: Mirror) -> None:
        self.prefix = f"{mirror.name}-since-"
        self._monitor = monitor
        self._mirror = mirror

    async def nodes(self) -> list[dict[str, Any]]:
        """Every node of QEMU."""
        return list(await self._monitor.execute("query-named-block-nodes", {"flat": True}))

    async def look(self) -> list[Bitmap]:
        """Those that there are, wherever."""
        return list(_read(await self.nodes(), self.prefix))

    async def source(self) -> str:
        """The node that a running mirror is of; nothing if that cannot be told."""
        nodes = await self.nodes()
        tops = [node for node in nodes if node["node-name"] == self._mirror.filter]
        found = [
            str(node["node-name"])
            for node in nodes
            if tops and node["drv"] in _FORMATS and node.get("file") == tops[0].get("file")
        ]
        return found[0] if len(found) == 1 else ""

    async def add(self, node: str) -> str:
        """A new one that marks from now on; its name. QmpRefusedError where a node can have none."""
        drivers = {str(one["node-name"]): one["drv"] for one in await self.nodes()}
        name = self.prefix + secrets.token_hex(8)
        arguments = {"node": node, "name": name, "granularity": GRANULARITY}
        kept = drivers.get(node) == "qcow2"
        try:
            await self._monitor.execute("block-dirty-bitmap-add", arguments | {"persistent": kept})
        except QmpRefusedError:
            if not kept:
                raise
            # A file of version 2 keeps none: it is one for this process then.
            await self._monitor.execute("block-dirty-bitmap-add", arguments)
        return name

    async def remove_all(self, *, but: str = "") -> None:
        """Remove all, or all but one."""
        for found in await self.look():
            if found.name != but:
                named = {"node": found.node, "name": found.name}
                await self._monitor.execute("block-dirty-bitmap-remove", named)


def _read(nodes: Iterable[Mapping[str, Any]], prefix: str) -> Iterable[Bitmap]:
    for node in nodes:
        for one in node.get("dirty-bitmaps", ()):
            if str(one.get("name", "")).startswith(prefix):
                inconsistent = bool(one.get("inconsistent"))
                yield Bitmap(str(node["node-name"]), str(one["name"]), int(one["count"]), inconsistent)


class Anchoring:
    """Keeps one bitmap anchored while a mirror is in sync. `settle_s`: how long what is observed must have held."""

    def __init__(self, bitmaps: Bitmaps, *, settle_s: float) -> None:
        self._bitmaps = bitmaps
        self._settle_s = settle_s
        self._node = ""
        self._current = ""
        self._next = ""
        self._added_at = 0.0
        self._looked_at = 0.0
        self._unable = False

    def begin(self, node: str) -> None:
        """A mirror of this node begins: what was kept of another is over."""
        self._node, self._current, self._next, self._unable = node, "", "", False

    async def due(self, anchor: str, *, in_sync: bool, steady_since: float) -> str:
        """The bitmap to anchor now, or nothing. `anchor` is what the target is anchored to, if it still is."""
        if self._unable:
            return ""
        now = trio.current_time()
        if not self._next:
            if not anchor or anchor != self._current or await self._is_old(now):
                await self._add(now)
            return ""
        settled = now - max(self._added_at, steady_since) >= self._settle_s
        return self._next if in_sync and settled else ""

    async def anchored(self) -> None:
        """What was due is on record: older ones have done their work."""
        self._current, self._next = self._next, ""
        await self._bitmaps.remove_all(but=self._current)

    async def _is_old(self, now: float) -> bool:
        if now - self._looked_at < LOOK_S:
            return False
        self._looked_at = now
        marked = sum(one.marked for one in await self._bitmaps.look() if one.name == self._current)
        return marked >= ROTATE_BYTES or (marked > 0 and now - self._added_at >= ROTATE_S)

    async def _add(self, now: float) -> None:
        self._node = self._node or await self._bitmaps.source()
        try:
            if self._node:
                self._next = await self._bitmaps.add(self._node)
        except QmpRefusedError:
            self._next = ""
        self._unable = not self._next
        self._added_at = self._looked_at = now
