"""A client whose disk another worker serves: its requests are passed on, over one NBD connection of its own.

It came in over TCP, or on the socket for all disks, where the kernel chose the worker. The owner may be killed and started anew
while the client stays: then the request is sent again, as the client itself would. Sending twice does no harm, since nothing of
the connection's own was acknowledged in between.
"""

import builtins
import time
from pathlib import Path
from typing import Any, TypeVar

import nbd

from cdpserver.errors import BrokenError, CdpError, NoSpaceError, NotFoundError, RemovedError, UsageError

DIRECT = "direct:"
"""Before an export name: who accepts this serves it or refuses, so that nothing goes in circles. No disk's name holds a colon."""

AWAY_S = 60.0
"""How long an owner may be away until the client gets an error; it is back in 0.3 s."""

PAUSE_S = 0.01
EVENTS = "the events say why: cdp event list"

Answer = TypeVar("Answer")

ERRORS: dict[str | None, type[CdpError]] = {
    "EINVAL": UsageError,
    "ENOENT": NotFoundError,
    "ENOSPC": NoSpaceError,
    "ESHUTDOWN": RemovedError,
}


class Forward:
    """A connection to the owner of a disk, in the place of `cdpserver.target.disk.Connection`. For one thread."""

    def __init__(self, owner: Path, export: str) -> None:
        """Connect to the worker at socket `owner` for `export`. Raises what it refuses with."""
        self.name = export
        self.thread_state = 0
        self.waits = False  # its owner does
        self._owner = owner
        self._handle = self._connect()
        self.size = int(self._handle.get_size())

    def _connect(self) -> Any:
        """A handle that is ready. Waits for an owner that is not there; NotFoundError when it refuses."""
        deadline = time.monotonic() + AWAY_S
        while True:
            handle = nbd.NBD()
            handle.set_export_name(f"{DIRECT}{self.name}")
            handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
            # nbdkit has checked every request against what the owner advertises.
            handle.set_strict_mode(0)
            handle.set_pread_initialize(False)
            handle.set_opt_mode(True)
            try:
                handle.connect_unix(str(self._owner))
                handle.opt_go()
                return handle
            except nbd.Error as error:
                if handle.aio_is_negotiating():  # it is there, and its answer is no
                    raise NotFoundError(
                        f"its worker refuses {self.name}: {error.string}", hint=EVENTS
                    ) from None
                if time.monotonic() >= deadline:
                    raise BrokenError(f"the worker of {self.name} does not answer", hint=EVENTS) from None
            time.sleep(PAUSE_S)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        while True:
            try:
                return getattr(self._handle, operation)(*arguments)
            except nbd.Error as error:
                if self._handle.aio_is_ready():
                    kind = ERRORS.get(error.errno, BrokenError)
                    raise kind(f"{self.name}: {error.string}", hint=EVENTS) from None
            self._handle = self._connect()
            if self._handle.get_size() < self.size:  # more when it has grown
                raise RemovedError(f"{self.name} is another disk now", hint="connect again")

    def write(self, payload: memoryview, offset: int, *, fua: int = 0) -> None:
        """As Connection.write."""
        self._ask("pwrite", payload, offset, nbd.CMD_FLAG_FUA if fua else 0)

    def zero(self, offset: int, length: int, *, trim: bool = False, fua: int = 0) -> None:
        """As Connection.zero."""
        self._ask("trim" if trim else "zero", length, offset, nbd.CMD_FLAG_FUA if fua else 0)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """As Connection.read_into."""
        buffer[:] = self._ask("pread", len(buffer), offset)

    def flush(self) -> None:
        """As Connection.flush."""
        self._ask("flush")

    def status(self, offset: int, length: int, *, one: bool) -> builtins.list[tuple[int, int, bool]]:
        """As Connection.status."""
        runs: list[tuple[int, int, bool]] = []

        def collect(context: str, at: int, entries: list[int], _: Any) -> int:
            for count, flags in zip(entries[::2], entries[1::2], strict=True):
                runs.append((at, at + count, bool(flags & nbd.STATE_ZERO)))
                at += count
            return 0

        self._ask("block_status", length, offset, collect, nbd.CMD_FLAG_REQ_ONE if one else 0)
        return runs

    def close(self) -> None:
        """The client is gone."""
        try:
            self._handle.shutdown()
        except nbd.Error:
            self._handle = None  # the owner is gone as well
