"""Files of any bytes: what our own writers have written, changed at random, is read or an error of ours.

Each seed is read unchanged first. `CDP_FUZZED=100000 pytest tests/test_fuzz_files.py` is a long run; the gate makes 40 of each.
"""

import contextlib
import copy
import json
import os
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpserver import names, sealed, timeline, tls, tokens
from cdpserver.catalog import Catalog, Row
from cdpserver.catalog.content import read_copy
from cdpserver.errors import CdpError, CorruptError, UsageError
from cdpserver.journal import control, instants, links, record, recovery, segment
from cdpserver.journal.instants import Instants
from cdpserver.journal.links import Chain
from cdpserver.journal.log import Journal
from cdpserver.journal.observed import Observed
from cdpserver.state import StateDir
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.core import INDEXER, World, forget_indexes, scratch
from tests.model import BLOCK

FUZZED = int(os.environ.get("CDP_FUZZED", "40"))
UUID = b"u" * 16
MESSAGES = (
    control.begin("first-copy", 1),
    control.session(2, "a connection was lost"),
    control.synced(2, write_blocking=True, bitmap="b", observed=Observed("qmp", True, "ok", 7)),
    control.mark("m", at=(3, 4)),
    control.cut(1),
    control.gap(from_seq=3, from_time_ns=4, reason="lost"),
    control.missed(from_time_ns=4, until_time_ns=5, reason="late"),
    control.grow(1 << 20),
)


@pytest.fixture(scope="module")
def written() -> Iterator[World]:
    """A disk with three intervals and a fork, at rest; its catalog, tokens and keys. All of it by who writes it in life."""
    with pytest.MonkeyPatch.context() as patch, scratch() as path:
        patch.setattr(segment, "WINDOW_BYTES", BLOCK)
        patch.setattr(segment, "WINDOW_RECORDS", BLOCK // 64)
        patch.setattr(segment, "SEGMENT_RECORDS", 9)
        world = World(path)
        Catalog.open(world.state, writable=True).close()
        line = world.add(16 * BLOCK)
        line.write(0, b"base" * 1024)
        line.synced()
        for number in range(30):
            world.now_ns += 10**9
            line.write(number % 13 * BLOCK, bytes([number]) * BLOCK)
            if number % 10 == 9:
                line.mark(f"m{number}")
                line.cut()
        line.zero(4 * BLOCK, 4 * BLOCK)
        fork = world.fork(line, 20)
        for one in world.lines:
            one.close(clean=True)
            INDEXER.call("drain", one.directory, world.boot)
            INDEXER.call("close", one.directory, world.boot)
        with Chain.open(line.directory, line.timeline.uuid) as chain:
            chain.catch_up(100)
        with Catalog.open(world.state, writable=True) as catalog:
            for one in world.lines:
                catalog.add(one.timeline.full_name, one.timeline.id)
            catalog.put_row("locks", Row("lock-1", 1, {"disk": "d1", "seq": 7, "why": ["a", {"b": None}]}))
        assert fork.timeline.is_fork
        tokens.add(world.state, "a", "viewer")
        sealed.make_key(world.state)
        rows = [(1, 10, 11, 0), (5, 20, 30, 1)]
        Instants.make(10**9, rows).write(world.state.path, timeline=UUID, interval=1)
        psk = world.state.path / "keys.psk"
        psk.touch(0o600)
        psk.write_bytes(b"hv1:" + b"0" * 64 + b"\n")
        forget_indexes(world.state.path)
        yield world


# --- what is changed


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


PLAIN = st.none() | st.booleans() | st.integers(-1, 1 << 63) | st.floats() | st.text(max_size=9)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)


@st.composite
def reshaped(draw: st.DrawFn, value: dict[str, Any]) -> dict[str, Any]:
    """The same object with one thing in it that is another, is gone, or is too much."""
    made = copy.deepcopy(value)
    node: Any = made
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys)) if keys else None
        if key is None or not isinstance(node[key], dict | list) or draw(st.booleans()):
            break
        node = node[key]
    match draw(st.integers(0, 3)) if key is not None else 3:
        case 0:
            del node[key]
        case 3 if isinstance(node, dict):
            node[draw(st.text(max_size=9))] = draw(VALUES)
        case _ if key is not None:
            node[key] = draw(VALUES)
        case _:
            node.append(draw(VALUES))
    return made


# --- single files


