"""`cdp point lock`, `unlock`, `locks`."""

from argparse import Namespace
from typing import Any

from recovery.output import Column, answer_fields, answer_json, answer_table, say
from recovery.remote import client

COLUMNS = (
    Column("id"),
    Column("point"),
    Column("time_ns", "time"),
    Column("until"),
    Column("immutable"),
    Column("expired"),
    Column("reason"),
)


def lock(options: Namespace) -> None:
    """Hold a point against everything that takes history away."""
    made = client(options).add_lock(
        options.point, until=options.until, reason=options.reason, immutable=options.immutable
    )
    _answer(options, made)


def unlock(options: Namespace) -> None:
    """Take a lock back."""
    gone = client(options).remove_lock(options.lock)
    if options.json:
        answer_json(gone)
    else:
        say(f"{gone.get('point', options.lock)} is not locked any more")


def locks(options: Namespace) -> None:
    """Every lock."""
    rows = client(options).locks(options.disk)
    if options.json:
        answer_json(rows)
    else:
        answer_table(COLUMNS, rows, nothing="no locks; set one: cdp point lock DISK@WHEN")


def _answer(options: Namespace, made: dict[str, Any]) -> None:
    if options.json:
        answer_json(made)
        return
    if "locks" in made:
        answer_table(COLUMNS, made["locks"], nothing="no disks")
        return
    hidden = ("until_ns", "off_ns", "created_ns", "expired", "disk", "seq")
    answer_fields({key: value for key, value in made.items() if key not in hidden})
