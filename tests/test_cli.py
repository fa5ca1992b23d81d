"""`cdp` as a process, against a stand-in for the service: requests, answers, errors, exit codes, what it costs to start.

The stand-in speaks HTTP over a Unix socket and gives the answers that a test tells it to: what is tested here is the
client's own behaviour. `tests/test_service.py` has the service.
"""

import contextlib
import json
import os
import pty
import re
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from cdpserver import errors
from cdpserver.catalog import Catalog
from cdpserver.clock import boot_id
from cdpserver.errors import CdpError, UnreachableError
from cdpserver.journal import control
from cdpserver.journal.begin import start_history
from cdpserver.journal.control import State
from cdpserver.journal.record import NO_DIGEST, Kind, payload_digest
from cdpserver.journal.segment import PAGE, Header, SegmentWriter, log_path
from cdpserver.state import StateDir
from cdpserver.timeline import ImageBase, create_timeline
from recovery import cli
from recovery.client import Client
from recovery.output import printable, show_age, show_time

ROOT = Path(__file__).resolve().parent.parent
SECOND_NS = 1_000_000_000
START_NS = 1_800_000_000 * SECOND_NS
URI = "nbd+unix:///web/vda@seq:18?socket=/s/export.sock"

DISK = {
    "name": "web/vda",
    "vm": "web",
    "size": 64 << 20,
    "state": "empty",
    "uri": "nbd+unix:///web/vda?socket=x",
}
POINT = {
    "kind": "rp",
    "time": "2027-01-15T08:00:00.250000000Z",
    "time_ns": START_NS + 250_000_000,
    "seq": 12,
    "records": 3,
    "bytes": 12288,
    "grade": "crash",
    "evidence": {"session": 1},
    "name": None,
    "locked": False,
}


@dataclass
class Service:
    """A stand-in for cdpserver: answers everything with `status` and `answer`, and remembers what was asked."""

    state_dir: Path
    status: int = 200
    answer: Any = field(default_factory=dict)
    first: list[Any] = field(default_factory=list)
    """Answers that come before `answer`, each once."""
    raw: bytes | None = None
    hang_ups: int = 0
    asked: list[tuple[str, str, Any]] = field(default_factory=list)

    def fail(self, status: int, **fields: Any) -> None:
        self.status, self.answer = status, fields


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    service: Service


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        """The tests look at `asked`."""

    def _reply(self) -> None:
        service = self.server.service
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        service.asked.append((self.command, self.path, body))
        if service.hang_ups:
            service.hang_ups -= 1
            self.close_connection = True
            return
        if service.raw is not None:
            self.wfile.write(service.raw)
            self.close_connection = True
            return
        said = json.dumps(service.first.pop(0) if service.first else service.answer).encode()
        self.send_response(service.status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = do_DELETE = _reply


@pytest.fixture
def service(short_path: Path) -> Iterator[Service]:
    found = Service(short_path)
    with _Server(str(short_path / "api.sock"), _Handler) as server:
        server.service = found
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def command(*arguments: str | bytes) -> list[str | bytes]:
    return [sys.executable, "-m", "recovery.cli", *arguments]


def environment(state_dir: Path | None) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("CDP_STATE_DIR", "CDP_DEBUG")}
    return kept | {"COLUMNS": "80"} | ({} if state_dir is None else {"CDP_STATE_DIR": str(state_dir)})


def cdp(
    *arguments: str | bytes, state_dir: Path | None = None, **rest: Any
) -> "subprocess.CompletedProcess[str]":
    """The command as a process of its own."""
    rest = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | rest
    return subprocess.run(
        command(*arguments), env=environment(state_dir), cwd=ROOT, text=True, timeout=60, check=False, **rest
    )


