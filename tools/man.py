"""tools/man: cdp.1 and cdpserver.8, from the parsers that read the command line and the table of exit codes.

argparse-manpage writes synopsis, description and options; what a parser does not know (environment, files) stands here.
"""

import argparse
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from argparse_manpage.manpage import Manpage

import cdpserver
from cdpserver import names
from cdpserver.errors import EXIT_CODES
from cdpserver.service import options
from recovery import cli

MANUAL = "Continuous data protection"

STATE_DIR = ("CDP_STATE_DIR", "The server's directory, where --state-dir names none.")

CDP_ENVIRONMENT = (
    STATE_DIR,
    ("CDP_DEBUG", "Set to 1, an internal error shows where it happened."),
    ("NO_COLOR", "Tables without colours, also at a terminal."),
)

CDP_FILES = (
    (
        "/var/lib/cdpserver",
        "The state directory of a server that runs as root or by systemd; others: see --state-dir.",
    ),
    ("STATE_DIR/api.sock", "Where the server is asked."),
)

SERVER_ENVIRONMENT = (
    STATE_DIR,
    ("LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES", "Sockets from systemd; see sd_listen_fds(3)."),
    (
        "NOTIFY_SOCKET, WATCHDOG_USEC",
        "Where systemd is told that the server is ready and alive; see sd_notify(3).",
    ),
)

SERVER_FILES = (
    ("/etc/cdpserver/cdpserver.toml", "The configuration that the installed service is started with."),
    (
        "/var/lib/cdpserver",
        "All data: journals, indexes, base points, the catalog. Nothing of it is elsewhere.",
    ),
    ("STATE_DIR/events.jsonl", "What happened, a JSON object a line."),
    ("STATE_DIR/api.sock", "The control API."),
)


def pages() -> dict[str, str]:
    """File name -> man page."""
    return {
        "cdp.1": page(
            cli.build_parser(),
            section=1,
            summary="points in time of protected disks",
            environment=CDP_ENVIRONMENT,
            files=CDP_FILES,
            see="cdpserver(8), qemu-img(1), nbdcopy(1), nbdfuse(1)",
        ),
        "cdpserver.8": page(
            options.build_parser(),
            section=8,
            summary="continuous data protection server for QEMU/KVM disks",
            environment=SERVER_ENVIRONMENT,
            files=SERVER_FILES,
            see="cdp(1), nbdkit(1), systemd.service(5)",
        ),
    }


def page(
    parser: argparse.ArgumentParser,
    *,
    section: int,
    summary: str,
    environment: tuple[tuple[str, str], ...],
    files: tuple[tuple[str, str], ...],
    see: str,
) -> str:
    """One page. The examples of all help texts come together in EXAMPLES, so they are taken out of the texts."""
    shown = copy.deepcopy(parser)
    for command in _parsers(shown):
        command.epilog = None
    manual = Manpage(
        shown,
        {
            "project_name": "cdpserver",
            "version": cdpserver.__version__,
            "manual_title": MANUAL,
            "manual_section": section,
            "description": summary,
        },
    )
    if section == 1:
        manual.add_section("instants", "=", f"{_escape(names.WHEN_FORMS[0].upper() + names.WHEN_FORMS[1:])}.")
    manual.add_section("examples", "=", _examples(parser))
    codes = tuple((str(code), f"{meaning[0].upper()}{meaning[1:]}.") for code, meaning in EXIT_CODES.items())
    manual.add_section("exit status", "=", _terms(codes))
    manual.add_section("environment", "=", _terms(environment))
    manual.add_section("files", "=", _terms(files))
    manual.add_section(
        "see also", "=", ",\n".join(re.sub(r"(\S+)(\(\d\))", r".BR \1 \2", name) for name in see.split(", "))
    )
    return str(manual)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _parsers(verb)


def _examples(parser: argparse.ArgumentParser) -> str:
    """Each command's own, once, under what it does."""
    parts: list[str] = []
    for command in _parsers(parser):
        if command is not parser and any(
            isinstance(action, argparse._SubParsersAction) for action in command._actions
        ):
            continue  # a noun repeats the examples of its verbs
        _, _, text = (command.epilog or "").partition("example")
        lines = [line.strip() for line in text.split("\n\n")[0].splitlines()[1:]]
        title = "In short" if command is parser else (command.description or "")
        parts += [".PP", _escape(title), ".PP", ".nf", ".RS 4", *map(_escape, lines), ".RE", ".fi"]
    return "\n".join(parts)


def _terms(pairs: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(f".TP\n.B {_escape(term)}\n{_escape(meaning)}" for term, meaning in pairs)


def _escape(text: str) -> str:
    """Text as roff takes it: no escapes, no requests, and a hyphen that can be copied."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="tools/man", description="Write cdp.1 and cdpserver.8.")
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in pages().items():
            (directory / name).write_text(text)
    except OSError as error:
        sys.exit(f"tools/man: {error.filename}: {error.strerror}: name a directory that can be written")


if __name__ == "__main__":
    main()
