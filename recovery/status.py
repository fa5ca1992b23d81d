"""`cdp status`: the service at a glance, once or again and again until Ctrl-C.

In a pipe it is plain text as wide as it needs to be; with `--json`, an object a look.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cdpserver.errors import UnreachableError
from cdpserver.state import StateDir, default_state_dir
from recovery.client import Client
from recovery.output import answer, answer_json, answer_json_items, printable
from recovery.screen import Line, screen

if TYPE_CHECKING:
    from rich.text import Text

PATIENCE_S = 15.0
"""A look takes the service two seconds at worst, unless its store hangs; an operator wants to know that, too."""

STYLES = {"plain": "", "head": "bold", "warning": "yellow", "bad": "bold red"}


def status(options: Namespace) -> None:
    """One screen. UnreachableError if the service does not answer; with `--watch` that is shown, and it is asked again."""
    look = _client(options).overview
    if options.watch is None:
        _print(look(), as_json=options.json)
        return
    try:
        if sys.stdout.isatty() and not options.json:
            _watch(look, options.watch)
        else:
            _repeat(look, options.watch, as_json=options.json)
    except KeyboardInterrupt:
        return  # the way to end it


def metrics(options: Namespace) -> None:
    """The metrics as Prometheus reads them; with `--json` a list of samples."""
    text = _client(options).metrics()
    if not options.json:
        print(text, end="")
        return
    from prometheus_client.parser import text_string_to_metric_families

    answer_json_items(
        {"name": sample.name, "labels": sample.labels, "value": sample.value}
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )


def _client(options: Namespace) -> Client:
    return Client(StateDir(default_state_dir(options.state_dir)), timeout_s=PATIENCE_S)


def _print(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        answer_json(found)
        return
    if not sys.stdout.isatty():
        for line in screen(found):
            answer(line.text)
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_text(screen(found, width=console.width)), soft_wrap=True)


def _repeat(look: Callable[[], dict[str, Any]], pause_s: float, *, as_json: bool) -> None:
    """For a pipe or a log: one look after the other, a blank line between those for people."""
    first = True
    while True:
        if not (first or as_json):
            answer()
        try:
            _print(look(), as_json=as_json)
        except UnreachableError as error:
            _say_unreachable(error, as_json=as_json)
        sys.stdout.flush()
        first = False
        time.sleep(pause_s)


def _say_unreachable(error: UnreachableError, *, as_json: bool) -> None:
    if as_json:
        answer_json({"error": error.kind, "message": error.message, "hint": error.hint})
    else:
        answer(f"! {error}")


def _watch(look: Callable[[], dict[str, Any]], pause_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                lines = screen(look(), width=console.width, height=console.height - 1)
            except UnreachableError as error:
                lines = [Line(f"! {printable(error)}", "bad")]
            live.update(_text(lines), refresh=True)
            time.sleep(pause_s)


def _text(lines: Iterable[Line]) -> "Text":
    from rich.text import Text

    # As Text, so that no name is taken for markup.
    return Text("\n").join(Text(line.text, style=STYLES[line.weight]) for line in lines)
