"""Events about what strangers do: who tries often must not fill the event file."""

import math

import trio

from cdpserver.events import EventLog

EVERY_S = 1.0
"""Between two of them."""


class Seldom:
    """Says what comes again and again once in a while, with the number of times since it was last said."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._said_at = -math.inf
        self._unsaid = 0

    def say(self, event: str, **fields: str) -> None:
        """Emit the warning, unless one was emitted a moment ago; `requests` counts it and those that were left out."""
        self._unsaid += 1
        if (now := trio.current_time()) >= self._said_at + EVERY_S:
            self._log.emit(event, level="warning", requests=self._unsaid, **fields)
            self._said_at, self._unsaid = now, 0
