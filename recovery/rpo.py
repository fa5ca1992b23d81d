"""`cdp rpo`: what could have been lost, and when."""

from argparse import Namespace

from recovery.output import Column, answer_json, answer_table
from recovery.remote import client
from recovery.screen import span

COLUMNS = (
    Column("time_ns", "time"),
    Column("disk"),
    Column("over"),
    Column("rpo", right=True),
    Column("lag", right=True),
    Column("durable", "durable lag", right=True),
    Column("write", "write took", right=True),
    Column("grade"),
)


def rpo(options: Namespace) -> None:
    """The record, oldest first."""
    query = {"at": options.at, "since": options.since, "until": options.until, "limit": options.limit}
    rows = client(options).rpo(options.disk, query)
    if options.json:
        answer_json(rows)
        return
    shown = [
        {
            "time_ns": row["time_ns"],
            "disk": row["disk"],
            "over": span(row["span_ns"]),
            "rpo": span(row["rpo_ns"]),
            "lag": span(row["lag_ns"]),
            "durable": span(row["durable_lag_ns"]),
            "write": span(row["write_ns"]),
            "grade": row["grade"],
        }
        for row in rows
    ]
    nothing = "nothing is on record: the disk was at rest, or the service did not run"
    answer_table(COLUMNS, shown, nothing=nothing)
