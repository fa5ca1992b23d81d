"""Messages between our processes: one msgpack map, preceded by its length (4 bytes, big-endian).

A request is `{"op": ..., ...}`; a reply is `{"ok": ...}` or an error's fields, which `raise_reply` turns back into the error.
"""

import json
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import msgpack

from cdpserver import errors
from cdpserver.errors import CdpError, CorruptError

READY_FD = "CDP_READY_FD"
"""Environment variable: the file descriptor on which a child of the service says how far it has come."""

LENGTH = struct.Struct(">I")
MAX_MESSAGE = 16 << 20
"""Longest message: the status of 40,000 open disks, and a worker has files for fewer."""

_ERRORS = {
    value.kind: value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, CdpError)
}


def pack(message: dict[str, Any]) -> bytes:
    """The bytes to send."""
    body = bytes(msgpack.packb(message))
    return LENGTH.pack(len(body)) + body


def check_length(prefix: bytes) -> int:
    """Length of the body that follows; CorruptError above the limit."""
    length: int = LENGTH.unpack(prefix)[0]
    if length > MAX_MESSAGE:
        raise CorruptError(f"a message claims {length} bytes")
    return length


def unpack(body: bytes, what: str = "a message") -> dict[str, Any]:
    """The map in a body, be it a message or `what`; CorruptError for anything else."""
    try:
        message = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise CorruptError(f"{what} is not msgpack: {error}") from error
    if not isinstance(message, dict):
        raise CorruptError(f"{what} is not a map")
    return message


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message on a blocking socket; None at its end."""
    body = receive_bytes(connection)
    return unpack(body) if body is not None else None


def receive_bytes(connection: socket.socket) -> bytes | None:
    """The next message as it is, be it msgpack or plain bytes; None at the connection's end."""
    prefix = _exactly(connection, LENGTH.size)
    return None if prefix is None else _exactly(connection, check_length(prefix))


def _exactly(connection: socket.socket, length: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def error_fields(error: CdpError) -> dict[str, Any]:
    """An error as plain values."""
    return {"error": error.kind, "message": error.message, "hint": error.hint}


def tell(work: Callable[[], dict[str, Any] | None]) -> int:
    """Do the work of a process of its own; its result, or its error, goes to stdout as JSON. The process's exit status."""
    try:
        result, status = work(), 0
    except CdpError as error:
        result, status = error_fields(error), error.exit_code
    if result is not None:
        sys.stdout.write(json.dumps(result))
    return status


def raise_error(fields: dict[str, Any]) -> None:
    """Raise the error that a reply carries, if it does."""
    if "error" in fields:
        kind = _ERRORS.get(fields["error"], CdpError)
        raise kind(fields["message"], hint=fields.get("hint", ""))
