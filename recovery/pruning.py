"""`cdp prune`: what no policy keeps any more."""

from argparse import Namespace

from cdpserver.names import format_bytes
from recovery.output import Column, answer_json, answer_table, say
from recovery.remote import client

COLUMNS = (Column("what"), Column("disk"), Column("bytes", right=True), Column("reason"))


def prune(options: Namespace) -> None:
    """Drop it, or show what would be dropped."""
    rows = client(options).prune(options.disk, dry_run=options.dry_run)
    if options.json:
        answer_json(rows)
        return
    answer_table(COLUMNS, rows, nothing="nothing is there that no policy keeps")
    if rows:
        size = format_bytes(sum(int(row.get("bytes", 0)) for row in rows))
        say(f"{size} {'would come back' if options.dry_run else 'came back'}")
