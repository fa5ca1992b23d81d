"""docs/format.md against the code: what the tables say is what the structs do, and golden bytes make a change visible."""

import ast
import re
import struct
from dataclasses import fields
from pathlib import Path

import pytest

from cdpserver import limits, rpo, state
from cdpserver.catalog.content import Content
from cdpserver.catalog.rows import MAX_ROW_BYTES, Row
from cdpserver.index import merged, pieces, store
from cdpserver.index.pieces import SHIFTS, record_pieces
from cdpserver.journal import control, instants, links, record, segment
from cdpserver.journal.control import Grade, State
from cdpserver.journal.record import BODY, CHECK, DTYPE, Kind, Record
from cdpserver.journal.segment import FIXED, Header, data_path, log_path
from cdpserver.repository import format, patches, tape
from tests.core import ROOT
from tests.model import BLOCK, read_header

DOCUMENT = (ROOT / "docs" / "format.md").read_text()


def section(title: str) -> str:
    """The text under one heading, up to the next of any level."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#)", f"{DOCUMENT}\n#", re.MULTILINE | re.DOTALL)
    assert match is not None, f"docs/format.md has no section {title!r}"
    return match[1]


def table(text: str, number: int = 0) -> list[list[str]]:
    """The cells of the `number`-th table of a section, without its head."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in tables[number].splitlines()]
    return [[cell.strip("| ") for cell in row] for row in rows[2:]]


def layout(*structs: struct.Struct) -> list[tuple[int, int]]:
    """(offset, size) of every field of structs that follow each other."""
    found, at = [], 0
    for each in structs:
        for count, code in re.findall(r"(\d*)([a-zA-Z])", each.format):
            size = struct.calcsize(f"<{count}{code}")
            found.append((at, size))
            at += size
    return found


@pytest.mark.parametrize(
    ("title", "structs", "size"),
    [
        ("Head of a pack, 32 bytes", (format.HEAD,), format.HEAD.size),
        ("Link of the hash chain, 208 bytes", (links.LINK,), links.LINK.size),
        ("Entry of a pack, 52 bytes", (format.ENTRY, format.CHECK), format.ENTRY_SIZE),
        ("Record of an export, 52 bytes", (tape.RECORD, tape.CHECK), tape.RECORD_SIZE),
        ("Row of a pack, 52 bytes", (format.ROW,), format.ROW.size),
        ("Head of a table, 8 bytes", (patches.HEAD,), patches.HEAD.size),
        ("Patch of a table, 36 bytes", (patches.PATCH,), patches.PATCH.size),
        ("Place of a table, 8 bytes", (patches.PLACE,), patches.PLACE.size),
        ("Tail of a pack, 32 bytes", (format.TAIL, format.CHECK), format.TAIL_SIZE),
        ("Sample of the record, 64 bytes", (rpo.SAMPLE,), rpo.SAMPLE.size),
    ],
)
def test_packs_and_links_are_laid_out_as_documented(
    title: str, structs: tuple[struct.Struct, ...], size: int
) -> None:
    documented = [(int(offset), int(length)) for offset, length, _ in table(section(title))]
    assert documented == [field for field in layout(*structs) if field[0] < documented[-1][0] + 1]
    assert int(re.findall(r"\d+", title)[0]) == size


def test_the_record_is_laid_out_as_documented() -> None:
    rows = table(section("Record, 64 bytes"))
    documented = [(int(offset), int(size)) for offset, size, _ in rows]
    assert documented == layout(BODY, CHECK)
    columns = DTYPE.fields
    assert columns is not None
    assert documented == [(columns[name][1], columns[name][0].itemsize) for name in DTYPE.names or ()]
    assert DTYPE.itemsize == record.RECORD_SIZE == 64
    meanings = [meaning for _, _, meaning in rows]
    assert meanings[0] == f"magic 0x{record.MAGIC:04X}"
    assert meanings[1] == f"version, {record.VERSION}"
    assert f"units of {limits.SECTOR} bytes" in meanings[3]
    assert f"first {record.DIGEST_SIZE} bytes" in meanings[8]
    assert f"(`{record.SALT.format}`)" in meanings[9]


