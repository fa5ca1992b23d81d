"""Talking to the QEMU guest agent over its host-side socket, one command at a time, each with a deadline.

The agent answers in order, and may be busy with what an earlier client asked: a hook of its that hangs, say. So a connection
begins with a number that it must echo; what comes before that is of earlier clients. Protocol: docs/interop/qemu-ga.rst of QEMU.
"""

import contextlib
import json
import secrets
import socket
import time
from pathlib import Path
from typing import Any, Self

from cdpserver.errors import RefusedError, UnreachableError

MAX_LINE = 1 << 20
"""Bytes of one answer; those to the commands of ours have some tens."""

_START = b"\xff"
"""No JSON has this byte: the agent drops half a command before it, and marks the echo with it."""


class NoAgentError(UnreachableError):
    """Nobody listens at the socket: QEMU is gone."""

    usual_hint = "look whether the VM runs, with -chardev socket,path=PATH,server=on,wait=off"


class AgentSilentError(UnreachableError):
    """QEMU listens, and the agent in the guest does not answer."""

    usual_hint = "look whether qemu-guest-agent runs in the guest, and what its hooks do"


class AgentRefusedError(RefusedError):
    """The agent answered with an error."""

    usual_hint = "the guest goes on as it was"


class Agent:
    """A connection. The context closes it."""

    def __init__(self, path: Path) -> None:
        """NoAgentError if nobody listens."""
        self._path = path
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.setblocking(False)
            self._socket.connect(str(path))
        except BlockingIOError:
            self.close()
            raise AgentSilentError(f"another program holds {path}") from None
        except OSError as error:
            self.close()
            raise NoAgentError(f"no guest agent's socket at {path}: {error.strerror or error}") from None

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sync(self, *, within_s: float) -> None:
        """On return the agent listens, and answers what is asked next. AgentSilentError."""
        number = secrets.randbits(31)
        deadline = time.monotonic() + within_s
        self._send("guest-sync-delimited", {"id": number}, deadline, start=_START)
        while True:
            line = self._line("guest-sync-delimited", deadline)
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                if json.loads(line.rpartition(_START)[2]).get("return") == number:
                    return

    def call(self, command: str, *, within_s: float) -> Any:
        """What the agent returns. AgentRefusedError for its refusal, AgentSilentError when it takes longer."""
        deadline = time.monotonic() + within_s
        self._send(command, None, deadline)
        line = self._line(command, deadline)
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise AgentRefusedError(f"the guest agent refused {command}: {answer['error'].get('desc')}")
            return answer["return"]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise AgentSilentError(f"what listens at {self._path} is no guest agent") from None

    def _send(
        self, command: str, arguments: dict[str, Any] | None, deadline: float, *, start: bytes = b""
    ) -> None:
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self._socket.sendall(start + json.dumps(message).encode() + b"\n")
        except OSError:
            raise self._silent(command) from None

    def _line(self, command: str, deadline: float) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0 or len(self._buffer) > MAX_LINE:
                raise self._silent(command)
            self._socket.settimeout(left)
            try:
                part = self._socket.recv(1 << 16)
            except OSError:
                raise self._silent(command) from None
            if not part:
                raise NoAgentError(f"QEMU closed {self._path}")
            self._buffer += part
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _silent(self, command: str) -> AgentSilentError:
        return AgentSilentError(f"the guest agent at {self._path} did not answer {command} in time")
