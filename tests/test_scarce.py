"""File descriptors run out in one of our processes, while a disk is written and everything is asked of them.

Production goes on, or hears a plain error and tries again; nothing is lost, and when the limit is lifted all works as before.
"""

import contextlib
import itertools
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import nbd
import pytest

from cdpserver.errors import CdpError
from cdpserver.state import StateDir
from recovery.client import Client
from tests.test_kill import cdp
from tests.test_service import Server, connected, read, until
from tools.soaking.oracle import Oracle
from tools.soaking.writer import Writer

pytestmark = pytest.mark.real

SIZE = 4 << 20
ROUNDS = int(os.environ.get("CDP_LONG", "1"))
WRITES = 20


def files(pid: int) -> int:
    """Not one more: the next would have the lowest number that is free."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in itertools.count() if number not in used)


@contextlib.contextmanager
def without_files(pid: int) -> Iterator[None]:
    """A process gets no more than it has; lifted at the end, if it is there still."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (files(pid), before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


class Asked:
    """Something is asked in a thread, since it may have to wait until the limit is lifted."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self.ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        """An error that is ours, or NBD's, is an answer; any other leaves `ended` unset."""
        with contextlib.suppress(CdpError, nbd.Error):
            self._ask()
        self.ended.set()


def open_and_read(uri: str) -> None:
    with connected(uri) as handle:
        handle.pread(4096, 0)


def test_files_run_out_in_any_process(short_path: Path) -> None:
    with Server(short_path / "s") as server:
        client = Client(StateDir(server.state_dir))
        uri = str(client.add_disk("d", size=SIZE, vm=None, base=None)["uri"])
        client.synced("d", session=None, write_blocking=True)
        oracle = Oracle(SIZE, align=4096, disk=1)
        writer = Writer(client, "d", oracle, dice=random.Random(3), rate=200)
        writer.start()
        try:
            for name in ("export", "indexer", "service", "target-0") * ROUNDS:
                latest = server.uri("d@latest")
                pid = server.process.pid if name == "service" else server.pids()[name]
                with without_files(pid):
                    asked = [
                        Asked(lambda: client.cut("d")),
                        Asked(lambda: client.points("d", since=None, until=None, kind=None, limit=None)),
                        *(Asked(partial(open_and_read, where)) for where in [uri, latest] * 3),
                    ]
                    goes_on(writer, may_hear_errors=name == "target-0")
                for one in asked:
                    until(one.ended.is_set, f"answer while files had run out in {name}")
                assert server.process.poll() is None, name
                works(client, writer, uri)
        finally:
            writer.tell_to_end()
        assert writer.join(90)
        print(dict(writer.cut_off), "longest", writer.longest_s)
        content = oracle.content(oracle.count)
        assert read(uri, SIZE) == read(server.uri("d@latest"), SIZE) == content
        cdp(server, "check", "d")
        assert not is_broken(server)


def goes_on(writer: Writer, *, may_hear_errors: bool) -> None:
    """More is written; or, where that is what the limit is of, it was answered."""
    count, heard = writer.oracle.count, sum(writer.cut_off.values())
    until(
        lambda: (
            writer.oracle.count >= count + WRITES
            or (may_hear_errors and sum(writer.cut_off.values()) > heard)
        ),
        "progress",
    )


def works(client: Client, writer: Writer, uri: str) -> None:
    """Everything does, as before."""
    goes_on(writer, may_hear_errors=False)

    def all_of_it() -> bool:
        with contextlib.suppress(CdpError, nbd.Error):
            client.cut("d")
            open_and_read(uri)
            open_and_read(str(client.place("d@latest")["uri"]))
            return True
        return False

    until(all_of_it, "answers once there is enough again")


def is_broken(server: Server) -> bool:
    return bool(server.get("/v1/disks/d")["broken"])
