"""One task at a time for each name."""

import trio

from cdpserver.service.tasks import Tasks


async def test_the_next_waits_for_the_last_word_of_the_one_before(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A recovery whose row says *done* has still to settle what follows: an undo that came then was forgotten by its end."""
    said: list[str] = []
    settle = trio.Event()

    async def first() -> None:
        said.append("done")
        await settle.wait()
        said.append("settled")

    async def undo() -> None:
        await tasks.last_ended("one")
        tasks.begin("one", forever)

    async def forever() -> None:
        said.append("undoing")
        try:
            await trio.sleep_forever()
        finally:
            said.append("cancelled")

    async with trio.open_nursery() as nursery:
        tasks = Tasks(nursery)
        tasks.begin("one", first)
        nursery.start_soon(undo)
        await trio.sleep(1)
        assert said == ["done"]
        settle.set()
        await trio.sleep(1)
        assert said == ["done", "settled", "undoing"]
        tasks.cancel("one")  # the one that runs, which is not forgotten
        await tasks.last_ended("one")
        assert said[-1] == "cancelled"
        tasks.cancel("one")
