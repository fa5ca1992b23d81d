"""A name in an object store that one process holds, by renewing it: who has not renewed it for a lease's length is dead.

    sessions/ID/TOKEN    one who wants the name ID; the token is its own

Who wants a name puts an object of its own and lists the name then: of two that do so at once at least one sees the other, and
steps back. No conditional write is needed, which stores do not agree on. Age is the difference of two times of the store's
clock; a holder counts its own time, and does not believe in its lease for longer than half of it, so that what it began in
time has ended before anybody takes it for dead.
Threads: one of its own renews while the name is held.
"""

import secrets
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

from cdpserver.errors import BrokenError, CdpError, RefusedError

LEASE_S = 900.0
"""Half of it is longer than a request with all of its retries."""

RENEWALS = 20
"""In a lease."""


class LeasePlace(Protocol):
    """What a store must be able to do."""

    where: str

    def put(self, name: str, data: bytes | bytearray, until_ns: int = 0) -> None:
        """Whole, and in every listing from then on."""

    def ages(self, prefix: str) -> Iterator[tuple[str, float]]:
        """(name, seconds since it was put) of the objects below the folder `prefix`."""

    def delete(self, name: str) -> None:
        """Gone on return."""


def holds(place: LeasePlace, prefix: str, lease_s: float) -> set[str]:
    """The names below a folder that somebody holds; what the dead left is deleted."""
    held = set()
    for name, age_s in place.ages(prefix):
        if age_s <= lease_s:
            held.add(name.rpartition("/")[0])
        else:
            place.delete(name)
    return held


class Lease:
    """A context that holds a name."""

    def __init__(self, place: LeasePlace, name: str, lease_s: float) -> None:
        self._place = place
        self._name = name
        self._own = f"{name}/{secrets.token_hex(8)}"
        self._lease_s = lease_s
        self._renewed = 0.0
        self._lost = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    def __enter__(self) -> Self:
        """RefusedError where another one holds it, or wants it at the same time."""
        self._put()
        try:
            if any(
                age_s <= self._lease_s for name, age_s in self._place.ages(self._name) if name != self._own
            ):
                raise RefusedError(
                    f"{self._name} in {self._place.where} is held by another process",
                    hint=f"try again when it has ended; if it died, {self._lease_s:.0f} s after that",
                )
        except BaseException:
            self._place.delete(self._own)
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        try:
            self._place.delete(self._own)
        except CdpError:
            if error is None:
                raise
            # What went wrong before is what is told; the lease ends by itself.

    def check(self) -> None:
        """BrokenError unless it is held, and will be for half a lease."""
        self._look_at_the_time()
        if not self._lost and self._own not in {name for name, _ in self._place.ages(self._name)}:
            self._lost = "it was taken for dead"
        if self._lost:
            raise BrokenError(
                f"{self._name} in {self._place.where} is not held any more: {self._lost}",
                hint="start the command again: it goes on with what is stored",
            )

    def _put(self) -> None:
        started = _now()
        self._place.put(self._own, b"")
        self._renewed = started

    def _look_at_the_time(self) -> None:
        if not self._lost and _now() - self._renewed > self._lease_s / 2:
            self._lost = "it could not be renewed in time"

    def _renew(self) -> None:
        while not self._end.wait(self._lease_s / RENEWALS):
            self._look_at_the_time()
            if self._lost:
                return  # never again: somebody may have counted on its end
            try:
                self._put()
            except (CdpError, OSError):
                continue  # the next one may get through


def _now() -> float:
    """Goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
