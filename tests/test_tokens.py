"""The control API over TCP: TLS and tokens, and what each role may do of all that there is."""

import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fastapi import FastAPI

from cdpserver import sealed, timeline, tls, tokens
from cdpserver.config import Config, parse_config
from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UnreachableError, UsageError
from cdpserver.events import EventLog
from cdpserver.service.api import rights, server
from cdpserver.service.roles import Role, Roles
from cdpserver.state import StateDir
from recovery.client import Client
from recovery.endpoint import Endpoint
from tests.test_protect_agent import free_port
from tests.test_service import Server, connected
from tests.test_tls import files

__all__ = ["files"]

ROLES = ("viewer", "operator", "admin")


class Far:
    """A service with its API over TCP, and a token of each role."""

    def __init__(self, server: Server, directory: Path, port: int) -> None:
        self.server, self.directory, self.port = server, directory, port
        self.ca = str(directory / "tls" / tls.CA)
        self.tokens: dict[str, str] = {}

    def cdp(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "recovery.cli", *arguments, "--state-dir", str(self.server.state_dir)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **environment},
        )

    def ask(self, token: str | None, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        context = ssl.create_default_context(cafile=self.ca)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=context)
        try:
            headers = {"Content-Type": "application/json"} | (
                {} if token is None else {"Authorization": f"Bearer {token}"}
            )
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
            return answer.status, json.loads(text) if is_json else text
        finally:
            connection.close()


@pytest.fixture(scope="module")
def far(files: Path) -> Iterator[Far]:
    port = free_port()
    config = files / "cdpserver.toml"
    config.write_text(f"listen_api = '127.0.0.1:{port}'\n[tls]\ncertificates = '{files / 'tls'}'\n")
    with Server(files / "s", "--config", str(config)) as server:
        found = Far(server, files, port)
        for role in ROLES:
            found.tokens[role] = tokens.add(StateDir(server.state_dir), f"a-{role}", role)
        agent = files / "hv1.token"
        assert found.cdp("token", "add", "hv1", "--role", "protect", "--out", str(agent)).returncode == 0
        found.tokens["protect"] = agent.read_text().strip()
        yield found


pytestmark = pytest.mark.real


