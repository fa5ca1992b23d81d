"""`cdp repo` and `cdp backup` against a real server: into a repository, killed on the way, and back."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver.errors import CdpError, CorruptError, NoSpaceError, NotFoundError, RefusedError, UsageError
from cdpserver.repository import keys, packs, seal
from recovery import cli
from tests.test_service import SIZE, Server, connected, read
from tools.kit.processes import until

pytestmark = pytest.mark.real

MIB = 1 << 20


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        uri = running.add()
        with connected(uri) as client:
            client.pwrite(os.urandom(3 * MIB), 0)
        running.synced("d", write_blocking=True)
        yield running


@pytest.fixture(autouse=True)
def place(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and caches of ours in the test's own directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(short_path / "xdg"))
    monkeypatch.setenv("CDP_REPO", str(short_path / "repo"))


def cdp(server: Server, capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """What a command answers in JSON."""
    options = cli.parse(["--state-dir", str(server.state_dir), *map(str, arguments), "--json"])
    assert (options.run(options) or 0) == code
    return json.loads(capsys.readouterr().out)


def write(server: Server, data: bytes, offset: int) -> None:
    with connected(str(server.get("/v1/disks/d")["uri"])) as client:
        client.pwrite(data, offset)


@pytest.mark.parametrize("key", [False, True])
def test_into_a_repository_and_back(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str], key: bool
) -> None:
    """Full, incremental, restored as raw and QCOW2, verified; the service may be down."""
    options = ("--key-file", short_path / "key") if key else ()
    (short_path / "key").write_bytes(b"correct horse battery staple\n")
    made = cdp(server, capsys, "repo", "init", short_path / "repo", "--chunk-size", "256K", *options)
    assert (made["chunk_size"], made["cipher"]) == (256 << 10, "aes-256-gcm" if key else "none")
    first = cdp(server, capsys, "backup", "run", "d@latest", *options)
    assert (first["kind"], first["disks"][0]["name"], first["disks"][0]["size"]) == ("full", "d", SIZE)
    assert first["read_bytes"] == 3 * MIB
    before = read(server.uri("d@latest"))
    write(server, os.urandom(4096), 5 * MIB)
    second = cdp(server, capsys, "backup", "run", "d@latest", *options)
    assert (second["kind"], second["read_bytes"], second["new_bytes"]) == ("incremental", 4096, 4096)
    assert second["disks"][0]["patched"] == 1
    assert second["stored_bytes"] < 8 << 10
    after = read(server.uri("d@latest"))
    server.stop()
    third = cdp(server, capsys, "backup", "run", "d@latest", *options)
    assert third["read_bytes"] == 0
    for id_, format, content in ((first["id"], "raw", before), ("latest", "qcow2", after)):
        output = short_path / f"o.{format}"
        told = cdp(
            server, capsys, "backup", "restore", id_, "--output", output, "--format", format, "--verify", *options
        )  # fmt: skip
        assert told["verified"]
        raw = short_path / "plain"
        subprocess.run(["qemu-img", "convert", "-f", format, "-O", "raw", output, raw], check=True)
        assert raw.read_bytes() == content
    assert [b["id"] for b in cdp(server, capsys, "backup", "list", *options)] == [
        first["id"], second["id"], third["id"],
    ]  # fmt: skip
    assert cdp(server, capsys, "backup", "verify", "latest", *options)["sound"]
    assert cdp(server, capsys, "repo", "check", short_path / "repo", *options)["sound"]
    assert cdp(server, capsys, "repo", "show", short_path / "repo", *options)["backups"] == 3
    assert [row["state"] for row in cdp(server, capsys, "repo", "list")] == ["there"]
    if key:
        with pytest.raises(RefusedError, match="is encrypted"):
            cdp(server, capsys, "backup", "list")
        by_command = ("--key-command", f"cat {short_path / 'key'}")
        assert len(cdp(server, capsys, "backup", "list", *by_command)) == 3
        other = ("repo", "copy", short_path / "repo", "--to", short_path / "other", *by_command)
        (short_path / "key2").write_bytes(b"the other one's")
        cdp(server, capsys, "repo", "init", short_path / "other", "--key-file", short_path / "key2")
        with pytest.raises(RefusedError, match="not the key"):
            cdp(server, capsys, *other, "--to-key-command", f"cat {short_path / 'key'}")
        told = cdp(server, capsys, *other, "--to-key-command", f"cat {short_path / 'key2'}")
        assert told["copied"] == [first["id"], second["id"], third["id"]]


def test_a_backup_is_a_point(server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`backup:ID` opens at once, is forked, booted from and browsed as any point is; it is held meanwhile, and let go."""
    repo, key = short_path / "repo", short_path / "key"
    key.write_bytes(b"correct horse battery staple\n")
    options = ("--key-file", key)
    cdp(server, capsys, "repo", "init", repo, "--chunk-size", "64K", *options)
    id_ = cdp(server, capsys, "backup", "run", "d@latest", *options)["id"]
    before = read(server.uri("d@latest"))
    write(server, bytes(MIB), 0)
    with pytest.raises(RefusedError, match="is encrypted"):
        cdp(server, capsys, "uri", f"backup:{id_}")
    with pytest.raises(RefusedError, match="key command ended with 3"):
        cdp(server, capsys, "uri", f"backup:{id_}", "--key-command", "exit 3")
    uri = cdp(server, capsys, "uri", f"backup:{id_}", "--key-command", f"cat {key}")["uri"]
    assert read(uri) == before
    assert cdp(server, capsys, "uri", "backup:latest/d")["uri"] == uri, "it is known by now, with its key"
    with pytest.raises(NotFoundError, match="no backup"):
        cdp(server, capsys, "uri", "backup:1999")
    with connected(uri) as client:
        assert client.is_read_only()
    fork = cdp(server, capsys, "fork", "add", f"backup:{id_}", "again")
    with connected(fork["uri"]) as client:
        client.pwrite(b"x" * 4096, 0)
    assert read(fork["uri"]) == b"x" * 4096 + before[4096:]
    assert read(uri) == before
    output = short_path / "out.raw"
    cdp(server, capsys, "export", f"backup:{id_}", "--output", output, "--verify")
    assert output.read_bytes() == before
    assert [row["base"] for row in cdp(server, capsys, "fork", "list")] == [
        f"backup-{id_}/d@seq:1", f"backup:{id_}/d",
    ]  # fmt: skip
    with pytest.raises(RefusedError, match="is locked: it is attached"):
        cdp(server, capsys, "backup", "remove", id_, "--yes", *options)
    with pytest.raises(RefusedError, match="stand"):
        cdp(server, capsys, "backup", "detach", id_)
    with pytest.raises(RefusedError, match="stands on a backup"):
        cdp(server, capsys, "bp", "cut", "again")
    server.stop()
    with Server(server.state_dir) as again:
        assert read(fork["uri"])[:8192] == b"x" * 4096 + before[4096:8192], "after a restart, too"
        assert cdp(again, capsys, "repo", "list")[0]["registered"]
        with pytest.raises(RefusedError, match="stand on backups"):
            cdp(again, capsys, "repo", "forget", repo)
        cdp(again, capsys, "fork", "remove", "again", "--yes")
        cdp(again, capsys, "backup", "detach", id_)
        cdp(again, capsys, "repo", "forget", repo)
    cdp(server, capsys, "backup", "remove", id_, "--yes", *options)


