"""The bar that a long command shows on a terminal while its job is under way."""

from typing import Any

from recovery.client import Client
from recovery.output import printable, say

LOOK_S = 0.5
"""How long one question for a job waits for its end; the bar moves as often."""


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
