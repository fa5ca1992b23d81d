"""`cdp mount`: a point as a directory, against the tree that its file systems were made from."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import filesystems as make
from tests.test_service import Server, read, until
from tests.test_volume_export import protect

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="FUSE needs /dev/fuse"),
]


def cdp(server: Server, *arguments: str | Path, code: int = 0) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "recovery.cli", "--state-dir", server.state_dir, *arguments],
        capture_output=True,
        check=False,
    )
    assert done.returncode == code, done.stderr.decode()
    return done.stderr


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


def test_a_point_is_a_directory(server: Server, tmp_path: Path) -> None:
    tree = make.source_tree(tmp_path / "tree", 50)
    ext4 = make.make_ext(tmp_path / "ext4", tree, size="32M").read_bytes()
    disk = make.disk_with(b"\x17" * (1 << 20), ext4)
    protect(server, "vm0", disk)
    there = tmp_path / "there"
    there.mkdir()
    cdp(server, "mount", "vm0@latest", there)
    try:
        assert sorted(os.listdir(there)) == ["disk.img", "p2"]
        assert (there / "disk.img").read_bytes() == disk == read(server.uri("vm0@latest"), len(disk))
        same = subprocess.run(
            ["diff", "-r", "--no-dereference", "-x", "lost+found", "-x", "pipe", tree, there / "p2"],
            capture_output=True,
            check=False,
        )
        assert same.returncode == 0, same.stdout
        assert (there / "p2" / "many").stat().st_mtime_ns == make.MTIME_NS
        assert (there / "p2" / "empty").stat().st_mode & 0o7777 == 0o751
        for attempt in ((there / "p2" / "new").touch, (there / "disk.img").unlink):
            with pytest.raises(OSError, match="Read-only"):
                attempt()
        assert not (there / "p2" / "nothing").exists()
        cdp(server, "mount", "vm0@latest", there, code=2)
    finally:
        cdp(server, "umount", there)
    assert not os.path.ismount(there)
    leases = server.state_dir / "timelines"
    until(lambda: not holders(leases), "end of the mount's process")
    assert b"after the newest record" in cdp(server, "mount", "vm0@seq:999", there, code=2)


def holders(timelines: Path) -> list[str]:
    """Processes of `cdp mount` that read from here."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"mount" in words and os.fsencode(timelines.parent) in words:
            found.append(process.parent.name)
    return found


def test_what_cannot_be_read_is_an_error_and_an_event(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(os.urandom(2 << 20))
    ext4 = make.make_ext(tmp_path / "ext4", tmp_path / "tree", size="8M").read_bytes()
    protect(server, "d", ext4)
    there = tmp_path / "there"
    there.mkdir()
    cdp(server, "mount", "d@latest", there)
    try:
        assert (there / "fs" / "big").stat().st_size == 2 << 20
        (base,) = (server.state_dir / "timelines").glob("*/base.raw")
        os.truncate(base, 4096)
        with pytest.raises(OSError, match="Input/output"):
            (there / "fs" / "big").read_bytes()
        assert server.events("mount.failed")[0]["path"] == "/fs/big"
    finally:
        cdp(server, "umount", there)
