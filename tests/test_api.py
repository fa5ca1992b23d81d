"""The control API against its own description, and in what a description does not say: pages, and clients that stall."""

import base64
import contextlib
import fcntl
import json
import os
import pty
import select
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schemathesis
import trio
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

from cdpserver.errors import NotFoundError, RefusedError, UsageError
from cdpserver.events import EventLog
from cdpserver.service.feed import Feed, Filter, Place
from cdpserver.service.jobs import Jobs
from tests.test_service import ApiError, Server, UnixConnection, connected, pattern, until
from tools.kit.processes import within

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
            running.synced("web/vda")
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


def test_only_the_service_itself_loads_what_the_api_needs(server: Server) -> None:
    """Guests wait at a restart for what a worker imports, and their worker waits for what the service imports before it."""

    def loaded(pid: int) -> set[str]:
        maps = Path(f"/proc/{pid}/maps").read_text()
        return {name for name in ("_pydantic_core.", "_asyncio.", "lmdb/") if name in maps}

    assert loaded(server.process.pid) == {"_pydantic_core.", "_asyncio.", "lmdb/"}
    for child in ("target-0", "export", "indexer"):
        assert loaded(server.pids()[child]) == {"lmdb/"}, child
    script = "import sys, cdpserver.service.main; print(*sys.modules)"
    early = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True).stdout
    late = {
        "fastapi",
        "pydantic",
        "hypercorn",
        "asyncio",
        "rich",
        "cryptography",
        "cdpserver.service.operations",
    }
    assert not late & set(early.split())


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
        "show_metrics",
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
        if found.ok().path.endswith(":stream"):
            continue  # it has no end; it has its own tests
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


def test_an_answer_waits_for_the_end_of_the_request(server: Server) -> None:
    """Else a client that sends its body after the head of its request finds the connection closed, and no answer."""
    with contextlib.closing(UnixConnection(server.state_dir / "api.sock")) as connection:
        connection.putrequest("POST", "/v1/recoveries/nobody:retry")
        connection.putheader("Content-Length", "2")
        connection.endheaders()
        assert select.select([connection.sock], [], [], 0.5)[0] == []
        connection.send(b"{}")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]) == (404, "not-found")


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


def test_the_pages_of_locks_go_by_age(server: Server) -> None:
    for bookmark in server.get("/v1/disks/web/vda:points?kind=bookmark"):
        server.post("/v1/locks", point=f"web/vda@{bookmark['name']}")
    whole = [lock["id"] for lock in server.get("/v1/locks")]
    assert len(whole) > 1
    for size in (1, 2, 5):
        assert [lock["id"] for page in pages(server, "/v1/locks", size) for lock in page] == whole


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
        with within(15, "the stop"):
            assert server.stop() == 0


# --- events


def holes(path: Path) -> tuple[EventLog, Feed]:
    """A log with lines that are none of ours between."""
    log = EventLog(path)
    for number in range(5):
        log.emit(
            "test.counted", number=number, level="warning" if number % 2 else "info", disk=f"d{number % 2}"
        )
        with open(path, "ab") as file:
            file.write(b"\n{broken\n[1]\n")
    return log, Feed(path)


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["number"] for event in events]


def test_the_feed_goes_on_behind_any_event(tmp_path: Path) -> None:
    log, feed = holes(tmp_path / "events.jsonl")
    whole = feed.newest(Filter(), 100).events
    assert numbers(whole) == list(range(5))
    assert feed.after(None, Filter(), 100).events == whole
    for number, event in enumerate(whole):
        batch = feed.after(Place.parse(event["place"]), Filter(), 100)
        assert (numbers(batch.events), batch.lost) == (list(range(number + 1, 5)), False)
        assert numbers(feed.newest(Filter(), number).events) == list(range(5 - number, 5))
    end = feed.newest(Filter(event="none"), 1).place
    assert feed.after(end, Filter(), 100).events == []
    log.emit("test.counted", number=5)
    assert numbers(feed.after(end, Filter(), 100).events) == [5]


def test_the_feed_takes_what_is_wanted(tmp_path: Path) -> None:
    _, feed = holes(tmp_path / "events.jsonl")
    for wanted, found in (
        (Filter(level="warning"), [1, 3]),
        (Filter(disk="d0"), [0, 2, 4]),
        (Filter(event="test"), [0, 1, 2, 3, 4]),
        (Filter(event="test.counted", disk="d1"), [1, 3]),
        (Filter(event="tes"), []),
        (Filter(since="9999"), []),
    ):
        assert numbers(feed.newest(wanted, 100).events) == found
        assert numbers(feed.after(None, wanted, 100).events) == found


