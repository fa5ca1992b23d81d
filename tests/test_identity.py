"""A target that comes back as something else than what QEMU's mirror goes on with: our side notices, and nothing is mixed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.test_protect import BLOCK, SIZE, content, graded, guest, in_sync, protect, same_as_source
from tests.test_service import ApiError, Server, until
from tools.kit.processes import run
from tools.kit.qmp import Qmp
from tools.kit.source import Source

pytestmark = pytest.mark.real


@contextlib.contextmanager
def in_protection(directory: Path, **more: Any) -> Iterator[tuple[Source, Path, nbd.NBD]]:
    """A guest that is protected and in sync, by a service that has ended; the state directory, and the guest."""
    with Source(directory, SIZE) as source, guest(source) as writes:
        source.qmp.close()
        with Server(directory / "state") as server:
            writes.pwrite(b"a" * BLOCK, 0)
            protect(server, source, **more)
            in_sync(server)
            writes.pwrite(b"b" * BLOCK, BLOCK)
            server.stop()
        yield source, directory / "state", writes


def reasons(server: Server) -> str:
    return " ".join(event["reason"] for event in server.events("disk.unprotected"))


@pytest.mark.parametrize("more", [{}, {"wait": True}], ids=["default", "wait"])
def test_an_older_copy_is_noticed(short_path: Path, more: dict[str, Any]) -> None:
    """Even where the mirror never saw an error, since it waits: the copy lacks what came after it."""
    with in_protection(short_path, **more) as (source, state, writes):
        run("cp", "-a", state, short_path / "older")
        with Server(state) as server:
            in_sync(server)
            for number in range(8):
                writes.pwrite(bytes([number]) * BLOCK, (number + 2) * BLOCK)
            # What the target holds is kept in QEMU every two seconds, and at once by a controller that begins.
            protect(server, source, **more)
            in_sync(server)
            server.stop()
        state.rename(short_path / "lost")
        (short_path / "older").rename(state)
        with Server(state) as server:
            until(lambda: "older state" in reasons(server) or "not what" in reasons(server), "distrust")
            in_sync(server)
            graded(server, "crash")
            assert same_as_source(server, source)


def test_an_empty_state_directory_takes_nothing(short_path: Path) -> None:
    with in_protection(short_path) as (source, state, writes):
        state.rename(short_path / "lost")
        with Server(state) as server:
            writes.pwrite(b"c" * BLOCK, 0)
            # Somebody makes a disk of the same name: what QEMU's old mirror goes on with is not in it.
            server.add("disk0", vm="web")
            for number in range(4):
                writes.pwrite(bytes([number]) * BLOCK, number * BLOCK)
            assert server.get("/v1/disks/web/disk0")["state"] == "empty"
            with pytest.raises(ApiError):
                server.get("/v1/vms/web")
            protect(server, source)
            in_sync(server)
            graded(server, "crash")
            assert same_as_source(server, source)
            assert server.delete("/v1/vms/web")["left"] == ""
        with Qmp(source.monitor) as qmp:
            assert qmp.call("query-block-jobs") == []


VMS = ("web", "db")


def shows(server: Server, vm: str, key: str, text: str) -> None:
    """A VM's disk says that of itself, in the end."""
    until(lambda: text in server.get(f"/v1/vms/{vm}")["disks"][0][key], f"{text} in {key} of {vm}")


def swap(state: Path) -> None:
    """Each of the two disks' names leads to the other's timeline."""
    first, second = sorted((state / "timelines").iterdir())
    first.rename(state / "swap")
    second.rename(first)
    (state / "swap").rename(second)


def test_disks_that_were_swapped_are_not_mixed(short_path: Path) -> None:
    """Nothing of the one is served, or taken, as the other; put right, each goes on with what is its own."""
    (short_path / "b").mkdir()
    with in_protection(short_path) as (source, state, writes), Source(short_path / "b", SIZE) as other:
        other.qmp.close()
        with guest(other) as others:
            others.pwrite(b"x" * BLOCK, 0)
            before: dict[str, bytes] = {}
            with Server(state) as server:
                in_sync(server)
                server.request("PUT", "/v1/vms/db", {"qmp": str(other.monitor), "disks": ["disk0"]})
                shows(server, "db", "state", "synced")
                for vm in VMS:
                    server.post(f"/v1/disks/{vm}/disk0:mark", name="before")
                    before[vm] = content(server.uri(f"{vm}/disk0@before"))
                server.stop()
            assert before["web"] != before["db"]
            swap(state)
            with Server(state) as server:
                for handle, byte in ((writes, b"w"), (others, b"o")):
                    for number in range(4):
                        handle.pwrite(byte * BLOCK, number * BLOCK)
                for vm in VMS:
                    shows(server, vm, "reason", "is of timeline")
                    for when in ("before", "latest"):
                        with pytest.raises(ApiError, match="is of timeline"):
                            server.uri(f"{vm}/disk0@{when}")
                server.stop()
            swap(state)
            with Server(state) as server:
                for vm, of in (("web", source), ("db", other)):
                    shows(server, vm, "state", "synced")
                    assert content(server.uri(f"{vm}/disk0@before")) == before[vm]
                    assert content(server.uri(f"{vm}/disk0@latest")) == of.image.read_bytes()
