"""What a resync of a running VM costs, and what it must not trust: real QEMU, its QCOW2 files and their dirty bitmaps."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.test_protect import disk, guest, in_sync, protect
from tests.test_service import ApiError, Server, until
from tools.kit.qmp import Qmp
from tools.kit.source import Source

pytestmark = pytest.mark.real

MIB = 1 << 20
SIZE = 64 * MIB
CLUSTER = 64 << 10


@contextlib.contextmanager
def source(directory: Path, format: str = "qcow2") -> Iterator[Source]:
    """A storage daemon whose disk holds what does not compress, and whose monitor nobody holds."""
    with Source(directory, SIZE, format=format) as made:
        made.qmp.close()
        with guest(made) as writes:
            for at in range(0, SIZE, MIB):
                writes.pwrite(random.Random(at).randbytes(MIB), at)
            writes.flush()
        yield made


def anchored(server: Server) -> dict[str, Any]:
    """The disk, once the target is in sync and anchored to a bitmap."""

    def look() -> dict[str, Any] | None:
        with contextlib.suppress(ApiError, OSError):
            seen = disk(server)
            if seen["state"] == "synced" and seen["bitmap"]:
                return seen
        return None

    return until(look, "an anchored bitmap")


def write_one_percent(writes: nbd.NBD) -> int:
    """Ten clusters in a thousand, here and there; how many bytes."""
    places = range(0, SIZE, 100 * CLUSTER)
    for place in places:
        writes.pwrite(random.Random(-place - 1).randbytes(CLUSTER), place)
    return len(places) * CLUSTER


def quits(made: Source) -> None:
    """QEMU ends cleanly."""
    with Qmp(made.monitor) as qmp:
        qmp.call("quit")
    made.process.wait(30)


def starts(made: Source) -> None:
    made.start()
    made.qmp.close()


def same(server: Server, made: Source) -> bool:
    return read(server.uri("web/disk0@latest")) == read(made.uri)


def read(uri: str) -> bytes:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        return b"".join(bytes(handle.pread(MIB, at)) for at in range(0, SIZE, MIB))
    finally:
        handle.shutdown()


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_one_percent_changed_while_disconnected(short_path: Path, format: str) -> None:
    """With a dirty bitmap about that is sent; without one everything is, and about that is journalled."""
    with source(short_path, format) as made:
        with Server(short_path / "state") as server:
            protect(server, made)
            assert anchored(server)["resync"]["why"] == "the first copy"
            assert server.stop() == 0
        with guest(made) as writes:
            changed = write_one_percent(writes)
            writes.flush()
        quits(made)
        starts(made)
        with Server(short_path / "state") as server:
            resync = in_sync(server)["resync"]
            assert not resync["under_way"]
            if format == "qcow2":
                assert resync["method"] == "bitmap", resync
                assert changed <= resync["sent_bytes"] <= 1.5 * changed
            else:
                assert resync["method"] == "full", resync
                assert resync["why"] == "the source has no dirty bitmap"
                assert resync["sent_bytes"] == SIZE
            assert changed <= resync["journalled_bytes"] <= 1.5 * changed
            assert same(server, made)
            anchored(server)
            (event,) = server.events("disk.protected")[-1:]
            assert event["method"] == resync["method"] and event["sent_bytes"] == resync["sent_bytes"]
