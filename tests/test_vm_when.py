"""`VM@WHEN` and `GROUP@WHEN` wherever `DISK@WHEN` is taken: one instant for all disks, or a refusal that says what to do."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver import names
from tests.core import SECOND_NS
from tests.test_service import ApiError, Server, connected, read, until

pytestmark = pytest.mark.real

DISKS = ("web/a", "web/b", "db/c", "alone")


def cdp(server: Server, *arguments: str, code: int = 0) -> str:
    """What a command answers; what it says, of one that is to fail."""
    done = subprocess.run(
        [sys.executable, "-m", "recovery.cli", "--state-dir", str(server.state_dir), *arguments],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def numbers(server: Server, points: list[str]) -> list[int]:
    return [int.from_bytes(read(server.uri(point), 8), "big") for point in points]


class Writers:
    """Disks that get the same number one after the other, in the order of DISKS."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.number = 0
        self.clients: dict[str, Any] = {}

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            self.number += 1
            for client in self.clients.values():
                client.pwrite(self.number.to_bytes(8, "big") + bytes(4088), 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writers]:
    """A VM of two disks, one of one, and a disk alone, all in sync."""
    import contextlib
    import tempfile

    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cdp-")))
        server = stack.enter_context(Server(directory / "s"))
        writers = Writers(server)
        for disk in DISKS:
            name, vm = names.split_name(disk)
            uri = server.add(name, **({"vm": vm} if vm else {}))
            writers.clients[disk] = stack.enter_context(connected(uri))
        writers.write()
        for disk in DISKS:
            server.synced(disk, write_blocking=True)
        writers.write(5)
        cdp(server, "group", "add", "shop", "web", "alone")
        yield writers


def test_one_instant_for_all_disks(world: Writers) -> None:
    """`latest` is one time; each URI is absolute, and a disk written later never shows more than one written before."""
    server = world.server
    found = json.loads(cdp(server, "uri", "web@latest", "--json"))
    assert [disk["disk"] for disk in found["disks"]] == ["web/a", "web/b"]
    assert found["grade"] == "crash"
    before = world.number
    world.write(3)
    assert numbers(server, [disk["point"] for disk in found["disks"]]) == [before, before]
    assert len(cdp(server, "uri", f"web@{found['time']}").splitlines()) == 2
    of_group = json.loads(cdp(server, "uri", "shop@latest", "--json"))
    assert [disk["disk"] for disk in of_group["disks"]] == ["alone", "web/a", "web/b"]
    assert cdp(server, "uri", "web@latest/a").strip().startswith("nbd+unix:///web/a@seq:")
    assert "web has several disks" in cdp(server, "uri", "web@bp:0", code=2)
    assert json.loads(cdp(server, "point", "show", "shop@latest", "--json"))["grade"] == "crash"


def test_a_bookmark_of_a_vm_is_one_instant(world: Writers) -> None:
    server = world.server
    world.write(2)
    made = json.loads(cdp(server, "point", "mark", "shop", "--name", "one", "--json"))
    before = world.number
    assert made["kind"] == "bookmark" and made["name"] == "one" and made["grade"] == "crash"
    world.write(2)
    assert numbers(server, [f"{disk}@one" for disk in ("web/a", "web/b", "alone")]) == [before] * 3
    found = json.loads(cdp(server, "uri", "shop@one", "--json"))
    assert numbers(server, [disk["point"] for disk in found["disks"]]) == [before] * 3
    listed = json.loads(cdp(server, "point", "list", "shop", "--kind", "bookmark", "--json"))
    assert [(point["name"], point["time_ns"]) for point in listed] == [("one", found["time_ns"])]
    assert "has a bookmark one already" in cdp(server, "point", "mark", "web", "--name", "one", code=3)
    for disk in ("web/a", "web/b"):
        cdp(server, "point", "mark", disk, "--name", "by-hand")
        world.write()
    assert "different instants" in cdp(server, "uri", "web@by-hand", code=3)


