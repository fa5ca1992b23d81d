"""What a shell offers: asked by a real bash, answered from a stand-in for the service, from the catalog's copy, or not at all."""

import contextlib
import json
import os
import pty
import select
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from cdpserver.catalog.content import Content, Entry
from cdpserver.durable import write_json
from cdpserver.state import StateDir
from recovery import complete
from recovery.cli import build_parser
from tools.kit.processes import TooLate

ROOT = Path(__file__).resolve().parent.parent
ANSWERS: dict[str, Any] = {
    "/v1/disks": [{"name": name} for name in ("db", "rescue", "web/vda", "web/vdb")],
    "/v1/jobs": [{"name": "jobs/11"}, {"name": "jobs/12"}],
    "/v1/forks": [{"name": "rescue"}],
    "/v1/groups": [{"name": "shop"}],
    "/v1/vms/web:points": [{"name": "monday"}, {"name": None}],
    "/v1/vms/shop:points": [{"name": "sale"}],
    "/v1/disks/web/vda:points": [{"name": "before-upgrade"}, {"name": "monday"}],
    "/v1/disks/web/vda:basepoints": [{"number": 0}, {"number": 1}],
}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        said = json.dumps(ANSWERS.get(path, {"message": "there is no such disk"})).encode()
        self.send_response(200 if path in ANSWERS else 404)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@pytest.fixture
def state(short_path: Path) -> StateDir:
    return StateDir(short_path)


