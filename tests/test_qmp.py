"""The QMP client against a real QEMU, and against peers that are hung, gone, taken or no QEMU at all."""

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from cdpserver.errors import CorruptError
from cdpserver.vm import qmp


@pytest.fixture
def daemon(short_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A qemu-storage-daemon with a monitor."""
    path = short_path / "qmp.sock"
    command = ["qemu-storage-daemon", "--chardev", f"socket,id=m,path={path},server=on,wait=off"]
    process = subprocess.Popen([*command, "--monitor", "chardev=m"])
    while not path.exists():
        assert process.poll() is None
    yield process, path
    process.kill()
    process.wait()


async def test_commands_events_and_refusals(daemon: tuple[subprocess.Popen[bytes], Path]) -> None:
    node = {"driver": "null-co", "size": 1 << 20, "read-zeroes": True}
    async with qmp.connect(daemon[1]) as monitor:
        assert monitor.version >= (7, 0, 0)
        for name in ("a", "b"):
            await monitor.execute("blockdev-add", {**node, "node-name": name})
        with pytest.raises(qmp.QmpRefusedError, match=r"QEMU refused blockdev-del: .*nope"):
            await monitor.execute("blockdev-del", {"node-name": "nope"})
        await monitor.execute(
            "blockdev-mirror", {"job-id": "j", "device": "a", "target": "b", "sync": "full"}
        )
        with trio.fail_after(20):
            while (event := await monitor.next_event()) is None or event.name != "BLOCK_JOB_READY":
                pass
        assert event.data["device"] == "j" and event.time_ns > 10**18
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(monitor.execute, "query-jobs")


async def test_a_killed_qemu_ends_commands_and_events(daemon: tuple[subprocess.Popen[bytes], Path]) -> None:
    async with qmp.connect(daemon[1]) as monitor:
        daemon[0].kill()
        with pytest.raises(qmp.QmpClosedError, match="closed the connection"):
            await monitor.next_event()
        with pytest.raises(qmp.QmpClosedError):
            await monitor.execute("query-jobs")


async def test_a_hung_qemu_is_noticed(
    daemon: tuple[subprocess.Popen[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "COMMAND_S", 0.2)
    async with qmp.connect(daemon[1]) as monitor:
        daemon[0].send_signal(signal.SIGSTOP)
        with pytest.raises(qmp.QmpClosedError, match=r"did not answer query-jobs"):
            await monitor.execute("query-jobs")
        daemon[0].send_signal(signal.SIGCONT)
        assert await monitor.execute("query-jobs") == []


async def test_a_monitor_that_is_taken(
    daemon: tuple[subprocess.Popen[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, "GREETING_S", 0.2)
    async with qmp.connect(daemon[1]):
        with pytest.raises(qmp.QmpClosedError, match=r"no greeting .*one more -qmp"):
            async with qmp.connect(daemon[1]):
                pass


async def test_nobody_there(short_path: Path) -> None:
    with pytest.raises(qmp.QmpClosedError, match="no QEMU listens"):
        async with qmp.connect(short_path / "none"):
            pass


@pytest.mark.parametrize("said", [b"SSH-2.0\n", b"[1]\n", b'{"QMP": 1}\n', b"x" * 5000])
async def test_what_is_no_monitor(short_path: Path, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "MAX_LINE", 4000)
    with peer(short_path / "p") as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_say, listener, [said])
            with pytest.raises(CorruptError):
                async with qmp.connect(short_path / "p"):
                    pass


async def test_a_flood_of_events_is_bounded_and_said(short_path: Path) -> None:
    greeting = {"QMP": {"version": {"qemu": {"major": 8, "minor": 2, "micro": 0}}}}
    flood = [json.dumps({"event": "BLOCK_JOB_ERROR", "data": {"n": n}}) for n in range(3000)]
    lines = ['{"return": {}, "id": 1}', *flood]
    with peer(short_path / "p") as listener:
        async with trio.open_nursery() as nursery:
            parts = [json.dumps(greeting), "\n".join(lines)]
            nursery.start_soon(_say, listener, [f"{part}\n".encode() for part in parts])
            async with qmp.connect(short_path / "p") as monitor:
                await trio.sleep(0.3)
                assert await monitor.next_event() is None
                first = await monitor.next_event()
                assert first is not None and first.data == {"n": 0}
                for _ in range(qmp.KEPT_EVENTS - 1):
                    await monitor.next_event()
                with pytest.raises(qmp.QmpClosedError):
                    await monitor.next_event()


@pytest.mark.parametrize("capabilities", [["oob"], []])
async def test_what_frees_a_hung_qemu_is_not_kept_by_what_waits_for_it(
    short_path: Path, capabilities: list[str]
) -> None:
    """A QEMU whose main loop hangs: commands come, none is answered but what is done out of band."""
    heard: list[dict[str, Any]] = []
    full, hangs = trio.Event(), False

    async def serve(connection: trio.SocketStream) -> None:
        greeting = {
            "version": {"qemu": {"major": 7, "minor": 2, "micro": 0}},
            "capabilities": capabilities,
        }
        await connection.send_all(json.dumps({"QMP": greeting}).encode() + b"\n")
        received = b""
        async for part in connection:
            *lines, received = (received + part).split(b"\n")
            for message in map(json.loads, lines):
                heard.append(message)
                if len(heard) > qmp.AT_ONCE + 1:
                    full.set()
                lives = not hangs and message.get("execute") == "yank"
                if lives or message.get("execute") == "qmp_capabilities" or "exec-oob" in message:
                    await connection.send_all(
                        json.dumps({"return": {}, "id": message["id"]}).encode() + b"\n"
                    )

    with peer(short_path / "p") as listener, trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup()))]
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            async with qmp.connect(short_path / "p") as monitor, trio.open_nursery() as waiting:
                await monitor.execute("yank")
                assert heard[-1]["execute"] == "yank"
                hangs = True
                for _ in range(qmp.AT_ONCE + 3):
                    waiting.start_soon(monitor.execute, "query-jobs")
                await full.wait()
                if capabilities:
                    async with trio.open_nursery() as disks:
                        for _ in range(3):
                            disks.start_soon(monitor.execute, "yank")
                    assert [message.get("exec-oob") for message in heard[-3:]] == ["yank"] * 3
                    assert heard[0]["arguments"] == {"enable": ["oob"]}
                else:
                    with trio.move_on_after(0.1):
                        await monitor.execute("yank")
                    assert not [message for message in heard if "exec-oob" in message]
                asked = [message for message in heard if message.get("execute") == "query-jobs"]
                assert len(asked) == qmp.AT_ONCE, "QEMU reads no more than eight that wait"
                waiting.cancel_scope.cancel()
            nursery.cancel_scope.cancel()


@contextlib.contextmanager
def peer(path: Path) -> Iterator[socket.socket]:
    """A listening socket at `path`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener


async def _say(listener: socket.socket, parts: list[bytes]) -> None:
    """Take one client, and say the parts, with a message of the client's between each two."""
    connection, _ = await trio.socket.from_stdlib_socket(listener.dup()).accept()
    with connection:
        for number, part in enumerate(parts):
            if number:
                await connection.recv(1000)
            await trio.SocketStream(connection).send_all(part)
