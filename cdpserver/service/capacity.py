"""What history takes, and what another policy would need: asked over the API, measured in a process of its own."""

from collections.abc import Mapping
from typing import Any

import trio

from cdpserver.config import Settings
from cdpserver.retention.capacity import FLAGS
from cdpserver.service.core import Core


class Capacity:
    """Questions about room; one at a time, since each reads all files' sizes, and a forecast millions of records."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._one = trio.Lock()

    async def usage(self, disk: str | None) -> dict[str, Any]:
        """Bytes by disk and kind, growth, and when caps are reached. NotFoundError."""
        return await self._ask(*(() if disk is None else ("--disk", disk)))

    async def forecast(self, disk: str, asked: Mapping[str, str | None]) -> dict[str, Any]:
        """What a policy would need on a disk. UsageError, NotFoundError, RefusedError, CorruptError."""
        self._core.entry(disk)
        given = [f"{FLAGS[name]}={text}" for name, text in asked.items() if text is not None]
        return await self._ask("--forecast", "--disk", disk, *given)

    async def _ask(self, *arguments: str) -> dict[str, Any]:
        core = self._core
        common = ("--state-dir", str(core.state.path), "--config-text", Settings(core.config).to_toml())
        async with self._one:
            found: dict[str, Any] = await core.job(
                "capacity", "cdpserver.retention.capacity", *common, *arguments
            )
        return found