@pytest.fixture
def service(state: StateDir) -> Iterator[StateDir]:
    with _Server(str(state.api_socket), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def copy_of_catalog(state: StateDir) -> None:
    entries = [
        Entry("alone", "t1", "live", 1),
        Entry("web/vda", "t2", "live", 1),
        Entry("x", "t3", "removing", 1),
    ]
    write_json(state.catalog_copy, Content({entry.name: entry for entry in entries}, 4).to_json())


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`cdp` and `cdpserver` of this checkout on PATH."""
    for name, module in (("cdp", "recovery.cli"), ("cdpserver", "cdpserver.service.command")):
        call = f"import sys; from {module} import main; sys.exit(main())"
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{call}' \"$@\"\n")
        program.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("CDP_STATE_DIR", "_ARGCOMPLETE")}
    return kept | {"PATH": f"{tmp_path}:{kept['PATH']}", "PYTHONPATH": str(ROOT)}


BASH = """
eval "$(cdp completion bash)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
_python_argcomplete "${1%% *}" || exit 3
((${#COMPREPLY[@]} == 0)) || printf '%s\\n' "${COMPREPLY[@]}"
"""


def offered(line: str, environment: dict[str, str], state: StateDir, *, breaks: str = "") -> list[str]:
    """What bash has to choose from at the end of `line`, with nothing said on the terminal."""
    done = subprocess.run(
        ["bash", "--norc", "-c", f"COMP_WORDBREAKS='{breaks}'{BASH}", "bash", line],
        env=environment | {"CDP_STATE_DIR": str(state.path)},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(word.strip() for word in done.stdout.splitlines())


USUAL = ["-1h", "-1m", "-5m", "latest"]
WHENS = [*USUAL, "before-upgrade", "bp:0", "bp:1", "monday"]
EVERY_DISK = ["db", "rescue", "web/vda", "web/vdb"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cdp poi", ["point"]),
        ("cdp disk sh", ["show"]),
        ("cdp disk show ", ["db", "rescue", "web/vda", "web/vdb"]),
        ("cdp disk show web/", ["web/vda", "web/vdb"]),
        ("cdp disk remove --y", ["--yes"]),
        ("cdp disk add ", []),
        ("cdp disk add new --vm ", ["web"]),
        ("cdp fork remove ", ["rescue"]),
        ("cdp check d", ["db"]),
        ("cdp uri web", ["web", "web/vda", "web/vdb"]),
        ("cdp uri web@", [f"web@{when}" for when in (*USUAL, "monday")]),
        ("cdp export sh", [f"shop@{when}" for when in (*USUAL, "sale")]),
        ("cdp point show d", [f"db@{when}" for when in USUAL]),
        ("cdp recover start web@mo", ["web@monday"]),
        ("cdp recover start s", []),
        ("cdp snapshot pull web", ["web/vda", "web/vdb"]),
        ("cdp backup run web", ["web", "web/vda", "web/vdb"]),
        ("cdp point mark ", [*EVERY_DISK, "shop", "web"]),
        ("cdp point list s", ["shop"]),
        ("cdp rpo w", ["web", "web/vda", "web/vdb"]),
        ("cdp policy set ", [*EVERY_DISK, "web"]),
        ("cdp group show ", ["shop"]),
        ("cdp group add shop ", [*EVERY_DISK, "web"]),
        ("cdp uri web/vda", [f"web/vda@{when}" for when in WHENS]),
        ("cdp uri web/vda@b", ["web/vda@before-upgrade", "web/vda@bp:0", "web/vda@bp:1"]),
        ("cdp fork add web/vda@mo", ["web/vda@monday"]),
        ("cdp fork add web/vda@monday ", []),
        ("cdp point list web/vda --until la", ["latest"]),
        ("cdp point list web/vda --since mo", ["monday"]),
        ("cdp point list web/vda --kind b", ["bookmark", "bp"]),
        ("cdp job show ", ["11", "12"]),
        ("cdp event list --event ", []),
        ("cdp event list --disk d", ["db"]),
        ("cdp completion ", ["bash", "fish", "zsh"]),
        ("cdp disk show nobody@", []),
        ("cdpserver --con", ["--config"]),
        ("cdpserver --listen ", []),
    ],
)
def test_what_bash_offers(
    line: str, words: list[str], environment: dict[str, str], service: StateDir
) -> None:
    assert offered(line, environment, service) == sorted(words)


def test_files_are_offered_where_a_file_is_meant(
    environment: dict[str, str], state: StateDir, tmp_path: Path
) -> None:
    (tmp_path / "00000001.log").touch()
    line = f"cdp segment show {tmp_path}/0000"
    assert offered(line, environment, state) == [f"{tmp_path}/00000001.log"]


def test_without_the_service_disks_come_from_the_copy_of_the_catalog(
    environment: dict[str, str], state: StateDir
) -> None:
    copy_of_catalog(state)
    assert offered("cdp check ", environment, state) == ["alone", "web", "web/vda"]
    assert "alone@latest" in offered("cdp uri al", environment, state)


def test_without_anything_nothing_is_offered_and_nothing_said(
    environment: dict[str, str], state: StateDir
) -> None:
    assert offered("cdp disk show ", environment, state) == []
    state.catalog_copy.write_text("{")
    assert offered("cdp disk show ", environment, state) == []
    assert offered("cdp disk show ", environment, StateDir(Path("/dev/null/x"))) == []


def test_a_service_that_hangs_costs_a_moment(environment: dict[str, str], state: StateDir) -> None:
    copy_of_catalog(state)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(state.api_socket))
        listener.listen()
        started = time.monotonic()
        assert complete._disks(state) == ["alone", "web/vda"]
        assert complete.PATIENCE_S <= time.monotonic() - started < 20 * complete.PATIENCE_S


@pytest.mark.parametrize(
    "answer", [[{"no": "name"}, {"name": None}], [{"name": 7}], {"name": "x"}, ["x"], None]
)
def test_a_strange_answer_offers_nothing_strange(
    answer: Any, environment: dict[str, str], service: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ANSWERS, "/v1/disks", answer)
    assert complete._disks(service) in ([], ["7"])


def test_a_tab_in_an_interactive_bash(environment: dict[str, str], service: StateDir) -> None:
    """Readline cuts words at `@` and `:`; the bookmark is completed all the same, behind the disk."""
    variables = environment | {"CDP_STATE_DIR": str(service.path)}
    completes("bash", variables, "cdp uri web/vda@bef\t#", "cdp uri web/vda@before-upgrade #")
    completes("bash", variables, "cdp uri web/vda@mon\t#", "cdp uri web/vda@monday #")
    completes("bash", variables, "cdp che\tdb#", "cdp check db#")
    completes("bash", variables, "cdp uri web/vda\tmon\t#", "cdp uri web/vda@monday #")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is missing: apt-get install zsh")
def test_a_tab_in_an_interactive_zsh(environment: dict[str, str], service: StateDir) -> None:
    variables = environment | {"CDP_STATE_DIR": str(service.path), "HOME": str(service.path)}
    completes("zsh", variables, "cdp uri web/vda@mon\t#", "cdp uri web/vda@monday #")
    completes("zsh", variables, "cdp che\tdb#", "cdp check db#")


def completes(shell: str, environment: dict[str, str], keys: str, line: str) -> None:
    """A service has so little time to answer that on a busy machine it may need another tab."""
    seen: list[str] = []
    while line not in seen:
        assert len(seen) < 5, seen
        seen.append(at_a_prompt(keys, environment, shell))


PROMPTS = {  # how to start it, what to say first, and what it says when it listens
    "bash": (["bash", "--norc", "--noprofile", "-i"], "", ""),
    "zsh": (
        ["zsh", "-f", "-i", "-o", "no_prompt_cr", "-o", "no_prompt_sp"],
        # It shows its prompt a moment before it takes keys one by one, and says by this hook that it does.
        "autoload -U compinit; compinit -D; unset zle_bracketed_paste; "
        'zle-line-init() print -n "at your service"; zle -N zle-line-init; ',
        "at your service",
    ),
}


def at_a_prompt(keys: str, environment: dict[str, str], shell: str) -> str:
    """What stands on the screen once the last of `keys` does."""
    command, first, ready = PROMPTS[shell]
    main, end = pty.openpty()
    process = subprocess.Popen(
        command,
        env=environment | {"TERM": "dumb", "PS1": "ready> ", "INPUTRC": os.devnull, "HISTFILE": ""},
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    try:
        read_until(main, "ready> ")
        os.write(main, f'{first}eval "$(cdp completion {shell})"; echo load""ed\n'.encode())
        read_until(main, f"loaded\r\nready> {ready}")
        os.write(main, keys.encode())
        return shown(read_until(main, keys[-1]))
    finally:
        process.kill()
        process.wait()
        os.close(main)


def shown(written: str) -> str:
    """What is left on a line of a terminal after bells and backspaces."""
    line: list[str] = []
    at = 0
    for character in written.replace("\a", ""):
        if character == "\b":
            at -= 1
        else:
            line[at : at + 1] = character
            at += 1
    return "".join(line)


def read_until(fd: int, text: str) -> str:
    deadline = time.monotonic() + 60
    seen = ""
    while text not in seen:
        if time.monotonic() > deadline:
            raise TooLate(seen)
        if select.select([fd], [], [], 1)[0]:
            with contextlib.suppress(OSError):
                seen += os.read(fd, 4096).decode()
    return seen


NAMED = ("DISK", "DISK|VM", "DISK@WHEN", "DISK|VM@WHEN", "WHEN", "VM", "GROUP", "JOB")


def test_every_argument_that_names_a_disk_is_completed() -> None:
    """A new command gets its completion from what its help calls the argument."""
    parser = build_parser()
    complete.attach(parser)
    without = [
        f"{command.prog} {action.metavar}"
        for command in complete._leaves(parser)
        for action in command._actions
        if action.metavar in NAMED and not hasattr(action, "completer")
    ]
    assert not without


@pytest.mark.parametrize("shell", complete.SHELLS)
def test_the_script_is_one_that_the_shell_can_read(
    shell: str, environment: dict[str, str], tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is missing: apt-get install {shell}")
    script = complete.script(shell)
    assert "cdpserver" in script
    path = tmp_path / "script"
    path.write_text(script)
    done = subprocess.run(
        [shell, "-n", str(path)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is missing: apt-get install fish")
def test_what_fish_offers(environment: dict[str, str], service: StateDir) -> None:
    variables = environment | {"CDP_STATE_DIR": str(service.path), "HOME": str(service.path)}
    line = "cdp completion fish | source; complete -C 'cdp uri web/vda@mo'; complete -C 'cdp bp cut d'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", line],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert [word.split("\t")[0] for word in done.stdout.splitlines()] == ["web/vda@monday", "db"]


def test_a_command_does_not_load_completion() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, recovery.cli, recovery.remote as r; print(*sys.modules)"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split()
    assert "recovery.remote" in loaded
    assert not {"argcomplete", "recovery.complete"} & set(loaded)


def test_the_server_answers_help_without_its_libraries() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, cdpserver.service.command; print(*sys.modules)"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split()
    assert not {"trio", "fastapi", "numpy", "lmdb", "argcomplete"} & set(loaded)
