"""`cdp policy`: how long history is kept."""

from argparse import Namespace
from typing import Any

from cdpserver.retention.policy import FIELDS, parse_values
from recovery.output import Column, answer_json, answer_table, say
from recovery.remote import client

COLUMNS = (Column("value"), Column("is"), Column("from"))


def policy_set(options: Namespace) -> None:
    """Change values of a disk or a VM."""
    given = {f.name: text for f in FIELDS if (text := getattr(options, f.name)) is not None}
    parse_values(given)
    _answer(options, client(options).set_policy(options.name, given))


def policy_show(options: Namespace) -> None:
    """The policy as it works, and where each value comes from."""
    _answer(options, client(options).policy(options.name))


def policy_clear(options: Namespace) -> None:
    """Take back what was said of a disk or a VM."""
    _answer(options, client(options).clear_policy(options.name))


def _answer(options: Namespace, shown: dict[str, Any]) -> None:
    if options.json:
        answer_json(shown)
        return
    sources = shown.get("sources") or {}
    rows = [{"value": f.name, "is": shown.get(f.name), "from": sources.get(f.name)} for f in FIELDS]
    answer_table(COLUMNS, rows, nothing="nothing")
    if shown.get("problem"):
        say(f"warning: nothing is pruned until this is mended: {shown['problem']}")
