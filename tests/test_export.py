"""`cdp export` against a real server: whatever interrupts it, the same command ends with exactly the point."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdpserver import durable
from cdpserver.copying import engine, work
from cdpserver.errors import CdpError, CorruptError, NoSpaceError, RefusedError
from recovery import cli, export, unfinished
from tests.dying import Step, dies_at
from tests.test_service import SIZE, Server, connected, pattern, read, until
from tools.kit.processes import until as soon
from tools.kit.server import BIN

pytestmark = pytest.mark.real

MIB = 1 << 20


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        uri = running.add()
        with connected(uri) as client:
            client.pwrite(os.urandom(3 * MIB), 0)
        running.synced("d", write_blocking=True)
        with connected(uri) as client:
            client.pwrite(os.urandom(2 * MIB), 5 * MIB)
            client.pwrite(pattern(7), 4 * MIB + 8192)
            client.pwrite(bytes(MIB), 0)
        yield running


@pytest.fixture(autouse=True)
def place(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets of ours in the test's own directory, and a checkpoint after every chunk."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(short_path / "xdg"))
    monkeypatch.setattr(work, "CHECKPOINT_S", 0.0)


def run(server: Server, output: object, *more: str, point: str = "d@latest") -> None:
    arguments = ["--state-dir", str(server.state_dir), "export", point, "--output", str(output)]
    options = cli.parse([*arguments, *more])
    export.export(options)


def content(server: Server, point: str = "d@latest") -> bytes:
    return read(server.uri(point))


def in_the_middle(monkeypatch: pytest.MonkeyPatch, event: Callable[[], None]) -> None:
    """Let something happen once at a checkpoint that is neither the first nor the last one."""
    real = unfinished.save
    happened: list[bool] = []

    def save(path: Path, left: unfinished.Unfinished) -> None:
        real(path, left)
        if not happened and 2 * MIB < left.copied < SIZE:
            happened.append(True)
            event()

    monkeypatch.setattr(export, "save", save)
    # One after the other: else the last chunks may be done while the first checkpoint is still under way.
    monkeypatch.setattr(engine, "WORKERS", 1)


def interrupted(server: Server, output: object, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """An export that Ctrl-C ended."""

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        in_the_middle(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            run(server, output, *more)


def test_a_raw_file_is_the_point_and_sparse(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = short_path / "o.raw"
    run(server, output, "--json", "--verify")
    told = json.loads(capsys.readouterr().out)
    assert output.read_bytes() == content(server)
    assert told["verified"] and told["size"] == SIZE and told["point"] == f"d@seq:{told['seq']}"
    assert output.stat().st_blocks * 512 < 6 * MIB
    assert sorted(path.name for path in short_path.iterdir()) == ["o.raw", "s", "s.log"]


def test_zeros_that_were_written_are_left_out_when_asked(server: Server, short_path: Path) -> None:
    uri = str(server.get("/v1/disks/d")["uri"])
    with connected(uri) as client:
        client.pwrite(bytes(MIB) + pattern(1, 65536) + bytes(MIB - 65536), 5 * MIB)
    full, sparse = short_path / "full.raw", short_path / "sparse.raw"
    run(server, full)
    run(server, sparse, "--sparse")
    assert full.read_bytes() == sparse.read_bytes() == content(server)
    assert sparse.stat().st_blocks < full.stat().st_blocks


def test_a_qcow2_file_is_the_point(server: Server, short_path: Path) -> None:
    output = short_path / "o.qcow2"
    run(server, output, "--format", "qcow2", "--verify")
    subprocess.run(["qemu-img", "convert", "-O", "raw", output, short_path / "o.raw"], check=True)
    assert (short_path / "o.raw").read_bytes() == content(server)
    assert output.stat().st_blocks * 512 < 6 * MIB, "what is a hole in the point takes no room"


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_export_that_dies_at_any_step_goes_on(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    output, expected = short_path / "o", content(server)

    def prepare(dying: Callable[[Step], Step]) -> None:
        monkeypatch.setattr(export, "save", dying(unfinished.save))
        monkeypatch.setattr(durable, "publish", dying(durable.publish))

    number = 1
    while dies_at(number, lambda: run(server, output, "--format", format), prepare):
        assert not output.exists()
        run(server, output, "--format", format, "--verify")
        source = ["-f", format, "-O", "raw", str(output), str(short_path / "as.raw")]
        subprocess.run(["qemu-img", "convert", *source], check=True)
        assert (short_path / "as.raw").read_bytes() == expected
        output.unlink()
        number += 1
    assert number > 4


def test_a_command_that_is_killed_while_it_writes_goes_on(server: Server, short_path: Path) -> None:
    output, partial = short_path / "o", short_path / "o.partial"
    asked = ["--state-dir", str(server.state_dir), "export", "d@latest", "--output", str(output)]
    process = subprocess.Popen([BIN / "cdp", *asked], stderr=subprocess.DEVNULL)
    soon(lambda: output.exists() or (partial.exists() and partial.stat().st_blocks), "data", every_s=0.0005)
    process.kill()
    process.wait()
    if not output.exists():  # it may have been quicker
        assert unfinished.load(unfinished.Output.parse(str(output)).side) is not None
    run(server, output, "--verify")
    assert output.read_bytes() == content(server)
    assert not partial.exists()


def test_latest_goes_on_with_the_instant_that_it_began_with(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, before = short_path / "o", content(server)
    interrupted(server, output, monkeypatch)
    with connected(str(server.get("/v1/disks/d")["uri"])) as client:
        client.pwrite(pattern(9), 0)
    with pytest.raises(RefusedError, match="another export was interrupted"):
        run(server, output, point=f"d@seq:{server.get('/v1/uri?point=d@latest')['seq']}")
    capsys.readouterr()
    run(server, output, "--json")
    said = capsys.readouterr()
    assert json.loads(said.out)["resumed_at"] > 0 and "going on at" in said.err
    assert output.read_bytes() == before != content(server)


def test_a_part_that_was_changed_meanwhile_is_written_anew(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = short_path / "o"
    interrupted(server, output, monkeypatch)
    with open(f"{output}.partial", "r+b") as partial:
        partial.seek(MIB + 5)
        partial.write(b"\xff\x00\xff")
    run(server, output)
    assert "beginning anew" in capsys.readouterr().err
    assert output.read_bytes() == content(server)


def test_what_is_there_is_not_replaced_but_can_be_compared(
    server: Server, short_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = short_path / "o"
    output.write_bytes(b"mine")
    with pytest.raises(RefusedError, match="there already"):
        run(server, output)
    with pytest.raises(CorruptError, match="512 bytes, and the point"):
        run(server, output, "--verify")
    run(server, output, "--force")
    run(server, output, "--verify")
    assert "no difference" in capsys.readouterr().out
    with open(output, "r+b") as file:
        file.seek(3 * MIB + 70)
        file.write(b"x")
    with pytest.raises(CorruptError, match="differs from the point"):
        run(server, output, "--verify")
    Path(f"{short_path}/p.partial").write_bytes(b"not ours")
    with pytest.raises(RefusedError, match="could go on"):
        run(server, short_path / "p")
    assert Path(f"{short_path}/p.partial").read_bytes() == b"not ours"


@contextlib.contextmanager
def memory(path: Path, size: int) -> Iterator[str]:
    """An NBD server with content in it."""
    process = subprocess.Popen(
        ["nbdkit", "-f", "-U", str(path), "--exit-with-parent", "memory", str(size)],
        stdin=subprocess.DEVNULL,
    )
    uri = f"nbd+unix:///?socket={path}"
    try:
        until(path.exists, "socket")
        with connected(uri) as client:
            client.pwrite(b"\xee" * size, 0)
        yield uri
    finally:
        process.kill()
        process.wait()


def test_zeros_are_written_over_what_an_nbd_server_had(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory(short_path / "m", SIZE) as uri:
        interrupted(server, uri, monkeypatch)
        run(server, uri, "--verify")
        assert read(uri) == content(server)
    assert not list((short_path / "xdg/cdp/exports").iterdir())
    with memory(short_path / "n", SIZE - 512) as uri, pytest.raises(RefusedError, match="large enough"):
        run(server, uri)


def test_an_export_process_that_is_killed_is_waited_for(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, output = content(server), short_path / "o"
    in_the_middle(monkeypatch, lambda: os.kill(server.pids()["export"], signal.SIGKILL))
    run(server, output)
    assert output.read_bytes() == expected


def test_ctrl_c_on_the_terminal_ends_a_qcow2_export_that_goes_on(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its qemu-nbd is not ended by the signal that the whole group gets: what was copied becomes durable."""
    output = short_path / "o"
    own_group = os.getpgid(0)

    def stop() -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert children and own_group not in [
            os.getpgid(int(child)) for child in children if child not in known
        ]
        raise KeyboardInterrupt

    known = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    with monkeypatch.context() as patch:
        in_the_middle(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            run(server, output, "--format", "qcow2")
    run(server, output, "--format", "qcow2", "--json", "--verify")
    assert json.loads(capsys.readouterr().out)["resumed_at"] > 0


def test_without_the_server_the_state_directory_is_read(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, output = content(server), short_path / "o"
    interrupted(server, output, monkeypatch)
    server.stop()
    run(server, output, "--verify")
    assert output.read_bytes() == expected
    assert "without it" in capsys.readouterr().err


def test_a_point_that_is_gone_ends_the_export_and_keeps_the_part(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = short_path / "o"
    interrupted(server, output, monkeypatch)
    server.delete("/v1/disks/d")
    until(lambda: not server.get("/v1/disks"), "end of the disk")
    server.add()
    with pytest.raises(CdpError):
        run(server, output)
    assert not output.exists() and Path(f"{output}.partial").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_says_what_is_missing_and_the_export_goes_on_with_room(
    server: Server, short_path: Path
) -> None:
    small = short_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", small], check=True)
    try:
        with pytest.raises(NoSpaceError, match=r"about .* are missing"):
            run(server, small / "o")
        subprocess.run(["mount", "-o", "remount,size=32m", small], check=True)
        run(server, small / "o", "--verify")
        shutil.copy(small / "o", short_path / "o")
    finally:
        subprocess.run(["umount", small], check=True)
    assert (short_path / "o").read_bytes() == content(server)


def test_a_device_is_written_when_told_so(
    server: Server, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = short_path / "image"
    image.write_bytes(b"\xee" * SIZE)
    made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr}")
    device = Path(made.stdout.strip())
    try:
        with pytest.raises(RefusedError, match="there already"):
            run(server, device)
        interrupted(server, device, monkeypatch, "--force")
        run(server, device, "--verify")
        assert device.read_bytes() == content(server)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
