"""Names, sizes, durations and instants: what is read, what is refused, and that both ways agree."""

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdpserver import names
from cdpserver.errors import UsageError
from cdpserver.limits import MAX_DISK_SIZE
from cdpserver.names import (
    MAX_NUMBER,
    MAX_TIME_NS,
    Ago,
    At,
    BasePoint,
    DeltaExport,
    DiskExport,
    Latest,
    Mark,
    MirrorExport,
    PointExport,
    Seq,
    When,
)

SECOND = 1_000_000_000
LETTERS = "abcXYZ019"

good_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
disk_names = st.one_of(good_names, st.builds("{}/{}".format, good_names, good_names))
bookmarks = st.builds("m{}".format, st.text(LETTERS, max_size=63))
times = st.integers(0, MAX_TIME_NS)
numbers = st.integers(0, MAX_NUMBER)
whens: st.SearchStrategy[When] = st.one_of(
    st.just(Latest()),
    st.builds(At, times),
    st.builds(Ago, times),
    st.builds(BasePoint, numbers),
    st.builds(Seq, numbers),
    st.builds(Mark, bookmarks),
)
# Everything a str can hold, lone surrogates (undecodable bytes) included; and texts close to valid ones.
any_text = st.one_of(
    st.text(st.characters(categories=None)),
    st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.text("0123456789-:.TZbpseqlatdm@/+ \n\0", max_size=40),
)

BAD_NAMES = [
    "", ".", "..", "-x", "_x", ".x", "a..b", "a b", "a@b", "a\0b", "a\nb", "a\n", "\udc80", "x" * 65,
    "x" * 300, "é", "٣",
]  # fmt: skip


def one_line(error: UsageError) -> bool:
    """The error can be shown on any terminal."""
    return str(error).isprintable() and str(error).encode("utf-8") != b"" and len(str(error)) < 600


@pytest.mark.parametrize("text", ["a", "vda", "0", "web-1.example_x", "x" * 64])
def test_a_name_is_returned(text: str) -> None:
    assert names.check_name(text) == text


@pytest.mark.parametrize("text", [*BAD_NAMES, "a/b"])
def test_what_is_no_name_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        names.check_name(text)
    assert one_line(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("text", [*BAD_NAMES, "a/b/c", "/a", "a/", "a//b", "a/..", "../a"])
def test_what_is_no_disk_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        names.check_disk_name(text)
    assert one_line(caught.value)


def test_a_disk_of_a_vm_has_one_slash() -> None:
    assert names.check_disk_name("web/vda") == "web/vda"
    assert names.full_name("vda", "web") == "web/vda"
    assert names.full_name("vda", None) == "vda"
    for name, vm in (("web/vda", None), ("vda", "a/b"), ("vda", "")):
        with pytest.raises(UsageError):
            names.full_name(name, vm)


@given(good_names, st.none() | good_names)
def test_a_full_name_splits_into_its_parts(name: str, vm: str | None) -> None:
    assert names.split_name(names.full_name(name, vm)) == (name, vm)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("512B", 512),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64MB", 64 << 20),
        ("64MiB", 64 << 20),
        ("1.5G", 3 << 29),
        ("0.5K", 512),
        ("1.5K", 1536),
        ("10T", 10 << 40),
        ("256T", MAX_DISK_SIZE),
        ("0.25P", MAX_DISK_SIZE),
        ("00512", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert names.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "0", "0G", "-1", "-1G", "1", "1B", "511", "513", "1000", "1.1K", "0.1G", "1.0000000001G", "1P",
        "1PiB", "257T",
        "9" * 20, "9" * 5000, "", " ", "G", "1 G", "1G\n", "1Gi", "1iB", "1E", "0x200", "1e3", "inf",
        "nan", "٥١٢", "\uff15\uff11\uff12", "1.G",
        ".5G", "1,5G", "\0", "\udcff",
    ],
)  # fmt: skip
def test_what_is_no_disk_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        names.parse_size(text)
    assert one_line(caught.value)
    assert caught.value.hint


