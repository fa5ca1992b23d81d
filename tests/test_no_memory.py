"""No memory: each allocation of the write path fails once, and real processes get no more address space while a disk is written.

What was acknowledged is there, and nobody waits for ever: a request goes on, fails, or its process ends and is started anew.
"""

import contextlib
import importlib
import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from cdpserver import priority
from cdpserver.errors import BrokenError
from cdpserver.journal import segment
from cdpserver.state import StateDir
from recovery.client import Client
from tests.core import Line, World, scratch
from tests.figures import tally
from tests.model import BLOCK, equals_but
from tests.test_journal import check_numbers, content, history, requests
from tests.test_kill import cdp
from tests.test_scarce import Asked, is_broken, open_and_read, works
from tests.test_service import Server, read, until
from tools.soaking.oracle import Oracle
from tools.soaking.writer import Writer

pytestmark = pytest.mark.real

_testcapi = importlib.import_module("_testcapi")  # has no types

EVERY = "CDP_LONG" in os.environ
SEED = int(os.environ.get("CDP_SEED", "0"))
STRIDE = 11
SIZE = 4 << 20
WRITES = 20


# --- every allocation


def test_the_write_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's n-th allocation in each request fails. A writer that does not know what is there takes no more."""
    monkeypatch.setattr(segment, "WINDOW_BYTES", BLOCK)
    monkeypatch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
    monkeypatch.setattr(segment, "SEGMENT_RECORDS", 5)
    step = 1 if EVERY else STRIDE
    failed, broken, which, there_are = 0, 0, 0, 1
    while which < there_are:
        number = 1 + (SEED + which) % step
        hit = True
        while hit:
            with scratch() as path:
                world = World(path)
                line = history(world, 64 * BLOCK)
                try:
                    there_are, hit, was_broken = fail_once(line, which, number)
                except BaseException:
                    print(f"replay: allocation {number} of request {which} fails")
                    raise
                world.close()
            failed, broken, number = failed + hit, broken + was_broken, number + step
        which += 1
    tally("faults: memory", faults=failed)
    assert failed > 10 and broken > 0


def without(number: int, request: Callable[[], object]) -> None:
    """One allocation fails, of all that come from here on."""
    _testcapi.set_nomemory(number, number + 1)
    try:
        request()
    finally:
        _testcapi.remove_mem_hooks()


def fail_once(line: Line, which: int, number: int) -> tuple[int, bool, bool]:
    """(how many requests there are, did allocation `number` of request `which` fail, does the writer take no more)."""
    expected = content(line)
    hit = broken = False
    at = -1
    for at, (request, offset, length, data) in enumerate(requests(line)):
        try:
            if at == which:
                without(number, request)
            else:
                request()
        except Exception:  # noqa: BLE001 - most are `memory.NONE`; CPython finds other names for it as well
            assert at == which
            hit, broken = True, bool(line.disk.broken)
            if broken:
                with pytest.raises(BrokenError):
                    line.writer.write(memoryview(bytes(BLOCK)), 0)
            # As the process ends.
            line.close(clean=False)
            line.open()
            found = content(line)
            assert equals_but(found, expected, [(offset, data or b"")])
            expected = found
        else:
            expected = expected[:offset] + (data or b"") + expected[offset + length :]
    line.close(clean=False)
    line.open()
    assert content(line) == expected
    check_numbers(line)
    return at + 1, hit, broken


# --- processes


def mapped(pid: int) -> int:
    """Bytes of address space."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmSize:")[2].split()[0]) << 10


@contextlib.contextmanager
def without_memory(pid: int, kind: int) -> Iterator[None]:
    """A process maps nothing more; lifted at the end, if it is there still."""
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (mapped(pid) if kind == resource.RLIMIT_AS else 0, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, kind, before)


def got_on(writer: Writer, count: int, heard: int) -> bool:
    """Some more was written than `count`, or refused than `heard`."""
    return writer.oracle.count >= count + WRITES or sum(writer.cut_off.values()) > heard


def test_no_process_gets_memory(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        client = Client(StateDir(server.state_dir))
        uri = str(client.add_disk("d", size=SIZE, vm=None, base=None)["uri"])
        client.synced("d", session=None, write_blocking=True)
        order_of_deaths(server)
        oracle = Oracle(SIZE, align=4096, disk=1)
        writer = Writer(client, "d", oracle, dice=random.Random(3), rate=200)
        writer.start()
        try:
            for name in ("target-0", "export", "indexer"):
                for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
                    latest = server.uri("d@latest")
                    pid = server.pids()[name]
                    count, heard = oracle.count, sum(writer.cut_off.values())
                    with without_memory(pid, kind):
                        asked = [
                            Asked(partial(client.cut, "d")),
                            Asked(partial(client.status)),
                            *(Asked(partial(open_and_read, where)) for where in [uri, latest] * 3),
                        ]
                        # Whatever it is: not one that waits for the limit's end.
                        for one in asked:
                            until(one.ended.is_set, f"answer without memory in {name}")
                        until(partial(got_on, writer, count, heard), f"progress, or an error, in {name}")
                    works(client, writer, uri)
        finally:
            writer.tell_to_end()
        assert writer.join(90)
        assert read(uri, SIZE) == read(server.uri("d@latest"), SIZE) == oracle.content(oracle.count)
        cdp(server, "check", "d")
        assert not is_broken(server)


def test_the_service_gets_none(short_path: Path) -> None:
    """It answers, or is ended by systemd's watchdog; production goes on, and its successor finds all of it."""
    with Server(short_path / "s") as server:
        client = Client(StateDir(server.state_dir), timeout_s=20)
        uri = str(client.add_disk("d", size=SIZE, vm=None, base=None)["uri"])
        client.synced("d", session=None, write_blocking=True)
        oracle = Oracle(SIZE, align=4096, disk=1)
        writer = Writer(client, "d", oracle, dice=random.Random(3), rate=200)
        writer.start()
        try:
            until(lambda: oracle.count > WRITES, "writes")  # it has the service say *synced* first
            with without_memory(server.process.pid, resource.RLIMIT_AS):
                asked = [Asked(partial(client.cut, "d")), *(Asked(client.status) for _ in range(4))]
                count = oracle.count
                until(lambda: oracle.count >= count + WRITES, "progress")
                for one in asked:
                    until(one.ended.is_set, "answer, or the end of the client's patience")
            server.process.kill()
            server.process.wait()
            with Server(server.state_dir) as again:
                works(client, writer, uri)
                writer.tell_to_end()
                assert writer.join(90)
                assert read(uri, SIZE) == oracle.content(oracle.count)
                cdp(again, "check", "d")
        finally:
            writer.tell_to_end()


# --- what the kernel kills first


def order_of_deaths(server: Server) -> None:
    """Jobs go before the export and the indexer, and these before workers."""
    here = int(Path("/proc/self/oom_score_adj").read_text())
    scores = {
        name: int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for name, pid in server.pids().items()
    }
    between = min(1000, here + priority.AFTER_JOBS)
    assert scores == {"target-0": here, "export": between, "indexer": between}
    job = subprocess.check_output([*priority.behind_writes(), "cat", "/proc/self/oom_score_adj"])
    assert int(job) == max(here, priority.EXPENDABLE)
