"""The newest content of a timeline, as the target reads it: a view whose seq goes on with every record."""

from cdpserver.view.history import History
from cdpserver.view.layers import Layer
from cdpserver.view.tail import Tail
from cdpserver.view.view import View

TAIL_REBUILD = 65_536
"""Pieces in a live view's tail after which it looks how far the index has come meanwhile."""


class LiveView(View):
    """The newest content, whatever was acknowledged before each request: what the target serves."""

    live = True

    def __init__(self, history: History) -> None:
        super().__init__(history, history.journal.last_seq())
        self._rebuild_at = TAIL_REBUILD

    def refresh(self) -> None:
        """Take in what was written since the last request."""
        journal = self.history.journal
        if not self._is_open:
            journal.refresh()  # what was listed before may be gone, and no file of it is open
        interval, reader = journal.newest()
        last_seq = reader.last_seq
        if not self._is_open:
            self.seq = last_seq
            super().refresh()
            return
        if last_seq == self.seq:
            return
        newest = self._newest_layer()
        tail = newest.tail
        after = tail.upto if tail is not None else self.seq
        self.seq = last_seq
        self._is_open = (
            False  # until all of it is taken in: else what fails on the way would be missing for good
        )
        if interval != newest.interval or (tail is not None and len(tail) > self._rebuild_at):
            self._open_layers()
            tail = self._newest_layer().tail
            self._rebuild_at = max(TAIL_REBUILD, 2 * len(tail) if tail is not None else 0)
            return
        if tail is None:
            tail = newest.tail = Tail(after)
        for run in journal.runs(after, last_seq):
            tail.add(run)
        tail.upto = last_seq
        self._is_open = True

    def _newest_layer(self) -> Layer:
        newest = self._layers[0]
        assert isinstance(newest, Layer)
        return newest
