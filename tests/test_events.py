"""Events: one line each, whoever writes; rotated once; never in the way of the work."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cdpserver import events
from cdpserver.events import EventLog, configure, previous_file, read_events
from cdpserver.names import parse_time


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    configure("test")
    return EventLog(tmp_path / "events.jsonl")


def names(path: Path, limit: int = 100) -> list[str]:
    return [event["event"] for event in read_events(path, limit)]


def test_an_event_is_logged_and_kept(
    tmp_path: Path, log: EventLog, capsys: pytest.CaptureFixture[str]
) -> None:
    log.emit("target.unknown-export", level="warning", export="a\n\udc80", client=7)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert list(json.loads(line))[:4] == ["time", "level", "process", "event"]
    kept = read_events(tmp_path / "events.jsonl", 1)[0]
    for event in (json.loads(line), kept):
        assert parse_time(event.pop("time")) > 0
        assert event == {
            "level": "warning",
            "process": "test",
            "event": "target.unknown-export",
            "export": "a\n\udc80",
            "client": 7,
        }


def test_the_newest_events_come_oldest_first(tmp_path: Path, log: EventLog) -> None:
    for n in range(5):
        log.emit(f"test.event-{n}")
    path = tmp_path / "events.jsonl"
    assert names(path, 2) == ["test.event-3", "test.event-4"]
    assert names(path, 0) == []
    assert len(names(path)) == 5
    assert read_events(tmp_path / "none", 5) == []


def test_a_full_file_is_rotated_and_still_read(
    tmp_path: Path, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    monkeypatch.setattr(events, "EVENT_FILE_BYTES", 1000)
    for n in range(45):
        log.emit(f"test.event-{n}")
        assert not path.exists() or path.stat().st_size <= 1000
    assert sorted(os.listdir(tmp_path)) == ["events.1.jsonl", "events.jsonl"]
    assert previous_file(path).stat().st_size < 1200
    kept = names(path)
    assert kept == [f"test.event-{n}" for n in range(45 - len(kept), 45)]
    assert len(kept) > len(path.read_bytes().splitlines())


def test_a_file_that_another_process_rotated_is_not_rotated_again(tmp_path: Path, log: EventLog) -> None:
    path = tmp_path / "events.jsonl"
    log.emit("test.old")
    with open(path, "ab") as mine:
        os.rename(path, previous_file(path))
        log._rotate(mine.fileno())
        assert not path.exists()
        log.emit("test.new")
        log._rotate(mine.fileno())
    assert names(path) == ["test.old", "test.new"]
    assert path.exists()


WRITER = """
import sys
from pathlib import Path
from cdpserver import events
events.EVENT_FILE_BYTES = int(sys.argv[3])
log = events.EventLog(Path(sys.argv[1]))
events.configure(sys.argv[2])
for n in range(200):
    log.emit("test.line", n=n, filling="x" * (n % 97))
"""


def test_several_processes_lose_and_mix_no_line(tmp_path: Path) -> None:
    """The limit lets them rotate exactly once, so that all lines are in the two files."""
    path = tmp_path / "events.jsonl"
    root = Path(__file__).parents[1]
    commands = [[sys.executable, "-c", WRITER, str(path), f"p{n}", "100000"] for n in range(4)]
    writers = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE) for command in commands]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert previous_file(path).exists()
    kept = read_events(path, 10_000)
    lines = path.read_bytes().splitlines() + previous_file(path).read_bytes().splitlines()
    assert len(kept) == len([line for line in lines if line]) == 800
    for process in ("p0", "p1", "p2", "p3"):
        numbers = [event["n"] for event in kept if event["process"] == process]
        assert numbers == list(range(200))


def test_damaged_lines_are_passed_over(tmp_path: Path, log: EventLog) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'\xff\n[1]\n{"event": "half')
    log.emit("test.after")
    assert names(path) == ["test.after"]


def test_a_huge_event_keeps_its_name(tmp_path: Path, log: EventLog) -> None:
    log.emit("test.huge", text="x" * events.EVENT_LINE_BYTES)
    kept = read_events(tmp_path / "events.jsonl", 1)[0]
    assert (kept["event"], kept["left_out"]) == ("test.huge", ["text"])


@pytest.mark.parametrize("short", [True, False])
def test_a_full_disk_is_logged_only(
    tmp_path: Path,
    log: EventLog,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    short: bool,
) -> None:
    real = os.write
    calls = 0

    def full(fd: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if short and calls == 1:
            return real(fd, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.emit("test.lost")
    logged = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert logged == ["test.lost", "events.file-failed"]
    log.emit("test.after")
    assert names(tmp_path / "events.jsonl") == ["test.after"]


def test_a_missing_directory_is_logged_only(tmp_path: Path, log: EventLog) -> None:
    EventLog(tmp_path / "none" / "events.jsonl").emit("test.lost")


def test_a_closed_stderr_stops_nothing(
    tmp_path: Path, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: Any = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    log.emit("test.kept")
    assert names(tmp_path / "events.jsonl") == ["test.kept"]


@pytest.mark.parametrize("bad", ["one", "A.b", "a b.c", ""])
def test_an_event_has_a_dotted_name(log: EventLog, bad: str) -> None:
    with pytest.raises(AssertionError):
        log.emit(bad)
