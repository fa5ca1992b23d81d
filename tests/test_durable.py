"""Files appear whole or not at all: every system call is made to fail in turn, and their order is checked."""

import errno
import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cdpserver import durable
from cdpserver.errors import BrokenError, CorruptError, NoSpaceError

CALLS = ("open", "write", "fdatasync", "fsync", "rename", "mkdir")


class System:
    """The real system calls, recorded; the n-th (from 1) fails with `error`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fail_at = 0
        self.error = errno.ENOSPC
        for name in CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.fail_at:
                raise OSError(self.error, os.strerror(self.error))
            return real(*args, **options)

        return call

    def arm(self, fail_at: int, error: int = errno.ENOSPC) -> None:
        self.calls, self.fail_at, self.error = [], fail_at, error


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    return System(monkeypatch)


def test_a_file_is_written_whole(tmp_path: Path, system: System) -> None:
    path = tmp_path / "x"
    durable.write_whole(path, b"one")
    durable.write_whole(path, b"two" * 100_000)
    assert path.read_bytes() == b"two" * 100_000
    assert os.listdir(tmp_path) == ["x"]
    # The data is on the disk before the name is, and the name before the call returns.
    assert system.calls[-6:] == ["open", "write", "fdatasync", "rename", "open", "fsync"]


def test_a_file_gets_its_mode(tmp_path: Path) -> None:
    durable.write_whole(tmp_path / "x", b"", mode=0o600)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


def test_a_short_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    durable.write_whole(tmp_path / "x", b"0123456789" * 10)
    assert (tmp_path / "x").read_bytes() == b"0123456789" * 10


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError)])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, system: System, code: int, kind: type[Exception]
) -> None:
    path = tmp_path / "x"
    durable.write_whole(path, b"old")
    for n in count(1):
        system.arm(n, code)
        try:
            durable.write_whole(path, b"new")
        except kind:
            system.arm(0)
            assert path.read_bytes() in (b"old", b"new")
            assert os.listdir(tmp_path) == ["x"]
            durable.write_whole(path, b"old")
        else:
            break
    assert n == 7
    assert path.read_bytes() == b"new"


def test_a_broken_device_is_said(tmp_path: Path, system: System) -> None:
    system.arm(3, errno.EIO)
    with pytest.raises(BrokenError, match="cannot write"):
        durable.write_whole(tmp_path / "x", b"new")
    assert os.listdir(tmp_path) == []


def test_other_errors_go_to_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.write_whole(tmp_path / "none" / "x", b"")
    with pytest.raises(FileNotFoundError):
        durable.publish(tmp_path / "none", tmp_path / "x")
    with pytest.raises(FileExistsError):
        durable.make_dir(tmp_path)


@pytest.mark.parametrize("directory", [False, True])
def test_publishing_syncs_before_and_after_the_rename(
    tmp_path: Path, system: System, directory: bool
) -> None:
    if directory:
        (tmp_path / "tmp").mkdir()
    else:
        (tmp_path / "tmp").write_bytes(b"x")
    system.arm(0)
    durable.publish(tmp_path / "tmp", tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"]
    assert system.calls == ["open", "fsync", "rename", "open", "fsync"]


def test_publishing_from_another_directory_syncs_both(tmp_path: Path, system: System) -> None:
    durable.make_dir(tmp_path / "a")
    (tmp_path / "a" / "tmp").write_bytes(b"x")
    system.arm(0)
    durable.publish(tmp_path / "a" / "tmp", tmp_path / "final")
    assert system.calls.count("fsync") == 3


def test_a_new_directory_is_synced_in_its_parent(tmp_path: Path, system: System) -> None:
    durable.make_dir(tmp_path / "d", 0o700)
    assert system.calls == ["mkdir", "open", "fsync"]
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700


def make_tree(path: Path) -> None:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_bytes(b"x")
    (path / "link").symlink_to("/nowhere")


def test_a_tree_is_removed(tmp_path: Path) -> None:
    make_tree(tmp_path / "t")
    durable.remove_tree(tmp_path / "t")
    durable.remove_tree(tmp_path / "t")
    assert os.listdir(tmp_path) == []


def test_removing_follows_no_link(tmp_path: Path) -> None:
    make_tree(tmp_path / "t")
    (tmp_path / "link").symlink_to(tmp_path / "t")
    durable.remove_tree(tmp_path / "link")
    assert (tmp_path / "t" / "sub" / "file").exists()
    assert not (tmp_path / "link").is_symlink()


def test_removing_goes_on_after_a_crash(tmp_path: Path) -> None:
    make_tree(tmp_path / ".removing-t")
    durable.remove_tree(tmp_path / "t")
    assert os.listdir(tmp_path) == []
    make_tree(tmp_path / ".removing-t")
    make_tree(tmp_path / "t")
    durable.remove_tree(tmp_path / "t")
    assert os.listdir(tmp_path) == []


def test_a_tree_goes_by_name_first(tmp_path: Path, system: System) -> None:
    for n in count(1):
        make_tree(tmp_path / "t")
        system.arm(n)
        try:
            durable.remove_tree(tmp_path / "t")
        except NoSpaceError:
            system.arm(0)
            whole = (tmp_path / "t" / "sub" / "file").exists()
            assert whole or not (tmp_path / "t").exists()
            durable.remove_tree(tmp_path / "t")
            assert os.listdir(tmp_path) == []
        else:
            break
    assert n > 3


def test_sweeping_takes_only_what_crashes_left(tmp_path: Path) -> None:
    for name in (".removing-t1", ".tmp-t2", "t3"):
        make_tree(tmp_path / name)
    no_pid = 1 << 22  # PID_MAX_LIMIT
    (tmp_path / f".tmp-clock.json-{no_pid}").write_bytes(b"half")
    (tmp_path / f".tmp-first-copy.json-{os.getppid()}").write_bytes(b"somebody is at it")
    (tmp_path / "clock.json").write_bytes(b"{}")
    assert durable.sweep(tmp_path) == [".removing-t1", f".tmp-clock.json-{no_pid}", ".tmp-t2"]
    assert sorted(os.listdir(tmp_path)) == [f".tmp-first-copy.json-{os.getppid()}", "clock.json", "t3"]
    assert durable.sweep(tmp_path) == []


def test_json_survives(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "x", {"a": [1, "\udc80", None]})
    assert durable.read_json(tmp_path / "x") == {"a": [1, "\udc80", None]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}x",
        b"\xff\xfe",
        b"\0" * 100,
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CorruptError) as caught:
        durable.read_json(tmp_path / "x")
    assert caught.value.hint
    assert str(caught.value).isprintable()


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "MAX_JSON_BYTES", 10)
    (tmp_path / "x").write_text(json.dumps({"a": "long enough"}))
    with pytest.raises(CorruptError):
        durable.read_json(tmp_path / "x")


def test_a_missing_file_is_not_corrupt(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        durable.read_json(tmp_path / "x")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1])
def test_fields_are_of_their_type(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CorruptError):
        durable.take_int({"a": value}, "a", tmp_path)
    with pytest.raises(CorruptError):
        durable.take_str({"a": 1}, "a", tmp_path)
    with pytest.raises(CorruptError):
        durable.take_keys({"a": 1}, {"a", "b"}, tmp_path)
