"""Who connects and never chooses an export is disconnected, whatever he has sent; a session that is silent is not."""

import contextlib
import os
import signal
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import nbd
import pytest

from cdpserver import messages, sealed
from cdpserver.clock import fix_clock
from cdpserver.config import Config
from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.pushed import Intent, Sent
from cdpserver.repository.record import FULL
from cdpserver.repository.repository import Repository, create
from cdpserver.service.children import export_command, target_command
from cdpserver.service.core import tcp_uri
from cdpserver.service.listeners import bind_tcp, bind_unix
from cdpserver.service.processes import keep_for_children, spawn
from cdpserver.vm.backup import receiver
from cdpserver.vm.tls import Credential
from nbdplugin.negotiation import Negotiations
from recovery.opened import alone
from tests.test_backup_pushed import DISK, STEP, full
from tests.test_check import BLOCK, Disk, disk, template
from tests.test_check_depth import named
from tests.test_tls import files
from tools.kit.processes import until

__all__ = ["disk", "files", "named", "template"]  # fixtures

HALVES = (
    b"",
    struct.pack(">I", 3)[:2],
    struct.pack(">I", 3),
    struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">I", 7),
    struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, 4000) + b"half a name",
)
"""What a client says before it says no more: nothing, half its flags, these alone, half an option, half its data."""

LIMIT = "negotiation=2"
"""Seconds: a machine that is busy lets whoever chooses at once choose in time."""

STARTTLS, INFO = 5, 6
ACK, ERROR = 1, 1 << 31

Wire = socket.socket


def option(kind: int, body: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", kind, len(body)) + body


def about(export: str) -> bytes:
    """Asks about an export, and chooses it not."""
    name = export.encode()
    return option(INFO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))


def connect(where: Path | tuple[str, int]) -> Wire:
    """A client who is greeted, and has said that he speaks the protocol."""
    wire = socket.socket(socket.AF_UNIX if isinstance(where, Path) else socket.AF_INET)
    wire.settimeout(120)
    wire.connect(str(where) if isinstance(where, Path) else where)
    assert wire.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"
    wire.sendall(struct.pack(">I", 3))
    return wire


def whole(wire: Wire, length: int) -> bytes:
    found = b""
    while len(found) < length:  # TLS knows no MSG_WAITALL
        part = wire.recv(length - len(found))
        assert part, "it ended"
        found += part
    return found


def answer(wire: Wire) -> int:
    """The last reply to an option."""
    while True:
        _, _, reply, length = struct.unpack(">QIII", whole(wire, 20))
        whole(wire, length)
        if reply == ACK or reply & ERROR:
            return int(reply)


def asked_about(wire: Wire, export: str) -> Wire:
    """He was told of the export, and says no more."""
    wire.sendall(about(export))
    assert answer(wire) == ACK
    return wire


def by_tls(where: tuple[str, int], files: Path) -> Wire:
    context = ssl.create_default_context(cafile=str(files / "tls/ca-cert.pem"))
    context.load_cert_chain(files / "hv1/client-cert.pem", files / "hv1/client-key.pem")
    return context.wrap_socket(promised(where), server_hostname=where[0])


def promised(where: tuple[str, int]) -> Wire:
    """A client who may begin with TLS now."""
    wire = connect(where)
    wire.sendall(option(STARTTLS))
    assert answer(wire) == ACK
    return wire


def is_ended(wire: Wire) -> None:
    """By the other side; whoever waits for that in vain hears of it by TimeoutError."""
    with wire, contextlib.suppress(ConnectionResetError):
        while wire.recv(4096):
            pass


@pytest.mark.real
@pytest.mark.parametrize(("plugin", "export"), [("target", "d"), ("export", "d@latest")])
def test_half_a_negotiation_is_ended_and_no_session(
    plugin: str, export: str, named: Disk, short_path: Path
) -> None:
    path = short_path / "nbd"
    fix_clock(named.state.clock, named.clock_ns)
    more = ["alone=1"] if plugin == "export" else []
    with (
        alone(plugin, [f"state_dir={named.state.path}", LIMIT, *more], path),
        contextlib.ExitStack() as stack,
    ):
        session = nbd.NBD()
        session.set_export_name(export)
        session.connect_unix(str(path))
        wires = []
        for said in (*HALVES * 8, struct.pack(">I", 3) + about("nothing")):
            wire = stack.enter_context(socket.socket(socket.AF_UNIX))
            wire.settimeout(120)
            wire.connect(str(path))
            wire.sendall(said)
            wires.append(wire)
        wires.append(asked_about(connect(path), export))
        for wire in wires:
            is_ended(wire)
        # It came before all of them, and has said nothing since.
        assert session.pread(BLOCK, BLOCK) == bytes([5]) * BLOCK
        session.shutdown()
        until(lambda: f"{plugin}.negotiation-ended" in named.state.events.read_text(), "the event")


