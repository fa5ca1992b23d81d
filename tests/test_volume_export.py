"""NBD exports of a single partition or logical volume of a point."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from cdpserver.errors import NotFoundError
from tests import filesystems as make
from tests.test_service import ApiError, Server, connected, read

pytestmark = pytest.mark.real

MIB = 1 << 20


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


def protect(server: Server, name: str, disk: bytes) -> None:
    """A disk that holds this, its zeros unwritten."""
    uri = str(server.post("/v1/disks", name=name, size=len(disk))["uri"])
    with connected(uri) as client:
        for at in range(0, len(disk), MIB):
            if any(disk[at : at + MIB]):
                client.pwrite(disk[at : at + MIB], at)
    server.synced(name)


def status(client: Any, offset: int, length: int) -> list[tuple[int, int]]:
    """(end, flags) of the whole range, neighbours joined."""
    runs: list[tuple[int, int]] = []
    at = offset

    def take(context: str, start: int, entries: list[int], error: Any) -> int:
        nonlocal at
        for size, flags in zip(entries[::2], entries[1::2], strict=True):
            at = min(at + size, offset + length)
            if runs and runs[-1][1] == flags:
                runs.pop()
            runs.append((at - offset, flags))
        return 0

    while at < offset + length:
        client.block_status(offset + length - at, at, take)
    return runs


def opened_with_status(uri: str) -> Any:
    client = nbd.NBD()
    client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.connect_uri(uri)
    return client


def test_partitions(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "hello").write_text("hello\n")
    ext4 = make.make_ext(tmp_path / "ext4", tmp_path / "tree", size="8M").read_bytes()
    disk = make.disk_with(b"\x17" * (3 * MIB), ext4)
    protect(server, "vm0", disk)
    uri = server.uri("vm0@latest/p2")
    assert "/vm0@seq:" in uri and uri.partition("?")[0].endswith("/p2")
    with connected(uri) as client:
        assert client.get_size() == len(ext4) and client.is_read_only() and client.can_multi_conn()
    assert read(uri, len(ext4)) == ext4
    assert read(server.uri("vm0@latest/p1"), 3 * MIB) == b"\x17" * (3 * MIB)
    whole, part = opened_with_status(server.uri("vm0@latest")), opened_with_status(uri)
    place = disk.index(ext4[1024:4096]) - 1024
    assert (found := status(part, 0, len(ext4))) == status(whole, place, len(ext4))
    assert len(found) > 1, "it has data and holes"
    whole.shutdown()
    part.shutdown()
    # A file system's own tool reads it.
    copy = tmp_path / "copy"
    subprocess.run(["nbdcopy", uri, copy], check=True)
    make.run("e2fsck", "-fn", copy)
    done = subprocess.run(
        [sys.executable, "-m", "recovery.cli", "--state-dir", server.state_dir, "uri", "vm0@latest/p2"],
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().strip() == uri


def test_what_is_not_there_is_refused(server: Server) -> None:
    protect(server, "d", make.disk_with(b"\x17" * MIB))
    for volume in ("p2", "lv/vg0/root"):
        with pytest.raises(nbd.Error):
            read(server.uri(f"d@latest/{volume}"), 512)
    (refused, _) = server.events(f"export.{NotFoundError.kind}")
    assert "the disk has no p2" in refused["reason"]
    with pytest.raises(ApiError) as caught:
        server.uri("d@latest/nonsense")
    assert caught.value.status == 400
    assert read(server.uri("d@latest/p1"), 512) == b"\x17" * 512, "the export goes on"


@pytest.mark.skipif(os.geteuid() != 0, reason="lvm wants a block device: a loop device needs root")
def test_a_logical_volume_in_two_pieces(server: Server, tmp_path: Path) -> None:
    """Mountable without device-mapper: its pieces come one after the other."""
    (tmp_path / "tree").mkdir()
    root = bytearray(make.make_ext(tmp_path / "ext4", tmp_path / "tree", size="96M").read_bytes())
    root[31 * MIB : 34 * MIB] = os.urandom(3 * MIB)  # across the seam
    protect(server, "d", make.disk_with_lvm(tmp_path / "disk", bytes(root)))
    uri = server.uri("d@latest/lv/cdpfiles/root")
    with connected(uri) as client:
        assert client.get_size() == 96 * MIB
        assert bytes(client.pread(4 * MIB, 30 * MIB)) == root[30 * MIB : 34 * MIB]
    copy = tmp_path / "copy"
    subprocess.run(["nbdcopy", uri, copy], check=True)
    assert copy.read_bytes() == root
    with connected(server.uri("d@latest/lv/cdpfiles/other")) as client:
        assert client.get_size() == 16 * MIB
