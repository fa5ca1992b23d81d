"""The bitmap that a target is anchored to is replaced, and goes only after the next is on record: on a clock that jumps."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
import trio
import trio.testing

from cdpserver.vm.bitmaps import LOOK_S, ROTATE_BYTES, ROTATE_S, Anchoring, Bitmaps
from cdpserver.vm.mirror import Mirror
from cdpserver.vm.qmp import Event, QmpRefusedError

SETTLE_S = 0.4


class Qemu:
    """A monitor of a QEMU with one disk; `marked`: its bitmaps, oldest first, and how many bytes each marks."""

    version = (7, 2, 0)

    def __init__(self) -> None:
        self.marked: dict[str, int] = {}
        self.has_bitmaps = True

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        more = arguments or {}
        match command:
            case "query-named-block-nodes":
                bitmaps = [{"name": name, "count": count} for name, count in self.marked.items()]
                return [{"node-name": "disk0", "drv": "raw", "dirty-bitmaps": bitmaps}]
            case "block-dirty-bitmap-add" if not self.has_bitmaps:
                raise QmpRefusedError(command, "GenericError", "this node has none")
            case "block-dirty-bitmap-add":
                self.marked[more["name"]] = 0
            case "block-dirty-bitmap-remove":
                del self.marked[more["name"]]
            case _:
                raise AssertionError(command)
        return {}

    async def next_event(self) -> Event | None:
        await trio.sleep_forever()


class World:
    """A mirror that is in sync since the beginning, and what is due of it."""

    def __init__(self) -> None:
        self.qemu = Qemu()
        mirror = Mirror(self.qemu, "0123456789abcdef" * 2)
        self.anchoring = Anchoring(Bitmaps(self.qemu, mirror), settle_s=SETTLE_S)
        self.anchoring.begin("disk0")
        self.began = trio.current_time()

    async def due(self, anchor: str, *, in_sync: bool = True, steady_since: float | None = None) -> str:
        since = self.began if steady_since is None else steady_since
        return await self.anchoring.due(anchor, in_sync=in_sync, steady_since=since)

    async def first(self) -> str:
        """The first anchor, on record."""
        assert await self.due("") == ""
        await trio.sleep(2 * SETTLE_S)
        name = await self.due("")
        assert [name] == list(self.qemu.marked)
        await self.anchoring.anchored()
        return name


def on_a_clock(test: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        await test(World())

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_bitmap_counts_only_when_sync_was_seen_later_than_it_is() -> None:
    async def run(world: World) -> None:
        await world.due("")
        assert len(world.qemu.marked) == 1, "added at once"
        assert await world.due("") == "", "a write may be under way that it has not"
        await trio.sleep(2 * SETTLE_S)
        assert await world.due("", in_sync=False) == ""
        assert await world.due("", steady_since=trio.current_time() - SETTLE_S / 2) == "", (
            "QEMU resumed since"
        )
        assert await world.due("") in world.qemu.marked

    on_a_clock(run)


@pytest.mark.parametrize(
    ("marked", "wait_s", "rotates"),
    [
        (0, 10 * ROTATE_S, False),
        (1, ROTATE_S - LOOK_S, False),
        (1, ROTATE_S, True),
        (ROTATE_BYTES - 1, LOOK_S, False),
        (ROTATE_BYTES, LOOK_S, True),
        (ROTATE_BYTES, LOOK_S / 2, False),
    ],
)
def test_it_is_replaced_in_time(marked: int, wait_s: float, rotates: bool) -> None:
    async def run(world: World) -> None:
        first = await world.first()
        world.qemu.marked[first] = marked
        await trio.sleep(wait_s)
        assert await world.due(first) == ""
        assert len(world.qemu.marked) == (2 if rotates else 1)

    on_a_clock(run)


def test_the_older_goes_only_when_the_younger_is_on_record() -> None:
    async def run(world: World) -> None:
        first = await world.first()
        world.qemu.marked[first] = ROTATE_BYTES
        await trio.sleep(LOOK_S)
        await world.due(first)
        await trio.sleep(2 * SETTLE_S)
        second = await world.due(first)
        assert list(world.qemu.marked) == [first, second], "until it is on record, both are there"
        assert await world.due(first) == second, "said again while it could not be put on record"
        await world.anchoring.anchored()
        assert list(world.qemu.marked) == [second]
        assert await world.due(second) == ""

    on_a_clock(run)


def test_another_session_gets_another_bitmap() -> None:
    """The target is anchored to nothing after a resync, or to what another controller made."""

    async def run(world: World) -> None:
        first = await world.first()
        await world.due("")
        await trio.sleep(2 * SETTLE_S)
        second = await world.due("")
        assert second not in ("", first)

    on_a_clock(run)


def test_a_node_that_can_have_none_is_asked_once_for_each_mirror() -> None:
    async def run(world: World) -> None:
        world.qemu.has_bitmaps = False
        assert await world.due("") == ""
        world.qemu.has_bitmaps = True
        await trio.sleep(ROTATE_S)
        assert await world.due("") == "" and not world.qemu.marked
        world.anchoring.begin("disk0")
        await world.first()

    on_a_clock(run)
