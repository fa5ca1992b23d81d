"""Real clients against real servers: what users run to write to a disk and to read a point."""

import json
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd
import pytest

from tests.test_service import SIZE, Server, until

pytestmark = pytest.mark.real

OPTION_MAGIC, OPT_EXPORT_NAME, OPT_INFO, OPT_GO = b"IHAVEOPT", 1, 6, 7
REPLY_ACK, ERROR_BIT = 1, 1 << 31


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    with Server(short_path / "s") as running:
        yield running


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def point(server: Server, name: str) -> str:
    return str(server.get(f"/v1/uri?point={name}@latest")["uri"])


def smallest_block(uri: str) -> int:
    """The minimum block that an export advertises."""
    handle = nbd.NBD()
    handle.connect_uri(uri)
    found = int(handle.get_block_size(nbd.SIZE_MINIMUM))
    handle.shutdown()
    return found


def image(path: Path, size: int = SIZE) -> Path:
    """A file with data, zeros and holes, the same at each call."""
    with open(path, "wb") as file:
        file.truncate(size)
        for at in range(0, size, 1 << 20):
            file.seek(at + 8192)
            file.write(bytes([at >> 20 & 0xFF or 7]) * 100_000)
    return path


def test_nbdinfo(server: Server) -> None:
    uri = server.add()
    listed = json.loads(
        run("nbdinfo", "--list", "--json", f"nbd+unix://?socket={server.state_dir}/target.sock")
    )
    (export,) = listed["exports"]
    assert (export["export-name"], export["export-size"]) == ("d", SIZE)
    assert export["is_read_only"] is False
    assert smallest_block(uri) == 512, (
        "small writes reach us as they are, and what is around them is verified"
    )
    for ability in ("write", "flush", "fua", "zero", "trim", "multi-conn"):
        run("nbdinfo", "--can", ability, uri)
    run("qemu-io", "-f", "raw", "-c", "write -P 5 64k 64k", "-c", "write -z 128k 64k", uri)
    server.synced("d")
    mapped = json.loads(run("nbdinfo", "--map", "--json", point(server, "d")))
    assert [(e["offset"], e["length"], e["type"]) for e in mapped] == [
        (0, 65536, 3),
        (65536, 65536, 0),
        (131072, SIZE - 131072, 3),
    ]
    server.post("/v1/disks", name="odd", size=SIZE + 512)
    assert smallest_block(str(server.get("/v1/disks/odd")["uri"])) == 512


def test_copies_in_and_out_are_exact(server: Server, short_path: Path) -> None:
    source = image(short_path / "in.raw")
    uri = server.add()
    run("nbdcopy", "--flush", source, uri)
    server.synced("d")
    run("nbdcopy", point(server, "d"), short_path / "out.raw")
    assert (short_path / "out.raw").read_bytes() == source.read_bytes()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, point(server, "d"))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", point(server, "d"), short_path / "out.qcow2")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", short_path / "out.qcow2", source)
    assert json.loads(run("qemu-img", "info", "--output=json", point(server, "d")))["virtual-size"] == SIZE
    # The same image once more, by another tool: nothing of it is payload.
    before = server.get("/v1/disks/d")["journal_bytes"]
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
    assert server.get("/v1/disks/d")["journal_bytes"] - before < 100_000
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, point(server, "d"))


