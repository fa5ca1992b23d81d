"""Points as the index and the header log tell them: names that look like something else."""

import pytest

from tests.core import INDEXER, SECOND_NS, World, scratch


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("name", ["now", "m", "four", "cut-1", "a" * 64])
def test_a_bookmark_of_any_length_is_listed_and_found(name: str, indexed: bool) -> None:
    """Filed under `mark/NAME`, a name of three letters has a key as long as that of a seq."""
    with scratch() as path:
        world = World(path)
        disk = world.add(1 << 20)
        disk.write(0, b"x" * 4096)
        disk.synced()
        disk.mark(name)
        if indexed:
            INDEXER.call("drain", disk.directory, world.boot)
        with disk.points() as points:
            found = points.points(now_ns=world.now_ns + SECOND_NS, kind="bookmark")
            assert [(point.name, point.seq) for point in found] == [(name, disk.marks[name])]
            position = points.bookmark(name)
            assert position is not None and position.seq == disk.marks[name]
        world.close()
