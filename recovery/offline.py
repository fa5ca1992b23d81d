"""What a command asks the service, from the state directory itself where none answers: from a copy or read-only media, too."""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from cdpserver.errors import CdpError, UnreachableError
from cdpserver.state import StateDir
from recovery.output import say

OF_THEIR_OWN = ("uri",)
"""Paths for which commands have another way without the service."""

_told: set[str] = set()


def answer(state: StateDir, error: UnreachableError, path: str, query: Mapping[str, Any]) -> Any:
    """The answer to a question. What only a running service knows is the error, which says so."""
    from cdpserver.service import offline

    if path in OF_THEIR_OWN:
        raise error
    path = unquote(path)
    if not offline.can(path):
        raise UnreachableError(f"{error.message}, and only a running one can say this", hint=error.hint)
    readable(state, error)
    return offline.answer(state, path, query)


def readable(state: StateDir, error: UnreachableError) -> None:
    """The state directory may be read, which is said once; else what the client said."""
    try:
        StateDir.open(state.path)
    except CdpError:
        raise error from None
    if not os.access(state.timelines, os.R_OK | os.X_OK):
        raise error
    if error.message not in _told:
        _told.add(error.message)
        say(f"{error.message}: reading {state.path} without it")