def call(service: Service, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The command in this process: (exit code, stdout, stderr). A tenth of what a process costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cdp", "--state-dir", str(service.state_dir), *arguments])
        code = cli.main()
    said = capsys.readouterr()
    return code, said.out, said.err


# --- what is asked

ASKED = [
    (["disk", "add", "vda", "--size", "64M"], "POST", "/v1/disks", {"name": "vda", "size": 64 << 20}),
    (
        ["disk", "add", "vda", "--size", "1.5G", "--vm", "web", "--base", "/images/x.qcow2"],
        "POST",
        "/v1/disks",
        {"name": "vda", "size": 3 << 29, "vm": "web", "base": "/images/x.qcow2"},
    ),
    (["disk", "resize", "web/vda", "2G"], "POST", "/v1/disks/web/vda:resize", {"size": 2 << 30}),
    (["disk", "show", "web/vda"], "GET", "/v1/disks/web/vda", None),
    (["disk", "remove", "web/vda", "--yes"], "DELETE", "/v1/disks/web/vda", None),
    (["disk", "synced", "vda"], "POST", "/v1/disks/vda:synced", {"write_blocking": False}),
    (
        ["disk", "synced", "vda", "--session", "3", "--write-blocking"],
        "POST",
        "/v1/disks/vda:synced",
        {"session": 3, "write_blocking": True},
    ),
    (["point", "mark", "web/vda", "--name", "m-1"], "POST", "/v1/disks/web/vda:mark", {"name": "m-1"}),
    (["bp", "cut", "vda"], "POST", "/v1/disks/vda:cut", {}),
    (
        ["fork", "add", "web/vda@-90s", "f1"],
        "POST",
        "/v1/forks",
        {"point": "web/vda@-90s", "name": "f1"},
    ),
    (["fork", "remove", "f1"], "DELETE", "/v1/forks/f1", None),
]


@pytest.mark.parametrize(("arguments", "method", "path", "body"), ASKED, ids=lambda value: str(value)[:40])
def test_what_is_asked(
    service: Service,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    method: str,
    path: str,
    body: Any,
) -> None:
    service.answer = DISK
    code, out, err = call(service, capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == DISK
    assert service.asked == [(method, path, body)]


LISTS = [
    (["disk", "list"], "/v1/disks"),
    (["fork", "list"], "/v1/forks"),
    (["bp", "list", "web/vda"], "/v1/disks/web/vda:basepoints"),
    (["point", "list", "vda"], "/v1/disks/vda:points"),
    (["point", "list", "vda", "--since", "-90s"], "/v1/disks/vda:points?since=-90s"),
    (["point", "list", "vda", "--until=-1.5h"], "/v1/disks/vda:points?until=-1.5h"),
    (
        ["point", "list", "vda", "--since", "2027-01-15T09:00:00+01:00", "--until", "-5m", "--kind", "bp"],
        "/v1/disks/vda:points?since=2027-01-15T09%3A00%3A00%2B01%3A00&until=-5m&kind=bp",
    ),
    (["point", "list", "vda", "--limit", "0"], "/v1/disks/vda:points?limit=0"),
]


@pytest.mark.parametrize(("arguments", "path"), LISTS, ids=lambda value: str(value)[-40:])
def test_what_lists_ask(
    service: Service, capsys: pytest.CaptureFixture[str], arguments: list[str], path: str
) -> None:
    service.answer = [POINT, POINT]
    code, out, _ = call(service, capsys, *arguments, "--json")
    assert code == 0 and json.loads(out) == [POINT, POINT]
    assert service.asked == [("GET", path, None)]
    service.answer = []
    code, out, _ = call(service, capsys, *arguments, "--json")
    assert code == 0 and json.loads(out) == []


def test_a_base_image_is_named_by_an_absolute_path(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    call(service, capsys, "disk", "add", "vda", "--size", "1M", "--base", "golden.qcow2")
    assert service.asked[0][2]["base"] == str(tmp_path / "golden.qcow2")


# --- answers


@pytest.mark.parametrize("before", [True, False])
def test_json_before_and_after_the_command(
    service: Service, capsys: pytest.CaptureFixture[str], before: bool
) -> None:
    service.answer = {"uri": URI}
    asked = ["--json", "uri", "web/vda@latest"] if before else ["uri", "web/vda@latest", "--json"]
    assert call(service, capsys, *asked) == (0, json.dumps({"uri": URI}) + "\n", "")


def test_the_uri_stands_alone(service: Service) -> None:
    service.answer = {"uri": URI}
    done = cdp("uri", "web/vda@-90s", state_dir=service.state_dir)
    assert (done.returncode, done.stdout, done.stderr) == (0, URI + "\n", "")
    assert service.asked == [("GET", "/v1/uri?point=web%2Fvda%40-90s", None)]


def test_the_state_directory_may_come_after_the_command(service: Service) -> None:
    service.answer = []
    done = cdp("disk", "list", "--state-dir", str(service.state_dir), "--json")
    assert done.stdout == "[]\n"


def test_a_table_in_a_pipe_is_plain(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.answer = [DISK | {"points": 7, "journal_bytes": 3 << 20, "lag_ns": 1_500_000}]
    assert call(service, capsys, "disk", "list")[1] == (
        "name     size  state  points  journal     lag  uri\n"
        "web/vda   64M  empty       7     3.0M  0.002s  nbd+unix:///web/vda?socket=x\n"
    )


def test_a_point_shows_its_time_in_full(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.answer = [POINT, POINT | {"time_ns": START_NS + 1, "name": "m", "kind": "bookmark"}]
    lines = call(service, capsys, "point", "list", "vda")[1].splitlines()
    assert [line.split()[0] for line in lines] == [
        "time",
        "2027-01-15T08:00:00.250Z",
        "2027-01-15T08:00:00.000000001Z",
    ]


def test_one_thing_is_shown_field_by_field(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.answer = DISK | {"lag_ns": 20_000_000, "session": 2, "synced": True, "vm": None}
    assert call(service, capsys, "disk", "show", "vda")[1].splitlines() == [
        "name     web/vda",
        "vm       -",
        "size     64M",
        "state    empty",
        "uri      nbd+unix:///web/vda?socket=x",
        "lag      0.020s",
        "session  2",
        "synced   yes",
    ]


def test_an_empty_list_is_said_on_stderr(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.answer = []
    assert call(service, capsys, "fork", "list") == (
        0,
        "",
        "no forks; add one: cdp fork add DISK@WHEN NAME\n",
    )


def test_removing_answers_in_json(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(service, capsys, "fork", "remove", "f1", "--json")
    assert code == 0 and json.loads(out) == {"name": "f1", "state": "removed"}


# --- a terminal


def at_a_terminal(state_dir: Path, *arguments: str, typed: str = "") -> tuple[int, str]:
    """The command at a terminal of 80 columns: (exit code, what the terminal shows)."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        env=environment(state_dir) | {"TERM": "xterm-256color"},
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    shown = bytearray()
    with contextlib.suppress(OSError):  # EIO: nobody holds the terminal any more
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


def test_a_table_at_a_terminal_has_colours_and_is_never_cut(service: Service) -> None:
    long_uri = "nbd+unix:///web/vda?socket=/" + "x" * 100
    service.answer = [DISK | {"uri": long_uri, "name": "[red]x"}]
    code, shown = at_a_terminal(service.state_dir, "disk", "list")
    assert code == 0
    assert long_uri in shown and "[red]x" in shown
    service.answer = [POINT]
    assert "\x1b[32mcrash" in at_a_terminal(service.state_dir, "point", "list", "vda")[1]


def test_a_recovery_that_is_followed_has_a_bar_at_a_terminal_and_lines_elsewhere(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    def at(state: str, phase: str, mib: int) -> dict[str, Any]:
        sizes = {"copied_bytes": mib << 20, "total_bytes": 32 << 20}
        texts = {
            "id": "recovery-1",
            "what": "web@good",
            "state": state,
            "phase": phase,
            "uri": "",
            "reason": "",
        }
        return texts | sizes | {"events": [], "disks": []}

    under_way = [at("running", "waiting", 0), at("copying", "copying", 8), at("copying", "copying", 16)]
    service.first, service.answer = list(under_way), at("done", "home", 32)
    code, seen = at_a_terminal(service.state_dir, "recover", "show", "recovery-1", "--follow")
    assert code == 0 and "web@good moves home" in seen
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert re.search(r"16\.0/32\.0 MiB +[0-9.]+ MB/s +0:00:[0-9]{2}", plain), (
        "how far, how fast, and how long yet"
    )
    assert "recovery-1: copying" not in seen
    service.first = list(under_way)
    code, _, said = call(service, capsys, "recover", "show", "recovery-1", "--follow")
    assert code == 0 and said.splitlines() == [
        "recovery-1: running (waiting), 0B of 32.0M",
        "recovery-1: copying (copying), 8.0M of 32.0M",
    ]


def test_removing_asks_at_a_terminal(service: Service) -> None:
    service.answer = DISK | {"points": 12, "journal_bytes": 1 << 20}
    code, shown = at_a_terminal(service.state_dir, "disk", "remove", "web/vda", typed="n\n")
    assert code == 2
    assert "Remove disk web/vda (64M, 1.0M of journal, 12 points) with its whole history? [y/N]" in shown
    assert "cdp: nothing was removed" in shown
    assert [method for method, _, _ in service.asked] == ["GET"]
    assert at_a_terminal(service.state_dir, "disk", "remove", "web/vda", typed="y\n")[0] == 0
    assert service.asked[-1] == ("DELETE", "/v1/disks/web/vda", None)


def test_removing_without_a_terminal_needs_yes(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(service, capsys, "disk", "remove", "web/vda")
    assert (code, out) == (2, "") and "--yes" in err
    assert service.asked == []


# --- errors


def one_line(text: str) -> str:
    """The line, if it is one that a terminal shows as such."""
    assert text.startswith("cdp: ") and text.endswith("\n")
    line = text[:-1]
    assert line.isprintable(), repr(text)
    return line


ALL_ERRORS = sorted(
    {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, CdpError)},
    key=lambda kind: kind.kind,
)


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: str(kind.kind))
def test_every_error_of_the_service_comes_back(
    service: Service, capsys: pytest.CaptureFixture[str], kind: type[CdpError]
) -> None:
    service.fail(409, error=kind.kind, message="it is so", hint="do that", exit_code=kind.exit_code)
    with pytest.raises(CdpError) as caught:
        Client(StateDir(service.state_dir)).disks()
    assert type(caught.value) is kind and (caught.value.message, caught.value.hint) == ("it is so", "do that")
    assert call(service, capsys, "disk", "list") == (kind.exit_code, "", "cdp: it is so (do that)\n")


def test_an_error_that_is_not_known_keeps_its_exit_code(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.fail(500, error="of-a-newer-version", message="it is so", hint="", exit_code=9)
    assert call(service, capsys, "disk", "list") == (9, "", "cdp: it is so\n")
    assert CdpError("x").exit_code == 1


def test_a_hostile_error_is_one_line(service: Service) -> None:
    service.fail(400, error="usage", message="no\ncdp: all is well\x1b[2J\r", hint="\u202e\udc80")
    done = cdp("disk", "list", state_dir=service.state_dir)
    assert done.returncode == 2
    assert one_line(done.stderr) == "cdp: no\\ncdp: all is well\\x1b[2J\\r (\\u202e\\udc80)"


def test_a_hostile_answer_moves_no_cursor(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.answer = [DISK | {"name": "a\x1b]0;x\x07b\n"}]
    out = call(service, capsys, "disk", "list")[1]
    assert len(out.splitlines()) == 2 and "a\\x1b]0;x\\x07b\\n" in out


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n[",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n\xff\xfe\xfd[]",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_what_is_no_answer_of_the_service(
    service: Service, capsys: pytest.CaptureFixture[str], raw: bytes
) -> None:
    service.raw = raw
    code, out, err = call(service, capsys, "disk", "list", "--json")
    assert (code, out) == (6, "")
    assert str(service.state_dir) in one_line(err)


def test_looking_is_repeated_when_the_service_ended_just_then_and_changing_is_not(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.answer, service.hang_ups = [], 1
    assert call(service, capsys, "disk", "list", "--json")[0] == 0
    assert len(service.asked) == 2
    service.hang_ups = 1
    code, _, err = call(service, capsys, "disk", "add", "d", "--size", "1M")
    assert code == 6 and "closed the connection" in one_line(err)
    assert len(service.asked) == 3


def test_an_error_without_our_fields(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.status, service.answer = 502, {"detail": "Bad Gateway"}
    code, _, err = call(service, capsys, "disk", "list")
    assert code == 5 and "502" in one_line(err)


def test_nobody_answers(tmp_path: Path) -> None:
    start = f"cdpserver does not answer at {tmp_path}/api.sock (start it: cdpserver --state-dir {tmp_path})"
    done = cdp("disk", "list", state_dir=tmp_path)
    assert (done.returncode, done.stdout, one_line(done.stderr)) == (6, "", f"cdp: {start}")
    # A socket that nobody listens on any more.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "api.sock"))
    done = cdp("uri", "a@latest", "--json", state_dir=tmp_path)
    assert (done.returncode, done.stdout, one_line(done.stderr)) == (6, "", f"cdp: {start}")
    with pytest.raises(UnreachableError, match="does not answer"):
        Client(StateDir(tmp_path / ("x" * 200))).status()


def test_a_file_in_place_of_the_socket(tmp_path: Path) -> None:
    (tmp_path / "api.sock").write_text("")
    assert cdp("disk", "list", state_dir=tmp_path).returncode == 6


WRONG: list[list[str | bytes]] = [
    [],
    ["disk"],
    ["frobnicate"],
    ["disk", "frobnicate"],
    ["disk", "add", "vda"],
    ["disk", "add", "--size", "64M"],
    ["disk", "add", "a/b", "--size", "64M"],
    ["disk", "add", "a/b/c", "--size", "64M"],
    ["disk", "add", "a@b", "--size", "64M"],
    ["disk", "add", "..", "--size", "64M"],
    ["disk", "add", "", "--size", "64M"],
    ["disk", "add", "x" * 300, "--size", "64M"],
    ["disk", "add", "a\nb", "--size", "64M"],
    ["disk", "add", b"\xff\xfe", "--size", "64M"],
    ["disk", "add", "vda", "--size", "0"],
    ["disk", "add", "vda", "--size", "-1"],
    ["disk", "add", "vda", "--size", "1"],
    ["disk", "add", "vda", "--size", "513"],
    ["disk", "add", "vda", "--size", "1P"],
    ["disk", "add", "vda", "--size", "lots"],
    ["disk", "add", "vda", "--size", "64M", "--vm", "a/b"],
    ["disk", "show", "a/b/c"],
    ["disk", "show", "vda", "extra"],
    ["disk", "show", "vda", "--frob\x1b[2J"],
    ["disk", "list", "--jso"],
    ["disk", "synced", "vda", "--session", "x"],
    ["disk", "synced", "vda", "--session", "-1"],
    ["point", "list", "vda", "--since", "yesterday week"],
    ["point", "list", "vda", "--since", "-90parsecs"],
    ["point", "list", "vda", "--kind", "snapshot"],
    ["point", "list", "vda", "--limit", "-1"],
    ["point", "mark", "vda"],
    ["point", "mark", "vda", "--name", "latest"],
    ["point", "mark", "vda", "--name", "a b"],
    ["uri"],
    ["uri", "vda"],
    ["uri", "vda@"],
    ["uri", "vda@2027-13-01T00:00:00Z"],
    ["uri", "vda@a@b"],
    ["uri", b"vda@\xff"],
    ["fork", "add", "vda", "f"],
    ["fork", "add", "vda@latest"],
    ["segment", "show"],
    ["index", "rebuild", "a/b/c"],
    ["check"],
    ["--state-dir", "", "disk", "list"],
    ["--state-dir"],
]


def test_what_cannot_be_meant_is_refused_here(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in WRONG:
        given = [os.fsdecode(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["cdp", "--state-dir", str(service.state_dir), *given])
        code = cli.main()
        said = capsys.readouterr()
        assert (code, said.out) == (2, ""), given
        assert "(" in one_line(said.err), "no next step"
    assert service.asked == []


def test_wrong_usage_as_a_process() -> None:
    done = cdp("disk", "add", b"\xff\x1b[2J", "--size", "64M")
    assert done.returncode == 2 and done.stdout == ""
    assert one_line(done.stderr).startswith("cdp: not a name: '\\udcff\\x1b[2J' (")


def test_an_internal_error_is_one_line(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Client) -> list[dict[str, Any]]:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(Client, "disks", broken)
    code, _, err = call(service, capsys, "disk", "list")
    assert code == 1 and "internal error: ZeroDivisionError" in one_line(err)


def test_a_reader_that_goes_away(service: Service) -> None:
    service.answer = [POINT] * 5000
    ours, theirs = os.pipe()
    os.close(ours)
    done = cdp("point", "list", "vda", state_dir=service.state_dir, stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_answer_that_cannot_be_written(service: Service) -> None:
    service.answer = {"uri": URI}
    with open("/dev/full", "w") as full:
        done = cdp("uri", "vda@latest", state_dir=service.state_dir, stdout=full)
    assert done.returncode == 5 and "No space left" in one_line(done.stderr)


def test_closed_streams(service: Service) -> None:
    service.answer = {"uri": URI}
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    for arguments, code in ((["uri", "vda@latest"], 0), (["uri", "vda"], 2), (["disk", "remove", "vda"], 2)):
        done = subprocess.run(
            [*closed, *command(*arguments)],
            env=environment(service.state_dir),
            cwd=ROOT,
            timeout=60,
            check=False,
        )
        assert done.returncode == code


# --- help, version, start


def every_command(*group: str) -> list[list[str]]:
    """The words of each command: groups may hold groups."""
    verbs = re.findall(r"^    ([a-z]+) ", cdp(*group, "--help").stdout, re.MULTILINE)
    return [words for verb in verbs for words in every_command(*group, verb)] or [list(group)]


def test_help_has_an_example_of_every_command() -> None:
    assert "example:" in cdp("--help").stdout
    commands = every_command()
    assert [" ".join(words) for words in commands] == [
        *("status", "metrics"),
        *(
            "protect",
            "agent",
            "token add",
            "token list",
            "token remove",
            "disk add",
            "disk resize",
            "disk list",
            "disk show",
            "disk uri",
            "disk remove",
            "disk synced",
        ),
        *(
            "point list",
            "point mark",
            "point show",
            "point lock",
            "point unlock",
            "point locks",
            "point drills",
        ),
        *(
            "uri",
            "group add",
            "group list",
            "group show",
            "group remove",
            "rpo",
            "bp cut",
            "bp list",
            "bp rebuild",
        ),
        *("snapshot tree", "snapshot delete", "snapshot pull", "snapshot commit"),
        *("snapshot live tree", "snapshot live create", "snapshot live save", "snapshot live commit"),
        "snapshot live pull",
        *("snapshot live delete", "snapshot live revert", "export"),
        *("file ls", "file cat", "file stat", "file preview", "file find", "file get"),
        *("file history", "file diff", "mount", "umount"),
        *("fork add", "fork list", "fork remove"),
        *("recover start", "recover list", "recover show", "recover abort", "recover retry"),
        *("recover commit", "recover undo"),
        *(
            "repo init",
            "repo add",
            "repo forget",
            "repo list",
            "repo show",
            "repo check",
            "repo prune",
            "repo gc",
            "repo export",
            "repo import",
            "repo copy",
        ),
        *("backup run", "backup list", "backup show", "backup verify", "backup remove"),
        *("backup lock", "backup unlock", "backup restore", "backup detach"),
        *("backup now", "backup source add", "backup source list", "backup source remove"),
        *("drill", "bisect"),
        *("policy set", "policy show", "policy clear", "prune"),
        "usage",
        "forecast",
        *("event list", "job list", "job show", "job cancel"),
        *("segment show", "index rebuild", "index show", "timeline show", "catalog show", "clock show"),
        *("check", "repair", "completion"),
    ]
    for words in commands:
        done = cdp(*words, "--help")
        assert done.returncode == 0 and done.stderr == ""
        assert " ".join(["cdp", *words]) in done.stdout.split("example:")[1].replace("(cdp", "cdp"), words
        assert "--json" in done.stdout


def test_the_version() -> None:
    done = cdp("--version")
    assert done.returncode == 0 and re.fullmatch(r"cdp \d+\.\d+\.\d+\n", done.stdout)


def test_starting_loads_nothing_heavy() -> None:
    """What `cdp uri` imports decides what every script that asks for a point in a loop waits for."""
    script = "import sys, recovery.cli, recovery.remote; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=True
    )
    heavy = {
        "rich",
        "numpy",
        "lmdb",
        "msgpack",
        "blake3",
        "typer",
        "pydantic",
        "trio",
        "asyncio",
    }
    assert not heavy & set(loaded.stdout.split())


# --- text


def test_printable() -> None:
    assert printable("Grüße 漢\x00\x1b\n\t\u202e\udcff") == "Grüße 漢\\x00\\x1b\\n\\t\\u202e\\udcff"


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show_time(START_NS) == "2027-01-15T08:00:00.000Z"
    assert show_time(START_NS + 1_234_500_000) == "2027-01-15T08:00:01.2345Z"
    monkeypatch.setattr("time.time_ns", lambda: START_NS)
    assert [show_age(START_NS - s * SECOND_NS) for s in (0, 59, 134, 7200, 90_061)] == [
        "now",
        "59s",
        "2m14s",
        "2h",
        "1d1h",
    ]
    assert show_age(START_NS + SECOND_NS) == "now"


# --- segment show

GOLDEN = """\
segment 1 of interval 1, timeline 0102030405060708090a0b0c0d0e0f10
version 1, open, 10 records
first seq 1, first time 2027-01-15T08:00:00.000000000Z, boot boot-one-0
carry session=0 synced=false write_blocking=false fork=false cuts=0 resync_ref=-1 gap_until_ns=0
1 2027-01-15T08:00:00.000000000Z control length=37 place=0 \
digest=f5c2c3bbdd13763a26c10bc2551e0ef8ef8fd719 {"type": "begin", "mode": "first-copy", "session": 1}
2 2027-01-15T08:00:00.250000000Z data offset=8192 length=4096 place=4096 \
digest=a54391d7a8d382c1b10f7d7ae7a78c71c98d9ec2
3 2027-01-15T08:00:00.500000000Z zero offset=0 length=1099511627776
4 2027-01-15T08:00:00.750000000Z trim offset=4096 length=4096
5 2027-01-15T08:00:01.000000000Z same offset=8192 length=4096 ref=2
6 2027-01-15T08:00:01.250000000Z durable durable_seq=5
7 2027-01-15T08:00:01.500000000Z control length=20 place=8192 \
digest=7a925c6e1e4eb404d120ac1f9bf2b28c15672f5b {"type": "mark", "name": "m-1"}
8 2027-01-15T08:00:01.750000000Z data offset=12288 length=512 place=12288 digest=3d03f9165de12b1f148ed2c1e40b473608fae870
9 2027-01-15T08:00:02.000000000Z control length=18 place=16384 \
digest=d95af434c0676e769a2cecd7e272f01b452243ad {"type": "cut", "number": 0}
10 2027-01-15T08:00:02.250000000Z durable durable_seq=9
"""


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    """A header log with a record of each kind, beside its data file."""
    (tmp_path / "intervals").mkdir()
    start_history(
        tmp_path,
        uuid=bytes(range(1, 17)),
        boot_id="boot-one-0",
        now_ns=START_NS,
        mode="first-copy",
        session=1,
    )
    interval = tmp_path / "intervals" / "000001"
    header = Header(bytes(range(1, 17)), 1, 1, 1, START_NS, "boot-one-0", State())
    writer = SegmentWriter(interval, header, count=1)

    def put(kind: Kind, payload: bytes = b"", *, sectors: int = 0, offset: int = 0, place: int = 0) -> None:
        if payload:
            place = writer.append_payload(payload)
        seq = writer.count + 1
        digest = payload_digest(payload) if payload else NO_DIGEST
        writer.put(kind, sectors, seq, START_NS + (seq - 1) * SECOND_NS // 4, offset, place, digest)

    put(Kind.DATA, b"\5" * 4096, sectors=8, offset=8192)
    put(Kind.ZERO, sectors=1 << 31)
    put(Kind.TRIM, sectors=8, offset=4096)
    put(Kind.SAME, sectors=8, offset=8192, place=2)
    put(Kind.DURABLE, place=5)
    message = control.encode(control.mark("m-1"))
    put(Kind.CONTROL, message, offset=len(message))
    put(Kind.DATA, b"\6" * 512, sectors=1, offset=12288)
    message = control.encode(control.cut(0))
    put(Kind.CONTROL, message, offset=len(message))
    put(Kind.DURABLE, place=9)
    writer.close()
    return log_path(interval, 1)


def change(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_segment_show_as_text(segment: Path) -> None:
    done = cdp("segment", "show", str(segment))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == GOLDEN


def test_segment_show_verified(segment: Path) -> None:
    done = cdp("segment", "show", str(segment), "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.replace(" payload ok\n", "\n") == GOLDEN
    assert done.stdout.count(" payload ok\n") == 5


def test_segment_show_without_the_data_file(segment: Path, tmp_path: Path) -> None:
    alone = tmp_path / "any name.log"
    segment.rename(alone)
    done = cdp("segment", "show", str(alone))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == re.sub(r" \{.*\}$", "", GOLDEN, flags=re.MULTILINE)
    done = cdp("segment", "show", str(alone), "--verify")
    assert done.returncode == 2 and "there is no data file" in one_line(done.stderr)


def test_segment_show_as_json(segment: Path) -> None:
    done = cdp("segment", "show", str(segment), "--json", "--verify")
    records = json.loads(done.stdout)
    assert [record["seq"] for record in records] == list(range(1, 11))
    assert records[1] == {
        "seq": 2,
        "time": "2027-01-15T08:00:00.250000000Z",
        "time_ns": START_NS + 250_000_000,
        "kind": "data",
        "offset": 8192,
        "length": 4096,
        "place": 4096,
        "digest": payload_digest(b"\5" * 4096).hex(),
        "payload": "ok",
    }
    assert records[6]["message"] == {"type": "mark", "name": "m-1"}


def test_segment_show_says_what_is_damaged(segment: Path) -> None:
    change(segment, PAGE + 2 * 64 + 25)
    change(segment.with_suffix(".data"), 4096 + 7)
    done = cdp("segment", "show", str(segment))
    lines = done.stdout.splitlines()
    assert lines[6] == "3 DAMAGED: the record that claims seq 3 fails its check"
    assert lines[7:] == GOLDEN.splitlines()[7:]
    assert done.returncode == 4 and one_line(done.stderr).startswith(f"cdp: {segment}: a record is damaged (")
    done = cdp("segment", "show", str(segment), "--verify", "--json")
    damaged = {record["seq"]: record["damage"] for record in json.loads(done.stdout) if "damage" in record}
    assert damaged == {
        2: "its payload does not match its digest",
        3: "the record that claims seq 3 fails its check",
    }
    assert done.returncode == 4 and "2 records are damaged" in one_line(done.stderr)


def test_segment_show_of_a_log_that_is_cut_short(segment: Path) -> None:
    os.truncate(segment, PAGE + 64 * 4 + 10)
    done = cdp("segment", "show", str(segment))
    assert len(done.stdout.splitlines()) == 8
    assert done.returncode == 4
    assert "the tail word counts 10 records, the file holds 4" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the header page is cut short"),
        (b"\0" * 8192, "the header page is zeros"),
        (b"x" * 8192, "is not a segment"),
    ],
)
def test_segment_show_of_what_is_none(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "00000001.log"
    path.write_bytes(content)
    done = cdp("segment", "show", str(path))
    assert done.returncode == 4 and done.stdout == "" and what in one_line(done.stderr)


@pytest.mark.parametrize("path", ["nowhere.log", ".", "a\x1bb", "pyproject.toml/x"])
def test_segment_show_of_no_file(path: str) -> None:
    done = cdp("segment", "show", path)
    assert done.returncode == 2 and one_line(done.stderr)


# --- index rebuild, check


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """A state directory with one disk on an image, web/vda, whose history has begun."""
    state = StateDir.create_or_open(tmp_path / "s")
    (state.bases / "b1.raw").write_bytes(bytes(4096))
    with Catalog.open(state, writable=True) as catalog:
        made = create_timeline(
            state,
            id=catalog.next_id(),
            name="vda",
            vm="web",
            size=1 << 20,
            base=ImageBase("bases/b1.raw"),
            now_ns=START_NS,
        )
        catalog.add("web/vda", made.id)
    directory = state.timeline(made.id)
    start_history(directory, uuid=made.uuid, boot_id=boot_id(), now_ns=START_NS, mode="image")
    return state.path


def test_rebuild_and_check(state_dir: Path) -> None:
    done = cdp("index", "rebuild", "web/vda", state_dir=state_dir)
    assert re.fullmatch(r"web/vda: 1 records indexed in [\d.]+ s \([\d,]+ a second\)\n", done.stdout), done
    assert (
        json.loads(cdp("index", "rebuild", "web/vda", "--json", state_dir=state_dir).stdout)["records"] == 1
    )
    done = cdp("check", "web/vda", state_dir=state_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "web/vda is whole: 1 records in 1 segments, 4.0K verified\n"
    done = cdp("check", "web/vda", "--json", state_dir=state_dir)
    assert json.loads(done.stdout) == {
        "disk": "web/vda",
        "depth": "normal",
        "complete": True,
        "whole": True,
        "records": 1,
        "segments": 1,
        "bytes": 4192,
        "damage": [],
        "catalog": [],
        "untold": 0,
    }


def test_check_says_what_damage_means(state_dir: Path) -> None:
    log = state_dir / "timelines/t1/intervals/000001/00000001.log"
    change(log, PAGE + 30)
    done = cdp("check", "web/vda", state_dir=state_dir)
    assert done.returncode == 4
    assert one_line(done.stderr).startswith("cdp: web/vda is damaged in 1 place (open an instant before it")
    assert done.stdout.splitlines() == [
        "web/vda is damaged: 0 records in 1 segments, 4.0K verified",
        "",
        "the header of record 1 fails its check",
        "  in       timelines/t1/intervals/000001/00000001.log",
        "  shows    from 2027-01-15T08:00:00.000Z (seq:1) to 2027-01-15T08:00:00.000Z (seq:1)",
        "  touches  0 points",
        "  next     open an instant before it, or one after the guest wrote there again",
    ]
    done = cdp("index", "rebuild", "web/vda", state_dir=state_dir)
    assert done.returncode == 4 and "record 1 is damaged" in one_line(done.stderr)
    done = cdp("check", "web/vda", "--json", state_dir=state_dir)
    assert done.returncode == 4 and not json.loads(done.stdout)["whole"]


@pytest.mark.parametrize("words", [["check"], ["index", "rebuild"]])
def test_a_disk_that_is_not_there(state_dir: Path, words: list[str]) -> None:
    done = cdp(*words, "nobody", state_dir=state_dir)
    assert done.returncode == 2 and one_line(done.stderr).startswith("cdp: there is no disk 'nobody' (")
    done = cdp(*words, "web/vda", state_dir=state_dir / "timelines")
    assert done.returncode == 3 and "is not a state directory" in one_line(done.stderr)
    done = cdp(*words, "web/vda", state_dir=state_dir / "nowhere")
    assert done.returncode == 2 and "there is no state directory" in one_line(done.stderr)
