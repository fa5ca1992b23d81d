"""What comes from the wire or from damaged files, at random: an answer or an error of ours, and nobody else is disturbed.

`CDP_FUZZED=100000 pytest tests/test_fuzz.py` is a long run; the gate makes 40 of each.
"""

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpserver import names, sealed, timeline, tls, tokens
from cdpserver.catalog.content import read_copy
from cdpserver.errors import CdpError, CorruptError, UsageError
from cdpserver.journal import control, instants, links, record, segment
from cdpserver.journal.instants import Instants
from cdpserver.journal.segment import Header
from cdpserver.state import StateDir
from tests.test_service import SIZE, Server, until

FUZZED = int(os.environ.get("CDP_FUZZED", "40"))

# --- files


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


UUID = b"u" * 16
TEXT = '{"format": 1, "id": "t1", "uuid": "%s", "name": "d", "vm": null, "size": 512, "created_ns": 1, "base": null}'
RECORD = record.encode(record.Record(record.Kind.DATA, 7, 8, 0, 4096, 4096, bytes(20)), 9)
PAGE = segment.encode_page(Header(UUID, 1, 1, 1, 1, "b" * 36, control.State()))
LINK = links.LINK.pack(1, 1, 1, 1, 2, 3, bytes(32), bytes(32), b"why", bytes(32))[: -links.DIGEST_SIZE]


def chained(body: bytes) -> bytes:
    """A chain of one link whose digest is right, whatever it says."""
    head = links.encode_head(UUID)
    return head + body + blake3(blake3(head).digest() + body).digest()


def listed(body: bytes) -> bytes:
    """The instants of an interval, with a digest that is right."""
    return body + blake3(body).digest()


INSTANTS = instants.HEAD.pack(instants.MAGIC, UUID, 1, 10**9, 1) + bytes(instants.ROW_BYTES)


def load_instants(directory: Path) -> object:
    return Instants.load(directory, timeline=UUID, interval=1)


FILES: dict[str, tuple[str, bytes, Callable[[bytes], bytes], Callable[[Path], object]]] = {
    "timeline.json": (timeline.FILE, (TEXT % ("0" * 32)).encode(), bytes, timeline.load),
    "catalog.json": (
        "catalog.json",
        b'{"names": {}, "next_id": 1}',
        bytes,
        lambda d: read_copy(d / "catalog.json"),
    ),
    "tokens.json": (
        "tokens.json",
        b'{"tokens": [{"name": "a", "role": "viewer", "hash": "0", "created_ns": 1}]}',
        bytes,
        lambda d: tokens.load(StateDir(d)),
    ),
    "nbd.key": ("nbd.key", b"k" * 32, bytes, lambda d: sealed.load_key(StateDir(d))),
    "keys.psk": (
        "keys.psk",
        b"hv1:" + b"0" * 64 + b"\n",
        bytes,
        lambda d: tls.check_files(None, str(d / "keys.psk")),
    ),
    "links": (links.FILE, LINK, chained, links.read),
    "instants": (instants.FILE, INSTANTS, listed, load_instants),
}


def changed(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that are near to what is right, or nothing of the kind."""
    bits = st.lists(st.integers(0, len(whole) * 8 - 1), min_size=1, max_size=8)

    def flip(places: list[int]) -> bytes:
        data = bytearray(whole)
        for place in places:
            data[place // 8] ^= 1 << place % 8
        return bytes(data)

    cut = st.integers(0, len(whole) - 1).map(lambda end: whole[:end])
    grown = st.binary(min_size=1, max_size=64).map(lambda more: whole + more)
    return bits.map(flip) | cut | grown | st.binary(max_size=200)


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_of_any_bytes_is_read_or_an_error_of_ours(name: str, room: Path) -> None:
    file, whole, checked, read = FILES[name]

    @settings(max_examples=FUZZED)
    @given(changed(whole), st.booleans())
    def look(data: bytes, mend: bool) -> None:
        path = room / file
        path.touch(0o600)
        path.write_bytes(checked(data) if mend else data)
        with contextlib.suppress(CdpError):
            read(room)

    look()


def test_a_link_of_an_unknown_kind_whose_digest_is_right(tmp_path: Path) -> None:
    (tmp_path / links.FILE).write_bytes(chained(b"\x63" + LINK[1:]))
    with pytest.raises(CorruptError, match="unknown kind 99"):
        links.read(tmp_path)


@settings(max_examples=FUZZED)
@given(changed(RECORD), changed(PAGE), changed(b'{"what": "mark"}'), st.integers(0, 9))
def test_records_and_headers_of_any_bytes(raw: bytes, page: bytes, said: bytes, start: int) -> None:
    for read in (
        lambda: record.decode(raw, start),
        lambda: segment.decode_page(page, "it"),
        lambda: control.decode(said),
    ):
        with contextlib.suppress(CorruptError):
            read()
    assert 0 <= record.first_bad(raw, start, 7) <= len(raw) // record.RECORD_SIZE


@settings(max_examples=FUZZED)
@given(st.text(max_size=80) | st.from_regex(r"[0-9a-f]{32}~(direct:)?[a-z/@:~.]{0,20}", fullmatch=True))
def test_an_export_name_of_any_text(text: str) -> None:
    secret, rest = sealed.unseal(text)
    assert text == (sealed.seal(rest, secret) if secret else rest)
    with contextlib.suppress(UsageError):
        assert names.format_export(names.parse_export(rest))


# --- the wire

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
