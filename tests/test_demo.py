"""The demo: run whole with little work, interrupted, and its parts that need no QEMU."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from tools.kit.processes import FailedError, start, stop, until, why_no_mount
from tools.kit.qmp import Qmp, QmpError
from tools.kit.source import nbd_server
from tools.story.report import Report

ROOT = Path(__file__).resolve().parent.parent
DEMO = [sys.executable, "-m", "tools.demo", "--size", "64M", "--seconds", "0.5"]
COMPARISONS = 12

COUNT = re.compile(r"(\d+) of (\d+) comparisons are as they must be")


def left_behind(directory: Path) -> list[str]:
    """Files, mounts and loop devices that a demo in `directory` did not take away."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    loops = [
        path.read_text().strip()
        for path in Path("/sys/block").glob("loop*/loop/backing_file")
        if path.exists()
    ]
    return [*os.listdir(directory), *(line for line in (*mounts, *loops) if str(directory) in line)]


# --- the whole


@pytest.mark.e2e
@pytest.mark.parametrize("mode", [[], ["--no-mount"]], ids=["mounted", "qemu-io"])
def test_the_demo_compares_everything_and_leaves_nothing_behind(mode: list[str], short_path: Path) -> None:
    if not mode and (reason := why_no_mount()):
        pytest.skip(f"nothing can be mounted: {reason}")
    done = subprocess.run(
        [*DEMO, *mode, "--directory", str(short_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert COUNT.findall(done.stdout) == [(str(COMPARISONS), str(COMPARISONS))]
    assert "Every instant came back bit-exact." in done.stdout
    assert "WRONG" not in done.stdout
    assert left_behind(short_path) == []


@pytest.mark.e2e
def test_an_interrupted_demo_cleans_up(short_path: Path) -> None:
    log = short_path / "log"
    work = short_path / "w"
    work.mkdir()
    process = start([*DEMO, "--seconds", "30", "--directory", work], log)
    try:
        until(lambda: process.poll() is not None or "The guest works" in log.read_text(), "start of the work")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1, log.read_text()
    finally:
        stop(process)
    said = log.read_text()
    assert "FAILED: ended by SIGINT" in said
    assert "Traceback" not in said
    assert left_behind(work) == []


def test_a_disk_that_is_too_small_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--size", "1M"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "at least 64M" in done.stderr


# --- the report


def report() -> tuple[Report, Console]:
    console = Console(width=130, record=True, file=io.StringIO())
    return Report(console), console


def test_a_report_is_good_only_when_everything_compared_as_it_must() -> None:
    told, _ = report()
    assert not told.good, "nothing was compared"
    told.compare("a point", "its copy", "cmp", lambda: True)
    told.compare("now", "its copy", "control", lambda: False, differ=True)
    assert told.good
    told.compare("another point", "its copy", "cmp", lambda: False)
    assert not told.good


def test_a_control_that_is_equal_is_wrong() -> None:
    told, console = report()
    told.compare("now", "the copy", "control", lambda: True, differ=True)
    assert not told.good
    told.summary("")
    text = console.export_text()
    assert "WRONG: now and the copy are equal" in text
    assert "0 of 1 comparisons" in text
    assert "FAILED: not everything was equal." in text


def test_a_failure_is_told_however_good_the_comparisons_are() -> None:
    told, console = report()
    told.compare("a point", "its copy", "cmp", lambda: True)
    told.summary("the mirror [ended]")
    assert "FAILED: the mirror [ended]" in console.export_text()


# --- QMP


class Monitor:
    """The other side of a QMP connection, with its lines prepared."""

    def __init__(self, path: Path, *answers: list[dict[str, object]]) -> None:
        self.heard: list[dict[str, object]] = []
        self._answers: list[list[dict[str, object]]] = [[{"return": {}}], *answers]
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rwb") as lines:
            lines.write(b'{"QMP": {"version": {}}}\n')
            lines.flush()
            for answers in self._answers:
                self.heard.append(json.loads(lines.readline()))
                lines.writelines(json.dumps(answer).encode() + b"\n" for answer in answers)
                lines.flush()

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()


def ready(device: str) -> dict[str, object]:
    return {"event": "BLOCK_JOB_READY", "data": {"device": device}}


def test_qmp_keeps_the_events_that_come_before_an_answer(short_path: Path) -> None:
    monitor = Monitor(short_path / "qmp", [ready("a"), ready("b"), {"return": 7}])
    with Qmp(short_path / "qmp") as qmp:
        assert qmp.call("block-job-cancel", device="a", auto_dismiss=True) == 7
        assert qmp.wait("BLOCK_JOB_READY", lambda data: data["device"] == "b") == {"device": "b"}
        assert qmp.wait("BLOCK_JOB_READY") == {"device": "a"}
    monitor.close()
    assert monitor.heard[1] == {
        "execute": "block-job-cancel",
        "arguments": {"device": "a", "auto-dismiss": True},
    }


def test_qmp_tells_what_qemu_refuses_and_that_it_is_gone(short_path: Path) -> None:
    monitor = Monitor(short_path / "qmp", [{"error": {"class": "GenericError", "desc": "no such node"}}])
    with Qmp(short_path / "qmp") as qmp:
        with pytest.raises(QmpError, match="blockdev-del: no such node"):
            qmp.call("blockdev-del", node_name="x")
        with pytest.raises((QmpError, OSError)):
            qmp.call("query-block-jobs")
    monitor.close()


def test_the_parts_of_a_uri_are_what_blockdev_add_wants() -> None:
    server, export = nbd_server("nbd+unix:///vm1/disk0?socket=/run/x/nbd/t1.sock")
    assert (server, export) == ({"type": "unix", "path": "/run/x/nbd/t1.sock"}, "vm1/disk0")


def test_until_names_what_did_not_come() -> None:
    with pytest.raises(FailedError, match="no miracle within 0 s"):
        until(lambda: None, "miracle", seconds=0)
