"""docs/runbook.md: its commands can be typed, and its way of moving the store keeps what is in it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cdpserver import state
from cdpserver.errors import EXIT_CODES
from cdpserver.service import options
from recovery import cli
from tests.test_service import Server

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/runbook.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`(cdp(?:server)? [a-z-][^`]*)`", TEXT.replace("\n", " "))
COMMAND = re.compile(r"\b(cdp|cdpserver) ((?:[a-z]|--)[^()|\"]*)")


def commands() -> list[tuple[str, str]]:
    lines = [line for block in BLOCKS for line in block.splitlines()]
    return sorted(
        {
            found
            for line in lines + INLINE
            for found in COMMAND.findall(line)
            if "systemctl" not in line and "chown" not in line
        }
    )


@pytest.mark.parametrize(("program", "rest"), commands())
def test_every_command_of_ours_can_be_typed(program: str, rest: str) -> None:
    if program == "cdp":
        assert callable(cli.parse(shlex.split(rest)).run)
    else:
        options.build_parser().parse_args(shlex.split(rest))


def test_there_is_something_to_type() -> None:
    assert len(commands()) > 10 and len(BLOCKS) > 8


def test_units_files_and_tools_that_it_names_are_there() -> None:
    units = set(re.findall(r"cdpserver[a-z-]*\.(?:service|socket)", TEXT))
    assert units and all((ROOT / "systemd" / unit).exists() for unit in units)
    assert "tools/install" in TEXT and (ROOT / "tools/install").exists()
    for option in re.findall(r"tools/install (--[a-z-]+)", TEXT):
        assert f'"{option}"' in (ROOT / "tools/install.py").read_text()


def test_what_it_says_of_exit_codes_and_paths() -> None:
    rows = [int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)]
    assert sorted(rows) == [1, 2, 3, 4, 5] and set(rows) < set(EXIT_CODES)
    longest = state.SOCKET_PATH_LENGTH - 1 - len(state.LONGEST_SOCKET)
    assert f"at most {longest} bytes" in TEXT


@pytest.mark.real
def test_a_clock_that_is_wrong_is_said_and_set_right(short_path: Path) -> None:
    """The commands of the section, on a store that has no records of the wrong time."""
    state_dir, year_ns = short_path / "s", 365 * 86_400 * 10**9
    with Server(state_dir):
        pass
    clock = state_dir / "clock.json"
    value = json.loads(clock.read_text())
    clock.write_text(json.dumps(value | {"offset_ns": value["offset_ns"] + year_ns}))

    def cdp(*words: str) -> str:
        command = [sys.executable, "-m", "recovery.cli", *words, "--state-dir", str(state_dir)]
        return subprocess.run(
            command, text=True, capture_output=True, check=True, timeout=120, cwd=ROOT
        ).stdout

    section = TEXT[TEXT.index("## The clock is wrong") : TEXT.index("## Moving the store")]
    (move,) = re.findall(r"^mv .*$", section, re.MULTILINE)
    shown = ("cdp status", "cdp clock show", "cdp event list --level warning --since -1d", "cdp point locks")
    assert all(line in section for line in shown)
    with Server(state_dir):
        said = {line: cdp(*shlex.split(line)[1:]) for line in shown}
        assert re.search(r"the server's clock is about 365d ahead of the host's", said["cdp status"])
        assert str(value["offset_ns"] + year_ns) in said["cdp clock show"]
    subprocess.run(shlex.split(move.replace("/var/lib/cdpserver", str(state_dir))), check=True)
    with Server(state_dir):
        assert "clock is" not in cdp("status")


def moving() -> str:
    """The command that copies the store."""
    line: str
    (line,) = [line for block in BLOCKS for line in block.splitlines() if line.startswith("cp ")]
    return line


@pytest.mark.real
def test_a_store_that_was_moved_has_every_disk_whole(short_path: Path) -> None:
    old, new = short_path / "old", short_path / "new"
    image = short_path / "image.raw"
    image.write_bytes(b"image" * 4096)
    with image.open("ab") as file:
        file.truncate(1 << 20)
    content = bytes(range(256)) * 256
    with Server(old) as server:
        server.post("/v1/disks", name="d", size=1 << 20, base=str(image))
        uri = server.get("/v1/disks/d")["uri"]
        subprocess.run(["nbdcopy", "-", uri], input=content, check=True, timeout=60)
        server.synced("d", write_blocking=True)
    command = moving().replace("/var/lib/cdpserver", str(old)).replace("/srv/history", str(new))
    subprocess.run(shlex.split(command), check=True, timeout=60)
    old.rename(short_path / "gone")
    check = [sys.executable, "-m", "recovery.cli", "check", "d", "--full", "--state-dir", str(new)]
    assert (
        "is whole"
        in subprocess.run(check, text=True, capture_output=True, check=True, timeout=120, cwd=ROOT).stdout
    )
    with Server(new) as server:
        moved = subprocess.run(
            ["nbdcopy", server.uri("d@latest"), "-"], capture_output=True, check=True, timeout=60
        )
        assert moved.stdout[: len(content)] == content
        assert str(new) in server.get("/v1/disks/d")["uri"]
