"""The control API against its own description, and in what a description does not say: pages, and clients that stall."""

import base64
import contextlib
import fcntl
import json
import socket
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.test_service import ApiError, Server, UnixConnection, connected, pattern, until

pytestmark = pytest.mark.real

EXAMPLES = 8
"""Requests of each operation. Thousands were tried by hand; the gate is to notice what has become wrong."""

CHECKS = [
    checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with two disks, one with points, a base point and a fork."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as path, Server(Path(path) / "s") as running:
        uri = running.add("vda", vm="web")
        with connected(uri) as client:
            client.pwrite(pattern(1), 0)
            running.post("/v1/disks/web/vda:synced")
            for number in range(4):
                client.pwrite(pattern(number), 4096)
                running.post("/v1/disks/web/vda:mark", name=f"mark-{number}")
        running.post("/v1/forks", point="web/vda@latest", name="fork")
        running.add("empty")
        yield running


# --- the description


class _Relay:
    """HTTP clients of the tests' libraries speak TCP: passes bytes between a port and the service's socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                service = socket.socket(socket.AF_UNIX)
                service.connect(str(self._path))
                for source, sink in ((client, service), (service, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def relay(server: Server) -> Iterator[str]:
    relay = _Relay(server.state_dir / "api.sock")
    yield relay.url
    relay.close()


def test_the_description_names_every_operation_once(server: Server) -> None:
    described = server.get("/v1/openapi.json")
    operations = [
        operation["operationId"] for path in described["paths"].values() for operation in path.values()
    ]
    assert len(set(operations)) == len(operations)
    # Programs are made from these names: they stay.
    assert set(operations) >= {
        "status",
        "show_overview",
        "point_uri",
        "list_disks",
        "add_disk",
        "show_disk",
        "remove_disk",
        "say_synced",
        "list_points",
        "set_bookmark",
        "cut_base_point",
        "list_base_points",
        "add_fork",
        "list_forks",
        "show_fork",
        "remove_fork",
    }
    assert "HTTPValidationError" not in described["components"]["schemas"]


def statuses_of(operation: Any, relay: str) -> set[int]:
    """Ask one operation again and again; every answer is as described. The statuses that were seen."""
    seen = set()

    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.explicit, Phase.generate],
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), known=st.booleans())
    def holds(case: Any, known: bool) -> None:
        # What is there answers more than what is not; removing it would leave the rest without.
        if known and case.method != "DELETE" and "name" in (case.path_parameters or {}):
            case.path_parameters["name"] = "fork" if "forks" in case.path else "web/vda"
        answer = case.call(base_url=relay, timeout=20)
        seen.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    holds()
    return seen


def test_every_operation_keeps_to_the_description(server: Server, relay: str) -> None:
    schema = schemathesis.openapi.from_dict(server.get("/v1/openapi.json"))
    statuses = {}
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        statuses[found.ok().label] = statuses_of(found.ok(), relay)
    assert len(statuses) > 14
    for asked in ("disks", "disks/{name}", "disks/{name}:points", "forks/{name}"):
        assert 200 in statuses[f"GET /v1/{asked}"]
    assert server.events("service.request-failed") == []


@settings(max_examples=30, deadline=None)
@given(
    body=st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_any_body_has_a_defined_answer(server: Server, body: bytes) -> None:
    connection = UnixConnection(server.state_dir / "api.sock")
    connection.request("POST", "/v1/disks", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    said = json.loads(answer.read())
    connection.close()
    assert answer.status == 400
    assert said.keys() == {"error", "message", "hint", "exit_code"}


# --- pages


def pages(server: Server, path: str, size: int) -> Iterator[list[dict[str, Any]]]:
    """Every page of a list."""
    joint = "&" if "?" in path else "?"
    token = None
    while True:
        page = server.get(f"{path}{joint}page_size={size}" + (f"&page_token={token}" if token else ""))
        assert len(page["items"]) <= size
        yield page["items"]
        token = page["next_page_token"]
        if token is None:
            return


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/v1/disks", "name"),
        ("/v1/forks", "name"),
        ("/v1/disks/web/vda:basepoints", "number"),
        ("/v1/disks/web/vda:points?kind=bookmark", "name"),
        ("/v1/disks/web/vda:points?kind=bp", "name"),
    ],
)
def test_the_pages_of_a_list_are_the_list(server: Server, path: str, key: str) -> None:
    whole = [item[key] for item in server.get(path)]
    assert whole
    for size in (1, 2, 1000):
        assert [item[key] for page in pages(server, path, size) for item in page] == whole


def test_pages_of_points_are_in_the_order_of_the_list(server: Server) -> None:
    until(lambda: [p for p in server.get("/v1/disks/web/vda:points") if p["kind"] == "rp"], "recovery point")
    path = "/v1/disks/web/vda:points?since=-1h&until=bp:0"
    assert [p for page in pages(server, path, 1) for p in page] == server.get(path)
    whole = server.get("/v1/disks/web/vda:points")
    assert {p["kind"] for p in whole} == {"rp", "bp", "bookmark"}
    assert [p for page in pages(server, "/v1/disks/web/vda:points", 2) for p in page] == whole


def test_a_page_follows_where_the_last_one_ended_whatever_came_or_went(server: Server) -> None:
    for name in ("p1", "p3", "p5"):
        server.add(name)
    first = server.get("/v1/disks?page_size=1")
    while first["items"][-1]["name"] != "p3":
        first = server.get(f"/v1/disks?page_size=1&page_token={first['next_page_token']}")
    for name in ("p2", "p4"):
        server.add(name)
    server.delete("/v1/disks/p3")
    second = server.get(f"/v1/disks?page_size=1&page_token={first['next_page_token']}")
    assert [disk["name"] for disk in second["items"]] == ["p4"]


def token(*parts: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts, separators=(",", ":")).encode()).decode()


@pytest.mark.parametrize(
    "query",
    [
        "page_size=0",
        "page_size=1001",
        "page_size=x",
        "page_token=",
        "page_token=nonsense",
        "page_token=%FF",
        f"page_token={'A' * 2000}",
        f"page_token={token('forks', 'a')}",
        f"page_token={token('disks', 1)}",
        f"page_token={token('disks')}",
        f"page_token={token('disks', 'a', 'b')}",
    ],
)
def test_a_page_that_cannot_be_meant_is_refused(server: Server, query: str) -> None:
    with pytest.raises(ApiError) as wrong:
        server.get(f"/v1/disks?{query}")
    assert (wrong.value.status, wrong.value.fields["error"]) == (400, "usage")


def test_a_limit_and_a_page_are_two_things(server: Server) -> None:
    with pytest.raises(ApiError) as wrong:
        server.get("/v1/disks/web/vda:points?limit=1&page_size=1")
    assert wrong.value.status == 400


# --- clients that stall


def waiting_bytes(client: socket.socket) -> int:
    """What was sent to a socket and not read yet."""
    return int.from_bytes(fcntl.ioctl(client, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_client_that_does_not_read_does_not_keep_the_service_from_stopping(short_path: Path) -> None:
    with Server(short_path / "s") as server, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.state_dir / "api.sock"))
        # Far more answers than the buffers between us hold.
        client.sendall(b"GET /v1/openapi.json HTTP/1.1\r\nHost: cdp\r\n\r\n" * 200)
        seen = [-1]

        def stalls() -> bool:
            seen.append(waiting_bytes(client))
            time.sleep(0.2)
            return seen[-1] == waiting_bytes(client) > 100_000

        until(stalls, "stall")
        assert server.get("/v1/status")["disks"] == 0
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 15
