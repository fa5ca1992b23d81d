"""Bytes by offset: what readers give is what lies at the places that they name, however volumes are put together."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver.errors import RefusedError
from cdpserver.files.browser import Browser
from cdpserver.files.formats.base import HOLE, clip
from cdpserver.files.source import Cached, Join, Part, Reader, Stripes
from cdpserver.files.volumes import find_volumes
from tests.filesystems import ImageDisk, disk_with

DISK = Random(7).randbytes(300_000)


class Bytes(Reader):
    """Bytes in memory."""

    def __init__(self, held: bytes) -> None:
        self._held = held
        self.size = len(held)

    def read(self, offset: int, length: int) -> bytes:
        return self._held[offset : offset + length]

    def places(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        yield offset, end, offset


def readers() -> st.SearchStrategy[Reader]:
    part = st.builds(
        lambda start, size: Part(Cached(Bytes(DISK)), start, size),
        st.integers(0, 290_000),
        st.integers(1, 9_000),
    )
    even = st.integers(1, 5).flatmap(
        lambda rows: st.lists(st.integers(0, 100_000), min_size=1, max_size=4).map(
            lambda starts: Stripes([Part(Bytes(DISK), start, rows * 512) for start in starts], 512)
        )
    )
    return st.lists(part | even, min_size=1, max_size=5).map(Join)


@given(readers(), st.integers(0, 50_000), st.integers(0, 50_000))
def test_what_is_read_lies_at_the_places(reader: Reader, offset: int, length: int) -> None:
    offset = min(offset, reader.size)
    end = min(offset + length, reader.size)
    parts = list(reader.places(offset, end))
    assert [start for start, _, _ in parts] == [offset, *(stop for _, stop, _ in parts)][: len(parts)]
    found = b"".join(DISK[place : place + stop - start] for start, stop, place in parts)
    assert reader.read(offset, length) == found
    assert len(found) == end - offset


def test_stripes_are_read_in_turn() -> None:
    volume = Stripes([Bytes(b"aaccee"), Bytes(b"bbddff")], 2)
    assert volume.read(0, 100) == b"aabbccddeeff"
    assert volume.read(3, 4) == b"bccd"


runs = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 60), st.sampled_from((HOLE, -2, 0, 100, 1000))), max_size=8
)


@given(runs, st.integers(0, 60))
def test_runs_have_no_gaps(found: list[tuple[int, int, int]], size: int) -> None:
    at = 0
    for start, end, _ in clip(iter(found), size):
        assert start == at < end
        at = end
    assert at == size


METADATA = """{name} {{
id = "{id}"
seqno = 1
status = ["RESIZEABLE", "READ", "WRITE"]
extent_size = 8
physical_volumes {{

pv0 {{
id = "{pv}"
pe_start = 2048
pe_count = 10
}}
}}

logical_volumes {{

root {{
id = "root"
status = ["READ", "WRITE", "VISIBLE"]
segment_count = 1

segment1 {{
start_extent = 0
extent_count = 2

type = "{type}"
stripe_count = 1

stripes = [
"pv0", 1
]
}}
}}
}}
}}
contents = "Text Format Volume Group"
version = 1
"""


def physical_volume(number: int, name: str, *, type: str = "striped", around: bool = False) -> bytes:
    """A physical volume with one group; `around`: its metadata goes around the end of its area."""
    id = f"{number}" * 32
    text = METADATA.format(name=name, id=f"vg{number}", pv=id, type=type).encode() + b"\0"
    held = bytearray(2 << 20)
    area, area_size = 4096, 1 << 20
    held[512:544] = (
        b"LABELONE" + (1).to_bytes(8, "little") + bytes(4) + (32).to_bytes(4, "little") + b"LVM2 001"
    )
    places = [(1 << 20, 0), (0, 0), (area, area_size), (0, 0)]
    held[544:584] = id.encode() + (2 << 20).to_bytes(8, "little")
    for index, (offset, size) in enumerate(places):
        held[584 + 16 * index : 600 + 16 * index] = offset.to_bytes(8, "little") + size.to_bytes(8, "little")
    start = area_size - 100 if around else 512
    held[area + 4 : area + 20] = b" LVM2 x[5A%r0N*>"
    held[area + 20 : area + 24] = (1).to_bytes(4, "little")
    held[area + 24 : area + 40] = area.to_bytes(8, "little") + area_size.to_bytes(8, "little")
    held[area + 40 : area + 56] = start.to_bytes(8, "little") + len(text).to_bytes(8, "little")
    first = text[: area_size - start]
    held[area + start : area + start + len(first)] = first
    held[area + 512 : area + 512 + len(text) - len(first)] = text[len(first) :]
    held[(1 << 20) + 4096 : (1 << 20) + 4104] = b"CONTENT!"
    return bytes(held)


@pytest.mark.parametrize("around", [False, True])
def test_a_logical_volume_by_its_metadata(around: bool) -> None:
    pv, root = find_volumes(Bytes(physical_volume(1, "vg", around=around)))
    assert (pv.holds, root.name, root.reader.size) == ("lvm", "lv/vg/root", 8192)
    assert root.reader.read(0, 8) == b"CONTENT!"
    assert list(root.reader.places(0, 8)) == [(0, 8, (1 << 20) + 4096)]


def test_two_groups_of_one_name_are_refused() -> None:
    disk = disk_with(physical_volume(1, "vg"), physical_volume(2, "vg"))
    names = [volume.name for volume in find_volumes(Bytes(disk))]
    assert names == ["p1", "p2", "lv/vg/root", "lv/vg/root"]
    with (
        Browser(ImageDisk(disk)) as browser,
        pytest.raises(RefusedError, match="2 volume groups of this name"),
    ):
        browser.open("lv/vg/root")


def test_a_type_that_is_not_supported_is_told() -> None:
    _, root = find_volumes(Bytes(physical_volume(1, "vg", type="raid5")))
    assert "raid5" in root.note and root.holds == ""
