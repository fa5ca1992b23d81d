"""The state directory: made, opened, refused, locked; readers write nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdpserver.errors import CdpError, CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.state import (
    LONGEST_SOCKET,
    SOCKET_PATH_LENGTH,
    VERSION,
    StateDir,
    check_timeline_id,
    default_state_dir,
)


def refused(error: CdpError) -> bool:
    """The operator reads one line and learns the next step."""
    return str(error).isprintable() and bool(error.hint)


def test_an_absent_directory_is_made(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "a" / "state")
    assert state.path.stat().st_mode & 0o777 == 0o700
    assert json.loads(state.format.read_text()) == {"format": "cdp-state", "version": VERSION}
    for directory in (state.bases, state.timelines, state.nbd, state.run):
        assert directory.is_dir()


def test_an_empty_directory_becomes_ours(short_path: Path) -> None:
    (short_path / "lost+found").mkdir()
    (short_path / ".tmp-format-17").write_bytes(b"a crash before the first file")
    short_path.chmod(0o755)
    StateDir.create_or_open(short_path)
    assert short_path.stat().st_mode & 0o777 == 0o700


def test_ours_is_opened_again_and_completed(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    state.run.rmdir()
    assert StateDir.create_or_open(short_path / "s") == state == StateDir.open(short_path / "s")
    assert state.run.is_dir()


def test_the_layout_is_that_of_the_format(short_path: Path) -> None:
    state = StateDir(short_path)
    names = {
        "format": state.format,
        "server.lock": state.server_lock,
        "clock.json": state.clock,
        "catalog": state.catalog,
        "catalog.json": state.catalog_copy,
        "events.jsonl": state.events,
        "bases": state.bases,
        "api.sock": state.api_socket,
        "target.sock": state.target_socket,
        "export.sock": state.export_socket,
        "nbd": state.nbd,
        "run": state.run,
        "timelines": state.timelines,
        "timelines/t7": state.timeline("t7"),
    }
    assert names == {name: short_path / name for name in names}


@pytest.mark.parametrize(
    "bad", ["", "t", "t0", "t01", "7", "t-1", "../t1", "t1/..", "t1\0", "t٣", "t" + "1" * 30, "T1"]
)
def test_what_is_no_timeline_id_never_becomes_a_path(short_path: Path, bad: str) -> None:
    with pytest.raises(UsageError):
        StateDir(short_path).timeline(bad)
    with pytest.raises(UsageError):
        check_timeline_id(bad)


def test_what_is_not_ours_is_left_alone(short_path: Path) -> None:
    (short_path / "photo.jpg").write_bytes(b"x")
    mode = short_path.stat().st_mode
    with pytest.raises(RefusedError, match="not empty") as caught:
        StateDir.create_or_open(short_path)
    assert refused(caught.value)
    assert os.listdir(short_path) == ["photo.jpg"]
    assert short_path.stat().st_mode == mode
    with pytest.raises(RefusedError, match="not a state directory"):
        StateDir.open(short_path)


def test_a_file_is_no_directory(short_path: Path) -> None:
    (short_path / "f").write_bytes(b"")
    for make in (StateDir.create_or_open, StateDir.open):
        with pytest.raises(UsageError, match="not a directory") as caught:
            make(short_path / "f")
        assert refused(caught.value)
        with pytest.raises(CdpError) as caught_below:
            make(short_path / "f" / "below")
        assert refused(caught_below.value)


def test_where_nothing_can_be_written_is_refused() -> None:
    # /proc takes no new directory from anybody, root included.
    with pytest.raises(RefusedError, match="cannot use state directory") as caught:
        StateDir.create_or_open("/proc/cdpserver")
    assert refused(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'{{"format": "cdp-state", "version": {VERSION + 1}}}', f"version {VERSION + 1}"),
        ('{"format": "cdp-state", "version": 0}', "not ours"),
        ('{"format": "cdp-state", "version": true}', "not ours"),
        ('{"format": "cdp-state"}', "not ours"),
        ('{"format": "other", "version": 1}', "not ours"),
    ],
)
def test_another_format_is_refused(short_path: Path, content: str, message: str) -> None:
    (short_path / "format").write_text(content)
    for make in (StateDir.create_or_open, StateDir.open):
        with pytest.raises(RefusedError, match=message) as caught:
            make(short_path)
        assert refused(caught.value)
    assert os.listdir(short_path) == ["format"]


def test_a_damaged_format_is_corrupt(short_path: Path) -> None:
    (short_path / "format").write_bytes(b"\0\0\0")
    with pytest.raises(CorruptError):
        StateDir.create_or_open(short_path)


def test_sockets_must_fit(short_path: Path) -> None:
    room = SOCKET_PATH_LENGTH - 1 - len(LONGEST_SOCKET) - len(os.fsencode(short_path)) - 1
    StateDir.create_or_open(short_path / ("x" * room))
    with pytest.raises(UsageError, match="too long") as caught:
        StateDir.create_or_open(short_path / ("y" * (room + 1)))
    assert refused(caught.value)
    assert os.listdir(short_path) == ["x" * room]


@pytest.mark.parametrize("bad", ["", "a\0b", "\ud800"])
def test_what_is_no_path_is_refused(bad: str) -> None:
    for make in (StateDir.create_or_open, StateDir.open, default_state_dir):
        with pytest.raises(UsageError):
            make(bad)


def test_a_reader_needs_one_that_exists(short_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        StateDir.open(short_path / "none")
    assert refused(caught.value)
    assert os.listdir(short_path) == []
    with pytest.raises(CdpError):
        StateDir.open("x" * 5000)


# An audit hook sees every file opened for writing and every change of a directory, for root too.
READ_ONLY = """
import os, sys
def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise SystemExit(f"opened for writing: {args}")
    changes = "mkdir rename remove rmdir chmod truncate link symlink"
    if event.startswith("os.") and event[3:] in changes.split():
        raise SystemExit(f"changed: {event} {args}")
from cdpserver.state import StateDir
sys.dont_write_bytecode = True
sys.addaudithook(watch)
print(StateDir.open(sys.argv[1]).path)
"""


def test_opening_for_reading_writes_nothing(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    command = [sys.executable, "-c", READ_ONLY, str(state.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert (done.stderr, done.stdout) == ("", f"{state.path}\n")


def test_there_is_one_service(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    with state.lock():
        with pytest.raises(RefusedError, match=f"another cdpserver runs \\(pid {os.getpid()}\\)") as caught:
            state.lock()
        assert refused(caught.value)
    lock = state.lock()
    lock.close()
    lock.close()
    state.lock().close()


def test_a_child_does_not_inherit_the_lock(short_path: Path) -> None:
    state = StateDir.create_or_open(short_path / "s")
    lock = state.lock()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
        lock.close()
        state.lock().close()
        child.communicate(b"")


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CDP_STATE_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_state_dir(None) == Path("/var/lib/cdpserver")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/invalid")
    assert default_state_dir(None) == tmp_path / ".local/state/cdpserver"
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert default_state_dir(None) == Path("/xdg/cdpserver")
    monkeypatch.setenv("CDP_STATE_DIR", "")
    assert default_state_dir(None) == Path("/xdg/cdpserver")
    monkeypatch.setenv("CDP_STATE_DIR", "/env")
    assert default_state_dir(None) == Path("/env")
    assert default_state_dir("opt") == Path.cwd() / "opt"