def test_bookmarks_under_load_are_never_of_two_instants(world: Writers) -> None:
    """Marks are set while both disks are written: the second never shows more than the first."""
    import threading

    server, over = world.server, threading.Event()

    def load() -> None:
        while not over.is_set():
            world.write()

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for number in range(20):
            server.post("/v1/disks/web:mark", name=f"loaded-{number}")
    finally:
        over.set()
        thread.join()
    for number in range(20):
        a, b = numbers(server, [f"web/{disk}@loaded-{number}" for disk in "ab"])
        assert a - b in (0, 1)
        found = server.get(f"/v1/uri?point=web@loaded-{number}")
        assert numbers(server, [disk["point"] for disk in found["disks"]]) == [a, b]


def test_locks_are_set_and_taken_back_together(world: Writers) -> None:
    server = world.server
    made = json.loads(cdp(server, "point", "lock", "web@latest", "--until", "1h", "--json"))
    assert [lock["disk"] for lock in made["locks"]] == ["web/a", "web/b"]
    assert len(json.loads(cdp(server, "point", "locks", "web", "--json"))) == 2
    fixed = server.post("/v1/locks", point=made["locks"][1]["point"], until="2h", immutable=True)
    world.write()
    when = f"web@{made['time']}"
    # The second disk's terms cannot be made less: so the first one's stay as they were.
    assert "immutable" in cdp(server, "point", "lock", when, "--until", "3h", code=3)
    held = {lock["disk"]: lock["until_ns"] for lock in server.get("/v1/locks?disk=web")}
    assert held == {"web/a": made["locks"][0]["until_ns"], "web/b": fixed["until_ns"]}
    assert "immutable" in cdp(server, "point", "unlock", when, code=3)
    assert len(server.get("/v1/locks?disk=web")) == 2
    again = server.post("/v1/locks", point="db@latest")
    world.write()
    assert len(server.delete(f"/v1/locks/db@{again['time']}")["locks"]) == 1
    assert server.get("/v1/locks?disk=db") == []


def test_forks_of_a_vm_are_made_together(world: Writers) -> None:
    server = world.server
    world.write()
    number = world.number
    made = json.loads(cdp(server, "fork", "add", "web@latest", "rescue", "--json"))
    assert [fork["name"] for fork in made["forks"]] == ["rescue/a", "rescue/b"]
    assert numbers(server, ["rescue/a@latest", "rescue/b@latest"]) == [number, number]
    cdp(server, "fork", "add", "shop@latest", "copy")
    assert {"copy-web/a", "copy-web/b", "copy-alone"} <= {f["name"] for f in server.get("/v1/forks")}
    server.add("b", vm="half")
    assert "there is a disk half/b already" in cdp(server, "fork", "add", "web@latest", "half", code=3)
    assert "half/a" not in {fork["name"] for fork in server.get("/v1/forks")}
    assert "is a group" in cdp(server, "fork", "add", "web/a@latest", "shop", code=3)


def test_a_vm_is_exported_to_a_directory(world: Writers, tmp_path: Path) -> None:
    """One file a disk, all of one instant; interrupted, it goes on with the instant that it began with."""
    server, out = world.server, tmp_path / "out"
    world.write()
    number = world.number
    done = json.loads(cdp(server, "export", "shop@latest", "--output", str(out), "--verify", "--json"))
    files = [out / "alone.raw", out / "web/a.raw", out / "web/b.raw"]
    assert [Path(disk["output"]) for disk in done["disks"]] == files
    assert [int.from_bytes(file.read_bytes()[:8], "big") for file in files] == [number] * 3
    assert "is there already" in cdp(server, "export", "shop@latest", "--output", str(out), code=3)
    # As if it had been killed between the second file and the third.
    world.write()
    files[2].unlink()
    plan = {"point": "shop@latest", "disks": {
        disk["point"].partition("@")[0]: disk["point"] for disk in done["disks"]
    }}  # fmt: skip
    (out / ".cdp-export.json").write_text(json.dumps(plan))
    cdp(server, "export", "shop@latest", "--output", str(out))
    assert int.from_bytes(files[2].read_bytes()[:8], "big") == number
    assert not (out / ".cdp-export.json").exists()


