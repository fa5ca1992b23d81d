"""What could have been lost, and when: the record, and what the service puts on it while a target is stopped and killed."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cdpserver.journal.control import Grade
from cdpserver.rpo import (
    HEADER,
    MINUTE_NS,
    NAME,
    SAMPLE,
    SECOND_NS,
    SECONDS,
    Record,
    Sample,
    pack,
    unpack,
    worst,
)
from tests.test_service import Server, UnixConnection, connected, pattern, until

START_NS = 1_800_000_000 * SECOND_NS


def sample(second: float, **more: object) -> Sample:
    fields: dict[str, object] = {
        "lag_ns": 0, "durable_lag_ns": 5, "received_seq": 9, "durable_seq": 8, "write_ns": 7,
        "grade": Grade.CRASH, "resync": False,
    }  # fmt: skip
    return Sample(START_NS + int(second * SECOND_NS), **{**fields, **more})  # type: ignore[arg-type]


def test_a_sample_is_read_as_it_was_written() -> None:
    dice = random.Random(1)
    for _ in range(200):
        one = sample(
            dice.randrange(1 << 30), lag_ns=dice.randrange(1 << 60), grade=dice.choice(list(Grade)),
            durable_lag_ns=dice.choice((None, dice.randrange(1 << 60))), resync=dice.random() < 0.5,
        )  # fmt: skip
        raw = pack(one)
        assert len(raw) == SAMPLE.size and unpack(raw, span_ns=SECOND_NS) == one
        place = dice.randrange(60)  # what follows the check is padding
        torn = raw[:place] + bytes([raw[place] ^ (1 << dice.randrange(8))]) + raw[place + 1 :]
        assert unpack(torn, span_ns=SECOND_NS) is None
    assert unpack(bytes(SAMPLE.size), span_ns=SECOND_NS) is None


def test_what_is_older_than_an_hour_is_by_minute(tmp_path: Path) -> None:
    """The worst of a minute is kept; places are used again, and a torn sample is none."""
    record = Record(tmp_path)
    assert record.samples(since_ns=0, until_ns=START_NS) == [] and record.at(START_NS) is None
    for second in range(0, 2 * SECONDS, 10):
        record.add(
            sample(second, durable_lag_ns=second, grade=Grade.UNORDERED if second == 130 else Grade.CRASH)
        )
    found = record.samples(since_ns=0, until_ns=START_NS + 2 * SECONDS * SECOND_NS)
    assert [one.time_ns for one in found] == sorted(one.time_ns for one in found)
    by_second = [one for one in found if one.span_ns == SECOND_NS]
    by_minute = [one for one in found if one.span_ns == MINUTE_NS]
    assert len(by_second) == 360 and len(by_minute) == 60
    assert (by_minute[2].grade, by_minute[3].grade) == (Grade.UNORDERED, Grade.CRASH)
    assert by_minute[2].durable_lag_ns == 170
    at = record.at(START_NS + 135 * SECOND_NS)
    assert at is not None and at.span_ns == MINUTE_NS and at.rpo_ns == 170
    at = record.at(START_NS + (2 * SECONDS - 10) * SECOND_NS)
    assert at is not None and at.span_ns == SECOND_NS
    assert (tmp_path / NAME).stat().st_size <= HEADER.size + (SECONDS + 10080) * SAMPLE.size
    with (tmp_path / NAME).open("r+b") as file:
        file.seek(HEADER.size + ((START_NS // SECOND_NS + 2 * SECONDS - 10) % SECONDS) * SAMPLE.size)
        file.write(b"torn")
    assert len(record.samples(since_ns=by_second[0].time_ns, until_ns=by_second[-1].time_ns)) == 359
    (tmp_path / NAME).write_bytes(b"nothing of ours")
    assert record.samples(since_ns=0, until_ns=START_NS) == []


def test_a_second_that_is_not_known_makes_its_minute_unknown() -> None:
    assert worst(sample(1), sample(2, durable_lag_ns=None)).rpo_ns is None
    assert worst(sample(1, lag_ns=50), sample(2)).rpo_ns == 50


@pytest.mark.real
def test_what_could_have_been_lost_is_on_record(short_path: Path) -> None:
    """In sync next to nothing; with a stopped target it is not known; after a restart it still says so."""
    with Server(short_path / "s") as server:
        uri = server.add("a", vm="web")
        with connected(uri) as client:
            client.pwrite(pattern(1), 0)
            server.synced("web/a", write_blocking=True)

            def recorded(known: bool) -> dict[str, Any] | None:
                """A second that is over, in which it was known or not what could be lost."""
                if known:
                    for number in range(32):
                        client.pwrite(pattern(number), 0)
                for row in server.get("/v1/rpo/web?limit=3")[:-1]:
                    if (row["rpo_ns"] is not None) == known and not row["resync"]:
                        return dict(row)
                return None

            row = until(lambda: recorded(True), "second on record")
            assert row["disk"] == "web/a" and row["rpo_ns"] < 30 * SECOND_NS and row["grade"] == "crash"
            assert 0 < row["durable_seq"] <= row["received_seq"]

            def timed() -> object:
                recorded(True)
                (disk,) = server.get("/v1/overview")["disks"]
                assert {"state", "grade", "lag_ns", "rpo_ns", "resync"} <= disk.keys()
                return disk["write_ns"]

            until(timed, "write latency")

            target = server.pids()["target-0"]
            os.kill(target, signal.SIGSTOP)
            try:
                gone = until(lambda: recorded(False), "second that is not known")
            finally:
                os.kill(target, signal.SIGCONT)
            connection = UnixConnection(server.state_dir / "api.sock")
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            text = answer.read().decode()
            connection.close()
            assert answer.status == 200 and "cdp_disk_lag_seconds" in text
        server.kill()
    with Server(short_path / "s") as server:
        asked = ("rpo", "web/a", "--at", str(gone["time"]), "--json")
        done = subprocess.run(
            [sys.executable, "-m", "recovery.cli", "--state-dir", str(server.state_dir), *asked],
            capture_output=True,
            text=True,
            check=True,
        )
        (then,) = json.loads(done.stdout)
        assert then["time_ns"] == gone["time_ns"] and then["rpo_ns"] is None
