"""Without a service: what reads works on a copy of the state directory, on read-only media, and for who may only read."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cdpserver.catalog import Catalog
from cdpserver.catalog.rows import FORMAT, TABLES
from cdpserver.index.indexer import rebuild
from cdpserver.journal import control
from cdpserver.journal.links import Chain
from recovery import cli
from tests.test_check import BLOCK, BOOT, SIZE, Disk, empty_disk
from tools.kit.processes import until

NOBODY = 65534
"""Owns the store; root without these capabilities may only read it."""

WITHOUT = "-dac_override,-dac_read_search,-fowner,-chown"

BIN = Path(sys.executable).parent
WAYS: dict[str, list[str]] = {
    "copy": [],
    "read-only media": [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"',
    ],
    "another user": ["setpriv", f"--bounding-set={WITHOUT}", f"--inh-caps={WITHOUT}", "--"],
}


@dataclass(frozen=True)
class Store:
    """A state directory that nobody serves; `before` is the disk at its bookmark."""

    path: Path
    before: bytes
    room: Path

    def cdp(self, way: str, *words: str) -> subprocess.CompletedProcess[str]:
        prefix = list(WAYS[way])
        if way == "read-only media":
            prefix.append(str(self.path))
        command = [*prefix, sys.executable, "-m", "recovery.cli", *words, "--state-dir", str(self.path)]
        environment = {**os.environ, "XDG_STATE_HOME": str(self.room), "HOME": str(self.room)}
        environment |= {"TMPDIR": str(self.room), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}{os.pathsep}/usr/sbin"
        return subprocess.run(
            command, text=True, capture_output=True, check=False, timeout=120, env=environment
        )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """As a service that is gone left it, of another boot: with an ext4 in its first copy, two intervals, a bookmark and links."""
    place = tmp_path_factory.mktemp("offline")
    disk = empty_disk(place / "made")
    base = disk.directory / "base.raw"
    tree = place / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/motd").write_text("it is there\n")
    base.chmod(0o600)
    subprocess.run(["mke2fs", "-q", "-t", "ext2", "-d", tree, base], check=True, capture_output=True)
    _history(disk)
    before = bytearray(base.read_bytes())
    before[250 * BLOCK : 251 * BLOCK] = bytes([1]) * BLOCK
    content = {"format": FORMAT, "next_id": 2, "disks": {"d": {"id": "t1", "state": "live", "created_ns": 1}}}
    content |= {table: {} for table in TABLES}
    disk.state.catalog_copy.write_text(json.dumps(content))
    Catalog.recover(disk.state)
    path = place / "copy"
    shutil.copytree(disk.state.path, path, symlinks=True)
    shutil.rmtree(disk.state.path)
    room = place / "room"
    room.mkdir()
    for found in (path, *path.rglob("*")):
        found.chmod(0o755 if found.is_dir() else 0o644)
        os.chown(found, NOBODY, NOBODY)
    return Store(path, bytes(before), room)


def _history(disk: Disk) -> None:
    writer = disk.open()
    writer.synced(control.synced(1, write_blocking=True))
    disk.write(250, 1)
    writer.mark(control.mark("before"))
    disk.write(251, 2)
    writer.cut()
    disk.write(250, 3)
    writer.commit()
    writer.close()
    rebuild(disk.directory, BOOT)
    with Chain.open(disk.directory, disk.timeline.uuid) as chain:
        chain.catch_up(10)


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_points_are_listed_and_shown(store: Store, way: str) -> None:
    done = store.cdp(way, "point", "list", "d", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(done.stdout) if row["kind"] == "bookmark"] == ["before"]
    done = store.cdp(way, "point", "show", "d@before", "--json")
    assert json.loads(done.stdout)["grade"] == "crash", done.stderr


def test_a_point_is_exported(store: Store, way: str) -> None:
    target = store.room / f"{way.replace(' ', '-')}.raw"
    done = store.cdp(way, "export", "d@before", "--output", str(target), "--format", "raw")
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == store.before


def test_files_are_listed_and_taken(store: Store, way: str) -> None:
    done = store.cdp(way, "file", "ls", "d@before", "/etc", "--json")
    assert done.returncode == 0 and "motd" in done.stdout, done.stderr
    done = store.cdp(way, "file", "cat", "d@latest", "/etc/motd")
    assert (done.returncode, done.stdout) == (0, "it is there\n"), done.stderr


def test_everything_is_checked_and_nothing_is_called_damaged(store: Store, way: str) -> None:
    done = store.cdp(way, "check", "d", "--full", "--chain", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["whole"] and found["chain"]["links"] == 1, done
    done = store.cdp(way, "check", "d", "--within", "0s", "--json")
    assert json.loads(done.stdout)["complete"] is False, done


def test_a_uri_is_served_until_its_last_client_has_gone(store: Store, way: str) -> None:
    done = store.cdp(way, "uri", "d@before")
    assert done.returncode == 0, done.stderr
    uri = done.stdout.strip()
    socket = Path(uri.partition("socket=")[2])
    target = store.room / "copied.raw"
    subprocess.run(["nbdcopy", uri, str(target)], check=True, timeout=60)
    assert target.read_bytes() == store.before and len(store.before) == SIZE
    until(lambda: not socket.parent.exists(), "end of the export")
    target.unlink()


def test_what_was_read_is_as_it_was(store: Store) -> None:
    """Nobody writes to media that are read-only; a reader of a copy leaves leases and locks, and no other change."""
    names = {path.name for path in (store.path / "timelines/t1").iterdir()}
    assert names <= {
        "timeline.json",
        "base.raw",
        "base.synced",
        "intervals",
        "lease",
        "leases",
        "writer.lock",
        "index.lock",
        "links",
        "chain.lock",
    }


ANSWERED = (
    "disk list", "disk show d", "point list d", "point show d@before", "bp list d", "fork list", "point locks", "policy show d",
    "group list", "rpo d", "event list", "point drills", "backup source list", "snapshot tree d", "usage", "repo list",
    "timeline show d", "catalog show",
)  # fmt: skip
NEEDS_IT = ("status", "metrics", "job list", "recover list", "prune --dry-run", "disk uri d")


@pytest.mark.parametrize("words", ANSWERED + NEEDS_IT)
def test_every_command_that_reads_answers_or_says_why_not(
    store: Store, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(store.room))
    monkeypatch.setattr(sys, "argv", ["cdp", *words.split(), "--json", "--state-dir", str(store.path)])
    code = cli.main()
    said = capsys.readouterr()
    if words in ANSWERED:
        assert code == 0 and said.out, said.err
        json.loads(said.out)
    else:
        assert code == 6 and "does not answer" in said.err and len(said.err.splitlines()) == 1
