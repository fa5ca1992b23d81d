"""`cdp group`: VMs and disks that are cut at one instant."""

from argparse import Namespace
from typing import Any

from recovery.output import Column, answer_fields, answer_json, answer_table, say
from recovery.remote import client

COLUMNS = (Column("name"), Column("members"), Column("disks"), Column("problem"))


def add(options: Namespace) -> None:
    """Make a group, or add members."""
    _answer(options, client(options).add_group(options.name, options.members))


def list_all(options: Namespace) -> None:
    """Every group."""
    rows = client(options).groups()
    if options.json:
        answer_json(rows)
        return
    shown = [_for_people(row) for row in rows]
    answer_table(COLUMNS, shown, nothing="no groups; make one: cdp group add NAME VM VM")


def show(options: Namespace) -> None:
    """One group."""
    _answer(options, client(options).group(options.name))


def remove(options: Namespace) -> None:
    """Take members out, or the group away."""
    gone = client(options).remove_group(options.name, options.members)
    if options.json:
        answer_json(gone)
        return
    what = f"{', '.join(options.members)} out of {options.name}" if options.members else options.name
    say(f"took {what} away; disks and their history stay")


def _answer(options: Namespace, shown: dict[str, Any]) -> None:
    if options.json:
        answer_json(shown)
    else:
        answer_fields(_for_people(shown))


def _for_people(shown: dict[str, Any]) -> dict[str, Any]:
    row = {key: value for key, value in shown.items() if key != "created_ns" and value is not None}
    return row | {key: ", ".join(row[key]) for key in ("members", "disks")}
