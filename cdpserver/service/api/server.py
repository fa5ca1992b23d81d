"""HTTP on the API's socket, and over TLS: Hypercorn's connections, accepted by us.

A client that does not read its answer is cut off: Hypercorn shields its sending from cancellation, so that one such
client would keep the service from stopping.
"""

import functools
import socket
import ssl
from typing import Any, TypeAlias

import trio
from fastapi import FastAPI
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from hypercorn.utils import wrap_app

from cdpserver.events import EventLog
from cdpserver.service.api.bearers import AUTHENTICATE_S
from cdpserver.service.api.seldom import Seldom
from cdpserver.service.roles import Role, Roles, peer, user_name

GRACE_S = 5.0
"""How long requests under way may take to end when the service stops."""

SEND_S = 30.0
"""How long a client may leave SEND_BYTES of its answer unread."""

SEND_BYTES = 64 << 10

MAX_HEAD = 64 << 10
"""A request line and its headers; a name or two."""

MAX_REMOTE = 256
"""Connections over TCP at once: so many cost a few MiB. The Unix socket is not counted, and so never full of them."""

Secured: TypeAlias = tuple[socket.socket, ssl.SSLContext]


class _Stream:
    """A connection whose sending ends: with the client's reading, at the latest."""

    def __init__(self, stream: Any, socket: trio.socket.SocketType) -> None:
        self._stream = stream
        self.socket = socket

    async def send_all(self, data: bytes) -> None:
        with memoryview(data) as whole:
            for at in range(0, len(whole), SEND_BYTES):
                with trio.move_on_after(SEND_S) as scope:
                    await self._stream.send_all(whole[at : at + SEND_BYTES])
                if scope.cancelled_caught:
                    raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, max_bytes: int) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Connection(TCPServer):
    """One that ends with its client, where Hypercorn's waits for the rest of the time that an idle one may stay open."""

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()


class _Server:
    """The connections of one application."""

    def __init__(self, app: FastAPI, roles: Roles, log: EventLog) -> None:
        self._config = HypercornConfig()
        self._config.errorlog = None
        self._config.h11_max_incomplete_size = MAX_HEAD
        self._app = wrap_app(app, 0, "asgi")  # type: ignore[arg-type]
        self._context = WorkerContext(None)
        self._roles = roles
        self._log = log
        self._open: set[_Stream] = set()
        self._remotes = 0
        self._full = Seldom(log)

    async def run(self, listener: socket.socket, secured: Secured | None, until: trio.Event) -> None:
        async with trio.open_nursery() as around:
            around.start_soon(self._cut_off, until)
            async with trio.open_nursery() as requests:
                async with trio.open_nursery() as accepting:
                    accept = functools.partial(trio.serve_listeners, handler_nursery=requests)
                    accepting.start_soon(accept, self._local, [_listener(listener)])
                    if secured is not None:
                        remote = functools.partial(self._remote, secured[1])
                        accepting.start_soon(accept, remote, [_listener(secured[0])])
                    await until.wait()
                    accepting.cancel_scope.cancel()
                await self._context.terminated.set()  # idle connections end
                requests.cancel_scope.deadline = trio.current_time() + GRACE_S
            around.cancel_scope.cancel()

    async def _local(self, accepted: trio.SocketStream) -> None:
        """A process of this host, with the role that its groups have."""
        role, user = self._roles.of_peer(accepted.socket), user_name(peer(accepted.socket)[0])
        await self._talk(_Stream(accepted, accepted.socket), {"role": role, "user": user})

    async def _remote(self, context: ssl.SSLContext, accepted: trio.SocketStream) -> None:
        """A client over TCP, which has a role when it has shown a token (see `bearers`), and little time until then."""
        if self._remotes >= MAX_REMOTE:
            await accepted.aclose()
            self._full.say("service.connections-full", limit=str(MAX_REMOTE))
            return
        self._remotes += 1
        try:
            with trio.move_on_after(AUTHENTICATE_S) as until_known:
                stream = trio.SSLStream(accepted, context, server_side=True, https_compatible=True)
                try:
                    await stream.do_handshake()
                except trio.BrokenResourceError:
                    return  # no TLS, or not one that we speak
                state = {"role": Role.NONE, "user": "", "until_known": until_known}
                await self._talk(_Stream(stream, accepted.socket), state)
        finally:
            self._remotes -= 1
            await trio.aclose_forcefully(accepted)

    async def _talk(self, stream: _Stream, known: dict[str, Any]) -> None:
        self._open.add(stream)
        try:
            state = ConnectionState(LifespanState(known))
            await _Connection(self._app, self._config, self._context, state, stream).run()  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001
            # The process's rim: what goes wrong with one connection is no matter of the others.
            self._log.emit("service.connection-failed", level="error", reason=repr(error)[:2000])
        finally:
            self._open.discard(stream)

    async def _cut_off(self, until: trio.Event) -> None:
        """Close what a cancelled request still sends on."""
        await until.wait()
        await trio.sleep(GRACE_S)
        for stream in self._open:
            stream.socket.close()


async def serve(
    app: FastAPI,
    listener: socket.socket,
    roles: Roles,
    log: EventLog,
    *,
    secured: Secured | None = None,
    until: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until the event; then no new ones are taken, and those under way have a few seconds.

    `secured` is where they come over TCP as well, and with which certificate.
    """
    server = _Server(app, roles, log)
    task_status.started()
    await server.run(listener, secured, until)


def _listener(listener: socket.socket) -> trio.SocketListener:
    listener.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))
