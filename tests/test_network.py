"""A server on another host, behind a network of the test's own: cut, or with all of it stopped. Only `yank` frees the guest.

namespace of the guest: QEMU, cdp agent ──veth── namespace of the server: cdpserver and its workers

The agent reaches the API as by `ssh -L`: over the same network.
"""

import contextlib
import ctypes
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.guest_image import guest_image
from tests.guest_vm import Guest
from tests.judged import DISKS, Judged, make_disks
from tests.test_service import Server, until
from tools.kit.processes import run, stop
from tools.kit.qmp import Qmp

pytestmark = pytest.mark.real

SERVER, CLIENT = "10.99.0.1", "10.99.0.2"
NBD_PORT, API_PORT = 10809, 10810
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def network() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces that are connected: (server's, guest's)."""
    server, guest = (f"cdp-{os.getpid()}-{side}" for side in ("s", "g"))
    try:
        for name in (server, guest):
            run("ip", "netns", "add", name)
        run("ip", "-n", server, "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", guest)
        for name, address in ((server, SERVER), (guest, CLIENT)):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "v0")
            run("ip", "-n", name, "link", "set", "v0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield server, guest
    finally:
        for name in (server, guest):
            run("ip", "netns", "delete", name, accept=(0, 1))


class FarServer(Server):
    """A server in a network namespace."""

    def __init__(self, state_dir: Path, namespace: str) -> None:
        self.namespace, self.state_dir = namespace, state_dir
        self.log = state_dir.with_name("service.log")
        # Off loopback NBD goes by TLS.
        self.keys = state_dir.with_name("keys")
        self.keys.mkdir(exist_ok=True)
        psk = self.keys / "keys.psk"
        psk.touch(mode=0o600)
        psk.write_text(f"qemu:{secrets.token_hex(32)}\n")
        config = state_dir.with_name("cdpserver.toml")
        config.write_text(f"listen = '{SERVER}:{NBD_PORT}'\n[tls]\npsk = '{psk}'\n")
        service = [sys.executable, "-m", "cdpserver.service.main", "--state-dir", str(state_dir)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *service, "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        until(self._is_up, "answer of the API")

    def cut(self) -> None:
        """What is sent to it disappears."""
        run("ip", "-n", self.namespace, "address", "delete", f"{SERVER}/24", "dev", "v0")

    def heal(self) -> None:
        run("ip", "-n", self.namespace, "address", "add", f"{SERVER}/24", "dev", "v0")

    def freeze(self) -> None:
        """Nothing of it runs, as in a host that hangs."""
        self.stopped = [self.process.pid, *self.pids().values()]
        for pid in self.stopped:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in reversed(self.stopped):
            os.kill(pid, signal.SIGCONT)


class FarGuest(Guest):
    """A guest in a network namespace."""

    namespace = ""

    def arguments(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *super().arguments()]


class Forwarder:
    """Brings connections from a listener in one namespace on to somewhere, in a thread that is in that namespace."""

    def __init__(
        self,
        namespace: str,
        listen: Callable[[], Awaitable[list[trio.SocketListener]]],
        connect: Callable[[], Awaitable[trio.SocketStream]],
    ) -> None:
        self._namespace, self._listen, self._connect = namespace, listen, connect
        self._scope = trio.CancelScope()
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with open(f"/run/netns/{self._namespace}") as namespace:
            assert _libc.setns(namespace.fileno(), CLONE_NEWNET) == 0
        trio.run(self._main)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            listeners = await self._listen()
            self._listens.set()
            await trio.serve_listeners(self._forward, listeners)

    async def _forward(self, near: trio.SocketStream) -> None:
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            far = await self._connect()
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(pump, near, far)
                await pump(far, near)
                nursery.cancel_scope.cancel()

    def __enter__(self) -> "Forwarder":
        self._thread.start()
        assert self._listens.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()


async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    """Until one of them ends."""
    with contextlib.suppress(trio.BrokenResourceError):
        async for part in source:
            await sink.send_all(part)


@contextlib.contextmanager
def agent_beside(guest: FarGuest, server: FarServer) -> Iterator[Path]:
    """`cdp agent` in the guest's namespace; the state directory that leads to the API from there."""
    api, there = server.state_dir / "api.sock", guest.directory.with_name("there")
    there.mkdir()

    async def listen_there() -> list[trio.SocketListener]:
        return await trio.open_tcp_listeners(API_PORT, host=SERVER)

    async def to_api() -> trio.SocketStream:
        return await trio.open_unix_socket(str(api))

    async def listen_here() -> list[trio.SocketListener]:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(there / "api.sock"))
        listener.listen()
        return [trio.SocketListener(listener)]

    async def to_server() -> trio.SocketStream:
        return await trio.open_tcp_stream(SERVER, API_PORT)

    with (
        Forwarder(server.namespace, listen_there, to_api),
        Forwarder(guest.namespace, listen_here, to_server),
        open(there / "agent.log", "wb") as log,
    ):
        agent = ("agent", "hv1", "--state-dir", str(there), "--tls", str(server.keys))
        command = [sys.executable, "-m", "recovery.cli", *agent]
        process = subprocess.Popen(
            ["ip", "netns", "exec", guest.namespace, *command], stdin=subprocess.DEVNULL, stderr=log
        )
        try:
            yield there
        finally:
            stop(process)


class Far(Judged):
    """A guest and a server with a network between."""

    server: FarServer

    def protect_by_agent(self, there: Path) -> None:
        command = (sys.executable, "-m", "recovery.cli", "protect", "web", "--by", "hv1")
        run(*command, "--qmp", self.guest.qmp, "--state-dir", there)

    def freed(self) -> bool:
        """No write of the guest goes to the server any more."""
        with Qmp(self.guest.qmp2) as qmp:
            return not qmp.call("query-block-jobs")

    def struck(self, what: str, hit: Callable[[], None], mend: Callable[[], None]) -> None:
        self.goes_on()
        gaps = len(self.server.events("disk.gap"))
        with self.waits_no_longer_than_the_bound(what):
            hit()
            until(self.freed, "yank of all mirrors")
            self.goes_on(20)
            mend()
            until(lambda: len(self.server.events("disk.gap")) == gaps + len(DISKS), "gaps on record")
            self.points_go_on()
            self.in_sync()

    def freeze_and_reset(self) -> None:
        """A guest that is reset while a write of it hangs: QEMU's main loop waits for that write, and answers nobody."""
        said = len(self.guest.console)
        self.server.freeze()
        with Qmp(self.guest.qmp2) as qmp:
            qmp.call("system_reset")
        self.guest.wait_ready(since=said)
        self.load()


@pytest.mark.timeout(300)
def test_only_yank_frees_a_guest_from_a_server_far_away(short_path: Path) -> None:
    image = guest_image()
    with network() as (far, near), FarServer(short_path / "s", far) as server:
        guest = FarGuest(short_path / "vm", make_disks(short_path, image), image=image)
        guest.namespace = near
        waters = Far(short_path, server, guest)
        try:
            guest.boot()
            with agent_beside(guest, server) as there:
                waters.protect_by_agent(there)
                waters.in_sync()
                waters.note_clock()
                waters.load()
                waters.struck("cut", server.cut, server.heal)
                waters.struck("freeze", server.freeze, server.thaw)
                waters.struck("freeze and reset", waters.freeze_and_reset, server.thaw)
                until(
                    lambda: len(server.events("disk.guest-freed")) == 3 * len(DISKS), "word of what was freed"
                )
                waters.check_points(random.Random(os.environ.get("CDP_SEED")))
        finally:
            guest.close()
