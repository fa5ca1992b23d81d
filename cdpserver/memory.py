"""A process that gets no memory ends at once. It is started anew, and has lost nothing: it is a kill like any other.

An allocation can fail in every line, and what is half done then nobody knows: a record that is published and not counted, a tail
that is folded in by half, a connection that is closed and not left. So nobody goes on with that. What only the system refuses, a
mapping or a thread, is an OSError or RuntimeError and answered where it comes up.

A thread that finds no memory for its first call ends without a word, and `threading.Thread.start` of CPython 3.11 waits for it
for ever. So what serves starts its threads before it serves, or by `_thread.start_new_thread`, which does not wait.
"""

import contextlib
import os
from typing import Final, NoReturn

from cdpserver.events import EventLog

NONE: Final = (MemoryError, SystemError)
"""What is raised then: CPython 3.11 forgets here and there to say what failed, and says that it does not know."""


def end(log: EventLog, where: str) -> NoReturn:
    """End this process, with all its threads."""
    try:
        with contextlib.suppress(*NONE):
            log.emit("process.no-memory", level="error", where=where)
    finally:
        os._exit(1)
