"""The man pages: every command is in them, and troff reads them without a complaint."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdpserver.errors import EXIT_CODES
from cdpserver.service import options
from recovery import cli
from tools import man

ROOT = Path(__file__).resolve().parent.parent
PAGES = man.pages()
SECTIONS = (
    "NAME",
    "SYNOPSIS",
    "DESCRIPTION",
    "OPTIONS",
    "EXAMPLES",
    "EXIT STATUS",
    "ENVIRONMENT",
    "FILES",
    "SEE ALSO",
)
ROFF = ["groff", "-man", "-Tutf8", "-P-cbou", "-ww", "-rLL=100n"]

needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="apt-get install groff-base")


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    verbs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not verbs:
        yield parser
    for action in verbs:
        for verb in action.choices.values():
            yield from leaves(verb)


def rendered(name: str) -> str:
    """As a reader sees it; a warning of groff fails the test."""
    done = subprocess.run(ROFF, input=PAGES[name], text=True, capture_output=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout


@needs_groff
def test_every_command_with_its_options_is_in_the_page() -> None:
    text = " ".join(rendered("cdp.1").replace("‐\n", "").split())
    commands = list(leaves(cli.build_parser()))
    assert len(commands) > 15
    for command in commands:
        assert command.prog in text, command.prog
        assert " ".join((command.description or "").split()) in text
        for action in command._actions:
            if action.option_strings and action.dest != "help" and action.help != argparse.SUPPRESS:
                assert action.option_strings[-1] in text


@needs_groff
def test_every_option_of_the_server_is_in_the_page() -> None:
    text = rendered("cdpserver.8")
    for action in options.build_parser()._actions:
        assert action.dest == "help" or action.option_strings[-1] in text


@needs_groff
@pytest.mark.parametrize("name", PAGES)
def test_the_sections_are_those_of_a_man_page(name: str) -> None:
    lines = rendered(name).splitlines()
    found = [line for line in lines if line and not line[0].isspace()][1:-1]
    assert [title for title in found if title in SECTIONS] == list(SECTIONS)
    status = "\n".join(lines[lines.index("EXIT STATUS") : lines.index("ENVIRONMENT")])
    for code, meaning in EXIT_CODES.items():
        assert f"{code} " in status and meaning[1:] in status


@needs_groff
def test_an_example_can_be_copied_from_the_page() -> None:
    lines = [line.strip() for line in rendered("cdp.1").splitlines()]
    assert "cdp point list web/vda --since -10m --kind rp --limit 20" in lines
    assert 'qemu-img convert -O qcow2 "$(cdp uri web/vda@-90s)" saved.qcow2' in lines


@pytest.mark.skipif(shutil.which("man") is None, reason="apt-get install man-db")
@pytest.mark.parametrize("name", PAGES)
def test_man_takes_the_page_for_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(PAGES[name])
    command = ["man", "--warnings", "-l", str(tmp_path / name)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60, check=True)
    assert "EXIT STATUS" in done.stdout and done.stderr == ""


def test_the_tool_writes_both_and_says_what_is_wrong(tmp_path: Path) -> None:
    def tool(directory: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "tools.man", str(directory)]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, check=False)

    assert tool(tmp_path / "man").returncode == 0
    assert sorted(path.name for path in (tmp_path / "man").iterdir()) == sorted(PAGES)
    (tmp_path / "file").touch()
    done = tool(tmp_path / "file")
    assert done.returncode != 0 and done.stderr.startswith("tools/man: ") and done.stderr.count("\n") == 1
