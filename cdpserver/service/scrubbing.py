"""The scrub in the service: one disk at a time, a turn at a time, each in a process of its own; a round begins when it is due."""

from typing import Any

import trio

from cdpserver.catalog import Entry
from cdpserver.check.scrub import Progress
from cdpserver.config import SECOND_NS
from cdpserver.errors import CdpError
from cdpserver.service.core import Core

TURN_S = 60.0
"""How long a process reads on; then it says what it found, and where to go on is durable."""

LOOK_S = 60.0
"""Between two looks for a disk whose round is due."""

FAILED_S = 3600.0
"""How long a disk is left alone whose turn failed."""


class Scrubbing:
    """The scrub of a service. `[scrub] rate` is its budget; without one there is none."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._failed: dict[str, float] = {}

    async def keep_scrubbing(self) -> None:
        """For ever. The first look waits a little: a start has more urgent things to read."""
        rate, every_ns = self._core.config.scrub_rate, self._core.config.scrub_every_ns
        if rate is None:
            return
        pause_s = min(LOOK_S, every_ns / SECOND_NS)
        while True:
            await trio.sleep(pause_s)
            while (entry := await self._core.thread(self._next)) is not None:
                await self._turn(entry, rate)

    def _next(self) -> Entry | None:
        """The disk that is under way, else the one that has waited longest, if it is due."""
        core, now_ns = self._core, self._core.clock.now_ns()
        waiting: list[tuple[bool, int, str, Entry]] = []
        for entry in core.catalog.names().values():
            if entry.state != "live":
                continue
            if self._failed.get(entry.id, 0.0) > now_ns / SECOND_NS:
                continue
            found = Progress.load(core.state.timeline(entry.id))
            if found.under_way or now_ns >= found.ended_ns + core.config.scrub_every_ns:
                waiting.append((not found.under_way, found.ended_ns, entry.id, entry))
        return min(waiting)[-1] if waiting else None

    async def _turn(self, entry: Entry, rate: int) -> None:
        core = self._core
        arguments = ["--state-dir", str(core.state.path), "--timeline", entry.id]
        arguments += ["--rate", str(rate), "--seconds", str(TURN_S)]
        try:
            done: dict[str, Any] = await core.job("scrub", "cdpserver.check.scrub", *arguments)
        except (CdpError, OSError) as error:
            self._failed[entry.id] = core.clock.now_ns() / SECOND_NS + FAILED_S
            core.log.emit("scrub.failed", level="warning", disk=entry.name, reason=str(error))
            return
        for row in done["new"]:
            core.log.emit(
                "scrub.damage",
                level="error",
                disk=entry.name,
                reason=row["what"],
                path=row["path"],
                from_seq=row["from_seq"],
                to_seq=row["to_seq"],
                points=row["points"]["affected"],
                next=f"cdp check {entry.name}; cdp repair {entry.name}",
            )
        if done["ended"]:
            core.log.emit("scrub.ended", disk=entry.name, bytes=done["bytes"], damaged=done["damaged"])