@given(st.integers(1, MAX_DISK_SIZE // 512).map(lambda sectors: sectors * 512))
def test_a_size_survives_its_text(size: int) -> None:
    assert names.parse_size(names.format_size(size)) == size


def test_sizes_for_people() -> None:
    assert [names.format_size(n) for n in (0, 512, 1024, 1 << 30, 3 << 29, 1 << 50)] == [
        "0", "512", "1K", "1G", "1.5G", "1P",
    ]  # fmt: skip
    assert [names.format_bytes(n) for n in (0, 1023, 1536, 208_982_016)] == ["0B", "1023B", "1.5K", "199.3M"]


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("1s", SECOND),
        ("20m", 1200 * SECOND),
        ("500ms", SECOND // 2),
        ("24h", 86400 * SECOND),
        ("1.5d", 129600 * SECOND),
    ],
)
def test_durations(text: str, span: int) -> None:
    assert names.parse_duration(text) == span


@pytest.mark.parametrize(
    "text", ["", "1", "-1s", "1 s", "1S", "1s\n", "s", "1.s", "1.5ns", "9" * 19 + "d", "٣s", "1w"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        names.parse_duration(text)


@given(times)
def test_a_duration_survives_its_text(span: int) -> None:
    assert names.parse_duration(names.format_duration(span)) == span


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("latest", Latest()),
        ("1970-01-01T00:00:00Z", At(0)),
        ("1970-01-01t00:00:00.000000001z", At(1)),
        ("1970-01-01T01:00:00+01:00", At(0)),
        ("1969-12-31T23:00:00-01:00", At(0)),
        ("2026-11-22T20:18:05.25Z", At(1_795_378_685_250_000_000)),
        ("2026-11-22T20:18:05.25-00:00", At(1_795_378_685_250_000_000)),
        ("2024-02-29T00:00:00Z", At(1_709_164_800 * SECOND)),
        ("2262-12-31T23:59:59.999999999Z", At(MAX_TIME_NS)),
        ("-90s", Ago(90 * SECOND)),
        ("-1.5s", Ago(3 * SECOND // 2)),
        ("-5m", Ago(300 * SECOND)),
        ("-2h", Ago(7200 * SECOND)),
        ("-1d", Ago(86400 * SECOND)),
        ("-250ms", Ago(SECOND // 4)),
        ("bp:0", BasePoint(0)),
        ("bp:12", BasePoint(12)),
        ("seq:48213", Seq(48213)),
        ("before-upgrade", Mark("before-upgrade")),
        ("2026-11-22-before-upgrade", Mark("2026-11-22-before-upgrade")),
        ("bp", Mark("bp")),
        ("latest2", Mark("latest2")),
    ],
)
def test_instants(text: str, when: When) -> None:
    assert names.parse_when(text) == when


BAD_INSTANTS = [
    "", "Latest", "now", "2026-11-22", "2026-11-22T20:18:05", "2026-11-22 20:18:05Z",
    "2026-13-01T00:00:00Z",
    "2026-02-29T00:00:00Z", "2026-11-22T24:00:00Z", "2026-11-22T23:59:60Z",
    "2026-11-22T20:18:05.1234567890Z",
    "2026-11-22T20:18:05.Z", "2026-11-22T20:18:05+24:00", "2026-11-22T20:18:05+01:60",
    "2026-11-22T20:18:05+0100",
    "2026-11-22T20:18:05Z\n", "20261122T201805Z", "1969-12-31T23:59:59Z", "1970-01-01T00:00:00+00:01",
    "2263-01-01T00:00:00Z", "0000-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "-", "-s", "-90", "-1w",
    "--5s", "+5s", "-1.5ns",
    "90s", "1.5h", "12", "1.5", "bp:", "bp:-1", "bp:x", "BP:1", "bp:1.0", "seq:" + "9" * 19,
    "seq:" + "9" * 5000, "seq:٣",
    "seq:1 ", "x:1", "x" * 65, "a/b", "..", "a\0b", "\udc80",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_INSTANTS)
def test_what_is_no_instant_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        names.parse_when(text)
    assert one_line(caught.value)
    assert "bp:12" in caught.value.hint


@given(whens)
def test_an_instant_survives_its_text(when: When) -> None:
    assert names.parse_when(names.format_when(when)) == when


@given(times)
@example(0)
@example(MAX_TIME_NS)
def test_a_time_survives_its_text(time_ns: int) -> None:
    assert names.parse_time(names.format_time(time_ns)) == time_ns


def test_any_time_of_a_record_can_be_shown() -> None:
    assert names.format_time(0) == "1970-01-01T00:00:00.000000000Z"
    assert names.format_time(2**64 - 1).startswith("2554-")


@pytest.mark.parametrize(
    "text", ["latest", "LATEST", "now", "12", "90s", "2026-11-22", "bp:1", "-5m", *BAD_NAMES]
)
def test_a_bookmark_is_never_another_instant(text: str) -> None:
    with pytest.raises(UsageError):
        names.check_bookmark(text)


def instant(text: str) -> When | None:
    try:
        return names.parse_when(text)
    except UsageError:
        return None


@given(any_text)
def test_a_bookmark_and_an_instant_agree(text: str) -> None:
    try:
        names.check_bookmark(text)
        allowed = True
    except UsageError:
        allowed = False
    assert allowed == (instant(text) == Mark(text))


def test_points() -> None:
    assert names.parse_point("web/vda@-90s") == ("web/vda", Ago(90 * SECOND))
    assert names.parse_point("vda@2026-11-22T20:18:05Z") == ("vda", At(1_795_378_685 * SECOND))


@pytest.mark.parametrize(
    "text", ["", "vda", "@", "vda@", "@latest", "vda@latest@latest", "a/b/c@latest", "a\0@latest"]
)
def test_what_is_no_point_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        names.parse_point(text)
    assert one_line(caught.value)


def test_exports() -> None:
    assert names.parse_export("web/vda") == DiskExport("web/vda")
    assert names.parse_export("vda@bp:3") == PointExport("vda", BasePoint(3))
    assert names.parse_export("vda@delta:3") == DeltaExport("vda", 3)
    assert names.parse_export("vda@bp:3/p2") == PointExport("vda", BasePoint(3), "p2")
    assert names.parse_export("web/vda@latest/lv/vg0/a+b") == PointExport("web/vda", Latest(), "lv/vg0/a+b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "a@",
        "a@delta:",
        "a@delta:-1",
        "a@delta:1@2",
        "a@b@c",
        "a@latest/p0",
        "a@latest/lv/vg",
        "a@delta:1/p1",
        "a/b/c",
        "x" * 300,
        "x" * 5000,
        "a@\udc80",
    ],
)
def test_what_is_no_export_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        names.parse_export(text)
    assert one_line(caught.value)


@given(
    st.one_of(
        st.builds(DiskExport, disk_names),
        st.builds(
            MirrorExport,
            disk_names,
            st.from_regex("[0-9a-f]{32}", fullmatch=True),
            st.none() | st.integers(0, (1 << 63) - 1),
            st.booleans(),
        ),
        st.builds(PointExport, disk_names, whens, st.sampled_from((None, "p3", "lv/vg0/root"))),
        st.builds(DeltaExport, disk_names, numbers),
    )
)
def test_an_export_survives_its_text(export: names.Export) -> None:
    assert names.parse_export(names.format_export(export)) == export


@pytest.mark.parametrize(
    "parse",
    [
        names.check_name, names.check_disk_name, names.check_bookmark, names.parse_size, names.parse_duration,
        names.parse_time, names.parse_when, names.parse_point, names.parse_export,
    ],
)  # fmt: skip
@given(text=any_text)
def test_any_text_is_read_or_refused_in_one_line(parse: Callable[[str], object], text: str) -> None:
    shown = None
    try:
        parse(text)
    except UsageError as error:
        shown = error
    assert shown is None or one_line(shown)
