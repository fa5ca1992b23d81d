"""A VM whose QEMU is on another host than the service: an agent beside it has the API's socket, and NBD over TCP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_protect import disk, guest
from tests.test_protect_resync import CLUSTER, SIZE, anchored, ours, same, source
from tests.test_service import ApiError, Server, until
from tools.kit.processes import stop
from tools.kit.qmp import Qmp
from tools.kit.source import Source

pytestmark = pytest.mark.real


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class There:
    """The other host: a directory with a socket that leads to the service's, as ssh forwards it."""

    def __init__(self, directory: Path, state: Path) -> None:
        self.directory = directory / "there"
        self.directory.mkdir()
        (self.directory / "api.sock").symlink_to(state / "api.sock")
        self._log = directory / "agent.log"
        self.start()

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "recovery.cli", "agent", "hv1", "--state-dir", str(self.directory)],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [
            sys.executable,
            "-m",
            "recovery.cli",
            *arguments,
            "--json",
            "--state-dir",
            str(self.directory),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def cdp(self, *arguments: str) -> Any:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def there_again(server: Server, made: Source, *, wait: bool) -> dict[str, Any]:
    """As `cdp protect --by hv1` says it again."""
    found = {"name": "disk0", "device": "disk0", "size": SIZE}
    body = {"qmp": str(made.monitor), "disks": [found], "wait": wait}
    return dict(server.request("PUT", "/v1/agents/hv1/vms/web", body))


@contextlib.contextmanager
def there(directory: Path, state: Path) -> Iterator[There]:
    other = There(directory, state)
    try:
        yield other
    finally:
        stop(other.agent)


def test_an_agent_on_another_host(short_path: Path) -> None:
    state = short_path / "state"
    listen = ("--listen", f"127.0.0.1:{free_port()}")
    with source(short_path) as made, there(short_path, state) as other:
        with Server(state, *listen) as server:
            protect = ("protect", "web", "--qmp", str(made.monitor), "--disk", "disk0", "--by", "hv1")
            shown = other.cdp(*protect, "--wait-synced")
            assert shown["by"] == "hv1" and shown["disks"][0]["state"] == "synced"
            assert shown["disks"][0]["uri"].startswith("nbd://127.0.0.1:")
            refused = other.run(*protect, "--agent", "/run/qemu/web.agent")
            assert refused.returncode == 2 and "--agent does not go with --by" in refused.stderr
            with pytest.raises(ApiError, match="runs beside the agent hv1"):
                server.post("/v1/disks/web:mark", name="quiet", freeze=True)
            first = anchored(server)
            assert first["resync"]["why"] == "the first copy"
            assert server.get("/v1/points/web/disk0@latest")["evidence"]["observed"]["by"] == "agent"
            with guest(made) as writes:
                writes.pwrite(b"1" * CLUSTER, 0)
                assert same(server, made)

                # The agent dies: the mirror goes on, and it is said that nobody looks. The next one takes it over.
                other.agent.kill()
                other.agent.wait()
                with pytest.raises(ApiError, match="mirrored in another way by the agent hv1"):
                    there_again(server, made, wait=True)
                assert there_again(server, made, wait=False)["by"] == "hv1"
                writes.pwrite(b"2" * CLUSTER, CLUSTER)
                assert same(server, made)
                until(lambda: "has not reported" in disk(server)["reason"], "notice of the silence")
                other.start()
                until(lambda: anchored(server)["bitmap"] != first["bitmap"], "the next agent's anchor")

                # The API hangs, and the mirror's server does not: nobody takes the guest away from it.
                until(lambda: disk(server)["state"] == "synced", "in sync")
                os.kill(server.process.pid, signal.SIGSTOP)
                try:
                    until_s = time.monotonic() + 2.5
                    while time.monotonic() < until_s:
                        writes.pwrite(b"5" * CLUSTER, 4 * CLUSTER)
                finally:
                    os.kill(server.process.pid, signal.SIGCONT)
                until(lambda: same(server, made), "what was written meanwhile")
                assert not server.events("disk.guest-freed") and not server.events("disk.gap")

                # A worker dies.
                os.kill(server.pids()["target-0"], signal.SIGKILL)
                writes.pwrite(b"3" * CLUSTER, 2 * CLUSTER)
                until(lambda: same(server, made), "the write to the next worker")
            assert {event["agent"] for event in server.events("disk.protected")} == {"hv1"}
            server.stop()
        with guest(made) as writes:
            writes.pwrite(b"4" * CLUSTER, 3 * CLUSTER)
        with Server(state, *listen) as server:
            until(lambda: same(server, made), "what was written without the service")
            anchored(server)
            assert "hv1" in other.cdp("protect", "web", "--remove")["left"]

            def gone() -> bool:
                with contextlib.suppress(OSError), Qmp(made.monitor) as qmp:
                    return not ours(qmp)
                return False

            until(gone, "the end of the mirror")
