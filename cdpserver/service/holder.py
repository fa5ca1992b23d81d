"""The holder: a small process that keeps the listening sockets open while the service is away.

Run as a file (`python -I -S holder.py FD`), with the standard library alone: it is to be small and to start at once. It listens
on the file descriptor named. One message a packet (SOCK_SEQPACKET), JSON with at most one file descriptor:

    {"op": "take", "linger": SECONDS}   everything held is sent, {"name"} + socket each, then {"end": true}
    {"op": "put", "name"} + socket      hold it, instead of another of that name
    {"op": "drop", "name"}              let go of it

It ends when no service has been connected for the time given: then clients are refused instead of waiting for nobody.
"""

import json
import os
import select
import socket
import sys
import time

MESSAGE_BYTES = 4096


class Holder:
    """What is held, and for how long without a service."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._held: dict[str, int] = {}
        self._services: list[socket.socket] = []
        self._linger_s = 60.0

    def run(self) -> None:
        """Hold until nobody comes back."""
        alone_since = time.monotonic()
        while True:
            timeout = None
            if not self._services:
                timeout = alone_since + self._linger_s - time.monotonic()
                if timeout <= 0:
                    return
            readable, _, _ = select.select([self._listener, *self._services], [], [], timeout)
            # In the order in which they came: what an earlier service said last comes before what the next one asks.
            for service in self._services[:]:
                if service in readable and not self._hear(service):
                    service.close()
                    self._services.remove(service)
                    alone_since = time.monotonic()
            if self._listener in readable:
                self._services.append(self._listener.accept()[0])

    def _hear(self, service: socket.socket) -> bool:
        """Do all that a service has said; False when it is gone."""
        try:
            while True:
                data, fds, _, _ = socket.recv_fds(service, MESSAGE_BYTES, 1, socket.MSG_DONTWAIT)
                if not data:
                    return False
                self._do(service, json.loads(data), fds)
                for fd in fds:
                    os.close(fd)
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _do(self, service: socket.socket, message: dict[str, str], fds: list[int]) -> None:
        if message["op"] == "take":
            self._linger_s = float(message["linger"])
            self._give(service)
        elif message["op"] == "put":
            self._drop(message["name"])
            self._held[message["name"]] = fds.pop()
        elif message["op"] == "drop":
            self._drop(message["name"])

    def _give(self, service: socket.socket) -> None:
        for name, fd in self._held.items():
            socket.send_fds(service, [json.dumps({"name": name}).encode()], [fd])
        service.send(b'{"end": true}')

    def _drop(self, name: str) -> None:
        fd = self._held.pop(name, -1)
        if fd >= 0:
            os.close(fd)


if __name__ == "__main__":
    Holder(socket.socket(fileno=int(sys.argv[1]))).run()
