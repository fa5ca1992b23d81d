"""timeline.json: what is written is read, anything else is corrupt; a timeline's directory appears whole."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpserver import timeline as timelines
from cdpserver.errors import CdpError, CorruptError, NoSpaceError, NotFoundError, RefusedError, UsageError
from cdpserver.limits import MAX_DISK_SIZE
from cdpserver.state import StateDir
from cdpserver.timeline import EmptyBase, ImageBase, PointBase, Timeline, create_timeline

HERE = Path("timeline.json")
good_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
ids = st.integers(1, 10**9).map("t{}".format)
bases = st.one_of(
    st.just(EmptyBase()),
    st.builds("bases/{}.raw".format, good_names).map(ImageBase),
    st.builds(
        PointBase, st.integers(10**10, 10**11).map("t{}".format), st.integers(0, 2**61 - 1), st.integers(0)
    ),
)
some_timelines = st.builds(
    Timeline,
    id=ids,
    uuid=st.binary(min_size=16, max_size=16),
    name=good_names,
    vm=st.none() | good_names,
    size=st.integers(1, MAX_DISK_SIZE // 512).map(lambda sectors: sectors * 512),
    created_ns=st.integers(0, 2**63),
    base=bases,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def example() -> dict[str, Any]:
    """A valid timeline.json of a fork."""
    return Timeline("t5", bytes(16), "vda", "web", 1 << 20, 7, PointBase("t3", 4711, 5)).to_json()


@pytest.fixture
def state(short_path: Path) -> StateDir:
    return StateDir.create_or_open(short_path / "s")


def create(state: StateDir, **changed: Any) -> Timeline:
    arguments = {"id": "t1", "name": "vda", "vm": None, "size": 1 << 20, "base": EmptyBase(), "now_ns": 42}
    return create_timeline(state, **(arguments | changed))


@given(some_timelines)
def test_what_is_written_is_read(timeline: Timeline) -> None:
    assert Timeline.from_json(timeline.to_json(), HERE) == timeline
    assert timeline.is_fork == isinstance(timeline.base, PointBase)


def test_the_json_is_that_of_the_format() -> None:
    assert example() == {
        "format": 1,
        "id": "t5",
        "uuid": "0" * 32,
        "name": "vda",
        "vm": "web",
        "size": 1 << 20,
        "created_ns": 7,
        "base": {"kind": "point", "timeline": "t3", "seq": 4711, "time_ns": 5},
    }


@given(st.sampled_from(sorted(example())), json_values)
def test_any_value_in_any_field_is_read_or_corrupt(key: str, value: Any) -> None:
    try:
        timeline = Timeline.from_json(example() | {key: value}, HERE)
    except CorruptError:
        return
    assert timeline.to_json() == example() | {key: value}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2), ("format", True), ("id", "../t1"), ("id", "t0"), ("uuid", "0" * 31), ("uuid", "G" * 32),
        ("uuid", "0" * 31 + "\n"), ("name", "a/b"), ("name", "a\0"), ("vm", ""), ("vm", ".."), ("size", 0),
        ("size", -512), ("size", 513), ("size", 1 << 50), ("size", 1.0), ("created_ns", -1), ("more", 1),
        ("base", None), ("base", {}), ("base", {"kind": "other"}), ("base", {"kind": "empty", "file": "x"}),
        ("base", {"kind": "image", "file": "/etc/passwd"}), ("base", {"kind": "image", "file": "bases/../x.raw"}),
        ("base", {"kind": "image", "file": "bases/a/b.raw"}), ("base", {"kind": "image", "file": "bases/a.raw\n"}),
        ("base", {"kind": "image", "file": "bases/.raw"}), ("base", {"kind": "image", "file": 1}),
        ("base", {"kind": "point", "timeline": "t5", "seq": 1, "time_ns": 0}),
        ("base", {"kind": "point", "timeline": "../x", "seq": 1, "time_ns": 0}),
        ("base", {"kind": "point", "timeline": "t3", "seq": -1, "time_ns": 0}),
        ("base", {"kind": "point", "timeline": "t3", "seq": 1 << 61, "time_ns": 0}),
    ],
)  # fmt: skip
def test_impossible_values_are_corrupt(key: str, value: Any) -> None:
    with pytest.raises(CorruptError) as caught:
        Timeline.from_json(example() | {key: value}, HERE)
    assert str(caught.value).isprintable()
    assert caught.value.hint


@pytest.mark.parametrize("key", sorted(example()))
def test_a_missing_field_is_corrupt(key: str) -> None:
    value = example()
    del value[key]
    with pytest.raises(CorruptError):
        Timeline.from_json(value, HERE)


def test_a_timeline_is_created_whole(state: StateDir) -> None:
    timeline = create(state, vm="web", base=ImageBase("bases/debian-12.raw"))
    directory = state.timeline("t1")
    assert sorted(os.listdir(directory)) == [
        "index.lock",
        "intervals",
        "lease",
        "timeline.json",
        "writer.lock",
    ]
    assert os.listdir(state.timelines) == ["t1"]
    assert timelines.load(directory) == timeline
    assert (timeline.full_name, timeline.created_ns, len(timeline.uuid)) == ("web/vda", 42, 16)
    assert create(state, id="t2").uuid != timeline.uuid


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "t0"}, {"id": "../x"}, {"name": "a/b/c"}, {"name": "a/b"}, {"name": "a@b"}, {"name": "a\0"}, {"name": ".."},
        {"name": "x" * 300}, {"vm": "a/b"}, {"size": 0}, {"size": -1}, {"size": 1}, {"size": 1000}, {"size": 1 << 50},
        {"base": ImageBase("x.raw")}, {"base": PointBase("t1", 1, 0)}, {"base": PointBase("t9", -1, 0)},
    ],
)  # fmt: skip
def test_impossible_arguments_make_nothing(state: StateDir, changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        create(state, **changed)
    assert str(caught.value).isprintable()
    assert os.listdir(state.timelines) == []


def test_an_id_is_not_taken_twice(state: StateDir) -> None:
    first = create(state)
    with pytest.raises(RefusedError):
        create(state, name="other")
    assert timelines.load(state.timeline("t1")) == first


def test_what_a_crash_left_is_overwritten(state: StateDir) -> None:
    (state.timelines / ".tmp-t1").mkdir()
    (state.timelines / ".tmp-t1" / "junk").write_bytes(b"x")
    create(state)
    assert "junk" not in os.listdir(state.timeline("t1"))


@pytest.mark.parametrize("call", ["fdatasync", "fsync", "rename"])
def test_a_full_disk_leaves_no_half_timeline(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Every such call fails in turn; the timeline is there whole or not at all."""
    real = getattr(os, call)
    left = 0

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    monkeypatch.setattr(os, call, failing)
    for n in range(1, 50):
        left = n
        try:
            create(state)
        except NoSpaceError:
            left = 0
            for name in os.listdir(state.timelines):
                assert timelines.load(state.timelines / name)
                os.rename(state.timelines / name, state.path / f"gone-{n}")
        else:
            break
    assert 1 < n < 49


def test_loading_says_what_is_wrong(state: StateDir) -> None:
    with pytest.raises(NotFoundError):
        timelines.load(state.timeline("t1"))
    create(state)
    os.rename(state.timeline("t1"), state.timeline("t2"))
    with pytest.raises(CorruptError, match="it is of timeline t1"):
        timelines.load(state.timeline("t2"))
    (state.timeline("t2") / "timeline.json").unlink()
    with pytest.raises(CorruptError, match="missing"):
        timelines.load(state.timeline("t2"))


def test_a_file_in_place_of_the_directory_is_an_error_of_ours(state: StateDir) -> None:
    state.timeline("t1").write_bytes(b"")
    with pytest.raises(CdpError):
        timelines.load(state.timeline("t1"))