@contextlib.contextmanager
def listening(plugin: str, named: Disk, files: Path, path: Path) -> Iterator[tuple[str, int]]:
    """One of the service's processes as the service starts it with `[tls]`, on `path` and on a port."""
    config, state = Config(tls_certificates=str(files / "tls")), named.state
    command = export_command(state, config) if plugin == "export" else target_command(state, config, 0)
    sockets = [keep_for_children(bind_unix(path))]
    sockets.append(keep_for_children(bind_tcp(("127.0.0.1", 0), shared=False)))
    pid = spawn(path.with_suffix(".pid"), [*command, LIMIT], sockets)
    try:
        yield sockets[1].getsockname()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for one in sockets:
            one.close()


@pytest.mark.real
@pytest.mark.parametrize(("plugin", "export"), [("target", "d"), ("export", "d@latest")])
def test_over_tcp_and_by_tls(plugin: str, export: str, named: Disk, files: Path, short_path: Path) -> None:
    fix_clock(named.state.clock, named.clock_ns)
    sealed.make_key(named.state)
    path = short_path / "nbd"
    sealed_name = sealed.seal(export, sealed.secret_of(sealed.load_key(named.state), named.timeline.uuid))
    with listening(plugin, named, files, path) as where:
        session = nbd.NBD()
        session.set_uri_allow_local_file(True)
        session.connect_uri(Credential(str(files / "hv1")).added_to(tcp_uri(sealed_name, where, tls=True)))
        wires = [
            connect(where),
            promised(where),
            by_tls(where, files),
            asked_about(by_tls(where, files), sealed_name),
            asked_about(connect(path), export),
        ]
        for wire in wires:
            is_ended(wire)
        assert session.pread(BLOCK, BLOCK) == bytes([5]) * BLOCK
        session.shutdown()


@pytest.mark.real
def test_who_reads_a_backup_or_sends_one_chooses_a_disk_too(tmp_path: Path, short_path: Path) -> None:
    place = DirectoryPlace(tmp_path / "repo")
    create(place, chunk_size=STEP)
    with Repository(place, cache=tmp_path / "cache") as repository:
        backup = full(repository, b"b" * STEP)
    path = short_path / "nbd"
    with alone("backup", [f"repo={place.where}", LIMIT], path):
        session = nbd.NBD()
        session.set_export_name(f"{backup.id}/{DISK}")
        session.connect_unix(str(path))
        is_ended(connect(path))
        is_ended(asked_about(connect(path), f"{backup.id}/{DISK}"))
        assert session.pread(BLOCK, 0) == b"b" * BLOCK
        session.shutdown()

    ours, theirs = socket.socketpair()
    intent = Intent("b2", 2, "web", FULL, "for a test", "", (Sent(DISK, STEP), Sent("web/vdb", STEP)))
    path = short_path / "sent"
    process = subprocess.Popen(
        [*receiver.command(path), f"control={theirs.fileno()}", LIMIT],
        env=receiver.environment(),
        pass_fds=[theirs.fileno()],
    )
    try:
        with ours:
            theirs.close()
            asked = {"repo": place.where, "secret": None, "cache": str(tmp_path / "cache")}
            ours.sendall(messages.pack({**asked, "intent": asdict(intent)}))
            assert messages.receive(ours) == {"ok": True}
            session = nbd.NBD()
            session.set_export_name("web/vdb")
            session.connect_unix(str(path))
            is_ended(connect(path))
            session.pwrite(b"c" * BLOCK, 0)
            is_ended(asked_about(connect(path), DISK))
    finally:
        process.kill()
        process.wait()


def test_only_a_thread_that_is_late_and_waits_for_a_socket_is_cut() -> None:
    negotiations = Negotiations(10.0)
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
