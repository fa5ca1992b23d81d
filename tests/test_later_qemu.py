"""What a QEMU from 8.2 on is told, where none can be run: a monitor that answers as its documentation says, on a real socket.

From 8.2 on a mirror copies in the background and is made write-blocking by `block-job-change` (qapi/block-core.json): *synced*
may be said only after that, of a session and a job that stayed as they were since.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from cdpserver.vm import qmp
from cdpserver.vm.controller import Controller
from cdpserver.vm.mirror import Mirror
from cdpserver.vm.record import ProtectedDisk, ProtectedVm, QmpSocket
from cdpserver.vm.target import Ago, SeenJob, TargetState

UUID = "00112233445566778899aabbccddeeff"
NAME = f"cdp-{UUID[:16]}"
URI = f"nbd+unix:///web/d:{UUID}?socket=/x"
SIZE = 1 << 20


class LaterQemu:
    """A QEMU of some version: which commands came, in order, and a mirror that is ready when it is asked for."""

    def __init__(self, version: tuple[int, int, int]) -> None:
        self.version = dict(zip(("major", "minor", "micro"), version, strict=True))
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.mode = ""
        self.nodes = [{"node-name": "d", "drv": "raw", "file": "/d.raw", "image": {"virtual-size": SIZE}}]
        self.objects: dict[str, str] = {}

    def names(self) -> list[str]:
        return [name for name, _ in self.commands]

    async def serve(self, stream: trio.SocketStream) -> None:
        async def send(message: dict[str, Any]) -> None:
            await stream.send_all(json.dumps(message).encode() + b"\r\n")

        await send({"QMP": {"version": {"qemu": self.version, "package": ""}, "capabilities": ["oob"]}})
        buffer = b""
        while part := await stream.receive_some(65536):
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                message = json.loads(line)
                self.commands.append((message["execute"], message.get("arguments", {})))
                try:
                    answer = {"return": self.answer(*self.commands[-1])}
                except LookupError as error:
                    answer = {"error": {"class": "GenericError", "desc": repr(error)}}
                await send(answer | {"id": message["id"]})

    def answer(self, command: str, arguments: dict[str, Any]) -> Any:
        match command:
            case "blockdev-add":
                self.nodes.append({**arguments, "drv": arguments["driver"], "file": URI, "image": {}})
            case "blockdev-mirror":
                self.mode = arguments["copy-mode"]
            case "block-job-change":
                assert (arguments["id"], arguments["type"], self.mode) == (NAME, "mirror", "background")
                self.mode = arguments["copy-mode"]
            case "query-block-jobs":
                job = {"device": NAME, "status": "ready", "ready": True, "io-status": "ok"}
                return [job | {"offset": SIZE, "len": SIZE, "type": "mirror"}] if self.mode else []
            case "query-named-block-nodes":
                return self.nodes
            case "query-status":
                return {"status": "running", "running": True}
            case "query-block" | "query-blockstats":
                return []
            case "object-add":
                self.objects[arguments["id"]] = arguments["data"]
            case "object-del":
                del self.objects[arguments["id"]]
            case "qom-get":
                return self.objects[arguments["path"].removeprefix("/objects/")]
        return {}


class KeptTarget:
    """Our side, in memory (`vm.target.Target`). `at_word` looks at the moment at which *synced* is said."""

    def __init__(self, at_word: Callable[[], None]) -> None:
        self.said = TargetState(session=1, synced=False, last_seq=1, place="1:1")
        self.synced_said = trio.Event()
        self._at_word = at_word

    async def identity(self, disk: str) -> tuple[str, str]:
        return UUID, URI

    async def check_size(self, disk: str, size: int) -> None:
        assert size == SIZE

    async def state(self, disk: str) -> TargetState:
        return self.said

    async def holds(self, disk: str, place: str) -> bool:
        return place == self.said.place

    async def synced(self, disk: str, session: int, bitmap: str = "", *, seen: SeenJob | None = None) -> None:
        self._at_word()
        self.said = TargetState(session=session, synced=True, last_seq=1, place="1:1")
        self.synced_said.set()

    async def lost(self, disk: str, session: int, reason: str, *, ago: Ago) -> None:
        assert not self.said.synced, (
            "what was in sync before this controller came may be said to be lost, and nothing else"
        )

    def hung_s(self, disk: str) -> float:
        return 0.0

    def emit(self, event: str, **fields: Any) -> None:
        """Not looked at."""


@pytest.mark.parametrize("version", [(7, 2, 22), (8, 1, 9), (8, 2, 0), (11, 1, 0)])
async def test_synced_is_said_only_of_a_mirror_that_is_write_blocking(
    short_path: Path, version: tuple[int, int, int]
) -> None:
    qemu = LaterQemu(version)
    later = version >= (8, 2, 0)
    path = short_path / "qmp.sock"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()

    def at_word() -> None:
        assert qemu.mode == "write-blocking"
        assert ("block-job-change" in qemu.names()) == later

    target = KeptTarget(at_word)
    vm = ProtectedVm("web", QmpSocket(str(path)), (ProtectedDisk("web/d", "d"),), 0)
    controller = Controller(vm, lambda _: qmp.connect(path), target)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, qemu.serve, [trio.SocketListener(listener)])
            nursery.start_soon(controller.run)
            await target.synced_said.wait()
            nursery.cancel_scope.cancel()
    (started,) = [arguments for name, arguments in qemu.commands if name == "blockdev-mirror"]
    assert started["copy-mode"] == ("background" if later else "write-blocking")
    assert started["on-target-error"] == "stop" and started["filter-node-name"] == f"{NAME}-top"


async def test_a_change_that_is_refused_keeps_the_word_back(short_path: Path) -> None:
    """Then points stay `unordered`: the copy runs in the background."""

    class Refusing(LaterQemu):
        def answer(self, command: str, arguments: dict[str, Any]) -> Any:
            if command == "block-job-change":
                raise LookupError("not now")
            return super().answer(command, arguments)

    qemu = Refusing((8, 2, 0))
    path = short_path / "qmp.sock"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, qemu.serve, [trio.SocketListener(listener)])
            async with qmp.connect(path) as monitor:
                mirror = Mirror(monitor, UUID)
                await mirror.start("d", URI, method="blockdev-mirror", wait=False)
                with pytest.raises(qmp.QmpRefusedError, match="block-job-change"):
                    await mirror.make_write_blocking()
            nursery.cancel_scope.cancel()
