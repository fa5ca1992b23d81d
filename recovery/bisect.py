"""`cdp bisect`: the last good point, by a script of the operator's that is run on forks.

The script runs as whoever calls this. Each probe's forks belong to this process: the service takes them away when it gives them
back, or ends in whatever way. What was found so far is in a log, one JSON object a line, so that the same command goes on.
"""

import hashlib
import json
import os
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver import durable, names
from cdpserver.errors import BrokenError, CorruptError, NotFoundError, UsageError
from cdpserver.state import StateDir, default_state_dir
from recovery.attached import backups_of, point_of
from recovery.client import Client
from recovery.output import answer_fields, answer_json, say
from recovery.remote import client
from recovery.search import Found, Verdict, next_question
from recovery.unfinished import state_home

SKIP = 125
"""As git bisect has it: this point cannot be judged."""

LEAST_ABORT = 128
"""From here on a shell reports signals: the script was not meant to end so."""


@dataclass(frozen=True, slots=True)
class _Point:
    """One of those that are searched: DISK@seq:N or VM@TIME, and its time."""

    name: str
    time: str


class _Log:
    """What is known of one question, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: list[_Point] = []
        self.verdicts: dict[int, Verdict] = {}

    def read(self) -> bool:
        """What an interrupted search has found; False if there is none. CorruptError."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return False
        # A line that was not ended is of a probe that counts for nothing.
        lines = text[: text.rfind("\n") + 1].splitlines()
        try:
            first, *rest = (json.loads(line) for line in lines)
            self.points = [_Point(str(name), str(time)) for name, time in first["points"]]
            self.verdicts = {int(one["number"]): _verdict(one["verdict"]) for one in rest}
        except (ValueError, KeyError, TypeError):
            raise CorruptError(f"{self.path} is no log of a bisect", hint="begin anew: add --again") from None
        return True

    def begin(self, points: list[_Point]) -> None:
        """Note what is searched."""
        self.points, self.verdicts = points, {}
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = {"points": [[point.name, point.time] for point in points]}
        durable.write_whole(self.path, json.dumps(held).encode() + b"\n")

    def add(self, number: int, verdict: Verdict) -> None:
        """Note what one point is."""
        self.verdicts[number] = verdict
        line = {"number": number, "point": self.points[number].name, "verdict": verdict}
        with self.path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _verdict(word: object) -> Verdict:
    match word:
        case "good" | "bad" | "skip":
            return word
    raise ValueError(f"not a verdict: {word!r}")


def bisect(options: Namespace) -> None:
    """Ask until the last good and the first bad point are next to each other."""
    service = client(options)
    script = os.path.abspath(options.script)
    if not os.access(script, os.X_OK) or not os.path.isfile(script):
        raise UsageError(f"{names.show(options.script)} cannot be run", hint="name an executable file")
    log = _Log(_log_path(options, script))
    if not options.again and log.read():
        say(f"going on after {len(log.verdicts)} probes: {log.path}")
    else:
        log.begin(_points(service, options))
    while not isinstance(found := next_question(len(log.points), log.verdicts), Found):
        point = log.points[found]
        verdict = _probe(service, options, point, script)
        log.add(found, verdict)
        say(f"{point.name} ({point.time}) {'cannot be judged' if verdict == 'skip' else f'is {verdict}'}")
    _answer(options, log, found)
    log.path.unlink()


def _log_path(options: Namespace, script: str) -> Path:
    """One for each question, so that the same command finds it again."""
    if options.log is not None:
        return Path(options.log)
    state = StateDir(default_state_dir(options.state_dir)).path
    question = json.dumps([str(state), options.name, options.good, options.bad, script, options.force])
    return state_home() / "bisects" / f"{hashlib.sha256(question.encode()).hexdigest()}.jsonl"


# -- what is searched ----------------------------------------------------------------------------------------


def _points(service: Client, options: Namespace) -> list[_Point]:
    """The points from the good one to the bad one. UsageError unless one is before the other."""
    if options.good.startswith(names.BACKUP) or options.bad.startswith(names.BACKUP):
        points = _of_backups(service, options)
    else:
        try:
            service.disk(options.name)
        except NotFoundError:
            points = _of_vm(service, options)
        else:
            points = _of_disk(service, options)
    say(f"{len(points)} points: about {max(len(points) - 2, 0).bit_length()} probes")
    return points