def test_backups_are_searched_for_the_last_good_one(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is lent as forks that a script may write to; what is not asked for stays as it is."""
    cdp(server, capsys, "repo", "init", short_path / "repo", "--chunk-size", "64K")
    ids = []
    for mark in (b"good", b"good", b"bad!", b"bad!"):
        write(server, mark * 1024, 0)
        server.synced("d", write_blocking=True)
        ids.append(cdp(server, capsys, "backup", "run", "d@latest")["id"])
    script = short_path / "is-it-good"
    script.write_text('#!/bin/sh\nnbdcopy "$CDP_URI" - | head -c 4 | grep -q good\n')
    script.chmod(0o755)
    search = ("bisect", "d", "--good", f"backup:{ids[0]}", "--bad", "backup:latest", "--run", script)
    with monkeypatch.context() as patch:
        patch.setenv("CDP_REPO", "")
        with pytest.raises(NotFoundError, match="0 backups of e"):
            cdp(server, capsys, "bisect", "e", *search[2:])
        found = cdp(server, capsys, *search, "--again")
    assert (found["good"], found["bad"]) == (f"backup:{ids[1]}", f"backup:{ids[2]}"), "it was used here"
    cdp(server, capsys, "repo", "init", short_path / "other", "--chunk-size", "64K")
    with monkeypatch.context() as patch:
        patch.setenv("CDP_REPO", str(short_path / "other"))
        with pytest.raises(NotFoundError, match="0 backups of d"):
            cdp(server, capsys, *search)
    found = cdp(server, capsys, *search)
    assert (found["good"], found["bad"]) == (f"backup:{ids[1]}", f"backup:{ids[2]}")
    with pytest.raises(UsageError, match="is not before"):
        cdp(
            server,
            capsys,
            "bisect",
            "d",
            "--good",
            "backup:latest",
            "--bad",
            f"backup:{ids[0]}",
            "--run",
            script,
        )
    with pytest.raises(UsageError, match="one of them is a backup"):
        cdp(server, capsys, "bisect", "d", "--good", "-1h", "--bad", f"backup:{ids[0]}", "--run", script)


def test_all_disks_of_a_vm_are_one_backup(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At one instant; attached they are a VM, and the next backup is incremental in each disk."""
    contents = {}
    for number, disk in enumerate(("vda", "vdb")):
        with connected(server.add(disk, vm="web")) as client:
            client.pwrite(os.urandom(MIB), number * MIB)
        server.synced(f"web/{disk}", write_blocking=True)
        contents[disk] = read(server.uri(f"web/{disk}@latest"))
    cdp(server, capsys, "repo", "init", short_path / "repo", "--chunk-size", "64K")
    made = cdp(server, capsys, "backup", "run", "web@latest")
    assert (made["kind"], made["name"].partition("@")[0]) == ("full", "web")
    assert [(disk["name"], disk["size"]) for disk in made["disks"]] == [("web/vda", SIZE), ("web/vdb", SIZE)]
    found = cdp(server, capsys, "uri", "backup:latest")
    assert [read(disk["uri"]) for disk in found["disks"]] == list(contents.values())
    assert read(cdp(server, capsys, "uri", "backup:latest/vdb")["uri"]) == contents["vdb"]
    with connected(str(server.get("/v1/disks/web/vdb")["uri"])) as client:
        client.pwrite(os.urandom(4096), 3 * MIB)
    server.synced("web/vdb", write_blocking=True)
    again = cdp(server, capsys, "backup", "run", "web@latest")
    assert (again["kind"], again["read_bytes"], again["parent"]) == ("incremental", 4096, made["id"])
    with pytest.raises(UsageError, match="is of web/vda, web/vdb"):
        cdp(server, capsys, "backup", "restore", "latest", "--output", short_path / "o")
    told = cdp(
        server, capsys, "backup", "restore", "latest", "--disk", "vdb", "--output", short_path / "o", "--verify"
    )  # fmt: skip
    assert told["verified"]


def test_locks_removal_prune_and_gc(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = short_path / "repo"
    cdp(server, capsys, "repo", "init", repo, "--chunk-size", "64K")
    ids = []
    for number in range(3):
        write(server, os.urandom(MIB), number * MIB)
        ids.append(cdp(server, capsys, "backup", "run", "d@latest")["id"])
    cdp(server, capsys, "backup", "lock", ids[0], "--reason", "audit")
    with pytest.raises(RefusedError, match="is locked: audit"):
        cdp(server, capsys, "backup", "remove", ids[0], "--yes")
    with pytest.raises(UsageError, match="this removes"):
        cdp(server, capsys, "backup", "remove", ids[1])
    rows = cdp(server, capsys, "repo", "prune", repo, "--keep", "none", "--dry-run")
    assert [(row["what"], row["reason"]) for row in rows] == [
        ("keep", "locked: audit"), ("drop", "no rule keeps it"), ("keep", "the newest"),
    ]  # fmt: skip
    assert len(cdp(server, capsys, "backup", "list")) == 3
    cdp(server, capsys, "repo", "prune", repo, "--keep", "none")
    assert [row["id"] for row in cdp(server, capsys, "backup", "list")] == [ids[0], ids[2]]
    would = cdp(server, capsys, "repo", "gc", repo, "--dry-run")
    did = cdp(server, capsys, "repo", "gc", repo)
    assert did["deleted"] == would["packs"] == 0, "what the second one stored is the third one's too"
    cdp(server, capsys, "backup", "unlock", ids[0])
    cdp(server, capsys, "backup", "remove", ids[0], "--yes")
    would = cdp(server, capsys, "repo", "gc", repo, "--dry-run")
    did = cdp(server, capsys, "repo", "gc", repo)
    assert did["deleted"] == would["packs"] == 1, "the first one's: two of its three MiB are used no more"
    assert 2 * MIB - (64 << 10) < did["freed_bytes"] < 2 * MIB + (64 << 10)
    assert cdp(server, capsys, "repo", "check", repo)["sound"]
    (repo / "backups" / ids[2]).unlink()
    assert not cdp(server, capsys, "repo", "check", repo, "--quick", code=4)["sound"]
    with pytest.raises(CorruptError, match="nobody removed it"):
        cdp(server, capsys, "repo", "gc", repo)
    cdp(server, capsys, "backup", "remove", ids[2], "--yes")
    assert cdp(server, capsys, "repo", "check", repo)["sound"]
    with pytest.raises(NotFoundError, match="no backup"):
        cdp(server, capsys, "backup", "remove", ids[2], "--yes")


def test_an_immutable_repository(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cdp(server, capsys, "repo", "init", short_path / "repo", "--immutable", "30d")
    cdp(server, capsys, "backup", "run", "d@latest")
    write(server, os.urandom(4096), 0)
    cdp(server, capsys, "backup", "run", "d@latest")
    with pytest.raises(RefusedError, match="immutable for 30d more"):
        cdp(server, capsys, "backup", "remove", "latest", "--yes")
    rows = cdp(server, capsys, "repo", "prune", short_path / "repo", "--keep", "none")
    assert [row["what"] for row in rows] == ["keep", "keep"]


def test_killed_at_any_time_there_is_no_half_backup(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL after a pack was stored; the next backup is right, and gc takes what was left."""
    repo = short_path / "repo"
    cdp(server, capsys, "repo", "init", repo, "--chunk-size", "64K")
    script = (
        "import sys, time; from cdpserver.repository import packs; packs.PACK_BYTES = 1 << 18;"
        "from cdpserver.repository.repository import Repository;"
        "Repository.write_backup = lambda *_: (print('stored', flush=True), time.sleep(600));"
        "from recovery import cli; sys.exit(cli.main())"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "--state-dir",
        str(server.state_dir),
        "backup",
        "run",
        "d@latest",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stored\n"
    stored = list((repo / "packs").rglob("*-0*"))
    assert len(stored) > 4
    waiting = cdp(server, capsys, "repo", "gc", repo)
    assert (waiting["deleted"], waiting["packs"]) == (0, 0), "it is under way"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cdp(server, capsys, "backup", "list") == []
    made = cdp(server, capsys, "backup", "run", "d@latest")
    assert (made["kind"], made["new_bytes"]) == ("full", 0), "its chunks are there already"
    assert cdp(server, capsys, "backup", "verify", "latest")["sound"]
    assert cdp(server, capsys, "repo", "gc", repo)["deleted"] <= 1
    assert cdp(server, capsys, "repo", "check", repo)["sound"]


def test_a_full_and_a_read_only_repository(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said, with no backup; with room the same command is right."""
    repo = short_path / "repo"
    repo.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", repo], check=True)
    try:
        monkeypatch.setattr(packs, "PACK_BYTES", 1 << 18)
        cdp(server, capsys, "repo", "init", repo, "--chunk-size", "64K")
        with pytest.raises(NoSpaceError):
            cdp(server, capsys, "backup", "run", "d@latest")
        assert cdp(server, capsys, "backup", "list") == []
        subprocess.run(["mount", "-o", "remount,size=8m", repo], check=True)
        made = cdp(server, capsys, "backup", "run", "d@latest")
        assert made["new_bytes"] < 3 * MIB, "what was stored before counts"
        subprocess.run(["mount", "-o", "remount,ro", repo], check=True)
        with pytest.raises(OSError, match="Read-only"):
            cdp(server, capsys, "backup", "run", "d@latest")
        assert cdp(server, capsys, "backup", "verify", "latest")["sound"]
        subprocess.run(["mount", "-o", "remount,rw", repo], check=True)
        assert cdp(server, capsys, "repo", "check", repo)["sound"]
    finally:
        subprocess.run(["umount", repo], check=True)


def test_a_restore_goes_on_and_damage_is_never_given_out(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo, output = short_path / "repo", short_path / "o.raw"
    cdp(server, capsys, "repo", "init", repo, "--chunk-size", "64K")
    cdp(server, capsys, "backup", "run", "d@latest")
    content = read(server.uri("d@latest"))
    pack = next(p for p in (repo / "packs").rglob("*") if p.is_file())
    whole = pack.read_bytes()
    pack.write_bytes(whole[: 2 * MIB] + bytes(100) + whole[2 * MIB + 100 :])
    with pytest.raises(CdpError):
        cdp(server, capsys, "backup", "restore", "latest", "--output", output)
    assert not output.exists()
    told = cdp(server, capsys, "backup", "verify", "latest", code=4)
    assert len(told["damage"]) == 1
    assert told["damage"][0]["end"] - told["damage"][0]["start"] in (64 << 10, 128 << 10)
    pack.write_bytes(whole)
    write(server, os.urandom(4096), 0)
    lost = repo / "backups" / cdp(server, capsys, "backup", "run", "d@latest")["id"]
    lost.write_bytes(lost.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="cannot be read, so nobody knows what is unused"):
        cdp(server, capsys, "repo", "gc", repo)
    cdp(server, capsys, "backup", "remove", lost.name, "--yes")
    cdp(server, capsys, "repo", "gc", repo)
    assert cdp(server, capsys, "backup", "restore", "latest", "--output", output, "--verify")["verified"]
    assert output.read_bytes() == content


def content_of(path: Path, work: Path, format: str = "qcow2") -> bytes:
    """What stock qemu-img makes of an image."""
    subprocess.run(["qemu-img", "convert", "-f", format, "-O", "raw", path, work], check=True)
    return work.read_bytes()


def test_a_chain_and_onto_what_is_there(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each layer holds what its backup held; killed on the way, the same command goes on; only what differs is written."""
    cdp(server, capsys, "repo", "init", short_path / "repo", "--chunk-size", "64K")
    contents = {}
    for number in range(3):
        write(server, os.urandom(98_304), (2 + 2 * number) * MIB - 4096)
        contents[cdp(server, capsys, "backup", "run", "d@latest")["id"]] = read(server.uri("d@latest"))
    ids = list(contents)
    server.stop()
    output, work = short_path / "v.qcow2", short_path / "plain"
    chain = ("backup", "restore", ids[2], "--as", "chain", "--output", output)
    script = (
        "import sys, os, signal; from cdpserver import qemu;"
        "qemu.convert_delta = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL);"
        "from recovery import cli; sys.exit(cli.main())"
    )
    killed = subprocess.run([sys.executable, "-c", script, *map(str, chain)], check=False)
    assert killed.returncode == -signal.SIGKILL
    bottom = short_path / f"v.full-{ids[0]}.qcow2"
    assert bottom.exists() and not output.exists()
    written = bottom.stat().st_mtime_ns
    told = cdp(server, capsys, *chain, "--verify")
    assert bottom.stat().st_mtime_ns == written, "what was whole was not written again"
    assert [(layer["backup"], layer["kind"]) for layer in told["layers"]] == [
        (ids[0], "full"), (ids[1], "incremental"), (ids[2], "incremental"),
    ]  # fmt: skip
    for layer in told["layers"]:
        assert content_of(Path(layer["path"]), work) == contents[layer["backup"]]
    assert told["layers"][2]["bytes"] < 1 * MIB, "the increment alone"
    with pytest.raises(RefusedError, match="is there already"):
        cdp(server, capsys, *chain)
    moved = short_path / "elsewhere"
    moved.mkdir()
    for layer in told["layers"]:
        os.rename(layer["path"], moved / Path(layer["path"]).name)
    assert content_of(moved / "v.qcow2", work) == contents[ids[2]], "names in it are relative"

    plain = short_path / "there.raw"
    plain.write_bytes(contents[ids[0]])
    onto = ("backup", "restore", ids[2], "--output", plain, "--in-place")
    with pytest.raises(RefusedError, match="would be lost"):
        cdp(server, capsys, *onto)
    told = cdp(server, capsys, *onto, "--force", "--verify")
    assert 196_608 <= told["copied_bytes"] <= 196_608 + 8 * 4096
    assert plain.read_bytes() == contents[ids[2]]
    assert cdp(server, capsys, *onto, "--force")["copied_bytes"] == 0

    base, top = short_path / "base.raw", short_path / "top.qcow2"
    base.write_bytes(contents[ids[0]])
    told = cdp(server, capsys, "backup", "restore", ids[1], "--output", top, "--base", base, "--verify")
    assert told["copied_bytes"] <= 100_000 + 4 * 4096
    assert content_of(top, work) == contents[ids[1]]
    assert (
        json.loads(subprocess.check_output(["qemu-img", "info", "--output", "json", top]))["backing-filename"]
        == "base.raw"
    )
    top.rename(short_path / "again.qcow2.partial")
    again = ("backup", "restore", ids[1], "--output", short_path / "again.qcow2", "--base")
    with pytest.raises(RefusedError, match="of another restore"):
        cdp(server, capsys, *again, plain)
    assert cdp(server, capsys, *again, base)["copied_bytes"] == 0, "all of it was there"
    with pytest.raises(UsageError, match="does not go with"):
        cdp(server, capsys, *chain, "--in-place")


def test_what_is_refused(server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = short_path / "repo"
    with pytest.raises(NotFoundError, match="no repository"):
        cdp(server, capsys, "backup", "list")
    cdp(server, capsys, "repo", "init", repo)
    with pytest.raises(NotFoundError, match="no backup"):
        cdp(server, capsys, "backup", "show", "latest")
    with pytest.raises(NotFoundError, match="no disk"):
        cdp(server, capsys, "backup", "run", "nothing@latest")
    with pytest.raises(UsageError, match="key file"):
        cdp(server, capsys, "repo", "init", short_path / "other", "--key-file", short_path / "none")
    cdp(server, capsys, "backup", "run", "d@latest")
    with pytest.raises(UsageError, match="is of d"):
        cdp(server, capsys, "backup", "restore", "latest", "--disk", "e", "--output", short_path / "o")
    shutil.rmtree(repo / "packs")
    assert not cdp(server, capsys, "repo", "check", repo, "--quick", code=4)["sound"]


def test_a_key_from_a_command(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints; one that fails, prints nothing or stands still gives no key, and nothing of it stays."""
    assert keys.of_command("printf 'a key\n'") == b"a key\n"
    for command, said in (("exit 7", "ended with 7"), ("true", "printed nothing")):
        with pytest.raises(RefusedError, match=said):
            keys.of_command(command)
    monkeypatch.setattr(keys, "COMMAND_S", 0.2)
    forever = short_path / "forever"
    os.mkfifo(forever)
    with pytest.raises(RefusedError, match="did not end"):
        keys.of_command(f"cat {forever} & cat {forever}")

    def readers() -> bool:
        """Whoever has it open."""
        with contextlib.suppress(OSError):
            os.close(os.open(forever, os.O_WRONLY | os.O_NONBLOCK))
            return True
        return False

    until(lambda: not readers(), "end of all that it started")


def test_the_key_derivation_is_slow_enough() -> None:
    """About a tenth of a second for each guess."""
    started = time.monotonic()
    seal.derive_keys(b"secret", bytes(16))
    assert time.monotonic() - started > 0.01
    assert seal.SCRYPT_N >= 1 << 15
