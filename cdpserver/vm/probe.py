"""Does a disk's server answer? Asked by whoever stands beside QEMU, over the network that the mirror takes.

A request for the export's data (NBD_OPT_INFO) goes through the process that owns the disk, and changes nothing there.
Protocol: NetworkBlockDevice/nbd, doc/proto.md.
"""

import struct
from urllib.parse import parse_qs, unquote, urlsplit

import trio

EVERY_S = 0.2

SLOW_S = 0.3
"""An answer that takes no longer than this is no news."""

ATTEMPT_S = 1.0
"""A connection that is not made in this time is tried anew: over a network that was cut the kernel would try ever more rarely."""

PORT = 10809
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">I8sII")
_REPLY_BYTES = 20
_OPT_INFO = 6
_FIXED_NEWSTYLE = 1


class Probe:
    """Asks one server, at a URI (`nbd` or `nbd+unix`) of one of its disks."""

    def __init__(self, uri: str) -> None:
        self._parts = urlsplit(uri)
        self._export = unquote(self._parts.path.removeprefix("/")).encode()
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
                await self._ask()
                self._asked_at = None
            await trio.sleep(EVERY_S)

    async def _ask(self) -> None:
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
