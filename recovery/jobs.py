"""`cdp job`, and the bar that long commands show on a terminal while their job is under way."""

from argparse import Namespace
from typing import Any

from recovery.client import Client
from recovery.output import Column, answer_fields, answer_json, answer_table, printable, say
from recovery.remote import client

LOOK_S = 0.5
"""How long one question for a job waits for its end; the bar moves as often."""

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


def watch(service: Client, job: dict[str, Any]) -> dict[str, Any]:
    """Show a bar on the terminal until a job has ended. An interrupt ends the showing only, and says so."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    number = int(str(job["name"]).removeprefix("jobs/"))
    title = escape(printable(f"{job.get('kind')} {job.get('target')}"))
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None)
            while job.get("state") == "running":
                job = service.job(number, wait=LOOK_S)
                if (progress := job.get("progress")) is not None:
                    bar.update(task, total=1.0, completed=progress)
    except KeyboardInterrupt:
        say(f"{job['name']} goes on: cdp job show {number}; to end it: cdp job cancel {number}")
        raise
    return job
