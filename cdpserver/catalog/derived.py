"""What follows from the catalog, and from what never changes: worked out once for each of its changes.

With many disks a look every second at what has not changed would be most of what a server at rest does.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from cdpserver.catalog import Catalog

Result = TypeVar("Result")


class Derived(Generic[Result]):
    """Calls `work` the first time, and when the catalog has changed since. What it raises is raised, and not kept.

    Threads: several may ask; then it may be worked out twice.
    """

    def __init__(self, catalog: Catalog, work: Callable[[], Result]) -> None:
        self._catalog, self._work = catalog, work
        self._known: tuple[object, Result] | None = None

    def now(self) -> Result:
        """As it is now. Callers share it, and change nothing of it."""
        # The stamp first: what changes after it is seen the next time.
        stamp, known = self._catalog.stamp(), self._known
        if known is None or known[0] != stamp:
            self._known = known = stamp, self._work()
        return known[1]
