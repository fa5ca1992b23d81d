"""Tokens for the control API over TCP: who holds one may do what its role may. `tokens.json` has their hashes alone.

    TOKEN = cdp_ + base64url(32 random bytes)          hash = BLAKE3(TOKEN), 64 hexadecimal digits

A token is 256 random bits, so a fast hash guards it as well as a slow one would: nobody can try them.
A token of the role `protect` is an agent's: its name is the agent's, and it may ask for that agent's VMs only.
"""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import blake3

from cdpserver import durable
from cdpserver.errors import NotFoundError, RefusedError, UsageError
from cdpserver.names import check_name, format_time
from cdpserver.state import StateDir

ROLES = ("viewer", "operator", "admin", "protect")

PREFIX = "cdp_"
TOKEN_BYTES = 32
TOKEN_CHARACTERS = 200
"""Of a text that may be one; nothing longer is hashed."""

MOST = 1000
"""Tokens of a state directory. The file is read whole."""


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of one."""

    name: str
    role: str
    hash: str
    created_ns: int

    def as_dict(self) -> dict[str, Any]:
        """For an operator: without its hash."""
        return {"name": self.name, "role": self.role, "created": format_time(self.created_ns)}


def hash_of(text: str) -> str:
    """What is kept of a token. UsageError for what cannot be one."""
    if not text.startswith(PREFIX) or len(text) > TOKEN_CHARACTERS or not text.isascii():
        raise UsageError("not a token of cdpserver", hint="cdp token add NAME --role ROLE makes one")
    return blake3.blake3(text.encode()).hexdigest()


def load(state: StateDir) -> list[Token]:
    """Every token, by name; none without the file. CorruptError."""
    path = state.tokens
    try:
        rows = durable.read_json(path).get("tokens")
    except FileNotFoundError:
        return []
    if not isinstance(rows, list):
        raise durable.corrupt_json(path, "'tokens' is no list")
    found = []
    for row in rows:
        if not isinstance(row, dict) or row.get("role") not in ROLES:
            raise durable.corrupt_json(path, "one of 'tokens' is none")
        name, role, hash = (durable.take_str(row, key, path) for key in ("name", "role", "hash"))
        found.append(Token(name, role, hash, durable.take_int(row, "created_ns", path)))
    return sorted(found, key=lambda token: token.name)


def add(state: StateDir, name: str, role: str) -> str:
    """Make a token, durable on return; its text, which is told here and nowhere else. RefusedError if the name has one."""
    if role not in ROLES:
        raise UsageError(f"not a role: {role}", hint=f"it is {', '.join(ROLES)}")
    check_name(name)
    text = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    with _changing(state):
        known = load(state)
        if any(token.name == name for token in known):
            raise RefusedError(f"there is a token {name} already", hint=f"to end it: cdp token remove {name}")
        if len(known) >= MOST:
            raise RefusedError(f"there are {MOST} tokens already", hint="cdp token list shows them")
        _write(state, [*known, Token(name, role, hash_of(text), time.time_ns())])
    return text


def remove(state: StateDir, name: str) -> Token:
    """End a token: it is refused from now on. NotFoundError."""
    with _changing(state):
        known = load(state)
        gone = next((token for token in known if token.name == name), None)
        if gone is None:
            raise NotFoundError(f"there is no token {name}", hint="cdp token list shows them")
        _write(state, [token for token in known if token is not gone])
    return gone


@contextlib.contextmanager
def _changing(state: StateDir) -> Iterator[None]:
    """One command at a time reads and writes the file. What nobody else locks and nobody replaces is locked: the directory."""
    try:
        fd = os.open(state.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
    except PermissionError as error:
        raise RefusedError(
            f"cannot change {state.tokens}: {error.strerror}", hint="run cdp as root or as cdpserver's user"
        ) from None


def _write(state: StateDir, tokens: list[Token]) -> None:
    rows = [
        {"name": token.name, "role": token.role, "hash": token.hash, "created_ns": token.created_ns}
        for token in sorted(tokens, key=lambda token: token.name)
    ]
    durable.write_json(state.tokens, {"tokens": rows}, 0o600)
    owner = state.path.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        # root made it; the service reads it as its own user.
        os.chown(state.tokens, owner.st_uid, owner.st_gid)


class Known:
    """The tokens of a running service: read anew when the file has changed."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self._seen: tuple[int, int, int] | None = None
        self._by_hash: dict[str, Token] = {}

    def find(self, text: str) -> Token | None:
        """The token of this text; None for one that there is not, or no more. CorruptError."""
        try:
            hash = hash_of(text)
        except UsageError:
            return None
        self._read()
        return self._by_hash.get(hash)

    def _read(self) -> None:
        try:
            now = self._state.tokens.stat()
        except FileNotFoundError:
            self._seen, self._by_hash = None, {}
            return
        seen = (now.st_ino, now.st_mtime_ns, now.st_size)
        if seen != self._seen:
            # What cannot be read lets nobody in.
            self._seen, self._by_hash = None, {}
            self._by_hash = {token.hash: token for token in load(self._state)}
            self._seen = seen