def operations(far: Far) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(name, method, path with something that is not there, description) of each."""
    for path, methods in far.server.get("/v1/openapi.json")["paths"].items():
        for method, described in methods.items():
            whole = path.replace("{agent}", "hv1")
            while "{" in whole:
                before, _, rest = whole.partition("{")
                whole = f"{before}none{rest.partition('}')[2]}"
            yield described["operationId"], method.upper(), whole, described


def may(role: str, operation: str) -> bool:
    """What docs/security.md says of the roles."""
    if role == "protect":
        return operation in rights.AGENTS_OWN
    return rights.LEAST[operation] <= Role[role.upper()]


def test_every_route_is_held_to_its_role(far: Far) -> None:
    """A body that is none, or a name that there is not: whoever may, is told so; whoever may not, is not asked."""
    seen = set()
    for operation, method, path, described in operations(far):
        seen.add(operation)
        assert described["x-least-role"] == rights.LEAST[operation].name.lower()
        for role, token in far.tokens.items():
            if operation == "stream_events" and may(role, operation):
                continue  # which has no end
            status, answer = far.ask(token, method, path, None if method == "GET" else [])
            if may(role, operation):
                assert status in (200, 400, 404, 409), (role, operation, status, answer)
                assert operation not in rights.LOCAL_ONLY or status == 409
            else:
                assert (status, answer["error"]) == (403, "forbidden"), (role, operation, status, answer)
        status, answer = far.ask(None, method, path, None if method == "GET" else [])
        assert (status, answer["error"]) == (401, "forbidden"), operation
    assert seen == rights.LEAST.keys()
    # The roles are a chain, and each has what the next has not; what loses something is for admins.
    assert seen >= rights.AGENTS_OWN | rights.LOCAL_ONLY
    sets = (rights.LOOKS, rights.OPERATES, rights.READS, rights.RULES)
    assert sum(map(len, sets)) == len(seen)
    assert not [name for name in rights.RULES if name.startswith(("list_", "show_"))]


def test_an_agent_asks_for_its_own_vms_only(far: Far) -> None:
    token = far.tokens["protect"]
    far.server.add("theirs")
    assert far.ask(token, "GET", "/v1/agents/hv1/vms") == (200, [])
    found = {"name": "disk0", "device": "disk0", "size": 1 << 20}
    mine = {"qmp": "/run/qemu/web.qmp", "disks": [found], "wait": False}
    # Which VMs are its own is not for the agent to say.
    assert far.ask(token, "PUT", "/v1/agents/hv1/vms/web", mine)[0] == 403
    assert far.ask(far.tokens["admin"], "PUT", "/v1/agents/hv1/vms/web", mine)[0] == 200
    assert [vm["vm"] for vm in far.ask(token, "GET", "/v1/agents/hv1/vms")[1]] == ["web"]
    assert far.ask(token, "GET", "/v1/mirror?disk=web/disk0")[0] == 200
    for method, path, body in (
        ("GET", "/v1/agents/hv2/vms", None),
        ("POST", "/v1/agents/hv2:report", {"vms": [], "events": []}),
        ("GET", "/v1/mirror?disk=theirs", None),
        ("POST", "/v1/mirror:lost", {"disk": "theirs", "session": 1, "reason": "r", "whole_ns": 0}),
        ("POST", "/v1/mirror:size", {"disk": "theirs", "size": 1 << 30}),
    ):
        status, answer = far.ask(token, method, path, body)
        assert (status, answer["error"]) == (403, "forbidden"), (path, answer)


def test_no_token_no_answer(far: Far) -> None:
    wrong = (None, "", "cdp_", "x" * 5000, far.tokens["admin"][:-1], far.tokens["admin"].upper(), "ä")
    for token in wrong:
        sent = token.encode("utf-8").decode("latin-1") if token else token
        for path in ("/v1/status", "/v1/openapi.json", "/nothing"):
            assert far.ask(sent, "GET", path)[0] == 401
    assert far.ask(far.tokens["viewer"], "GET", "/v1/status")[0] == 200
    # Neither what was right nor what was wrong is on record.
    said = far.server.log.read_text() + (far.server.state_dir / "events.jsonl").read_text()
    assert "service.token-refused" in said
    assert not [token for token in far.tokens.values() if token in said or token[:-1] in said]
    # Without TLS there is nothing; the Unix socket asks for no token.
    with socket.create_connection(("127.0.0.1", far.port), timeout=60) as plain:
        plain.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in plain.recv(100)
    assert far.server.get("/v1/status")


def test_a_token_that_is_removed_is_refused_at_once(far: Far) -> None:
    text = json.loads(far.cdp("token", "add", "brief", "--role", "viewer", "--json").stdout)["token"]
    assert far.ask(text, "GET", "/v1/status")[0] == 200
    listed = json.loads(far.cdp("token", "list", "--json").stdout)
    assert {"brief": "viewer", "hv1": "protect"}.items() <= {
        row["name"]: row["role"] for row in listed
    }.items()
    again = far.cdp("token", "add", "brief", "--role", "viewer")
    assert again.returncode == 3 and "cdp token remove brief" in again.stderr
    assert far.cdp("token", "remove", "brief").returncode == 0
    assert far.ask(text, "GET", "/v1/status")[0] == 401
    assert far.cdp("token", "remove", "brief").returncode == 2
    stored = far.server.state_dir / "tokens.json"
    assert stored.stat().st_mode & 0o777 == 0o600
    assert not [token for token in far.tokens.values() if token in stored.read_text()]
    assert {"token.added", "token.removed"} <= {
        json.loads(line)["event"] for line in (far.server.state_dir / "events.jsonl").read_text().splitlines()
    }


def test_tokens_that_cannot_be_read_let_nobody_in(far: Far) -> None:
    stored = far.server.state_dir / "tokens.json"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:50])
    try:
        status, answer = far.ask(far.tokens["admin"], "GET", "/v1/status")
        assert (status, answer["error"]) == (409, "refused") and str(stored) not in str(answer)
    finally:
        stored.write_bytes(whole)
    assert far.ask(far.tokens["admin"], "GET", "/v1/status")[0] == 200


def test_no_file_is_for_others_and_no_process_shows_a_secret(far: Far) -> None:
    with connected(far.server.add("seen")) as client:
        client.pwrite(b"x" * 4096, 0)
    far.server.synced("seen")
    far.server.post("/v1/disks/seen:cut")
    paths = [path for path in far.server.state_dir.rglob("*") if not path.is_symlink()]
    modes = {str(path): path.stat().st_mode for path in paths if path.exists()}
    assert len(modes) > 30
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}
    key = sealed.load_key(StateDir(far.server.state_dir))
    disk = timeline.load(far.server.state_dir / "timelines" / far.server.get("/v1/disks/seen")["id"])
    secrets = [*far.tokens.values(), key.hex(), sealed.secret_of(key, disk.uuid)]
    shown = [far.server.log.read_text()]
    for pid in (far.server.process.pid, *far.server.pids().values()):
        shown += [
            Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace")
            for what in ("cmdline", "environ")
        ]
    shown += [path.read_text() for path in far.server.state_dir.glob("events*.jsonl")]
    assert not [secret for secret in secrets if any(secret in text for text in shown)]


def test_cdp_speaks_to_it(far: Far, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(far.tokens["viewer"] + "\n")
    api = {"CDP_API": f"https://127.0.0.1:{far.port}", "CDP_API_CA": far.ca, "CDP_TOKEN_FILE": str(token)}
    done = far.cdp("disk", "list", "--json", **api)
    assert done.returncode == 0, done.stderr
    refused = far.cdp("disk", "add", "x", "--size", "1M", **api)
    assert refused.returncode == 3 and "takes the role admin" in refused.stderr
    for change, why in (
        ({"CDP_API": f"https://localhost:{far.port}"}, "CDP_API_CA"),  # not what its certificate says
        ({"CDP_API_CA": str(tmp_path)}, "CDP_API_CA"),
        ({"CDP_API": "http://127.0.0.1:1"}, "https://HOST:PORT"),
        ({"CDP_TOKEN_FILE": str(tmp_path / "none")}, "there is no token"),
    ):
        done = far.cdp("disk", "list", **(api | change))
        assert done.returncode != 0 and why in done.stderr, done.stderr
    token.chmod(0o644)
    assert "open to others" in far.cdp("disk", "list", **api).stderr


# --- without a service


def test_tokens_are_kept_as_hashes(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    known = tokens.Known(state)
    assert tokens.load(state) == [] and known.find("cdp_x") is None
    texts = {role: tokens.add(state, f"t-{role}", role) for role in tokens.ROLES}
    assert len(set(texts.values())) == 4 and all(len(text) == 47 for text in texts.values())
    for role, text in texts.items():
        found = known.find(text)
        assert found is not None and (found.name, found.role) == (f"t-{role}", role)
        assert "hash" not in found.as_dict()
    for wrong in (
        "",
        "cdp_",
        texts["admin"][:-1],
        texts["admin"] + "x",
        "cdp_" + "é" * 43,
        "cdp_" + "x" * 10_000,
    ):
        assert known.find(wrong) is None
    with pytest.raises(RefusedError, match="already"):
        tokens.add(state, "t-admin", "viewer")
    with pytest.raises(UsageError, match="not a role"):
        tokens.add(state, "x", "root")
    tokens.remove(state, "t-admin")
    assert known.find(texts["admin"]) is None and known.find(texts["viewer"]) is not None
    with pytest.raises(NotFoundError):
        tokens.remove(state, "t-admin")
    for damage in ('{"tokens": 1}', '{"tokens": [{"name": "a"}]}', "[]", '{"tokens": [{"role": "root"}]}'):
        state.tokens.write_text(damage)
        for _ in range(2):
            with pytest.raises(CorruptError):
                known.find(texts["viewer"])
    state.tokens.unlink()
    assert known.find(texts["viewer"]) is None


def test_the_api_off_the_socket_takes_certificates() -> None:
    for text in ("listen_api = '127.0.0.1:1'", "listen_api = '127.0.0.1:1'\n[tls]\npsk = '/k'"):
        with pytest.raises(UsageError, match="listen_api takes TLS"):
            parse_config(text)
    same = "listen_api = '127.0.0.1:1'\nlisten = '127.0.0.1:1'\n[tls]\ncertificates = '/t'"
    with pytest.raises(UsageError, match="listen and listen_api are the same"):
        parse_config(same)
    far = parse_config("listen_api = '192.0.2.1:1'\n[tls]\ncertificates = '/t'")
    assert far == Config(listen_api=("192.0.2.1", 1), tls_certificates="/t")


def test_where_the_api_is(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateDir(short_path)
    monkeypatch.delenv("CDP_API", raising=False)
    here = Endpoint.chosen(state)
    assert str(here) == str(state.api_socket) and here.headers() == {}
    monkeypatch.setenv("CDP_API", "https://[2001:db8::1]:8443/")
    assert (Endpoint.chosen(state).host, Endpoint.chosen(state).port) == ("2001:db8::1", 8443)
    for wrong in (
        "host",
        "https://host",
        "http://h:1",
        "https://h:x",
        "https://u@h:1",
        "https://h:1/v1",
        "https://[",
    ):
        monkeypatch.setenv("CDP_API", wrong)
        with pytest.raises(UsageError, match="CDP_API"):
            Endpoint.chosen(state)
    monkeypatch.setenv("CDP_API", f"https://127.0.0.1:{free_port()}")
    file = short_path / "token"
    monkeypatch.setenv("CDP_TOKEN_FILE", str(file))
    for text in ("", "a b", "é", "x" * 300):
        file.write_text(text)
        file.chmod(0o600)
        with pytest.raises(UsageError, match="has no token"):
            Endpoint.chosen(state).headers()
    file.write_text("cdp_x\n")
    assert Endpoint.chosen(state).headers() == {"Authorization": "Bearer cdp_x"}
    with pytest.raises(UnreachableError) as nobody:
        Client(state).status()
    assert "listen_api" in nobody.value.hint


def test_who_shows_no_token_is_closed_and_keeps_no_place(
    short_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the handshake, and after it. The clock jumps when both sides wait for it, and for nothing else."""
    monkeypatch.setattr(server, "MAX_REMOTE", 2)
    clock = trio.testing.MockClock(autojump_threshold=0.2)
    trio.run(_be_silent, short_path, files, clock=clock)