def test_fio_verifies_what_it_wrote(server: Server, short_path: Path) -> None:
    uri = server.add()
    server.synced("d")
    run(
        *("fio", "--name=v", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=4k-64k"),
        *("--size=8m", "--io_size=24m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1"),
        *("--randrepeat=0", f"--output={short_path / 'fio.txt'}"),
    )


def test_two_connections_are_one_disk(server: Server) -> None:
    uri = server.add()
    server.synced("d")
    one, two = nbd.NBD(), nbd.NBD()
    one.connect_uri(uri)
    two.connect_uri(uri)
    assert one.can_multi_conn()
    for turn in range(64):
        one.pwrite(bytes([turn + 1]) * 4096, turn * 8192)
        two.pwrite(bytes([turn + 101]) * 4096, turn * 8192 + 4096)
        assert two.pread(4096, turn * 8192) == bytes([turn + 1]) * 4096
    last = server.get("/v1/disks/d")["last_seq"]
    one.flush()
    assert server.get("/v1/disks/d")["durable_seq"] >= last - 1, (
        "a FLUSH covers the other connection's writes"
    )
    two.pwrite(b"f" * 4096, 0, nbd.CMD_FLAG_FUA)
    shown = server.get("/v1/disks/d")
    assert shown["durable_seq"] >= shown["last_seq"] - 1
    one.shutdown()
    two.shutdown()


def test_requests_beyond_the_end_are_refused(server: Server) -> None:
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(server.add())
    attempts: list[Callable[[], object]] = [
        lambda: handle.pwrite(b"x" * 4096, SIZE - 512),
        lambda: handle.pread(4096, SIZE),
        lambda: handle.zero(4096, 1 << 62),
        lambda: handle.trim(8192, SIZE - 4096),
    ]
    for attempt in attempts:
        with pytest.raises(nbd.Error) as refused:
            attempt()
        assert refused.value.errno in ("EINVAL", "ENOSPC")
    handle.pwrite(b"x" * 4096, SIZE - 4096)
    assert handle.pread(4096, SIZE - 4096) == b"x" * 4096
    handle.shutdown()


def negotiate(path: Path, option: int, payload: bytes) -> int:
    """Send one option over a raw socket; the reply's type, or 0 when the server hangs up."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(str(path))
        assert raw.recv(18, socket.MSG_WAITALL)[:16] == b"NBDMAGIC" + OPTION_MAGIC
        raw.sendall(struct.pack(">I", 3))
        raw.sendall(OPTION_MAGIC + struct.pack(">II", option, len(payload)) + payload)
        reply = raw.recv(20, socket.MSG_WAITALL)
        return int(struct.unpack(">QIII", reply)[2]) if len(reply) == 20 else 0


@pytest.mark.parametrize("listener", ["target.sock", "export.sock"])
def test_any_bytes_as_an_export_name(server: Server, listener: str) -> None:
    uri = server.add()
    other = nbd.NBD()
    other.connect_uri(uri)
    other.pwrite(b"a" * 4096, 0)
    path = server.state_dir / listener
    names = (
        b"",
        b"nope",
        b"\xff\xfe",
        b"d@",
        b"@",
        b"d@@d",
        b"../d",
        b"a/b/c",
        b"d@seq:x",
        b"d@delta:-1",
        b"x" * 4096,
    )
    for name in (*names, b"d\0", "d@latést".encode()):
        for option in (OPT_INFO, OPT_GO):
            kind = negotiate(path, option, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
            assert kind & ERROR_BIT or kind == 0, (name, kind)
    assert negotiate(path, 99, b"whatever") & ERROR_BIT, "an unknown option"
    assert negotiate(path, OPT_GO, struct.pack(">I", 1 << 31) + b"short") in (
        0,
        *range(ERROR_BIT, ERROR_BIT + 16),
    )
    other.pwrite(b"b" * 4096, 4096)
    assert other.pread(8192, 0) == b"a" * 4096 + b"b" * 4096, "others are not disturbed"
    other.shutdown()
    events = (server.state_dir / "events.jsonl").read_text()
    assert ("target.unknown-export" if listener == "target.sock" else "export.not-found") in events


def test_a_full_file_system(short_path: Path) -> None:
    store = short_path / "m"
    store.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", store)
    try:
        with Server(store / "s") as server:
            _fill_and_free(server, store)
    finally:
        run("umount", "-l", store)


def write_until_refused(handle: nbd.NBD, held: dict[int, bytes]) -> None:
    """Write 64 KiB pieces for as long as they are acknowledged."""
    for turn in range(4096):
        data = bytes([turn % 255 + 1]) * 65536
        handle.pwrite(data, turn % 100 * 65536)
        held[turn % 100] = data


def _fill_and_free(server: Server, store: Path) -> None:
    uri = server.add()
    server.synced("d")
    handle = nbd.NBD()
    handle.connect_uri(uri)
    held: dict[int, bytes] = {}
    ballast = store / "ballast"
    ballast.write_bytes(bytes(24 << 20))
    with pytest.raises(nbd.Error) as full:
        write_until_refused(handle, held)
    assert full.value.errno == "ENOSPC"
    assert "target.no-space" in (server.state_dir / "events.jsonl").read_text()
    for place, data in held.items():
        assert handle.pread(65536, place * 65536) == data, "what was acknowledged is there"
    ballast.unlink()
    handle.pwrite(b"again" * 16384, 0)
    handle.flush()
    assert not server.get("/v1/disks/d")["synced"], "a mirror's guest went on without what was refused"
    held[0] = (b"again" * 16384)[:65536]
    held[1] = (b"again" * 16384)[65536:] + held[1][16384:] if 1 in held else b""
    assert handle.pread(65536, 0) == held[0]
    for place in range(2, 100):
        if place in held:
            assert handle.pread(65536, place * 65536) == held[place]
    handle.shutdown()
    reader = nbd.NBD()
    reader.connect_uri(point(server, "d"))
    assert reader.pread(65536, 0) == held[0]
    reader.shutdown()


def test_a_disk_that_is_being_removed_is_refused(server: Server) -> None:
    uri = server.add()
    nbd_info = ["nbdinfo", "--size", uri]
    assert int(run(*nbd_info)) == SIZE
    server.delete("/v1/disks/d")
    until(lambda: subprocess.run(nbd_info, capture_output=True, check=False).returncode != 0, "refusal")
