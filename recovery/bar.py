"""The bar that a long command shows on a terminal while its work is under way."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from recovery.output import printable, say

if TYPE_CHECKING:
    from recovery.client import Client

Bar: TypeAlias = Callable[[int, int], None]
"""Hears of (bytes done, bytes in all)."""

LOOK_S = 0.5
"""How long one question for a job waits for its end; the bar moves as often."""


def watch(service: "Client", job: dict[str, Any]) -> dict[str, Any]:
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


@contextlib.contextmanager
def moving(title: str, total: int = 0) -> Iterator[Bar]:
    """A bar of bytes with rate and time left on a terminal's stderr, else nothing; called with (done, total)."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(printable(title)), total=total or None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)
