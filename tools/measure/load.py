"""Requests over libnbd with several in flight: what QEMU's mirror sends, without QEMU."""

from collections.abc import Callable
from typing import Any

import nbd

from tools.kit.processes import FailedError

DEPTH = 16
"""What QEMU keeps in flight on a connection."""


class Pipeline:
    """One connection. Requests are sent without waiting for the ones before; `drain` waits for all."""

    def __init__(self, uri: str) -> None:
        self._handle = nbd.NBD()
        self._handle.connect_uri(uri)
        self._failed = 0

    def write(self, data: bytes | bytearray, offset: int) -> None:
        """A write."""
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        self._send(lambda done: self._handle.aio_pwrite(buffer, offset, completion=done), keep=buffer)

    def zero(self, length: int, offset: int) -> None:
        """A zero; holes are welcome."""
        self._send(lambda done: self._handle.aio_zero(length, offset, completion=done))

    def _send(self, submit: Callable[[Callable[[Any], int]], Any], keep: object = None) -> None:
        while self._handle.aio_in_flight() >= DEPTH:
            self._handle.poll(-1)

        def done(error: Any, _keep: object = keep) -> int:
            # The buffer must live until the answer is here.
            self._failed = error.value or self._failed
            return 1

        submit(done)

    def drain(self) -> None:
        """Wait for every answer; FailedError if one was an error."""
        while self._handle.aio_in_flight():
            self._handle.poll(-1)
        if self._failed:
            raise FailedError(f"the server answered with error {self._failed}")

    def flush(self) -> None:
        """Everything is durable on return."""
        self._handle.flush()

    def close(self) -> None:
        """Disconnect."""
        self._handle.shutdown()
