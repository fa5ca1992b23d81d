"""How the target reads what it has just written: for clients, for writes around unaligned edges, for resyncs.

Files stay open between requests. `tidy` closes those of a disk at rest, and all as soon as one of them is gone, so that a disk
at rest costs nothing, and what was dropped, thinned or merged gives its room back.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np

from cdpserver import durable
from cdpserver.errors import CorruptError, RefusedError
from cdpserver.limits import BLOCK
from cdpserver.nodes import ROTTED
from cdpserver.view.history import History
from cdpserver.view.live import LiveView
from cdpserver.view.verified import Anew, Verifier, Verifies
from cdpserver.view.view import View

PATIENCE_S = 1.0
"""How long `tidy` waits for a request: one takes milliseconds, and the other disks wait as well."""

Method = TypeVar("Method", bound=Callable[..., Any])


def _request(read: Method) -> Method:
    """One at a time. What the system says of it becomes the project's error; it breaks nothing: the next one may succeed."""

    @wraps(read)
    def call(self: "LiveReads", *args: Any, **named: Any) -> Any:
        try:
            with self._lock:
                self._used = True
                return read(self, *args, **named)
        except OSError:
            with durable.unreadable(self.directory):
                raise

    return cast(Method, call)


class LiveReads:
    """The newest content of one timeline. Thread-safe: one lock around one live view."""

    def __init__(self, history: History) -> None:
        """Takes `history` over: it is closed with this, or when this cannot be made."""
        self.directory = history.directory
        self._history = history
        try:
            self._view = LiveView(history)
        except BaseException:
            history.close()
            raise
        self._lock = threading.Lock()
        self._verifier: Verifier | None = None
        self._rotted = False
        """Was anything found that is not what was written?"""
        self._used = True
        """Since `tidy` looked last."""
        self._rests = False
        """Is nothing open?"""

    @_request
    def verified(self, offset: int, length: int) -> bytes:
        """What the disk holds now, for a write that keeps part of it. CorruptError where that is not what was written."""
        with self._verifying(Anew()):
            try:
                return self._view.read(offset, length)
            except CorruptError:
                self._rotted = True
                raise

    @_request
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with what the disk holds now."""
        self._view.read_into(buffer, offset)

    @_request
    def status(self, offset: int, end: int, *, one: bool) -> list[tuple[int, int, bool]]:
        """Block status, as `View.status`."""
        return self._view.status(offset, end, one=one)

    @_request
    def changed_from(self, ref: int, offset: int, payload: memoryview) -> list[tuple[int, int, int]]:
        """Compare a payload with the content at `ref` and with that of now.

        Runs [start, end) of the payload (4 KiB aligned but for the disk's end) with the seq that a *same* record should
        name, or -1 where the content differs from both. Once something is known to have rotted, what cannot be verified differs.
        """
        with self._verifying(self._while_rotted()):
            try:
                return self._changed_from(ref, offset, payload)
            except CorruptError:
                # Whatever cannot be read is written anew: this is what mends it.
                self._rotted = True
                return [(0, len(payload), -1)]

    def _changed_from(self, ref: int, offset: int, payload: memoryview) -> list[tuple[int, int, int]]:
        self._view.refresh()
        runs: list[tuple[int, int, int]] = []
        try:
            before = self._view.at(ref)
        except RefusedError:
            # Retention holds that instant; should it be gone all the same, the write costs its payload.
            before = self._view
        for start, end, same in _compare(before, offset, payload, 0, len(payload)):
            if same:
                runs.extend(_referred(before, offset, start, end))
                continue
            for low, high, unchanged in _compare(self._view, offset, payload, start, end):
                runs.extend(_referred(self._view, offset, low, high) if unchanged else [(low, high, -1)])
        return runs

    def _while_rotted(self) -> Verifier | None:
        """While a base point waits for what rotted, or once a write met it: a payload that is whole but for one block holds the
        others in a digest of no use, so that none of it is named again.
        """
        rotted = self._rotted or (self.directory / ROTTED).exists()
        self._verifier = (self._verifier or Verifier()) if rotted else None
        return self._verifier

    @contextlib.contextmanager
    def _verifying(self, verifier: Verifies | None) -> Iterator[None]:
        self._view.files.verifier = verifier
        try:
            yield
        finally:
            self._view.files.verifier = None

    def tidy(self) -> None:
        """Close every file if there was no request since the last call, or if a file has lost its name; the next request opens
        what is there then. What does not end is not waited for: the next call comes.
        """
        if not self._lock.acquire(timeout=PATIENCE_S):
            return
        try:
            used, self._used = self._used, False
            if used:
                self._rests = False
            if not self._rests and (not used or self._keeps_gone()):
                self._view.close()
                self._history.let_go()
                self._rests = True
        finally:
            self._lock.release()

    def _keeps_gone(self) -> bool:
        try:
            return self._history.keeps_gone() or self._view.keeps_gone()
        except OSError:
            return True  # the next request says what is wrong

    def close(self) -> None:
        """Give files and leases back."""
        with self._lock:
            self._view.close()
            self._history.close()
            self._used, self._rests = False, True


def _compare(
    view: View, offset: int, payload: memoryview, start: int, end: int
) -> list[tuple[int, int, bool]]:
    """Runs of payload[start:end) that equal the view's content, and that don't."""
    try:
        held = view.read(offset + start, end - start)
    except CorruptError:
        if view.files.verifier is None:
            raise
        return [(start, end, False)]
    # bytes: CPython compares a memoryview element by element, twenty times slower.
    part = bytes(payload[start:end])
    if held == part:
        return [(start, end, True)]
    if end - start <= BLOCK:
        return [(start, end, False)]
    whole = len(part) // BLOCK * BLOCK
    same = np.empty(-(-len(part) // BLOCK), dtype=bool)
    if whole:
        old = np.frombuffer(held, np.uint64, count=whole // 8).reshape(-1, BLOCK // 8)
        new = np.frombuffer(part, np.uint64, count=whole // 8).reshape(-1, BLOCK // 8)
        same[: whole // BLOCK] = (old == new).all(axis=1)
    if whole < len(part):
        same[-1] = held[whole:] == part[whole:]
    edges = [0, *(np.flatnonzero(same[1:] != same[:-1]) + 1).tolist(), len(same)]
    return [
        (start + low * BLOCK, min(start + high * BLOCK, end), bool(same[low]))
        for low, high in pairwise(edges)
    ]


def _referred(view: View, offset: int, start: int, end: int) -> list[tuple[int, int, int]]:
    """Split an unchanged run by the seq that a *same* record must name, so that resolving takes one step."""
    first, stop = (offset + start) // BLOCK, -(-(offset + end) // BLOCK)
    return [
        (max(low * BLOCK - offset, start), min(high * BLOCK - offset, end), ref)
        for low, high, ref in view.refs(first, stop)
    ]
