"""What is copied: something that knows where its data is, writes itself to a target, and can be compared with an export."""

from collections.abc import Callable, Iterable
from typing import Protocol, Self

from cdpserver.copying.compare import Compare, Compared
from cdpserver.copying.engine import Copy
from cdpserver.copying.nbdend import Connection
from cdpserver.copying.plan import Chunk, Extents
from cdpserver.copying.target import Target
from cdpserver.copying.work import Copied


class Origin(Protocol):
    """A disk that never changes. It is closed by whoever opened it."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""

    def data(self) -> Extents:
        """What is not known to read as zeros."""

    def copy(
        self,
        target: Target,
        extents: Extents,
        *,
        start: int,
        sparse: bool,
        checkpoint: Callable[[int], None],
        progress: Callable[[int], None],
    ) -> Copied:
        """Write it from `start` on; `extents` is its data. `checkpoint` and `progress`: see Work."""

    def compare(
        self,
        other: str,
        steps: Iterable[Chunk],
        progress: Callable[[int], None],
        *,
        upto: int,
        mend: bool = False,
    ) -> Compared:
        """Against the export `other`, what `steps` touch and lies before `upto`; `mend` makes that like this."""


class NbdOrigin:
    """An export. As long as this is open, a connection holds what it is an export of."""

    def __init__(self, uri: str) -> None:
        """CutError, RefusedError."""
        self._uri = uri
        self._connection = Connection(uri)

    @property
    def size(self) -> int:
        return self._connection.size

    def data(self) -> Extents:
        return self._connection.data()

    def copy(
        self,
        target: Target,
        extents: Extents,
        *,
        start: int,
        sparse: bool,
        checkpoint: Callable[[int], None],
        progress: Callable[[int], None],
    ) -> Copied:
        return Copy(
            self._uri, target, extents, start=start, sparse=sparse, checkpoint=checkpoint, progress=progress
        ).run()

    def compare(
        self,
        other: str,
        steps: Iterable[Chunk],
        progress: Callable[[int], None],
        *,
        upto: int,
        mend: bool = False,
    ) -> Compared:
        whole = (step for step in steps if step.end <= upto)
        return Compare(self._uri, other, whole, progress, mend=mend).run()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
