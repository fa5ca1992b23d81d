"""`cdp repair` is killed inside a step: the same plan is there after it, and carrying it out mends what it said; drops, too."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver import durable
from cdpserver.check import repair
from cdpserver.check.repair import Plan, Step
from cdpserver.journal import links
from cdpserver.journal.links import HEAD, Chain
from cdpserver.journal.log import interval_path
from cdpserver.nodes import base_point_path, note_path
from recovery.opened import alone
from tests.test_check import BOOT, SEQS, Disk, disk, flip, make_base_point, template
from tests.test_check_depth import named
from tests.test_flips import reads, standing
from tests.test_repair import carry_out, plan

__all__ = ["disk", "named", "standing", "template"]  # fixtures


def dies_in(do: Callable[[], None], owner: Any, name: str, nth: int, *, after: bool) -> None:
    """Carry something out in a process that is killed at the nth call of a function, before it or after it."""
    pid = os.fork()
    if pid == 0:
        try:
            called, calls = getattr(owner, name), []

            def counted(*args: Any, **named: Any) -> Any:
                calls.append(1)
                if len(calls) == nth and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = called(*args, **named)
                if len(calls) == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            setattr(owner, name, counted)
            do()
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def lost(named: Disk) -> Disk:
    """Base point 0 cannot be read, the journal does not have it any more, and nothing stands on it."""
    writer = named.open()
    writer.cut()
    named.write(7, 7)
    writer.commit()
    writer.close()
    for number in (0, 1):
        make_base_point(named, number, "base.raw")
    for interval in (1, 2):
        shutil.rmtree(interval_path(named.directory, interval))
    base_point_path(named.directory, 0).write_bytes(b"what once was a base point")
    return named


@pytest.mark.real
def test_a_base_point_that_is_lost_for_good_is_set_aside_and_takes_nothing_with_it(lost: Disk) -> None:
    assert lost.writer is not None
    path, last = base_point_path(lost.directory, 0), lost.writer.last_seq
    held, before = path.read_bytes(), reads(lost, last, verify=False)
    found = plan(lost)
    assert found.steps == (Step("drop", 0),) and found.left == ()
    carry_out(lost, found)
    assert not path.exists() and not note_path(lost.directory, 0).exists()
    assert path.with_name(f"{path.name}.damaged-1").read_bytes() == held
    assert plan(lost).steps == () and lost.check().whole
    assert reads(lost, last, verify=False) == before


@pytest.mark.real
def test_a_base_point_that_anything_needs_is_not_dropped(lost: Disk) -> None:
    """The newest one, and one that another stands on."""
    one = base_point_path(lost.directory, 1)
    base_point_path(lost.directory, 0).unlink()
    note_path(lost.directory, 0).unlink()
    held = one.read_bytes()
    one.write_bytes(b"what once was a base point")
    found = plan(lost)
    assert found.steps == () and any("bp-1.qcow2" in what for what in found.left)
    one.write_bytes(held)
    assert plan(lost).steps == ()


@pytest.mark.real
@pytest.mark.parametrize(
    ("owner", "name", "nth", "after"),
    [(os, "rename", 2, False), (os, "rename", 2, True), (durable, "fsync_dir", 2, False)],
)
def test_killed_inside_a_drop(lost: Disk, owner: Any, name: str, nth: int, after: bool) -> None:
    found = plan(lost)
    dies_in(lambda: carry_out(lost, found), owner, name, nth, after=after)
    assert plan(lost) == found
    carry_out(lost, found)
    asides = list(lost.directory.glob("bp-0*"))
    assert [path.name for path in asides] == ["bp-0.qcow2.damaged-1"]
    assert plan(lost).steps == () and lost.check().whole


@pytest.mark.parametrize(
    ("owner", "name", "nth", "after"),
    [(os, "rename", 2, True), (Chain, "append", 1, False), (Chain, "append", 2, True)],
)
def test_killed_inside_a_chain_that_is_begun_anew(
    named: Disk, owner: Any, name: str, nth: int, after: bool
) -> None:
    writer = named.open()
    for number in range(3):
        named.write(number, 7)
        writer.cut()
    writer.commit()
    with Chain.open(named.directory, named.timeline.uuid) as chain:
        chain.catch_up(10)
        assert len(chain.links) == 4
    flip(named.directory / links.FILE, HEAD.size + 50)
    found = plan(named)
    assert found.steps == (Step("chain", 0),)
    dies_in(lambda: carry_out(named, found), owner, name, nth, after=after)
    assert plan(named) == found
    carry_out(named, found)
    assert plan(named).steps == () and len(links.read(named.directory)[1]) == 4
    assert [path.name for path in named.directory.glob("links.*")] == ["links.damaged-1"]


KILLED = """
import os, signal, sys
from cdpserver import durable
from recovery import cli, repair

when, repair.boot_id, publish = sys.argv.pop(), lambda: "boot-one-0", durable.publish

def publish_and_die(*args):
    if when == "after":
        publish(*args)
    os.kill(os.getpid(), signal.SIGKILL)

durable.publish = publish_and_die
cli.main()
"""
"""A process of its own: LMDB's files that are open here are not for a fork."""


@pytest.mark.real
@pytest.mark.parametrize("after", [False, True])
def test_killed_inside_a_base_point_that_is_made_anew(standing: Disk, short_path: Path, after: bool) -> None:
    path = base_point_path(standing.directory, 0)
    before, stat = reads(standing, SEQS["b2"], verify=True), path.stat()
    flip(path, stat.st_size - 100)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = plan(standing)
    assert found.steps == (Step("base-point", 0),)
    words = ["repair", "d", "--state-dir", str(standing.state.path), "--apply", found.digest]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *words, "after" if after else "before"],
        env={**os.environ, "TMPDIR": str(short_path)},
        check=False,
        capture_output=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert plan(standing) == found
    make_anew(standing, found, short_path / "nbd-again")
    assert plan(standing).steps == () and standing.check(full=True).whole
    shutil.rmtree(interval_path(standing.directory, 1))
    assert reads(standing, SEQS["b2"], verify=True) == before


def make_anew(disk: Disk, found: Plan, socket: Path) -> None:
    """Carry a plan out that reads the journal through an export."""

    @contextlib.contextmanager
    def serve() -> Iterator[Path]:
        with alone("export", [f"state_dir={disk.state.path}", "alone=1"], socket):
            yield socket

    repair.apply(disk.state, found, "t1", boot_id=BOOT, serve=serve)
