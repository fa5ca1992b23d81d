"""`cdp drill` and what drills have shown. The service does the work, and goes on without this command."""

import os
from argparse import Namespace
from typing import Any

from cdpserver.errors import BrokenError
from recovery.output import Column, answer_fields, answer_json, answer_table
from recovery.remote import client

COLUMNS = (
    Column("what"),
    Column("time"),
    Column("state"),
    Column("rto_ms", "rto ms", right=True),
    Column("read_ms", "read ms", right=True),
    Column("write_ms", "write ms", right=True),
    Column("created"),
    Column("reason"),
)


def drill(options: Namespace) -> None:
    """Boot the point and say what came of it. BrokenError if it did not pass."""
    body: dict[str, Any] = {
        "point": options.point,
        "marker": options.marker,
        "agent": options.agent,
        "within": options.within,
        "accel": options.accel,
        "force": options.force,
    }
    for name in ("check", "vm_command"):
        # The service has another working directory.
        path = getattr(options, name)
        body[name] = None if path is None else os.path.abspath(path)
    found = client(options).drill({key: value for key, value in body.items() if value is not None})
    if options.json:
        answer_json(found)
    else:
        hidden = ("kind", "disks", "ready_ms", "scheduled")
        answer_fields(
            {key: value for key, value in found.items() if key not in hidden and value not in ("", None)}
        )
    if found["state"] != "passed":
        raise BrokenError(
            f"the drill of {found['what']} has failed: {found['reason']}", hint="cdp point drills"
        )


def drills(options: Namespace) -> None:
    """What is kept of drills."""
    rows = client(options).drills(options.name)
    if options.json:
        answer_json(rows)
    else:
        answer_table(COLUMNS, rows, nothing="no drills; make one: cdp drill VM@latest")