def test_the_list_of_instants_is_laid_out_as_documented() -> None:
    rows = table(section("Thinned intervals"))
    assert [(int(offset), int(size)) for offset, size, _ in rows[:5]] == layout(instants.HEAD)
    assert rows[5][:2] == [str(instants.HEAD.size), f"{instants.ROW_BYTES} R"]
    assert instants.DTYPE.itemsize == instants.ROW_BYTES
    assert rows[6][1] == str(instants.DIGEST_BYTES)
    assert repr(instants.MAGIC.decode())[1:-1] in rows[0][2]
    assert f"format version {segment.THINNED_VERSION}" in section("Header page")


def test_the_kinds_of_records_are_the_documented_ones() -> None:
    rows = table(section("Record, 64 bytes"), 1)
    assert {int(number): name for number, name, *_ in rows} == {int(k): k.name.lower() for k in Kind}
    assert f"a multiple of {limits.BLOCK}" in rows[0][2]


def test_the_header_page_is_laid_out_as_documented() -> None:
    rows = table(section("Header page"))
    fixed = [(int(offset), int(size)) for offset, size, _ in rows[:6]]
    assert fixed == layout(FIXED)
    assert rows[6][:2] == [str(FIXED.size), "H"] and rows[7][:2] == [f"{FIXED.size}+H", str(CHECK.size)]
    magic = re.search(r"magic `(.*)`", rows[0][2])
    assert magic is not None
    assert ast.literal_eval(f"b'{magic[1]}'") == segment.SEGMENT_MAGIC
    assert rows[1][2] == f"format version, {segment.SEGMENT_VERSION}"
    assert [int(rows[n][0]) for n in (3, 4)] == [8 * segment.TAIL_WORD, 8 * segment.STATE_WORD]
    states = re.findall(r"(\d) (open|closed|sealed|followed)", rows[4][2])
    assert [int(number) for number, _ in states] == [
        segment.OPEN,
        segment.CLOSED,
        segment.SEALED,
        segment.ROLLED,
    ]
    text = section("Segment") + section("Header page")
    assert f"one {segment.PAGE}-byte header page" in text
    assert f"windows of {limits.WINDOW_BYTES:,} bytes" in text
    documented = re.search(r"The map: (.*?): the timeline's state", text, re.DOTALL)
    assert documented is not None
    assert set(re.findall(r"`(\w+)`", documented[1])) == {*segment.PAGE_FIELDS, "previous"}


def test_the_control_records_are_the_documented_ones() -> None:
    text = section("Control records")
    documented = {
        kind.strip("`"): set(re.findall(r"`(\w+)`(?::|,|$)", names)) for kind, names, _ in table(text)
    }
    begins = documented.pop("begin")
    assert begins >= {"mode"} and set(control.FIELDS["begin"]) == {"mode", "session"}
    assert documented == {kind: set(names) for kind, names in control.FIELDS.items() if kind != "begin"}
    carry = re.search(r"`carry` in a header page: `\{(.*)\}`", text)
    assert carry is not None
    assert re.findall(r'"(\w+)"', carry[1]) == [field.name for field in fields(State)]


def test_every_control_message_has_the_documented_fields() -> None:
    made = (
        control.begin("image"),
        control.session(1, "x"),
        control.synced(1, write_blocking=True),
        control.mark("m"),
        control.cut(0),
        control.gap(from_seq=1, from_time_ns=2, reason="r"),
        control.missed(from_time_ns=1, until_time_ns=0, reason="r"),
        control.grow(4096),
    )
    assert {m["type"]: set(m) - {"type"} for m in made} == {k: set(v) for k, v in control.FIELDS.items()}


def test_the_index_is_laid_out_as_documented() -> None:
    text = section("Index")
    assert f"`{store.POINT.format}`" in text
    assert f"`kind << {pieces.KIND_BITS} | rest`" in text
    assert f"`segment << {pieces.SEGMENT_BITS} | place / {limits.BLOCK}`" in text
    sizes = re.search(r"aligned pieces of (\d+) KiB, (\d+) KiB, (\d+) MiB, (\d+) MiB and (\d+) GiB", text)
    assert sizes is not None
    units = (10, 10, 20, 20, 30)
    spans = [int(size) << unit for size, unit in zip(sizes.groups(), units, strict=True)]
    assert spans == [limits.BLOCK << shift for shift in SHIFTS]
    grades = re.search(r"grade \((.*?)\)", text)
    assert grades is not None
    assert grades[1] == ", ".join(f"{int(grade)} {grade.label}" for grade in Grade)
    assert pieces.LEVEL_BITS == 40, (
        "a key is the level (1 byte), the block number (5 bytes) and the seq (8 bytes)"
    )


