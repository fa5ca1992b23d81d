"""`cdp job`: long work that the service does."""

from argparse import Namespace
from typing import Any

from recovery.output import Column, answer_fields, answer_json, answer_table
from recovery.remote import client

COLUMNS = (
    Column("name"),
    Column("kind"),
    Column("target"),
    Column("state"),
    Column("done", right=True),
    Column("created"),
    Column("reason"),
)


def job_list(options: Namespace) -> None:
    """The jobs under way, and those that ended lately."""
    jobs = client(options).jobs()
    if options.json:
        answer_json(jobs)
        return
    answer_table(COLUMNS, [_row(job) for job in jobs], nothing="no jobs; ended ones are kept for a day")


def _row(job: dict[str, Any]) -> dict[str, Any]:
    progress = job.get("progress")
    done = f"{progress:.0%}" if isinstance(progress, int | float) else ""
    return job | {"done": done, "reason": (job.get("error") or {}).get("message", "")}


def job_show(options: Namespace) -> None:
    """One job."""
    _answer(options, client(options).job(options.number))


def job_cancel(options: Namespace) -> None:
    """End a job."""
    _answer(options, client(options).cancel_job(options.number))


def _answer(options: Namespace, job: dict[str, Any]) -> None:
    if options.json:
        answer_json(job)
    else:
        answer_fields(job)