def test_the_feed_crosses_rotations_and_says_what_it_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdpserver.events.EVENT_FILE_BYTES", 500)
    monkeypatch.setattr("cdpserver.service.feed.SETTLED_S", 0.0)
    log, feed = EventLog(tmp_path / "events.jsonl"), Feed(tmp_path / "events.jsonl")
    place, seen, rotations = None, list[int](), set()
    for number in range(40):
        log.emit("test.counted", number=number)
        rotations.add(sum(1 for _ in tmp_path.iterdir()))
        batch = feed.after(place, Filter(), 100, settled=True)
        place, seen = batch.place, seen + numbers(batch.events)
        assert not batch.lost
    assert seen == list(range(40))
    assert rotations == {1, 2}
    first = Place.parse(feed.after(None, Filter(), 1).events[0]["place"])
    for number in range(40, 60):
        log.emit("test.counted", number=number)
    batch = feed.after(first, Filter(), 100)
    assert batch.lost
    assert numbers(batch.events) == numbers(feed.after(None, Filter(), 100).events)
    assert numbers(batch.events)[-1] == 59


def test_a_rotated_file_is_left_when_nobody_writes_to_it_any_more(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log, feed = EventLog(path), Feed(path)
    log.emit("test.counted", number=0)
    place = feed.newest(Filter(), 0).place
    with open(path, "ab") as late:
        path.rename(tmp_path / "events.1.jsonl")
        log.emit("test.counted", number=2)
        batch = feed.after(place, Filter(), 100, settled=True)
        assert batch.events == []
        late.write(b'{"event": "test.counted", "number": 1}\n')
    batch = feed.after(batch.place, Filter(), 100, settled=True)
    assert numbers(batch.events) == [1]
    os.utime(tmp_path / "events.1.jsonl", (0, 0))
    assert numbers(feed.after(batch.place, Filter(), 100, settled=True).events) == [2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "1-",
        "-1",
        "0000000a-2-3",
        "0000000x-1",
        "0000000A-1",
        "1" * 30 + "-1",
        "00000001-" + "1" * 30,
    ],
)
def test_a_place_that_is_none_is_refused(server: Server, text: str) -> None:
    with pytest.raises(UsageError):
        Place.parse(text)


def test_events_are_listed_filtered_and_in_pages(server: Server) -> None:
    query = "/v1/events?event=point&disk=web/vda"
    marked = [f"mark-{number}" for number in range(4)]
    assert [event["bookmark"] for event in server.get(query)] == marked
    assert [event["bookmark"] for event in server.get(f"{query}&limit=2")] == marked[2:]
    assert [e["bookmark"] for page in pages(server, query, 3) for e in page] == marked
    second = server.get(query)[1]["place"]
    assert [event["bookmark"] for event in server.get(f"{query}&after={second}")] == marked[2:]
    assert server.get(f"{query}&since=-0s") == []
    assert server.get(f"{query}&level=error") == []
    for wrong in ("level=loud", "after=x", "since=bp:1", "limit=-1", f"page_token={token('events', 'x')}"):
        with pytest.raises(ApiError) as refused:
            server.get(f"/v1/events?{wrong}")
        assert refused.value.status == 400