@dataclass(frozen=True)
class File:
    """Where it is in a state directory, who reads it, and how bytes get a check that is right, if they have one."""

    path: str
    read: Callable[[Path], object]
    checked: Callable[[bytes], bytes] | None = None


def chained(body: bytes) -> bytes:
    """A chain whose digests are right, whatever its links say. Room that is allocated ahead stays."""
    size, made = links.LINK.size, body[: links.HEAD.size]
    digest = blake3(made).digest()
    for at in range(len(made), len(body), size):
        if not any(body[at : at + size]):
            return made + body[at:]
        link = body[at : at + size - links.DIGEST_SIZE]
        digest = blake3(digest + link).digest()
        made += link + digest
    return made


def listed(body: bytes) -> bytes:
    """The instants of an interval, with a digest that is right."""
    rest = body[: -instants.DIGEST_BYTES]
    return rest + blake3(rest).digest()


FILES = {
    "timeline.json": File("timelines/t1/timeline.json", lambda path: timeline.load(path.parent)),
    "timeline.json of a fork": File("timelines/t2/timeline.json", lambda path: timeline.load(path.parent)),
    "catalog.json": File("catalog.json", read_copy),
    "tokens.json": File("tokens.json", lambda path: tokens.load(StateDir(path.parent))),
    "nbd.key": File("nbd.key", lambda path: sealed.load_key(StateDir(path.parent))),
    "keys.psk": File("keys.psk", lambda path: tls.check_files(None, str(path))),
    "links": File(f"timelines/t1/{links.FILE}", lambda path: links.read(path.parent), chained),
    "instants": File(
        instants.FILE, lambda path: Instants.load(path.parent, timeline=UUID, interval=1), listed
    ),
}


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_of_any_bytes_is_read_or_an_error_of_ours(name: str, written: World, tmp_path: Path) -> None:
    file = FILES[name]
    whole, path = (written.state.path / file.path).read_bytes(), tmp_path / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)

    def look(data: bytes) -> None:
        path.write_bytes(data)
        file.read(path)

    look(whole)
    if file.checked is not None:
        assert file.checked(whole) == whole
    made = changed(whole)
    if path.suffix == ".json":
        made |= reshaped(json.loads(whole)).map(lambda value: json.dumps(value).encode())

    @settings(max_examples=2 * FUZZED)
    @given(made, st.booleans())
    def any_bytes(data: bytes, mend: bool) -> None:
        with contextlib.suppress(CdpError):
            look(file.checked(data) if mend and file.checked is not None else data)

    any_bytes()


def test_a_link_of_an_unknown_kind_whose_digest_is_right(written: World, tmp_path: Path) -> None:
    whole = bytearray((written.lines[0].directory / links.FILE).read_bytes())
    whole[links.HEAD.size] = 99
    (tmp_path / links.FILE).write_bytes(chained(bytes(whole)))
    with pytest.raises(CorruptError, match="unknown kind 99"):
        links.read(tmp_path)


# --- records, header pages, control records


def first_log(world: World) -> bytes:
    return (world.lines[0].directory / "intervals/000001/00000001.log").read_bytes()


def checked_page(values: dict[str, Any]) -> bytes:
    """A header page that says this, with a check that is right."""
    body: bytes = msgpack.packb(values)
    fixed = segment.FIXED.pack(segment.SEGMENT_MAGIC, 1, len(body), 0, 0, bytes(32))
    return fixed + body + record.CHECK.pack(zlib.crc32(body, zlib.crc32(fixed[:16])))


def test_records_and_headers_of_any_bytes(written: World) -> None:
    log = first_log(written)
    page, raw = log[: segment.PAGE], log[segment.PAGE : segment.PAGE + record.RECORD_SIZE]
    header = segment.decode_page(page, "it")
    assert record.decode(raw, header.salt).seq == 1
    length = segment.FIXED.unpack_from(page)[2]
    said = msgpack.unpackb(page[segment.FIXED.size : segment.FIXED.size + length])
    assert segment.decode_page(checked_page(said).ljust(segment.PAGE, b"\0"), "it") == header

    @settings(max_examples=FUZZED)
    @given(changed(raw), changed(page) | reshaped(said).map(checked_page))
    def look(one: bytes, head: bytes) -> None:
        with contextlib.suppress(CorruptError):
            record.decode(one, header.salt)
        with contextlib.suppress(CorruptError):
            segment.decode_page(head.ljust(segment.PAGE, b"\0")[: segment.PAGE], "it")
        assert 0 <= record.first_bad(one, header.salt, 7) <= len(one) // record.RECORD_SIZE

    look()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: str(message["type"]))
