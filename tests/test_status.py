"""`cdp status`: the screen at every width, and the command against a real service, one that hangs, and none."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpserver.service.overview import warnings
from recovery.screen import screen, span
from tests.core import ROOT, SECOND_NS, START_NS
from tests.test_service import Server, pattern, until, write
from tools.kit.processes import within

DISK: dict[str, Any] = {
    "name": "web/vda",
    "id": "t1",
    "state": "synced",
    "size": 64 << 20,
    "clients": 1,
    "broken": "",
    "grade": "crash",
    "mirror": None,
    "lag_ns": 0,
    "rpo_ns": 340_000_000,
    "write_ns": 21_000,
    "durable_lag_ns": 340_000_000,
    "tail_records": 12_345,
    "index_lag_ns": 2_100_000_000,
    "last_base_point": {"number": 7, "time_ns": START_NS - 134 * SECOND_NS},
    "scrub": {"under_way": False, "ended_ns": START_NS - 3600 * SECOND_NS, "bytes": 1 << 30, "damaged": 0},
    "counts": None,
}
FOUND: dict[str, Any] = {
    "version": "0.1.0",
    "state_dir": "/srv/cdp",
    "pid": 10,
    "time_ns": START_NS,
    "clock_ahead_ns": 250_000_000,
    "drills": [],
    "backups": [],
    "started_ns": START_NS - 7384 * SECOND_NS,
    "children": {
        "target-0": {"pid": 11, "starts": 1},
        "export": {"pid": 12, "starts": 3},
        "indexer": {"pid": 13, "starts": 2},
    },
    "targets": {"target-0": True},
    "store": {"size_bytes": 100 << 30, "free_bytes": 75 << 30},
    "events": [],
    "last_error": None,
    "disks": [
        DISK,
        DISK
        | {
            "name": "web/vdb",
            "state": "damaged",
            "size": None,
            "grade": None,
            "rpo_ns": None,
            "last_base_point": None,
            "error": "t2 is gone",
        },
    ],
    "warnings": ["web/vdb is damaged: t2 is gone (cdp check web/vdb)"],
}

WIDE = """\
! web/vdb is damaged: t2 is gone (cdp check web/vdb)
cdpserver 0.1.0 | up 2h3m | pid 10 | /srv/cdp
target-0 pid 11 | export pid 12, 2 restarts | indexer pid 13, 1 restart
store 25% used | 75.0G free of 100.0G