def _of_backups(service: Client, options: Namespace) -> list[_Point]:
    """Backups of the disk or VM, in the repository that is named, else in those that the service knows or that were used here."""
    texts = (options.good, options.bad)
    if not all(text.startswith(names.BACKUP) for text in texts):
        raise UsageError("one of them is a backup, the other is not", hint="write backup:ID for both")
    both = [names.parse_backup(text)[0] for text in texts]
    held = backups_of(service, options, options.name, both)
    places = []
    for text, wanted in zip(texts, both, strict=True):
        found = [n for n, one in enumerate(held) if wanted == "latest" or one["id"].startswith(wanted)]
        if not found or (len(found) > 1 and wanted != "latest"):
            raise NotFoundError(
                f"{len(found)} backups of {options.name} are {names.show(text)}",
                hint="cdp backup list shows them; their repository must be known: cdp repo add",
            )
        places.append(found[-1])
    good, bad = places
    _check_order(options, good, bad)
    searched = [
        one
        for number, one in enumerate(held[good : bad + 1], start=good)
        if number in places or options.force or one["grade"] != "unordered"
    ]
    disk = "" if searched[0]["name"].partition("@")[0] == options.name else f"/{options.name}"
    return [_Point(f"{names.BACKUP}{one['id']}{disk}", one["time"]) for one in searched]


def _of_disk(service: Client, options: Namespace) -> list[_Point]:
    name = options.name
    good, bad = (service.place(f"{name}@{when}") for when in (options.good, options.bad))
    _check_order(options, good["seq"], bad["seq"])
    held = service.points(name, since=options.good, until=options.bad, kind="rp", limit=None)
    rows = [good, *(row for row in held if _is_searched(row, options, good["seq"], bad["seq"])), bad]
    return [_Point(f"{name}@seq:{row['seq']}", names.format_time(row["time_ns"])) for row in rows]


def _is_searched(row: dict[str, Any], options: Namespace, good: int, bad: int) -> bool:
    return bool(good < row["seq"] < bad and (options.force or row["grade"] != "unordered"))


def _of_vm(service: Client, options: Namespace) -> list[_Point]:
    now_ns = int(service.status()["time_ns"])
    good, bad = (_time_ns(text, now_ns) for text in (options.good, options.bad))
    _check_order(options, good, bad)
    held = service.vm_points(
        options.name, since=names.format_time(good), until=names.format_time(bad), limit=None
    )
    times = sorted({good, *(row["time_ns"] for row in held if good < row["time_ns"] < bad), bad})
    return [_Point(f"{options.name}@{text}", text) for text in map(names.format_time, times)]


def _time_ns(text: str, now_ns: int) -> int:
    match names.parse_when(text):
        case names.At(time_ns):
            return time_ns
        case names.Ago(delta_ns):
            return now_ns - delta_ns
        case names.Latest():
            return now_ns
    raise UsageError(
        f"{names.show(text)} is an instant of one disk", hint="for a VM write a time or how long ago: -10m"
    )


def _check_order(options: Namespace, good: int, bad: int) -> None:
    if good >= bad:
        raise UsageError(
            f"--good {options.good} is not before --bad {options.bad}",
            hint="the good one comes first: what is searched is when it went bad",
        )


# -- asking --------------------------------------------------------------------------------------------------


def _probe(service: Client, options: Namespace, point: _Point, script: str) -> Verdict:
    """What the script says of one point."""
    name = point.name
    if name.startswith(names.BACKUP):
        name = point_of(service, options, name)
    lent = service.lend(name, force=options.force)
    try:
        status = subprocess.run([script], env=os.environ | _environment(point, lent), check=False).returncode
    finally:
        service.give_back(lent["id"])
    if status < 0 or status >= LEAST_ABORT:
        raise BrokenError(
            f"{script} was ended at {point.name}: status {status}",
            hint="what was found so far is kept: the same command goes on",
        )
    return "good" if status == 0 else "skip" if status == SKIP else "bad"


def _environment(point: _Point, lent: dict[str, Any]) -> dict[str, str]:
    disks = lent["disks"]
    short = (disk["point"].partition("@")[0].rpartition("/")[2] for disk in disks)
    return {
        "CDP_POINT": point.name,
        "CDP_TIME": point.time,
        "CDP_DISKS": " ".join(short),
        "CDP_URI": disks[0]["uri"],
        **{f"CDP_URI_{number}": disk["uri"] for number, disk in enumerate(disks, start=1)},
    }


def _answer(options: Namespace, log: _Log, found: Found) -> None:
    good, bad = log.points[found.good], log.points[found.bad]
    value = {
        "good": good.name,
        "good_time": good.time,
        "bad": bad.name,
        "bad_time": bad.time,
        "skipped": found.bad - found.good - 1,
        "probes": len(log.verdicts),
        "points": len(log.points),
    }
    if options.json:
        answer_json(value)
    else:
        answer_fields(value)
