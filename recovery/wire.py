"""What the client of the control API says and hears on the wire: a connection, one question, and errors as they were there."""

import http.client
import json
from collections.abc import Mapping
from typing import Any

from cdpserver import errors
from cdpserver.errors import BrokenError, CdpError, UsageError

_ERRORS = {
    value.kind: value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, CdpError)
}


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | None,
    headers: Mapping[str, str],
) -> http.client.HTTPResponse:
    """The head of the answer. A service that ended as it took the connection is asked once more: the next one is near."""
    connection.request(method, target, body=body, headers=dict(headers))
    try:
        return connection.getresponse()
    except ConnectionResetError:  # also http.client.RemoteDisconnected: not a byte came
        if method != "GET":  # what changes something may have been done
            raise
        connection.close()
        connection.request(method, target, body=body, headers=dict(headers))
        return connection.getresponse()


def error_of(status: int, value: Any) -> CdpError:
    """The error in a reply: `{"error", "message", "hint", "exit_code"}`, or the best that can be said without."""
    if not isinstance(value, dict) or not isinstance(value.get("message"), str):
        detail = json.dumps(value)[:200]
        kind = UsageError if 400 <= status < 500 else BrokenError
        return kind(f"cdpserver refused the request: status {status}, {detail}", hint="look at its log")
    error = _ERRORS.get(str(value.get("error")), CdpError)(
        value["message"], hint=str(value.get("hint") or "")
    )
    code = value.get("exit_code")
    if type(code) is int and 0 < code < 128:
        # A newer service may know errors that this command does not.
        error.exit_code = code  # type: ignore[misc]
    return error
