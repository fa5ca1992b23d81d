"""What tells an operator how to go on: examples that can be typed, exit codes in one table, hints in every error."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdpserver import errors
from cdpserver.errors import EXIT_CODES, CdpError
from cdpserver.service import options
from cdpserver.state import StateDir
from recovery import cli, remote

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    value.__name__: value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, CdpError)
}
COMMAND = re.compile(r"\b(cdp|cdpserver) ([^()|\"]+)")


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from parsers(verb)


EVERY_PARSER = [*parsers(cli.build_parser()), options.build_parser()]


def examples(parser: argparse.ArgumentParser) -> list[tuple[str, list[str]]]:
    """(program, arguments) of every command in the examples at the end of a help text."""
    _, found, text = (parser.epilog or "").partition("example")
    assert found, f"{parser.prog} has no example"
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.startswith("  ")]
    return [(program, shlex.split(rest)) for line in lines for program, rest in COMMAND.findall(line)]


@pytest.mark.parametrize("parser", EVERY_PARSER, ids=lambda parser: str(parser.prog))
def test_every_help_ends_with_examples_that_its_own_parser_takes(parser: argparse.ArgumentParser) -> None:
    given = examples(parser)
    assert given
    words = parser.prog.split()
    for program, arguments in given:
        assert [program, *arguments][: len(words)] == words
        if program == "cdp":
            assert callable(cli.parse(arguments).run)
        else:
            options.build_parser().parse_args(arguments)


def test_the_table_of_exit_codes_is_shown_wherever_it_is_looked_for() -> None:
    assert {kind.exit_code for kind in KINDS.values()} < set(EXIT_CODES)
    readme = (ROOT / "README.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in readme
        for parser in (EVERY_PARSER[0], EVERY_PARSER[-1]):
            assert f"{code} {meaning}" in " ".join(parser.format_help().split())


OUTCOMES = [
    *((kind("it is so"), kind.exit_code) for kind in KINDS.values()),
    (None, 0),
    (RuntimeError("a bug"), 1),
    (OSError(5, "I/O error"), 5),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("outcome", "code"), OUTCOMES, ids=lambda value: repr(value)[:40])
def test_the_exit_code_of_every_outcome(
    outcome: BaseException | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """141 is tests/test_cli.py's: it takes a reader that goes away."""

    def run(_: argparse.Namespace) -> None:
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(remote, "disk_list", run)
    monkeypatch.setattr(sys, "argv", ["cdp", "disk", "list"])
    monkeypatch.delenv("CDP_DEBUG", raising=False)
    assert cli.main() == code
    said = capsys.readouterr().err
    assert said.count("\n") == (outcome is not None) and said.startswith("cdp: " if said else "")


@pytest.mark.real
@pytest.mark.parametrize(
    ("obstacle", "arguments", "code", "says"),
    [
        ("export.sock", [], 5, "the system refused"),
        ("", ["--config", "/nowhere.toml"], 2, "/nowhere.toml"),
        ("", ["--nonsense"], 2, "--nonsense"),
        ("", ["--listen", "127.0.0.1:1x"], 2, "ADDRESS:PORT"),
        ("mine.txt", [], 3, "not empty"),
    ],
)
def test_what_keeps_the_server_from_starting_is_said_and_has_a_code(
    obstacle: str, arguments: list[str], code: int, says: str, short_path: Path
) -> None:
    directory = short_path / "s"
    command = [sys.executable, "-m", "cdpserver.service.command", "--state-dir", str(directory), *arguments]
    if code == 5:
        StateDir.create_or_open(directory)
    if obstacle:
        (directory / obstacle).mkdir(parents=True)
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert says in lines[-1] and lines[-1].startswith("cdpserver: ")


def constructions() -> Iterator[tuple[str, str, bool]]:
    """(place, class, whether it has a hint) of every error that is made anywhere."""
    for package in ("cdpserver", "recovery", "nbdplugin"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                    name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                    if name in KINDS:
                        hint = any(keyword.arg == "hint" for keyword in node.keywords)
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", name, hint


def test_every_error_names_the_next_step() -> None:
    """What the operator did wrong or wants too early has a hint of its own; the rest at least its class's."""
    found = list(constructions())
    assert len(found) > 100
    assert not [(place, name) for place, name, hint in found if not hint and not KINDS[name].usual_hint]


def test_a_class_has_a_usual_hint_where_there_is_only_one_way_on() -> None:
    without = {name for name, kind in KINDS.items() if not kind.usual_hint}
    assert without == {"CdpError", "UsageError", "NotFoundError", "RefusedError", "ForbiddenError"}
    assert str(errors.CorruptError("broken")) == f"broken ({errors.CorruptError.usual_hint})"
    assert str(errors.CorruptError("broken", hint="do that")) == "broken (do that)"
