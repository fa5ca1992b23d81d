"""Who connects and never chooses an export is disconnected, whatever he has sent; a session that is silent is not."""

import contextlib
import socket
import struct
import threading
from pathlib import Path

import nbd
import pytest

from cdpserver.clock import fix_clock
from nbdplugin.negotiation import Negotiations
from recovery.opened import alone
from tests.test_check import BLOCK, Disk, disk, template
from tests.test_check_depth import named

__all__ = ["disk", "named", "template"]  # fixtures

HALVES = (
    b"",
    struct.pack(">I", 3)[:2],
    struct.pack(">I", 3),
    struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">I", 7),
    struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, 4000) + b"half a name",
)
"""What a client says before it says no more: nothing, half its flags, these alone, half an option, half its data."""

INFO = 6


def asks(name: bytes) -> bytes:
    """Asks about an export that is not there, and for no other."""
    body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    return struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", INFO, len(body)) + body


@pytest.mark.real
@pytest.mark.parametrize(("plugin", "export"), [("target", "d"), ("export", "d@latest")])
def test_half_a_negotiation_is_ended_and_no_session(
    plugin: str, export: str, named: Disk, short_path: Path
) -> None:
    path = short_path / "nbd"
    fix_clock(named.state.clock, named.clock_ns)
    more = ["alone=1"] if plugin == "export" else []
    with (
        alone(plugin, [f"state_dir={named.state.path}", "negotiation=1", *more], path),
        contextlib.ExitStack() as stack,
    ):
        session = nbd.NBD()
        session.set_export_name(export)
        session.connect_unix(str(path))
        wires = []
        for said in (*HALVES * 8, asks(b"nothing")):
            wire = stack.enter_context(socket.socket(socket.AF_UNIX))
            wire.settimeout(120)
            wire.connect(str(path))
            wire.sendall(said)
            wires.append(wire)
        for wire in wires:
            with contextlib.suppress(ConnectionResetError):
                while wire.recv(4096):
                    pass
        # It came before all of them, and has said nothing since.
        assert session.pread(BLOCK, BLOCK) == bytes([5]) * BLOCK
        session.shutdown()
    events = named.state.events.read_text()
    assert f"{plugin}.negotiation-ended" in events


def test_only_a_thread_that_is_late_and_waits_for_a_socket_is_cut() -> None:
    negotiations = Negotiations(lambda count: None, limit_s=10.0)
    ours, client = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    begun, done, got = threading.Barrier(4), threading.Event(), []

    def receives() -> None:
        negotiations.began()
        begun.wait(60)
        got.append(ours.recv(1))

    def accepts() -> None:
        negotiations.began()
        begun.wait(60)
        with contextlib.suppress(OSError):
            listener.accept()

    def has_chosen() -> None:
        negotiations.began()
        with negotiations.choosing():
            assert negotiations.end_late(float("inf")) <= 1
        begun.wait(60)
        done.wait(60)

    threads = [threading.Thread(target=run, daemon=True) for run in (receives, accepts, has_chosen)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    assert negotiations.end_late(0.0) == 0
    while not got:  # it may not be in its call yet
        negotiations.end_late(float("inf"))
        threads[0].join(0.01)
    assert got == [b""] and client.recv(1) == b""
    with socket.create_connection(listener.getsockname()):  # is still listening, and its thread there
        threads[1].join(60)
    assert not threads[1].is_alive() and threads[2].is_alive()
    done.set()
    threads[2].join(60)
    assert negotiations.end_late(float("inf")) == 0
