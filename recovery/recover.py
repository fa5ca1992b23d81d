"""`cdp recover`: starting and watching recoveries of running VMs. The service does the work; this command may be killed."""

import os
import shlex
import sys
import time
from argparse import Namespace
from typing import Any

from cdpserver.errors import BrokenError, UsageError
from cdpserver.names import format_bytes
from cdpserver.names import show as shown
from recovery.bar import moving
from recovery.client import Client
from recovery.output import Column, answer_fields, answer_json, answer_table, say
from recovery.remote import client

COLUMNS = (
    Column("id"),
    Column("what"),
    Column("state"),
    Column("phase"),
    Column("copied_bytes", "copied", right=True),
    Column("total_bytes", "of", right=True),
    Column("created"),
    Column("reason"),
)

UNDER_WAY = ("running", "copying", "pivoting")

LOOK_S = 0.5
"""Between two looks at a recovery that is followed."""

LINE_S = 10.0
"""Between two lines about one in the same phase."""


def start(options: Namespace) -> None:
    """Begin; the URI in the answer is what the VM is started on."""
    # The service has another working directory, so paths are absolute.
    body: dict[str, Any] = {
        "point": options.point,
        "mode": options.mode,
        "shape": options.shape,
        "overwrite": options.overwrite,
        "protect": options.protect,
        "force": options.force,
        "isolated": options.isolated,
        **places(options.to),
    }
    for name in ("qmp", "vm_command"):
        if (path := getattr(options, name)) is not None:
            body[name] = os.path.abspath(path)
    for name in ("accel", "name", "libvirt", "domain", "attach"):
        if (value := getattr(options, name)) is not None:
            body[name] = value
    if options.base is not None:
        body["base"] = os.path.abspath(options.base)
    if options.format is not None:
        body["format"] = options.format
    found = client(options).start_recovery(body)
    _answer(options, found)
    if options.qmp is not None and options.attach is None and not options.json:
        for disk in found["disks"]:
            say(f"for the VM's QEMU: {shlex.join(disk['blockdev'])}")


def places(given: list[str]) -> dict[str, Any]:
    """`PATH` for all disks, `DISK=PATH` for one; UsageError for two of one kind."""
    found: dict[str, Any] = {"targets": {}}
    for text in given:
        disk, equals, path = text.partition("=")
        if not equals or "/" in disk:
            if "to" in found:
                raise UsageError(
                    f"two places for all disks: {shown(text)}", hint="write --to DISK=PATH for one"
                )
            found["to"] = os.path.abspath(text) + ("/" if text.endswith("/") else "")
        elif disk in found["targets"]:
            raise UsageError(f"two places for {shown(disk)}", hint="name one")
        else:
            found["targets"][disk] = os.path.abspath(path)
    return found


def list_all(options: Namespace) -> None:
    """Every recovery."""
    rows = client(options).recoveries()
    if options.json:
        answer_json(rows)
    else:
        rows = [row | {"reason": row["reason"] or row.get("waits", "")} for row in rows]
        answer_table(COLUMNS, rows, nothing="no recoveries; begin one: cdp recover start VM@WHEN --to DIR")


def show(options: Namespace) -> None:
    """One recovery; with --follow once it has ended. BrokenError when one that was followed has failed."""
    service = client(options)
    found = service.recovery(options.recovery)
    if options.follow:
        found = _follow(service, found)
    _answer(options, found)
    if options.follow and found["state"] == "failed":
        raise BrokenError(
            f"{found['id']} has failed: {found['reason']}", hint=f"then: cdp recover retry {found['id']}"
        )


class _Lines:
    """What a log has in the place of a bar: a line at each change of phase, and now and then."""

    def __init__(self) -> None:
        self._said: tuple[str, str] | None = None
        self._waits = ""
        self._at = 0.0

    def hear(self, found: dict[str, Any]) -> None:
        """What the service says now; why it waits on a terminal too."""
        if found.get("waits", "") != self._waits:
            self._waits = found.get("waits", "")
            say(f"{found['id']} waits: {self._waits}" if self._waits else f"{found['id']} goes on")
        phase = (found["state"], found["phase"])
        if sys.stderr.isatty() or (phase == self._said and time.monotonic() - self._at < LINE_S):
            return
        self._said, self._at = phase, time.monotonic()
        copied, total = format_bytes(found["copied_bytes"]), format_bytes(found["total_bytes"])
        say(f"{found['id']}: {found['state']} ({found['phase']}), {copied} of {total}")


def _follow(service: Client, found: dict[str, Any]) -> dict[str, Any]:
    try:
        where = "back" if found["phase"] == "undoing" else "home"
        with moving(f"{found['what']} moves {where}") as bar:
            lines = _Lines()
            while found["state"] in UNDER_WAY:
                bar(found["copied_bytes"], found["total_bytes"])
                lines.hear(found)
                time.sleep(LOOK_S)
                found = service.recovery(found["id"])
    except KeyboardInterrupt:
        say(f"{found['id']} goes on; to end it: cdp recover abort {found['id']}")
        raise
    return found


def abort(options: Namespace) -> None:
    """End the migration."""
    _answer(options, client(options).change_recovery(options.recovery, "abort"))


def retry(options: Namespace) -> None:
    """Begin again."""
    _answer(options, client(options).change_recovery(options.recovery, "retry"))


def commit(options: Namespace) -> None:
    """The VM stays at home."""
    _answer(options, client(options).change_recovery(options.recovery, "commit"))


def undo(options: Namespace) -> None:
    """The VM goes back onto its forks."""
    found = client(options).change_recovery(options.recovery, "undo", {"discard": options.discard})
    if options.discard:
        for disk in found["disks"]:
            say(f"what {disk['fork']} wrote to {disk['target']} is gone")
    _answer(options, found)


def _answer(options: Namespace, found: dict[str, Any]) -> None:
    if options.json:
        answer_json(found)
        return
    hidden = ("events", "disks", "uri", "overwrites", "launched")
    fields = {key: value for key, value in found.items() if key not in hidden and value != ""}
    fields |= {key: value for key, value in (found.get("launched") or {}).items() if key != "qmp"}
    for disk in found["disks"]:
        home = f" -> {disk['target']}, runs {disk['at']}" if "target" in disk else ""
        fields[disk["fork"]] = f"{disk['uri']}{home}"
        if disk.get("warning"):
            say(f"{disk['point']} is {disk['warning']}")
    answer_fields(fields)
    for event in found["events"]:
        say(f"{event['time']}  {event['event']}")