def test_control_records_of_any_bytes(message: dict[str, Any]) -> None:
    """What is read can be folded into the state."""
    whole = control.encode(message)
    assert control.decode(whole) == message

    @settings(max_examples=FUZZED)
    @given(changed(whole) | reshaped(message).map(msgpack.packb))
    def look(data: bytes) -> None:
        with contextlib.suppress(CdpError):
            control.fold(control.State(), control.decode(data), seq=9, time_ns=9)

    look()


@settings(max_examples=FUZZED)
@given(st.text(max_size=80) | st.from_regex(r"[0-9a-f]{32}~(direct:)?[a-z/@:~.]{0,20}", fullmatch=True))
def test_an_export_name_of_any_text(text: str) -> None:
    secret, rest = sealed.unseal(text)
    assert text == (sealed.seal(rest, secret) if secret else rest)
    with contextlib.suppress(UsageError):
        assert names.format_export(names.parse_export(rest))


# --- rows of the catalog, a whole timeline


@pytest.mark.parametrize(("table", "key"), [("locks", b"lock-1"), ("disks", b"d1")])
def test_rows_of_the_catalog_of_any_bytes(written: World, table: str, key: bytes) -> None:
    with scratch() as path:
        state = written.clone(path).state
        env = lmdb.open(str(state.catalog), max_dbs=16, map_size=1 << 24)
        rows = env.open_db(table.encode(), create=False)
        with env.begin(db=rows) as txn:
            row = txn.get(key)
            assert row is not None
            whole = bytes(row)
        env.close()
        read_all(state)

        @settings(max_examples=FUZZED)
        @given(changed(whole) | reshaped(msgpack.unpackb(whole)).map(msgpack.packb))
        def look(data: bytes) -> None:
            env = lmdb.open(str(state.catalog), max_dbs=16, map_size=1 << 24)
            rows = env.open_db(table.encode(), create=False)
            with env.begin(write=True, db=rows) as txn:
                txn.put(key, data)
            env.close()
            with contextlib.suppress(CdpError):
                read_all(state)

        look()


def read_all(state: StateDir) -> None:
    with Catalog.open(state, writable=False) as catalog:
        catalog.rows("locks")
        catalog.names()


def read_timeline(world: World) -> None:
    """All of a disk and its fork, as who recovers it and as its writer."""
    for line in world.lines:
        with contextlib.suppress(CdpError), contextlib.closing(Journal(line.directory)) as journal:
            recovery.survey(journal, world.boot)
            for run in journal.runs(0, 1 << 62):
                assert len(run.records)
        for seq in (1, 9, 20, 33):
            with (
                contextlib.suppress(CdpError),
                contextlib.closing(History(world.state.path, line.timeline, world.boot)) as history,
                contextlib.closing(View(history, seq)) as view,
            ):
                view.read(0, view.size)
        with contextlib.suppress(CdpError):
            line.open()
            line.write(0, b"on" * 2048)
        if line.is_open:
            line.close(clean=False)
    forget_indexes(world.state.path)


def spoil(path: Path, dice: random.Random) -> None:
    """Bits that flip, an end that is missing, a block of another place or of zeros, nothing."""
    data = bytearray(path.read_bytes())
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(data)) if data else 0
        match dice.randrange(6):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = dice.randbytes(dice.randrange(1, 5000))
            case 2 if len(data) > BLOCK:
                other = dice.randrange(len(data) - 512)
                data[at : at + 512] = data[other : other + 512]
            case 3:
                data[at : at + 512] = bytes(len(data[at : at + 512]))
            case _ if data:
                data[at] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def test_a_timeline_of_any_bytes(written: World) -> None:
    """Header logs, payload, base and chain, one or several of them at once."""
    for seed in range(FUZZED):
        dice = random.Random(seed)
        with scratch() as path:
            world = written.clone(path)
            files = [
                file
                for file in sorted(world.state.timelines.rglob("*"))
                if file.suffix in (".log", ".data") or file.name in (links.FILE, "base.raw")
            ]
            for file in dice.sample(files, dice.randrange(1, 4)):
                file.chmod(0o600)
                spoil(file, dice)
            try:
                read_timeline(world)
            except BaseException:
                print(f"replay: seed {seed}")
                raise