def test_a_merged_index_is_laid_out_as_documented() -> None:
    text = section("Index")
    assert f"`{merged.TRAILER.format}`" in text and f"magic `{merged.MAGIC.decode()}`" in text
    assert f"pages of {merged.PAGE_WORDS * 8} bytes: {merged.ROWS} keys" in text
    shifts = [merged.PLACE_SHIFT, merged.LEVEL_SHIFT, 0]
    gib, level, piece = (shift + merged.ORDINAL_BITS for shift in shifts)
    assert f"`gib << {gib} | level << {level} | piece << {piece} | ordinal`" in text
    assert limits.BLOCK << merged.REGION_SHIFT == 1 << 30
    assert f"{merged.DIRECTORY}/LOW-HIGH" in section("State directory")


def test_the_names_of_segments_are_the_documented_ones() -> None:
    documented = section("State directory")
    assert "NNNNNNNN.log" in documented and "NNNNNNNN.data" in documented
    assert log_path(Path("i"), 7) == Path("i/00000007.log")
    assert data_path(Path("i"), 7) == Path("i/00000007.data")
    assert store.CLOSED_NAME in documented
    assert "open-BOOT.mdb" in documented and "first 8 characters" in documented
    assert store.open_name("12345678-90") == "open-12345678.mdb"


def test_a_record_is_these_bytes() -> None:
    """Whoever changes them changes the format version too."""
    made = Record(Kind.DATA, 7, 1_800_000_000_000_000_005, 3 * BLOCK, 2 * BLOCK, 5 * BLOCK, bytes(range(20)))
    assert record.encode(made, record.salt(bytes(range(16)), 2, 3)).hex(" ", 8) == (
        "50cd010110000000 0700000000000000 0500b49376e2fa18 0030000000000000"
        " 0050000000000000 0001020304050607 08090a0b0c0d0e0f 101112138ac4a405"
    )


def test_a_header_page_is_these_bytes() -> None:
    """Whoever changes them changes the format version too."""
    state = State(session=2, synced=True, write_blocking=True, cuts=1)
    page = segment.encode_page(Header(bytes(range(16)), 2, 3, 70, 99, "b00t", state))
    length = int.from_bytes(page[12:16], "little")
    assert page[:64].hex(" ", 8) == "4344505345470d0a 01000000cf000000" + " 0000000000000000" * 6
    assert page[64 + length : 68 + length].hex() == "212a4f7c"
    assert not page[68 + length :].strip(b"\0")
    carry = {"session": 2, "synced": True, "write_blocking": True, "fork": False, "cuts": 1, "resync_ref": -1}
    assert read_header(page) == {
        "timeline": bytes(range(16)),
        "interval": 2,
        "segment": 3,
        "first_seq": 70,
        "first_time_ns": 99,
        "boot_id": "b00t",
        "previous": bytes(32),
        "carry": carry | {"gap_until_ns": 0},
    }


def test_pieces_are_these_values() -> None:
    """A record of 17 blocks at block 15 of segment 3: one block, then an aligned piece of sixteen."""
    found = record_pieces(Kind.DATA, 15, 17, 3, 5 * BLOCK)
    assert [(hex(unit), hex(value)) for unit, value in found] == [
        ("0xf", "0x2000000300000005"),
        ("0x10000000001", "0x2000000300000006"),
    ]
    assert record_pieces(Kind.SAME, 0, 1, 3, 9) == [(0, 4 << 61 | 9)]


def test_the_versions_are_the_documented_ones() -> None:
    assert DOCUMENT.startswith(f"# On-disk format, version {state.VERSION}\n")
    assert f'{{"format": "{state.FORMAT}", "version": {state.VERSION}}}' in section("State directory")
    rows = table(section("Versions"))
    assert [int(version) for version, _ in rows] == list(range(state.OLDEST_VERSION, state.VERSION + 1))
    copy = re.search(r"`catalog.json`: `(\{.*\})`, a ROW being\n`(\{.*?\})`", section("State directory"))
    assert copy is not None
    assert re.findall(r'"(\w+)"', re.sub(r"\{NAME: \{.*?\}\}", "", copy[1])) == list(Content({}, 1).to_json())
    assert re.findall(r'"(\w+)"', copy[2]) == list(Row("k", 1, {}).value())
    assert f"at most {MAX_ROW_BYTES} bytes" in section("State directory")
