"""What comes from the wire, at random: an answer or an error of ours, and nobody else is disturbed.

`CDP_FUZZED=100000 pytest tests/test_fuzz.py` is a long run; the gate makes 40 of each.
"""

import contextlib
import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.test_service import SIZE, Server, until

FUZZED = int(os.environ.get("CDP_FUZZED", "40"))

OPTION_MAGIC, REQUEST_MAGIC = b"IHAVEOPT", 0x25609513
OPT_GO = 7
LENGTHS = (0, 1, 4, 10, 4096, 1 << 16, 1 << 31, (1 << 32) - 1)
OFFSETS = (0, 1, 512, SIZE - 512, SIZE, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
COUNTS = (0, 1, 512, 4096, 1 << 20, 1 << 25, 1 << 31, (1 << 32) - 1)
PATTERN = b"p" * 4096


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with a disk that is looked after, and one that is not."""
    config = tmp_path_factory.mktemp("c") / "cdpserver.toml"
    config.write_text(f"nbd_clients = {MOST}\n")
    with Server(
        Path(os.path.realpath(tmp_path_factory.mktemp("s"))) / "s", "--config", str(config)
    ) as running:
        for name in ("good", "fuzz"):
            running.add(name)
            with connected(running, name) as client:
                client.pwrite(PATTERN, 0)
            running.synced(name)
        yield running


MOST = 24


@contextlib.contextmanager
def connected(server: Server, name: str) -> Iterator[Any]:
    handle = nbd.NBD()
    handle.connect_uri(server.get(f"/v1/disks/{name}")["uri"])
    yield handle
    handle.shutdown()


def raw(path: Path) -> socket.socket:
    """A connection that has been greeted."""
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(60)
    made.connect(str(path))
    assert made.recv(18, socket.MSG_WAITALL)[:16] == b"NBDMAGIC" + OPTION_MAGIC
    return made


def option(dice: random.Random, export: bytes) -> bytes:
    """One option, which may lie about its length, and about the name in it."""
    claimed = dice.choice((len(export), *LENGTHS))
    body = struct.pack(">I", claimed) + export + struct.pack(">H", dice.choice((0, 0, 1, 65535)))
    body = dice.choice((body, dice.randbytes(dice.randrange(64))))
    length = dice.choice((len(body), len(body), *LENGTHS))
    return OPTION_MAGIC + struct.pack(">II", dice.choice((*range(12), 99, 1 << 31)), length) + body


def request(dice: random.Random) -> bytes:
    """One request, of which little may be right."""
    magic = dice.choice((REQUEST_MAGIC, REQUEST_MAGIC, REQUEST_MAGIC, dice.randrange(1 << 32)))
    kind, flags = dice.choice((*range(9), 65535)), dice.choice((0, 0, 1, 2, 4, 8, 16, 65535))
    offset, count = dice.choice(OFFSETS), dice.choice(COUNTS)
    sent = dice.randbytes(min(count, 4096)) if kind == 1 else b""
    return struct.pack(">IHHQQI", magic, flags, kind, dice.randrange(1 << 64), offset, count) + sent


def attack(dice: random.Random, path: Path, export: bytes) -> None:
    """One connection that does something wrong, and waits until the server has ended it."""
    with raw(path) as wire, contextlib.suppress(ConnectionError):
        said = [struct.pack(">I", dice.choice((3, 3, 3, 1, 0, 0xFFFFFFFF)))]
        match dice.randrange(4):
            case 0:
                said = [dice.randbytes(dice.randrange(300))]
            case 1:
                said += [option(dice, export) for _ in range(dice.randrange(40))]
            case 2:
                whole = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
                said += [OPTION_MAGIC + struct.pack(">II", OPT_GO, len(whole)) + whole]
                said += [request(dice) for _ in range(dice.randrange(1, 12))]
            case _:
                said = [part[: dice.randrange(len(part))] for part in said]
        wire.sendall(b"".join(said))
        wire.shutdown(socket.SHUT_WR)
        while wire.recv(1 << 16):
            pass


def starts(server: Server) -> dict[str, int]:
    children = server.get("/v1/status")["children"]
    return {name: child["starts"] for name, child in children.items()}


@pytest.mark.real
@pytest.mark.parametrize(("listener", "export"), [("target.sock", b"fuzz"), ("export.sock", b"fuzz@latest")])
def test_whatever_a_client_sends_the_server_goes_on(server: Server, listener: str, export: bytes) -> None:
    before = starts(server)
    with connected(server, "good") as client:
        for seed in range(FUZZED):
            attack(random.Random(seed), server.state_dir / listener, export)
        client.pwrite(PATTERN, 8192)
        assert client.pread(4096, 0) == client.pread(4096, 8192) == PATTERN
    assert starts(server) == before
    point = nbd.NBD()
    point.connect_uri(server.uri("good@latest"))
    assert point.pread(4096, 8192) == PATTERN
    point.shutdown()


FLAGS = (
    0,
    0,
    0,
    0,
    nbd.CMD_FLAG_FUA,
    nbd.CMD_FLAG_NO_HOLE,
    nbd.CMD_FLAG_DF,
    nbd.CMD_FLAG_REQ_ONE,
    1 << 4,
    1 << 15,
)
SMALL = 1 << 20


def ask(handle: nbd.NBD, dice: random.Random, expected: bytearray) -> None:
    """One request, which libnbd by itself may not let go: what is answered is right."""
    length = dice.choice((1, 511, 512, 4096, 5000, 70_000))
    offset = dice.choice((0, 512, 4095, SMALL - 4096, SMALL, 1 << 62, *[dice.randrange(SMALL)] * 4))
    flags, data, end = dice.choice(FLAGS), dice.randbytes(length), offset + length
    runs: list[int] = []

    def told(_context: str, _offset: int, entries: list[int], _error: object) -> int:
        runs.extend(entries)
        return 0

    match dice.randrange(6):
        case 0:
            handle.pwrite(data, offset, flags)
            expected[offset:end] = data
        case 1:
            handle.zero(length, offset, flags)
            expected[offset:end] = bytes(length)
        case 2:
            handle.trim(length, offset, flags)
            expected[offset:end] = handle.pread(length, offset)
            assert not any(expected[-(-offset // 4096) * 4096 : end // 4096 * 4096])
        case 3:
            assert handle.pread(length, offset, flags) == expected[offset:end]
        case 4:
            handle.block_status(length, offset, told, flags)
            at = offset
            for size, kind in zip(runs[::2], runs[1::2], strict=True):
                assert not kind & nbd.STATE_ZERO or not any(expected[at : at + size])
                at += size
        case _:
            handle.flush(dice.choice((0, 0, flags)))
    assert len(expected) == SMALL


@pytest.mark.real
def test_whatever_libnbd_asks_what_is_answered_is_right(server: Server) -> None:
    """Unaligned, beyond the end, with flags that mean nothing: of a disk, and of a point of it, where nothing is written."""
    before, dice = starts(server), random.Random(FUZZED)
    server.post("/v1/disks", name="lib", size=SMALL)
    expected = bytearray(SMALL)
    asked(str(server.get("/v1/disks/lib")["uri"]), dice, expected)
    server.synced("lib")
    kept = bytes(expected)
    asked(server.uri("lib@latest"), dice, expected)
    assert expected == kept, "a point was written to"
    assert starts(server) == before


def asked(uri: str, dice: random.Random, expected: bytearray) -> None:
    """Many, over as many connections as it takes; at the end all of it is what was answered."""
    answered = 0
    left = 10 * FUZZED
    while left:
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        handle.connect_uri(uri)
        while left and not handle.aio_is_dead() and not handle.aio_is_closed():
            left -= 1
            with contextlib.suppress(nbd.Error):
                ask(handle, dice, expected)
                answered += 1
        if not left:
            assert handle.pread(SMALL, 0) == expected
            handle.shutdown()
    assert answered > FUZZED


def memory(server: Server, child: str) -> int:
    """Resident bytes of a process."""
    status = Path(f"/proc/{server.pids()[child]}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


@pytest.mark.real
@pytest.mark.parametrize(
    ("listener", "child", "export"),
    [("target.sock", "target-0", b"fuzz"), ("export.sock", "export", b"fuzz@latest")],
)
def test_who_hangs_takes_little_and_nobody_waits_for_him(
    server: Server, listener: str, child: str, export: bytes
) -> None:
    """Half-open negotiations, and clients that ask for much and read nothing: bounded for each disk, and no other's matter."""
    before, path = memory(server, child), server.state_dir / listener
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(raw(path)).sendall(struct.pack(">I", 3)[: _ % 5])
        whole = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        go = struct.pack(">I", 3) + OPTION_MAGIC + struct.pack(">II", OPT_GO, len(whole)) + whole
        ask = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 0, 1, 0, SIZE // 2)
        let_in = 0
        for _ in range(MOST + 8):
            slow = stack.enter_context(raw(path))
            slow.sendall(go)
            reply = slow.recv(20, socket.MSG_WAITALL)
            let_in += not struct.unpack(">QIII", reply)[2] >> 31
            slow.sendall(ask * 4)
        assert let_in == MOST, "a disk has so many clients at once, and no more"
        with connected(server, "good") as client:
            client.pwrite(PATTERN, 12288)
            client.flush()
            assert client.pread(4096, 12288) == PATTERN
        assert memory(server, child) < before + (MOST + 8) * SIZE
    # They are gone, and so there is room again.
    until(lambda: opens(path, export), "room for a client")


def opens(path: Path, export: bytes) -> bool:
    handle = nbd.NBD()
    handle.set_export_name(export.decode())
    try:
        handle.connect_unix(str(path))
    except nbd.Error:
        return False
    handle.shutdown()
    return True
