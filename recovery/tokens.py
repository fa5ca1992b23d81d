"""`cdp token`: who may use the control API over TCP. The file is changed here; the service sees it with the next request."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cdpserver import tokens
from cdpserver.errors import RefusedError, UsageError
from cdpserver.events import EventLog
from cdpserver.state import StateDir, default_state_dir
from recovery.output import Column, answer, answer_json, answer_table, say

COLUMNS = (Column("name"), Column("role"), Column("created"))


def add(options: Namespace) -> None:
    """Make a token, and print it or put it into a file of its own: it is told only now."""
    state = _state(options)
    if options.out is None:
        text = tokens.add(state, options.name, options.role)
    else:
        with _new_file(Path(options.out)) as file:
            text = tokens.add(state, options.name, options.role)
            file.write(f"{text}\n")
    EventLog(state.events).record("token.added", name=options.name, role=options.role)
    told = {"token": text} if options.out is None else {"file": options.out}
    if options.json:
        answer_json({"name": options.name, "role": options.role} | told)
    elif options.out is None:
        answer(text)
    else:
        say(f"the token {options.name} is in {options.out}")


def list_(options: Namespace) -> None:
    """Every token, without what it is."""
    found = [token.as_dict() for token in tokens.load(_state(options))]
    if options.json:
        answer_json(found)
    else:
        answer_table(COLUMNS, found, nothing="no tokens; make one: cdp token add NAME --role viewer")


def remove(options: Namespace) -> None:
    """End a token."""
    state = _state(options)
    gone = tokens.remove(state, options.name)
    EventLog(state.events).record("token.removed", name=gone.name, role=gone.role)
    if options.json:
        answer_json(gone.as_dict())
    else:
        say(f"the token {gone.name} is refused from now on")


def _state(options: Namespace) -> StateDir:
    """The state directory, which must be of this host: no token is made from afar."""
    return StateDir.open(default_state_dir(options.state_dir))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """A file for its owner's eyes alone, whole on return; it is gone if it could not be."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise RefusedError(f"{path} exists", hint="name another file, or remove it") from None
    except OSError as error:
        raise UsageError(f"cannot make {path}: {error.strerror}", hint="check --out") from None
    try:
        with open(fd, "w") as file:
            yield file
    except BaseException:
        path.unlink()
        raise
