"""What `cdp backup run` says of the backup that it made, of whatever."""

from argparse import Namespace
from typing import Any

from cdpserver.names import format_bytes
from cdpserver.repository.record import FULL
from recovery.output import answer, answer_json, say


def tell_made(options: Namespace, made: dict[str, Any]) -> None:
    """A backup that was made, as `show` has it."""
    if options.json:
        answer_json(made)
        return
    rate = format_bytes(int(made["read_bytes"] / max(made["seconds"], 0.001)))
    read, new, stored = (format_bytes(made[key]) for key in ("read_bytes", "new_bytes", "stored_bytes"))
    answer(f"backup:{made['id']}  {made['kind']}: {read} read ({rate}/s), {new} new, {stored} stored")
    say(f"{made['kind']}, since {made['reason']}" if made["kind"] == FULL else made["reason"])
