"""Files of a point over the API: pages, ranges, streams, and sessions that are killed, hang, or stay unused."""

import hashlib
import http.client
import io
import json
import os
import resource
import signal
import socket
import tarfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from cdpserver.errors import BrokenError
from cdpserver.files.session import MEMORY_BYTES
from cdpserver.service import browsing
from cdpserver.service.api import paging
from tests import filesystems as make
from tests.test_service import ApiError, Server, UnixConnection, until
from tests.test_volume_export import protect

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make.source_tree(tmp_path_factory.mktemp("files") / "tree", 300)
    (made / "picture.gif").write_bytes(b"GIF89a" + bytes([7, 0, 9, 0]) + bytes(20))
    os.utime(made / "picture.gif", ns=(make.MTIME_NS, make.MTIME_NS))
    return made


@pytest.fixture(scope="module")
def server(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("api")
    with Server(directory / "s") as running:
        ext4 = make.make_ext(directory / "ext4", tree, size="32M").read_bytes()
        protect(running, "vm0", make.disk_with(b"\x17" * (1 << 20), ext4, ext4[: 8 << 20]))
        protect(running, "d", ext4)
        yield running


def query(**fields: Any) -> str:
    return urllib.parse.urlencode({key: value for key, value in fields.items() if value is not None})


def pages(server: Server, route: str, size: int, **fields: Any) -> list[dict[str, Any]]:
    """All items of a list."""
    found: list[dict[str, Any]] = []
    token = None
    while True:
        page = server.get(f"/v1/{route}?{query(page_size=size, page_token=token, **fields)}")
        assert len(page["items"]) <= size
        found += page["items"]
        token = page["next_page_token"]
        if token is None:
            return found


def fetch(server: Server, route: str, headers: Any = None, **fields: Any) -> Any:
    """(status, headers, body)"""
    connection = UnixConnection(server.state_dir / "api.sock")
    try:
        connection.request("GET", f"/v1/{route}?{query(**fields)}", headers=headers or {})
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def test_lists_come_in_pages_that_hang_together(server: Server, tree: Path) -> None:
    names = sorted(os.listdir(os.fsencode(tree / "many")))
    listed = pages(server, "files", 70, point="d@latest", path="/many")
    assert [row["name"].encode() for row in listed] == names
    whole = server.get(f"/v1/files?{query(point='d@latest', path='/', page_size=1000)}")
    assert whole["next_page_token"] is None and whole["point"].startswith("d@seq:")
    rows = {row["name"]: row for row in whole["items"]}
    assert rows["outside"]["target"] == "/../../../etc/passwd" and rows["many"]["type"] == "dir"
    assert rows["latin-�"]["name_hex"] == b"latin-\xe9".hex()
    (one,) = pages(server, "files", 5, point="d@latest", path_hex=b"/latin-\xe9".hex())
    assert one["size"] == len("not UTF-8")
    # A page is of the instant of the first one, whatever was written since, and does not need what is remembered.
    first = server.get(f"/v1/files?{query(point='d@latest', path='/many', page_size=100)}")
    server.post("/v1/disks/d:mark", name="later")
    kill_sessions(server)
    token = first["next_page_token"]
    second = server.get(f"/v1/files?{query(point='d@latest', path='/many', page_size=100, page_token=token)}")
    assert second["point"] == first["point"]
    assert [row["name"].encode() for row in second["items"]] == names[100:200]


def test_volumes_and_what_is_asked_wrong(server: Server) -> None:
    rows = pages(server, "files", 10, point="vm0@latest")
    assert [(row["name"], row["type"], row["holds"]) for row in rows] == [
        ("p1", "volume", ""),
        ("p2", "volume", "ext"),
        ("p3", "volume", "ext"),
    ]
    for route, fields, status in (
        ("files", {"point": "vm0@latest", "path": "/many"}, 400),
        ("files", {"point": "vm0@latest/p9"}, 404),
        ("files", {"point": "vm0@latest/p1", "path": "/"}, 409),
        ("files", {"point": "d@latest", "path": "/nothing"}, 404),
        ("files", {"point": "d@latest", "path_hex": "zz"}, 400),
        ("files", {"point": "d@latest", "page_token": "AAAA"}, 400),
        ("files:stat", {"point": "other@latest", "path": "/"}, 404),
        ("files:find", {"point": "d@latest", "regex": "("}, 400),
        ("files:find", {"point": "d@latest", "newer": "bp:1"}, 400),
        ("files:content", {"point": "d@latest", "path": "/many"}, 400),
        ("files:history", {"disk": "d", "path": "/large", "volume": "../x"}, 400),
    ):
        with pytest.raises(ApiError) as caught:
            server.get(f"/v1/{route}?{query(**fields)}")
        assert caught.value.status == status, (route, fields, caught.value.fields)
        assert caught.value.fields["hint"]


def test_find_stat_and_preview(server: Server, tree: Path) -> None:
    found = pages(server, "files:find", 7, point="d@latest", name="file-1*", type="file")
    wanted = {f"many/{name}" for name in os.listdir(tree / "many") if name.startswith("file-1")}
    assert {row["name"] for row in found} == wanted
    assert not pages(server, "files:find", 7, point="d@latest", newer="-1h", type="file")
    stat = server.get(f"/v1/files:stat?{query(point='d@latest', path='/hard')}")
    assert (stat["links"], stat["size"], stat["path"]) == (2, 2_000_000, "/hard")
    head = server.get(f"/v1/files:preview?{query(point='d@latest', path='/picture.gif')}")
    assert (head["kind"], head["width"], head["height"]) == ("image", 7, 9)
    head = server.get(f"/v1/files:preview?{query(point='d@latest', path='/large', bytes=16)}")
    assert head["kind"] == "binary" and bytes.fromhex(head["hex"]) == (tree / "large").read_bytes()[:16]


def test_content_whole_and_in_part(server: Server, tree: Path) -> None:
    large = (tree / "large").read_bytes()
    ask = {"point": "d@latest", "path": "/hard"}
    status, headers, body = fetch(server, "files:content", **ask)
    assert (status, body) == (200, large)
    assert headers["Accept-Ranges"] == "bytes" and headers["Content-Length"] == str(len(large))
    assert headers["Content-Disposition"] == "attachment; filename*=UTF-8''hard"
    etag = headers["ETag"]
    for text, low, high in (
        ("bytes=5-9", 5, 10),
        ("bytes=1999990-", 1_999_990, 2_000_000),
        ("bytes=-10", 1_999_990, 2_000_000),
        ("bytes=-9999999999999999999", 0, 2_000_000),
        ("bytes=0-9999999999999999999", 0, 2_000_000),
        ("bytes=1048570-1048590", 1_048_570, 1_048_591),
        ("bytes=7-99999999999", 7, 2_000_000),
    ):
        status, headers, body = fetch(server, "files:content", {"Range": text}, **ask)
        assert (status, body) == (206, large[low:high]), text
        assert headers["Content-Range"] == f"bytes {low}-{high - 1}/2000000" and headers["ETag"] == etag
    status, headers, _ = fetch(server, "files:content", {"Range": "bytes=2000000-"}, **ask)
    assert (status, headers["Content-Range"]) == (416, "bytes */2000000")
    for text in ("bytes=9-5", "bytes=0-1,4-5", "lines=1-2"):
        assert fetch(server, "files:content", {"Range": text}, **ask)[0] == 200
    assert fetch(server, "files:content", {"If-None-Match": f'"x", W/{etag}'}, **ask)[0] == 304
    newer = {"Range": "bytes=0-3", "If-Range": '"x"'}
    assert fetch(server, "files:content", newer, **ask)[0] == 200
    # 40 MiB of a hole, and three bytes.
    body = fetch(server, "files:content", point="d@latest", path="/sparse")[2]
    assert hashlib.sha256(body).digest() == hashlib.sha256((tree / "sparse").read_bytes()).digest()
    taken = server.events("file.taken")
    assert taken[0]["user"] and taken[0]["path"] == "/hard" and taken[0]["bytes"] == 2_000_000
    assert taken[0]["point"].startswith("d@seq:")


def test_a_tree_as_a_tar_stream(server: Server, tree: Path) -> None:
    status, headers, body = fetch(server, "files:tar", point="d@latest", path="/")
    assert status == 200 and headers["Content-Type"] == "application/x-tar"
    assert len(body) < 20 << 20, "holes are left out"
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        names = {name.encode("utf-8", "surrogateescape") for name in tar.getnames()}
        for member in ("large", "many/file-7", "empty"):
            file = tar.extractfile(f"root/{member}")
            assert file is not None and file.read() == (tree / member).read_bytes()
    assert {b"root/" + name for name in os.listdir(os.fsencode(tree))} <= names
    assert not any(name.endswith(b"not-fetched.txt") for name in names)


# --- faults


def sessions(server: Server) -> dict[int, int]:
    """Sessions of this service, and the parser of each."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = stat.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"cdpserver.files.session" in words and os.fsencode(server.state_dir) in words:
            pid = int(stat.parent.name)
            children = (stat.parent / "task" / str(pid) / "children").read_text().split()
            if children:
                found[pid] = int(children[0])
    return found


def test_a_session_has_a_limit_of_memory(server: Server) -> None:
    (pid, *_) = until(lambda: list(sessions(server)), "a session")
    assert resource.prlimit(pid, resource.RLIMIT_DATA) == (MEMORY_BYTES, MEMORY_BYTES)


def kill(*pids: int) -> None:
    """SIGKILL them; they are dead on return, with all their threads, and whoever asks after them hears so."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: all(map(is_dead, pids)), "end of the processes")


def is_dead(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(os.listdir(f"/proc/{pid}/task")) < 2
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_sessions(server: Server) -> None:
    kill(*sessions(server))


def size_of(server: Server, path: str = "/large") -> int:
    return int(server.get(f"/v1/files:stat?{query(point='d@latest', path=path)}")["size"])


def test_a_process_that_died_is_replaced(server: Server) -> None:
    size_of(server)
    kill(*sessions(server).values())
    assert size_of(server) == 2_000_000
    kill_sessions(server)
    assert size_of(server) == 2_000_000


@pytest.mark.parametrize("of_both", [0, 1], ids=["session", "parser"])
def test_a_process_that_dies_in_the_middle_cuts_the_answer_off(server: Server, of_both: int) -> None:
    size_of(server)
    connection = UnixConnection(server.state_dir / "api.sock")
    connection.request("GET", f"/v1/files:tar?{query(point='d@latest', path='/')}")
    reply = connection.getresponse()
    body = reply.read(10)
    for both in sessions(server).items():
        os.kill(both[of_both], signal.SIGKILL)
    try:
        body += reply.read()
    except (http.client.HTTPException, OSError):
        assert len(body) < 2_000_000
    else:
        # The parser had told all, and was not needed any more.
        assert of_both
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            assert "root/large" in tar.getnames()
    connection.close()
    assert size_of(server) == 2_000_000
    assert server.get("/v1/status")["disks"] >= 2


def test_a_list_that_a_client_walks_away_from(server: Server, tree: Path) -> None:
    """What it asked for is let go, and the next one is answered."""
    for _ in range(12):
        connection = UnixConnection(server.state_dir / "api.sock")
        connection.request("GET", f"/v1/files:content?{query(point='d@latest', path='/sparse')}")
        connection.getresponse().read(10)
        connection.close()
    until(
        lambda: fetch(server, "files:content", point="d@latest", path="/large")[0] == 200,
        "answer after those who left",
    )


def test_a_disk_that_was_browsed_is_removed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    protect(server, "gone", make.make_ext(tmp_path / "image", tmp_path / "tree", size="8M").read_bytes())
    assert pages(server, "files", 9, point="gone@latest")[0]["name"] == "lost+found"
    server.delete("/v1/disks/gone")
    with pytest.raises(ApiError) as caught:
        pages(server, "files", 9, point="gone@latest")
    assert caught.value.status == 404


def test_many_points_at_once_make_room_for_each_other(server: Server) -> None:
    for number in range(browsing.MOST + 2):
        server.post("/v1/disks/d:mark", name=f"many-{number}")
        assert pages(server, "files", 1000, point=f"d@many-{number}")
    # A spare one is loading beside them.
    assert len(sessions(server)) <= browsing.MOST + 1


def test_who_may_read_files_is_said_in_the_description(server: Server) -> None:
    described = server.get("/v1/openapi.json")["paths"]
    routes = {
        path: operations["get"] for path, operations in described.items() if path.startswith("/v1/files")
    }
    assert len(routes) == 8
    assert {operation["x-least-role"] for operation in routes.values()} == {"operator"}
    assert json.dumps(routes["/v1/files:content"]).count("206")


def test_a_point_that_is_gone_by_the_next_page_is_said(server: Server) -> None:
    token = paging.write_token("files", (9_999_999, -1, 10))
    with pytest.raises(ApiError) as caught:
        server.get(f"/v1/files?{query(point='d@latest', path='/many', page_token=token)}")
    assert caught.value.status in (400, 404, 409) and caught.value.fields["hint"]
    assert size_of(server) == 2_000_000


async def test_a_session_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsing, "SILENT_S", 0.2)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        process = await trio.lowlevel.open_process(["sleep", "600"])
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        session = browsing.Session(process, stream)
        with pytest.raises(BrokenError, match="said nothing"):
            await session.exchange({"op": "stat"})
        await process.wait()
        assert not session.is_there
        with pytest.raises(BrokenError):
            await session.exchange({"op": "stat"})
        await stream.aclose()
