"""A server on another host, behind a network of the test's own: cut, or with all of it stopped. Only `yank` frees the guest.

namespace of the guest: QEMU, controller ──veth── namespace of the server: cdpserver and its workers
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
import trio

from cdpserver import messages, timeline
from cdpserver.errors import UnreachableError
from cdpserver.service.control import exactly
from cdpserver.state import StateDir
from cdpserver.vm import qmp
from cdpserver.vm.controller import Controller
from cdpserver.vm.mirror import mirror_uri
from cdpserver.vm.probe import Probe
from cdpserver.vm.record import ProtectedDisk, ProtectedVm, QmpSocket
from cdpserver.vm.target import SeenJob, TargetState
from tests.guest_image import guest_image
from tests.guest_vm import Guest, file_disk
from tests.storm import BOUND_S, Lateness, longest_wait_s, measure_waits
from tests.test_service import Server, until
from tools.kit.processes import run

pytestmark = pytest.mark.real

SERVER, CLIENT = "10.99.0.1", "10.99.0.2"
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
        service = [sys.executable, "-m", "cdpserver.service.main", "--state-dir", str(state_dir)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *service, "--listen", f"{SERVER}:10809"],
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


class FarTarget:
    """The target of a controller beside QEMU (`vm.target.Target`); whether it hangs is known by the network."""

    def __init__(self, server: FarServer) -> None:
        self._control = StateDir.open(server.state_dir).worker_control(0)
        shown = server.get("/v1/disks/web/root")
        self._uuid = uuid_of(server)
        self._uri = mirror_uri(shown["uri"], self._uuid)
        self.probe = Probe(shown["uri"])
        self.events: list[str] = []

    async def _ask(self, op: str, **said: Any) -> Any:
        with trio.move_on_after(2):
            async with await trio.open_unix_socket(str(self._control)) as stream:
                await stream.send_all(messages.pack({"op": op, "disk": "web/root", **said}))
                length = messages.check_length(await exactly(stream, messages.LENGTH.size))
                answer = messages.unpack(await exactly(stream, length), "a worker's answer")
            if "error" in answer:
                messages.raise_error(answer)
            return answer["ok"]
        raise UnreachableError("the worker does not answer", hint="wait for it")

    async def identity(self, disk: str) -> tuple[str, str]:
        return self._uuid, self._uri

    async def check_size(self, disk: str, size: int) -> None:
        """The disk does not grow."""

    async def state(self, disk: str) -> TargetState:
        return TargetState.read(await self._ask("look"))

    async def holds(self, disk: str, place: str) -> bool:
        return bool(await self._ask("holds", place=place))

    async def synced(self, disk: str, session: int, bitmap: str = "", *, seen: SeenJob | None = None) -> None:
        await self._ask("synced", session=session, write_blocking=True, bitmap=bitmap)

    async def lost(self, disk: str, session: int, reason: str, *, ago_s: float | None) -> None:
        ago_ns = None if ago_s is None else int(ago_s * 1e9)
        await self._ask("lost", session=session, reason=reason, ago_ns=ago_ns)

    def hung_s(self, disk: str) -> float:
        return self.probe.hung_s()

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append(event)


def uuid_of(server: FarServer) -> str:
    (directory,) = (server.state_dir / "timelines").iterdir()
    return timeline.load(directory).uuid.hex()


class Beside:
    """A controller in a thread that is in the guest's network namespace."""

    def __init__(self, guest: FarGuest, target: FarTarget) -> None:
        vm = ProtectedVm("web", QmpSocket(str(guest.qmp)), (ProtectedDisk("web/root", "root-device"),), 0)
        self.controller = Controller(vm, lambda _: qmp.connect(guest.qmp), target)
        self.state = self.controller.states["web/root"]
        self._target, self._namespace = target, guest.namespace
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with open(f"/run/netns/{self._namespace}") as namespace:
            assert _libc.setns(namespace.fileno(), CLONE_NEWNET) == 0
        trio.run(self._main)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._target.probe.run)
                nursery.start_soon(self.controller.run)

    def in_sync(self) -> None:
        until(lambda: self.state.state == "synced", f"in sync: {self.state}")

    def __enter__(self) -> "Beside":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        until(lambda: self._token, "start of the controller").run_sync_soon(self._scope.cancel)
        self._thread.join()


@pytest.mark.timeout(300)
def test_only_yank_frees_a_guest_from_a_server_far_away(short_path: Path) -> None:
    root = guest_image().copy_root(short_path / "root.raw")
    with network() as (far, near), FarServer(short_path / "s", far) as server:
        guest = FarGuest(short_path / "vm", file_disk("root", root))
        guest.namespace = near
        server.post("/v1/disks", name="root", vm="web", size=root.stat().st_size)
        try:
            guest.boot()
            target = FarTarget(server)
            with Beside(guest, target) as beside:
                beside.in_sync()
                guest.start("counter")
                strike(guest, beside, server, server.cut, server.heal)
                strike(guest, beside, server, server.freeze, server.thaw)
                guest.stop()
                assert target.events.count("disk.guest-freed") == 2
                beside.in_sync()
                until(lambda: same(server, root), "same content here and there")
        finally:
            guest.close()


def strike(
    guest: FarGuest, beside: Beside, server: FarServer, hit: Callable[[], None], mend: Callable[[], None]
) -> None:
    measure_waits(guest)
    guest.wait_acks(5)
    gaps = len(server.events("disk.gap"))
    with Lateness() as late:
        hit()
        until(lambda: beside.state.state == "degraded", "notice of it")
        guest.wait_acks(20)
        mend()
        beside.in_sync()
    waited_s = longest_wait_s(guest)
    print(f"{hit.__name__}: a write waited up to {waited_s} s, the machine {late.worst_s:.2f} s")
    assert waited_s <= BOUND_S + late.worst_s
    guest.wait_acks(5)
    assert len(server.events("disk.gap")) == gaps + 1
    assert not [line for line in guest.console if "failed" in line]


def same(server: FarServer, root: Path) -> bool:
    handle = nbd.NBD()
    handle.connect_uri(server.uri("web/root@latest"))
    try:
        half, whole = root.stat().st_size // 2, root.read_bytes()
        return all(bytes(handle.pread(half, at)) == whole[at : at + half] for at in (0, half))
    finally:
        handle.shutdown()
