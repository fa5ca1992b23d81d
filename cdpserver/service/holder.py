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
import struct
import sys
import time

MESSAGE_BYTES = 4096
SEND_S = 2
FD = struct.Struct("i")


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
            readable = _readable([self._listener, *self._services], timeout)
            # In the order in which they came: what an earlier service said last comes before what the next one asks.
            for service in self._services[:]:
                if service in readable and not self._hear(service):
                    service.close()
                    self._services.remove(service)
                    alone_since = time.monotonic()
            if self._listener in readable:
                service = self._listener.accept()[0]
                # One that does not read what it asked for must not keep the holder from the next.
                service.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
                self._services.append(service)

    def _hear(self, service: socket.socket) -> bool:
        """Do all that a service has said; False when it is gone."""
        while True:
            try:
                data, fds = _receive(service)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            try:
                self._do(service, json.loads(data), fds)
            except OSError:
                return False
            finally:
                for fd in fds:
                    os.close(fd)

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


def _readable(sockets: list[socket.socket], timeout: float | None) -> set[socket.socket]:
    """Those with something to read. By poll: select refuses descriptors from 1024 on, and ours are as in the service."""
    poll = select.poll()
    for each in sockets:
        poll.register(each, select.POLLIN)
    ready = {fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)}
    return {each for each in sockets if each.fileno() in ready}


def _receive(service: socket.socket) -> tuple[bytes, list[int]]:
    """One message, or BlockingIOError. Not `socket.recv_fds`, which forgets its flags and would wait (Python 3.11)."""
    data, ancillary, _, _ = service.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(FD.size), socket.MSG_DONTWAIT)
    rights = [
        rest for level, kind, rest in ancillary if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    ]
    return data, [fd for rest in rights for (fd,) in FD.iter_unpack(rest)]


if __name__ == "__main__":
    Holder(socket.socket(fileno=int(sys.argv[1]))).run()