async def _be_silent(short_path: Path, files: Path) -> None:
    served = server._Server(FastAPI(), Roles({}, {}), EventLog(short_path / "events.jsonl"))
    context = tls.server_context(str(files / "tls"))
    until = trio.Event()
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(short_path / "api.sock"))
        local.listen()
        place = tcp.getsockname()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.run, local, (tcp, context), until)
            trusting = ssl.create_default_context(cafile=str(files / "tls" / tls.CA))
            silent = await trio.open_tcp_stream(*place)
            shaken = trio.SSLStream(
                await trio.open_tcp_stream(*place),
                trusting,
                server_hostname="127.0.0.1",
                https_compatible=True,
            )
            await shaken.do_handshake()
            third = await trio.open_tcp_stream(*place)
            assert await third.receive_some(1) == b""
            assert await silent.receive_some(1) == b""
            assert await shaken.receive_some(1) == b""
            again = await trio.open_tcp_stream(*place)
            assert await again.receive_some(1) == b""
            assert [
                json.loads(line)["event"] for line in (short_path / "events.jsonl").read_text().splitlines()
            ] == ["service.connections-full"]
            # Who goes without a word, as http.client does, keeps no place either, though an idle one might have stayed.
            gone = trio.SSLStream(
                await trio.open_tcp_stream(*place),
                trusting,
                server_hostname="127.0.0.1",
                https_compatible=True,
            )
            await gone.send_all(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await gone.receive_some(100)).startswith(b"HTTP/1.1 404")
            at = trio.current_time()
            await gone.transport_stream.aclose()
            while served._remotes:  # noqa: ASYNC110 - the clock waits for it
                await trio.sleep(0.1)
            assert trio.current_time() - at < 1
            until.set()
