"""The tree of `cdp`'s commands, as argparse knows it: nouns, verbs, and what every command takes.

Loaded by every command, so it is of the standard library and small; what a command does is loaded when it runs.
"""

import argparse
import textwrap
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from cdpserver import names
from cdpserver.errors import UsageError, exit_codes_line

Run: TypeAlias = Callable[[argparse.Namespace], int | None]

DESCRIPTION = "Continuous data protection: every write is kept, any instant opens at once."
EXIT_CODES = textwrap.fill(exit_codes_line(), 78, subsequent_indent="  ")
EPILOG = f"""\
{names.WHEN_FORMS}

example:
  cdp disk add vda --vm web --size 64M
  cdp point list web/vda --since -10m
  qemu-img convert -O qcow2 "$(cdp uri web/vda@-90s)" saved.qcow2

{EXIT_CODES}
"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def lazy(module: str, name: str) -> Run:
    """A command whose module is loaded when it runs."""

    def run(options: argparse.Namespace) -> int | None:
        from importlib import import_module

        if any(str(getattr(options, name, "")).startswith(names.BACKUP) for name in ("point", "other")):
            import_module("recovery.attached").attach(options)
        command: Run = getattr(import_module(f"recovery.{module}"), name)
        return command(options)

    return run


class Commands:
    """The tree of commands."""

    def __init__(self) -> None:
        # On a command as well as before it; what is not given on the command leaves the value from before it.
        self._common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
        self._common.add_argument("--json", action="store_true", help="answer in JSON")
        self._common.add_argument("--state-dir", help=argparse.SUPPRESS)
        self.root = Parser(
            prog="cdp",
            description=DESCRIPTION,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.root.add_argument("--version", action="store_true", help="say which version this is")
        self.root.add_argument("--json", action="store_true", help="answer in JSON")
        self.root.add_argument(
            "--state-dir",
            metavar="DIR",
            help="the server's directory (else $CDP_STATE_DIR, then a sensible place)",
        )
        self._top = self.root.add_subparsers(metavar="COMMAND", title="commands")

    def group(self, name: str, summary: str, *, among: "Subparsers | None" = None) -> "Group":
        """A noun."""
        parser = (among or self._top).add_parser(
            name,
            help=summary,
            description=summary,
            epilog="examples:",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        return Group(self, parser)

    def leaf(
        self, verb: str, run: Run, summary: str, example: str, *, among: "Subparsers | None" = None
    ) -> argparse.ArgumentParser:
        """A command."""
        parser: argparse.ArgumentParser = (among or self._top).add_parser(
            verb,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}\n",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[self._common],
            allow_abbrev=False,
        )
        parser.set_defaults(run=run)
        return parser


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class Group:
    """A noun and its verbs."""

    def __init__(self, commands: Commands, parser: Parser) -> None:
        self._commands = commands
        self._parser = parser
        self._verbs = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)

    def group(self, name: str, summary: str, example: str) -> "Group":
        """A noun below this one."""
        self._parser.epilog = f"{self._parser.epilog}\n  {example}"
        return self._commands.group(name, summary, among=self._verbs)

    def leaf(self, verb: str, run: Run, summary: str, example: str) -> argparse.ArgumentParser:
        """A verb of it."""
        self._parser.epilog = f"{self._parser.epilog}\n  {example}"
        return self._commands.leaf(verb, run, summary, example, among=self._verbs)