def test_what_takes_one_disk_says_which_there_are(world: Writers, tmp_path: Path) -> None:
    server = world.server
    for command in (("file", "ls"), ("mount",)):
        rest = [str(tmp_path)] if command == ("mount",) else []
        told = cdp(server, *command, "web@latest", *rest, code=2)
        assert "web has the disks a, b" in told and "web@latest/a" in told
    assert "shop has the disks alone, web/a, web/b" in cdp(server, "file", "ls", "shop@latest", code=2)
    assert "web is a VM, and this takes a disk" in cdp(server, "bp", "list", "web", code=2)
    assert "shop is a group, and this takes a disk" in cdp(server, "disk", "show", "shop", code=2)
    # The file system that is not there is looked for on the disk that is named.
    assert "no file system" in cdp(server, "file", "ls", "web@latest/a", "/x", code=3)
    assert len(json.loads(cdp(server, "check", "web", "--json"))) == 2
    assert cdp(server, "prune", "web", "--dry-run", "--json").strip() == "[]"


def test_an_instant_that_is_not_good_is_refused_with_the_nearest(world: Writers) -> None:
    """One disk of the VM loses its mirror: `latest` is from before, and a time within says what is near."""
    server = world.server
    world.write()
    good = server.get("/v1/uri?point=web@latest")
    with connected(server.get("/v1/disks/web/b")["uri"]) as other:
        other.pwrite(b"n" * 4096, 8192)
    world.write()
    found = server.get("/v1/uri?point=web@latest")
    assert good["time_ns"] <= found["time_ns"]
    b = next(disk for disk in found["disks"] if disk["disk"] == "web/b")
    assert read(server.uri(b["point"]), 4096, 8192) == bytes(4096)
    with pytest.raises(ApiError, match=r"web/b is unordered then.*|nearest before is"):
        server.get("/v1/uri?point=web@-0s")
    with pytest.raises(ApiError, match="every disk is good"):
        server.post("/v1/disks/web:mark", name="refused")
    assert server.get("/v1/uri?point=db@latest")["grade"] == "crash", "other VMs are as good as before"
    server.synced("web/b", write_blocking=True)
    until(lambda: server.get("/v1/uri?point=web@-0s") or None, "good again")


def test_groups(world: Writers) -> None:
    server = world.server
    assert json.loads(cdp(server, "group", "show", "shop", "--json"))["disks"] == ["alone", "web/a", "web/b"]
    for name in ("web", "alone"):
        assert "already" in cdp(server, "group", "add", name, "db", code=3)
    with pytest.raises(ApiError, match="is a group"):
        server.add("shop")
    with pytest.raises(ApiError, match="is a group"):
        server.add("x", vm="shop")
    assert "no VM, disk or group" in cdp(server, "group", "add", "other", "nothing", code=2)
    assert "is a group" in cdp(server, "group", "add", "other", "shop", code=2)
    assert json.loads(cdp(server, "group", "add", "pair", "db", "alone", "--json"))["members"] == [
        "alone",
        "db",
    ]
    cdp(server, "group", "remove", "pair", "db")
    assert json.loads(cdp(server, "group", "list", "--json"))[0]["members"] == ["alone"]
    assert "no member" in cdp(server, "group", "remove", "pair", "db", code=2)
    cdp(server, "group", "remove", "pair", "alone")
    assert [group["name"] for group in server.get("/v1/groups")] == ["shop"]
    server.add("gone")
    server.request("PUT", "/v1/groups/frail", {"members": ["gone", "db"]})
    server.delete("/v1/disks/gone")
    assert "not there any more" in cdp(server, "uri", "frail@latest", code=3)
    assert "gone" in server.get("/v1/groups/frail")["problem"]
    found = until(lambda: server.get("/v1/vms/shop:points"), "points of the group")
    assert set(found[-1]["disks"]) == {"alone", "web/a", "web/b"} and found[-1]["time_ns"] % SECOND_NS
