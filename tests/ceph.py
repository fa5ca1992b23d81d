"""An S3 server of our own on loopback: Debian's Ceph, one monitor, one object store in memory, one gateway.

Also a way to it that fails on request, for what a network and a busy store do.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.kit.processes import TooLate

KEY, SECRET = "AKTEST", "SKTEST"
UP_S = 120.0

CONFIG = """\
[global]
fsid = {fsid}
mon initial members = a
mon host = [v2:127.0.0.1:{mon},v1:127.0.0.1:{old}]
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon pg warn min per osd = 0
mon max pg per osd = 2000
osd pool default pg autoscale mode = off
run dir = {path}
admin socket = {path}/$name.asok
log file = {path}/$name.log
pid file = {path}/$name.pid
keyring = {path}/keyring
[mon]
mon data = {path}/mon
mon data avail warn = 1
mon data avail crit = 1
[osd]
osd data = {path}/osd
osd objectstore = memstore
memstore device bytes = 1073741824
osd memory target = 939524096
osd max object name len = 2048
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{s3}
rgw data = {path}/rgw
rgw thread pool size = 16
rgw enable usage log = false
"""


class ObjectStore:
    """As a context: up, with one user, until its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ports = free_ports(4)
        self.endpoint = f"http://127.0.0.1:{self.ports[2]}"
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "ObjectStore":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("mon", "osd", "rgw"):
            (self.path / name).mkdir()
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        text = CONFIG.format(
            fsid=fsid, mon=self.ports[0], old=self.ports[1], s3=self.ports[2], path=self.path
        )
        (self.path / "conf").write_text(text)
        keyring, monmap = self.path / "keyring", self.path / "monmap"
        make = ["ceph-authtool", keyring, "--gen-key", "-n"]
        self.run(*make, "mon.", "--create-keyring", "--cap", "mon", "allow *")
        self.run(*make, "client.admin", "--cap", "mon", "allow *", "--cap", "osd", "allow *")
        self.run(*make, "client.rgw.a", "--cap", "mon", "allow rwx", "--cap", "osd", "allow rwx")
        self.run(*make, "osd.0", "--cap", "mon", "allow profile osd", "--cap", "osd", "allow *")
        address = f"[v2:127.0.0.1:{self.ports[0]},v1:127.0.0.1:{self.ports[1]}]"
        self.run("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monmap)
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._serve("ceph-mon", "-i", "a")
        self.run("ceph", "osd", "new", osd, "0")
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._serve("ceph-osd", "-i", "0")
        self._serve("radosgw", "-n", "client.rgw.a")
        wait_for_port(self.ports[2])
        self.run(
            "radosgw-admin", "user", "create", "--uid", "t", "--display-name", "t",
            "--access-key", KEY, "--secret-key", SECRET,
        )  # fmt: skip

    def run(self, *command: object) -> str:
        """One of Ceph's tools, to its end."""
        return subprocess.run(
            [str(word) for word in command],
            check=True, capture_output=True, text=True, timeout=UP_S, env=self._environment(), cwd=self.path,
        ).stdout  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.path / "conf")}

    def _serve(self, *command: str) -> None:
        with open(self.path / f"{command[0]}.out", "wb") as out:
            self._running.append(
                subprocess.Popen(
                    [*command, "-f"], env=self._environment(), cwd=self.path, stdout=out, stderr=out,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )
            )  # fmt: skip

    def stop(self) -> None:
        """What was stored goes with it."""
        for process in self._running:
            process.kill()
            process.wait()
        self._running.clear()
        shutil.rmtree(self.path, ignore_errors=True)

    def client(self) -> Any:
        """Of somebody who has the same credentials, and no manners."""
        from botocore.config import Config
        from botocore.session import Session

        return Session().create_client(
            "s3", region_name="us-east-1", endpoint_url=self.endpoint, aws_access_key_id=KEY,
            aws_secret_access_key=SECRET, config=Config(s3={"addressing_style": "path"}),
        )  # fmt: skip


def free_ports(count: int) -> list[int]:
    """That nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_port(port: int) -> None:
    """Until somebody listens."""
    deadline = time.monotonic() + UP_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise TooLate("the S3 gateway does not come up") from None
            time.sleep(0.1)


SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n\r\n"
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>reduce your request rate</Message></Error>"
)
FULL = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close\r\n\r\n"
    b"<?xml version='1.0'?><Error><Code>QuotaExceeded</Code><Message>the bucket is full</Message></Error>"
)


class BadWay:
    """A port that leads to another one; its next connections fail as they are told to.

    bytes      answered with these, and nothing is passed on
    int        cut after so many bytes of what is asked; negative: of what is answered
    None       never answered
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.faults: list[bytes | int | None] = []
        self.connections = 0
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """With all of its connections."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for one in [self._socket, *self._open]:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(client)
            self.connections += 1
            if not self.faults:
                self._join(client, 1 << 60, 1 << 60)
                continue
            fault = self.faults.pop(0)
            if isinstance(fault, bytes):
                threading.Thread(target=_answer, args=(client, fault), daemon=True).start()
            elif isinstance(fault, int):
                self._join(client, fault if fault > 0 else 1 << 60, -fault if fault < 0 else 1 << 60)

    def _join(self, client: socket.socket, asked: int, answered: int) -> None:
        server = socket.create_connection(("127.0.0.1", self._to))
        self._open.append(server)
        for source, sink, most in ((client, server, asked), (server, client, answered)):
            threading.Thread(target=_pump, args=(source, sink, most), daemon=True).start()


def _answer(client: socket.socket, data: bytes) -> None:
    """After the whole of a small request, or the head of a large one."""
    with contextlib.suppress(OSError):
        client.recv(1 << 16)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1 << 16):
            pass


def _pump(source: socket.socket, sink: socket.socket, most: int) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(min(1 << 16, most)):
            sink.sendall(data)
            most -= len(data)
            if not most:
                break
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def bad_way(store: ObjectStore) -> Iterator[BadWay]:
    """A way to the store that can be told to fail."""
    way = BadWay(store.ports[2])
    try:
        yield way
    finally:
        way.close()