@contextlib.contextmanager
def stream(server: Server, query: str = "", **headers: str) -> Iterator[Iterator[tuple[str, str, Any]]]:
    """(id, type, data) of each server-sent event."""
    connection = UnixConnection(server.state_dir / "api.sock")
    connection.request("GET", f"/v1/events:stream?{query}", headers=headers)
    reply = connection.getresponse()
    assert (reply.status, reply.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")

    def events() -> Iterator[tuple[str, str, Any]]:
        fields: dict[str, str] = {}
        while line := reply.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            fields[name] = value
            if line == "\n":
                if "data" in fields:
                    yield fields.get("id", ""), fields.get("event", "message"), json.loads(fields["data"])
                fields = {}

    try:
        yield events()
    finally:
        connection.close()


def test_a_stream_goes_on_where_its_client_was(server: Server) -> None:
    with stream(server, "event=disk.added") as events:
        server.add("s1")
        place, kind, event = next(events)
        assert (kind, event["disk"], event["place"]) == ("message", "s1", place)
    server.add("s2")
    server.add("s3")
    with stream(server, "event=disk.added", **{"Last-Event-ID": place}) as events:
        assert [next(events)[2]["disk"] for _ in range(2)] == ["s2", "s3"]
        server.add("s4")
        assert next(events)[2]["disk"] == "s4"
    with stream(server, "event=disk.added&newest=2") as events:
        assert [next(events)[2]["disk"] for _ in range(2)] == ["s3", "s4"]
    with stream(server, "event=disk.added", **{"Last-Event-ID": "0000000a-1"}) as events:
        assert next(events)[1:] == ("lost", {})
        assert next(events)[2]["disk"] == "web/vda"
    with pytest.raises(ApiError):
        server.get("/v1/events:stream?after=nonsense")


def test_more_streams_than_are_served_are_refused_until_one_ends(server: Server) -> None:
    with contextlib.ExitStack() as streams:
        for _ in range(32):
            next(streams.enter_context(stream(server, "newest=1")))
        with pytest.raises(ApiError) as refused:
            server.get("/v1/events:stream")
        assert refused.value.status == 409

    def free() -> bool:
        with contextlib.suppress(AssertionError), stream(server, "newest=1") as events:
            return bool(next(events))
        return False

    until(free, "free stream")


def test_streams_end_with_the_service_and_the_command_waits_for_the_next(short_path: Path) -> None:
    command = [sys.executable, "-m", "recovery.cli", "--state-dir", str(short_path / "s"), "event", "list"]
    with contextlib.ExitStack() as stack:
        with Server(short_path / "s") as server, stream(server, "newest=1") as events:
            following = subprocess.Popen(
                [*command, "--follow", "--json", "--event", "service.ready"],
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(following.wait)
            stack.callback(following.kill)
            assert following.stdout is not None
            first = json.loads(following.stdout.readline())
            with within(10, "the stop"):
                assert server.stop() == 0
            assert [event["event"] for _, _, event in events][-1] == "service.stopping"
        with Server(short_path / "s"):
            second = json.loads(following.stdout.readline())
            assert first["event"] == second["event"] == "service.ready"
            assert first["pid"] != second["pid"]
            listed = subprocess.run(
                [*command, "--event", "service.ready"], capture_output=True, text=True, check=True
            )
            assert [
                f"pid={event['pid']}" in line
                for event, line in zip((first, second), listed.stdout.splitlines(), strict=True)
            ] == [True, True]


# --- jobs


def start(server: Server, method: str, path: str, **body: Any) -> dict[str, Any]:
    """Ask for a job."""
    connection = UnixConnection(server.state_dir / "api.sock")
    headers = {"Content-Type": "application/json", "Prefer": "handling=lenient, respond-async"}
    connection.request(method, path, json.dumps(body) if body else None, headers)
    answer = connection.getresponse()
    job: dict[str, Any] = json.loads(answer.read())
    connection.close()
    assert (answer.status, answer.headers["location"]) == (202, f"/v1/{job['name']}")
    assert answer.headers["preference-applied"] == "respond-async"
    return job


def ended(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = server.get(f"/v1/{job['name']}?wait=30")
    assert found["state"] != "running"
    return found


def test_a_job_answers_what_the_request_would_have(server: Server) -> None:
    job = start(server, "POST", "/v1/disks/web/vda:cut")
    assert (job["kind"], job["target"], job["ended"]) == ("basepoint.cut", "web/vda", None)
    done = ended(server, job)
    assert (done["state"], done["progress"], done["error"]) == ("done", 1.0, None)
    assert done["result"] == server.get("/v1/disks/web/vda:basepoints")[-1]
    failed = ended(server, start(server, "DELETE", "/v1/disks/none"))
    assert (failed["state"], failed["result"]) == ("failed", None)
    assert (failed["error"]["error"], failed["error"]["exit_code"]) == ("not-found", 2)
    listed = server.get("/v1/jobs")
    assert [item["name"] for item in listed][-2:] == [done["name"], failed["name"]]
    assert [item for page in pages(server, "/v1/jobs", 1) for item in page] == listed
    assert server.delete(f"/v1/{done['name']}") == done
    for path in ("/v1/jobs/999999", "/v1/jobs/0", "/v1/jobs/x", f"/v1/{done['name']}?wait=61"):
        with pytest.raises(ApiError) as wrong:
            server.get(path)
        assert wrong.value.status in (400, 404)


@pytest.fixture
def large_image(tmp_path: Path) -> Path:
    """An image that takes seconds to read."""
    image = tmp_path / "large.raw"
    with open(image, "wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20) * 8)
    return image


def processes_of(image: Path) -> list[int]:
    """What runs with the image in its command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (directory / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(image) in words:
                found.append(int(directory.name))
    return found


def test_a_job_tells_how_far_it_is_and_a_cancelled_one_leaves_nothing(
    server: Server, large_image: Path
) -> None:
    job = start(server, "POST", "/v1/disks", name="large", size="1G", base=str(large_image))

    def runs() -> bool:
        shown = server.get(f"/v1/{job['name']}")
        assert shown["state"] == "running", "the image was too small to cancel its import"
        return bool(shown["progress"])

    until(runs, "progress")
    assert processes_of(large_image)
    cancelled = server.delete(f"/v1/{job['name']}")
    assert (cancelled["state"], cancelled["result"], cancelled["error"]) == ("cancelled", None, None)
    assert 0 < cancelled["progress"] < 1
    until(lambda: not processes_of(large_image), "end of the import's processes")
    assert list((server.state_dir / "bases").iterdir()) == []
    assert server.delete(f"/v1/{job['name']}") == cancelled
    with pytest.raises(ApiError):
        server.get("/v1/disks/large")
    [event] = [event for event in server.events("job.ended") if event["job"] == job["name"]]
    assert event["state"] == "cancelled"


def test_jobs_end_with_the_service_and_their_numbers_are_not_given_twice(
    short_path: Path, large_image: Path
) -> None:
    with Server(short_path / "s") as server:
        first = start(server, "POST", "/v1/disks", name="large", size="1G", base=str(large_image))
        until(lambda: processes_of(large_image), "import")
        assert server.stop() == 0
        until(lambda: not processes_of(large_image), "end of the import's processes")
    with Server(short_path / "s") as server:
        assert server.get("/v1/jobs") == []
        with pytest.raises(ApiError) as gone:
            server.get(f"/v1/{first['name']}")
        assert "kept for a day" in gone.value.fields["hint"]
        assert ended(server, start(server, "DELETE", "/v1/disks/none"))["name"] == "jobs/2"


async def test_ended_jobs_are_kept_so_many_and_so_long(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdpserver.service.jobs.KEPT", 3)
    monkeypatch.setattr("cdpserver.service.jobs.MAX_RUNNING", 2)
    now_ns = [10**18]
    clock: Any = SimpleNamespace(now_ns=lambda: now_ns[0])
    jobs = Jobs(tmp_path / "jobs.json", clock, EventLog(tmp_path / "events.jsonl"))
    await nursery.start(jobs.keep_running)

    async def fail() -> dict[str, Any]:
        raise ZeroDivisionError

    async def wait() -> dict[str, Any]:
        await trio.sleep_forever()
        return {}

    running = jobs.start("test", "d", wait)
    for number in range(2, 8):
        job = jobs.start("test", "d", fail)
        assert job.number == number
        await job.ended.wait()
        assert job.as_dict()["error"]["error"] == "error"
    jobs.start("test", "d", wait)
    with pytest.raises(RefusedError):
        jobs.start("test", "d", wait)
    assert [job.number for job in jobs.list_jobs()] == [1, 5, 6, 7, 8]
    now_ns[0] += 86_400 * 10**9 + 1
    assert [job.number for job in jobs.list_jobs()] == [1, 8]
    with pytest.raises(NotFoundError):
        jobs.job(7)
    assert (await jobs.cancel(1)).state == "cancelled"
    assert running.ended_ns == now_ns[0]
    (tmp_path / "jobs.json").write_text("nonsense")
    assert jobs.start("test", "d", wait).number == 9


def test_a_terminal_sees_a_bar_and_gets_the_answer(server: Server) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "recovery.cli", "--state-dir", str(server.state_dir), "--json"]
    process = subprocess.Popen(
        [*command, "bp", "cut", "web/vda"],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(master, 65536):
            shown += part
    os.close(master)
    assert process.stdout is not None
    assert json.loads(process.stdout.read()) == server.get("/v1/disks/web/vda:basepoints")[-1]
    assert process.wait() == 0
    assert b"basepoint.cut web/vda" in shown
    [job] = server.get("/v1/jobs")[-1:]
    for verb in ("show", "cancel"):
        done = subprocess.run([*command, "job", verb, job["name"]], capture_output=True, check=True)
        assert json.loads(done.stdout) == job
    listed = subprocess.run([*command[:-1], "job", "list"], capture_output=True, check=True, text=True)
    assert "100%" in listed.stdout
