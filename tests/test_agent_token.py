"""`cdp agent` on another host, as docs/security.md sets it up: the API and NBD over TCP with TLS, and a token to protect with."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdpserver import tls, tokens
from cdpserver.state import StateDir
from tests.test_protect import guest
from tests.test_protect_agent import free_port
from tests.test_protect_resync import CLUSTER, anchored, ours, same, source
from tests.test_service import Server, until
from tests.test_tls import files
from tools.kit.processes import stop
from tools.kit.qmp import Qmp

__all__ = ["files"]  # a fixture

pytestmark = pytest.mark.real


class Elsewhere:
    """The other host: `cdp` with no state directory, that knows where the API is and has a token in a file."""

    def __init__(self, directory: Path, files: Path, port: int, role: str, text: str) -> None:
        self.files = files
        self.log = directory / f"{role}.log"
        self._token = directory / f"{role}.token"
        self._token.touch(mode=0o600)
        self._token.write_text(text + "\n")
        self._environment = os.environ | {
            "CDP_API": f"https://127.0.0.1:{port}",
            "CDP_API_CA": str(files / "tls" / tls.CA),
            "CDP_TOKEN_FILE": str(self._token),
        }

    def cdp(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "recovery.cli", *arguments, "--json"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=self._environment,
        )

    @contextlib.contextmanager
    def agent(self) -> Iterator["subprocess.Popen[bytes]"]:
        command = ["-m", "recovery.cli", "agent", "hv1", "--tls", str(self.files / "hv1")]
        with open(self.log, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command], stdin=subprocess.DEVNULL, stderr=log, env=self._environment
            )
        try:
            yield process
        finally:
            stop(process)

    def said(self) -> str:
        return self.log.read_text()


def test_an_agent_needs_the_token_to_protect_and_no_more(files: Path, short_path: Path) -> None:
    api, config = free_port(), short_path / "c.toml"
    config.write_text(
        f"listen = '127.0.0.1:{free_port()}'\nlisten_api = '127.0.0.1:{api}'\n"
        f"[tls]\ncertificates = '{files / 'tls'}'\n"
    )
    state = short_path / "state"
    with source(short_path) as made, Server(state, "--config", str(config)) as server:
        texts = {
            role: tokens.add(StateDir(state), "hv1" if role == "protect" else role, role)
            for role in tokens.ROLES
        }
        at = {role: Elsewhere(short_path, files, api, role, text) for role, text in texts.items()}
        protect = ("protect", "web", "--qmp", str(made.monitor), "--disk", "disk0", "--by", "hv1")
        for role in ("protect", "viewer", "operator"):
            done = at[role].cdp(*protect)
            assert done.returncode == 3 and "protect_agent_vm" in done.stderr, done
        assert at["admin"].cdp(*protect).returncode == 0

        # One who may only look hears so, and QEMU sees nothing of him.
        with at["viewer"].agent():
            until(lambda: "takes the role operator" in at["viewer"].said(), "refusal of a viewer")
        with Qmp(made.monitor) as qmp:
            assert not ours(qmp)

        with at["protect"].agent() as agent:
            assert anchored(server)["resync"]["why"] == "the first copy"
            with guest(made) as writes:
                writes.pwrite(b"1" * CLUSTER, 0)
                assert same(server, made)
            seen = server.get("/v1/points/web/disk0@latest")
            assert seen["evidence"]["observed"]["by"] == "agent"
            # The same token is good for nothing else, on whatever way.
            for refused in (
                ("disk", "list"),
                ("disk", "uri", "web/disk0"),
                ("uri", "web/disk0@latest"),
                ("disk", "add", "x", "--size", "1M"),
                ("bookmark", "add", "web/disk0", "mine"),
                ("protect", "web", "--remove"),
                ("token", "list"),
            ):
                done = at["protect"].cdp(*refused)
                assert done.returncode, refused
            for text in (at["protect"].said(), server.log.read_text(), (state / "events.jsonl").read_text()):
                assert not [secret for secret in texts.values() if secret in text]
            shown = [Path(f"/proc/{agent.pid}/{what}").read_bytes() for what in ("cmdline", "environ")]
            assert not [s for s in texts.values() if any(s.encode() in text for text in shown)]
            assert agent.poll() is None

            # Removed it is refused at once; the mirror goes on.
            tokens.remove(StateDir(state), "hv1")
            until(lambda: "token" in at["protect"].said(), "refusal of a token that is gone")
            with guest(made) as writes:
                writes.pwrite(b"2" * CLUSTER, CLUSTER)
                assert same(server, made)
