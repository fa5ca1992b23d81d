"""A QMP client: newline-delimited JSON over a Unix socket, one command at a time."""

import json
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

KEPT_EVENTS = 1000
"""With `on-target-error=ignore` QEMU sends ten thousand a second."""

DEADLINE_S = 60.0


class QmpError(Exception):
    """QEMU refused a command, or did not answer in time."""


class Qmp:
    """One connection; QEMU serves one at a time."""

    def __init__(self, path: Path) -> None:
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._receive()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: Any) -> Any:
        """What QEMU answers. A keyword's underscores stand for hyphens."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while True:
            message = self._receive()
            if "error" in message:
                raise QmpError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self.events.append(message)

    def wait(self, event: str, matches: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The data of the next event of this name whose data matches; one that came already counts, once."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for found in self.events:
                if found["event"] == event and matches(data := found.get("data", {})):
                    self.events.remove(found)
                    return dict(data)
            if time.monotonic() > deadline:
                raise QmpError(f"no event {event} in {DEADLINE_S:.0f} s")
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise QmpError(f"QEMU said nothing for {DEADLINE_S:.0f} s") from None
        if not line:
            raise QmpError("QEMU closed the connection")
        return dict(json.loads(line))

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
