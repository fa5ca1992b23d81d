"""Roles on the API's socket: real processes with real groups ask a real service."""

import grp
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver.config import Config, parse_config
from cdpserver.errors import ForbiddenError, UsageError
from cdpserver.service.roles import Role, Roles
from cdpserver.state import StateDir
from tests.test_service import Server

STRANGER = 54321
"""A user of no group that means anything."""

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to ask as somebody else"),
]

GROUPS = ("games", "news", "mail")
"""Groups of every Debian, for viewer, operator and admin."""

CLIENT = """
import http.client, json, socket, sys
path, method, target, body = sys.argv[1:]
connection = http.client.HTTPConnection("cdp")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(path)
connection.request(method, target, body or None, {"Content-Type": "application/json"})
reply = connection.getresponse()
print(json.dumps([reply.status, json.loads(reply.read())]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with the three roles."""
    config = tmp_path_factory.mktemp("config") / "cdpserver.toml"
    viewer, operator, admin = GROUPS
    config.write_text(f"[roles]\nviewer = '{viewer}'\noperator = '{operator}'\nadmin = '{admin}'\n")
    with tempfile.TemporaryDirectory(prefix="cdp-") as path:
        os.chmod(path, 0o711)
        with Server(Path(path) / "s", "--config", str(config)) as running:
            yield running


def ask(server: Server, groups: tuple[str, ...], method: str, target: str, **body: Any) -> tuple[int, Any]:
    """(status, answer) for a process of another user with these groups besides its own."""
    gids = ",".join(str(grp.getgrnam(group).gr_gid) for group in groups)
    more = ["--groups", gids] if gids else ["--clear-groups"]
    become = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", *more, "--"]
    path, sent = str(server.state_dir / "api.sock"), json.dumps(body) if body else ""
    done = subprocess.run(
        [*become, "/usr/bin/python3", "-c", CLIENT, path, method, target, sent],
        capture_output=True,
        check=True,
        cwd="/",
    )
    status, answer = json.loads(done.stdout)
    return status, answer


OPERATIONS: tuple[tuple[str, str, dict[str, Any], Role], ...] = (
    ("GET", "/v1/status", {}, Role.VIEWER),
    ("GET", "/v1/disks", {}, Role.VIEWER),
    ("GET", "/v1/events", {}, Role.VIEWER),
    ("POST", "/v1/disks/none:mark", {"name": "m"}, Role.OPERATOR),
    ("POST", "/v1/disks/none:cut", {}, Role.OPERATOR),
    ("POST", "/v1/forks", {"point": "none@latest", "name": "f"}, Role.OPERATOR),
    ("GET", "/v1/disks/none:tree", {}, Role.VIEWER),
    ("DELETE", "/v1/jobs/1", {}, Role.OPERATOR),
    ("GET", "/v1/files?point=none@latest", {}, Role.OPERATOR),
    ("GET", "/v1/files:content?point=none@latest&path=/f", {}, Role.OPERATOR),
    ("POST", "/v1/recoveries", {"point": "none@latest", "to": "/h", "qmp": "/q"}, Role.OPERATOR),
    ("POST", "/v1/recoveries", {"point": "none@latest", "to": "/h", "vm_command": "/c"}, Role.ADMIN),
    ("POST", "/v1/recoveries", {"point": "none@latest", "to": "/h", "libvirt": "qemu:///none"}, Role.ADMIN),
    ("POST", "/v1/drills", {"point": "none@latest"}, Role.OPERATOR),
    ("POST", "/v1/drills", {"point": "none@latest", "vm_command": "/c"}, Role.ADMIN),
    ("POST", "/v1/drills", {"point": "none@latest", "check": "/c"}, Role.ADMIN),
    ("POST", "/v1/disks/none:merge", {"verb": "delete", "point": "bp:0"}, Role.ADMIN),
    ("POST", "/v1/disks", {"name": "?", "size": 1}, Role.ADMIN),
    ("DELETE", "/v1/disks/none", {}, Role.ADMIN),
    ("DELETE", "/v1/forks/none", {}, Role.ADMIN),
)


@pytest.mark.parametrize("role", [role for role in Role if role != Role.PROTECT])
def test_each_role_may_do_what_is_its_own_and_no_more(server: Server, role: Role) -> None:
    groups = (GROUPS[role - 1],) if role else ()
    for method, target, body, least in OPERATIONS:
        status, answer = ask(server, groups, method, target, **body)
        if role >= least:
            assert status in (200, 400, 404), answer
        else:
            assert (status, answer["error"], answer["exit_code"]) == (403, "forbidden", 3)
            assert all(group in answer["hint"] for group in GROUPS[least - 1 :])
    assert server.get("/v1/disks") == []


def test_the_highest_of_several_groups_counts(server: Server) -> None:
    assert ask(server, ("games", "mail", "news"), "DELETE", "/v1/disks/none")[0] == 404


def test_the_description_says_who_may(server: Server) -> None:
    paths = server.get("/v1/openapi.json")["paths"]
    assert paths["/v1/disks"]["get"]["x-least-role"] == "viewer"
    assert paths["/v1/disks"]["post"]["x-least-role"] == "admin"
    assert paths["/v1/disks/{name}:cut"]["post"]["x-least-role"] == "operator"


def test_nothing_but_the_socket_is_opened(server: Server) -> None:
    server.add("d")
    assert stat.S_IMODE(server.state_dir.stat().st_mode) == 0o711
    paths = [path for path in server.state_dir.iterdir() if not path.is_symlink()]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert modes.pop("api.sock") == 0o666
    assert {name for name, mode in modes.items() if mode & 0o077} == set()


def test_a_socket_that_is_kept_stays_open_while_the_service_starts(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    for path in (state.api_socket, state.events):
        path.touch(mode=0o666)
        path.chmod(0o666)
    before = os.umask(0o022)
    try:
        Roles.of(Config(role_viewer="games")).open_up(state)
    finally:
        os.umask(before)
    assert stat.S_IMODE(state.api_socket.stat().st_mode) == 0o666
    assert stat.S_IMODE(state.events.stat().st_mode) == 0o600


def test_without_roles_the_directory_is_shut_again(short_path: Path) -> None:
    config = short_path / "c.toml"
    config.write_text("[roles]\nviewer = 'games'\n")
    with Server(short_path / "s", "--config", str(config)) as server:
        assert server.stop() == 0
    with Server(short_path / "s") as server:
        assert stat.S_IMODE(server.state_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((server.state_dir / "api.sock").stat().st_mode) == 0o600


def test_a_group_that_is_none_stops_the_start(short_path: Path) -> None:
    config = short_path / "c.toml"
    config.write_text("[roles]\nadmin = 'no-such-group'\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "cdpserver.service.main",
            "--state-dir",
            str(short_path / "s"),
            "--config",
            str(config),
        ],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 2
    assert "groupadd no-such-group" in done.stderr


def test_who_is_named_in_the_hint_when_a_role_has_no_group() -> None:
    roles = Roles.of(Config(role_viewer="games"))
    roles.check(Role.VIEWER, Role.VIEWER, "looking")
    with pytest.raises(ForbiddenError) as refused:
        roles.check(Role.VIEWER, Role.ADMIN, "removing")
    assert "root" in refused.value.hint
    for wrong in ("1", "'a b'", "''", f"'{'x' * 33}'"):
        with pytest.raises(UsageError):
            parse_config(f"[roles]\nviewer = {wrong}")
