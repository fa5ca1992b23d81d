"""Does a disk's server answer? Asked by whoever stands beside QEMU, over the network that the mirror takes.

A request for the export's data (NBD_OPT_INFO) goes through the process that owns the disk, and changes nothing there. Over TLS
libnbd speaks, and a connection is asked again and again: a handshake costs more than all the rest.
Protocol: NetworkBlockDevice/nbd, doc/proto.md.
"""

import importlib
import struct
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import trio

from cdpserver.vm.tls import Credential

EVERY_S = 0.2

SLOW_S = 0.3
"""An answer that takes no longer than this is no news."""

ATTEMPT_S = 1.0
"""A connection that is not made in this time is tried anew: over a network that was cut the kernel would try ever more rarely."""

ASKED_MOST = 20
"""On one connection over TLS: nbdkit ends one after 32 options."""

PORT = 10809
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">I8sII")
_REPLY_BYTES = 20
_OPT_INFO = 6
_FIXED_NEWSTYLE = 1


class Probe:
    """Asks one server, at a URI (`nbd`, `nbds` or `nbd+unix`) of one of its disks."""

    def __init__(self, uri: str) -> None:
        self._parts = urlsplit(uri)
        self._export = unquote(self._parts.path.removeprefix("/")).encode()
        credential = Credential.of(uri)
        self.ask = self._ask_plain if credential is None else _OverTls(uri, credential).ask
        self._asked_at: float | None = None

    def hung_s(self) -> float:
        """For how long it has not answered; 0.0 if it does, or refuses: then QEMU knows as well."""
        waited = 0.0 if self._asked_at is None else trio.current_time() - self._asked_at
        return waited if waited > SLOW_S else 0.0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if self._asked_at is None:
                self._asked_at = trio.current_time()
            with trio.move_on_after(ATTEMPT_S):
                await self.ask()
                self._asked_at = None
            await trio.sleep(EVERY_S)

    async def _ask_plain(self) -> None:
        try:
            async with await self._connect() as stream:
                await _receive(stream, _GREETING.size)
                asked = struct.pack(">I", len(self._export)) + self._export + struct.pack(">H", 0)
                option = _OPTION.pack(_FIXED_NEWSTYLE, b"IHAVEOPT", _OPT_INFO, len(asked))
                await stream.send_all(option + asked)
                await _receive(stream, _REPLY_BYTES)
        except (OSError, trio.BrokenResourceError, EOFError):
            return  # it is not there, which is an answer

    async def _connect(self) -> trio.SocketStream:
        if self._parts.scheme == "nbd":
            assert self._parts.hostname is not None
            return await trio.open_tcp_stream(self._parts.hostname, self._parts.port or PORT)
        return await trio.open_unix_socket(parse_qs(self._parts.query)["socket"][0])


async def _receive(stream: trio.SocketStream, length: int) -> None:
    while length > 0:
        part = await stream.receive_some(length)
        if not part:
            raise EOFError
        length -= len(part)


class _OverTls:
    """Asks at a URI of `nbds`."""

    def __init__(self, uri: str, credential: Credential) -> None:
        self._nbd = importlib.import_module("nbd")
        self._parts = urlsplit(uri)
        self._credential = credential
        self._handle: Any = None
        self._asked = 0

    async def ask(self) -> None:
        """On return it has answered, or refused, or is not there."""
        handle, self._handle = self._handle, None
        try:
            if handle is None or self._asked >= ASKED_MOST:
                handle, self._asked = await self._connect(), 0
            answered = trio.Event()

            def take(_: Any) -> int:
                answered.set()
                return 1

            handle.aio_opt_info(take)
            self._asked += 1
            await self._go_on(handle, answered.is_set)
        except (self._nbd.Error, EOFError):
            return  # which is an answer
        self._handle = handle  # else, with an answer on its way that nobody waits for, it is of no use

    async def _connect(self) -> Any:
        handle = self._nbd.NBD()
        handle.set_opt_mode(True)
        handle.set_export_name(unquote(self._parts.path.removeprefix("/")))
        handle.set_tls(self._nbd.TLS_REQUIRE)
        if self._credential.user is None:
            handle.set_tls_certificates(self._credential.directory)
        else:
            handle.set_tls_psk_file(self._credential.psk_file)
            handle.set_tls_username(self._credential.user)
        handle.aio_connect_tcp(self._parts.hostname, str(self._parts.port or PORT))
        await self._go_on(handle, handle.aio_is_negotiating)
        return handle

    async def _go_on(self, handle: Any, done: Callable[[], bool]) -> None:
        """Until it is done. EOFError when the connection is lost."""
        while not done():
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise EOFError
            if handle.aio_get_direction() & self._nbd.AIO_DIRECTION_WRITE:
                await trio.lowlevel.wait_writable(handle.aio_get_fd())
                handle.aio_notify_write()
            else:
                await trio.lowlevel.wait_readable(handle.aio_get_fd())
                handle.aio_notify_read()