disk     state    grade  size    rpo  lag  durable lag    tail  index lag  base point  clients
web/vda  synced   crash   64M  340ms    0        340ms  12,345       2.1s  bp:7 2m14s        1
web/vdb  damaged  -         -      ?    0        340ms  12,345       2.1s           -        1
"""


def text(found: dict[str, Any], **size: int) -> str:
    return "".join(f"{line.text}\n" for line in screen(found, **size))


def test_the_screen() -> None:
    assert text(FOUND) == WIDE == text(FOUND, width=94, height=24)
    (head,) = (line for line in text(FOUND, width=80).splitlines() if line.startswith("disk"))
    assert head.split() == [
        "disk",
        "state",
        "grade",
        "rpo",
        "lag",
        "durable",
        "lag",
        "tail",
        "index",
        "lag",
        "base",
        "point",
    ]


def test_a_narrow_terminal_loses_columns_and_no_warning() -> None:
    for width in range(20, 100):
        shown = text(FOUND, width=width)
        assert max(map(len, shown.splitlines())) <= width
        assert "".join(shown.split()).startswith("!web/vdbisdamaged:t2isgone(cdpcheckweb/vdb)cdpserver0.1.0")
        assert "disk" in shown and "state" in shown
    assert "lag" in text(FOUND, width=30) and "clients" not in text(FOUND, width=60)
    # Narrower than anything can be shown.
    assert text(FOUND, width=1) == text(FOUND, width=20)


def test_a_low_terminal_says_what_is_left_out() -> None:
    many = FOUND | {"disks": [DISK | {"name": f"d{number}"} for number in range(100)]}
    shown = text(many, width=80, height=24).splitlines()
    assert len(shown) == 24
    assert shown[-1] == "... and 83 more disks: cdp status" and shown[-2].startswith("d16 ")
    assert len(text(many, width=80, height=3).splitlines()) == 7
    assert len(text(many).splitlines()) == 106


def test_long_and_hostile_names() -> None:
    long = FOUND | {"disks": [DISK | {"name": "n" * 129}, DISK | {"name": "\x1b[2J"}]}
    shown = text(long, width=40)
    assert "\x1b" not in shown and "\\x1b[2J" in shown
    assert max(map(len, shown.splitlines())) <= 40


def test_nothing_to_show() -> None:
    assert "no disks; add one: cdp disk add" in text(FOUND | {"disks": []})
    down = FOUND | {
        "children": {"target-0": {"pid": None, "starts": 0}},
        "store": {"size_bytes": 0, "free_bytes": 0},
    }
    assert "target-0 down\nstore - used" in text(down)
    failed = FOUND | {"last_error": {"time": "T", "event": "target.broken"}}
    assert "last error: T target.broken (events.jsonl)" in text(failed)


def test_spans() -> None:
    seconds = (0.0005, 0.34, 2.14, 59.9, 134, 7384, 90_061)
    assert [span(int(s * 1e9)) for s in seconds] == [
        "<1ms",
        "340ms",
        "2.1s",
        "59.9s",
        "2m14s",
        "2h3m",
        "1d1h",
    ]
    assert span(0) == span(-5) == "0" and span(None) == "?"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"targets": {"target-0": False}}, ["target-0 does not answer"]),
        ({"children": {"indexer": {"pid": None, "starts": 9}}}, ["process indexer is not running"]),
        ({"store": {"size_bytes": 100, "free_bytes": 9}}, ["the store has 9B left of 100B"]),
        ({"disks": [DISK | {"broken": "EIO"}]}, ["web/vda takes no writes: EIO"]),
        ({"disks": [DISK | {"tail_records": 300_000}]}, ["web/vda: the index is 300,000 records behind"]),
        ({"disks": [DISK | {"state": "unordered"}]}, ["web/vda is not in sync"]),
        ({"disks": [DISK | {"state": "unordered", "clients": 0}]}, []),
        ({"disks": [DISK | {"mirror": {"state": "synced", "reason": ""}}]}, []),
        (
            {
                "disks": [
                    DISK | {"state": "unordered", "mirror": {"state": "waiting", "reason": "QEMU is gone"}}
                ]
            },
            ["web/vda is not protected now: QEMU is gone (cdp event list --level warning)"],
        ),
        (
            {"disks": [DISK | {"state": "first-copy", "mirror": {"state": "copying", "reason": ""}}]},
            ["web/vda is not protected now: its mirror is copying"],
        ),
        (
            {"disks": [DISK | {"state": "damaged", "error": "no"}]},
            ["web/vda is damaged: no (cdp check web/vda)"],
        ),
    ],
)
def test_warnings(change: dict[str, Any], said: list[str]) -> None:
    found = warnings(FOUND | {"disks": [DISK]} | change)
    assert len(found) == len(said)
    for warning, beginning in zip(found, said, strict=True):
        assert warning.startswith(beginning)


# --- against a service


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="cdp-") as path, Server(Path(path) / "s") as made:
        uri = made.add("web")
        write(uri, pattern(1))
        made.synced("web", write_blocking=True)
        made.add("empty")
        yield made


def command(state_dir: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "recovery.cli", "--state-dir", str(state_dir), "status", *arguments]


def cdp(state_dir: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(state_dir, *arguments), cwd=ROOT, text=True, capture_output=True, check=False, timeout=60
    )


@pytest.mark.real
def test_one_look(server: Server) -> None:
    done = cdp(server.state_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cdpserver 0." in done.stdout and "bp:0" in done.stdout
    found = json.loads(cdp(server.state_dir, "--json").stdout)
    disks = {disk["name"]: disk for disk in found["disks"]}
    assert (disks["empty"]["state"], disks["web"]["last_base_point"]["number"]) == ("empty", 0)
    assert disks["empty"]["lag_ns"] > 0
    assert found["look_s"] < 2 and found["targets"] == {"target-0": True}


@pytest.mark.real
def test_a_target_that_hangs_costs_its_own_figures(server: Server) -> None:
    pid = server.pids()["target-0"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with within(10, "the status"):
            done = cdp(server.state_dir)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 0
    assert done.stdout.startswith("! target-0 does not answer")
    web = next(line for line in done.stdout.splitlines() if line.startswith("web "))
    assert web.split()[3:5] != ["?", "?"] and web.split().count("?") == 3 and "bp:0" in web


@pytest.mark.real
def test_watching_in_a_pipe(server: Server) -> None:
    watch = subprocess.Popen(
        command(server.state_dir, "--json", "--watch", "0.1"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert watch.stdout is not None
    times = [json.loads(watch.stdout.readline())["time_ns"] for _ in range(3)]
    assert times == sorted(set(times))
    watch.send_signal(signal.SIGINT)
    watch.communicate(timeout=20)
    assert watch.returncode == 0


@pytest.mark.real
def test_watching_at_a_terminal(server: Server) -> None:
    """It fills the screen that there is, goes back to the old one at the end, and is not tired by a service that goes."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 44, 0, 0))
    watch = subprocess.Popen(
        command(server.state_dir, "--watch", "0.1"),
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    seen = b""
    with contextlib.suppress(OSError):
        while seen.count(b"store ") < 3:
            seen += os.read(leader, 65536)
    watch.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):
        while part := os.read(leader, 65536):
            seen += part
    os.close(leader)
    assert watch.wait(20) == 0, seen
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen
    assert b"disk" in seen and b"clients" not in seen


def test_no_service(tmp_path: Path) -> None:
    for arguments in ([], ["--json"]):
        done = cdp(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (6, "")
        assert f"start it: cdpserver --state-dir {tmp_path}" in done.stderr


@pytest.mark.parametrize("pause", ["0", "0.05", "-1", "1e3", "nan", "x", "999999"])
def test_a_pause_that_cannot_be_meant(tmp_path: Path, pause: str) -> None:
    done = cdp(tmp_path, f"--watch={pause}")
    assert done.returncode == 2 and "not a pause" in done.stderr


@pytest.mark.real
def test_watching_waits_for_a_service(short_path: Path) -> None:
    watch = subprocess.Popen(
        command(short_path / "s", "--watch", "0.1"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert watch.stdout is not None
    assert watch.stdout.readline().startswith("! cdpserver does not answer at ")
    with Server(short_path / "s"):
        lines = iter(watch.stdout.readline, "")
        until(lambda: next(lines).startswith("cdpserver 0."), "screen of the service that came")
    watch.send_signal(signal.SIGINT)
    watch.communicate(timeout=20)
    assert watch.returncode == 0
