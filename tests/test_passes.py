"""Passes of retention that merge base points: at a cap, killed anywhere, on a full disk; what each says that it has done."""

import inspect
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from cdpserver import durable, qemu
from cdpserver.catalog import Catalog
from cdpserver.chain import lock, same
from cdpserver.chain import merge as chain
from cdpserver.config import parse_config
from cdpserver.errors import BrokenError, NoSpaceError
from cdpserver.nodes import base_point_path, published
from cdpserver.retention.plan import fixed_bytes
from tests.core import INDEXER, scratch
from tests.dying import Step, dies_at
from tests.islands import publish
from tests.test_prune import MINUTE_NS, SIZE, Kept, check

pytestmark = [pytest.mark.real, pytest.mark.e2e]

MERGES = parse_config("[policy]\nbp_every = '20m'\nkeep_rp = '20m'\nkeep_bp = '2h'\n")
STEPS = ("rename", "fsync", "unlink")


@pytest.fixture
def kept() -> Iterator[Kept]:
    with scratch() as path:
        found = Kept(path, hours=2)
        try:
            yield found
        finally:
            found.close()


def clone(kept: Kept, path: Path) -> Kept:
    """The same files in another place."""
    path.mkdir()
    made = object.__new__(Kept)
    made.world, made.entry = kept.world.clone(path), kept.entry
    made.line, made.catalog = made.world.lines[0], Catalog.open(made.world.state, writable=True)
    return made


def files(kept: Kept) -> list[str]:
    """What a timeline is made of, by name; without the locks that reading makes, and the sums that checking makes."""
    found = (path.relative_to(kept.line.directory) for path in kept.line.directory.rglob("*"))
    return sorted(str(path) for path in found if "lock" not in path.name and path.parts[0] != "sums")


def test_one_pass_is_enough_at_a_cap(kept: Kept) -> None:
    """Though base points that stay take over what only merged ones held, so that less comes back than was counted."""
    line, hour = kept.line, parse_config("[policy]\nbp_every = '20m'\nkeep_rp = '20m'\nkeep_bp = '12h'\n")
    line.grow(64 * SIZE)
    for number in range(7):
        for part in range(8):
            line.write((1 + 8 * number + part) * SIZE, random.Random(number).randbytes(SIZE))
        kept.world.now_ns += 60 * MINUTE_NS
        line.cut()
        INDEXER.call("drain", line.directory, kept.world.boot)
        publish(line, len(line.cuts) - 1)
    kept.prune(hour)
    size = kept.look(hour).disks[0].bytes
    more = 0
    for percent in (94, 89, 79):
        capped = replace(hour, policy_size_cap=size * percent // 100)
        planned = kept.look(capped)
        done = kept.prune(capped)
        assert not done.failed
        assert sum(d.bytes for d in done.dropped) == planned.disks[0].bytes - done.disks[0].bytes
        more += len(done.dropped) > len(planned.dropped) > 0
        again = kept.look(capped)
        assert again.dropped == [] and again.disks == done.disks
        found = again.disks[0]
        assert found.bytes <= size * percent // 100 or found.bytes == fixed_bytes(found)
    assert more, "a plan alone was not enough"


def every_step(dying: Callable[[Step], Step]) -> None:
    """Durable steps, and those of the tools."""
    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))
    for name in ("copy", "rebase", "check"):
        setattr(qemu, name, dying(getattr(qemu, name)))
    setattr(same, "_compare", dying(getattr(same, "_compare")))  # noqa: B009, B010


def test_killed_anywhere_in_its_merges_the_next_pass_ends_it(kept: Kept, tmp_path: Path) -> None:
    last = kept.line.last_seq
    whole = clone(kept, tmp_path / "whole")
    assert any(decision.what.startswith("bp:") for decision in whole.prune(MERGES).dropped)
    expected = files(whole)
    whole.close()
    number, half = -1, 0
    while True:
        number += 7  # every step of a single merge, test_chain takes
        copy = clone(kept, tmp_path / f"k{number}")
        died = dies_at(number, lambda: copy.prune(MERGES) and None, every_step)  # noqa: B023
        for directory in copy.world.state.timelines.iterdir():
            durable.sweep(directory)
        assert not chain.finish_all(copy.world.state)[1]
        half += 2 < len(published(copy.line.directory)) < 6
        assert check(copy, last)
        assert not copy.prune(MERGES).failed
        assert files(copy) == expected
        for base_point in published(copy.line.directory):
            qemu.check(base_point_path(copy.line.directory, base_point))
        copy.close()
        shutil.rmtree(tmp_path / f"k{number}")
        if not died:
            break
    assert half > 1


@pytest.mark.parametrize("tool", ["copy", "rebase"])
def test_a_full_disk_ends_the_merges_and_what_was_dropped_is_said(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    planned = kept.look(MERGES).dropped
    real = getattr(qemu, tool)
    calls = 0

    def full(*arguments: object, **named: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            Path(str(arguments[1 if tool == "copy" else 0])).write_bytes(b"half a file")
            raise NoSpaceError("no space left on device", hint="free space")
        real(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(qemu, tool, full)
        done = kept.prune(MERGES)
    assert "no space left" in done.failed[kept.entry.name]
    said = {decision.what for decision in done.dropped}
    there = {f"bp:{n}" for n in published(kept.line.directory)} | {f"interval:{n}" for n in kept.intervals()}
    assert said == {decision.what for decision in planned} - there
    assert 0 < len(said) < len(planned)
    assert not any("tmp" in name for name in files(kept))
    assert check(kept)
    # With room again the next pass does the rest.
    rest = kept.prune(MERGES)
    assert not rest.failed and said | {decision.what for decision in rest.dropped} == {
        d.what for d in planned
    }


def test_a_merge_that_failed_in_its_last_steps_is_ended_by_the_next_pass(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had still to remove is not there to be merged: the pass must not plan with it."""
    real, calls = chain.finish, count(1)

    def fails_after_the_rename(directory: Path) -> list[int]:
        if "_execute" in {frame.function for frame in inspect.stack()} and next(calls) < 3:
            raise BrokenError("cannot remove base points", hint="look at the kernel log")
        return real(directory)

    with monkeypatch.context() as patched:
        patched.setattr(chain, "finish", fails_after_the_rename)
        assert "cannot remove" in kept.prune(MERGES).failed[kept.entry.name]
    assert (kept.line.directory / lock.NOTE).exists()
    assert not kept.prune(MERGES).failed
    assert not (kept.line.directory / lock.NOTE).exists() and check(kept)
