"""Instants opened at random and compared with the oracle, byte for byte: points, base points, forks, the disk itself."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from random import Random
from typing import Any

import nbd

from cdpserver.clock import Clock
from cdpserver.errors import CdpError, NotFoundError, RefusedError
from cdpserver.names import format_time
from recovery.client import Client
from tools.kit.processes import until
from tools.soaking.oracle import Oracle
from tools.soaking.writer import said

PIECE = 1 << 20
PAUSE_S = 0.1
SECOND_NS = 1_000_000_000
RECENT_NS = 20 * SECOND_NS
"""Every instant of this last while can be opened, whatever retention does; the policy keeps three times as much."""

DROPPED = "not kept any more"
"""In what is said of an instant that was there a moment ago."""


class Looks:
    """One reader. What is wrong is kept in `failures`, each with what was looked at."""

    def __init__(self, client: Client, clock: Clock, oracles: Mapping[str, Oracle], *, dice: Random) -> None:
        self.compared: Counter[str] = Counter()
        self.bytes_compared = 0
        self.bytes_wrong = 0
        self.failures: list[str] = []
        self.refused: Counter[str] = Counter()
        """Instants that are not kept, or lie in a gap, by what was said."""
        self.unanswered: Counter[str] = Counter()
        """Looks that a fault cut off, by what was said."""
        self.may_fail = True
        """While processes that live long are struck, a look may be cut off; else that is wrong."""
        self._client, self._clock, self._oracles, self._dice = client, clock, oracles, dice
        self._began_ns = clock.now_ns()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="looks")
        self._ways: list[tuple[Callable[[str], None], int]] = [
            (self._instant, 5),
            (self._listed, 3),
            (self._base_point, 2),
            (self._current, 2),
            (self._fork, 1),
        ]

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        ways, weights = zip(*self._ways, strict=True)
        while not self._over.is_set():
            self.look(self._dice.choices(ways, weights)[0], self._dice.choice(sorted(self._oracles)))
            self._over.wait(PAUSE_S)

    def look(self, way: Callable[[str], None], disk: str) -> None:
        """Once. What a fault cut off is counted."""
        may_fail = self.may_fail
        try:
            way(disk)
        except (NotFoundError, RefusedError) as error:
            self.refused[said(error)] += 1
        except (CdpError, nbd.Error) as error:
            if DROPPED in str(error):  # between the list and the look
                self.refused[said(error)] += 1
                return
            self.unanswered[said(error)] += 1
            if not may_fail:
                self.failures.append(f"{way.__name__} of {disk}: {error}")

    def no_more_excuses(self) -> None:
        """Once every disk and its newest instant can be read: from then on each look has to be answered."""
        for disk in self._oracles:
            until(partial(self._answers, disk), f"answer about {disk}")
        self.may_fail = False

    def _answers(self, disk: str) -> bool:
        with contextlib.suppress(CdpError, nbd.Error):
            self._current(disk)
            self._point(disk, f"{disk}@latest", "newest")
            return True
        return False

    def everything(self) -> None:
        """Each disk as it is, its newest instant, and every base point that is kept. No fault is under way: raises what fails."""
        for disk in sorted(self._oracles):
            self._current(disk)
            self._point(disk, f"{disk}@latest", "newest")
            for point in self._client.base_points(disk):
                self._point(disk, f"{disk}@bp:{point['number']}", "base point")

    # -- ways ------------------------------------------------------------------------------------------------

    def _instant(self, disk: str) -> None:
        """Any instant of the last while; it may be refused only for a gap."""
        now_ns = self._clock.now_ns()
        time_ns = self._dice.randrange(max(self._began_ns, now_ns - RECENT_NS), now_ns)
        try:
            place = self._client.place(f"{disk}@{format_time(time_ns)}")
        except RefusedError as error:
            if "gap" not in str(error):
                self.failures.append(f"{disk} at {format_time(time_ns)}: {error}")
            raise
        self._compare(disk, str(place["uri"]), self._held(disk, time_ns), "instant")

    def _listed(self, disk: str) -> None:
        points = self._client.points(disk, since=None, until=None, kind=None, limit=None)
        if points:
            self._point(disk, f"{disk}@seq:{self._dice.choice(points)['seq']}", "listed point")

    def _base_point(self, disk: str) -> None:
        points = self._client.base_points(disk)
        if points:
            self._point(disk, f"{disk}@bp:{self._dice.choice(points)['number']}", "base point")

    def _point(self, disk: str, point: str, what: str) -> None:
        place = self._client.place(point)
        if place["time_ns"] >= self._began_ns:
            try:
                self._compare(disk, str(place["uri"]), self._held(disk, int(place["time_ns"])), what)
            except nbd.Error:
                self._client.place(point)  # it says so if it was dropped before it could be opened
                raise

    def _current(self, disk: str) -> None:
        """The disk itself; writes arrive while it is read, so that each piece is compared for itself."""
        oracle = self._oracles[disk]
        with connected(str(self._client.disk(disk)["uri"])) as handle:
            offset = self._dice.randrange(0, handle.get_size(), PIECE)
            length = min(PIECE, handle.get_size() - offset)
            before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            found = bytes(handle.pread(length, offset))
            after_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        held = oracle.between(before_ns, after_ns)
        self._judge(disk, "the disk", found, oracle.wrong(found, held, offset), "current content")

    def _fork(self, disk: str) -> None:
        """A disk on top of an instant: it holds that, and what is written to it, and the disk knows nothing of it."""
        name = f"{disk}-fork"
        if any(fork["name"] == name for fork in self._client.forks()):
            self._client.remove_fork(name)
        place = self._client.place(f"{disk}@latest")
        fork = self._client.add_fork(f"{disk}@seq:{place['seq']}", name)
        held = self._held(disk, int(place["time_ns"]))
        self._compare(disk, str(fork["uri"]), held, "fork")
        with connected(str(fork["uri"])) as handle:
            handle.pwrite(b"\xff" * 4096, 4096)
            if bytes(handle.pread(4096, 4096)) != b"\xff" * 4096:
                self.failures.append(f"{name} does not hold what was written to it")
        self._client.remove_fork(name)

    # -- comparing -------------------------------------------------------------------------------------------

    def _held(self, disk: str, time_ns: int) -> range:
        return self._oracles[disk].at(time_ns - self._clock.offset_ns)

    def _compare(self, disk: str, uri: str, held: range, what: str) -> None:
        with connected(uri) as handle:
            size = handle.get_size()
            found = b"".join(
                bytes(handle.pread(min(PIECE, size - offset), offset)) for offset in range(0, size, PIECE)
            )
        self._judge(disk, uri, found, self._oracles[disk].wrong(found, held), what)

    def _judge(self, disk: str, where: str, found: bytes, wrong: int, what: str) -> None:
        self.compared[what] += 1
        self.bytes_compared += len(found)
        self.bytes_wrong += wrong
        if wrong:
            self.failures.append(f"{what} of {disk}, {where}: {wrong} bytes are wrong")


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    """A client of an export."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        yield handle
    finally:
        with contextlib.suppress(nbd.Error):
            handle.shutdown()
